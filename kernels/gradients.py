"""The ops that training differentiates, with their gradients written out: fewer passes over memory than
autograd takes through `reference`, which is where training many people at once spends its time.

Weights and angles are frozen: they get no gradient.
"""

from typing import Any

import torch
from torch import Tensor

Context = Any  # torch's own type of a Function's context lacks what a Function may do with it


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`reference.rms_norm`; below float32 the row's scale is rounded to x's type before it is applied."""
    out: Tensor = _RmsNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return out


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`reference.rotary`."""
    out: Tensor = _Rotary.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return out


def gated_activation(gate_up: Tensor) -> Tensor:
    """`reference.gated_activation`."""
    out: Tensor = _GatedActivation.apply(gate_up)  # type: ignore[no-untyped-call]
    return out


class _RmsNorm(torch.autograd.Function):
    """With r = 1 / sqrt(mean(x²) + eps) and h = grad * weight: grad_x = r (h - x r² mean(h x))."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        out: Tensor = (x * scale.to(x.dtype)).mul_(weight)
        return out

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        weighted = grads[0] * weight
        along = (weighted * x).sum(-1, keepdim=True, dtype=scale.dtype)
        along = along.mul_(scale).mul_(scale).div_(-x.shape[-1]).to(x.dtype)
        return weighted.addcmul_(x, along).mul_(scale.to(x.dtype)), None, None


class _Rotary(torch.autograd.Function):
    """A rotation; its gradient is the rotation back."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, -1), sin)

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        grad = grads[0]
        return (grad * cos).addcmul_(grad.roll(grad.shape[-1] // 2, -1), sin, value=-1), None, None


class _GatedActivation(torch.autograd.Function):
    """y = silu(g) u: grad_u = grad silu(g), grad_g = grad u silu'(g), both written where they belong."""

    @staticmethod
    def forward(ctx: Context, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        activated = torch.nn.functional.silu(gate)
        ctx.save_for_backward(gate_up, activated)
        return activated * up

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate_up, activated = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        both = torch.empty_like(gate_up)
        grad_gate, grad_up = both.chunk(2, dim=-1)
        torch.mul(grads[0], activated, out=grad_up)
        torch.ops.aten.silu_backward(grads[0] * up, gate, grad_input=grad_gate)
        return (both,)
