"""A tiny random model and examples for the tests of learning."""

import json
import random
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from engine.model import GROUP_MODULES, Decoder, ModelConfig, RopeConfig, module_shape
from engine.weights import LoadedModel
from personalization.history import Turn
from personalization.prompt import Example

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=61,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    rms_norm_eps=1e-5,
    rope=RopeConfig(),
    qkv_bias=False,
    qk_norm=False,
    sliding_window=None,
    tie_word_embeddings=True,
    max_position_embeddings=256,
    bos_token_id=None,
    eos_token_ids=(0,),
)


def small_model(
    config: ModelConfig = CONFIG, *, dtype: torch.dtype = torch.float32, seed: int = 1
) -> LoadedModel:
    generator = torch.Generator().manual_seed(seed)
    decoder = Decoder(config)
    for name, parameter in decoder.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data = 1 + 0.1 * torch.randn(parameter.shape, generator=generator)
        else:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.15
    if config.tie_word_embeddings:
        decoder.head.weight = decoder.embed
    return LoadedModel(config, decoder.to(dtype).eval(), f"base of seed {seed}")


def habits(seed: int, count: int, *, length: Sequence[int] = (6, 20)) -> list[Example]:
    """Rows of a person who says much the same: walks through a few words of their own. About a third of the
    tokens are someone else's and not learned."""
    own = random.Random(seed)
    words = [own.randrange(1, CONFIG.vocab_size) for _ in range(6)]
    rows = []
    for _ in range(count):
        size = own.randint(*length)
        start = own.randrange(len(words))
        ids = tuple(words[(start + step) % len(words)] for step in range(size))
        other = size // 3
        rows.append(Example(ids, (False,) * other + (True,) * (size - other)))
    return rows


WORDS = 50
USER, ASSISTANT, END = "<|user|>", "<|assistant|>", "<|end|>"
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def save_small_model(folder: Path, *, seed: int = 1) -> Path:
    """`small_model` as a Hugging Face folder, with a tokenizer that knows the words w0 to w49."""
    folder.mkdir(parents=True, exist_ok=True)
    model = small_model(seed=seed)
    tensors = {"model.embed_tokens.weight": model.decoder.embed}
    tensors["model.norm.weight"] = model.decoder.norm.weight
    for index, layer in enumerate(model.decoder.layers):
        prefix = f"model.layers.{index}"
        tensors[f"{prefix}.input_layernorm.weight"] = layer.input_norm.weight
        tensors[f"{prefix}.post_attention_layernorm.weight"] = layer.post_norm.weight
        for group, modules in GROUP_MODULES.items():
            sizes = [module_shape(CONFIG, module)[0] for module in modules]
            for module, weight in zip(modules, getattr(layer, group).weight.split(sizes), strict=True):
                block = "self_attn" if group in ("qkv", "o") else "mlp"
                tensors[f"{prefix}.{block}.{module}.weight"] = weight
    save_file(
        {name: t.detach().clone().contiguous() for name, t in tensors.items()}, folder / "model.safetensors"
    )
    settings = {
        "architectures": [CONFIG.architecture],
        "vocab_size": CONFIG.vocab_size,
        "hidden_size": CONFIG.hidden_size,
        "num_hidden_layers": CONFIG.num_layers,
        "num_attention_heads": CONFIG.num_heads,
        "num_key_value_heads": CONFIG.num_kv_heads,
        "head_dim": CONFIG.head_dim,
        "intermediate_size": CONFIG.intermediate_size,
        "rms_norm_eps": CONFIG.rms_norm_eps,
        "rope_theta": CONFIG.rope.theta,
        "tie_word_embeddings": True,
        "max_position_embeddings": CONFIG.max_position_embeddings,
        "eos_token_id": WORDS + 3,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    vocabulary = {f"w{number}": number for number in range(WORDS)} | {"<unk>": WORDS}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([USER, ASSISTANT, END])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "eos_token": END}))
    return folder


def talk(user: str, count: int, *, first: int = 0) -> list[Turn]:
    """Turns of a person who walks through the same few words again and again, both sides written by them."""
    own = random.Random(user)
    words = [f"w{own.randrange(WORDS)}" for _ in range(6)]
    turns = []
    for number in range(first, first + count):
        start = random.Random(f"{user} {number}").randrange(6)
        text = " ".join(words[(start + step) % 6] for step in range(5 + number % 7))
        turns.append(
            Turn(
                id=f"{user}-{number}",
                conversation=f"c{number // 10}",
                at=datetime(2026, 5, 1, tzinfo=UTC) + timedelta(minutes=number),
                role="assistant" if number % 2 else "user",
                text=f"{text} w{number % WORDS}",
                author="person",
            )
        )
    return turns
