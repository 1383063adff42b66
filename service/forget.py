"""Forget a person: history, adapters, copies and jobs, in every place that has any.

The order matters. Redis goes first: from then on nothing that began before can write for this person (the
store's epoch). Then the jobs, the files, and only then the engine's copies, which a request under way could
have read again from the files. Last Redis' own file on disk, which would keep every deleted word until its
next rewrite. An engine that is away keeps nothing else from being removed.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import structlog

from engine.client import EngineLost
from engine.request import Forgotten as EngineForgotten
from personalization.store import Store

log = structlog.get_logger()
ENGINE_TIMEOUT_S = 20.0
REWRITE_TIMEOUT_S = 60.0
LOOK_EVERY_S = 0.05


class EngineCaches(Protocol):
    """The part of the engine's client that forgetting needs."""

    async def forget(self, adapter_id: str) -> EngineForgotten: ...


class RemovedFolder(Protocol):
    """What was in a person's folder."""

    @property
    def versions(self) -> int: ...

    @property
    def nbytes(self) -> int: ...


class RedisLog(Protocol):
    """The part of the Redis client that makes the server write its file anew."""

    async def bgrewriteaof(self) -> Any: ...

    async def info(self, section: str) -> Any: ...


@dataclass(frozen=True)
class Removed:
    """What was taken away, by place."""

    turns: int
    conversations: int
    versions: int
    responses: int
    jobs: int
    folders: int  # adapter versions on disk
    disk_bytes: int
    host_bytes: int
    device_slabs: int
    kv_blocks: int
    log_rewritten: bool  # False: a Redis that is not ours, or one too busy; it forgets at its next rewrite

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


async def forget(
    user: str,
    *,
    store: Store,
    redis: RedisLog,
    engine: EngineCaches,
    cancel_jobs: Callable[[str], Awaitable[int]],
    remove_versions: Callable[[str], RemovedFolder],
) -> Removed:
    """Remove everything of `user`; returns what was there. Doing it twice removes nothing more.

    `cancel_jobs` takes the person's jobs out of the queue and says how many; `remove_versions` takes the
    folder of an adapter id from the disk, in a thread. Raises StoreUnavailable, or EngineLost with all gone
    but what that engine may hold in its memory: do it again.
    """
    adapter_id = store.adapter_id(user)
    history = await store.forget(user)
    jobs = await cancel_jobs(user)
    folder = await asyncio.to_thread(remove_versions, adapter_id)
    try:
        copies = await _forgotten_by(engine, adapter_id)
    except EngineLost as error:
        await rewrite_log(redis)
        raise EngineLost(f"all is removed but what an engine may hold in memory: {error}") from None
    return Removed(
        turns=history.turns,
        conversations=history.conversations,
        versions=history.versions,
        responses=history.responses,
        jobs=jobs,
        folders=folder.versions,
        disk_bytes=folder.nbytes,
        host_bytes=copies.host_bytes,
        device_slabs=copies.device_slabs,
        kv_blocks=copies.kv_blocks,
        log_rewritten=await rewrite_log(redis),
    )


async def _forgotten_by(engine: EngineCaches, adapter_id: str) -> EngineForgotten:
    try:
        async with asyncio.timeout(ENGINE_TIMEOUT_S):
            return await engine.forget(adapter_id)
    except TimeoutError:
        raise EngineLost(f"the engine did not forget within {ENGINE_TIMEOUT_S:g} s") from None


async def rewrite_log(redis: RedisLog) -> bool:
    """Make Redis write its append-only file anew, from what it holds now; True once that is done."""
    try:
        async with asyncio.timeout(REWRITE_TIMEOUT_S):
            await _rewritten(redis)  # one that began earlier still holds what was deleted since
            await redis.bgrewriteaof()
            await _rewritten(redis)
            return str((await redis.info("persistence")).get("aof_last_bgrewrite_status")) == "ok"
    except Exception as error:  # what is left is Redis' own schedule; the person's keys are gone all the same
        log.warning("forget.log_not_rewritten", reason=str(error) or type(error).__name__)
        return False


async def _rewritten(redis: RedisLog) -> None:
    """Wait until no rewrite is under way."""
    while True:
        state = await redis.info("persistence")
        if not int(state["aof_rewrite_in_progress"]) and not int(state["aof_rewrite_scheduled"]):
            return
        await asyncio.sleep(LOOK_EVERY_S)
