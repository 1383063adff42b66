"""Refresh everyone of a history file through the running service, and see what it was worth.

Each person's turns are cut by time: the newest fifth is held out and never imported; of the rest the
service keeps its own gate part. Then: import all, `refresh --all`, and the loss of the held-out turns behind
the context that serving would give them, with the bare base and with the version that was published. Means
are over people with a bootstrap 95 % interval. Beside it the same training one person at a time: same rows,
steps and code, in seconds of the clock and of the processor (the second hardly feel other programs).

    python -m benchmarks.bench_people HISTORY.jsonl [--people 250] [--solo 24] [--device auto] [--keep]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import report
from engine.adapter_files import LoraWeights, read_adapter, version_folder
from engine.weights import LoadedModel, load_model
from personalization.evaluate import interval
from personalization.examples import serving_rows, words
from personalization.history import Turn, dump, learned, parse
from personalization.prompt import Example, Renderer
from personalization.refresh import RefreshPolicy, choose
from personalization.score import losses_of_many
from personalization.store import Store, connect
from personalization.train import Person, best_dtype, train
from service import demo_model
from service.settings import Settings
from tests.running_service import ROOT, RunningService, running_service

HELD_OUT = 0.2
WINDOW_TOKENS = 1024


@dataclass(frozen=True)
class Held:
    """One person: what is imported, and rows of the newest turns behind their context."""

    user: str
    history: list[Turn]
    rows: list[Example]


def cut(user: str, turns: list[Turn], renderer: Renderer) -> Held:
    """The newest fifth of the learned turns, and what follows its first one, is held out; judged are those
    that do not repeat an older one's words."""
    lessons = [place for place, turn in enumerate(turns) if learned(turn)]
    first = lessons[len(lessons) - max(1, round(len(lessons) * HELD_OUT))]
    known = {words(turn) for turn in turns[:first] if learned(turn)}
    rows = serving_rows(
        turns[:first],
        turns[first:],
        renderer,
        most_tokens=WINDOW_TOKENS,
        learn=lambda turn: learned(turn) and words(turn) not in known,
    )
    return Held(user, turns[:first], rows)


def mean_losses(
    model: LoadedModel, adapters: Sequence[LoraWeights | None], rows: Sequence[Sequence[Example]]
) -> list[float | None]:
    """Nats per held-out token of each person; None where nothing is left to measure."""
    found = losses_of_many(model, list(zip(adapters, rows, strict=True)))
    return [torch.cat(losses).mean().item() if any(map(len, losses)) else None for losses in found]


async def versions_of(settings: Settings, users: list[str]) -> dict[str, tuple[str, int]]:
    """Adapter id and serving version of everyone."""
    store = Store(connect(settings.redis_address), bytes.fromhex(settings.secret_path.read_text().strip()))
    try:
        return {user: (store.adapter_id(user), (await store.pointer(user)).version) for user in users}
    finally:
        await store.close()


def refresh_all(service: RunningService, people: list[Held]) -> tuple[list[dict[str, Any]], float, float]:
    """Import everyone, refresh everyone; the outcomes and the seconds of both."""
    file = service.data / "history.jsonl"
    lines = [line for person in people for line in dump(person.user, person.history)]
    file.write_text("".join(line if line.endswith("\n") else line + "\n" for line in lines))
    started = time.perf_counter()
    imported = service.json("import", str(file))
    import_s = time.perf_counter() - started
    if imported["errors"] or imported["users"] != len(people):
        raise SystemExit(f"the import went wrong: {imported}")
    started = time.perf_counter()
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "service.cli",
            "refresh",
            "--all",
            "--wait",
            "--json",
            "--data",
            str(service.data),
        ],
        cwd=ROOT,
        env=service.environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    outcomes: list[dict[str, Any]] = json.loads(done.stdout)["refreshed"]
    return outcomes, import_s, time.perf_counter() - started


def stacked_against_solo(
    folder: Path, device: torch.device, renderer: Renderer, people: list[Held], count: int
) -> dict[str, Any]:
    """Seconds to train `count` people (spread over the file) together and one after another."""
    policy, dtype = RefreshPolicy(), best_dtype(device)
    model = load_model(folder, device=device.type, dtype=dtype)
    chosen = people[:: max(1, len(people) // count)][:count]
    trainees = [
        Person(choose(each.history, (), renderer, policy).train, seed) for seed, each in enumerate(chosen)
    ]
    train(model, trainees[:2], policy.recipe)  # warm: kernels chosen, memory mapped
    seconds: dict[str, list[float]] = {"stacked": [], "solo": []}
    processor: dict[str, list[float]] = {"stacked": [], "solo": []}
    tokens = 0
    for _ in range(2):
        for name, at_once in (("stacked", len(trainees)), ("solo", 1)):
            started, worked = time.perf_counter(), time.process_time()
            trained = train(model, trainees, policy.recipe, people_at_once=at_once)  # ends on the host
            seconds[name].append(time.perf_counter() - started)
            processor[name].append(time.process_time() - worked)
            tokens = sum(each.tokens for each in trained)
    together, alone = min(seconds["stacked"]), min(seconds["solo"])
    return {
        "people": len(trainees),
        "tokens": tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "stacked_s": round(together, 1),
        "solo_s": round(alone, 1),
        "stacked_times_faster": round(alone / together, 2),
        "stacked_processor_s": round(min(processor["stacked"]), 1),
        "solo_processor_s": round(min(processor["solo"]), 1),
        "stacked_tokens_per_s": round(tokens / together),
        "solo_tokens_per_s": round(tokens / alone),
    }


def gains(model: LoadedModel, served: Sequence[Held], adapters: Sequence[LoraWeights]) -> dict[str, Any]:
    """What the published versions gain on the turns held out, over context alone."""
    rows = [each.rows for each in served]
    before, after = mean_losses(model, [None] * len(rows), rows), mean_losses(model, adapters, rows)
    measured = [(b, a) for b, a in zip(before, after, strict=True) if b is not None and a is not None]
    changes = [b - a for b, a in measured]
    shares = [(b - a) / b for b, a in measured]
    return {
        "people": len(changes),
        "nothing_held_out": len(served) - len(measured),
        "mean_gain_nats_per_token": round(statistics.fmean(changes), 4),
        "interval_95": interval(changes),
        "mean_gain_share": round(statistics.fmean(shares), 4),
        "made_worse": sum(change < 0 for change in changes),
        "made_worse_by_0.01": sum(change < -0.01 for change in changes),
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("history", type=Path)
    arguments.add_argument("--people", type=int, default=250)
    arguments.add_argument(
        "--solo", type=int, default=24, help="people trained one after another, for comparison"
    )
    arguments.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    arguments.add_argument("--keep", action="store_true", help="write the JSON into benchmarks/results/")
    options = arguments.parse_args()
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    device, folder = torch.device(chosen), demo_model.path()
    model = load_model(folder, device=chosen)
    renderer = Renderer(folder, model.config.max_position_embeddings)
    parsed = parse(options.history.read_bytes().splitlines())
    people = [cut(user, turns, renderer) for user, turns in list(parsed.turns.items())[: options.people]]
    print(f"{len(people)} people, {sum(len(p.history) for p in people)} turns imported", flush=True)
    numbers: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "people": len(people),
        "turns": sum(len(p.history) for p in people),
    }
    if options.solo:
        numbers["training"] = stacked_against_solo(folder, device, renderer, people, options.solo)
        print(json.dumps(numbers["training"]), flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary) / "data"
        with running_service(
            data, auto_refresh_after="0", nightly_hour="none", demo_users="off", device=chosen
        ) as service:
            outcomes, import_s, refresh_s = refresh_all(service, people)
            settings = Settings(data=data)
            serving = asyncio.run(versions_of(settings, [each.user for each in people]))
        published = sum(bool(each["published"]) for each in outcomes)
        numbers |= {
            "import_s": round(import_s, 1),
            "refresh_s": round(refresh_s, 1),
            "people_per_minute": round(60 * len(people) / refresh_s, 1),
            "published": published,
            "failed": sum(each["state"] == "failed" for each in outcomes),
            "kept_back": sum(each["state"] == "completed" and not each["published"] for each in outcomes),
        }
        print(json.dumps(numbers), flush=True)
        served = [each for each in people if serving[each.user][1]]
        adapters = [
            read_adapter(version_folder(settings.adapter_root, *serving[each.user]), model.config)
            for each in served
        ]
    numbers["held_out"] = gains(model, served, adapters)
    report("bench_people", numbers, keep=options.keep)


if __name__ == "__main__":
    main()
