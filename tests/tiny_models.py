"""Tiny random models of each family, made by transformers itself, for the engine's tests."""

from collections.abc import Callable
from pathlib import Path

import torch
import transformers

VOCAB = 97
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}

FAMILIES: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "llama2": lambda: transformers.LlamaConfig(**_SIZES),
    "llama2-linear-rope": lambda: transformers.LlamaConfig(**_SIZES, rope_parameters=_LINEAR_ROPE),
    "llama3": lambda: transformers.LlamaConfig(
        **_SIZES, num_key_value_heads=2, tie_word_embeddings=True, rope_parameters=_LLAMA3_ROPE
    ),
    "mistral": lambda: transformers.MistralConfig(
        **_SIZES, num_key_value_heads=2, sliding_window=7, head_dim=20
    ),
    "mistral-no-window": lambda: transformers.MistralConfig(
        **_SIZES, num_key_value_heads=1, sliding_window=None
    ),
    "qwen2": lambda: transformers.Qwen2Config(**_SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen2-window": lambda: transformers.Qwen2Config(
        **_SIZES, num_key_value_heads=2, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "qwen3": lambda: transformers.Qwen3Config(**_SIZES, num_key_value_heads=2, head_dim=24),
}


def save_random(
    folder: Path, config: transformers.PreTrainedConfig, *, seed: int = 3, max_shard_size: str = "1GB"
) -> transformers.PreTrainedModel:
    """A model whose weights are large enough that every part of it moves the logits, saved to `folder`."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "bias" not in name:  # a norm
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model.eval()
