"""One token for each row of logits on a GPU, as `reference.sample_rows` specifies: the largest, or a draw.

A first kernel reads every row once, split over many programs, and leaves the largest logit of each block of
tokens, for rows that draw also the block's share of p. All else goes on from there, one program a row: the
largest logit and a draw without filters look into a single block; a filter finds the logit at which it cuts
by bisection, over the blocks whose largest can reach it. Nothing is sorted, and no sum depends on the company
in the batch.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.programs import allow_next, can_overlap, launch_options, wait

_LOG2_E = tl.constexpr(1.4426950408889634)
_STEEPEST = tl.constexpr(1e30)  # temperatures below its inverse draw as it does; no product overflows
_LEAST_P = tl.constexpr(1e-37)  # of the largest p: what is below is nearly or quite 0
# Low bits of a float32 that are the same in all values of these types, by sign.
_CONSTANT_BITS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}


@dataclass(frozen=True, slots=True)
class SamplingConfig:
    """How the kernels are cut: tokens of one block, blocks of one program that scans and its warps, blocks
    looked at together by the program that picks and its warps; all but the warps powers of two."""

    block: int = 128
    scan_blocks: int = 32
    scan_warps: int = 4
    pick_blocks: int = 64
    pick_warps: int = 16


@triton.jit
def _mix(state):
    """The output function of splitmix64, on uint64."""
    z = state + 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def _uniform(seed, index):
    """`reference.uniform`"""
    state = _mix(seed.to(tl.uint64)) + index.to(tl.uint64) * 0x9E3779B97F4A7C15
    return (_mix(state) >> 11).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def _key(logit, SHIFT: tl.constexpr):
    """int32 in the order of the float32s; both zeros have one key."""
    bits = (logit + 0.0).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def _of_key(key, SHIFT: tl.constexpr):
    """The float32 whose key it is."""
    bits = key << SHIFT
    bits = tl.where(key < 0, bits | ((1 << SHIFT) - 1), bits)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _middle(low, high):
    """Half way, rounded down; the sum might overflow."""
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def _scan_kernel(
    logits, stride, vocab, temperature, peaks, sums, num_blocks,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    allow_next(PDL)
    wait(PDL)
    row = tl.program_id(1)
    b = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    at = b[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    logit = tl.load(logits + row.to(tl.int64) * stride + at, mask=at < vocab, other=float("-inf"))
    logit = logit.to(tl.float32)
    # A maximum passes over NaN; infinity ends the row as well.
    logit = tl.where(logit == logit, logit, float("inf"))
    peak = tl.max(logit, axis=1)
    tl.store(peaks + row * num_blocks + b, peak, mask=b < num_blocks)
    heat = tl.load(temperature + row)
    if heat > 0:
        steepness = tl.minimum(_LOG2_E / heat, _STEEPEST)
        base = tl.where(tl.abs(peak) < float("inf"), peak, 0.0)
        total = tl.sum(tl.exp2((logit - base[:, None]) * steepness), axis=1)
        tl.store(sums + row * num_blocks + b, total, mask=b < num_blocks)


@triton.jit
def _tile(logits, vocab, listed, count, first, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Logits [TILE, BLOCK] of the listed blocks from `first` on; minus infinity where there are none."""
    i = first + tl.arange(0, TILE)
    block = tl.load(listed + i, mask=i < count, other=0)
    at = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    is_read = (i < count)[:, None] & (at < vocab)
    return tl.load(logits + at, mask=is_read, other=float("-inf")).to(tl.float32)


@triton.jit
def _above(
    key, logits, vocab, listed, count, peak, steepness, BLOCK: tl.constexpr, TILE: tl.constexpr,
    SHIFT: tl.constexpr,
):  # fmt: skip
    """How many tokens of the listed blocks have a larger key, and their p, where that of the largest is 1."""
    counts = tl.zeros([TILE], tl.int32)
    masses = tl.zeros([TILE], tl.float64)
    for first in range(0, count, TILE):
        logit = _tile(logits, vocab, listed, count, first, BLOCK, TILE)
        is_above = _key(logit, SHIFT) > key
        counts += tl.sum(is_above.to(tl.int32), axis=1)
        p = tl.where(is_above, tl.exp2((logit - peak) * steepness), 0.0)
        masses += tl.sum(p, axis=1).to(tl.float64)
    return tl.sum(counts, axis=0), tl.sum(masses, axis=0)


@triton.jit
def _cut(
    logits, vocab, peaks, is_block, mass, peak, steepness, top_p, top_k, min_p, listed,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, TILE: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """(key, n, count): the filters keep all tokens of larger keys and the first n of this one; all of them
    lie in the `count` blocks that are now listed, in order.

    With above(x) = (number, mass) of the tokens of keys larger than x: x is low enough to keep where
    number < top_k, mass < top_p * total and p(x) >= min_p, and the key is the lowest such x. top_p is a share
    of what top_k kept, so that one is cut first. The same among the largest of each block, which are some of
    the tokens, can only cut lower, and costs next to nothing.
    """
    has_k = (top_k > 0) & (top_k < vocab)
    most = tl.where(has_k, top_k, vocab)
    has_p = top_p < 1
    b = tl.arange(0, BLOCKS)
    peak_keys = _key(peaks, SHIFT)
    peak_p = tl.exp2((peaks - peak) * steepness).to(tl.float64)
    whole = tl.sum(mass, axis=0)
    total = whole
    key = -2147483648
    count = 0
    spare = vocab
    highest = _key(peak, SHIFT)
    first_stage = tl.where(has_k, 0, 1)
    end_stage = tl.where(has_p | (min_p > 0), 2, 1)
    for stage in range(first_stage, end_stage):
        limit = tl.where(has_p & (stage == 1), top_p.to(tl.float64) * total, float("inf"))
        least = tl.where(stage == 1, min_p, 0.0)
        # Tokens of less than an equal share of what may be cut off cannot all be needed.
        share = ((1.0 - top_p.to(tl.float64)) * whole / vocab * 0.5).to(tl.float32)
        rough_least = tl.maximum(tl.where(stage == 1, tl.maximum(min_p, share), 0.0), _LEAST_P)
        lowest = peak + (tl.log2(rough_least) - 0.01) / steepness
        # One below, as `lowest` may round to the peak: its tokens were then counted as many as there may be.
        low = tl.maximum(key, _key(lowest, SHIFT) - 1)
        high = highest
        while low < high:
            middle = _middle(low, high)
            is_above = is_block & (peak_keys > middle)
            number = tl.sum(is_above.to(tl.int32), axis=0)
            bulk = tl.sum(tl.where(is_above, peak_p, 0.0), axis=0)
            is_kept = (number < most) & (bulk < limit)
            low = tl.where(is_kept, low, middle + 1)
            high = tl.where(is_kept, middle, high)
        is_listed = is_block & (peak_keys >= low)
        tl.debug_barrier()
        tl.store(listed + tl.cumsum(is_listed.to(tl.int32), axis=0) - 1, b, mask=is_listed)
        tl.debug_barrier()
        count = tl.sum(is_listed.to(tl.int32), axis=0)
        high = highest
        number_above = 0
        mass_above = total * 0.0
        while low < high:
            middle = _middle(low, high)
            number, bulk = _above(
                middle, logits, vocab, listed, count, peak, steepness, BLOCK, TILE, SHIFT
            )  # fmt: skip
            p = tl.exp2((_of_key(middle, SHIFT) - peak) * steepness)
            is_kept = (number < most) & (bulk < limit) & (p >= least)
            number_above = tl.where(is_kept, number, number_above)
            mass_above = tl.where(is_kept, bulk, mass_above)
            low = tl.where(is_kept, low, middle + 1)
            high = tl.where(is_kept, middle, high)
        key = low
        p = tl.exp2((_of_key(key, SHIFT) - peak) * steepness)
        fitting = tl.ceil((limit - mass_above) / tl.maximum(p, _LEAST_P).to(tl.float64))
        spare = tl.minimum(fitting, (most - number_above).to(tl.float64)).to(tl.int32)
        total = mass_above + spare.to(tl.float64) * p.to(tl.float64)
    return key, spare, count


@triton.jit
def _pick_kernel(
    logits, stride, vocab, temperature, top_p, top_k, min_p, seed, index, peaks, sums, listed, ties,
    num_blocks, out,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, TILE: tl.constexpr, SHIFT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    allow_next(PDL)
    wait(PDL)
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride
    heat = tl.load(temperature + row)
    b = tl.arange(0, BLOCKS)
    j = tl.arange(0, BLOCK)
    is_block = b < num_blocks
    block_peaks = tl.load(peaks + row * num_blocks + b, mask=is_block, other=float("-inf"))
    peak = tl.max(block_peaks, axis=0)
    if tl.abs(peak) == float("inf"):
        tl.store(out + row, -1)
    elif heat <= 0:
        block = tl.min(tl.where(block_peaks == peak, b, BLOCKS), axis=0)
        at = block * BLOCK + j
        logit = tl.load(logits + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
        tl.store(out + row, tl.min(tl.where(logit == peak, at, vocab), axis=0))
    else:
        steepness = tl.minimum(_LOG2_E / heat, _STEEPEST)
        sums += row * num_blocks
        listed += row * num_blocks
        ties += row * num_blocks
        p = tl.load(top_p + row)
        k = tl.load(top_k + row).to(tl.int32)
        least = tl.load(min_p + row)
        mass = tl.load(sums + b, mask=is_block, other=0.0)
        mass = mass.to(tl.float64) * tl.exp2((block_peaks - peak) * steepness).to(tl.float64)
        key = -2147483648
        spare = 0
        has_cut = ((k > 0) & (k < vocab)) | (p < 1) | (least > 0)
        ties_before = tl.zeros([BLOCKS], tl.int32)
        if has_cut:
            key, spare, count = _cut(
                logits, vocab, block_peaks, is_block, mass, peak, steepness, p, k, least, listed,
                BLOCK, BLOCKS, TILE, SHIFT,
            )  # fmt: skip
            for first in range(0, count, TILE):
                logit = _tile(logits, vocab, listed, count, first, BLOCK, TILE)
                keys = _key(logit, SHIFT)
                i = first + tl.arange(0, TILE)
                above = tl.where(keys > key, tl.exp2((logit - peak) * steepness), 0.0)
                tl.store(sums + i, tl.sum(above, axis=1), mask=i < count)
                tl.store(ties + i, tl.sum((keys == key).to(tl.int32), axis=1), mask=i < count)
            tl.debug_barrier()
            above_mass = tl.load(sums + b, mask=b < count, other=0.0)
            num_ties = tl.load(ties + b, mask=b < count, other=0)
            ties_before = tl.cumsum(num_ties, axis=0) - num_ties
            ties_kept = tl.minimum(tl.maximum(spare - ties_before, 0), num_ties)
            p_tie = tl.exp2((_of_key(key, SHIFT) - peak) * steepness)
            mass = above_mass.to(tl.float64) + ties_kept.to(tl.float64) * p_tie.to(tl.float64)
        # Sums of a tree need not rise where nothing is added: only blocks that hold something count.
        running = tl.cumsum(mass, axis=0)
        last = tl.max(tl.where(mass > 0, b, 0), axis=0)
        total = tl.sum(tl.where(b == last, running, 0.0), axis=0)
        target = _uniform(tl.load(seed + row), tl.load(index + row)) * total
        place = tl.min(tl.where((running > target) & (mass > 0), b, last), axis=0)
        before = tl.sum(tl.where(b == place, running - mass, 0.0), axis=0)
        rank = tl.sum(tl.where(b == place, ties_before, 0), axis=0)
        block = place
        if has_cut:
            block = tl.load(listed + place)
        at = block * BLOCK + j
        logit = tl.load(logits + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
        keys = _key(logit, SHIFT)
        is_tie = (keys == key).to(tl.int32)
        is_kept = (keys > key) | ((is_tie > 0) & (rank + tl.cumsum(is_tie, axis=0) <= spare))
        share = tl.where(is_kept, tl.exp2((logit - peak) * steepness), 0.0)
        running_here = before + tl.cumsum(share.to(tl.float64), axis=0)
        last = tl.max(tl.where(share > 0, at, 0), axis=0)
        tl.store(out + row, tl.min(tl.where((running_here > target) & (share > 0), at, last), axis=0))


def sample_rows(
    logits: Tensor, temperature: Tensor, top_p: Tensor, top_k: Tensor, min_p: Tensor, seed: Tensor,
    index: Tensor, out: Tensor, config: SamplingConfig | None = None,
) -> None:  # fmt: skip
    """out[r] = the token of row r of the logits, -1 where the largest is not finite
    (`reference.sample_rows`).

    logits [R, V] float32, float16 or bfloat16, rows contiguous. The columns may be longer than R:
    temperature, top_p and min_p float32, top_k int32 or int64, seed int64, index int32 or int64; out int32.
    Nothing is read back to the host. Raises ValueError for shapes and types that do not fit.
    """
    rows, vocab = logits.shape
    columns = (temperature, top_p, top_k, min_p, seed, index, out)
    if logits.dtype not in _CONSTANT_BITS or logits.stride(1) != 1 or not vocab:
        raise ValueError(
            f"expected floating logits with contiguous rows, got {tuple(logits.shape)} {logits.dtype}, "
            f"strides {logits.stride()}"
        )
    if any(len(column) < rows or column.stride(0) != 1 for column in columns) or out.dtype != torch.int32:
        raise ValueError(
            f"expected contiguous columns of at least {rows} rows and int32 for the result, got "
            f"{[len(column) for column in columns]} and {out.dtype}"
        )
    if rows == 0:
        return
    config = config or SamplingConfig()
    pdl = can_overlap(logits.device)
    num_blocks = triton.cdiv(vocab, config.block)
    floats = torch.empty(2, rows, num_blocks, dtype=torch.float32, device=logits.device)
    ints = torch.empty(2, rows, num_blocks, dtype=torch.int32, device=logits.device)
    _scan_kernel[(triton.cdiv(num_blocks, config.scan_blocks), rows)](
        logits, logits.stride(0), vocab, temperature, floats[0], floats[1], num_blocks,
        BLOCK=config.block, BLOCKS=config.scan_blocks, PDL=pdl, num_warps=config.scan_warps,
        **launch_options(pdl),
    )  # fmt: skip
    _pick_kernel[(rows,)](
        logits, logits.stride(0), vocab, temperature, top_p, top_k, min_p, seed, index, floats[0], floats[1],
        ints[0], ints[1], num_blocks, out,
        BLOCK=config.block, BLOCKS=max(32, triton.next_power_of_2(num_blocks)), TILE=config.pick_blocks,
        SHIFT=_CONSTANT_BITS[logits.dtype], PDL=pdl, num_warps=config.pick_warps, **launch_options(pdl),
    )  # fmt: skip
