"""The store when things go wrong: tasks cancelled in the middle, Redis killed, stalled, full."""

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import pytest
from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from personalization.history import Turn
from personalization.store import Store, StoreUnavailable, connect
from tests.redis_fixture import SECRET, RedisServer

NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)


def turn(user: str, number: int) -> Turn:
    at = NOON + timedelta(seconds=number)
    return Turn(f"{user}-{number}", f"talk of {user}", at, "user", f"{user} said {number}", "person")


@pytest.fixture
async def fragile(redis_server: RedisServer) -> AsyncIterator[Store]:
    """A store on a server of the test's own. It has time enough for one that is started again on a machine
    that pauses."""
    store = Store(connect(redis_server.url), SECRET, deadline_s=30.0)
    yield store
    await store.close()


async def test_no_storm_of_cancellations_gives_one_person_anothers_data(redis: Redis) -> None:
    """Cancelled commands once left their replies in the connection for the next user of it to read."""
    store = Store(redis, SECRET)
    rng = random.Random(20230320)
    users = [f"user{number}" for number in range(40)]
    for version, user in enumerate(users, start=1):
        await store.append(user, [turn(user, number) for number in range(3)])
        await store.compare_and_set(user, 0, version)
    finished = cancelled = 0

    async def look(user: str) -> None:
        nonlocal finished
        match rng.randrange(4):
            case 0:
                assert [each.text for each in await store.recent(user, 2)] == [
                    f"{user} said 1",
                    f"{user} said 2",
                ]
            case 1:
                assert (await store.pointer(user)).version == users.index(user) + 1
            case 2:
                assert [each.id for each in await store.conversations(user)] == [f"talk of {user}"]
            case 3:
                assert await store.append(user, [turn(user, 0)]) == 0
        finished += 1

    for _ in range(60):
        tasks = [asyncio.create_task(look(rng.choice(users))) for _ in range(60)]
        for task in rng.sample(tasks, 30):
            for _ in range(rng.randrange(3)):  # turns of the loop, so that slow machines cancel as early
                await asyncio.sleep(0)
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, asyncio.CancelledError):
                cancelled += 1
            else:
                assert outcome is None
    assert finished > 500
    assert cancelled > 300
    for user in users:
        assert [each.text for each in await store.turns(user)] == [
            f"{user} said {number}" for number in range(3)
        ]


async def test_a_task_that_only_talks_to_redis_ends_when_it_is_cancelled(store: Store) -> None:
    async def talk() -> None:
        while True:
            await store.append("ann", [turn("ann", 0)])

    for moment in range(300):
        task = asyncio.create_task(talk())
        for _ in range(moment % 60):
            await asyncio.sleep(0)
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=60)
        assert done, f"still running after a cancellation at moment {moment}"


@pytest.mark.parametrize("outcome", [None, RedisConnectionError("gone"), RedisTimeoutError("late")])
async def test_a_cancellation_that_the_client_drops_ends_the_task_all_the_same(
    store: Store, monkeypatch: pytest.MonkeyPatch, outcome: Exception | None
) -> None:
    """As in Python 3.11 when it arrives together with a message or an error."""

    async def drop(*_: object, **__: object) -> None:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        if outcome is not None:
            raise outcome

    async def listen() -> None:
        async with store.events() as events:
            monkeypatch.setattr(PubSub, "get_message", drop)
            listening.set()
            await anext(events)

    async def ask() -> None:
        monkeypatch.setattr(Redis, "ping", drop)
        listening.set()
        while True:
            with suppress(StoreUnavailable):
                await store.ping()

    for talk in (listen, ask):
        listening = asyncio.Event()
        task = asyncio.create_task(talk())
        await listening.wait()
        await asyncio.sleep(0)
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=10)
        assert done
        assert task.cancelled()


async def test_cancellations_use_up_no_connections(redis_url: str) -> None:
    client = connect(redis_url, max_connections=4)
    store = Store(client, SECRET)
    await store.append("ann", [turn("ann", 0)])
    for delay in range(300):
        task = asyncio.create_task(store.turns("ann"))
        await asyncio.sleep(delay * 1e-6)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert await asyncio.gather(*(store.turns("ann") for _ in range(8))) == [[turn("ann", 0)]] * 8
    await client.aclose()


async def test_no_acknowledged_turn_is_lost_when_redis_is_killed(
    fragile: Store, redis_server: RedisServer
) -> None:
    acknowledged: asyncio.Queue[str] = asyncio.Queue()

    async def write(user: str) -> None:
        for number in itertools.count():
            said = turn(user, number)
            await fragile.append(user, [said])
            acknowledged.put_nowait(said.id)

    promised: list[str] = []
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        writers = [group.create_task(write(f"user{number}")) for number in range(6)]
        for _ in range(3):
            promised += [await acknowledged.get() for _ in range(200)]
            redis_server.kill()
            redis_server.start()
        promised += [await acknowledged.get() for _ in range(200)]  # the writers went on by themselves
        for writer in writers:
            writer.cancel()
    promised += [acknowledged.get_nowait() for _ in range(acknowledged.qsize())]
    kept = [said.id for number in range(6) for said in await fragile.turns(f"user{number}")]
    assert set(promised) <= set(kept)
    assert len(kept) == len(set(kept))


async def test_a_call_waits_for_a_redis_that_comes_back(fragile: Store, redis_server: RedisServer) -> None:
    await fragile.append("ann", [turn("ann", 0)])
    redis_server.kill()
    waiting = asyncio.create_task(fragile.turns("ann"))
    await asyncio.sleep(0.3)
    assert not waiting.done()
    redis_server.start()
    assert await waiting == [turn("ann", 0)]


async def test_a_dead_redis_is_an_error_by_name_within_the_deadline(redis_server: RedisServer) -> None:
    store = Store(connect(redis_server.url), SECRET, deadline_s=0.3)
    redis_server.kill()
    with pytest.raises(StoreUnavailable, match=r"no answer within 0\.3 s"):  # and not after so many attempts
        await store.append("ann", [turn("ann", 0)])
    with pytest.raises(StoreUnavailable):
        async with store.events():
            pass
    await store.close()


async def test_a_redis_that_stays_dead_is_an_error_by_name_before_a_long_deadline(
    fragile: Store, redis_server: RedisServer
) -> None:
    await fragile.ping()
    redis_server.kill()
    with pytest.raises(StoreUnavailable) as caught:
        await fragile.ping()
    assert "no answer" not in caught.value.reason


async def test_a_stalled_redis_is_an_error_by_name_and_then_as_before(redis_server: RedisServer) -> None:
    store = Store(connect(redis_server.url), SECRET, deadline_s=1.5)
    await store.append("ann", [turn("ann", 0)])
    redis_server.stall()
    began = time.monotonic()
    with pytest.raises(StoreUnavailable, match=r"no answer within 1\.5 s"):
        await store.pointer("ann")
    assert time.monotonic() - began < 8.0  # by itself the client tries for longer than that
    redis_server.resume()
    assert await store.turns("ann") == [turn("ann", 0)]
    await store.close()


async def test_a_full_redis_refuses_writes_by_name_and_still_reads(
    fragile: Store, redis_server: RedisServer
) -> None:
    await fragile.append("ann", [turn("ann", 0)])
    client = connect(redis_server.url)
    await client.config_set("maxmemory", "1")
    with pytest.raises(StoreUnavailable, match="maxmemory"):
        await fragile.append("ann", [turn("ann", 1)])
    assert await fragile.turns("ann") == [turn("ann", 0)]
    await client.config_set("maxmemory", "0")
    assert await fragile.append("ann", [turn("ann", 1)]) == 1
    await client.aclose()


async def test_listeners_are_told_when_redis_was_away_and_hear_what_comes_after(
    fragile: Store, redis_server: RedisServer
) -> None:
    async with fragile.events() as events:
        await fragile.compare_and_set("ann", 0, 1)
        assert (await anext(events))["to"] == 1
        redis_server.kill()
        redis_server.start()
        assert await asyncio.wait_for(anext(events), 60) == {"type": "store.reconnected"}
        await fragile.compare_and_set("ann", 1, 2)
        assert (await anext(events))["to"] == 2


async def test_a_move_whose_answer_was_lost_is_the_same_success_when_sent_again(
    fragile: Store, redis_server: RedisServer
) -> None:
    """The server does the work while stalled replies time out, so the client sends the same call twice."""
    await fragile.compare_and_set("ann", 0, 1)
    redis_server.stall()
    moving = asyncio.create_task(fragile.compare_and_set("ann", 1, 2))
    await asyncio.sleep(1.3)  # past the first try's socket timeout: the second is on its way
    redis_server.resume()
    assert await moving is True
    assert (await fragile.pointer("ann")).version == 2
