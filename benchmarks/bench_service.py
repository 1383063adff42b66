"""Two hundred people with two hundred adapters, at once, through the whole service.

Every person gets an adapter of their own (rank 8, all linear modules) and a question of their own. First
each asks alone, then all ask together over a WebSocket each; a reply is right when it is word for word the
reply that the same person got alone. At the end the engine proves its books.

    python -m benchmarks.bench_service [--people 200] [--keep]
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.bench_cpu import random_adapter
from benchmarks.common import report
from engine.adapter_files import write_adapter
from engine.client import EngineClient
from engine.weights import load_model, read_config
from personalization.publish import Shelf, import_adapter
from personalization.store import Store, connect
from service import demo_model
from service.chat import ChatClient
from service.cli import sign
from service.settings import Settings
from tests.running_service import RunningService, running_service

TOPICS = (
    "music",
    "the weather",
    "a film",
    "dinner",
    "football",
    "a book",
    "your job",
    "a trip",
    "cats",
    "space",
)
NEW_TOKENS = 48


async def give_adapters(settings: Settings, people: list[str]) -> None:
    """Publish a random adapter for everyone, as an import does."""
    folder = demo_model.path()
    config, base_hash = read_config(folder), load_model(folder).base_hash
    shelf = Shelf(settings.adapter_root, config)
    store = Store(connect(settings.redis_address), bytes.fromhex(settings.secret_path.read_text().strip()))
    try:
        with tempfile.TemporaryDirectory() as place:
            for number, user in enumerate(people):
                source = Path(place) / str(number)
                source.mkdir()
                write_adapter(source, random_adapter(config, number), config, base_model="demo")
                await import_adapter(shelf, store, user, source, base_model="demo", base_hash=base_hash)
    finally:
        await store.close()


async def ask(
    service: RunningService, token: str, question: str, *, store: bool
) -> tuple[str, dict[str, Any]]:
    """One question over a socket of its own; the reply's text and its last event."""
    text, last = "", {}
    async with ChatClient(service.address, token) as client:
        await client.ask(question, temperature=0.0, max_output_tokens=NEW_TOKENS, store=store)
        async for event in client.reply():
            last = event
            if event["type"] == "response.output_text.delta":
                text += event["delta"]
    return text, last


async def measure(service: RunningService, settings: Settings, count: int) -> dict[str, Any]:
    people = [f"person-{number}" for number in range(count)]
    await give_adapters(settings, people)
    tokens = [sign(settings, user, hours=1)[0] for user in people]
    questions = [f"Tell me about {TOPICS[i % len(TOPICS)]}, number {i}." for i in range(count)]
    alone = [(await ask(service, t, q, store=False))[0] for t, q in zip(tokens, questions, strict=True)]
    started = time.perf_counter()
    together = await asyncio.gather(
        *(ask(service, t, q, store=True) for t, q in zip(tokens, questions, strict=True)),
        return_exceptions=True,
    )
    seconds = time.perf_counter() - started
    good = [each for each in together if not isinstance(each, BaseException) and "response" in each[1]]
    written = sum(last["response"]["usage"]["output_tokens"] for _, last in good)
    equal = sum(not isinstance(b, BaseException) and a == b[0] for a, b in zip(alone, together, strict=True))
    engine = await EngineClient.connect(settings.engine_socket)
    try:
        await engine.check_integrity()
        stats = await engine.stats()
    finally:
        await engine.close()
    return {
        "people": count,
        "errors": count - len(good),
        "replies_equal_to_alone": equal,
        "distinct_replies": len({text for text, _ in good}),
        "served_by_own_version": sum(
            int(last["response"]["metadata"]["adapter_version"]) == 1 for _, last in good
        ),
        "seconds": round(seconds, 1),
        "tokens_per_s": round(written / seconds, 1),
        "integrity": "clean",
        "preemptions": int(stats["queue"]["preemptions"]),
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--people", type=int, default=200)
    arguments.add_argument("--keep", action="store_true", help="write the JSON into benchmarks/results/")
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary) / "data"
        with running_service(data, auto_refresh_after="0", nightly_hour="none", demo_users="off") as service:
            numbers = asyncio.run(measure(service, Settings(data=data), options.people))
    report("bench_service", numbers, keep=options.keep)


if __name__ == "__main__":
    main()
