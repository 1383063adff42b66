"""The public ops of the CPU's path, and of training, which has its own forms of what it differentiates.

The GPU's kernels are in modules of their own, imported only where there is a GPU (or an interpreter of
Triton): `lora`, `linear`, `attention`, `fused` and `sampling`, called by `engine.gpu_decoder`.
"""

from torch import Tensor

from kernels import gradients, reference
from kernels.reference import (
    RANK_TILE,
    PackedLinear,
    PackedNorm,
    attend_one,
    lane_attention,
    lora_pages,
    paged_attention,
    rope_angles,
    write_kv,
    write_kv_all_layers,
)

# Another package on the public index is called `kernels`; transformers asks for its version
# when it finds the name on the path, and fails on a missing one. Zero makes it look elsewhere.
__version__ = "0.0.0"

__all__ = [
    "RANK_TILE",
    "PackedLinear",
    "PackedNorm",
    "attend_one",
    "gated_activation",
    "lane_attention",
    "lora_pages",
    "paged_attention",
    "rms_norm",
    "rope_angles",
    "rotary",
    "write_kv",
    "write_kv_all_layers",
]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = x / sqrt(mean(x²) + eps) * weight over the last side. x [.., H], weight [H] -> [.., H]."""
    if x.requires_grad:
        return gradients.rms_norm(x, weight, eps)
    return reference.rms_norm(x, weight, eps)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """y = x * cos + (x with its halves exchanged) * sin. x [T, H, D], cos and sin of `rope_angles`."""
    if x.requires_grad:
        return gradients.rotary(x, cos, sin)
    return reference.rotary(x, cos, sin)


def gated_activation(gate_up: Tensor) -> Tensor:
    """y = silu(g) * u. gate_up [T, 2F] = (g | u) -> [T, F]."""
    if gate_up.requires_grad:
        return gradients.gated_activation(gate_up)
    return reference.gated_activation(gate_up)
