"""The ops of `gradients` and what else a step of training consists of, as Triton kernels of one pass each.

Between two products a training step does nothing but read and write memory, so every op here reads what it
needs once and writes once; numbers are float32 inside. Plain torch (`gradients`, `reference` and the
processor's path of `personalization`) says what each computes.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

Context = Any  # torch's own type of a Function's context lacks what a Function may do with it

_TILE = 4096  # numbers of a tensor that one program works on
_WORDS = 4096  # logits that one program reads at a time
_UPDATED = 1024  # weights that one program updates


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`reference.rms_norm`."""
    out: Tensor = _RmsNorm.apply(x, weight, eps)
    return out


def split_rotary(
    qkv: Tensor, num_q: int, num_kv: int, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`kernels.split_rotary`."""
    q, k, v = _SplitRotary.apply(qkv, num_q, num_kv, cos, sin)
    return q, k, v


def gated_activation(gate_up: Tensor) -> Tensor:
    """`reference.gated_activation`."""
    out: Tensor = _GatedActivation.apply(gate_up)
    return out


def cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """-log softmax(logits[n])[targets[n]] for each n, as float32 [N]; `logits` [N, V], contiguous, become the
    gradient of the sum of weights[n] times that: weights[n] (softmax(logits[n]) - onehot(targets[n]))."""
    rows, words = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        block = min(_WORDS, triton.next_power_of_2(words))
        _cross_entropy_kernel[(rows,)](logits, targets, weights, losses, words, BLOCK=block, num_warps=8)
    return losses


def adam(
    rows: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    working: Tensor,
    starts: Tensor | None,
    rates: Tensor,
    pulls: Tensor,
    divide_by: Tensor,
    sound: Tensor,
    step: int,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """The update of `AdapterStack.update`, for each row u with rates[u] > 0 and sound[u]; `working` becomes
    the new rows in its type. rows, first, second, starts [U, P] float32, gradient and working [U, P], their
    rows contiguous; rates, pulls, divide_by [U] float32, sound [U] bool."""
    people, size = rows.shape
    blocks = triton.cdiv(size, _UPDATED)
    _adam_kernel[(blocks, people)](
        rows, gradient, first, second, working, rows if starts is None else starts,
        rates, pulls, divide_by, sound, size,
        rows.stride(0), gradient.stride(0), working.stride(0),
        1 - betas[0] ** step, 1 - betas[1] ** step, betas[0], betas[1], eps,
        IS_PULLED=starts is not None, BLOCK=_UPDATED,
    )  # fmt: skip


# ---------------------------------------------------------------- norm


def _tile(width: int) -> tuple[int, int]:
    """(rows of a program, width padded to a power of two)."""
    padded = triton.next_power_of_2(width)
    return max(1, _TILE // padded), padded


@triton.jit
def _norm_kernel(
    x, weight, y, scale, T, H, eps, ROWS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, WIDTH)
    inside = (rows < T)[:, None] & (c < H)[None, :]
    at = rows[:, None] * H + c[None, :]
    e = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + c, mask=c < H, other=0.0).to(tl.float32)
    s = tl.rsqrt(tl.sum(e * e, axis=1) / H + eps)
    tl.store(y + at, (e * s[:, None] * w[None, :]).to(y.dtype.element_ty), mask=inside)
    tl.store(scale + rows, s, mask=rows < T)


@triton.jit
def _norm_backward_kernel(
    grad, x, weight, scale, out, T, H, ROWS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, WIDTH)
    inside = (rows < T)[:, None] & (c < H)[None, :]
    at = rows[:, None] * H + c[None, :]
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    e = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + c, mask=c < H, other=0.0).to(tl.float32)
    s = tl.load(scale + rows, mask=rows < T, other=0.0)
    h = g * w[None, :]
    along = tl.sum(h * e, axis=1) * s * s / H
    tl.store(out + at, (s[:, None] * (h - e * along[:, None])).to(out.dtype.element_ty), mask=inside)


class _RmsNorm(torch.autograd.Function):
    """See `gradients._RmsNorm` for the formula."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        # Heads cut out of wider rows: of one alone, reshape makes a view with those rows' stride.
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        (count, width), (rows, padded) = flat.shape, _tile(x.shape[-1])
        y, scale = torch.empty_like(flat), torch.empty(count, dtype=torch.float32, device=x.device)
        _norm_kernel[(triton.cdiv(count, rows),)](
            flat, weight, y, scale, count, width, eps, ROWS=rows, WIDTH=padded, num_warps=8
        )
        ctx.save_for_backward(flat, weight, scale)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flat, weight, scale = ctx.saved_tensors
        (grad,) = grads
        (count, width), (rows, padded) = flat.shape, _tile(flat.shape[-1])
        out = torch.empty_like(flat)
        _norm_backward_kernel[(triton.cdiv(count, rows),)](
            grad.contiguous(), flat, weight, scale, out, count, width, ROWS=rows, WIDTH=padded, num_warps=8
        )
        return out.view(grad.shape), None, None


# ---------------------------------------------------------------- rotary


@triton.jit
def _turn_kernel(
    q, k, v, stride_q, stride_k, stride_v, out_q, out_k, out_v, out_stride_q, out_stride_k, out_stride_v,
    cos, sin, T, NUM_Q, NUM_KV, DIRECTION: tl.constexpr,
    HALF: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64)[None, None] * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, WIDTH)[None, :]
    head, pair = c // HALF, c % HALF
    is_row = rows < T
    is_q = is_row & (head < NUM_Q)
    is_k = is_row & (head >= NUM_Q) & (head < NUM_Q + NUM_KV)
    is_v = is_row & (head >= NUM_Q + NUM_KV) & (head < NUM_Q + 2 * NUM_KV)
    at_q = head * (2 * HALF) + pair
    at_k = (head - NUM_Q) * (2 * HALF) + pair
    at_v = (head - NUM_Q - NUM_KV) * (2 * HALF) + pair
    low = tl.load(q + rows * stride_q + at_q, mask=is_q, other=0.0).to(tl.float32)
    high = tl.load(q + rows * stride_q + at_q + HALF, mask=is_q, other=0.0).to(tl.float32)
    low += tl.load(k + rows * stride_k + at_k, mask=is_k, other=0.0).to(tl.float32)
    high += tl.load(k + rows * stride_k + at_k + HALF, mask=is_k, other=0.0).to(tl.float32)
    angle = rows * (2 * HALF) + HALF + pair
    cosine = tl.load(cos + angle, mask=is_q | is_k, other=1.0).to(tl.float32)
    sine = tl.load(sin + angle, mask=is_q | is_k, other=0.0).to(tl.float32) * DIRECTION
    new_low = low * cosine - high * sine
    new_high = high * cosine + low * sine
    kind = out_q.dtype.element_ty
    tl.store(out_q + rows * out_stride_q + at_q, new_low.to(kind), mask=is_q)
    tl.store(out_q + rows * out_stride_q + at_q + HALF, new_high.to(kind), mask=is_q)
    tl.store(out_k + rows * out_stride_k + at_k, new_low.to(kind), mask=is_k)
    tl.store(out_k + rows * out_stride_k + at_k + HALF, new_high.to(kind), mask=is_k)
    copied = tl.load(v + rows * stride_v + at_v, mask=is_v, other=0.0)
    tl.store(out_v + rows * out_stride_v + at_v, copied, mask=is_v)
    copied = tl.load(v + rows * stride_v + at_v + HALF, mask=is_v, other=0.0)
    tl.store(out_v + rows * out_stride_v + at_v + HALF, copied, mask=is_v)


def _turn(
    parts: tuple[Tensor, Tensor, Tensor],
    out: tuple[Tensor, Tensor, Tensor],
    cos: Tensor,
    sin: Tensor,
    direction: int,
) -> None:
    """q and k [T, H, D] turned by the angles or back, v as it is, into `out`. Heads of a row contiguous."""
    q, k, _ = parts
    half = q.shape[-1] // 2
    count = q.shape[0]
    rows, padded = _tile((q.shape[1] + 2 * k.shape[1]) * half)
    rows = max(1, rows // 2)  # each number here is a pair
    _turn_kernel[(triton.cdiv(count, rows),)](
        *parts, *(x.stride(0) for x in parts), *out, *(x.stride(0) for x in out), cos, sin, count,
        q.shape[1], k.shape[1], DIRECTION=direction, HALF=half, ROWS=rows, WIDTH=padded, num_warps=8,
    )  # fmt: skip


def _whole_rows(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


class _SplitRotary(torch.autograd.Function):
    """A rotation; its gradient is the rotation back."""

    @staticmethod
    def forward(
        ctx: Context, qkv: Tensor, num_q: int, num_kv: int, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        count = len(qkv)
        heads = qkv.view(count, num_q + 2 * num_kv, -1)
        sizes = [num_q, num_kv, num_kv]
        ctx.save_for_backward(cos, sin)
        ctx.sizes = sizes
        q, k, v = torch.split(heads, sizes, dim=1)
        out = [qkv.new_empty(count, size, heads.shape[2]) for size in sizes]
        _turn((q, k, v), (out[0], out[1], out[2]), cos, sin, 1)
        return out[0], out[1], out[2]

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        q, k, v = (_whole_rows(grad) for grad in grads)
        out = q.new_empty(q.shape[0], sum(ctx.sizes), q.shape[2])
        parts = torch.split(out, ctx.sizes, dim=1)
        _turn((q, k, v), (parts[0], parts[1], parts[2]), cos, sin, -1)
        return out.view(q.shape[0], -1), None, None, None, None


# ---------------------------------------------------------------- gate


@triton.jit
def _gate_kernel(gate_up, y, T, F, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = (rows < T)[:, None] & (c < F)[None, :]
    at = rows[:, None] * (2 * F) + c[None, :]
    g = tl.load(gate_up + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(gate_up + at + F, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + rows[:, None] * F + c[None, :], (g * tl.sigmoid(g) * u).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _gate_backward_kernel(grad, gate_up, out, T, F, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = (rows < T)[:, None] & (c < F)[None, :]
    at = rows[:, None] * (2 * F) + c[None, :]
    d = tl.load(grad + rows[:, None] * F + c[None, :], mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate_up + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(gate_up + at + F, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    kind = out.dtype.element_ty
    tl.store(out + at, (d * u * s * (1 + g * (1 - s))).to(kind), mask=inside)
    tl.store(out + at + F, (d * g * s).to(kind), mask=inside)


class _GatedActivation(torch.autograd.Function):
    """y = silu(g) u: grad_u = grad silu(g), grad_g = grad u silu'(g)."""

    @staticmethod
    def _grid(count: int, width: int) -> tuple[tuple[int, int], dict[str, int]]:
        padded = min(1024, triton.next_power_of_2(width))
        rows = max(1, _TILE // 2 // padded)
        grid = (triton.cdiv(count, rows), triton.cdiv(width, padded))
        return grid, {"ROWS": rows, "WIDTH": padded, "num_warps": 4}

    @staticmethod
    def forward(ctx: Context, gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        count, width = gate_up.shape[0], gate_up.shape[1] // 2
        grid, options = _GatedActivation._grid(count, width)
        y = gate_up.new_empty(count, width)
        _gate_kernel[grid](gate_up, y, count, width, **options)
        ctx.save_for_backward(gate_up)
        return y

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gate_up,) = ctx.saved_tensors
        count, width = gate_up.shape[0], gate_up.shape[1] // 2
        grid, options = _GatedActivation._grid(count, width)
        out = torch.empty_like(gate_up)
        _gate_backward_kernel[grid](grads[0].contiguous(), gate_up, out, count, width, **options)
        return (out,)


# ---------------------------------------------------------------- loss


@triton.jit
def _cross_entropy_kernel(logits, targets, weights, losses, V, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    at = logits + row.to(tl.int64) * V
    target = tl.load(targets + row)
    weight = tl.load(weights + row)
    lanes = tl.arange(0, BLOCK)
    most = tl.full((BLOCK,), -1e30, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, V, BLOCK):
        c = begin + lanes
        e = tl.load(at + c, mask=c < V, other=-float("inf")).to(tl.float32)
        new = tl.maximum(most, e)
        total = total * tl.exp(most - new) + tl.exp(e - new)
        most = new
    top = tl.max(most, axis=0)
    log_total = top + tl.log(tl.sum(total * tl.exp(most - top), axis=0))
    tl.store(losses + row, log_total - tl.load(at + target).to(tl.float32))
    tl.debug_barrier()  # the target's logit is read before it is overwritten
    for begin in range(0, V, BLOCK):
        c = begin + lanes
        e = tl.load(at + c, mask=c < V, other=-float("inf")).to(tl.float32)
        gradient = weight * (tl.exp(e - log_total) - tl.where(c == target, 1.0, 0.0))
        tl.store(at + c, gradient.to(logits.dtype.element_ty), mask=c < V)


# ---------------------------------------------------------------- update


@triton.jit(do_not_specialize=["correct_first", "correct_second"])
def _adam_kernel(
    rows, gradient, first, second, working, starts, rates, pulls, divide_by, sound, size,
    stride, stride_gradient, stride_working, correct_first, correct_second, beta_first, beta_second, eps,
    IS_PULLED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    person = tl.program_id(1).to(tl.int64)
    rate = tl.load(rates + person)
    if (rate > 0) & tl.load(sound + person):
        c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = c < size
        at = person * stride + c
        w = tl.load(rows + at, mask=inside, other=0.0)
        g = tl.load(gradient + person * stride_gradient + c, mask=inside, other=0.0).to(tl.float32)
        g /= tl.load(divide_by + person)
        m = tl.load(first + at, mask=inside, other=0.0)
        v = tl.load(second + at, mask=inside, other=0.0)
        m += (1 - beta_first) * (g - m)
        v = beta_second * v + (1 - beta_second) * g * g
        if IS_PULLED:
            w += rate * tl.load(pulls + person) * (tl.load(starts + at, mask=inside, other=0.0) - w)
        w -= rate / correct_first * m / (tl.sqrt(v / correct_second) + eps)
        tl.store(first + at, m, mask=inside)
        tl.store(second + at, v, mask=inside)
        tl.store(rows + at, w, mask=inside)
        tl.store(working + person * stride_working + c, w.to(working.dtype.element_ty), mask=inside)
