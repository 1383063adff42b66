"""Learning beside serving on one device: what it costs those who wait for words, and how fast it learns.

An engine's process answers 64 people without a pause, each with an adapter of their own; the time between two
words of a reply is noted alone, then while a trainer's process refreshes 64 people, then alone again. The
trainer borrows the weights (`engine/lending.py`) and keeps to its share (`personalization/pacing.py`).
`--most` ends it after so many seconds; how long it takes without the others is then left out.

    python -m benchmarks.bench_beside [--shape 8b] [--people 64] [--seconds 20] [--most 60] [--keep]
    python -m benchmarks.bench_beside --shape tiny --people 4 --seconds 2 --device cpu
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import gpu, report
from benchmarks.random_model import ATTENTION_16, LLAMA_3_1_8B, TINY, RandomAdapters, random_model, save_model
from engine.client import EngineClient
from engine.config import EngineConfig
from engine.engine import Engine
from engine.lending import Lender, trainer_bytes
from engine.request import AdapterRef, Request, SamplingParams, TokensEvent
from engine.server import serve
from engine.weights import load_model, read_config
from personalization.gate import GatePolicy
from personalization.pacing import SHARE
from personalization.prompt import Example
from personalization.refresh import RefreshPolicy
from personalization.trainer import Judged, Progress, Task, Trainer, TrainerSettings
from service import demo_model

SHAPES = {"8b": LLAMA_3_1_8B, "tiny": replace(TINY, vocab_size=16_384, max_position_embeddings=4096)}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
PROMPT, REPLY = (64, 512), 128
REACH = 0.15


# ---------------------------------------------------------------- the engine's process


async def lend_and_serve(folder: Path, device: str) -> None:
    """An engine as the service starts it, lending its weights."""
    lender = Lender(folder / "lent") if device == "cuda" else None
    dtype = "bfloat16" if device == "cuda" else "float32"
    model = load_model(folder / "model", device=device, dtype=getattr(torch, dtype))
    arena = 256 << 20
    if lender is not None:
        free, total = torch.cuda.mem_get_info()
        arena = min(32 << 30, (free - trainer_bytes(None, total)) * 9 // 10 - (2 << 30))
    config = EngineConfig(device=device, dtype=dtype, arena_bytes=arena)
    if device == "cuda":
        config = replace(config, max_tokens_per_step=2048)
    engine = Engine(config, model, folder / "adapters")
    if lender is not None:
        lender.lend(model)
    await serve(
        engine, folder / "engine.sock", on_busy=(lambda busy: None) if lender is None else lender.tell
    )


# ---------------------------------------------------------------- people who wait for words


class Crowd:
    """People who say the next thing as soon as they were answered. `gaps`: seconds between two words."""

    def __init__(self, client: EngineClient, adapters: list[AdapterRef], seed: int) -> None:
        self.gaps: list[float] = []
        self.tokens = 0
        self._client = client
        self._adapters = adapters
        self._chooser = random.Random(seed)

    @contextlib.asynccontextmanager
    async def talking(self) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(self._talk(number)) for number in range(len(self._adapters))]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
            for end in ended:
                if isinstance(end, Exception):
                    raise end

    async def _talk(self, number: int) -> None:
        sampling = SamplingParams(temperature=0.0, max_tokens=REPLY, ignore_eos=True)
        turn = 0
        while True:
            turn += 1
            words = self._chooser.choices(range(1, 8000), k=self._chooser.randint(*PROMPT))
            request = Request(f"{number}.{turn}", tuple(words), sampling, self._adapters[number])
            last = None
            stream = await self._client.submit(request)
            async for event in stream:
                if isinstance(event, TokensEvent):
                    now = time.perf_counter()
                    if last is not None:
                        self.gaps.append(now - last)
                    last = now
                    self.tokens += len(event.token_ids)
                elif event.reason != "length":
                    raise RuntimeError(f"{request.id} ended with {event.reason}: {event.message}")

    def take(self, seconds: float) -> dict[str, float]:
        """What was noted since the last time, in milliseconds."""
        gaps, self.gaps = sorted(self.gaps), []
        tokens, self.tokens = self.tokens, 0
        return {
            "tokens_per_s": round(tokens / seconds, 1),
            "p50_ms": round(1000 * statistics.median(gaps), 2),
            "p99_ms": round(1000 * gaps[int(len(gaps) * 0.99)], 2),
            "most_ms": round(1000 * gaps[-1], 2),
        }


# ---------------------------------------------------------------- people who are refreshed


def tasks_of(people: int, tokens: int, row: int) -> list[Task]:
    """Rows of random words: `tokens` to learn each, and a few to judge by."""
    chooser = random.Random(1)

    def example(size: int) -> Example:
        half = size // 2
        ids = tuple(chooser.choices(range(1, 8000), k=size))
        return Example(ids, (False,) * half + (True,) * (size - half))

    return [
        Task(str(n), [example(row) for _ in range(tokens // row)], [example(row // 2)] * 6, None, n)
        for n in range(people)
    ]


async def refresh(trainer: Trainer, tasks: list[Task], most_s: float | None = None) -> tuple[float, float]:
    """Train and judge all, or as many as can be in `most_s`: (the seconds of it, the share of the training
    done)."""
    policy = RefreshPolicy()
    started, judged, trained = time.perf_counter(), 0, 0.0
    with contextlib.suppress(TimeoutError):  # which ends the trainer's process
        async with asyncio.timeout(most_s):
            async for event in trainer.run(tasks, policy.recipe, GatePolicy()):
                if isinstance(event, Progress):
                    trained = event.share
                elif isinstance(event, Judged):
                    judged += 1
                    if not event.numbers.get("steps"):
                        raise RuntimeError(f"{event.id} was not trained: {event.verdict.reason}")
        if judged != len(tasks):
            raise RuntimeError(f"expected {len(tasks)} to be judged, got {judged}")
    return time.perf_counter() - started, trained


def device_memory(pid: int | None) -> int | None:
    """MiB that a process holds of the GPU; None if that cannot be told."""
    command = ("nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits")
    with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
        for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
            found, used = line.split(",")
            if int(found) == pid:
                return int(used)
    return None


def prepare(folder: Path, options: argparse.Namespace) -> list[AdapterRef]:
    """The model's folder and an adapter for everyone who talks."""
    if options.shape is None:
        (folder / "model").symlink_to(demo_model.path())
    else:
        (folder / "model").mkdir()
        dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
        save_model(folder / "model", random_model(SHAPES[options.shape], device=options.device, dtype=dtype))
        for name in TOKENIZER:
            shutil.copy(demo_model.path() / name, folder / "model" / name)
        if options.device == "cuda":
            torch.cuda.empty_cache()
    adapters = RandomAdapters(read_config(folder / "model"), torch.bfloat16)
    refs = adapters.refs(ATTENTION_16, options.talking)
    adapters.write(folder / "adapters", refs, threads=8)
    return refs


async def measure(folder: Path, refs: list[AdapterRef], options: argparse.Namespace) -> dict[str, Any]:
    client = await EngineClient.connect(folder / "engine.sock", timeout=300.0)
    trainer = Trainer(
        TrainerSettings(
            folder / "model",
            device=options.device,
            lent=folder / "lent" if options.device == "cuda" else None,
            share=options.share,
        )
    )
    tasks = tasks_of(options.people, options.tokens, 1024)
    numbers: dict[str, Any] = {}

    def say(name: str, value: Any) -> None:
        numbers[name] = value
        print(json.dumps({name: value}), flush=True)

    try:
        crowd = Crowd(client, refs, 0)
        await refresh(trainer, tasks[:2])  # warm: the process, its kernels
        if options.most is None:
            seconds, _ = await refresh(trainer, tasks)
            say("refresh_alone_s", round(seconds, 2))
        async with crowd.talking():
            await asyncio.sleep(min(10.0, options.seconds))  # graphs recorded, adapters loaded
            crowd.take(1.0)
            for name in ("before", "beside", "after"):
                started = time.perf_counter()
                if name == "beside":
                    seconds, trained = await refresh(trainer, tasks, options.most)
                    say("refresh_beside_s", round(seconds, 2))
                    say("trained_share", round(trained, 3))
                    say("trainer_device_mib", device_memory(trainer.pid))
                else:
                    await asyncio.sleep(options.seconds)
                say(name, crowd.take(time.perf_counter() - started))
        alone = max(numbers["before"]["p99_ms"], numbers["after"]["p99_ms"])
        numbers["p99_rise"] = round(numbers["beside"]["p99_ms"] / alone - 1, 4)
        numbers["reached"] = numbers["p99_rise"] <= REACH
        await client.check_integrity()
    finally:
        await trainer.stop()
        await client.close()
    return numbers


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--shape", choices=sorted(SHAPES), help="random weights; default: the demo model")
    arguments.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    arguments.add_argument("--talking", type=int, default=64, help="people who wait for words")
    arguments.add_argument("--people", type=int, default=64, help="people who are refreshed")
    arguments.add_argument("--tokens", type=int, default=8192, help="to learn from, of each")
    arguments.add_argument("--seconds", type=float, default=15.0, help="alone, before and after")
    arguments.add_argument(
        "--most", type=float, help="seconds that they may take beside the others; default: any"
    )
    arguments.add_argument("--share", type=float, default=SHARE)
    arguments.add_argument("--keep", action="store_true", help="write the JSON into benchmarks/results/")
    arguments.add_argument("--engine", type=Path, help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.engine is not None:
        asyncio.run(lend_and_serve(options.engine, options.device))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        refs = prepare(folder, options)
        engine = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.bench_beside", "--engine", folder, "--device", options.device]
        )
        try:
            numbers = asyncio.run(measure(folder, refs, options))
        finally:
            engine.terminate()
            engine.wait()
    settings = {name: getattr(options, name) for name in ("talking", "people", "tokens", "share")}
    name = f"bench_beside_{options.shape or 'demo'}_{options.device}"
    report(name, {**gpu(), **settings, **numbers}, keep=options.keep)


if __name__ == "__main__":
    main()
