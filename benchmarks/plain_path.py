"""The decoder as plain torch over whole sequences: no pages, no batching tricks, LoRA as two products.

What an engine's outputs are held against. Slow, and meant to be read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.adapter_files import LoraWeights
from engine.model import GROUP_MODULES, Layer, module_shape, rope_frequencies
from engine.weights import LoadedModel
from kernels import reference


@dataclass(frozen=True)
class Passage:
    """Tokens of one sequence, its adapter, and how many of its last positions logits are wanted of."""

    tokens: tuple[int, ...]
    adapter: LoraWeights | None
    wanted: int


@torch.inference_mode()
def plain_logits(model: LoadedModel, passages: Sequence[Passage], dtype: torch.dtype) -> list[Tensor]:
    """Logits [wanted, vocab] float32 of each passage, computed in `dtype` from the model's weights."""
    config, decoder = model.config, model.decoder
    device, eps = decoder.embed.device, config.rms_norm_eps
    lengths = [len(passage.tokens) for passage in passages]
    token_ids = torch.tensor([token for passage in passages for token in passage.tokens], device=device)
    positions = torch.cat([torch.arange(length) for length in lengths]).to(device)
    inverse = rope_frequencies(config.rope, config.head_dim).to(device)
    cos, sin = reference.rope_angles(positions, torch.cat((-inverse, inverse)), dtype)
    heads = [config.num_heads, config.num_kv_heads, config.num_kv_heads]

    def project(layer: Layer, group: str, x: Tensor) -> Tensor:
        projection = getattr(layer, group)
        bias = None if projection.bias is None else projection.bias.to(dtype)
        y = torch.nn.functional.linear(x, projection.weight.to(dtype), bias)
        modules = GROUP_MODULES[group]
        columns = torch.split(y, [module_shape(config, module)[0] for module in modules], dim=1)
        begin = 0
        for passage, length in zip(passages, lengths, strict=True):
            rows = slice(begin, begin + length)
            begin += length
            for lora in () if passage.adapter is None else passage.adapter.modules:
                if lora.layer == layer.index and lora.module in modules:
                    a, b = lora.a.to(device, dtype), lora.b.to(device, dtype)
                    columns[modules.index(lora.module)][rows].add_(x[rows] @ a.t() @ b.t(), alpha=lora.scale)
        return y

    x = torch.nn.functional.embedding(token_ids, decoder.embed).to(dtype)
    for layer in decoder.layers:
        assert isinstance(layer, Layer)
        normed = reference.rms_norm(x, layer.input_norm.weight.to(dtype), eps)
        qkv = project(layer, "qkv", normed).view(len(token_ids), -1, config.head_dim)
        q, k, v = torch.split(qkv, heads, dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q = reference.rms_norm(q, layer.q_norm.weight.to(dtype), eps)
            k = reference.rms_norm(k, layer.k_norm.weight.to(dtype), eps)
        q, k = reference.rotary(q, cos, sin), reference.rotary(k, cos, sin)
        of_each = [torch.split(heads_of, lengths) for heads_of in (q, k, v)]
        scale, window = config.head_dim**-0.5, config.window(layer.index)
        mixed = torch.cat(
            [reference.attend_one(a, b, c, scale, window) for a, b, c in zip(*of_each, strict=True)]
        )
        x = x + project(layer, "o", mixed.reshape(len(token_ids), -1))
        normed = reference.rms_norm(x, layer.post_norm.weight.to(dtype), eps)
        x = x + project(layer, "down", reference.gated_activation(project(layer, "gate_up", normed)))
    found = []
    for passage, hidden in zip(passages, torch.split(x, lengths), strict=True):
        last = reference.rms_norm(hidden[-passage.wanted :], decoder.norm.weight.to(dtype), eps)
        found.append(torch.nn.functional.linear(last, decoder.head.weight.to(dtype)).float())
    return found
