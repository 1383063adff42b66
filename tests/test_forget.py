"""Forgetting: every place is emptied, in an order in which nothing comes back."""

import asyncio
from datetime import UTC, datetime
from pathlib import Path

import pytest
from redis.asyncio import Redis

from engine.client import EngineLost
from engine.request import Forgotten as EngineForgotten
from personalization.history import Turn
from personalization.publish import remove_versions
from personalization.store import Store, connect
from service.actions import Actions
from service.forget import forget, rewrite_log
from service.settings import Settings
from tests.redis_fixture import RedisServer


class Caches:
    """What an engine that holds two pages of one adapter answers."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def forget(self, adapter_id: str) -> EngineForgotten:
        self.asked.append(adapter_id)
        return EngineForgotten(device_slabs=2, host_bytes=100, kv_blocks=3)


def turn(number: int) -> Turn:
    at = datetime(2026, 1, 1, 0, number, tzinfo=UTC)
    return Turn(f"t{number}", "c", at, "user", f"said {number}", "person")


async def test_every_place_is_emptied_and_counted(store: Store, redis: Redis, tmp_path: Path) -> None:
    await store.append("ada", [turn(n) for n in range(3)])
    await store.append("bob", [turn(9)])
    mine, theirs = tmp_path / store.adapter_id("ada"), tmp_path / store.adapter_id("bob")
    for folder in (mine / "1", mine / "2", theirs / "1"):
        folder.mkdir(parents=True)
        (folder / "adapter_model.safetensors").write_bytes(b"x" * 10)

    class LastOfAll(Caches):
        async def forget(self, adapter_id: str) -> EngineForgotten:
            assert not mine.exists()  # else a request under way could read them again
            return await super().forget(adapter_id)

    caches = LastOfAll()
    cancelled: list[str] = []

    async def cancel_jobs(user: str) -> int:
        # By the time jobs are cancelled the history is gone, so a job that starts in between finds nothing.
        assert await store.turns(user) == []
        cancelled.append(user)
        return 1

    gone = await forget(
        "ada",
        store=store,
        redis=redis,
        engine=caches,
        cancel_jobs=cancel_jobs,
        remove_versions=lambda adapter_id: remove_versions(tmp_path, adapter_id),
    )
    assert (gone.turns, gone.conversations, gone.jobs) == (3, 1, 1)
    assert (gone.folders, gone.disk_bytes) == (2, 20)
    assert (gone.device_slabs, gone.host_bytes, gone.kv_blocks) == (2, 100, 3)
    assert caches.asked == [store.adapter_id("ada")]
    assert cancelled == ["ada"]
    assert not mine.exists()
    assert theirs.exists()
    assert [t.text for t in await store.turns("bob")] == ["said 9"]


async def test_a_person_nobody_knows_is_forgotten_without_fuss(
    store: Store, redis: Redis, tmp_path: Path
) -> None:
    async def no_jobs(user: str) -> int:
        return 0

    gone = await forget(
        "nobody",
        store=store,
        redis=redis,
        engine=Caches(),
        cancel_jobs=no_jobs,
        remove_versions=lambda adapter_id: remove_versions(tmp_path, adapter_id),
    )
    assert (gone.turns, gone.folders) == (0, 0)


async def test_the_file_is_rewritten_after_a_rewrite_that_began_before(redis_server: RedisServer) -> None:
    client = connect(redis_server.url)
    await client.bgrewriteaof()  # it may hold what was deleted since
    rewritten, state = await rewrite_log(client), await client.info("persistence")
    await client.aclose()
    assert rewritten
    assert not state["aof_rewrite_in_progress"]


async def test_a_server_that_may_not_rewrite_its_file_is_told_as_such() -> None:
    class Managed:
        async def info(self, section: str) -> dict[str, int]:
            return {"aof_rewrite_in_progress": 0, "aof_rewrite_scheduled": 0}

        async def bgrewriteaof(self) -> None:
            raise PermissionError("this command is not for you")

    assert await rewrite_log(Managed()) is False


async def test_an_engine_that_does_not_come_back_is_not_waited_for_long(
    store: Store, redis: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.forget.ENGINE_TIMEOUT_S", 0.1)

    class Away(Caches):
        async def forget(self, adapter_id: str) -> EngineForgotten:
            await asyncio.Event().wait()
            raise AssertionError

    async def cancel_jobs(user: str) -> int:
        return 0

    await store.append("ada", [turn(1)])
    with pytest.raises(EngineLost):
        async with asyncio.timeout(5):
            await forget(
                "ada",
                store=store,
                redis=redis,
                engine=Away(),
                cancel_jobs=cancel_jobs,
                remove_versions=lambda adapter_id: remove_versions(tmp_path, adapter_id),
            )
    assert await store.turns("ada") == []


async def test_all_that_needs_no_engine_is_removed_without_one(
    store: Store, redis: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewritten: list[object] = []

    async def noted(redis: object) -> bool:
        rewritten.append(redis)
        return True

    async def none() -> Caches:
        raise EngineLost("no engine answers")

    monkeypatch.setattr("service.forget.rewrite_log", noted)

    settings = Settings.read({}, data=tmp_path)
    mine = settings.adapter_root / store.adapter_id("ada") / "1"
    mine.mkdir(parents=True)
    await store.append("ada", [turn(1)])
    with pytest.raises(EngineLost, match="no engine answers"):
        await Actions(settings, store, redis, none).forget("ada")
    assert await store.turns("ada") == []
    assert not mine.parent.exists()
    assert rewritten == [redis]
