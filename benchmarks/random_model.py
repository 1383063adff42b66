"""Models of well-known shapes with random weights, and random adapters for them by the thousand.

What a step costs depends on shapes and bytes alone, so random weights measure the same as trained ones. They
are scaled so that the residual stream stays of order one, every layer's attention and feed-forward part
matters, logits have a standard deviation of about one, and greedy replies wander over the vocabulary.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.adapter_files import LoraModule, LoraWeights, version_folder, write_adapter
from engine.model import GROUP_MODULES, GROUPS, MODULES, Decoder, Layer, ModelConfig, RopeConfig, module_shape
from engine.request import AdapterRef
from engine.weights import LoadedModel, module_path
from kernels import RANK_TILE

LLAMA_3_1_8B = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=128_256,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=14_336,
    rms_norm_eps=1e-5,
    rope=RopeConfig(500_000.0, "llama3", 8.0, 1.0, 4.0, 8192),
    qkv_bias=False,
    qk_norm=False,
    sliding_window=None,
    tie_word_embeddings=False,
    max_position_embeddings=131_072,
    bos_token_id=128_000,
    eos_token_ids=(128_001,),
)
LLAMA_2_7B = replace(
    LLAMA_3_1_8B,
    vocab_size=32_000,
    num_kv_heads=32,
    intermediate_size=11_008,
    rope=RopeConfig(),
    max_position_embeddings=4096,
    bos_token_id=1,
    eos_token_ids=(2,),
)
TINY = replace(
    LLAMA_3_1_8B,
    vocab_size=512,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=96,
    rope=RopeConfig(),
    max_position_embeddings=2048,
    bos_token_id=None,
    eos_token_ids=(0,),
)

# Standard deviation of a module's output for an input of standard deviation 1. Queries and keys are a little
# larger, so that attention picks; what is added to the residual stream is smaller, so that 32 layers do not
# swell it.
GAINS = {"q_proj": 1.2, "k_proj": 1.2, "o_proj": 0.6, "down_proj": 0.3}
ADAPTER_GAIN = 0.5  # of an adapter's delta: strong enough to change most replies within a few tokens


def random_model(
    config: ModelConfig, *, device: str | torch.device, dtype: torch.dtype, seed: int = 0
) -> LoadedModel:
    """Weights drawn on the device itself: an 8B-shaped model takes about a second on a GPU."""
    with torch.device("meta"):
        decoder = Decoder(config).to(dtype)
    decoder.to_empty(device=device)
    if config.tie_word_embeddings:
        decoder.head.weight = decoder.embed  # to_empty gave each its own memory
    generator = torch.Generator(device).manual_seed(seed)
    for parameter in decoder.parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(1)
        else:
            parameter.data.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
    decoder.embed.data.mul_(config.hidden_size**0.5)
    for layer in decoder.layers:
        for name, weight in _module_weights(config, layer):
            weight.mul_(GAINS.get(name, 1.0))
    return LoadedModel(config, decoder.eval(), f"random weights of seed {seed}")


def save_model(folder: Path, model: LoadedModel) -> None:
    """Write `model` as a Hugging Face folder, a shard per eight layers."""
    config, decoder = model.config, model.decoder
    shards: list[dict[str, Tensor]] = [
        {
            "model.embed_tokens.weight": decoder.embed,
            "model.norm.weight": decoder.norm.weight,
            "lm_head.weight": decoder.head.weight,
        }
    ]
    for index, layer in enumerate(decoder.layers):
        assert isinstance(layer, Layer)
        if index % 8 == 0:
            shards.append({})
        prefix = f"model.layers.{index}."
        shards[-1][prefix + "input_layernorm.weight"] = layer.input_norm.weight
        shards[-1][prefix + "post_attention_layernorm.weight"] = layer.post_norm.weight
        for name, weight in _module_weights(config, layer):
            shards[-1][f"{prefix}{module_path(name)}.weight"] = weight
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({key: tensor.detach().cpu().clone() for key, tensor in shard.items()}, folder / name)
        weight_map |= dict.fromkeys(shard, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    rope = config.rope
    (folder / "config.json").write_text(
        json.dumps(
            {
                "architectures": [config.architecture],
                "vocab_size": config.vocab_size,
                "hidden_size": config.hidden_size,
                "num_hidden_layers": config.num_layers,
                "num_attention_heads": config.num_heads,
                "num_key_value_heads": config.num_kv_heads,
                "head_dim": config.head_dim,
                "intermediate_size": config.intermediate_size,
                "rms_norm_eps": config.rms_norm_eps,
                "rope_parameters": {
                    "rope_type": rope.kind,
                    "rope_theta": rope.theta,
                    "factor": rope.factor,
                    "low_freq_factor": rope.low_freq_factor,
                    "high_freq_factor": rope.high_freq_factor,
                    "original_max_position_embeddings": rope.original_max_position,
                },
                "tie_word_embeddings": config.tie_word_embeddings,
                "max_position_embeddings": config.max_position_embeddings,
                "bos_token_id": config.bos_token_id,
                "eos_token_id": list(config.eos_token_ids),
            }
        )
    )


@dataclass(frozen=True)
class AdapterKind:
    """What the adapters of a kind have in common; adapter n has rank ranks[n % len(ranks)]."""

    name: str
    ranks: tuple[int, ...]
    modules: tuple[str, ...]  # in the order of MODULES

    def rank(self, number: int) -> int:
        return self.ranks[number % len(self.ranks)]


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ATTENTION_16 = AdapterKind("rank 16 on q, k, v, o", (16,), ATTENTION)
ATTENTION_8 = AdapterKind("rank 8 on q, k, v, o", (8,), ATTENTION)
ATTENTION_64 = AdapterKind("rank 64 on q, k, v, o", (64,), ATTENTION)
ATTENTION_8_TO_64 = AdapterKind("ranks 64, 32, 16, 8 on q, k, v, o", (64, 32, 16, 8), ATTENTION)
QV_8 = AdapterKind("rank 8 on q, v", (8,), ("q_proj", "v_proj"))
ALL_16 = AdapterKind("rank 16 on all linear modules", (16,), MODULES)
KINDS = (ATTENTION_16, ATTENTION_8, ATTENTION_64, ATTENTION_8_TO_64, QV_8, ALL_16)


class RandomAdapters:
    """Any number of distinct adapters in no time and next to no memory.

    All matrices are windows on one bank of random numbers, at places drawn from the adapter's id: two
    adapters differ in every matrix (but for a chance of one in a million each), and making one copies
    nothing. Both A and B are nonzero.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        self.config = config
        widest = max(map(max, (module_shape(config, module) for module in MODULES)))
        size = max(64 * widest + (1 << 16), min(1 << 26, 2048 * widest))
        generator = torch.Generator().manual_seed(1)
        bank = torch.empty(size).normal_(std=config.hidden_size**-0.5, generator=generator)
        self._bank = bank.to(dtype)
        self._shapes = {module: module_shape(config, module) for module in MODULES}

    def ref(self, kind: AdapterKind, number: int) -> AdapterRef:
        return AdapterRef(f"{KINDS.index(kind):02x}{number:08x}", 1)

    def refs(self, kind: AdapterKind, count: int) -> list[AdapterRef]:
        return [self.ref(kind, number) for number in range(count)]

    def read(self, ref: AdapterRef) -> LoraWeights:
        """The weights of an adapter named by `ref`, in the dtype of the bank."""
        kind, rank = self._kind_and_rank(ref)
        chooser = random.Random(ref.id)
        hidden = self.config.hidden_size
        modules = []
        for layer in range(self.config.num_layers):
            for module in kind.modules:
                out_features, in_features = self._shapes[module]
                a = self._window(chooser, rank, in_features)
                b = self._window(chooser, rank, out_features).t()
                scale = ADAPTER_GAIN * (hidden / rank) ** 0.5
                if module == "down_proj":
                    scale *= GAINS[module] * (hidden / in_features) ** 0.5
                modules.append(LoraModule(layer, module, a, b, scale))
        return LoraWeights(tuple(modules))

    def nbytes(self, ref: AdapterRef) -> int:
        """Bytes of A and B at the adapter's rank, as the arena stores it: what a step must read of it."""
        kind, rank = self._kind_and_rank(ref)
        stored = -(-rank // RANK_TILE) * RANK_TILE
        sides = sum(sum(module_shape(self.config, module)) for module in kind.modules)
        return self.config.num_layers * stored * sides * self._bank.element_size()

    def write(self, root: Path, refs: Iterable[AdapterRef], *, threads: int) -> None:
        """Each as a PEFT folder below `root`, in the dtype of the bank."""

        def write(ref: AdapterRef) -> None:
            folder = version_folder(root, ref.id, ref.version)
            own = [
                replace(m, a=m.a.clone(), b=m.b.clone()) for m in self.read(ref).modules
            ]  # no shared memory
            weights, dtype = LoraWeights(tuple(own)), self._bank.dtype
            write_adapter(folder, weights, self.config, base_model="random", dtype=dtype)

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(write, refs))

    def _kind_and_rank(self, ref: AdapterRef) -> tuple[AdapterKind, int]:
        kind = KINDS[int(ref.id[:2], 16)]
        return kind, kind.rank(int(ref.id[2:], 16))

    def _window(self, chooser: random.Random, rank: int, width: int) -> Tensor:
        begin = int(chooser.random() * (self._bank.numel() - rank * width))
        return self._bank[begin : begin + rank * width].view(rank, width)


def weight_bytes(config: ModelConfig, itemsize: int) -> int:
    """Bytes of weights that every step reads: all matrices but the embedding, of which it needs few rows."""
    linear = sum(out * width for out, width in (module_shape(config, module) for module in MODULES))
    return (config.num_layers * linear + config.vocab_size * config.hidden_size) * itemsize


def kv_bytes(config: ModelConfig, itemsize: int) -> int:
    """Bytes of K and V of one token over all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize


def _module_weights(config: ModelConfig, layer: torch.nn.Module) -> list[tuple[str, Tensor]]:
    """Views on the fused weights of a layer, by module."""
    found: list[tuple[str, Tensor]] = []
    for group in GROUPS:
        sizes = [module_shape(config, module)[0] for module in GROUP_MODULES[group]]
        parts = getattr(layer, group).weight.data.split(sizes)
        found += zip(GROUP_MODULES[group], parts, strict=True)
    return found
