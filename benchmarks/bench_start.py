"""From process start to first token: an 8B-shaped model from files in the page cache, one adapter.

A random model is written to a folder (16 GB of safetensors), its files are read once, and then
`python -m benchmarks.bench_start --folder FOLDER` starts afresh a few times: imports, model, engine, one
request with an adapter, first token. Nothing is measured that a service would not do.

    python -m benchmarks.bench_start [--starts 2] [--where FOLDER] [--out FILE]
    python -m benchmarks.bench_start --tiny
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TARGET_S = 20.0
MARK = "ended: "


def start(options: argparse.Namespace) -> None:
    """The process that is measured; says at once when a phase has ended."""
    import torch

    from benchmarks.random_model import ATTENTION_16, KINDS
    from engine.config import EngineConfig
    from engine.engine import Engine
    from engine.request import AdapterRef, Request, SamplingParams, TokensEvent
    from engine.weights import load_model

    def ended(phase: str) -> None:
        print(MARK + phase, flush=True)

    ended("imports")
    device, dtype = options.device, "float32" if options.device == "cpu" else "bfloat16"
    model = load_model(options.folder / "model", device=device, dtype=getattr(torch, dtype))
    ended("model")
    config = EngineConfig(device=device, dtype=dtype, arena_bytes=(16 << 20 if options.tiny else 8 << 30))
    engine = Engine(config, model, options.folder / "adapters")
    ended("engine")
    adapter = AdapterRef(f"{KINDS.index(ATTENTION_16):02x}{0:08x}", 1)
    sampling = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    engine.submit(Request("first", tuple(range(1, 65)), sampling, adapter))
    tokens = 0
    for event in engine.drain():
        if isinstance(event, TokensEvent):
            tokens += 1
            if tokens == 1:
                ended("first_token")
    ended("eighth_token")
    engine.close()


def prepare(options: argparse.Namespace, folder: Path) -> int:
    """Write the model and one adapter below `folder`; bytes of the model's files."""
    import torch

    from benchmarks.random_model import (
        ATTENTION_16,
        LLAMA_3_1_8B,
        TINY,
        RandomAdapters,
        random_model,
        save_model,
    )

    config = TINY if options.tiny else LLAMA_3_1_8B
    (folder / "model").mkdir()
    model = random_model(config, device=options.device, dtype=torch.bfloat16)
    save_model(folder / "model", model)
    adapters = RandomAdapters(config, torch.bfloat16)
    adapters.write(folder / "adapters", adapters.refs(ATTENTION_16, 1), threads=1)
    return sum(path.stat().st_size for path in (folder / "model").iterdir())


def read_once(folder: Path) -> float:
    """Read all files below `folder`, so that they are in the page cache; bytes per second."""
    total, started = 0, time.perf_counter()
    for path in sorted(folder.rglob("*.safetensors")):
        with path.open("rb") as file:
            while piece := file.read(16 << 20):
                total += len(piece)
    return total / (time.perf_counter() - started)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """One start. Seconds from before the process was made to the end of each phase."""
    flags = ["--device", options.device, "--folder", str(folder), *["--tiny"] * options.tiny]
    command = [sys.executable, "-m", "benchmarks.bench_start", *flags]
    made = time.perf_counter()
    ended = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        late = threading.Timer(options.budget, process.kill)
        late.start()
        for line in process.stdout:
            if line.startswith(MARK):
                ended[line.removeprefix(MARK).strip()] = round(time.perf_counter() - made, 3)
        late.cancel()
    if "eighth_token" not in ended:
        raise RuntimeError(f"the process ended with {process.returncode}, after {list(ended) or 'nothing'}")
    return ended


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="From process start to first token.")
    parser.add_argument("--starts", type=int, default=2)
    parser.add_argument("--where", type=Path, help="write the model below this folder, not the temporary one")
    parser.add_argument("--budget", type=float, default=180.0, help="seconds that one start may take")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on the CPU")
    parser.add_argument("--device", help="a torch device; cuda, or cpu with --tiny")
    parser.add_argument("--commit", help="the commit measured, where there is no git")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.device = options.device or ("cpu" if options.tiny else "cuda")
    if options.folder:
        start(options)
        return
    from benchmarks.common import commit, gpu, machine

    result: dict[str, Any] = {
        "benchmark": "bench_start",
        "date": time.strftime("%Y-%m-%d"),
        "commit": options.commit or commit(),
        **machine(),
        **gpu(),
        "tiny": options.tiny,
        "target_s": TARGET_S,
    }
    with tempfile.TemporaryDirectory(prefix="model-", dir=options.where) as name:
        folder, began = Path(name), time.perf_counter()
        result["model_bytes"] = prepare(options, folder)
        print(
            f"{result['model_bytes'] / 1e9:.2f} GB written in {time.perf_counter() - began:.1f} s", flush=True
        )
        result["page_cache_bytes_per_s"] = read_once(folder)
        result["starts"] = starts = []
        for number in range(options.starts):
            starts.append(measure(options, folder))
            said = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in starts[-1].items())
            print(f"start {number + 1}, seconds to the end of each phase: {said}", flush=True)
    first = [each["first_token"] for each in starts]
    result["first_token_s"] = min(first)
    result["reached"] = None if options.tiny else max(first) <= TARGET_S
    text = f"{min(first):.2f} to {max(first):.2f} s, to reach: {TARGET_S:.0f} s"
    print(f"process start to first token: {text}", flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
