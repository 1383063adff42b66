"""What the commands do to the service: histories in, refreshes asked for and followed."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from personalization.store import HistoryForgotten, Store
from service import operations


def line(user: str, minute: int, text: str) -> bytes:
    at = f"2026-01-01T00:{minute:02}:00Z"
    turn = {"user": user, "conversation": "c", "at": at, "role": "user", "text": text}
    return json.dumps(turn).encode()


def silent(share: float, detail: str) -> None:
    assert 0.0 <= share <= 1.0


async def test_an_import_tells_what_is_new_and_which_lines_are_bad(store: Store) -> None:
    lines = [line("ada", 1, "one"), b"{broken", line("bob", 2, "two"), line("ada", 3, "three")]
    first = await operations.import_histories(store, lines, silent)
    assert (first.users, first.turns, first.new) == (2, 3, 3)
    assert [error.number for error in first.errors] == [2]
    again = await operations.import_histories(store, lines, silent)
    assert (again.turns, again.new) == (3, 0)
    assert [turn.text for turn in await store.turns("ada")] == ["one", "three"]


async def test_a_file_without_turns_is_no_division_by_zero(store: Store) -> None:
    done = await operations.import_histories(store, [], silent)
    assert (done.users, done.turns, done.new) == (0, 0, 0)


async def test_an_import_of_who_is_forgotten_meanwhile_leaves_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("personalization.store.APPEND_BATCH", 1)
    lines = [line("ada", number % 60, f"turn {number}") for number in range(500)]
    async with asyncio.timeout(20):
        importing = asyncio.create_task(operations.import_histories(store, lines, silent))
        while not await store.recent("ada", 1):  # noqa: ASYNC110  (of Redis: nothing to wait on)
            await asyncio.sleep(0)
        await store.forget("ada")
        with pytest.raises(HistoryForgotten):
            await importing
    assert await store.turns("ada") == []


async def test_a_refresh_is_followed_to_each_persons_end(store: Store) -> None:
    asked = asyncio.Event()

    async def enqueue(user: str) -> dict[str, str]:
        if user == "bob":
            asked.set()
        return {"job_id": f"job-{user}"}

    async def work() -> None:
        await asked.wait()
        for user, end in (
            ("ada", {"state": "completed", "published": True, "from": 0, "to": 1}),
            ("bob", {"state": "failed", "code": "not_enough_turns", "message": "too few turns"}),
        ):
            await store.publish_progress(
                user, {"job_id": f"job-{user}", "state": "training", "progress": 0.5}
            )
            await store.publish_progress(user, {"job_id": f"job-{user}", **end})

    shares: list[float] = []

    def show(share: float, detail: str) -> None:
        shares.append(share)

    async with asyncio.timeout(20):
        working = asyncio.create_task(work())
        done = await operations.refresh(store, ["ada", "bob"], enqueue, wait=True, on_progress=show)
        await working
    assert [(one.user, one.state, one.published, one.version) for one in done] == [
        ("ada", "completed", True, 1),
        ("bob", "failed", False, 0),
    ]
    assert (done[1].reason, done[1].code) == ("too few turns", "not_enough_turns")
    assert shares[-1] == 1.0


async def test_a_refresh_that_ended_while_redis_was_away_is_found_in_the_kept_state(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations, "LOOK_EVERY_S", 0.1)
    ended: dict[str, Any] = {
        "job_id": "job-ada",
        "state": "completed",
        "published": False,
        "reason": "no better",
    }

    async def enqueue(user: str) -> dict[str, str]:
        await store.publish_progress(user, ended)
        return {"job_id": "job-ada"}

    async with asyncio.timeout(20):
        (done,) = await operations.refresh(store, ["ada"], enqueue, wait=True, on_progress=silent)
    assert (done.state, done.reason) == ("completed", "no better")


async def test_news_of_an_earlier_job_does_not_end_the_wait(store: Store) -> None:
    async def enqueue(user: str) -> dict[str, str]:
        await store.publish_progress(user, {"job_id": "older", "state": "completed"})
        return {"job_id": "newer"}

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await operations.refresh(store, ["ada"], enqueue, wait=True, on_progress=silent)


async def test_a_person_who_is_forgotten_meanwhile_is_not_waited_for(store: Store) -> None:
    asked = asyncio.Event()

    async def enqueue(user: str) -> dict[str, str]:
        if user == "bob":
            asked.set()
        return {"job_id": f"job-{user}"}

    async def work() -> None:
        await asked.wait()
        await store.forget("ada")
        await store.publish_progress("bob", {"job_id": "job-bob", "state": "completed"})

    async with asyncio.timeout(60):
        working = asyncio.create_task(work())
        done = await operations.refresh(store, ["ada", "bob"], enqueue, wait=True, on_progress=silent)
        await working
    assert [(one.user, one.state) for one in done] == [("ada", "failed"), ("bob", "completed")]
    assert done[0].reason == "forgotten meanwhile"


async def test_news_that_someone_was_forgotten_may_be_lost(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    @asynccontextmanager
    async def silence() -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
        async def nothing() -> AsyncIterator[dict[str, Any]]:
            await asyncio.Event().wait()
            yield {}

        yield nothing()

    async def enqueue(user: str) -> dict[str, str]:
        await store.forget("ada")
        return {"job_id": "job-ada"}

    monkeypatch.setattr(store, "events", silence)
    async with asyncio.timeout(20):
        (done,) = await operations.refresh(store, ["ada"], enqueue, wait=True, on_progress=silent)
    assert (done.state, done.code) == ("failed", "forgotten")


async def test_without_waiting_the_job_is_named(store: Store) -> None:
    async def enqueue(user: str) -> dict[str, str]:
        return {"job_id": "job-1"}

    (done,) = await operations.refresh(store, ["ada"], enqueue, wait=False, on_progress=silent)
    assert (done.job_id, done.state) == ("job-1", "queued")
