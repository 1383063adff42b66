"""From "message accepted" to the first word of a reply by an adapter that learned from it, when asked for.

Everyone brings a sample person's history along, says one thing more, and asks for a refresh at once; when the
new version is announced, they say the next thing. The clock runs from the first message's acceptance to the
first word that the new version writes. Each round is of new people; round one starts the training process, in
later rounds it is warm. That the version has learned from that very message is asked of its record.

    python -m benchmarks.bench_staleness [--people 8] [--rounds 2] [--device auto] [--keep]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import websockets

from benchmarks.common import gpu, report
from personalization.history import parse
from personalization.store import Store, connect
from service.cli import sign
from service.samples import SAMPLES, load
from service.settings import Settings
from tests.running_service import RunningService, running_service

PATIENCE_S = 3600.0
# Where the time of one person goes: each stage ends with the event of its name.
STAGES = ("asked", "queued", "training", "gating", "completed", "first_word")


async def bring_histories(settings: Settings, people: list[str]) -> None:
    store = Store(connect(settings.redis_address), bytes.fromhex(settings.secret_path.read_text().strip()))
    try:
        for number, user in enumerate(people):
            name = SAMPLES[number % len(SAMPLES)].name
            await store.append(user, parse(load(name)).turns[name])
    finally:
        await store.close()


class Person:
    """One person's socket, and when each thing was heard on it."""

    def __init__(self, socket: websockets.ClientConnection) -> None:
        self._socket = socket

    async def hear(self, ends: Callable[[dict[str, Any]], bool]) -> tuple[dict[str, Any], float]:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                event = json.loads(await self._socket.recv())
                if event["type"] == "error" or ends(event):
                    return event, time.perf_counter()

    async def send(self, **event: Any) -> None:
        await self._socket.send(json.dumps(event))

    async def learn_one_message(self, number: int) -> dict[str, float] | None:
        """Seconds of each stage; None if the gate refused the version."""
        await self.send(type="response.create", input=message(number), max_output_tokens=1)
        _, accepted = await self.hear(lambda event: event["type"] == "response.created")
        await self.hear(lambda event: event["type"] in ("response.completed", "response.incomplete"))
        at = {"accepted": accepted}
        await self.send(type="adapter.refresh.create")
        for stage in STAGES[:-1]:
            event, at[stage] = await self.hear(lambda event, stage=stage: _ends(event, stage))
            if event["type"] in ("adapter.refresh.failed", "error"):
                raise RuntimeError(f"the refresh failed: {event}")
            if event["type"] == "adapter.refresh.completed" and not event["published"]:
                return None
        version = str(event["to"])
        await self.send(type="response.create", input="And now?", max_output_tokens=8)
        created, _ = await self.hear(lambda event: event["type"] == "response.created")
        assert created["response"]["metadata"]["adapter_version"] == version, created
        _, at["first_word"] = await self.hear(lambda event: event["type"] == "response.output_text.delta")
        await self.hear(lambda event: event["type"] in ("response.completed", "response.incomplete"))
        moments = ("accepted", *STAGES)
        took = {after: at[after] - at[before] for before, after in zip(moments, STAGES, strict=False)}
        return took | {"whole": at["first_word"] - accepted}


def message(number: int) -> str:
    return f"This is what I wanted to say, number {number}: I like my answers the way I write them."


async def knows(settings: Settings, user: str, number: int) -> bool:
    """Whether the version that answers this person was trained on the message."""
    store = Store(connect(settings.redis_address), bytes.fromhex(settings.secret_path.read_text().strip()))
    try:
        serving = (await store.pointer(user)).version
        records = {record.version: record for record in await store.versions(user)}
        said = {turn.id for turn in await store.turns(user) if turn.text == message(number)}
        return serving in records and said <= set(records[serving].turn_ids)
    finally:
        await store.close()


def _ends(event: dict[str, Any], stage: str) -> bool:
    """`asked`: the job is queued; `queued`: a batch has taken it up; `training`: the gate has it."""
    state = event.get("state")
    if event["type"] == "adapter.refresh.failed":
        return True
    return {
        "asked": event["type"] == "adapter.refresh.queued",
        "queued": state == "training",
        "training": state == "gating",
        "gating": event["type"] == "adapter.updated" or event.get("published") is False,
        "completed": event["type"] == "adapter.refresh.completed",
    }[stage]


def spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "p50": round(ordered[len(ordered) // 2], 2),
        "p95": round(ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))], 2),
    }


async def measure(service: RunningService, people: int, rounds: int) -> dict[str, Any]:
    settings = Settings(data=service.data)
    results = []
    for number in range(rounds):
        names = [f"person-{number}-{each}" for each in range(people)]
        await bring_histories(settings, names)
        taken = await asyncio.gather(*(one(service, settings, name, number) for name in names))
        published = [each for each in taken if each is not None]
        stages = {
            stage: spread([each[stage] for each in published]) for stage in (*STAGES, "whole") if published
        }
        knowing = [await knows(settings, name, number) for name in names]
        counts = {"published": len(published), "refused": people - len(published)}
        results.append({**counts, "learned_from_the_message": sum(knowing), **stages})
        print(json.dumps({"round": number + 1, **results[-1]}), flush=True)
    return {"people": people, "rounds": results}


async def one(service: RunningService, settings: Settings, name: str, number: int) -> dict[str, float] | None:
    url = service.address.replace("http", "ws", 1) + "/v1/responses"
    headers = {"authorization": f"Bearer {sign(settings, name, hours=1)[0]}"}
    async with websockets.connect(url, subprotocols=["attune.v1.json"], additional_headers=headers) as socket:
        return await Person(socket).learn_one_message(number)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--people", type=int, default=8)
    arguments.add_argument("--rounds", type=int, default=2)
    arguments.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    arguments.add_argument("--keep", action="store_true", help="write the JSON into benchmarks/results/")
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary) / "data"
        with running_service(
            data, auto_refresh_after="0", nightly_hour="none", demo_users="off", device=options.device
        ) as service:
            numbers = asyncio.run(measure(service, options.people, options.rounds))
    report("bench_staleness", {**gpu(), "device": options.device, **numbers}, keep=options.keep)


if __name__ == "__main__":
    main()
