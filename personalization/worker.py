"""The worker: SAQ jobs, one per person, gathered into batches that share a stack.

    request_refresh → job refresh:<adapter id> → every waiting job of a moment joins one batch → refresh()

A job runs at least once. It heartbeats while it waits and works; when the worker dies, a sweep finds the
silent job and it runs again, up to three times. When the training process died under a batch, its people go
one by one next time, so that one person's trouble cannot fail the others twice. What fails for good is
kept in a list of dead letters.
"""

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import structlog
from dateutil.tz import tzlocal
from redis.asyncio import Redis
from redis.exceptions import RedisError
from saq import CronJob, Job, Status, Worker
from saq.types import PartialTimersDict

from engine.weights import read_config
from personalization.jobs import COUNTS, FUNCTION, WEEK_S, JobPolicy, RefreshQueue, request_refresh, tell
from personalization.lineage import marks
from personalization.pacing import SHARE
from personalization.prompt import Renderer
from personalization.publish import FREE_BYTES_FLOOR, Shelf, tidy
from personalization.refresh import Kit, Outcome, RefreshPolicy, refresh
from personalization.store import Store, connect, talking_to_redis
from personalization.trainer import Trainer, TrainerDied, TrainerSettings
from personalization.trial import TrialPolicy, settle
from personalization.when import When, due_tonight

log = structlog.get_logger()

NIGHT_KEY = "cron:run_nightly"  # as SAQ names it
NIGHT_S = 6 * 3600  # for everyone to be looked at: some milliseconds each


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """`data`: the adapters are in data/adapters, those that versions start from in data/population.
    `secret`: the store's. `nightly_hour`: local, None for never; those for whom it pays (`when`) are then
    refreshed, spread over `nightly_spread_s`."""

    data: Path
    redis_url: str
    model_folder: Path
    model_name: str
    secret: bytes
    policy: RefreshPolicy = field(default_factory=RefreshPolicy)
    jobs: JobPolicy = field(default_factory=JobPolicy)
    threads: int = 0
    device: str = "auto"
    lent: Path | None = None  # with the share and the bytes: see TrainerSettings
    training_share: float = SHARE
    training_bytes: int | None = None
    gather_s: float = 0.5  # at most, while it is not known how long a batch takes
    gather_people: int = 64
    background_people: int = 8  # at first
    background_s: float = 20.0
    background_after_s: float = 600.0
    sweep_s: int = 5
    idle_trainer_s: float = 600.0
    nightly_hour: int | None = 3
    when: When = field(default_factory=When)
    trial: TrialPolicy = field(default_factory=TrialPolicy)
    nightly_spread_s: float = 1800.0
    free_bytes_floor: int = FREE_BYTES_FLOOR


# ---------------------------------------------------------------- working


@dataclass(frozen=True, slots=True)
class _Waiting:
    job: Job
    user: str
    since: float  # by the monotonic clock
    ended: "asyncio.Future[Outcome]"


class Gatherer:
    """Collects the jobs that wait at the same time and refreshes their people in one batch.

    A batch begins once nobody has come for a moment: a twentieth of what the last batch took. So the wait
    for company costs the first one at most a tenth, where missing the batch would cost the second a whole
    one. Who asked is waiting for it, so those go first, and a batch of others is to take `background_s` at
    most, as who asks during it has to wait for its end: it is of `background_people` at first, then of as
    many as the last one's pace allows, but never more than twice as many as before. Where somebody always
    asks, the others have their turn once they have had none for `background_after_s`."""

    def __init__(
        self,
        kit: Kit,
        *,
        gather_s: float,
        people: int,
        background_people: int,
        background_s: float,
        background_after_s: float,
        idle_trainer_s: float,
        say_every_s: float = 0.5,
    ) -> None:
        self._kit = kit
        self._gather_s = gather_s
        self._people = people
        self._background_people = background_people
        self._background_s = background_s
        self._background_after_s = background_after_s
        self._background_at = 0.0  # when those who did not ask last had their turn
        self._idle_trainer_s = idle_trainer_s
        self._say_every_s = say_every_s
        self._waiting: list[_Waiting] = []
        self._arrived = asyncio.Event()
        self._batch_s = 0.0  # what the last batch took

    async def join(self, job: Job, user: str) -> Outcome:
        """Wait for a batch, and in it for this person's end. Raises what went wrong, if it may go better."""
        waiting = _Waiting(job, user, time.monotonic(), asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._arrived.set()
        return await waiting.ended

    async def run(self) -> None:
        """Batch after batch, until cancelled."""
        while True:
            gathered = await self._gather()
            # Whoever was in a batch that lost its process goes alone now: one of them did it.
            together = {each.user: each for each in gathered if not _broke_a_batch(each.job)}
            alone = [{each.user: each} for each in gathered if _broke_a_batch(each.job)]
            for batch in filter(None, (together, *alone)):
                log.info("refresh.batch", people=len(batch))
                began = time.monotonic()
                trained = await self._work(batch)
                self._batch_s = time.monotonic() - began
                if trained:
                    fit = min(2 * self._background_people, self._background_s * trained / self._batch_s)
                    self._background_people = max(1, min(self._people, int(fit)))

    async def _gather(self) -> list[_Waiting]:
        """The next batch: whoever waits when nobody has come for a moment."""
        if not self._waiting and not await self._arrival(self._idle_trainer_s):
            await self._kit.trainer.stop()  # it holds a model in memory that nobody needs just now
        if not self._waiting:
            await self._arrival(None)
        with contextlib.suppress(OSError):  # the batch will meet it again, and say so
            await self._kit.trainer.warm()
        moment = max(self._gather_s / 2, self._batch_s / 20)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2 * moment):
                while len(self._waiting) < self._people and await self._arrival(moment):
                    pass
        waiting = [each for each in self._waiting if not each.ended.done()]
        batch = self._next_batch(waiting, time.monotonic())
        self._waiting = [each for each in waiting if each not in batch]
        return batch

    def _next_batch(self, waiting: list[_Waiting], now: float) -> list[_Waiting]:
        asked = [each for each in waiting if (each.job.kwargs or {}).get("reason") == "asked"]
        others = [each for each in waiting if each not in asked]
        in_vain = max(self._background_at, min((each.since for each in others), default=now))
        if asked and now - in_vain < self._background_after_s:
            return _one_each(asked)[: self._people]
        self._background_at = now
        return _one_each(others)[: self._background_people]

    async def _arrival(self, seconds: float | None) -> bool:
        """Whether anyone comes within that time."""
        self._arrived.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._arrived.wait()
        except TimeoutError:
            return False
        return True

    async def _work(self, batch: dict[str, _Waiting]) -> int:
        """Refresh these people; how many of them were trained."""
        told: dict[str, tuple[str, float]] = {}
        trained = 0

        async def say(user: str, message: dict[str, Any]) -> None:
            state, (before, at) = message["state"], told.get(user, ("", 0.0))
            if state != before or time.monotonic() - at >= self._say_every_s:
                told[user] = (state, time.monotonic())
                await tell(self._kit.store, batch[user].job, message)

        async def end(outcome: Outcome) -> None:
            nonlocal trained
            trained += bool(outcome.numbers)
            waiting = batch[outcome.user]
            log.info(
                "refresh.ended", job=waiting.job.key, state=outcome.state, version=outcome.after,
                published=outcome.published, reason=outcome.reason,
            )  # fmt: skip
            if outcome.error is None:
                await tell(self._kit.store, waiting.job, outcome.message())
            if waiting.ended.done():  # cancelled: the worker stops
                return
            if outcome.error is None:
                waiting.ended.set_result(outcome)
            else:
                waiting.ended.set_exception(outcome.error)

        failure: BaseException = RuntimeError("the batch ended without this person")
        try:
            await refresh(list(batch), self._kit, say, end)
        except Exception as error:
            log.exception("refresh.batch_failed", people=len(batch))
            failure = error
        finally:
            for each in batch.values():
                if not each.ended.done():
                    each.ended.set_exception(failure)
        return trained


def _one_each(waiting: list[_Waiting]) -> list[_Waiting]:
    """The first job of each person; a second one, of who came back or was taken for lost, waits."""
    first: dict[str, _Waiting] = {}
    for each in waiting:
        first.setdefault(each.user, each)
    return list(first.values())


def _broke_a_batch(job: Job) -> bool:
    return TrainerDied.__name__ in (job.error or "")


async def run_refresh(
    context: dict[str, Any], *, user: str, reason: str, job_id: str, epoch: int
) -> dict[str, Any]:
    """The job: one person's refresh, in a batch with whoever else waits."""
    job: Job = context["job"]
    gatherer: Gatherer = context["gatherer"]
    async with _beating(job):
        outcome = await gatherer.join(job, user)
    return {
        "state": outcome.state,
        "code": outcome.code,
        "published": outcome.published,
        "from": outcome.before,
        "to": outcome.after,
    }


@contextlib.asynccontextmanager
async def _beating(job: Job) -> AsyncIterator[None]:
    """Keep the job's heartbeat going. SAQ counts a job without one as lost."""

    async def beat() -> None:
        while True:
            await asyncio.sleep(job.heartbeat / 3)
            with contextlib.suppress(RedisError, OSError):  # the next beat may get through
                await job.update()

    task = asyncio.create_task(beat())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def after_job(context: dict[str, Any]) -> None:
    """SAQ's hook after each attempt: count its end, bury what failed for good, tell of a new attempt."""
    job: Job = context["job"]
    queue: RefreshQueue = context["queue"]
    store: Store = context["store"]
    if job.function != FUNCTION:
        return
    if job.status == Status.FAILED:
        await queue.bury(job)
        await tell(store, job, _given_up(job))
    elif job.status == Status.QUEUED:
        await tell(store, job, {"state": "queued", "progress": 0.0})
    elif job.status == Status.COMPLETE and isinstance(job.result, dict):
        result = job.result
        end = "published" if result["published"] else result["code"] or "refused"
        await queue.client.hincrby(COUNTS, end, 1)


def _given_up(job: Job) -> dict[str, Any]:
    return {
        "state": "failed",
        "code": "refresh_failed",
        "message": f"the refresh failed {job.attempts} times and was given up",
    }


async def run_nightly(context: dict[str, Any]) -> int:
    """The nightly job: `ask_tonight`."""
    async with _beating(context["job"]):
        return await ask_tonight(context)


async def ask_tonight(context: dict[str, Any]) -> int:
    """Ask for everyone for whom it pays, in groups that are spread over a while; those who are expected to
    gain most come first. Trials that have lasted too long end. Returns how many were asked for."""
    settings: WorkerSettings = context["settings"]
    queue: RefreshQueue = context["queue"]
    store: Store = context["store"]
    now = datetime.now(UTC)
    gains = {}
    async for user in store.users():
        await settle(store, user, settings.trial, now)
        marked = await _is_marked(store, user)
        answer = due_tonight(await store.standing(user), now, settings.when, marked=marked)
        if answer.due:
            gains[user] = answer.gain
    due = sorted(gains, key=lambda user: (-gains[user], store.adapter_id(user)))
    groups = range(0, len(due), settings.gather_people)
    starts = sorted(time.time() + context["random"].uniform(0, settings.nightly_spread_s) for _ in groups)
    for first, at in zip(groups, starts, strict=True):
        for user in due[first : first + settings.gather_people]:
            await request_refresh(queue, store, user, "nightly", jobs=settings.jobs, scheduled=int(at))
    await tidy(context["shelf"], store)
    return len(due)


async def _is_marked(store: Store, user: str) -> bool:
    """Whether the version that answers, or one on trial, has seen a turn that may not be learned any more."""
    pointer = await store.pointer(user)
    marked = marks(await store.versions(user), await store.learned_ids(user))
    return not pointer.answering.isdisjoint(marked)


async def run_worker(settings: WorkerSettings) -> None:
    """Work until cancelled. Signals are the caller's."""
    redis, queue_redis = connect(settings.redis_url), _queue_client(settings.redis_url)
    store, queue = Store(redis, settings.secret), RefreshQueue(queue_redis)
    kit = await _kit(settings, store)
    gatherer = Gatherer(
        kit,
        gather_s=settings.gather_s,
        people=settings.gather_people,
        background_people=settings.background_people,
        background_s=settings.background_s,
        background_after_s=settings.background_after_s,
        idle_trainer_s=settings.idle_trainer_s,
    )
    context = {
        "gatherer": gatherer,
        "queue": queue,
        "store": store,
        "shelf": kit.shelf,
        "settings": settings,
        "random": random.Random(),
    }

    async def start(into: dict[str, Any]) -> None:
        into.update(context)

    async def bury_lost(job: Job) -> None:
        await queue.bury(job)
        await tell(store, job, _given_up(job))

    queue.on_lost = bury_lost
    worker = Worker(
        queue,
        functions=[run_refresh],
        concurrency=settings.gather_people,
        cron_jobs=_nightly(settings),
        cron_tz=tzlocal(),  # type: ignore[no-untyped-call]  # an offset would stay when summer time begins
        startup=start,
        after_process=after_job,
        timers=PartialTimersDict(sweep=settings.sweep_s, schedule=1, abort=1, worker_info=10),
        dequeue_timeout=5.0,
    )
    worker.SIGNALS = []
    gathering = asyncio.create_task(gatherer.run())
    try:
        await tidy(kit.shelf, store)
        await _drop_next_night(queue, settings)
        log.info("worker.ready", model=settings.model_name)
        await worker.start()
    finally:
        gathering.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await gathering
        await kit.trainer.stop()
        await store.close()
        await queue.disconnect()


async def _kit(settings: WorkerSettings, store: Store) -> Kit:
    config = await asyncio.to_thread(read_config, settings.model_folder)
    trainer = TrainerSettings(
        settings.model_folder,
        settings.threads,
        settings.device,
        lent=settings.lent,
        share=settings.training_share,
        device_bytes=settings.training_bytes,
    )
    return Kit(
        store,
        Shelf(settings.data / "adapters", config, settings.free_bytes_floor),
        await asyncio.to_thread(Renderer, settings.model_folder, config.max_position_embeddings),
        Trainer(trainer),
        settings.policy,
        settings.model_name,
        clock=lambda: datetime.now(UTC),
        population=settings.data / "population",
    )


async def _drop_next_night(queue: RefreshQueue, settings: WorkerSettings) -> None:
    """The night that the queue waits for is of the hour set when it was put there: it is put there anew, if
    there is to be one. One that is due already was missed, and is made up for, if there are to be any."""
    with talking_to_redis():
        job = await queue.job(NIGHT_KEY)
        if job is not None and (settings.nightly_hour is None or job.scheduled > time.time()):
            await queue.erase(NIGHT_KEY)


def _nightly(settings: WorkerSettings) -> list[CronJob[Any]]:
    if settings.nightly_hour is None:
        return []
    cron = f"0 {settings.nightly_hour} * * *"
    jobs = JobPolicy()
    return [
        CronJob(
            run_nightly, cron, timeout=NIGHT_S, heartbeat=jobs.heartbeat, retries=jobs.retries, ttl=WEEK_S
        )
    ]


def _queue_client(url: str) -> Redis:
    """A client for SAQ: blocking calls outlast the 5 s they wait, and nothing hangs for ever."""
    return Redis.from_url(url, socket_timeout=15.0, socket_connect_timeout=2.0, max_connections=256)
