"""What lies between two products of the decoder, one kernel each: sums of partial products, what LoRA adds,
norm, rotary and the write to the pages, gated activation, residual.

The norm's scale commutes with a product, (x / rms) W = (x W) / rms, so no kernel needs a whole row before the
product: each writes x * weight and, per block of columns, the sum of squares; the kernel behind the product
divides.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from kernels.linear import LinearPlan, add_slots
from kernels.lora import LoraRows, load_delta, tiles_of
from kernels.programs import allow_next, can_overlap, launch_options, wait

COLUMNS = 512  # of a row, whose sum of squares is kept apart
MANY_PROGRAMS = 1024  # a device starts not even one in a nanosecond, so beyond these each takes more columns
GATE, UP = tl.constexpr(4), tl.constexpr(5)  # as modules


@dataclass(frozen=True, slots=True)
class Product:
    """The output of a product: its slots [slots, T, N] and their plan, or a whole y [T, N] (plan None)."""

    y: Tensor
    plan: LinearPlan | None


@dataclass(frozen=True, slots=True)
class Adapters:
    """What LoRA adds to a product, delta [T, N], where a row has tiles of a module; anything elsewhere."""

    delta: Tensor
    rows: LoraRows


@triton.jit
def _row_scale(ssq, row, stride_ssq, blocks, size, eps, BLOCKS: tl.constexpr):
    """1 / sqrt(mean(x²) + eps) from the row's sums of squares by block."""
    b = tl.arange(0, BLOCKS)
    total = tl.sum(tl.load(ssq + row.to(tl.int64) * stride_ssq + b, mask=b < blocks, other=0.0), axis=0)
    return tl.rsqrt(total / size + eps)


@triton.jit
def _embed_kernel(
    token_ids, token_source, previous, embed, weight, x, xw, ssq, stride_ssq, blocks,
    positions, freq, cos, sin, H, HALF, WIDTH: tl.constexpr, HALF_WIDTH: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    source = tl.load(token_source + row)
    token = tl.load(token_ids + row)
    token = tl.where(source >= 0, tl.load(previous + source, mask=source >= 0, other=0), token)
    token = tl.maximum(token, 0).to(
        tl.int64
    )  # a row whose draw failed has no next token; it is dropped later
    c = tl.arange(0, WIDTH)
    is_c = c < H
    e = tl.load(embed + token * H + c, mask=is_c, other=0.0).to(tl.float32)
    w = tl.load(weight + c, mask=is_c, other=0.0).to(tl.float32)
    at = row.to(tl.int64) * H
    tl.store(x + at + c, e, mask=is_c)
    tl.store(xw + at + c, (e * w).to(xw.dtype.element_ty), mask=is_c)
    b = tl.arange(0, BLOCKS)
    tl.store(
        ssq + row.to(tl.int64) * stride_ssq + b, tl.where(b == 0, tl.sum(e * e, axis=0), 0.0), mask=b < blocks
    )
    h = tl.arange(0, HALF_WIDTH)
    angle = tl.load(positions + row).to(tl.float32) * tl.load(freq + h, mask=h < HALF, other=0.0)
    tl.store(cos + row * HALF + h, tl.cos(angle), mask=h < HALF)
    tl.store(sin + row * HALF + h, tl.sin(angle), mask=h < HALF)


@triton.jit(do_not_specialize=["layer"])
def _rotary_kernel(
    y, slot_stride, blocks_k, units, N, bias, ssq, stride_ssq, blocks, H, eps,
    q_norm, k_norm, cos, sin, q, slabs, slots, slab_stride, layer_stride, kv_stride,
    layer, num_q, num_kv, BLOCK_SIZE, D, HALF, delta, tiles,
    HEADS: tl.constexpr, HALF_WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, SLOTS: tl.constexpr,
    BLOCKS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, HAS_LORA: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    allow_next(PDL)
    row = tl.program_id(0)
    block = tl.program_id(1)
    blocks_q = tl.cdiv(num_q, HEADS)
    blocks_kv = tl.cdiv(num_kv, HEADS)
    module = (block >= blocks_q).to(tl.int32) + (block >= blocks_q + blocks_kv).to(tl.int32)
    first = block - tl.where(module == 0, 0, tl.where(module == 1, blocks_q, blocks_q + blocks_kv))
    heads = tl.where(module == 0, num_q, num_kv)
    left = tl.where(module == 0, 0, tl.where(module == 1, num_q * D, (num_q + num_kv) * D))
    c = tl.arange(0, HEADS * HALF_WIDTH)
    head = first * HEADS + c // HALF_WIDTH
    pair = c % HALF_WIDTH
    is_c = (head < heads) & (pair < HALF)
    low = head * D + pair
    high = low + HALF
    kind = module + tl.zeros_like(c)  # a block, as masks want it
    if HAS_LORA:
        count = tiles_of(tiles, row, module)
    wait(PDL)
    at = row.to(tl.int64) * N
    a = add_slots(y, at, left + low, is_c, slot_stride, blocks_k, units, BLOCK_N, SLOTS)
    b = add_slots(y, at, left + high, is_c, slot_stride, blocks_k, units, BLOCK_N, SLOTS)
    if HAS_LORA:
        a += load_delta(delta, count, at + left, low, is_c)
        b += load_delta(delta, count, at + left, high, is_c)
    scale = _row_scale(ssq, row, stride_ssq, blocks, H, eps, BLOCKS)
    a *= scale
    b *= scale
    if HAS_BIAS:
        a += tl.load(bias + left + low, mask=is_c, other=0.0).to(tl.float32)
        b += tl.load(bias + left + high, mask=is_c, other=0.0).to(tl.float32)
    if HAS_NORM and module < 2:
        square = tl.sum(tl.reshape(tl.where(is_c, a * a + b * b, 0.0), (HEADS, HALF_WIDTH)), axis=1)
        factor = tl.broadcast_to(tl.rsqrt(square / D + eps)[:, None], (HEADS, HALF_WIDTH))
        factor = tl.reshape(factor, (HEADS * HALF_WIDTH,))
        is_q, is_k = is_c & (kind == 0), is_c & (kind == 1)
        low_q = tl.load(q_norm + pair, mask=is_q, other=0.0).to(tl.float32)
        high_q = tl.load(q_norm + HALF + pair, mask=is_q, other=0.0).to(tl.float32)
        low_k = tl.load(k_norm + pair, mask=is_k, other=0.0).to(tl.float32)
        high_k = tl.load(k_norm + HALF + pair, mask=is_k, other=0.0).to(tl.float32)
        a *= factor * (low_q + low_k)
        b *= factor * (high_q + high_k)
    is_turned = is_c & (kind < 2)
    cosine = tl.load(cos + row * HALF + pair, mask=is_turned, other=1.0)
    sine = tl.load(sin + row * HALF + pair, mask=is_turned, other=0.0)
    new_a = (a * cosine - b * sine).to(q.dtype.element_ty)
    new_b = (b * cosine + a * sine).to(q.dtype.element_ty)
    if module == 0:
        out = q + row.to(tl.int64) * num_q * D
        tl.store(out + low, new_a, mask=is_c)
        tl.store(out + high, new_b, mask=is_c)
    else:
        slot = tl.load(slots + row)
        slab = (slot // BLOCK_SIZE).to(tl.int64)
        offset = slot % BLOCK_SIZE
        out = (
            slabs + slab * slab_stride + layer * layer_stride + (module - 1) * kv_stride + offset * num_kv * D
        )
        is_kept = is_c & (slot + tl.zeros_like(c) >= 0)
        tl.store(out + low, new_a, mask=is_kept)
        tl.store(out + high, new_b, mask=is_kept)


@triton.jit
def _gate_kernel(
    y, slot_stride, blocks_k, units, F, ssq, stride_ssq, blocks, H, eps, out,
    delta, tiles,
    COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr, SLOTS: tl.constexpr, BLOCKS: tl.constexpr,
    HAS_LORA: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    allow_next(PDL)
    row = tl.program_id(0)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_c = c < F
    if HAS_LORA:
        count_gate, count_up = tiles_of(tiles, row, GATE), tiles_of(tiles, row, UP)
    wait(PDL)
    at = row.to(tl.int64) * 2 * F
    gate = add_slots(y, at, c, is_c, slot_stride, blocks_k, units, BLOCK_N, SLOTS)
    up = add_slots(y, at, F + c, is_c, slot_stride, blocks_k, units, BLOCK_N, SLOTS)
    if HAS_LORA:
        gate += load_delta(delta, count_gate, at, c, is_c)
        up += load_delta(delta, count_up, at + F, c, is_c)
    scale = _row_scale(ssq, row, stride_ssq, blocks, H, eps, BLOCKS)
    gate *= scale
    up *= scale
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row.to(tl.int64) * F + c, value.to(out.dtype.element_ty), mask=is_c)


@triton.jit(do_not_specialize=["module"])
def _residual_kernel(
    y, slot_stride, blocks_k, units, H, x, weight, xw, ssq, stride_ssq, module,
    delta, tiles,
    COLUMNS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_N: tl.constexpr, SLOTS: tl.constexpr,
    HAS_LORA: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    allow_next(PDL)
    row = tl.program_id(0)
    first = tl.program_id(1) * BLOCKS
    c = first * COLUMNS + tl.arange(0, BLOCKS * COLUMNS)
    is_c = c < H
    w = tl.load(weight + c, mask=is_c, other=0.0).to(tl.float32)
    if HAS_LORA:
        count = tiles_of(tiles, row, module)
    wait(PDL)
    at = row.to(tl.int64) * H
    total = tl.load(x + at + c, mask=is_c, other=0.0)
    total += add_slots(y, at, c, is_c, slot_stride, blocks_k, units, BLOCK_N, SLOTS)
    if HAS_LORA:
        total += load_delta(delta, count, at, c, is_c)
    tl.store(x + at + c, total, mask=is_c)
    tl.store(xw + at + c, (total * w).to(xw.dtype.element_ty), mask=is_c)
    squares = tl.sum(tl.reshape(total * total, (BLOCKS, COLUMNS)), axis=1)
    b = first + tl.arange(0, BLOCKS)
    tl.store(ssq + row.to(tl.int64) * stride_ssq + b, squares, mask=b * COLUMNS < H)


@triton.jit
def _gather_kernel(
    xw,
    ssq,
    stride_ssq,
    blocks,
    rows,
    out,
    H,
    eps,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):
    allow_next(PDL)
    wait(PDL)
    index = tl.program_id(0)
    row = tl.load(rows + index)
    c = tl.arange(0, WIDTH)
    scale = _row_scale(ssq, row, stride_ssq, blocks, H, eps, BLOCKS)
    y = tl.load(xw + row.to(tl.int64) * H + c, mask=c < H, other=0.0).to(tl.float32) * scale
    tl.store(out + index.to(tl.int64) * H + c, y.to(out.dtype.element_ty), mask=c < H)


def num_blocks(size: int) -> int:
    """Blocks of columns whose sums of squares are kept apart: the second side of ssq."""
    return -(-size // COLUMNS)


def _columns(rows: int, width: int, most: int) -> int:
    """Columns of a row of this width that each program takes: COLUMNS, 2 or 4 times as many."""
    columns = COLUMNS
    while columns < most * COLUMNS and rows * -(-width // columns) > MANY_PROGRAMS:
        columns *= 2
    return columns


def embed(
    token_ids: Tensor, token_source: Tensor, previous: Tensor, table: Tensor, weight: Tensor,
    positions: Tensor, freq: Tensor, x: Tensor, xw: Tensor, ssq: Tensor, cos: Tensor, sin: Tensor, rows: int,
) -> None:  # fmt: skip
    """x[t] = table[token of t], xw = x * weight, ssq = sums of squares; cos and sin of positions[t] * freq.

    The token is token_ids[t], or previous[token_source[t]] where that is not negative: drawn by the step
    before. x [T, H] float32, xw [T, H], ssq [T, blocks] float32, cos and sin [T, D / 2] float32, freq [D /
    2].
    """
    hidden, half = table.shape[1], freq.shape[0]
    _embed_kernel[(rows,)](
        token_ids, token_source, previous, table, weight, x, xw, ssq, ssq.stride(0), num_blocks(hidden),
        positions, freq, cos, sin, hidden, half,
        WIDTH=triton.next_power_of_2(hidden), HALF_WIDTH=triton.next_power_of_2(half),
        BLOCKS=triton.next_power_of_2(num_blocks(hidden)), num_warps=8,
    )  # fmt: skip


def rotary_write(
    product: Product, ssq: Tensor, hidden: int, eps: float, cos: Tensor, sin: Tensor, q: Tensor, slabs:
    Tensor, slots: Tensor, layer: int, rows: int, *, bias: Tensor | None, q_norm: Tensor | None, k_norm:
    Tensor | None, adapters: Adapters | None,
) -> None:  # fmt: skip
    """q | k | v = product / rms (+ LoRA) (+ bias), q and k normed per head if asked and turned by the
    angles; q is written to q [T, Hq, D], k and v to slot slots[t] = slab * block_size + offset of the layer
    (-1: nowhere).

    slabs [num_slabs, L, 2, block_size, Hkv, D], of which only the first side may have a stride of its own.
    """
    num_kv, dim = slabs.shape[4:]
    num_q, half = q.shape[1], dim // 2
    pdl = can_overlap(q.device)
    width = triton.next_power_of_2(half)
    columns = _columns(rows, (num_q + 2 * num_kv) * dim, most=2)
    heads = max(1, min(columns // (2 * width), triton.next_power_of_2(max(num_q, num_kv))))
    blocks = -(-num_q // heads) + 2 * -(-num_kv // heads)
    _rotary_kernel[(rows, blocks)](
        product.y, *_slots_of(product), product.y.shape[-1], bias if bias is not None else ssq,
        ssq, ssq.stride(0), num_blocks(hidden), hidden, eps,
        q_norm if q_norm is not None else ssq, k_norm if k_norm is not None else ssq, cos, sin, q,
        slabs, slots, slabs.stride(0), slabs.stride(1), slabs.stride(2),
        layer, num_q, num_kv, slabs.shape[3], dim, half,
        *_lora_of(adapters, ssq),
        HEADS=heads, HALF_WIDTH=width, **_slot_constants(product),
        BLOCKS=triton.next_power_of_2(num_blocks(hidden)),
        HAS_BIAS=bias is not None, HAS_NORM=q_norm is not None, HAS_LORA=adapters is not None,
        **_launch(pdl, warps=4),
    )  # fmt: skip


def gate(
    product: Product,
    ssq: Tensor,
    hidden: int,
    eps: float,
    out: Tensor,
    rows: int,
    adapters: Adapters | None,
) -> None:
    """out[t] = silu(g) * u with g | u = product / rms (+ LoRA). out [T, F]."""
    width, pdl = out.shape[1], can_overlap(out.device)
    columns = _columns(rows, width, most=4)
    _gate_kernel[(rows, -(-width // columns))](
        product.y, *_slots_of(product), width, ssq, ssq.stride(0), num_blocks(hidden), hidden, eps, out,
        *_lora_of(adapters, ssq),
        COLUMNS=columns, **_slot_constants(product), BLOCKS=triton.next_power_of_2(num_blocks(hidden)),
        HAS_LORA=adapters is not None, **_launch(pdl, warps=4 if columns == COLUMNS else 8),
    )  # fmt: skip


def residual(
    product: Product, x: Tensor, weight: Tensor, xw: Tensor, ssq: Tensor, module: int, rows: int,
    adapters: Adapters | None,
) -> None:  # fmt: skip
    """x += product (+ LoRA of `module`), xw = x * weight (of the norm to come), ssq = sums of squares by
    block.
    """
    hidden, pdl = x.shape[1], can_overlap(x.device)
    columns = _columns(rows, hidden, most=2)
    _residual_kernel[(rows, -(-hidden // columns))](
        product.y, *_slots_of(product), hidden, x, weight, xw, ssq, ssq.stride(0), module,
        *_lora_of(adapters, ssq),
        COLUMNS=COLUMNS, BLOCKS=columns // COLUMNS, **_slot_constants(product),
        HAS_LORA=adapters is not None, **_launch(pdl, warps=4 if columns == COLUMNS else 8),
    )  # fmt: skip


def gather_normed(xw: Tensor, ssq: Tensor, rows: Tensor, out: Tensor, eps: float, count: int) -> None:
    """out[i] = xw[rows[i]] / rms: the normed hidden states to take logits from."""
    hidden = xw.shape[1]
    pdl = can_overlap(xw.device)
    _gather_kernel[(count,)](
        xw, ssq, ssq.stride(0), num_blocks(hidden), rows, out, hidden, eps,
        WIDTH=triton.next_power_of_2(hidden), BLOCKS=triton.next_power_of_2(num_blocks(hidden)),
        PDL=pdl, num_warps=8, **launch_options(pdl),
    )  # fmt: skip


def _slots_of(product: Product) -> tuple[int, int, int]:
    plan = product.plan
    return (0, 1, 1) if plan is None else (product.y.stride(0), plan.blocks_k, plan.units)


def _slot_constants(product: Product) -> dict[str, int]:
    plan = product.plan
    return {"BLOCK_N": 1, "SLOTS": 0} if plan is None else {"BLOCK_N": plan.block_n, "SLOTS": plan.slots}


def _lora_of(adapters: Adapters | None, filler: Tensor) -> tuple[Tensor, Tensor]:
    return (filler, filler) if adapters is None else (adapters.delta, adapters.rows.row_tiles)


def _launch(pdl: bool, warps: int) -> dict[str, int | bool]:
    return {"PDL": pdl, "num_warps": warps, **launch_options(pdl)}
