"""The decoder of the Llama family, written once: serving and training inject their attention and their LoRA.

Llama 2/3, Mistral, Qwen2 and Qwen3 differ in a handful of facts, all of them in ModelConfig. Tokens of a
step lie in one flat row [T], whatever sequences they belong to; only `attend` knows about sequences.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

import kernels

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GROUPS = ("qkv", "o", "gate_up", "down")
GROUP_MODULES: dict[str, tuple[str, ...]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary frequencies: theta^(-2i/D), for `linear` divided by `factor`, for `llama3` by wavelength."""

    theta: float = 10_000.0
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What differs between the families. `sliding_layers` are the layers `sliding_window` applies to."""

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope: RopeConfig
    qkv_bias: bool
    qk_norm: bool
    sliding_window: int | None
    tie_word_embeddings: bool
    max_position_embeddings: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    sliding_layers: tuple[int, ...] = ()

    def window(self, layer: int) -> int | None:
        """How many positions a token of this layer sees, itself included; None: all before it."""
        return self.sliding_window if layer in self.sliding_layers else None


def module_shape(config: ModelConfig, module: str) -> tuple[int, int]:
    """(out_features, in_features) of a linear module by its Hugging Face name."""
    hidden, ffn, dim = config.hidden_size, config.intermediate_size, config.head_dim
    return {
        "q_proj": (config.num_heads * dim, hidden),
        "k_proj": (config.num_kv_heads * dim, hidden),
        "v_proj": (config.num_kv_heads * dim, hidden),
        "o_proj": (hidden, config.num_heads * dim),
        "gate_proj": (ffn, hidden),
        "up_proj": (ffn, hidden),
        "down_proj": (hidden, ffn),
    }[module]


def group_shape(config: ModelConfig, group: str) -> tuple[int, int]:
    """(sum of out_features, in_features) of a fused group."""
    shapes = [module_shape(config, module) for module in GROUP_MODULES[group]]
    return sum(out for out, _ in shapes), shapes[0][1]


class Attend(Protocol):
    """q [T, Hq, D], k and v [T, Hkv, D], after rotary -> [T, Hq, D]; stores k and v where it wants them."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


class Lora(Protocol):
    """x [T, in], y [T, sum of out] -> y + delta.

    y is x @ W.T (+ bias), for the groups "o" and "down" with the residual already added. The call may
    change y in place when autograd is off.
    """

    def __call__(self, layer: int, group: str, x: Tensor, y: Tensor) -> Tensor: ...


# The parts of the decoder are called as plain functions (`__call__` instead of `forward`): a step calls a
# hundred of them, and the way through nn.Module's hooks costs as much as a small operation.


class Norm(nn.Module):
    """y = x / sqrt(mean(x²) + eps) * weight over the last side."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = _frozen(size)
        self.eps = eps
        self.packed: kernels.PackedNorm | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.packed is not None and not torch.is_grad_enabled():
            return self.packed(x)
        return kernels.rms_norm(x, self.weight, self.eps)

    def pack(self) -> None:
        """Compute with fewer operations from now on, outside of training; for float32 on a CPU."""
        self.packed = kernels.PackedNorm(self.weight, self.eps)


class Projection(nn.Module):
    """y = x @ W.T (+ bias) (+ residual), W [out, in] fused from the modules of one group."""

    def __init__(self, shape: tuple[int, int], *, bias: bool = False) -> None:
        super().__init__()
        self.weight = _frozen(*shape)
        self.bias = _frozen(shape[0]) if bias else None
        self.packed: kernels.PackedLinear | None = None

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.packed is not None and not torch.is_grad_enabled():
            y = self.packed(x)
            return y if residual is None else y.add_(residual)
        if residual is not None and self.bias is None:
            return torch.addmm(residual, x, self.weight.t())
        y = nn.functional.linear(x, self.weight, self.bias)
        return y if residual is None else y + residual

    def pack(self) -> None:
        """Compute from a packed copy from now on, outside of training; see PackedLinear.supports."""
        self.packed = kernels.PackedLinear(self.weight, self.bias)


class Layer(nn.Module):
    """One block: norm, attention, norm, gated feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        self.head_dim = config.head_dim
        self.input_norm = Norm(config.hidden_size, config.rms_norm_eps)
        self.post_norm = Norm(config.hidden_size, config.rms_norm_eps)
        self.q_norm = Norm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = Norm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.qkv = Projection(group_shape(config, "qkv"), bias=config.qkv_bias)
        self.o = Projection(group_shape(config, "o"))
        self.gate_up = Projection(group_shape(config, "gate_up"))
        self.down = Projection(group_shape(config, "down"))

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, lora: Lora | None) -> Tensor:
        index = self.index
        normed = self.input_norm(x)
        qkv = self.qkv(normed)
        if lora is not None:
            qkv = lora(index, "qkv", normed, qkv)
        mixed = attend(index, *self._rotated(qkv, cos, sin)).reshape(x.shape[0], -1)
        x = self.o(mixed, x)
        if lora is not None:
            x = lora(index, "o", mixed, x)
        normed = self.post_norm(x)
        gate_up = self.gate_up(normed)
        if lora is not None:
            gate_up = lora(index, "gate_up", normed, gate_up)
        activated = kernels.gated_activation(gate_up)
        x = self.down(activated, x)
        if lora is not None:
            x = lora(index, "down", activated, x)
        return x

    def _rotated(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        num_q, num_kv, _ = self.heads
        if self.q_norm is None or self.k_norm is None:
            return kernels.split_rotary(qkv, num_q, num_kv, cos, sin)
        heads = qkv.view(qkv.shape[0], -1, self.head_dim)  # [T, Hq + 2 Hkv, D]
        q, k, v = torch.split(heads, list(self.heads), dim=1)
        q = kernels.rotary(self.q_norm(q), cos, sin)
        k = kernels.rotary(self.k_norm(k), cos, sin)
        return q, k, v


class Decoder(nn.Module):
    """Token ids in, hidden states out. Base parameters never require gradients; x and y carry them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        # No buffer: .to(bfloat16) must leave it alone, as bfloat16 angles are wrong soon.
        inv_freq = rope_frequencies(config.rope, config.head_dim)
        self._signed_freq = torch.cat((-inv_freq, inv_freq))
        self.inverse_frequencies = inv_freq
        self.embed = _frozen(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_layers))
        # Gets the residual stream before each layer and gives it back: who shares the device waits here.
        self.before_layer: Callable[[Tensor], Tensor] | None = None
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)
        self.head = Projection((config.vocab_size, config.hidden_size))
        if config.tie_word_embeddings:
            self.head.weight = self.embed

    def forward(
        self, token_ids: Tensor, positions: Tensor, attend: Attend, lora: Lora | None = None
    ) -> Tensor:
        """token_ids [T], positions [T] -> hidden states [T, hidden] after the final norm."""
        x = nn.functional.embedding(token_ids, self.embed)
        cos, sin = kernels.rope_angles(positions, self._signed_freq.to(x.device), x.dtype)
        for layer in self.layers:
            assert isinstance(layer, Layer)
            if self.before_layer is not None:
                x = self.before_layer(x)
            x = layer(x, cos, sin, attend, lora)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [.., hidden] -> [.., vocab] in float32."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        return self.head(flat).float().view(*hidden.shape[:-1], -1)

    def pack(self, most_bytes: int) -> None:
        """Prepare for serving on a CPU: each part its packed form, if every part has one and all together
        (a copy of the model at most) take no more than `most_bytes`. Training is not affected.
        """
        projections = [module for module in self.modules() if isinstance(module, Projection)]
        size = sum(p.weight.numel() * p.weight.element_size() for p in projections)
        if size > most_bytes or not all(kernels.PackedLinear.supports(p.weight) for p in projections):
            return
        for module in self.modules():
            if isinstance(module, Projection | Norm):
                module.pack()


def rope_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """inv_freq [D/2], float32: the angle of pair i at position p is p * inv_freq[i].

    llama3: wavelengths above original/low are slowed by `factor`, those below original/high kept, those
    between interpolated.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float() / head_dim
    inv_freq = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return inv_freq / rope.factor
    if rope.kind == "default":
        return inv_freq
    wavelength = 2 * torch.pi / inv_freq
    low_wavelength = rope.original_max_position / rope.low_freq_factor
    high_wavelength = rope.original_max_position / rope.high_freq_factor
    smooth = (rope.original_max_position / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    between = (1 - smooth) * inv_freq / rope.factor + smooth * inv_freq
    scaled = torch.where(wavelength > low_wavelength, inv_freq / rope.factor, inv_freq)
    is_between = (wavelength >= high_wavelength) & (wavelength <= low_wavelength)
    return torch.where(is_between, between, scaled)


def _frozen(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape), requires_grad=False)
