"""Which kernels a run of mixed requests spends its device's time in, with adapters and without.

    python -m benchmarks.bench_profile [--requests 384] [--adapters 64]
    python -m benchmarks.bench_profile --tiny      on a tiny model on the CPU, to show that it works

Llama-3.1-8B's shape, random weights, prompts of 8 to 512 tokens and replies of 8 to 160, as the rows of
`bench_gpu` have them. Steps are compiled and recorded before; a run is profiled after one that is not. A line
for each kernel: milliseconds a step, launches a step, microseconds a launch. Then three layers in the order
of time, a short one, one in the middle and a long one: when each kernel begins, on which stream, and how long
it takes. A layer is what begins with `--layer`. The last line is JSON.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks.common import gpu, report
from benchmarks.driving import Driven, uniform_lengths
from benchmarks.gpu_rows import Bench
from benchmarks.random_model import ATTENTION_16
from engine.request import AdapterRef

NAME_CHARS = 72
SHARES = (0.25, 0.5, 0.9)  # of all layers, that are shorter than the one shown


def profiled(
    bench: Bench,
    driven: Driven,
    lengths: Sequence[tuple[int, int]],
    adapters: Sequence[AdapterRef | None],
    layer: str,
) -> dict[str, Any]:
    """One run, and what its kernels took by name, the longest first; and a few layers as they came."""
    driven.run(bench.work("8b", lengths, adapters, seed=21))
    activity = ProfilerActivity.CUDA if bench.is_cuda else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        run = driven.run(bench.work("8b", lengths, adapters, seed=22))
    taken: defaultdict[str, list[float]] = defaultdict(list)
    ran = [
        Ran(
            event.name[:NAME_CHARS],
            event.time_range.start,
            event.device_time if bench.is_cuda else event.cpu_time,
            event.device_resource_id if bench.is_cuda else 0,
        )
        for event in profiler.events()
    ]
    for one in ran:
        taken[one.kernel].append(one.us)
    steps = run.stats["step"]["steps"]
    kernels = [
        {
            "kernel": name,
            "ms_per_step": round(sum(times) / steps / 1e3, 4),
            "launches_per_step": round(len(times) / steps, 2),
            "us": round(sum(times) / len(times), 2),
        }
        for name, times in sorted(taken.items(), key=lambda item: -sum(item[1]))
    ]
    return {
        "tokens_per_s": round(run.tokens_per_s, 1),
        "steps": steps,
        "mean_rows": round(run.stats["step"]["rows"] / steps, 1),
        "kernels": kernels,
        "layers": [[asdict(one) for one in each] for each in layers(ran, layer, SHARES)],
    }


@dataclass(frozen=True)
class Ran:
    """One kernel, and when it began, in microseconds: since the profile did, or since the layer did."""

    kernel: str
    at: float
    us: float
    stream: int


def layers(ran: Sequence[Ran], first: str, shares: Sequence[float]) -> list[list[Ran]]:
    """The kernels from one whose name begins with `first` up to the next such, in the order of time: of all
    such runs those that are longer than these shares of them. None if there are no two."""
    ordered = sorted(ran, key=lambda one: one.at)
    begins = [index for index, one in enumerate(ordered) if one.kernel.startswith(first)]
    found = sorted(pairwise(begins), key=lambda pair: ordered[pair[1]].at - ordered[pair[0]].at)
    chosen = [found[int(share * len(found))] for share in shares] if found else []
    return [
        [replace(one, at=round(one.at - ordered[begin].at, 2)) for one in ordered[begin:end]]
        for begin, end in chosen
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=384)
    parser.add_argument("--adapters", type=int, default=64)
    parser.add_argument("--lines", type=int, default=24, help="kernels that are shown")
    parser.add_argument("--layer", default="_rotary_kernel", help="how a layer's first kernel is called")
    parser.add_argument("--budget", type=float, default=240.0, help="seconds that all of it may take")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--keep", action="store_true", help="write the JSON into benchmarks/results/")
    options = parser.parse_args(arguments)
    started = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - started:7.1f} s] {text}", flush=True)

    bench = Bench("cpu" if options.tiny else "cuda", tiny=options.tiny, budget_s=options.budget, say=say)
    refs = bench.adapters().refs(ATTENTION_16, bench.size(options.adapters, 4))
    lengths = uniform_lengths(
        bench.size(options.requests, 8), (8, bench.size(512, 24)), (8, bench.size(160, 12)), seed=42
    )
    driven = bench.engine()
    driven.load(refs)
    found = {}
    for name, adapters in (("without adapters", [None]), (f"{len(refs)} adapters", refs)):
        bench.warm(driven, "8b", adapters)
        found[name] = profiled(bench, driven, lengths, adapters, options.layer)
        say(f"{name}: {found[name]['tokens_per_s']:,} tok/s in {found[name]['steps']} steps, profiled")
        for line in found[name]["kernels"][: options.lines]:
            print(
                f"{line['ms_per_step']:9.3f} ms {line['launches_per_step']:8.1f} x {line['us']:9.1f} us  "
                f"{line['kernel']}"
            )
        for layer in found[name]["layers"]:
            print(f"a layer of {name}:")
            for one in layer:
                print(f"{one['at']:9.1f} us  stream {one['stream']}  {one['us']:9.1f} us  {one['kernel']}")
    bench.free()
    report("bench_profile", {**gpu(), "runs": found}, keep=options.keep)


if __name__ == "__main__":
    main()
