"""The public ops of the CPU's path, and of training, which has its own forms of what it differentiates.

The GPU's kernels are in modules of their own, imported only where there is a GPU (or an interpreter of
Triton): `lora`, `linear`, `attention`, `fused` and `sampling`, called by `engine.gpu_decoder`, and
`training`.
"""

from typing import Any

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
    "split_rotary",
    "write_kv",
    "write_kv_all_layers",
]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = x / sqrt(mean(x²) + eps) * weight over the last side. x [.., H], weight [H] -> [.., H]."""
    if x.requires_grad:
        out: Tensor = _differentiated(x).rms_norm(x, weight, eps)
        return out
    return reference.rms_norm(x, weight, eps)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """y = x * cos + (x with its halves exchanged) * sin. x [T, H, D], cos and sin of `rope_angles`."""
    if x.requires_grad:
        return gradients.rotary(x, cos, sin)
    return reference.rotary(x, cos, sin)


def split_rotary(
    qkv: Tensor, num_q: int, num_kv: int, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`rotary` of q and k, and v as it is. qkv [T, (Hq + 2 Hkv) D] -> q [T, Hq, D], k and v [T, Hkv, D]."""
    if qkv.requires_grad and qkv.is_cuda:
        q, k, v = _differentiated(qkv).split_rotary(qkv, num_q, num_kv, cos, sin)
        return q, k, v
    heads = qkv.view(qkv.shape[0], num_q + 2 * num_kv, -1)
    turned = rotary(heads[:, : num_q + num_kv], cos, sin)
    return turned[:, :num_q], turned[:, num_q:], heads[:, num_q + num_kv :]


def gated_activation(gate_up: Tensor) -> Tensor:
    """y = silu(g) * u. gate_up [T, 2F] = (g | u) -> [T, F]."""
    if gate_up.requires_grad:
        out: Tensor = _differentiated(gate_up).gated_activation(gate_up)
        return out
    return reference.gated_activation(gate_up)


def _differentiated(x: Tensor) -> Any:
    """The ops with gradients for the device that x is on."""
    if not x.is_cuda:
        return gradients
    from kernels import training

    return training
