"""The attention and sampling kernels on a GPU: time, share of the copy bandwidth (decode, sampling), products
per second (prefill).

    python -m benchmarks.bench_attention [--keep] [--tiny] [--only decode|prefill|sample]

Decode and prefill of a model with 32 query heads, 8 K/V heads of 128 dimensions and pages of 16 tokens, for
several ways to cut the kernels; each is first checked against the reference in float32. Sampling is greedy,
drawn and filtered, beside torch.argmax. `--tiny` runs small shapes once, anywhere. Prints a table, then one
line of JSON.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from benchmarks.common import report
from kernels import attention, reference, sampling
from kernels.attention import AttentionConfig
from kernels.reference import paged_attention
from kernels.sampling import SamplingConfig

BLOCK = 16
_LEAST_BYTES = 1 << 28  # more than an L2 cache, so that repeats do not find their K/V there


def seconds(call: Callable[[int], None], device: torch.device, tiny: bool) -> float:
    """Median time of call(i), i counting calls. On a GPU they are one CUDA graph: launches cost nothing."""
    call(0)
    if device.type != "cuda":
        begin = time.perf_counter()
        call(0)
        return time.perf_counter() - begin
    calls, repeats = (2, 1) if tiny else (16, 5)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i)
    graph.replay()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / calls)
    return statistics.median(times)


def _ignore(_: object) -> None:
    pass


def copy_bandwidth(device: torch.device, tiny: bool) -> float:
    """Bytes per second, read and written, of a plain copy."""
    size = 1 << 22 if tiny else 1 << 30
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / seconds(lambda i: _ignore(target.copy_(source)), device, tiny)


@dataclass(frozen=True)
class Sizes:
    """Of the model's attention."""

    heads: int
    kv_heads: int
    dim: int
    dtype: torch.dtype


class Pages:
    """Sequences of given lengths on shuffled pages of several layers."""

    def __init__(
        self, lengths: list[int], heads: int, dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        blocks = [-(-length // BLOCK) for length in lengths]
        page = 2 * BLOCK * heads * dim
        self.layers = max(1, min(16, _LEAST_BYTES // (page * dtype.itemsize * sum(blocks)) + 1))
        if device.type != "cuda":
            self.layers = 1
        self.slabs = torch.empty(
            sum(blocks), self.layers, 2, BLOCK, heads, dim, dtype=dtype, device=device
        ).normal_()
        order = torch.randperm(sum(blocks))
        starts = [sum(blocks[:s]) for s in range(len(blocks))]
        self.tables = torch.zeros(len(lengths), max(blocks), dtype=torch.int64)
        for s, start in enumerate(starts):
            self.tables[s, : blocks[s]] = order[start : start + blocks[s]]
        self.tables = self.tables.to(device)
        self.block_list = order.int().to(device)
        self.block_start = torch.tensor(starts, dtype=torch.int32, device=device)
        self.context_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
        self.lengths = lengths

    def layer(self, i: int) -> int:
        return i % self.layers


def check(got: Tensor, q: Tensor, pages: Pages, starts: list[int], scale: float) -> float:
    """Largest error of up to four sequences against the reference in float32."""
    worst = 0.0
    for s in sorted({0, 1, len(pages.lengths) // 2, len(pages.lengths) - 1} & set(range(len(pages.lengths)))):
        rows = slice(starts[s], starts[s + 1])
        used = pages.tables[s, : -(-pages.lengths[s] // BLOCK)]
        own = torch.arange(len(used), device=q.device)[None]
        kv = pages.slabs[used].float()
        expected = paged_attention(
            q[rows].float(), kv, 0, own, [pages.lengths[s]], [0, starts[s + 1] - starts[s]], scale
        )
        worst = max(worst, (got[rows].float() - expected).abs().max().item())
    if not worst < 2e-2:
        raise ArithmeticError(f"expected an error below 0.02, got {worst}")
    return worst


def decode_shapes(tiny: bool) -> list[tuple[str, list[int]]]:
    if tiny:
        return [("3x40", [40] * 3)]
    shapes = [(f"{rows}x{length}", [length] * rows) for rows, length in (
        (1, 1024), (8, 8192), (32, 64), (32, 512), (32, 2048), (32, 8192), (128, 512), (128, 2048), (256, 64),
        (256, 1024), (256, 2048),
    )]  # fmt: skip
    uneven = [8 + 4 * (37 * row % 253) for row in range(253)]  # as replies of all ages, in no order
    return [*shapes, ("255x256+8192", [256] * 255 + [8192]), ("253x8-1016", uneven)]


def prefill_shapes(tiny: bool) -> list[tuple[str, list[int], list[int]]]:
    """(name, lengths, new tokens of each)"""
    if tiny:
        return [("24@40", [40], [24])]
    single = [(f"{new}@{length}", [length], [new]) for new, length in (
        (128, 128), (128, 2048), (512, 512), (512, 8192), (2048, 2048), (2048, 8192),
    )]  # fmt: skip
    return [*single, ("8x64@512", [512] * 8, [64] * 8), ("32x16@1024", [1024] * 32, [16] * 32)]


class Table:
    """Rows of results, printed as they come."""

    def __init__(self, device: torch.device, tiny: bool) -> None:
        self.device, self.tiny = device, tiny
        self.bandwidth = copy_bandwidth(device, tiny)
        self.rows: list[dict[str, Any]] = []
        print(f"copy {self.bandwidth / 1e9:.0f} GB/s")

    def note(
        self, op: str, shape: str, how: str, call: Callable[[int], None], amount: float, unit: str
    ) -> None:
        took = seconds(call, self.device, self.tiny)
        rate = amount / took / (self.bandwidth if unit == "of copy" else 1e12)
        self.rows.append(
            {"op": op, "shape": shape, "config": how, "us": round(took * 1e6, 1), unit: round(rate, 3)}
        )
        print(f"{op:8} {shape:14} {how:26} {took * 1e6:10.1f} us {rate:8.2f} {unit}", flush=True)


def bench_decode(table: Table, name: str, lengths: list[int], sizes: Sizes) -> None:
    device = table.device
    pages = Pages(lengths, sizes.kv_heads, sizes.dim, sizes.dtype, device)
    count, scale = len(lengths), sizes.dim**-0.5
    q = torch.randn(count, sizes.heads, sizes.dim, dtype=sizes.dtype, device=device)
    out = torch.empty_like(q)
    plan = attention.DecodePlan.make(count, sizes.kv_heads, sizes.dim, sizes.dtype, max(lengths), device)
    chosen, default = plan.splits, plan.config
    most = 2 * chosen
    space = torch.empty(count * most * sizes.heads * (sizes.dim + 1), dtype=torch.float32, device=device)
    plans = [(chosen, default)]
    if not table.tiny:
        plans += [(splits, default) for splits in (chosen // 2, most) if splits]
        plans += [
            (chosen, AttentionConfig(*how))
            for how in (
                (32, 2, 2), (32, 2, 4), (32, 4, 4), (64, 2, 2), (64, 4, 2), (64, 4, 3), (128, 4, 1),
                (128, 4, 2), (128, 8, 3),
            )
        ]  # fmt: skip
    for splits, config in plans:

        def decode(i: int, splits: int = splits, config: AttentionConfig = config) -> None:
            attention.decode_attention(
                q, pages.slabs, pages.layer(i), pages.block_list, pages.block_start, pages.context_lens,
                scale, splits=splits, workspace=space, out=out, config=config,
            )  # fmt: skip

        out.fill_(float("nan"))
        decode(0)
        check(out, q, pages, list(range(count + 1)), scale)
        how = f"{splits} splits {config.positions},{config.num_warps},{config.num_stages}"
        amount = float(sum(lengths) * sizes.kv_heads * sizes.dim * 2 * sizes.dtype.itemsize)
        table.note("decode", name, how, decode, amount, "of copy")


def bench_prefill(table: Table, name: str, lengths: list[int], new: list[int], sizes: Sizes) -> None:
    device = table.device
    pages = Pages(lengths, sizes.kv_heads, sizes.dim, sizes.dtype, device)
    starts = [sum(new[:s]) for s in range(len(new) + 1)]
    scale = sizes.dim**-0.5
    q = torch.randn(starts[-1], sizes.heads, sizes.dim, dtype=sizes.dtype, device=device)
    out = torch.empty_like(q)
    query_start = torch.tensor(starts, dtype=torch.int32, device=device)
    pairs = sum(n * (length - n) + n * (n + 1) // 2 for n, length in zip(new, lengths, strict=True))
    default = attention.prefill_config(sizes.dim, sizes.dtype)
    usual = attention.QUERY_ROWS
    plans = [(usual, default)]
    if not table.tiny:
        plans += [(16, default), (16, AttentionConfig(64, 4, 3)), (64, default)]
        plans += [(usual, AttentionConfig(*how)) for how in ((64, 4, 3), (128, 8, 2), (64, 8, 2))]
    for query_rows, config in plans:
        tiles = attention.query_tiles(starts, query_rows, -(-starts[-1] // query_rows) + len(new))
        columns = [torch.from_numpy(column).to(device) for column in tiles]

        def prefill(
            i: int, rows: int = query_rows, config: AttentionConfig = config, columns: list[Tensor] = columns
        ) -> None:
            attention.prefill_attention(
                q, pages.slabs, pages.layer(i), pages.block_list, pages.block_start, pages.context_lens,
                query_start, *columns, scale, out=out, query_rows=rows, config=config,
            )  # fmt: skip

        out.fill_(float("nan"))
        prefill(0)
        check(out, q, pages, starts, scale)
        how = f"{query_rows} rows {config.positions},{config.num_warps},{config.num_stages}"
        table.note("prefill", name, how, prefill, 4.0 * pairs * sizes.heads * sizes.dim, "TFLOP/s")


def bench_sampling(table: Table, rows: int, vocab: int, dtype: torch.dtype) -> None:
    """Logits as peaked as a trained model's: about 80 % of p in 100 tokens, and a long tail."""
    device = table.device
    logits = torch.randn(rows, vocab, device=device) * 2.2
    logits[:, torch.randperm(vocab, device=device)[:100]] += 9.0
    logits = logits.to(dtype)
    out = torch.empty(rows, dtype=torch.int32, device=device)
    amount = float(logits.numel() * logits.element_size())
    table.note("argmax", f"{rows}x{vocab}", "torch", lambda i: _ignore(logits.argmax(-1)), amount, "of copy")
    ways: dict[str, dict[str, float]] = {
        "greedy": {"temperature": 0.0},
        "draw": {},
        "top_p 0.9": {"top_p": 0.9},
        "top_k 50": {"top_k": 50},
        "k50 p.9 m.05": {"top_k": 50, "top_p": 0.9, "min_p": 0.05},
        "T3 p.999": {"temperature": 3.0, "top_p": 0.999},
    }
    plans = [SamplingConfig()]
    if not table.tiny:
        plans += [SamplingConfig(scan_blocks=16), SamplingConfig(scan_blocks=64, scan_warps=8)]
        plans += [SamplingConfig(pick_warps=8), SamplingConfig(pick_blocks=32, pick_warps=8)]
    for way, settings in ways.items():
        values = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, **settings}
        columns = [
            torch.full((rows,), value, dtype=torch.int32 if name == "top_k" else torch.float32, device=device)
            for name, value in values.items()
        ]
        columns += [torch.arange(rows, dtype=kind, device=device) for kind in (torch.int64, torch.int32)]
        long = [column if column.is_floating_point() else column.long() for column in columns]
        expected = reference.sample_rows(logits, *long)
        for config in plans:

            def sample(i: int, columns: list[Tensor] = columns, config: SamplingConfig = config) -> None:
                sampling.sample_rows(logits, *columns, out, config)

            out.fill_(-2)
            sample(0)
            wrong = int((out != expected).sum())
            if wrong > rows // 100:  # a draw on the edge of two tokens may fall on either by rounding
                raise ArithmeticError(f"expected the reference's tokens, got {wrong} others of {rows}: {way}")
            how = f"{way} {config.scan_blocks},{config.scan_warps},{config.pick_blocks},{config.pick_warps}"
            table.note("sample", f"{rows}x{vocab}", how, sample, amount, "of copy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", action="store_true", help="also write results/<date>-attention.json")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", choices=["decode", "prefill", "sample"], help="one kind of rows")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    sizes = Sizes(4, 2, 32, dtype) if args.tiny else Sizes(32, 8, 128, dtype)
    torch.manual_seed(0)
    table = Table(device, args.tiny)
    for name, lengths in decode_shapes(args.tiny) if args.only in (None, "decode") else []:
        bench_decode(table, name, lengths, sizes)
    for name, lengths, new in prefill_shapes(args.tiny) if args.only in (None, "prefill") else []:
        bench_prefill(table, name, lengths, new, sizes)
    vocabularies = [(1, 128256), (32, 128256), (256, 128256), (32, 151936)]
    for rows, vocab in ([(2, 300)] if args.tiny else vocabularies) if args.only in (None, "sample") else []:
        bench_sampling(table, rows, vocab, dtype)
    numbers = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "copy_gb_s": round(table.bandwidth / 1e9),
        "rows": table.rows,
    }
    report("attention", numbers, keep=args.keep)


if __name__ == "__main__":
    main()
