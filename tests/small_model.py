"""A tiny random model and examples for the tests of learning."""

import random
from collections.abc import Sequence

import torch

from engine.model import Decoder, ModelConfig, RopeConfig
from engine.weights import LoadedModel
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
        if name.endswith("norm"):
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
