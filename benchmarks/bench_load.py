"""Adapters from files into host memory: loads a second, what one costs, and how long others wait meanwhile.

    python -m benchmarks.bench_load [--dtype bfloat16] [--readers 8] [--cold] [--seconds 6] [--tiny] [--keep]

Random adapters of Llama-3.1-8B's shape, rank 16 on q, k, v and o, are read and packed as the engine does it,
by `--readers` threads over and over. Beside them one thread does what a step does: 1.2 ms in the interpreter,
then 4 ms of waiting for a device. What it takes beyond that alone is the interpreter, and with few cores the
processor, that the readers keep from it. `--cold`: each file is dropped from the page cache first.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import gpu, report
from benchmarks.gpu_rows import drop_from_page_cache
from benchmarks.random_model import ATTENTION_16, LLAMA_3_1_8B, TINY, RandomAdapters, kv_bytes
from engine.adapter_files import WEIGHTS_FILE, read_stored, version_folder
from engine.host_memory import PinnedMemory, Scratch
from engine.packing import PackedAdapter, min_slab_elems, pack_adapter
from engine.request import AdapterRef

IN_PYTHON_S, WAITING_S = 0.0012, 0.004


class Readers:
    """Threads that load adapters until they are told to stop. `loads`: how many they have."""

    def __init__(self, options: argparse.Namespace, root: Path, refs: list[AdapterRef]) -> None:
        self.loads = 0
        self._config = TINY if options.tiny else LLAMA_3_1_8B
        self._slab_elems = max(min_slab_elems(self._config), 16 * kv_bytes(self._config, 1))
        self._cold = options.cold
        self._root = root
        self._refs = refs
        self._images = PinnedMemory(pin=torch.cuda.is_available())
        self._of_file, self._of_numbers = Scratch(), Scratch()
        self._lock = threading.Lock()
        self._is_stopped = False

    def load(self, ref: AdapterRef) -> PackedAdapter:
        folder = version_folder(self._root, ref.id, ref.version)
        if self._cold:
            drop_from_page_cache([folder / WEIGHTS_FILE])
        stored = read_stored(folder, self._config, self._of_file.take)
        return pack_adapter(
            stored,
            self._config,
            self._slab_elems,
            torch.bfloat16,
            self._images.empty,
            self._of_numbers.take,
        )

    def read(self, seed: int) -> None:
        chooser = random.Random(seed)
        while not self._is_stopped:
            self.load(chooser.choice(self._refs))
            with self._lock:
                self.loads += 1

    def stop(self) -> None:
        self._is_stopped = True


def steps(seconds: float) -> list[float]:
    """Milliseconds of each step, sorted."""
    took = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        begun = time.perf_counter()
        while time.perf_counter() - begun < IN_PYTHON_S:
            pass
        time.sleep(WAITING_S)
        took.append(1000 * (time.perf_counter() - begun))
    return sorted(took)


def spread(took: list[float]) -> dict[str, float]:
    return {
        "p50_ms": round(took[len(took) // 2], 2),
        "p99_ms": round(took[int(0.99 * len(took))], 2),
        "mean_ms": round(sum(took) / len(took), 2),
    }


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    adapters = RandomAdapters(TINY if options.tiny else LLAMA_3_1_8B, getattr(torch, options.dtype))
    refs = adapters.refs(ATTENTION_16, 4 if options.tiny else 24)
    adapters.write(folder, refs, threads=2)
    size = next(folder.rglob(WEIGHTS_FILE)).stat().st_size
    readers = Readers(options, folder, refs)
    alone = steps(options.seconds / 4)
    with ThreadPoolExecutor(options.readers, thread_name_prefix="adapter-reader") as pool:
        done = [pool.submit(readers.read, seed) for seed in range(options.readers)]
        try:
            steps(options.seconds / 4)  # everyone has memory and has seen the shape
            before, loads, begun = os.times(), readers.loads, time.perf_counter()
            beside = steps(options.seconds)
            seconds, loads, after = time.perf_counter() - begun, readers.loads - loads, os.times()
        finally:
            readers.stop()
        for each in done:
            each.result()
    busy = after.user + after.system - before.user - before.system - len(beside) * IN_PYTHON_S
    return {
        "file_bytes": size,
        "loads_per_s": round(loads / seconds, 1),
        "bytes_per_s": round(loads * size / seconds),
        "processor_ms_per_load": round(1000 * busy / max(1, loads), 1),
        "step_alone": spread(alone),
        "step_beside": spread(beside),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--readers", type=int, default=8)
    parser.add_argument("--cold", action="store_true", help="read from the disk, not from the page cache")
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to see that it works")
    parser.add_argument("--keep", action="store_true", help="write the JSON into benchmarks/results/")
    options = parser.parse_args()
    torch.set_num_threads(1)  # as in an engine's process beside a GPU
    with tempfile.TemporaryDirectory(prefix="adapters-") as folder:
        numbers = measure(options, Path(folder))
    print(f"{numbers['loads_per_s']} loads a second, {numbers['processor_ms_per_load']} ms of processor each")
    print(f"a step takes {numbers['step_alone']} alone, {numbers['step_beside']} beside them")
    settings = {
        "dtype": options.dtype,
        "readers": options.readers,
        "cold": options.cold,
        "tiny": options.tiny,
    }
    report("bench_load", {**gpu(), **settings, **numbers}, keep=options.keep)


if __name__ == "__main__":
    main()
