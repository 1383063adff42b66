"""Attention over pages for the GPU: one new token of each sequence (decode), and chunks of prompts (prefill).

Both read K/V where they lie in the slabs and compute what `reference.paged_attention` specifies. A launch
depends on the padded sizes of a step alone; counts, lengths and slabs are read on the device, and a program
that finds nothing to do exits. Softmax runs over tiles of positions with a running maximum, in powers of two.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.programs import allow_next, can_overlap, launch_options, num_processors, wait

QUERY_ROWS = 16  # tokens of one tile of prefill
_MOST_SPLITS = 32
_MOST_SPLITS_OF_MANY = 8  # where the batch alone fills the device
_SHORT = 256  # positions: contexts up to here end before a pipeline has filled
_LOG2_E = 1.4426950408889634

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """How one kernel is cut: positions of one tile of K/V, and Triton's warps and pipeline stages."""

    positions: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """How the contexts of a decode step are cut: into up to `splits` parts each, and those into tiles."""

    splits: int
    config: AttentionConfig

    @classmethod
    def make(
        cls, rows: int, num_kv_heads: int, dim: int, dtype: torch.dtype, longest: int, device: torch.device
    ) -> "DecodePlan":
        """For `rows` sequences, the longest of `longest` positions."""
        splits = num_splits(rows, num_kv_heads, longest, device)
        if longest <= _SHORT and triton.next_power_of_2(dim) * dtype.itemsize <= 256:
            fill = rows * num_kv_heads * splits > 2 * num_processors(device)
            return cls(splits, AttentionConfig(32, 2, 2) if fill else AttentionConfig(128, 4, 1))
        return cls(splits, decode_config(dim, dtype))


def decode_config(dim: int, dtype: torch.dtype) -> AttentionConfig:
    """For `decode_attention` of any context: enough bytes in flight to read K/V at the memory's pace."""
    wide = triton.next_power_of_2(dim) * dtype.itemsize
    if wide > 512:  # larger tiles would leave the registers
        return AttentionConfig(16, 8, 1)
    return AttentionConfig(64, 4, 2) if wide > 256 else AttentionConfig(128, 4, 2)


def prefill_config(dim: int, dtype: torch.dtype) -> AttentionConfig:
    """For `prefill_attention`: Q, and two tiles of K/V, in shared memory; sums in registers."""
    wide = triton.next_power_of_2(dim) * dtype.itemsize
    if wide > 512:
        return AttentionConfig(16, 8, 1)
    return AttentionConfig(32, 8, 2) if wide > 256 else AttentionConfig(64, 4, 3)


def num_splits(rows: int, num_kv_heads: int, longest: int, device: torch.device) -> int:
    """How many parts, a power of two, to cut contexts into: of `rows` sequences, the longest of `longest`.

    More where rows and heads alone do not fill the device, and where one long context would outlast the rest.
    """
    fill = 4 * num_processors(device) // max(1, rows * num_kv_heads)
    wanted = max(fill, min(_MOST_SPLITS_OF_MANY, longest // 1024))
    most = max(1, min(wanted, longest // 128, _MOST_SPLITS))
    return 1 << (most.bit_length() - 1)


def workspace(rows: int, num_heads: int, dim: int, device: torch.device) -> Tensor:
    """Room for the parts of up to `rows` sequences, for any number of splits that `num_splits` gives."""
    parts = max(_MOST_SPLITS_OF_MANY * rows, 4 * num_processors(device))
    return torch.zeros(parts * num_heads * (dim + 1), dtype=torch.float32, device=device)


def query_tiles(query_start: npt.ArrayLike, query_rows: int, capacity: int) -> tuple[Ints, Ints]:
    """(sequence of each tile, its first row among the sequence's new rows), -1 from the last to `capacity`.

    Sequence s has the rows query_start[s] .. query_start[s+1], in tiles of `query_rows`. Raises ValueError
    when they need more than `capacity` tiles.
    """
    ends = np.asarray(query_start, dtype=np.int64)
    counts = ends[1:] - ends[:-1]
    tiles = -(-counts // query_rows)
    total = int(tiles.sum())
    if total > capacity:
        raise ValueError(f"expected at most {capacity} query tiles, got {total}")
    sequence, first = np.full(capacity, -1, np.int32), np.full(capacity, -1, np.int32)
    sequence[:total] = np.repeat(np.arange(len(counts)), tiles)
    first[:total] = (np.arange(total) - np.repeat(tiles.cumsum() - tiles, tiles)) * query_rows
    return sequence, first


@triton.jit
def _fold(
    acc, peak, norm, q, kv, stride_kv, stride_slab, stride_offset, blocks, begin, length, positions, window,
    scale, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, WIDTH: tl.constexpr, POSITIONS: tl.constexpr,
    IS_MASKED: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """One tile of K/V into the running softmax of q [M, WIDTH], whose rows stand at `positions` [M]."""
    j = begin + tl.arange(0, POSITIONS)
    d = tl.arange(0, WIDTH)
    # Positions past the end have no slab, and what lies in the rest of the last one is not ours to read.
    is_own = j < length
    if IS_MASKED:
        slab = tl.load(blocks + j // BLOCK_SIZE, mask=is_own, other=0)
    else:
        slab = tl.load(blocks + j // BLOCK_SIZE)
    at = slab.to(tl.int64)[:, None] * stride_slab + (j % BLOCK_SIZE)[:, None] * stride_offset + d[None, :]
    if IS_MASKED:
        is_read = is_own[:, None] & (d < D)[None, :]
        k = tl.load(kv + at, mask=is_read, other=0.0)
        v = tl.load(kv + stride_kv + at, mask=is_read, other=0.0)
    elif D == WIDTH:
        k = tl.load(kv + at)
        v = tl.load(kv + stride_kv + at)
    else:
        k = tl.load(kv + at, mask=(d < D)[None, :], other=0.0)
        v = tl.load(kv + stride_kv + at, mask=(d < D)[None, :], other=0.0)
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if IS_MASKED:
        sees = (j[None, :] <= positions[:, None]) & is_own[None, :]
        if HAS_WINDOW:
            sees &= j[None, :] > positions[:, None] - window
        s = tl.where(sees, s, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(s, axis=1))
    # A row that has seen nothing yet has no peak; its terms are 0 against any.
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak) if IS_MASKED else new_peak
    p = tl.exp2(s - base[:, None])
    shrink = tl.exp2(peak - base)
    norm = norm * shrink + tl.sum(p, axis=1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, new_peak, norm


@triton.jit
def _part(length, window, split, splits, POSITIONS: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """(first, end) positions of one split, and how many splits of this sequence have any."""
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(length - window, 0) // POSITIONS * POSITIONS
    tiles = tl.cdiv(length - first, POSITIONS)
    each = tl.maximum(tl.cdiv(tiles, splits), tl.minimum(2, tiles))
    each = tl.maximum(each, 1)
    begin = first + split * each * POSITIONS
    return begin, tl.minimum(begin + each * POSITIONS, length), tl.cdiv(tiles, each)


@triton.jit(do_not_specialize=["splits", "window"])
def _decode_kernel(
    q, stride_q, kv, stride_slab, stride_kv, stride_offset, stride_head,
    block_list, block_start, context_lens, scale, window, sums, norms, splits, num_heads, out, stride_out,
    GROUP: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    POSITIONS: tl.constexpr, HAS_WINDOW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    allow_next(PDL)
    sequence, head, split = tl.program_id(2), tl.program_id(0), tl.program_id(1)
    length = tl.load(context_lens + sequence)
    begin, end, parts = _part(length, window, split, splits, POSITIONS, HAS_WINDOW)
    wait(PDL)
    g = tl.arange(0, HEADS)
    d = tl.arange(0, WIDTH)
    is_kept = (g < GROUP)[:, None] & (d < D)[None, :]
    heads = head * GROUP + g
    columns = heads[:, None] * D + d[None, :]
    if length > 0:
        if split < parts:
            rows = tl.load(q + sequence.to(tl.int64) * stride_q + columns, mask=is_kept, other=0.0)
            blocks = block_list + tl.load(block_start + sequence)
            kv += head.to(tl.int64) * stride_head
            positions = tl.full([HEADS], 0, tl.int32) + (length - 1)
            acc = tl.zeros([HEADS, WIDTH], tl.float32)
            peak = tl.full([HEADS], float("-inf"), tl.float32)
            norm = tl.zeros([HEADS], tl.float32)
            for at in range(begin, end, POSITIONS):
                acc, peak, norm = _fold(
                    acc, peak, norm, rows, kv, stride_kv, stride_slab, stride_offset, blocks, at, length,
                    positions, window, scale, D, BLOCK_SIZE, WIDTH, POSITIONS, True, HAS_WINDOW,
                )  # fmt: skip
            acc = acc / norm[:, None]
            if parts == 1:
                at_out = out + sequence.to(tl.int64) * stride_out + columns
                tl.store(at_out, acc.to(out.dtype.element_ty), mask=is_kept)
            else:
                part = (sequence * splits + split).to(tl.int64) * num_heads
                tl.store(sums + part * D + columns, acc, mask=is_kept)
                tl.store(norms + part + heads, peak + tl.log2(norm), mask=g < GROUP)
    elif length == 0 and split == 0:
        at_out = out + sequence.to(tl.int64) * stride_out + columns
        tl.store(at_out, tl.zeros([HEADS, WIDTH], out.dtype.element_ty), mask=is_kept)


@triton.jit(do_not_specialize=["splits", "window"])
def _combine_kernel(
    sums, norms, context_lens, window, splits, num_heads, out, stride_out,
    D: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr, POSITIONS: tl.constexpr,
    HAS_WINDOW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    allow_next(PDL)
    wait(PDL)
    sequence, head = tl.program_id(1), tl.program_id(0)
    length = tl.load(context_lens + sequence)
    _, _, parts = _part(length, window, 0, splits, POSITIONS, HAS_WINDOW)
    if parts > 1:
        part = tl.arange(0, SPLITS)
        d = tl.arange(0, WIDTH)
        at = (sequence * splits + part).to(tl.int64) * num_heads + head
        weight = tl.load(norms + at, mask=part < parts, other=float("-inf"))
        weight = tl.exp2(weight - tl.max(weight, axis=0))
        weight = weight / tl.sum(weight, axis=0)
        is_read = (part < parts)[:, None] & (d < D)[None, :]
        values = tl.load(sums + at[:, None] * D + d[None, :], mask=is_read, other=0.0)
        mixed = tl.sum(values * weight[:, None], axis=0)
        at_out = out + sequence.to(tl.int64) * stride_out + head * D + d
        tl.store(at_out, mixed.to(out.dtype.element_ty), mask=d < D)


def decode_attention(
    q: Tensor, slabs: Tensor, layer: int, block_list: Tensor, block_start: Tensor, context_lens: Tensor,
    scale: float, window: int | None = None, *, splits: int, workspace: Tensor, out: Tensor,
    config: AttentionConfig | None = None,
) -> None:  # fmt: skip
    """out[s] = attention of the newest token of sequence s over its context (`reference.paged_attention`).

    q and out [S, Hq, D]. slabs [num_slabs, L, 2, block_size, Hkv, D]; the blocks of sequence s are
    block_list[block_start[s] ..], and its context_lens[s] positions are written. At length 0 out[s] = 0, and
    nothing is read; at a negative one out[s] is left alone. All three int32. Contexts are cut into up to
    `splits` parts, each of at least two tiles, whose results are added up in order; `workspace` comes from
    the function of that name. Split K/V and a second pass are "Flash-Decoding" (Dao et al., 2023).
    Raises ValueError for shapes that do not fit.
    """
    num_rows, num_heads, dim = q.shape
    block_size, num_kv_heads = slabs.shape[3], slabs.shape[4]
    _check(q, slabs, out)
    if num_rows == 0:
        return
    parts = num_rows * splits
    if splits > 1 and workspace.numel() < parts * num_heads * (dim + 1):
        raise ValueError(
            f"expected a workspace of {parts * num_heads * (dim + 1)} elements for {splits} splits of "
            f"{num_rows} sequences, got {workspace.numel()}"
        )
    config = config or decode_config(dim, q.dtype)
    kv = slabs[:, layer]
    sums, norms = workspace, workspace[parts * num_heads * dim :] if splits > 1 else workspace
    pdl = can_overlap(q.device)
    launch = launch_options(pdl)
    width, group = triton.next_power_of_2(dim), num_heads // num_kv_heads
    common = {
        "D": dim, "WIDTH": width, "POSITIONS": config.positions, "HAS_WINDOW": window is not None, "PDL": pdl,
    }  # fmt: skip
    _decode_kernel[(num_kv_heads, splits, num_rows)](
        q, q.stride(0), kv, kv.stride(0), kv.stride(1), kv.stride(2), kv.stride(3),
        block_list, block_start, context_lens, scale * _LOG2_E, window or 0, sums, norms, splits, num_heads,
        out, out.stride(0),
        GROUP=group, HEADS=max(16, triton.next_power_of_2(group)), BLOCK_SIZE=block_size, **common,
        num_warps=config.num_warps, num_stages=config.num_stages, **launch,
    )  # fmt: skip
    if splits > 1:
        _combine_kernel[(num_heads, num_rows)](
            sums, norms, context_lens, window or 0, splits, num_heads, out, out.stride(0),
            SPLITS=triton.next_power_of_2(splits), **common, num_warps=2, **launch,
        )  # fmt: skip


@triton.jit(do_not_specialize=["window"])
def _prefill_kernel(
    q, stride_q, kv, stride_slab, stride_kv, stride_offset, stride_head,
    block_list, block_start, context_lens, query_start, tile_sequence, tile_first, scale, window, out,
    stride_out, GROUP: tl.constexpr, HEADS: tl.constexpr, QUERIES: tl.constexpr, D: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr, POSITIONS: tl.constexpr, HAS_WINDOW: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    allow_next(PDL)
    wait(PDL)
    tile, part = tl.program_id(1), tl.program_id(0)
    sequence = tl.load(tile_sequence + tile)
    if sequence >= 0:
        first = tl.load(tile_first + tile)
        start = tl.load(query_start + sequence)
        count = tl.load(query_start + sequence + 1) - start
        length = tl.load(context_lens + sequence)
        # Rows of the product: HEADS query heads of one K/V head for each of QUERIES tokens.
        parts: tl.constexpr = (GROUP + HEADS - 1) // HEADS
        head = part // parts
        m = tl.arange(0, QUERIES * HEADS)
        row = first + m // HEADS
        of_group = part % parts * HEADS + m % HEADS
        is_row = (row < count) & (of_group < GROUP)
        d = tl.arange(0, WIDTH)
        is_kept = is_row[:, None] & (d < D)[None, :]
        token = (start + row).to(tl.int64)
        columns = (head * GROUP + of_group)[:, None] * D + d[None, :]
        rows = tl.load(q + token[:, None] * stride_q + columns, mask=is_kept, other=0.0)
        positions = length - count + row
        earliest = length - count + first
        end = tl.minimum(earliest + QUERIES, length)
        begin = 0
        seen_by_all = (earliest + 1) // POSITIONS * POSITIONS
        if HAS_WINDOW:
            begin = tl.maximum(earliest + 1 - window, 0) // POSITIONS * POSITIONS
            seen_by_all = begin
        blocks = block_list + tl.load(block_start + sequence)
        kv += head.to(tl.int64) * stride_head
        acc = tl.zeros([QUERIES * HEADS, WIDTH], tl.float32)
        peak = tl.full([QUERIES * HEADS], float("-inf"), tl.float32)
        norm = tl.zeros([QUERIES * HEADS], tl.float32)
        for at in range(begin, seen_by_all, POSITIONS):
            acc, peak, norm = _fold(
                acc, peak, norm, rows, kv, stride_kv, stride_slab, stride_offset, blocks, at, length,
                positions, window, scale, D, BLOCK_SIZE, WIDTH, POSITIONS, False, HAS_WINDOW,
            )  # fmt: skip
        for at in range(seen_by_all, end, POSITIONS):
            acc, peak, norm = _fold(
                acc, peak, norm, rows, kv, stride_kv, stride_slab, stride_offset, blocks, at, length,
                positions, window, scale, D, BLOCK_SIZE, WIDTH, POSITIONS, True, HAS_WINDOW,
            )  # fmt: skip
        acc = acc / tl.where(is_row, norm, 1.0)[:, None]
        at_out = out + token[:, None] * stride_out + columns
        tl.store(at_out, acc.to(out.dtype.element_ty), mask=is_kept)


def prefill_attention(
    q: Tensor, slabs: Tensor, layer: int, block_list: Tensor, block_start: Tensor, context_lens: Tensor,
    query_start: Tensor, tile_sequence: Tensor, tile_first: Tensor, scale: float, window: int | None = None,
    *, out: Tensor, query_rows: int = QUERY_ROWS, config: AttentionConfig | None = None,
) -> None:  # fmt: skip
    """out[t] = causal attention of the newest tokens of sequences, as in `reference.paged_attention`.

    q and out [T, Hq, D]; rows query_start[s] .. query_start[s+1] are the last of context_lens[s] positions of
    sequence s, all written. Tile i covers `query_rows` of them from row tile_first[i] of sequence
    tile_sequence[i] on, -1 for none (`query_tiles`). Rows in no tile keep `out`. Slabs and blocks as in
    `decode_attention`; all columns int32. Raises ValueError for shapes that do not fit.
    """
    num_heads, dim = q.shape[1:]
    block_size, num_kv_heads = slabs.shape[3], slabs.shape[4]
    _check(q, slabs, out)
    if len(tile_sequence) == 0:
        return
    config = config or prefill_config(dim, q.dtype)
    kv = slabs[:, layer]
    group = num_heads // num_kv_heads
    heads = min(triton.next_power_of_2(group), max(1, 128 // query_rows))
    pdl = can_overlap(q.device)
    _prefill_kernel[(num_kv_heads * -(-group // heads), len(tile_sequence))](
        q, q.stride(0), kv, kv.stride(0), kv.stride(1), kv.stride(2), kv.stride(3),
        block_list, block_start, context_lens, query_start, tile_sequence, tile_first, scale * _LOG2_E,
        window or 0, out, out.stride(0),
        GROUP=group, HEADS=heads, QUERIES=query_rows, D=dim, WIDTH=triton.next_power_of_2(dim),
        BLOCK_SIZE=block_size, POSITIONS=config.positions, HAS_WINDOW=window is not None, PDL=pdl,
        num_warps=config.num_warps, num_stages=config.num_stages, **launch_options(pdl),
    )  # fmt: skip


def _check(q: Tensor, slabs: Tensor, out: Tensor) -> None:
    (_, num_heads, dim), (num_kv_heads, kv_dim) = q.shape, slabs.shape[4:]
    if dim != kv_dim or num_heads % num_kv_heads or q.dtype != slabs.dtype or q.shape != out.shape:
        raise ValueError(
            "expected q and out alike, their heads a multiple of the slabs', of one type and head size, got "
            f"q {tuple(q.shape)} {q.dtype}, out {tuple(out.shape)}, slabs {tuple(slabs.shape)} {slabs.dtype}"
        )
    for name, tensor in (("q", q), ("out", out), ("slabs", slabs)):
        if tensor.stride()[-2:] != (dim, 1):
            raise ValueError(
                f"expected the heads of a row of {name} side by side, got strides {tensor.stride()}"
            )
