"""The queue of refreshes: one job per person, asked for by the gateway, a command, the night or a history
that grew. The worker's side is in `worker.py`; this one needs no model and no arithmetic.

Keys beside SAQ's own: `attune:refresh:dead` (list of JSON, newest first), `attune:refresh:counts` (hash).
"""

import asyncio
import json
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import structlog
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError
from saq import Job, Status
from saq.job import TERMINAL_STATUSES
from saq.queue.redis import RedisQueue

from personalization.store import HistoryForgotten, Store, StoreUnavailable, talking_to_redis

log = structlog.get_logger()

QUEUE = "refresh"
FUNCTION = "run_refresh"
DEAD = "attune:refresh:dead"
COUNTS = "attune:refresh:counts"
DEAD_KEPT = 1000
WEEK_S = 7 * 24 * 3600
TRIED_AGAIN_AFTER_S = 24 * 3600

# KEYS: the dead letters, the counts. ARGV: a letter, the id of its job, how many are kept.
_BURY = """
for _, letter in ipairs(redis.call('LRANGE', KEYS[1], 0, -1)) do
  if cjson.decode(letter).job_id == ARGV[2] then return end
end
redis.call('LPUSH', KEYS[1], ARGV[1])
redis.call('LTRIM', KEYS[1], 0, ARGV[3] - 1)
redis.call('HINCRBY', KEYS[2], 'dead', 1)
"""

# KEYS: the queue, the jobs that have not ended. ARGV: a job's id. Marks it as asked for and moves it, if it
# waits in the queue, behind the others that were, which stand first; the queue may be long, so their end is
# looked for by halves.
_AHEAD = """
local mine = redis.call('GET', ARGV[1])
if not mine or not redis.call('ZSCORE', KEYS[2], ARGV[1]) then return end
redis.call('SET', ARGV[1], (string.gsub(mine, '"reason": "%a+"', '"reason": "asked"', 1)))
if redis.call('LREM', KEYS[1], -1, ARGV[1]) == 0 then return end
local first, past = 0, redis.call('LLEN', KEYS[1])
while first < past do
  local middle = math.floor((first + past) / 2)
  local job = redis.call('GET', redis.call('LINDEX', KEYS[1], middle)) or ''
  if string.find(job, '"reason": "asked"', 1, true) then first = middle + 1 else past = middle end
end
local behind = redis.call('LINDEX', KEYS[1], first)
if behind then
  redis.call('LINSERT', KEYS[1], 'BEFORE', behind, ARGV[1])
else
  redis.call('RPUSH', KEYS[1], ARGV[1])
end
"""


@dataclass(frozen=True, slots=True)
class JobPolicy:
    """SAQ's settings for one refresh, in seconds. `timeout` counts the wait for a batch too: those whom a
    worker took from the queue wait for each other, one by one where the model is slow. A worker that died is
    found by its heart, a training process that hangs by its silence."""

    timeout: int = 24 * 3600
    heartbeat: int = 30
    retries: int = 3
    retry_delay: float = 2.0
    retry_backoff: float = 60.0
    ttl: int = WEEK_S


@dataclass(frozen=True, slots=True)
class Requested:
    """A refresh that is under way: `state` is "queued", or what the earlier request for it has come to."""

    job_id: str
    state: str


def open_queue(redis: Any) -> "RefreshQueue":
    """The queue of refreshes on this Redis."""
    return RefreshQueue(redis, name=QUEUE)


def job_key(store: Store, user: str) -> str:
    return f"refresh:{store.adapter_id(user)}"


async def request_refresh(
    queue: "RefreshQueue",
    store: Store,
    user: str,
    reason: str,
    *,
    jobs: JobPolicy | None = None,
    scheduled: int = 0,
) -> Requested:
    """Ask for a refresh of `user`; a second request while the first is under way joins it, and puts it ahead
    if somebody asks for what nobody had asked for. One for now takes the place of one for later that has not
    begun. What failed for good is not begun again by the person's next words, but once somebody asks, by the
    night, or after a day.

    `reason`: asked | all | turns | nightly | sample. `scheduled`: epoch seconds from when on it may run, 0
    for now. Raises StoreUnavailable.
    """
    jobs = jobs or JobPolicy()
    key, job_id = job_key(store, user), uuid.uuid4().hex
    epoch = (await store.pointer(user)).epoch
    job = Job(
        function=FUNCTION,
        kwargs={"user": user, "reason": reason, "job_id": job_id, "epoch": epoch},
        key=key,
        timeout=jobs.timeout,
        heartbeat=jobs.heartbeat,
        retries=jobs.retries,
        retry_delay=jobs.retry_delay,
        retry_backoff=jobs.retry_backoff,
        ttl=jobs.ttl,
        scheduled=scheduled,
    )
    with talking_to_redis():
        last = await queue.job(key) if reason == "turns" else None
        if last is not None and _failed_lately(last):
            return Requested(str((last.kwargs or {})["job_id"]), "failed")
        queued = await queue.enqueue(job)
        earlier = None if queued else await queue.job(key)
        if earlier is not None and not scheduled and earlier.scheduled > time.time():
            await queue.erase(key)
            queued = await queue.enqueue(job)
        if reason == "asked" and (queued or earlier is None or not _is_asked(earlier)):
            await queue.put_ahead(key)
        earlier = None if queued else await queue.job(key)
    if queued:
        await tell(store, job, {"state": "queued", "progress": 0.0})
        if (await store.pointer(user)).epoch != epoch:  # forgotten meanwhile, perhaps before it was there
            await cancel_jobs(queue, store, user)
        return Requested(job_id, "queued")
    newest = await store.progress(user) or {}
    if earlier is None or earlier.kwargs is None:  # it ended this very moment
        return Requested(job_id, "queued")
    earlier_id = str(earlier.kwargs["job_id"])
    state = str(newest.get("state")) if newest.get("job_id") == earlier_id else "queued"
    return Requested(earlier_id, state)


async def cancel_jobs(queue: "RefreshQueue", store: Store, user: str) -> int:
    """Take everything the queue has of `user` out of it: waiting, running and finished jobs, dead letters.
    Returns how many jobs were waiting or running. Forget the person in the store first. Raises
    StoreUnavailable."""
    with talking_to_redis():
        await queue.forget_letters(store.adapter_id(user))
        return await queue.erase(job_key(store, user))


@dataclass(frozen=True, slots=True)
class QueueStats:
    """Jobs waiting, running, later; dead letters; `counts` of ends since the beginning."""

    queued: int
    active: int
    scheduled: int
    dead: int
    counts: dict[str, int]


async def queue_stats(queue: "RefreshQueue") -> QueueStats:
    """Raises StoreUnavailable."""
    try:
        queued, active, incomplete = [await queue.count(kind) for kind in ("queued", "active", "incomplete")]
        counts = await queue.client.hgetall(COUNTS)
        dead = await queue.client.llen(DEAD)
    except (RedisError, OSError) as error:
        raise StoreUnavailable(type(error).__name__) from error
    return QueueStats(
        queued,
        active,
        max(0, incomplete - queued - active),
        dead,
        {name.decode(): int(count) for name, count in counts.items()},
    )


async def dead_letters(queue: "RefreshQueue") -> list[dict[str, Any]]:
    """What failed for good, newest first: adapter id, job id, attempts, error, when."""
    return [json.loads(entry) for entry in await queue.client.lrange(DEAD, 0, -1)]


async def tell(store: Store, job: Job, message: dict[str, Any]) -> None:
    """Publish a refresh's progress to its person. Never fails the refresh: news may be lost."""
    kwargs = job.kwargs or {}
    told = {"job_id": kwargs["job_id"], "asked_by": kwargs["reason"], **message}
    try:
        await store.publish_progress(kwargs["user"], told, epoch=kwargs["epoch"])
    except HistoryForgotten:
        return
    except StoreUnavailable as error:
        log.warning("refresh.not_told", reason=error.reason)


def _failed_lately(job: Job) -> bool:
    return job.status == Status.FAILED and time.time() - job.completed / 1000 < TRIED_AGAIN_AFTER_S


def _is_asked(job: Job) -> bool:
    return (job.kwargs or {}).get("reason") == "asked"


class RefreshQueue(RedisQueue):
    """SAQ's queue, with seven differences.

    sweep     SAQ's own takes a job for lost that is in the active list without being marked active. Every job
              is, between leaving the queue and its worker's first word, and a worker that starts sweeps just
              then; it also waits 5 s for each lost job, one after another. Ours wants to see the same twice,
              at the same attempt.
    erase     takes a job out whatever its state; what its worker still writes of it is dropped.
    attempts  one that was taken for lost too early, and still goes on, writes nothing once a later one has
              begun or the job has ended; an ended job is in the queue no more.
    dequeue   one task at a time blocks on Redis, not one connection for each of a batch's jobs.
    bury      a job that failed for good becomes a dead letter.
    put_ahead a job that somebody asked for leaves the queue before those that nobody did.
    schedule  the same when its time has come to be tried again.
    """

    def __init__(self, redis: Any, name: str = QUEUE) -> None:
        super().__init__(redis, name=name)
        self.client: Any = redis  # redis-py's types say that a call may not be awaitable
        self._suspects: set[tuple[bytes, int]] = set()  # job ids, each with its attempts so far
        self._turn_to_wait = asyncio.Lock()
        self.on_lost: Callable[[Job], Awaitable[None]] | None = None  # a job lost at every attempt

    async def dequeue(self, timeout: float = 0.0, poll_interval: float = 0.0) -> Job | None:
        async with self._turn_to_wait:
            try:
                job = await super().dequeue(timeout, poll_interval)
            except (RedisConnectionError, RedisTimeoutError):
                await asyncio.sleep(0.5)  # Redis is away; SAQ would ask again at once
                return None
        if job is not None and job.status in TERMINAL_STATUSES:  # as it left the queue
            await self.client.lrem(self._active, 1, job.id)
            return None
        return job

    async def put_ahead(self, key: str) -> None:
        """Somebody asked for this job: let it leave the queue once all who asked before have left it."""
        await self.client.eval(_AHEAD, 2, self._queued, self._incomplete, self.job_id(key))

    async def schedule(self, lock: int = 1) -> list[str]:
        due = await super().schedule(lock)
        for key in map(self.job_key_from_id, due):
            job = await self.job(key)
            if job is not None and _is_asked(job):
                await self.put_ahead(key)
        return due

    async def sweep(self, lock: int = 60, abort: float = 5.0) -> list[str]:
        """Run lost jobs again, or end them when they were tried often enough. Returns their ids."""
        if not await self.client.set(self._sweep, 1, ex=max(1, int(lock)), nx=True):
            return []
        swept: list[str] = []
        unmarked: set[tuple[bytes, int]] = set()
        for job_id in await self.client.lrange(self._active, 0, -1):
            job = await self._get_job_by_id(job_id)
            marked = job is not None and job.status in (Status.ACTIVE, Status.ABORTING)
            suspect = (job_id, 0 if job is None else job.attempts)
            if not marked and suspect not in self._suspects:
                unmarked.add(suspect)
            elif job is None:
                await self._drop(job_id)
                swept.append(job_id.decode())
            elif not marked or job.stuck:
                await self._revive(job)
                swept.append(job_id.decode())
        self._suspects = unmarked
        return swept

    async def erase(self, key: str) -> int:
        """Remove a job; returns 1 if it was waiting or running."""
        return await self._drop(self.job_id(key))

    async def _drop(self, job_id: bytes | str) -> int:
        async with self.client.pipeline(transaction=True) as pipe:
            pipe.zrem(self._incomplete, job_id)
            pipe.lrem(self._queued, 0, job_id)
            pipe.lrem(self._active, 0, job_id)
            pipe.delete(job_id)
            return int((await pipe.execute())[0])

    async def _revive(self, job: Job) -> None:
        log.warning("refresh.lost", job=job.key, attempts=job.attempts)
        if job.retryable:
            await self.retry(job, "the worker was lost")
        else:
            await self.finish(job, Status.FAILED, error="the worker was lost at every attempt")
            if job.function == FUNCTION:
                await (self.on_lost or self.bury)(job)

    async def bury(self, job: Job) -> None:
        """Keep a job that failed for good, without anything a person wrote, unless it was erased. Once: its
        worker and the one that takes it for lost may both come to its end."""
        if await self._stored(job) is None:
            return
        kwargs = job.kwargs or {}
        reason = ((job.error or "").strip().splitlines() or ["unknown"])[-1]
        letter = {
            "adapter": job.key.removeprefix("refresh:"),
            "job_id": kwargs.get("job_id"),
            "attempts": job.attempts,
            "error": reason,
            "at": datetime.now(UTC).isoformat(),
        }
        job_id = str(kwargs.get("job_id"))
        await self.client.eval(_BURY, 2, DEAD, COUNTS, json.dumps(letter), job_id, DEAD_KEPT)

    async def forget_letters(self, adapter_id: str) -> None:
        for entry in await self.client.lrange(DEAD, 0, -1):
            if json.loads(entry)["adapter"] == adapter_id:
                await self.client.lrem(DEAD, 0, entry)

    async def _may_write(self, job: Job) -> bool:
        """Whether `job` is the stored one, at its newest attempt, and has not ended."""
        stored = await self._stored(job)
        return (
            stored is not None and stored.attempts <= job.attempts and stored.status not in TERMINAL_STATUSES
        )

    async def _stored(self, job: Job) -> Job | None:
        """What is stored of this job; None if it was erased, or a later one has its key. If somebody has
        asked for it meanwhile, `job` knows from now on."""
        stored = await self.job(job.key)
        if stored is None or (stored.kwargs or {}).get("job_id") != (job.kwargs or {}).get("job_id"):
            return None
        job.kwargs = stored.kwargs
        return stored

    async def update(self, job: Job, **kwargs: Any) -> None:
        if await self._may_write(job):
            await super().update(job, **kwargs)

    async def _retry(self, job: Job, error: str | None) -> None:
        if await self._may_write(job):
            await super()._retry(job, error)

    async def _finish(
        self, job: Job, status: Status, *, result: Any = None, error: str | None = None
    ) -> None:
        if await self._may_write(job):
            await self.client.lrem(self._queued, 0, job.id)
            await super()._finish(job, status, result=result, error=error)
