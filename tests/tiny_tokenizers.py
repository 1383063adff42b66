"""Small real tokenizers, and chat templates with the habits of the known families."""

import json
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = [
    "Hello there, how are you today? I am fine, thank you very much indeed.",
    "What do you like to do on a rainy day? I like to read, and to listen to music.",
    "user assistant system User: Assistant: said 0 1 2 3 4 5 6 7 8 9 !?.,;:'\"()[]{}<>|/\\-_=+*&^%$#@~`",
    "café naïve Grüße 日本語 ☕ 🙂 end of the turn\n\n\tnew line",
] * 4

SPECIAL = ("<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "[INST]", "[/INST]")

TEMPLATES = {
    # one end token for every role, text trimmed (the demo model)
    "demo": "{{ bos_token }}{%- for message in messages -%}{{ '<|' + message['role'] + '|>' }}"
    "{{ message['content'] | trim }}{{ '<|end|>' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}",
    # ChatML: line ends between the turns
    "chatml": "{% for message in messages %}"
    "{{ '<|user|>' + message.role + '\n' + message.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|user|>assistant\n' }}{% endif %}",
    # Llama 2 and Mistral: strict alternation, system inside the first message, no end after a user's turn
    "alternating": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('no system role') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + '</s>' }}{% endif %}{% endfor %}",
    # Qwen3: the last reply is framed otherwise than those before it; a thinking block opens the reply
    "rewriting": "{% for message in messages %}{% if message.role == 'assistant' and loop.last %}"
    "{{ '<|assistant|><think>\n\n</think>\n\n' + message.content + '<|end|>\n' }}{% else %}"
    "{{ '<|' + message.role + '|>' + message.content + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}"
    "{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}",
    # uses what transformers offers: a date, JSON, loop controls, a namespace, generation marks
    "busy": "{%- set ns = namespace(turns=0) -%}"
    "{{ 'Date: ' + strftime_now('%Y') + ' ' + ({'a': '<é>'} | tojson) + '\n' }}"
    "{%- for message in messages -%}{%- if loop.index > 500 -%}{%- break -%}{%- endif -%}"
    "{%- set ns.turns = ns.turns + 1 -%}{{ '<|' + message.role + '|>' }}"
    "{%- generation -%}{{ message.content + '<|end|>' }}{%- endgeneration -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}",
}


# Where Llama 3 and Qwen split text into words: line ends stay together, whatever follows them.
MODERN_WORDS = r"""[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""


def byte_level_tokenizer(words: str | None = None) -> Tokenizer:
    """Byte-level BPE as GPT-2 and the demo model have it, or with other words, as Llama 3 and Qwen do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if words is not None:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(words), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def byte_fallback_tokenizer() -> Tokenizer:
    """BPE over ▁-joined words with single bytes for the rest, as Llama 2 and Mistral have."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[AddedToken(token, special=True) for token in ("<unk>", *SPECIAL)]
        + [f"<0x{byte:02X}>" for byte in range(256)],
        limit_alphabet=80,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    whole = json.loads(
        tokenizer.to_str()
    )  # the bytes have their places in the vocabulary, but are not special
    whole["added_tokens"] = [each for each in whole["added_tokens"] if not each["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(whole))


def write_tokenizer(folder: Path, template: str | None, tokenizer: Tokenizer | None = None) -> Path:
    """A Hugging Face tokenizer folder; without a template if it is None."""
    folder.mkdir(parents=True, exist_ok=True)
    (tokenizer or byte_level_tokenizer()).save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "special": True, "__type": "AddedToken"},
        "clean_up_tokenization_spaces": False,
    }
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
