"""The rows of bench_gpu: what each sets up, measures, and is held to."""

from __future__ import annotations

import ctypes
import gc
import math
import mmap
import os
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.driving import Budget, Driven, Run, Steady, Work, make_work, uniform_lengths
from benchmarks.plain_path import Passage, plain_logits
from benchmarks.random_model import (
    ALL_16,
    ATTENTION_8,
    ATTENTION_8_TO_64,
    ATTENTION_16,
    ATTENTION_64,
    LLAMA_2_7B,
    LLAMA_3_1_8B,
    QV_8,
    TINY,
    AdapterKind,
    RandomAdapters,
    kv_bytes,
    random_model,
    weight_bytes,
)
from engine.adapter_files import version_folder
from engine.batch import build_batch
from engine.config import EngineConfig
from engine.engine import Engine
from engine.model import ModelConfig
from engine.request import AdapterRef, Chunk, Request, SamplingParams
from engine.request import Sequence as Running
from engine.weights import LoadedModel

GIB = 1 << 30
H200_COPY = 4.27e12  # bytes/s: the copy bandwidth of the card that the targets were set for
NOT_ARENA = 10 * GIB  # of a GPU's memory, for graphs, workspaces and the library's own
SHAPES = {"8b": LLAMA_3_1_8B, "7b": LLAMA_2_7B}
TINY_SHAPES = {"8b": TINY, "7b": replace(TINY, num_kv_heads=4)}


@dataclass(frozen=True)
class Measured:
    """A row's figure, beside what bytes allow and what it is to reach, all in `unit`.

    `lower_is_better` says on which side of the target the figure has to be; `holds` is false if a further
    condition, which the details name, is not met.
    """

    figure: float
    unit: str
    target: float
    floor: float | None = None
    lower_is_better: bool = True
    holds: bool = True
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def reached(self) -> bool:
        if not math.isfinite(self.figure) or not self.holds:
            return False
        return self.figure <= self.target if self.lower_is_better else self.figure >= self.target

    @property
    def ratio(self) -> float | None:
        """Figure over floor, or floor over figure for rates: 1 is what bytes allow, more is worse."""
        if self.floor is None or not self.floor or not self.figure:
            return None
        return self.figure / self.floor if self.lower_is_better else self.floor / self.figure


class Bench:
    """One device with at most one model and one engine on it; rows ask for them and share what they can."""

    def __init__(
        self, device: str, *, tiny: bool, budget_s: float = 300.0, step_tokens: int = 2048,
        say: Callable[[str], None] = print, files: Path | None = None,
    ) -> None:  # fmt: skip
        self.device = torch.device(device)
        self.tiny = tiny
        self.budget_s = budget_s
        self.budget = Budget(budget_s)
        self.step_tokens = step_tokens
        self.say = say
        self.files = files
        self.is_cuda = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.is_cuda else torch.float32
        self._model: tuple[str, LoadedModel] | None = None
        self._adapters: dict[str, RandomAdapters] = {}
        self._engine: tuple[tuple[Any, ...], Driven] | None = None
        self._warm_with: set[bool] = set()  # adapters, no adapters
        self.copy_bytes_per_s = self._copy_bandwidth()
        self.product_flop_per_s = self._product_speed()
        self._collect()

    # Sizes and targets

    def size(self, full: int, tiny: int) -> int:
        return tiny if self.tiny else full

    @property
    def scale(self) -> float:
        """How much longer than on an H200 a step may take: its copy bandwidth over the one measured here."""
        name = torch.cuda.get_device_name(self.device) if self.is_cuda else ""
        return 1.0 if "H200" in name else H200_COPY / self.copy_bytes_per_s

    # Models, adapters, engines

    def config(self, shape: str) -> ModelConfig:
        return (TINY_SHAPES if self.tiny else SHAPES)[shape]

    def model(self, shape: str) -> LoadedModel:
        if self._model is None or self._model[0] != shape:
            self.free()
            self._model = None
            self._collect()
            started = time.perf_counter()
            config = self.config(shape)
            self._model = shape, random_model(config, device=self.device, dtype=self.dtype)
            self.say(f"  {shape} model with random weights: {time.perf_counter() - started:.1f} s")
        return self._model[1]

    def adapters(self, shape: str = "8b") -> RandomAdapters:
        if shape not in self._adapters:
            config = self.config(shape)
            self._adapters[shape] = RandomAdapters(config, self.dtype)
        return self._adapters[shape]

    def engine(
        self,
        shape: str = "8b",
        *,
        arena_bytes: int | None = None,
        host_bytes: int = 40 * GIB,
        root: Path | None = None,
    ) -> Driven:
        """The engine of these settings, a new one only where the last one asked for had others.

        Adapters are made by RandomAdapters in the loaders' threads; with `root` they are files below it.
        """
        key = (shape, arena_bytes, host_bytes, root)
        if self._engine is None or self._engine[0] != key:
            self.free()
            model = self.model(shape)
            started = time.perf_counter()
            loaded = threading.Event()
            config = EngineConfig(
                arena_bytes=self._arena_bytes() if arena_bytes is None else arena_bytes,
                host_cache_bytes=host_bytes,
                max_tokens_per_step=self.size(self.step_tokens, 128),
                max_running=self.size(256, 16),
                max_waiting=1 << 20,
                load_threads=self.size(8, 2),
                device=str(self.device),
                dtype=str(self.dtype).removeprefix("torch."),
            )
            engine = Engine(
                config,
                model,
                Path() if root is None else root,
                on_load=loaded.set,
                read=self.adapters(shape).read if root is None else None,
            )
            self._engine = key, Driven(engine, loaded, self.budget)
            self._warm_with = set()
            took = time.perf_counter() - started
            self.say(f"  engine with {config.arena_bytes / 1e9:.1f} GB arena: {took:.1f} s")
        driven = self._engine[1]
        driven.budget = self.budget
        return driven

    def warm(self, driven: Driven, shape: str, adapters: Sequence[AdapterRef | None]) -> None:
        """Run steps of all sizes once, so that no kernel is compiled and no graph recorded later."""
        with_adapters = any(ref is not None for ref in adapters)
        if with_adapters in self._warm_with:
            return
        started = time.perf_counter()
        lengths = uniform_lengths(self.size(320, 8), (8, self.size(511, 20)), (1, self.size(96, 6)), seed=9)
        driven.run(self.work(shape, lengths, adapters, seed=9))
        prepared = 0
        while time.perf_counter() - started < self.budget_s / 2 and driven.engine.prepare():
            prepared += 1  # as a server does while nobody asks
        gc.collect()
        gc.freeze()  # as the engine's process does: it would pause in the middle of a run
        self._warm_with.add(with_adapters)
        self.say(f"  warm-up: {time.perf_counter() - started:.1f} s, {prepared} steps prepared")

    def start_row(self) -> None:
        self.budget = Budget(self.budget_s)

    def drop_engine(self) -> None:
        """Let go of an engine that failed; what letting go raises says nothing new."""
        with suppress(Exception):
            self.free()
        self._engine = None

    def is_usable(self) -> bool:
        """The device still computes: after an illegal access it answers with that error for ever."""
        try:
            return bool((torch.ones(1, device=self.device) + 1).item() == 2)
        except RuntimeError:
            return False

    def free(self) -> None:
        """Let go of the engine and of everything it holds."""
        if self._engine is not None:
            engine, self._engine = self._engine[1].engine, None
            engine.close(wait=True)
            del engine
        self._collect()

    def work(
        self, shape: str, lengths: Sequence[tuple[int, int]], adapters: Sequence[AdapterRef | None], seed: int
    ) -> list[Work]:
        config = self.config(shape)
        return make_work(config.vocab_size, lengths, adapters, seed)

    def _arena_bytes(self) -> int:
        if not self.is_cuda:
            return 64 << 20
        return torch.cuda.mem_get_info(self.device)[0] - NOT_ARENA

    def _collect(self) -> None:
        gc.unfreeze()
        gc.collect()  # engines hold on to themselves
        if self.is_cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()

    # What the device can do

    def _timed(self, call: Callable[[], object], rounds: int) -> float:
        """The best of a few rounds, in seconds."""
        best = math.inf
        for _ in range(rounds):
            if self.is_cuda:
                torch.cuda.synchronize(self.device)
            started = time.perf_counter()
            for _ in range(5):
                call()
            if self.is_cuda:
                torch.cuda.synchronize(self.device)
            best = min(best, (time.perf_counter() - started) / 5)
        return best

    def _copy_bandwidth(self) -> float:
        """Bytes read and written per second by a large copy on the device."""
        source = torch.zeros(self.size(2 * GIB, 1 << 22), dtype=torch.uint8, device=self.device)
        target = torch.zeros_like(source)
        return 2 * source.nbytes / self._timed(lambda: target.copy_(source), 5)

    def _product_speed(self) -> float:
        """Operations per second of a large product in the dtype of the weights."""
        side = self.size(8192, 128)
        a = torch.randn(side, side, device=self.device).to(self.dtype)
        out = torch.empty_like(a)
        return 2 * side**3 / self._timed(lambda: torch.mm(a, a, out=out), 3)

    # Floors: bytes over copy bandwidth

    def decode_floor_s(self, shape: str, steady: Steady, adapters: Sequence[AdapterRef | None]) -> float:
        """Weights, the distinct adapters, and the K/V of all rows, once."""
        config, itemsize = self.config(shape), self.dtype.itemsize
        of_adapters = sum(self.adapters(shape).nbytes(ref) for ref in {*adapters} if ref is not None)
        total = weight_bytes(config, itemsize) + of_adapters
        return (total + steady.context_tokens * kv_bytes(config, itemsize)) / self.copy_bytes_per_s

    def run_floor_s(self, shape: str, run: Run, work: Sequence[Work]) -> tuple[float, float]:
        """Seconds that the bytes of a whole run take, and the same with the arithmetic of the products.

        Weights once per step as run, adapters once per step that holds them (their mean size), K/V written
        once and read at each output token.
        """
        config, itemsize = self.config(shape), self.dtype.itemsize
        step = run.stats["step"]
        named = [each.adapter for each in work if each.adapter is not None]
        mean = statistics.fmean(self.adapters(shape).nbytes(ref) for ref in named) if named else 0.0
        read = sum(
            len(each.prompt) * each.output + each.output * (each.output - 1) // 2 + len(each.prompt)
            for each in work
        )
        weights = weight_bytes(config, itemsize)
        bytes_ = step["steps"] * weights + step["adapters"] * mean + read * kv_bytes(config, itemsize)
        by_bytes = bytes_ / self.copy_bytes_per_s
        prompts = sum(len(each.prompt) for each in work)
        return by_bytes, by_bytes + 2 * prompts * (weights / itemsize) / self.product_flop_per_s


# Outputs first


def outputs(bench: Bench) -> Measured:
    """Replies of a mixed batch, each alone, and the plain path's opinion of every token of both."""
    parts = _mixture(bench)
    driven = bench.engine()
    lengths = [(bench.size(48, 12) + 5 * index, bench.size(32, 8)) for index in range(len(parts))]
    work = bench.work("8b", lengths, parts, seed=11)
    mixed = driven.run(work).replies
    alone = [driven.run([each]).replies[0] for each in work]
    noise = 0.0
    worst = {"mixed": 0.0, "alone": 0.0}
    agree = {"mixed": 0, "alone": 0}
    total = sum(map(len, mixed))
    for each, *pair in zip(work, mixed, alone, strict=True):
        adapter = None if each.adapter is None else bench.adapters().read(each.adapter)
        for name, reply in zip(worst, pair, strict=True):
            passage = Passage(each.prompt + reply[:-1], adapter, len(reply))
            exact = plain_logits(bench.model("8b"), [passage], torch.float32)[0]
            rounded = plain_logits(bench.model("8b"), [passage], bench.dtype)[0]
            noise = max(noise, (exact - rounded).abs().max().item())
            chosen = exact.gather(1, torch.tensor(reply, device=exact.device)[:, None])[:, 0]
            worst[name] = max(worst[name], (exact.amax(1) - chosen).max().item())
            agree[name] += int((exact.argmax(1).cpu() == torch.tensor(reply)).sum())
    same, compared = _agreement(mixed, alone)
    return Measured(
        max(worst.values()),
        "logits",
        2 * _allowed(noise),  # two logits may each be off
        details={
            "rows": len(work),
            "replies_equal": sum(a == b for a, b in zip(mixed, alone, strict=True)),
            "tokens_equal_mixed_and_alone": f"{same}/{compared}",
            "greedy_as_plain_float32_mixed": f"{agree['mixed']}/{total}",
            "greedy_as_plain_float32_alone": f"{agree['alone']}/{total}",
            "distinct_replies": len(set(mixed)),
            "worst_shortfall_mixed": worst["mixed"],
            "worst_shortfall_alone": worst["alone"],
            "plain_in_this_dtype_against_float32": noise,
            "what": "how far below the plain path's largest logit the engine's choice lies, at worst",
        },
    )


def logits(bench: Bench) -> Measured:
    """The runner's logits of one mixed batch, prompts and then single tokens, against the plain path's."""
    parts = _mixture(bench)
    work = bench.work("8b", [(bench.size(40, 10) + 3 * i, 1) for i in range(len(parts))], parts, seed=12)
    follow = random.Random(13)
    driven = bench.engine()
    driven.load([ref for ref in parts if ref is not None])
    engine = driven.engine
    # The public API gives no logits. What runs batches is `_runner`, or `_device` where steps are pipelined.
    runner = getattr(engine, "_device", None) or getattr(engine, "_runner")  # noqa: B009
    pool, cache = engine._pool, engine._adapters
    running: list[Running] = []
    found: list[torch.Tensor] = []
    taken: list[int] = []
    for each in work:
        request = Request(f"logits-{len(running)}", each.prompt, SamplingParams(temperature=0.0))
        sequence = Running(request)
        sequence.blocks = tuple(pool.allocate(-(-(len(each.prompt) + 4) // engine.block_size), "kv") or ())
        taken += sequence.blocks
        if each.adapter is not None:
            sequence.resident = cache.pin(each.adapter)
        running.append(sequence)
    try:
        for _ in range(3):
            chunks = [Chunk(s, s.num_computed, s.num_pending, wants_token=True) for s in running]
            found.append(runner.logits(build_batch(chunks, engine.block_size)).float().cpu())
            for sequence in running:
                sequence.num_computed = sequence.num_tokens
                sequence.tokens.append(follow.randrange(engine.model.config.vocab_size))
    finally:
        pool.free(taken, "kv")
        for each in work:
            if each.adapter is not None:
                cache.unpin(each.adapter)
    noise = worst = 0.0
    equal = plain_equal = 0
    for index, (each, sequence) in enumerate(zip(work, running, strict=True)):
        adapter = None if each.adapter is None else bench.adapters().read(each.adapter)
        passage = Passage(tuple(sequence.tokens[:-1]), adapter, len(found))
        exact = plain_logits(engine.model, [passage], torch.float32)[0].cpu()
        rounded = plain_logits(engine.model, [passage], bench.dtype)[0].cpu()
        ours = torch.stack([step[index] for step in found])
        noise = max(noise, (exact - rounded).abs().max().item())
        worst = max(worst, (exact - ours).abs().max().item())
        equal += int((exact.argmax(1) == ours.argmax(1)).sum())
        plain_equal += int((exact.argmax(1) == rounded.argmax(1)).sum())
    total = len(work) * len(found)
    return Measured(
        worst,
        "logits",
        _allowed(noise),
        details={
            "greedy_as_plain_float32": f"{equal}/{total}",
            "plain_in_this_dtype_greedy_as_float32": f"{plain_equal}/{total}",
            "plain_in_this_dtype_against_float32": noise,
            "what": "largest difference of any logit",
        },
    )


def _allowed(noise: float) -> float:
    """Twice what plain torch in the same dtype is off from float32; in float32 itself, rounding."""
    return max(2 * noise, 2e-3)


def _mixture(bench: Bench) -> list[AdapterRef | None]:
    """Rows without an adapter, two rows of one adapter, several kinds and ranks."""
    adapters = bench.adapters()
    refs: list[AdapterRef | None] = [None, None]
    for kind, amount in ((ATTENTION_16, 3), (ALL_16, 2), (QV_8, 2), (ATTENTION_8_TO_64, 4)):
        refs += adapters.refs(kind, amount)
    return [*refs, adapters.ref(ATTENTION_16, 0)]


def _agreement(one: Sequence[tuple[int, ...]], other: Sequence[tuple[int, ...]]) -> tuple[int, int]:
    """Equal tokens and compared ones; behind its first difference a reply is not compared on."""
    equal = compared = 0
    for a, b in zip(one, other, strict=True):
        for left, right in zip(a, b, strict=True):
            compared += 1
            if left != right:
                break
            equal += 1
    return equal, compared


# Decode steps


def _decode(bench: Bench, rows: int, kind: AdapterKind | None, **engine: Any) -> tuple[Steady, float]:
    """A steady batch of `rows` rows with distinct adapters, and the floor of its step in seconds."""
    refs: list[AdapterRef | None] = [None] if kind is None else list(bench.adapters().refs(kind, rows))
    return _decode_refs(bench, rows, refs, **engine)


def _decode_refs(
    bench: Bench, rows: int, refs: Sequence[AdapterRef | None], **engine: Any
) -> tuple[Steady, float]:
    driven = bench.engine(**engine)
    driven.load([*{ref for ref in refs if ref is not None}])
    lengths = [(bench.size(64, 8), bench.size(1000, 200))] * rows
    steady = driven.decode(bench.work("8b", lengths, refs, seed=rows), bench.size(96, 6))
    floor = bench.decode_floor_s("8b", steady, refs)
    bench.say(f"  {rows} rows: {1e3 * steady.median_s:.3f} ms a step, floor {1e3 * floor:.3f} ms")
    return steady, floor


def _step_row(
    bench: Bench, rows: int, kind: AdapterKind | None, target: Callable[[float], float]
) -> Measured:
    """`target` makes the milliseconds to reach from the floor's."""
    steady, floor = _decode(bench, rows, kind)
    return Measured(
        1e3 * steady.median_s, "ms", target(1e3 * floor), 1e3 * floor, details=_step_details(steady)
    )


def _step_details(steady: Steady) -> dict[str, Any]:
    ordered = sorted(steady.seconds)
    return {
        "rows": steady.rows,
        "steps": len(ordered),
        "p90_ms": round(1e3 * ordered[int(0.9 * len(ordered))], 3),
        "best_ms": round(1e3 * ordered[0], 3),
        "partial_steps": steady.partial,
        "context_tokens_a_row": round(steady.context_tokens / steady.rows, 1),
        "per_step_ms": steady.split_ms,
        "tokens_per_s": round(steady.rows / steady.median_s, 1),
    }


def decode_base(bench: Bench) -> Measured:
    return _step_row(bench, bench.size(32, 4), None, lambda _: 4.6 * bench.scale)


def decode_32(bench: Bench) -> Measured:
    return _step_row(bench, bench.size(32, 4), ATTENTION_16, lambda _: 5.2 * bench.scale)


def decode_128(bench: Bench) -> Measured:
    return _step_row(bench, bench.size(128, 8), ATTENTION_16, lambda _: 7.5 * bench.scale)


def decode_256_all(bench: Bench) -> Measured:
    return _step_row(bench, bench.size(256, 16), ALL_16, lambda floor: 2 * floor)


def adapter_cost(bench: Bench) -> Measured:
    """Two rounds of each, in turn, so that a clock that drifts touches both."""
    rows = bench.size(32, 4)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    floors = {}
    for _ in range(2):
        for with_adapters in (False, True):
            steady, floors[with_adapters] = _decode(bench, rows, ATTENTION_16 if with_adapters else None)
            seconds[with_adapters] += steady.seconds
    base, ours = statistics.median(seconds[False]), statistics.median(seconds[True])
    return Measured(
        100 * (ours / base - 1),
        "%",
        12.0,
        100 * (floors[True] / floors[False] - 1),
        details={"base_ms": 1e3 * base, "distinct_ms": 1e3 * ours},
    )


def mixed_ranks(bench: Bench) -> Measured:
    """What ranks 8, 16, 32, 64 in equal parts cost over no adapter, as a share of what rank 64 costs."""
    rows = bench.size(64, 8)
    base, _ = _decode(bench, rows, None)
    mixed, mixed_floor = _decode(bench, rows, ATTENTION_8_TO_64)
    large, large_floor = _decode(bench, rows, ATTENTION_64)
    adapters = bench.adapters()
    of_bytes = sum(map(adapters.nbytes, adapters.refs(ATTENTION_8_TO_64, rows))) / sum(
        map(adapters.nbytes, adapters.refs(ATTENTION_64, rows))
    )
    over = max(large.median_s - base.median_s, 1e-6)  # noise may eat a difference that is small
    share = (mixed.median_s - base.median_s) / over
    return Measured(
        100 * share,
        "% of rank 64",
        100 * of_bytes * 1.1,  # proportional to bytes, to a tenth
        100 * of_bytes,
        details={
            "base_ms": 1e3 * base.median_s,
            "mixed_ms": 1e3 * mixed.median_s,
            "rank_64_ms": 1e3 * large.median_s,
            "mixed_floor_ms": 1e3 * mixed_floor,
            "rank_64_floor_ms": 1e3 * large_floor,
        },
    )


def popularity(name: str, rows: int) -> list[int]:
    """Which adapter each row has, as in Punica's benchmarks.

    distinct; uniform: ceil(√rows) adapters of equal share; skewed: each adapter 1.5 times as popular as the
    one before it; identical.
    """
    if name == "distinct":
        return list(range(rows))
    if name == "uniform":
        return [row % math.ceil(math.sqrt(rows)) for row in range(rows)]
    if name == "skewed":
        named: list[int] = []
        for adapter in range(rows):
            named += [adapter] * math.ceil(1.5**adapter)
            if len(named) >= rows:
                break
        return named[:rows]
    assert name == "identical"
    return [0] * rows


def punica(bench: Bench) -> Measured:
    """Rank 16 on all linear modules: how far the slowest popularity is from the fastest."""
    rows = bench.size(32, 8)
    adapters = bench.adapters()
    steps, floors, counts = {}, {}, {}
    for name in ("distinct", "uniform", "skewed", "identical"):
        numbers = popularity(name, rows)
        refs = [adapters.ref(ALL_16, number) for number in numbers]
        steady, floor = _decode_refs(bench, rows, refs)
        steps[name], floors[name] = 1e3 * steady.median_s, 1e3 * floor
        counts[name] = len(set(numbers))
    return Measured(
        100 * (max(steps.values()) / min(steps.values()) - 1),
        "% apart",
        20.0,
        100 * (max(floors.values()) / min(floors.values()) - 1),
        details={"step_ms": steps, "floor_ms": floors, "adapters": counts},
    )


# Whole runs


def _run(
    bench: Bench, driven: Driven, shape: str, work: Sequence[Work], name: str
) -> tuple[Run, dict[str, Any]]:
    """A run, and what is to be said of it."""
    run = driven.run(work)
    by_bytes, with_products = bench.run_floor_s(shape, run, work)
    step = run.stats["step"]
    ordered = sorted(run.first_s)
    said = {
        "tokens_per_s": round(run.tokens_per_s, 1),
        "all_tokens_per_s": round((run.output_tokens + sum(len(w.prompt) for w in work)) / run.seconds, 1),
        "seconds": round(run.seconds, 3),
        "bytes_floor_s": by_bytes,
        "bytes_and_products_floor_s": with_products,
        "first_token_p50_s": round(ordered[len(ordered) // 2], 3),
        "first_token_p99_s": round(ordered[int(0.99 * len(ordered))], 3),
        "steps": step["steps"],
        "mean_rows": round(step["rows"] / max(1, step["steps"]), 1),
        "mean_adapters": round(step["adapters"] / max(1, step["steps"]), 1),
        "adapters_found": run.tiers,
        "preemptions": run.stats["queue"]["preemptions"],
        "device_evictions": run.stats["adapters"]["device_evictions"],
        "per_step_ms": {
            key.removesuffix("_s"): round(1e3 * value / max(1, step["steps"]), 3)
            for key, value in step.items()
            if key.endswith("_s")
        },
    }
    bench.say(f"  {name}: {run.tokens_per_s:,.0f} tok/s in {run.seconds:.2f} s, found {run.tiers}")
    return run, said


def _mixed_lengths(bench: Bench, requests: int) -> list[tuple[int, int]]:
    """Prompts and outputs uniform from 8 to 512."""
    most = bench.size(512, 24)
    return uniform_lengths(requests, (8, most), (8, most), seed=42)


def throughput_64(bench: Bench) -> Measured:
    refs = bench.adapters().refs(ATTENTION_16, bench.size(64, 6))
    lengths = _mixed_lengths(bench, bench.size(768, 24))
    driven = bench.engine()
    driven.load(refs)
    bench.warm(driven, "8b", [None])
    bench.warm(driven, "8b", refs)
    base, base_said = _run(bench, driven, "8b", bench.work("8b", lengths, [None], seed=20), "no adapters")
    work = bench.work("8b", lengths, refs, seed=21)
    run, said = _run(bench, driven, "8b", work, "64 adapters")
    return Measured(
        run.tokens_per_s,
        "tok/s",
        12_500 / bench.scale,
        run.output_tokens / said["bytes_floor_s"],
        lower_is_better=False,
        details={**said, "without_adapters": base_said, "of_base": run.tokens_per_s / base.tokens_per_s},
    )


def throughput_10k(bench: Bench) -> Measured:
    """Rank 8 on q, v: 10,000 of them in host memory beside 64, on an arena that holds about a tenth."""
    adapters = bench.adapters()
    few = adapters.refs(QV_8, bench.size(64, 4))
    many = adapters.refs(QV_8, bench.size(10_000, 40))
    lengths = _mixed_lengths(bench, bench.size(768, 24))
    driven = bench.engine(arena_bytes=bench.size(24 * GIB, 8 << 20), host_bytes=bench.size(84 * GIB, GIB))
    driven.load(few)
    bench.warm(driven, "8b", few)
    work = bench.work("8b", lengths, few, seed=22)
    one, few_said = _run(bench, driven, "8b", work, "64 adapters")
    started = time.perf_counter()
    driven.load(many)
    load_s = time.perf_counter() - started
    held = driven.engine.stats().adapters["host_bytes"]
    bench.say(f"  {len(many)} adapters loaded in {load_s:.1f} s, {held / 1e9:.1f} GB in host memory")
    chooser = random.Random(23)
    named = [chooser.choice(many) for _ in lengths]
    work = bench.work("8b", lengths, named, seed=24)
    other, many_said = _run(bench, driven, "8b", work, f"{len(many)} adapters")
    allowed = few_said["bytes_floor_s"] / many_said["bytes_floor_s"]
    return Measured(
        100 * (one.seconds / other.seconds) / allowed,
        "% of what bytes allow",
        95.0,
        100.0,
        lower_is_better=False,
        details={
            "few": few_said,
            "many": many_said,
            "distinct_named": len(set(named)),
            "host_tier_bytes": held,
            "load_s": load_s,
        },
    )


def _short_work(bench: Bench, refs: Sequence[AdapterRef], seed: int) -> list[Work]:
    return bench.work("8b", [(bench.size(64, 8), bench.size(64, 4))] * len(refs), refs, seed)


def _short_arena(bench: Bench, adapters: int) -> int:
    """Room for the K/V of a full batch of short replies, and for `adapters` adapters of rank 16."""
    config = bench.config("8b")
    of_one = bench.adapters().nbytes(bench.adapters().ref(ATTENTION_16, 0))
    tokens = bench.size(256 * (128 + 32), 16 * 32)
    return int(tokens * kv_bytes(config, bench.dtype.itemsize) + 1.1 * adapters * of_one)


def write_cold_files(
    adapters: RandomAdapters, root: Path, count: int
) -> tuple[list[AdapterRef], list[AdapterRef]]:
    """What `files_cold` reads: `count` adapters, and a few to warm up with; written if they are not there."""
    refs = adapters.refs(ATTENTION_16, count + max(4, count // 16))
    known = {path.parent for path in root.rglob("*.safetensors")} if root.is_dir() else set()
    missing = [ref for ref in refs if version_folder(root, ref.id, ref.version) not in known]
    adapters.write(root, missing, threads=min(16, os.cpu_count() or 1))
    return refs[:count], refs[count:]


def files_cold(bench: Bench) -> Measured:
    """512 requests of 64 + 64 tokens, each with an adapter of its own that is a file only."""
    count = bench.size(512, 12)
    with tempfile.TemporaryDirectory(prefix="adapters-") as folder:
        root = bench.files or Path(folder)
        started = time.perf_counter()
        refs, warm_refs = write_cold_files(bench.adapters(), root, count)
        files = sorted(root.rglob("*.safetensors"))
        size = files[0].stat().st_size
        written = size * len(files)
        bench.say(f"  {written / 1e9:.2f} GB of files in {time.perf_counter() - started:.1f} s")
        try:
            driven = bench.engine(arena_bytes=_short_arena(bench, bench.size(300, 5)), root=root)
            bench.warm(driven, "8b", warm_refs)
            still_cached = drop_from_page_cache(files)
            bench.say(f"  {100 * still_cached:.1f} % of the files are still in the page cache")
            alone = read_speed([path for ref in warm_refs for path in _files_of(root, ref)])
            bench.say(f"  {alone / 1e9:.2f} GB/s read from files by nothing else")
            run, said = _run(bench, driven, "8b", _short_work(bench, refs, seed=30), "files cold")
        finally:
            bench.free()  # its loaders read below the folder
        return Measured(
            run.tokens_per_s,
            "tok/s",
            5_000 / bench.scale,
            run.output_tokens / said["bytes_floor_s"],
            lower_is_better=False,
            details={
                **said,
                "file_bytes": size * count,
                "read_bytes_per_s": size * count / run.seconds,
                "read_bytes_per_s_alone": alone,
                "still_in_page_cache": still_cached,
                "file_system": _file_system(root),
            },
        )


def host_warm(bench: Bench) -> Measured:
    """The same with all adapters in host memory, and room on the device for about half of them."""
    refs = bench.adapters().refs(ATTENTION_16, bench.size(512, 12))
    driven = bench.engine(arena_bytes=_short_arena(bench, bench.size(300, 5)))
    bench.warm(driven, "8b", refs[:4])
    driven.load(refs)
    order = list(refs)
    random.Random(31).shuffle(order)
    run, said = _run(bench, driven, "8b", _short_work(bench, order, seed=31), "host warm")
    return Measured(
        run.tokens_per_s,
        "tok/s",
        10_000 / bench.scale,
        run.output_tokens / said["bytes_floor_s"],
        lower_is_better=False,
        details=said,
    )


def first_token(bench: Bench) -> Measured:
    """Time to first token of one request on an idle engine, by where its adapter is.

    Files are in the page cache. To be in host memory only, an adapter is pushed off the device by others.
    Each is asked after the same pause, as a device that was idle takes longer to begin.
    """
    rounds, count = bench.size(12, 3), bench.size(24, 6)
    refs = bench.adapters().refs(ATTENTION_16, count)
    seconds: dict[str, list[float]] = {"device": [], "host": [], "disk": [], "prefetched": []}
    seen: dict[str, dict[str, int]] = {name: {} for name in seconds}

    def ask(name: str, ref: AdapterRef, seed: int) -> None:
        work = bench.work("8b", [(bench.size(64, 8), 2)], [ref], seed)[0]
        time.sleep(bench.size(100, 1) / 1e3)
        taken, tier = driven.first_token(work)
        seconds[name].append(taken)
        seen[name][tier] = seen[name].get(tier, 0) + 1

    with tempfile.TemporaryDirectory(prefix="adapters-") as folder:
        root = Path(folder)
        bench.adapters().write(root, refs, threads=bench.size(16, 2))
        config = bench.config("8b")
        of_tokens = bench.size(1024, 128) * kv_bytes(config, bench.dtype.itemsize)
        arena = of_tokens + count // 3 * bench.adapters().nbytes(refs[0])
        try:
            driven = bench.engine(arena_bytes=arena, root=root)
            for ref in refs:  # compiled, recorded, and read once
                driven.first_token(bench.work("8b", [(bench.size(64, 8), 2)], [ref], seed=40)[0])
            for turn in range(rounds):
                # The least recently used: a third fits, so this one was pushed off by those after it.
                ref = refs[turn % count]
                ask("host", ref, seed=1000 + turn)
                ask("device", ref, seed=2000 + turn)
                driven.engine.forget(ref.id)
                ask("disk", ref, seed=3000 + turn)
                driven.engine.forget(ref.id)
                driven.load([ref], on_device=True)  # presence is known seconds before
                ask("prefetched", ref, seed=4000 + turn)
        finally:
            bench.free()
    ms = {name: 1e3 * statistics.median(taken) for name, taken in seconds.items()}
    as_meant = {"device": {"device"}, "host": {"host"}, "disk": {"disk"}, "prefetched": {"device"}}
    is_same = ms["prefetched"] - ms["device"] <= 0.5  # as far as can be measured
    return Measured(
        ms["host"] - ms["device"],
        "ms over device",
        2.0,
        holds=is_same and {name: set(tiers) for name, tiers in seen.items()} == as_meant,
        details={
            "prefetched_over_device_ms": ms["prefetched"] - ms["device"],
            "median_ms": ms,
            "worst_ms": {name: 1e3 * max(taken) for name, taken in seconds.items()},
            "found": seen,
        },
    )


def _slora(bench: Bench, kind: AdapterKind) -> Measured:
    """S-LoRA's shape: Llama-7B, in and out 8–512, all requests at once, n adapters of equal popularity."""
    adapters = bench.adapters("7b")
    lengths = _mixed_lengths(bench, bench.size(480, 16))
    driven = bench.engine("7b", host_bytes=bench.size(60 * GIB, GIB))
    seconds, floors, said = {}, {}, {}
    for count in (5, 100, 1000, 2000):
        chooser = random.Random(count)
        named = [adapters.ref(kind, chooser.randrange(count)) for _ in lengths]
        driven.load(sorted(set(named), key=lambda ref: ref.id))
        bench.warm(driven, "7b", named)
        work = bench.work("7b", lengths, named, seed=50 + count)
        run, said[str(count)] = _run(bench, driven, "7b", work, f"n = {count}")
        said[str(count)]["distinct_named"] = len(set(named))
        seconds[count], floors[count] = run.seconds, said[str(count)]["bytes_floor_s"]
    excess = {n: 100 * ((seconds[n] / seconds[5]) / (floors[n] / floors[5]) - 1) for n in seconds if n > 5}
    return Measured(
        max(excess.values()), "% beyond bytes", 3.0, 0.0, details={"excess": excess, "runs": said}
    )


def slora_s1(bench: Bench) -> Measured:
    return _slora(bench, ATTENTION_8)


def slora_s2(bench: Bench) -> Measured:
    return _slora(bench, ATTENTION_8_TO_64)


# Files


def drop_from_page_cache(files: Sequence[Path]) -> float:
    """Ask the kernel to forget the files' pages; the share of them it kept all the same."""
    kept = total = 0
    for path in files:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)  # only clean pages can be dropped
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            inside, pages = _in_page_cache(handle, path.stat().st_size)
            kept, total = kept + inside, total + pages
        finally:
            os.close(handle)
    return kept / max(1, total)


def _files_of(root: Path, ref: AdapterRef) -> list[Path]:
    return list(version_folder(root, ref.id, ref.version).glob("*.safetensors"))


def read_speed(files: Sequence[Path]) -> float:
    """Bytes a second that eight threads read from the files, and do nothing with."""

    def read(path: Path) -> int:
        with path.open("rb", buffering=0) as file:
            return sum(iter(lambda: file.readinto(bytearray(8 << 20)), 0))

    started = time.perf_counter()
    with ThreadPoolExecutor(8) as threads:
        total = sum(threads.map(read, files))
    return total / (time.perf_counter() - started)


def _in_page_cache(handle: int, size: int) -> tuple[int, int]:
    """(pages of the file in the page cache, its pages), by mincore(2)."""
    pages = -(-size // mmap.PAGESIZE)
    with mmap.mmap(handle, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as area:
        vector = (ctypes.c_ubyte * pages)()
        begin = ctypes.addressof(ctypes.c_char.from_buffer(area))
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mincore(ctypes.c_void_p(begin), ctypes.c_size_t(size), vector):
            raise OSError(ctypes.get_errno(), "mincore")
        return sum(byte & 1 for byte in vector), pages


def _file_system(folder: Path) -> str:
    """The type of the file system the folder lies on, from /proc/mounts."""
    best = ("", "unknown")
    for line in Path("/proc/mounts").read_text().splitlines():
        where, kind = line.split()[1:3]
        if folder.resolve().is_relative_to(where) and len(where) > len(best[0]):
            best = (where, kind)
    return best[1]


# The table


@dataclass(frozen=True)
class Row:
    """A line of the table. Rows of one `group` share a process, and with it models and engines."""

    name: str
    title: str
    peer: str
    run: Callable[[Bench], Measured]
    group: str = "steps"


ROWS = (
    Row("outputs", "replies against the plain path", "", outputs),
    Row("logits", "logits against the plain path", "", logits),
    Row("decode32", "decode step, 32 rows, no adapter", "5.4 ms (vLLM)", decode_base),
    Row("decode32-distinct", "decode step, 32 rows, 32 distinct", "19.5 ms (vLLM)", decode_32),
    Row("decode128-distinct", "decode step, 128 rows, 128 distinct", "44.6 ms (vLLM)", decode_128),
    Row("decode256-all", "decode step, 256 distinct, all linear", "cannot (slots)", decode_256_all),
    Row("adapter-cost", "adapters over none, 32 distinct", "262 % (vLLM), 5–27 % (S-LoRA)", adapter_cost),
    Row("mixed-ranks", "ranks 8–64 against all rank 64", "100 % (padded)", mixed_ranks),
    Row("punica", "four popularities, all linear, 32 rows", "–", punica),
    Row("throughput64", "768 requests, 64 adapters", "4,192 tok/s (vLLM)", throughput_64),
    Row("host-warm", "512 requests, 512 adapters, host warm", "1,808 tok/s (vLLM)", host_warm, "short"),
    Row("files-cold", "512 requests, 512 adapters, files cold", "872 tok/s (vLLM)", files_cold, "short"),
    Row("first-token", "first token: host, prefetched − device", "–", first_token, "short"),
    Row("throughput10k", "768 requests, 10,000 adapters / 64", "–", throughput_10k, "10k"),
    Row("slora-s1", "S-LoRA S1, n 5 to 2,000", "−5 % to −10 % (S-LoRA)", slora_s1, "slora"),
    Row("slora-s2", "S-LoRA S2, n 5 to 2,000", "−5 % to −10 % (S-LoRA)", slora_s2, "slora"),
)
