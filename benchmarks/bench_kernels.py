"""What LoRA costs a layer on a GPU: our kernels and other servers', against the bytes they must read.

    python -m benchmarks.bench_kernels [--vllm FOLDER] [--sglang FOLDER] [--out FILE]
    python -m benchmarks.bench_kernels --rows 32 --ranks 16 --popularities distinct,identical
    python -m benchmarks.bench_kernels --tiny

For a decode step of one token per row, over rows, ranks and popularities (how the rows share adapters, as
Punica has them), on all seven modules of a layer of Llama-3.1-8B in bfloat16. A figure is a difference: the
time of a layer with LoRA less that of the same layer without, both recorded as CUDA graphs over several
layers, so that each reads weights and adapters from memory as a model does. Ours are the layers that the
engine runs (without attention), where LoRA runs beside the products; looking up where the tiles lie, once a
step, is in a column of its own (`resolve`), and so is the first half alone (`shrink`). A peer's layer is the
library's four products. `host` is the time its host takes to prepare a step.

The floor is A and B of each adapter in the step, read once at the copy bandwidth measured in the same run.
Before anything is timed, outputs are held against plain torch in float32, in buffers that held NaN.
`--vllm` and `--sglang`: see `peer_kernels`. `--tiny` runs small shapes once, anywhere, to show that it works.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from benchmarks.common import commit, gpu, machine
from benchmarks.gpu_rows import popularity as adapters_by_popularity
from benchmarks.peer_kernels import Peer, Stack, load_peers, make_stacks
from benchmarks.random_model import LLAMA_3_1_8B, TINY, random_model
from engine.batch import Batch, build_batch
from engine.gpu_decoder import StepShape
from engine.gpu_runner import GpuRunner
from engine.model import GROUP_MODULES, GROUPS, MODULES, Layer, ModelConfig, group_shape, module_shape
from engine.packing import ResidentAdapter, lay_out, min_slab_elems
from engine.request import AdapterRef, Chunk, Request, SamplingParams, Sequence
from kernels import lora
from kernels.reference import gated_activation, lora_pages, rms_norm

LAYERS = 4
BLOCK = 16
POPULARITIES = ("distinct", "uniform", "skewed", "identical")
CHECKED_ROWS = 3
OURS_WITHIN = 0.05  # root mean square of the error over that of what LoRA changes, behind all layers
PEERS_WITHIN = 0.2  # the same of one product: what they add is rounded with a product 20 times as large
ADDED = 1.0  # about how large what our LoRA adds is, beside a product's own 1


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    rows: int
    rank: int
    popularity: str

    @property
    def name(self) -> str:
        return f"{self.rows} rows, rank {self.rank}, {self.popularity}"


class Clock:
    """Times calls on one stream, which is also the stream that graphs are recorded on."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_cuda = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if self.is_cuda else None

    def compare(self, *calls: Callable[[], object], repeats: int = 9) -> list[float]:
        """Seconds of each call: the median of several, the calls taking turns."""
        if not self.is_cuda:
            return [self._host(call) for call in calls]
        graphs = [self._record(call) for call in calls]
        times: list[list[float]] = [[] for _ in calls]
        with torch.cuda.stream(self.stream):
            for _ in range(repeats + 1):
                for graph, took in zip(graphs, times, strict=True):
                    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    begin.record()
                    graph.replay()
                    end.record()
                    end.synchronize()
                    took.append(begin.elapsed_time(end) / 1e3)
        return [statistics.median(took[1:]) for took in times]

    def host(self, call: Callable[[], object], repeats: int = 15) -> float:
        """Seconds until the call returns on the host: the median."""
        times = []
        for _ in range(repeats if self.is_cuda else 1):
            self.wait()
            times.append(self._host(call))
        self.wait()
        return statistics.median(times)

    def wait(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()

    def _record(self, call: Callable[[], object]) -> torch.cuda.CUDAGraph:
        self.wait()
        with torch.cuda.stream(self.stream):
            call()  # compiles, and makes what may not be made while recording
        self.wait()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            call()
        return graph

    @staticmethod
    def _host(call: Callable[[], object]) -> float:
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin


class Bench:
    """One model of a few layers, one arena of random numbers, in which adapters of any shape find
    themselves.
    """

    def __init__(self, config: ModelConfig, device: torch.device, rows: int, arena_elems: int) -> None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.half = torch.bfloat16 if device.type == "cuda" else torch.float16  # peers take no float32
        self.config, self.device, self.dtype = config, device, dtype
        self.clock = Clock(device)
        self.bandwidth = self._copy_bandwidth()
        self.model = random_model(config, device=device, dtype=dtype)
        kv = config.num_layers * 2 * BLOCK * config.num_kv_heads * config.head_dim
        self.slab_elems = max(kv, min_slab_elems(config))
        self.num_slabs = arena_elems // self.slab_elems + 2
        self.arena = torch.empty(self.num_slabs, self.slab_elems, dtype=dtype, device=device)
        for part in self.arena.split(4096):
            part.normal_(std=config.hidden_size**-0.5)
        self.runner = GpuRunner(self.model, self.arena, BLOCK, max_tokens=rows, max_rows=rows)
        self.decoder = self.runner._decoder
        self.shapes = [
            (group_shape(config, group)[1], tuple(module_shape(config, m)[0] for m in GROUP_MODULES[group]))
            for group in GROUPS
        ]
        self.layers = [layer for layer in self.model.decoder.layers if isinstance(layer, Layer)]
        self.memory = self.arena.view(-1).to(self.half)  # on a GPU these are no copies
        self.weights = [
            [getattr(layer, group).weight.to(self.half) for group in GROUPS] for layer in self.layers
        ]

    def floor(self, distinct: int, rank: int) -> float:
        """Seconds to read A and B of one layer of so many adapters."""
        stored = -(-rank // 8) * 8
        sides = sum(sum(module_shape(self.config, module)) for module in MODULES)
        return distinct * stored * sides * self.dtype.itemsize / self.bandwidth

    def batch(self, case: Case | None, rows: int) -> Batch:
        """One new token at position 0 per row, with the adapters of the case or none."""
        residents = self._residents(case) if case else {}
        of_rows = adapters_by_popularity(case.popularity, rows) if case else []
        chunks = []
        for row in range(rows):
            sequence = Sequence(
                Request(f"{row}", (row % self.config.vocab_size,), SamplingParams(temperature=0))
            )
            sequence.resident = residents[of_rows[row]] if residents else None
            sequence.blocks = [self.num_slabs - 1]  # where all write, none reads
            chunks.append(Chunk(sequence, 0, 1, wants_token=True))
        return build_batch(chunks, BLOCK)

    @torch.inference_mode()  # as the engine runs, whose buffers are made so
    def ours(self, case: Case) -> dict[str, float]:
        """Our figures of one case in seconds, its outputs checked."""
        batch, plain = self.batch(case, case.rows), self.batch(None, case.rows)
        error = self._check_ours(batch)
        shape = self._fill(batch)
        without = replace(shape, lora_groups=())
        rows, places = self.runner._inputs.lora, self.decoder._places
        inputs = [torch.randn(case.rows, side, device=self.device).to(self.dtype) for side, _ in self.shapes]
        sums = [
            torch.empty(lora.num_splits(side), case.rows, len(widths) * 256, device=self.device)
            for side, widths in self.shapes
        ]

        def shrink() -> None:
            for layer in range(self.config.num_layers):
                for group in range(len(GROUPS)):
                    lora.shrink(inputs[group], sums[group], self.decoder._arena, rows, places, layer, group)

        took, base, resolve, shrunk = self.clock.compare(
            lambda: self.decoder.layers(shape),
            lambda: self.decoder.layers(without),
            lambda: lora.resolve(rows, places, self.config.num_layers),
            shrink,
        )
        host = self.clock.host(lambda: self._fill(batch)) - self.clock.host(lambda: self._fill(plain))
        count = self.config.num_layers
        return {
            "seconds": (took - base - resolve) / count,
            "layer": base / count,
            "shrink": shrunk / count,
            "resolve": resolve,
            "host": host,
            "error": error,
        }

    def peer(self, peer: Peer, case: Case) -> dict[str, float]:
        """A peer's figures of one case in seconds, its outputs checked."""
        slots = adapters_by_popularity(case.popularity, case.rows)
        most = max(slots) + 1
        stacks = make_stacks(self.memory, most, case.rank, self.config.num_layers, self.shapes)
        inputs = [torch.randn(case.rows, side, device=self.device).to(self.half) for side, _ in self.shapes]
        outs = [
            torch.empty(case.rows, sum(widths), dtype=self.half, device=self.device)
            for _, widths in self.shapes
        ]

        def product(layer: int, group: int) -> Tensor:
            return torch.mm(inputs[group], self.weights[layer][group].t(), out=outs[group])

        def layers() -> None:
            for layer, stacks_here in enumerate(stacks):
                for group, stack in enumerate(stacks_here):
                    peer.run(inputs[group], stack, lambda at=(layer, group): product(*at))

        def products() -> None:
            for layer in range(len(stacks)):
                for group in range(len(GROUPS)):
                    product(layer, group)

        with torch.inference_mode():
            peer.prepare(slots, most, case.rank)
            self.clock.wait()
            error = 0.0
            for group, stack in enumerate(stacks[-1]):
                outs[group].fill_(math.nan)
                got = peer.run(inputs[group], stack, lambda at=group: product(-1, at))
                base = inputs[group].float() @ self.weights[-1][group].float().t()
                error = max(error, self._check_peer(peer, stack, slots, inputs[group], got.float() - base))
            took, base_took = self.clock.compare(layers, products)
            host = self.clock.host(lambda: peer.prepare(slots, most, case.rank))
        count = self.config.num_layers
        return {
            "seconds": (took - base_took) / count,
            "layer": base_took / count,
            "host": host,
            "error": error,
        }

    def _fill(self, batch: Batch) -> StepShape:
        """The step's inputs on their way; its shape, without attention."""
        shape = replace(self.runner._shape(batch), singles=0)
        padded = shape.tokens
        self.runner._inputs.fill(batch, padded, padded, padded)
        return shape

    def _residents(self, case: Case) -> dict[int, ResidentAdapter]:
        stored = -(-case.rank // 8) * 8
        places = tuple(
            (layer, module, case.rank, ADDED * (self.config.hidden_size / stored) ** 0.5)
            for layer in range(self.config.num_layers)
            for module in MODULES
        )
        layout = lay_out(places, self.config, self.slab_elems)
        count, need = max(adapters_by_popularity(case.popularity, case.rows)) + 1, layout.slabs_needed
        if count * need > self.num_slabs - 2:
            raise ValueError(f"expected room for {count * need} slabs, got {self.num_slabs - 2}")
        return {
            n: ResidentAdapter(AdapterRef(f"{n}", 1), layout, tuple(range(n * need, (n + 1) * need)))
            for n in range(count)
        }

    @torch.inference_mode()
    def _check_ours(self, batch: Batch) -> float:
        """Run all layers and compare a few rows with plain torch: the root mean square error over that of
        what LoRA changes.
        """
        decoder = self.decoder
        for buffer in (decoder._v, decoder._slots, decoder._whole, decoder._q, decoder._gated, decoder._xw):
            buffer.fill_(math.nan)
        shape = self._fill(batch)
        decoder._mixed.normal_()
        decoder.layers(shape)
        self.clock.wait()
        rows = sorted({0, len(batch.token_ids) // 2, len(batch.token_ids) - 1})[:CHECKED_ROWS]
        tokens = torch.from_numpy(batch.token_ids)[rows].to(self.device)
        mixed = decoder._mixed[rows].flatten(1).float()
        adapters = [batch.adapters[batch.adapter_of_seq[row]] for row in rows]
        got = decoder._x[rows]
        expected = self._plain(tokens, mixed, adapters)
        changed = expected - self._plain(tokens, mixed, [])
        return _held(got, expected, changed, OURS_WITHIN)

    def _plain(self, tokens: Tensor, mixed: Tensor, adapters: list[ResidentAdapter]) -> Tensor:
        """The residual stream behind all layers in float32, attention's output given -> [rows, H]."""
        config, count = self.config, self.config.num_layers
        compact = [self.arena[list(adapter.slabs)].float().view(-1) for adapter in adapters]
        tables = [replace(a, slabs=tuple(range(len(a.slabs)))).table(count) for a in adapters]

        def product(layer: Layer, group: str, x: Tensor) -> Tensor:
            y = x @ getattr(layer, group).weight.float().t()
            first = MODULES.index(GROUP_MODULES[group][0])
            here = (layer.index, slice(first, first + len(GROUP_MODULES[group])))
            widths = [module_shape(config, module)[0] for module in GROUP_MODULES[group]]
            for row, (memory, table) in enumerate(zip(compact, tables, strict=True)):
                lora_pages(
                    x[row : row + 1], y[row : row + 1], memory, [(0, 0, 1)],
                    table.tiles_a[here][None], table.tiles_b[here][None], table.scales[here][None], widths,
                )  # fmt: skip
            return y

        x, eps = self.model.decoder.embed[tokens].float(), config.rms_norm_eps
        for layer in self.layers:
            x = x + product(layer, "o", mixed)
            gated = gated_activation(
                product(layer, "gate_up", rms_norm(x, layer.post_norm.weight.float(), eps))
            )
            x = x + product(layer, "down", gated)
        return x

    def _check_peer(self, peer: Peer, stack: Stack, slots: list[int], x: Tensor, got: Tensor) -> float:
        rows = sorted({0, len(slots) // 2, len(slots) - 1})[:CHECKED_ROWS]
        expected = []
        for row in rows:
            parts = [peer.matrices(stack, slots[row], m) for m in range(len(stack.widths))]
            expected.append(torch.cat([x[row].float() @ a.float().t() @ b.float() for a, b in parts]))
        added = torch.stack(expected)
        return _held(got[rows], added, added, PEERS_WITHIN)

    def _copy_bandwidth(self) -> float:
        """Bytes per second, read and written, of a plain copy; the best of a few rounds of five. Not as a
        graph: a recorded copy is no kernel, and a third slower."""
        size = 2 << 30 if self.clock.is_cuda else 1 << 22
        source, target = (torch.zeros(size, dtype=torch.uint8, device=self.device) for _ in range(2))
        best = math.inf
        for _ in range(6):
            self.clock.wait()
            begin = time.perf_counter()
            for _ in range(5):
                target.copy_(source)
            self.clock.wait()
            best = min(best, (time.perf_counter() - begin) / 5)
        return 2 * size / best


def _held(got: Tensor, expected: Tensor, scale: Tensor, limit: float) -> float:
    """Root mean square of the error over that of `scale`. Raises ArithmeticError beyond the limit."""
    error = ((got - expected).square().mean().sqrt() / scale.square().mean().sqrt()).item()
    if not error < limit:  # NaN is beyond any
        raise ArithmeticError(f"expected an error below {limit}, got {error:.3g}")
    return error


def _rounded(figures: dict[str, float]) -> dict[str, float]:
    """Seconds as microseconds; an error stays what it is."""
    times = {f"{key}_us": round(value * 1e6, 3) for key, value in figures.items() if key != "error"}
    return {**times, "error": figures["error"]}


def make_bench(tiny: bool, rows: int, rank: int) -> Bench:
    """A bench for cases of up to so many rows of up to this rank."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = (
        replace(TINY, vocab_size=64, num_layers=1)
        if tiny
        else replace(LLAMA_3_1_8B, vocab_size=1024, num_layers=LAYERS)
    )
    sides = sum(sum(module_shape(config, module)) for module in MODULES)
    one = config.num_layers * (-(-rank // 8) * 8) * sides
    return Bench(config, device, rows, math.ceil(rows * one * 1.2) + 16 * min_slab_elems(config))


def compile_for(name: str, rank: int, rows: list[int], vllm: Path | None, sglang: Path | None) -> str:
    """Run one way at one rank once, so that its kernels lie in Triton's cache. -> what went wrong, or
    nothing.
    """
    try:
        bench = make_bench(False, max(rows), rank if max(rows) < 2 else min(rank, 16))
        peers, _ = load_peers(vllm, sglang, bench.device)
        for count in rows:
            case = Case(count, rank, "identical")
            if name == "ours":
                bench.ours(case)
            else:
                bench.peer(peers[name], case)
    except Exception as error:
        return f"{name}, rank {rank}: {type(error).__name__}: {error}"
    return ""


def cases(options: argparse.Namespace) -> Iterator[Case]:
    for rows in options.rows:
        for rank in options.ranks:
            for popularity in options.popularities if rows > 1 else options.popularities[:1]:
                yield Case(rows, rank, popularity)


def run(options: argparse.Namespace) -> dict[str, Any]:
    began = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - began:6.1f} s] {text}", flush=True)

    is_cuda = torch.cuda.is_available()
    names = ["ours", *(["vllm"] if options.vllm else [])]
    names += ["sglang csgmv", "sglang v2"] if options.sglang else []
    if is_cuda and not options.tiny and options.compilers > 0:
        say(f"compiling for {', '.join(names)} in {options.compilers} processes")
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(options.compilers, mp_context=context) as pool:
            jobs = [
                pool.submit(compile_for, name, rank, options.rows, options.vllm, options.sglang)
                for name in names
                for rank in (options.ranks if name != "ours" else options.ranks[:1])
            ]
            for job in jobs:
                if problem := job.result():
                    say(f"compiling failed: {problem}")
    bench = make_bench(options.tiny, max(options.rows), max(options.ranks))
    peers, errors = load_peers(options.vllm, options.sglang, bench.device)
    for name, error in errors.items():
        say(f"{name} cannot be loaded: {error}")
    say(f"copy {bench.bandwidth / 1e12:.2f} TB/s; us per layer over a layer without LoRA (of floor; host us)")
    found: list[dict[str, Any]] = []
    for case in cases(options):
        distinct = max(adapters_by_popularity(case.popularity, case.rows)) + 1
        floor = bench.floor(distinct, case.rank)
        record: dict[str, Any] = {"rows": case.rows, "rank": case.rank, "popularity": case.popularity}
        record |= {"adapters": distinct, "floor_us": round(floor * 1e6, 2)}
        cells = []
        ways: list[tuple[str, Callable[[], dict[str, float]]]] = [("ours", lambda c=case: bench.ours(c))]
        ways += [(name, lambda p=peer, c=case: bench.peer(p, c)) for name, peer in peers.items()]
        for name, measure in ways:
            if time.perf_counter() - began > options.budget:
                record[name] = {"error": f"not run: beyond {options.budget:.0f} s"}
                continue
            try:
                figures = measure()
                record[name] = _rounded(figures)
                took, host = figures["seconds"], figures["host"]
                cells.append(f"{name} {took * 1e6:8.1f} ({took / floor:5.2f}; {host * 1e6:5.0f})")
            except Exception as error:
                record[name] = {"error": f"{type(error).__name__}: {error}"}
                cells.append(f"{name} failed: {type(error).__name__}: {error}"[:200])
        found.append(record)
        say(f"{case.name:34} floor {floor * 1e6:7.1f}  " + "  ".join(cells))
    return {
        "copy_bytes_per_s": bench.bandwidth,
        "layers": bench.config.num_layers,
        "not_loaded": errors,
        "seconds": round(time.perf_counter() - began, 1),
        "cases": found,
    }


def main() -> None:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description="What LoRA costs a layer, by kernels.")
    parser.add_argument("--rows", type=numbers, help="default 1,8,32,128,256")
    parser.add_argument("--ranks", type=numbers, help="default 8,16,64,128")
    parser.add_argument("--popularities", type=lambda text: text.split(","), default=list(POPULARITIES))
    parser.add_argument("--vllm", type=Path, help="folder with vLLM's package in it")
    parser.add_argument("--sglang", type=Path, help="folder with SGLang's package in it")
    parser.add_argument("--compilers", type=int, default=min(16, os.cpu_count() or 1))
    parser.add_argument(
        "--budget", type=float, default=600.0, help="seconds after which nothing new is begun"
    )
    parser.add_argument("--out", type=Path, help="also write the last line to this file")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    options.rows = options.rows or ([3] if options.tiny else [1, 8, 32, 128, 256])
    options.ranks = options.ranks or ([8] if options.tiny else [8, 16, 64, 128])
    for popularity in options.popularities:
        if popularity not in POPULARITIES:
            parser.error(f"expected popularities among {', '.join(POPULARITIES)}, got {popularity}")
    record = {
        "benchmark": "kernels",
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        **machine(),
        **gpu(),
        "tiny": options.tiny,
        **run(options),
    }
    line = json.dumps(record)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=2) + "\n")
    print(line, flush=True)


if __name__ == "__main__":
    main()
