"""The embedded demo model is whole: it loads as it is, stays small, and ends its replies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from service import demo_model
from service.demo_model import corpora

FOLDER = demo_model.path()
LICENCES = (
    "CC BY-SA 4.0",
    "CC BY 4.0",
    "BSD-3-Clause",
    "CDLA-Sharing-1.0",
    "MIT",
    "CC0",
    "Apache-2.0",
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


def test_small_enough() -> None:
    files = [file for file in FOLDER.iterdir() if file.is_file()]
    shards = [file for file in files if file.suffix == ".safetensors"]
    assert shards
    assert max(file.stat().st_size for file in shards) < 16 * 2**20
    assert sum(file.stat().st_size for file in files) <= 40_000_000


def test_index_names_every_shard() -> None:
    index = json.loads((FOLDER / "model.safetensors.index.json").read_text())
    assert {file.name for file in FOLDER.glob("*.safetensors")} == set(index["weight_map"].values())


def test_loads_with_the_documented_shape(model: Any) -> None:
    import torch

    config = model.config
    assert type(model).__name__ == "LlamaForCausalLM"
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (384, 10, 1024)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (6, 2, 64)
    assert (config.vocab_size, config.max_position_embeddings) == (8192, 2048)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert sum(parameter.numel() for parameter in model.parameters()) == 18_882_432
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


def test_template_renders_every_role(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " Hello there! "},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "How are you?"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|begin|><|system|>Be brief.<|end|><|user|>Hello there!<|end|>"
        "<|assistant|>Hi.<|end|><|user|>How are you?<|end|><|assistant|>"
    )
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert [ids.count(i) for i in range(1, 6)] == [1, 4, 1, 2, 2]  # begin, end, system, user, assistant


@pytest.mark.parametrize(
    "text",
    [
        "plain words, 1234567890 and 'quotes'",
        "  spaces   and\ttabs\r\n\n\nlines  ",
        "Zażółć gęślą jaźń, Ελληνικά, русский, العربية",
        "日本語と한국어 🎉👩‍👩‍👧‍👦 é é ﬁ",
        "\x00\x7f\ufeff\U0010ffff",
    ],
)
def test_any_text_round_trips(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize("prompt", ["Hi! How are you today?", "Have you seen any good movies lately?"])
def test_greedy_reply_says_something_and_ends(model: Any, tokenizer: Any, prompt: str) -> None:
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(
        **inputs, do_sample=False, temperature=None, top_p=None, top_k=None, max_new_tokens=128
    )
    reply = output[0, inputs["input_ids"].shape[1] :].tolist()
    assert reply[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(reply[:-1]).strip()


def test_card_names_every_licence() -> None:
    card = (Path(demo_model.__file__).parent / "MODEL_CARD.md").read_text()
    assert [licence for licence in LICENCES if licence not in card] == []


def test_held_out_documents_stay_the_same() -> None:
    def document(key: str, person: str) -> corpora.Document:
        return corpora.Document(key, (corpora.Turn("user", "x"),), person)

    chosen = [i for i in range(200) if corpora.held_out("self-dialogue", document("a", str(i)))]
    assert chosen == [11, 13, 15, 88, 102, 197]
    assert chosen == [i for i in range(200) if corpora.held_out("self-dialogue", document("b", str(i)))]
