"""One person floods the queue: what those who ask one thing at a time notice of it.

A few people each ask, read the reply, and ask again. Their times to the first token are noted alone, then
while one person more keeps hundreds of long requests waiting, more than the engine can ever run at once.
The flood's own tokens per second say that nothing was bought by leaving the engine idle.

    python -m benchmarks.bench_fairness [--people 6] [--replies 6] [--flood 400] [--device cpu] [--keep]
    python -m benchmarks.bench_fairness --device cuda --people 32     # Llama-3.1-8B's shape
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import gpu, report
from benchmarks.random_model import LLAMA_3_1_8B, TINY, random_model
from engine.config import EngineConfig
from engine.engine import Engine
from engine.request import Request, SamplingParams, TokensEvent
from engine.weights import LoadedModel, load_model
from service import demo_model

ASK, ANSWER = 64, 32  # tokens, of those who wait for each reply
LONG_ASK, LONG_ANSWER = 256, 128  # of the flood


@dataclass
class Asker:
    """Someone who asks the next thing when the last reply has ended."""

    name: str
    left: int
    asked_at: float = 0.0
    first_token_s: list[float] = field(default_factory=list)


def words(chooser: random.Random, count: int, vocab: int) -> tuple[int, ...]:
    return tuple(chooser.choices(range(1, min(vocab, 8000)), k=count))


def drive(engine: Engine, people: int, replies: int, flood: int, seed: int) -> dict[str, float]:
    """Until everyone has had their replies; the flood is cut off then."""
    chooser, vocab = random.Random(seed), engine.model.config.vocab_size
    loaded = threading.Event()
    engine.on_load = loaded.set

    def sampling(tokens: int) -> SamplingParams:
        return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)

    for number in range(flood):
        long = words(chooser, LONG_ASK, vocab)
        engine.submit(Request(f"flood.{number}", long, sampling(LONG_ANSWER), user_key="flood"))
    for _ in range(8 if flood else 0):  # the flood has the engine to itself when the others come
        engine.step()
    askers = {f"p{number}": Asker(f"p{number}", replies) for number in range(people)}

    def ask(asker: Asker) -> None:
        asker.left -= 1
        asker.asked_at = time.perf_counter()
        name = f"{asker.name}.{asker.left}"
        engine.submit(Request(name, words(chooser, ASK, vocab), sampling(ANSWER), user_key=asker.name))

    started, flood_tokens, waiting = time.perf_counter(), 0, people
    for asker in askers.values():
        ask(asker)
    while waiting:
        for event in engine.step():
            name = event.request_id.partition(".")[0]
            is_token = isinstance(event, TokensEvent)
            if name == "flood":
                flood_tokens += len(event.token_ids) if isinstance(event, TokensEvent) else 0
                continue
            asker = askers[name]
            if is_token and asker.asked_at:
                asker.first_token_s.append(time.perf_counter() - asker.asked_at)
                asker.asked_at = 0.0
            elif not is_token and asker.left:
                ask(asker)
            elif not is_token:
                waiting -= 1
    seconds = time.perf_counter() - started
    for number in range(flood):
        engine.cancel(f"flood.{number}")
    for _ in engine.drain():
        pass
    engine.check_integrity()
    times = sorted(each for asker in askers.values() for each in asker.first_token_s)
    assert len(times) == people * replies
    return {
        "first_token_p50_ms": round(1000 * statistics.median(times), 1),
        "first_token_p95_ms": round(1000 * times[int(0.95 * len(times))], 1),
        "first_token_most_ms": round(1000 * times[-1], 1),
        "seconds": round(seconds, 2),
        "their_tokens_per_s": round(people * replies * ANSWER / seconds, 1),
        "flood_tokens_per_s": round(flood_tokens / seconds, 1),
    }


def a_model(options: argparse.Namespace) -> LoadedModel:
    if options.tiny:
        return random_model(TINY, device=options.device, dtype=torch.float32)
    if options.device == "cpu":
        return load_model(demo_model.path())
    return random_model(LLAMA_3_1_8B, device="cuda", dtype=torch.bfloat16)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--people", type=int, default=6)
    arguments.add_argument("--replies", type=int, default=6, help="of each")
    arguments.add_argument("--flood", type=int, default=400, help="requests of one person, all at once")
    arguments.add_argument("--running", type=int, default=16, help="sequences in one step")
    arguments.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    arguments.add_argument("--tiny", action="store_true", help="a tiny model, to try the script with")
    arguments.add_argument("--keep", action="store_true", help="write the JSON into benchmarks/results/")
    options = arguments.parse_args()
    model = a_model(options)
    config = EngineConfig(
        arena_bytes=(512 << 20) if options.device == "cpu" else 16 << 30,
        max_running=options.running,
        max_waiting=1 << 16,
        max_tokens_per_step=256 if options.device == "cpu" else 2048,
        device=options.device,
        dtype=str(model.decoder.embed.dtype).removeprefix("torch."),
        prefix_cache=False,
    )
    engine = Engine(config, model, Path())
    while engine.prepare():
        pass
    numbers: dict[str, Any] = {}
    drive(engine, options.people, 1, 4, 0)  # warm
    for name, flood in (("alone", 0), ("beside_a_flood", options.flood)):
        numbers[name] = drive(engine, options.people, options.replies, flood, 1)
        print(json.dumps({name: numbers[name]}), flush=True)
    engine.close()
    settings = {name: getattr(options, name) for name in ("people", "replies", "flood", "running", "device")}
    report("bench_fairness", {**gpu(), **settings, **numbers}, keep=options.keep)


if __name__ == "__main__":
    main()
