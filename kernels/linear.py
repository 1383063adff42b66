"""y = x @ W.T for few rows, at the speed of memory.

With few rows a product costs the bytes of W. What keeps a plain kernel from memory's speed is the rest: a
grid that does not divide evenly among the processors, and the start of each kernel, in which nothing is
fetched yet. So the work, tiles of W times blocks of the inner side, is cut into equal runs, one per program
("stream-K": Osama et al., 2023). A tile that several programs share has several partial sums; they go to
slots of the output, and the kernel that uses y adds them up in order (`add_slots`). Nobody waits for anybody,
and the sums do not depend on timing.

Slot s of column c, for s below the number of programs that share its tile: y[t, c] = sum_s out[s, t, c].
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.programs import allow_next, can_overlap, launch_options, num_processors, wait

MOST_SLOTS = 8


@dataclass(frozen=True, slots=True)
class LinearPlan:
    """How one product is cut. `units`: blocks of the inner side per program; `slots`: the most that share a
    tile."""

    block_n: int
    block_k: int
    rows: int  # of x a program multiplies, at least those there are
    programs: int
    units: int
    blocks_k: int
    slots: int
    num_warps: int
    num_stages: int

    @classmethod
    def make(
        cls,
        rows: int,
        n: int,
        k: int,
        processors: int,
        *,
        block_n: int = 64,
        block_k: int = 128,
        per_processor: int = 2,
        num_warps: int = 4,
        num_stages: int = 4,
    ) -> "LinearPlan":
        """For x [rows, k] and W [n, k] on a device with so many processors."""
        blocks_k = -(-k // block_k)
        total = -(-n // block_n) * blocks_k
        units = -(-total // (processors * per_processor))
        if units < blocks_k:  # a bound on how many share a tile
            units = max(units, -(-blocks_k // (MOST_SLOTS - 1)))
        if units % blocks_k == 0:
            slots = 1
        elif blocks_k % units == 0:
            slots = blocks_k // units
        else:  # a tile may begin at the last unit of a program
            slots = (blocks_k - 2) // units + 2
        return cls(
            block_n,
            block_k,
            max(16, triton.next_power_of_2(rows)),
            -(-total // units),
            units,
            blocks_k,
            slots,
            num_warps,
            num_stages,
        )


@triton.jit
def add_slots(
    y, row_offset, columns, is_column, slot_stride, blocks_k, units, BLOCK_N: tl.constexpr, SLOTS:
    tl.constexpr
):  # fmt: skip
    """y[row, columns] as float32: the sum of the slots of each column's tile. SLOTS 0: y is whole."""
    if SLOTS == 0:
        return tl.load(y + row_offset + columns, mask=is_column, other=0.0).to(tl.float32)
    else:
        tile = columns // BLOCK_N
        used = ((tile + 1) * blocks_k - 1) // units - (tile * blocks_k) // units + 1
        total = tl.load(y + row_offset + columns, mask=is_column, other=0.0)
        for s in tl.static_range(1, SLOTS):
            total += tl.load(
                y + s * slot_stride + row_offset + columns, mask=is_column & (s < used), other=0.0
            )
        return total


@triton.jit(do_not_specialize=["T"])
def _linear_kernel(
    x,
    stride_x,
    w,
    out,
    slot_stride,
    T,
    N,
    K,
    units,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    allow_next(PDL)
    pid = tl.program_id(0)
    blocks_k = tl.cdiv(K, BLOCK_K)
    unit = pid * units
    last = tl.minimum(unit + units, tl.cdiv(N, BLOCK_N) * blocks_k)
    m = tl.arange(0, ROWS)
    wait(PDL)
    while unit < last:
        tile = unit // blocks_k
        first = unit - tile * blocks_k
        count = tl.minimum(blocks_k - first, last - unit)
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = tl.zeros((BLOCK_N, ROWS), dtype=tl.float32)
        for block in range(first, first + count):
            k = block * BLOCK_K + tl.arange(0, BLOCK_K)
            w_at = w + n.to(tl.int64)[:, None] * K + k[None, :]
            x_at = x + m[None, :] * stride_x + k[:, None]
            if EVEN:
                ws = tl.load(w_at)
                xs = tl.load(x_at)
            else:
                ws = tl.load(w_at, mask=(n < N)[:, None] & (k < K)[None, :], other=0.0)
                xs = tl.load(x_at, mask=(k < K)[:, None], other=0.0)
            acc = tl.dot(ws, xs, acc, input_precision=PRECISION)
        slot = pid - (tile * blocks_k) // units
        out_at = out + slot.to(tl.int64) * slot_stride + m[:, None].to(tl.int64) * N + n[None, :]
        tl.store(out_at, tl.trans(acc), mask=(m < T)[:, None] & (n < N)[None, :])
        unit += count


def linear(x: Tensor, w: Tensor, out: Tensor, plan: LinearPlan, rows: int) -> None:
    """out[s, t] = the slots of x[t] @ w.T for t < `rows`.

    x [>= plan.rows, K], whose rows beyond `rows` may hold anything; w [N, K];
    out [>= plan.slots, >= rows, N] float32.
    """
    n, k = w.shape
    pdl = can_overlap(x.device)
    _linear_kernel[(plan.programs,)](
        x,
        x.stride(0),
        w,
        out,
        out.stride(0),
        rows,
        n,
        k,
        plan.units,
        ROWS=plan.rows,
        BLOCK_N=plan.block_n,
        BLOCK_K=plan.block_k,
        EVEN=n % plan.block_n == 0 and k % plan.block_k == 0,
        PRECISION="ieee",
        PDL=pdl,
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
        **launch_options(pdl),
    )


def default_plan(rows: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> LinearPlan:
    """The plan of `linear` for this shape on this device.

    On Hopper two programs of 96 KiB of stages fit a processor. Two ways to fetch weights while the kernels
    between two products run, into the L2 cache or a first block into registers, made a step slower on an H200
    (by 4 to 12 %).
    """
    processors = num_processors(device)
    if device.type == "cpu":
        return LinearPlan.make(rows, n, k, processors, block_n=16, block_k=16)
    return LinearPlan.make(rows, n, k, processors, block_k=256 // dtype.itemsize)
