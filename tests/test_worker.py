import asyncio
import contextlib
import dataclasses
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from redis.asyncio import Redis
from saq import Job, Status

from engine.weights import read_config
from personalization import worker
from personalization.gate import GatePolicy
from personalization.jobs import (
    JobPolicy,
    RefreshQueue,
    cancel_jobs,
    dead_letters,
    job_key,
    queue_stats,
    request_refresh,
    tell,
)
from personalization.prompt import Renderer
from personalization.publish import Shelf
from personalization.refresh import Kit, RefreshPolicy
from personalization.store import Store, StoreUnavailable, VersionRecord, connect
from personalization.train import Recipe
from personalization.trainer import Trainer, TrainerSettings
from personalization.when import When
from personalization.worker import Gatherer, WorkerSettings, after_job, ask_tonight, run_worker
from tests.redis_fixture import SECRET, RedisServer
from tests.small_model import save_small_model, talk

POLICY = RefreshPolicy(
    minimum_turns=20,
    gate_tokens=96,
    gate=GatePolicy(max_drift=100.0),  # a model this small is moved by anything
    row_tokens=32,
    recipe=Recipe(rank=4, alpha=8, learning_rate=5e-3, epochs=2, tokens_per_step=32),
)
SLOW = dataclasses.replace(POLICY, recipe=dataclasses.replace(POLICY.recipe, epochs=150))
# A heart that is missed for long only: a machine that pauses for some seconds loses no worker.
JOBS = JobPolicy(timeout=120, heartbeat=30, retries=3, retry_delay=0.1, retry_backoff=0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("small"))


@pytest.fixture
def settings(redis_url: str, folder: Path, tmp_path: Path) -> WorkerSettings:
    return WorkerSettings(
        data=tmp_path,
        redis_url=redis_url,
        model_folder=folder,
        model_name="small",
        secret=SECRET,
        policy=POLICY,
        jobs=JOBS,
        threads=1,
        device="cpu",
        gather_s=1.0,
        sweep_s=1,
        nightly_hour=None,
        free_bytes_floor=0,
    )


@pytest_asyncio.fixture
async def queue(redis_url: str) -> AsyncIterator[RefreshQueue]:
    client = Redis.from_url(redis_url)
    yield RefreshQueue(client)
    await client.aclose()


@contextlib.asynccontextmanager
async def working(settings: WorkerSettings) -> AsyncIterator["asyncio.Task[None]"]:
    task = asyncio.create_task(run_worker(settings))
    try:
        yield task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def until(true: Callable[[], Awaitable[Any]], *, seconds: float = 200.0) -> Any:
    """Wait until `true` gives something; fails after `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := await true():
            return found
        await asyncio.sleep(0.05)
    raise AssertionError(f"not within {seconds:g} s")


def is_in(store: Store, user: str, *states: str) -> Callable[[], Awaitable[Any]]:
    async def look() -> Any:
        progress = await store.progress(user)
        return progress if progress and progress["state"] in states else None

    return look


async def test_asking_twice_joins_the_first_request(queue: RefreshQueue, store: Store):
    await store.append("ann", talk("ann", 5))
    first = await request_refresh(queue, store, "ann", "asked")
    second = await request_refresh(queue, store, "ann", "turns")
    assert first.state == second.state == "queued"
    assert first.job_id == second.job_id
    assert (await queue_stats(queue)).queued == 1
    progress = await store.progress("ann")
    assert progress == {"job_id": first.job_id, "asked_by": "asked", "state": "queued", "progress": 0.0}
    job = await queue.job(job_key(store, "ann"))
    assert job is not None
    await tell(store, job, {"state": "training", "progress": 0.5})
    third = await request_refresh(queue, store, "ann", "asked")
    assert (third.job_id, third.state) == (first.job_id, "training")


async def test_a_redis_that_is_full_or_gone_is_an_error_by_name(redis_server: RedisServer):
    """It still reads while it is full, so the person's pointer says nothing of it."""
    client = connect(redis_server.url)
    queue, store = RefreshQueue(client), Store(client, SECRET)
    await store.append("ann", talk("ann", 5))
    await client.config_set("maxmemory", "1")
    with pytest.raises(StoreUnavailable, match="maxmemory"):
        await request_refresh(queue, store, "ann", "asked")
    await client.config_set("maxmemory", "0")
    await request_refresh(queue, store, "ann", "asked")
    redis_server.kill()
    with pytest.raises(StoreUnavailable):
        await cancel_jobs(queue, store, "ann")
    await client.aclose()


async def test_asking_ends_when_it_is_cancelled_though_the_client_drops_that(
    queue: RefreshQueue, store: Store, monkeypatch: pytest.MonkeyPatch
):
    """As in Python 3.11 when a cancellation arrives together with an answer."""
    asking = asyncio.Event()

    async def drop(*_: object) -> bool:
        asking.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        return True

    monkeypatch.setattr(queue, "enqueue", drop)
    task = asyncio.create_task(request_refresh(queue, store, "ann", "turns"))
    await asking.wait()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


async def test_people_who_ask_at_the_same_time_share_a_stack(
    settings: WorkerSettings, queue: RefreshQueue, store: Store
):
    for user in ("ann", "bob", "few"):
        await store.append(user, talk(user, 8 if user == "few" else 40))
        await request_refresh(queue, store, user, "asked", jobs=JOBS)
    patient = dataclasses.replace(settings, gather_s=4.0)
    async with store.events() as events, working(patient):
        seen: list[dict[str, Any]] = []

        async def collect() -> None:
            async for event in events:
                seen.append(event)

        collecting = asyncio.create_task(collect())
        for user in ("ann", "bob"):
            done = await until(is_in(store, user, "completed", "failed"))
            assert (done["published"], done["from"], done["to"]) == (True, 0, 1)
        refused = await until(is_in(store, "few", "failed"))
        for user in ("ann", "bob", "few"):  # The count of a job comes after what its person is told.
            await until(finished(queue, store, user))
        collecting.cancel()
    assert (refused["code"], refused["message"]) == (
        "not_enough_turns",
        "not enough turns yet: 8 of 20 to learn from",
    )
    kinds = [(event.get("user"), event.get("state"), event["type"]) for event in seen]
    # One batch: bob's training begins before ann has come to an end.
    assert kinds.index(("bob", "training", "adapter.refresh")) < kinds.index(("ann", None, "adapter.updated"))
    counts = (await queue_stats(queue)).counts
    assert counts == {"published": 2, "not_enough_turns": 1}
    assert await dead_letters(queue) == []


async def test_who_asks_goes_before_those_who_did_not_and_these_go_in_small_batches(
    settings: WorkerSettings, queue: RefreshQueue, store: Store
):
    others = [f"user{number}" for number in range(4)]
    for user in [*others, "ann"]:
        await store.append(user, talk(user, 25))
        await request_refresh(queue, store, user, "asked" if user == "ann" else "nightly", jobs=JOBS)
    few = dataclasses.replace(settings, background_people=2, background_s=0.001)
    seen: list[tuple[str, str]] = []
    async with store.events() as events, working(few):
        while len([state for _, state in seen if state == "completed"]) < 5:
            event = await asyncio.wait_for(anext(events), 200)
            if event.get("state") in ("training", "completed") and event.get("progress") in (0.0, 1.0):
                seen.append((event["user"], event["state"]))
    assert seen[0] == ("ann", "training")
    under_way: set[str] = set()
    for user, state in seen:
        under_way.add(user) if state == "training" else under_way.discard(user)
        assert len(under_way) <= 2
        assert "ann" not in under_way or under_way == {"ann"}


async def test_batches_of_those_who_did_not_ask_grow_while_they_are_fast(
    settings: WorkerSettings, queue: RefreshQueue, store: Store
):
    users = [f"user{number}" for number in range(7)]
    for user in users:
        await store.append(user, talk(user, 25))
        await request_refresh(queue, store, user, "nightly", jobs=JOBS)
    sizes = [0]
    fast = dataclasses.replace(settings, background_people=1, background_s=1000.0)  # by that measure
    async with store.events() as events, working(fast):
        ended: set[str] = set()
        while len(ended) < len(users):
            event = await asyncio.wait_for(anext(events), 200)
            if event.get("state") == "completed":
                ended.add(event["user"])
                sizes.append(0)
            elif event.get("state") == "training" and event.get("progress") == 0.0:
                sizes[-1] += 1
    assert [size for size in sizes if size] == [1, 2, 4]


async def test_asking_for_now_takes_the_place_of_a_job_for_later(queue: RefreshQueue, store: Store):
    await store.append("ann", talk("ann", 5))
    later = await request_refresh(queue, store, "ann", "nightly", scheduled=int(time.time()) + 600)
    now = await request_refresh(queue, store, "ann", "asked")
    assert now.job_id != later.job_id
    again = await request_refresh(queue, store, "ann", "nightly", scheduled=int(time.time()) + 600)
    assert again.job_id == now.job_id
    stats = await queue_stats(queue)
    assert (stats.queued, stats.scheduled) == (1, 0)


async def test_who_asks_leaves_the_queue_before_those_who_did_not_in_the_order_of_asking(
    queue: RefreshQueue, store: Store
):
    for user, reason in (("ann", "nightly"), ("bob", "turns"), ("cid", "asked"), ("dan", "asked")):
        await store.append(user, talk(user, 5))
        await request_refresh(queue, store, user, reason)
    jobs = [await queue.dequeue(timeout=1) for _ in range(4)]
    assert [job and job.key for job in jobs] == [
        job_key(store, user) for user in ("cid", "dan", "ann", "bob")
    ]
    assert (await queue_stats(queue)).queued == 0


async def test_who_asks_for_what_the_night_had_asked_for_need_not_wait_for_the_night(
    queue: RefreshQueue, store: Store
):
    for user, reason in (("ann", "nightly"), ("bob", "turns"), ("cid", "asked")):
        await store.append(user, talk(user, 5))
        await request_refresh(queue, store, user, reason)
    before = await queue.job(job_key(store, "bob"))
    joined = await request_refresh(queue, store, "bob", "asked")
    assert before is not None
    assert before.kwargs is not None
    assert joined.job_id == before.kwargs["job_id"]
    await request_refresh(queue, store, "cid", "asked")  # once more, and stays where it is
    jobs = [await queue.dequeue(timeout=1) for _ in range(3)]
    assert [job and job.key for job in jobs] == [job_key(store, user) for user in ("cid", "bob", "ann")]
    ann = jobs[2]
    assert ann is not None
    assert ann.kwargs is not None
    await request_refresh(queue, store, "ann", "asked")  # which a worker has by now
    assert (await queue_stats(queue)).queued == 0
    await ann.update()  # its heartbeat
    assert ann.kwargs["reason"] == "asked"
    await ann.finish(Status.COMPLETE)
    stored = await queue.job(ann.key)
    assert stored is not None
    assert stored.status == Status.COMPLETE


async def test_what_somebody_asked_for_is_tried_again_before_what_nobody_asked_for(
    queue: RefreshQueue, store: Store
):
    for user, reason in (("ann", "asked"), ("bob", "nightly")):
        await store.append(user, talk(user, 5))
        await request_refresh(queue, store, user, reason, jobs=JOBS)
    job = await queue.dequeue(timeout=1)
    assert job is not None
    await job.retry("cancelled")  # as when the worker is started anew
    await until(queue.schedule)
    jobs = [await queue.dequeue(timeout=1) for _ in range(2)]
    assert [job and job.key for job in jobs] == [job_key(store, user) for user in ("ann", "bob")]


def finished(queue: RefreshQueue, store: Store, user: str) -> Callable[[], Awaitable[Any]]:
    async def look() -> Any:
        job = await queue.job(job_key(store, user))
        return job if job is not None and job.completed else None

    return look


async def test_a_worker_killed_in_the_middle_is_made_up_for_exactly_once(
    settings: WorkerSettings, queue: RefreshQueue, store: Store, tmp_path: Path
):
    await store.append("ann", talk("ann", 40))
    # Only the missing heartbeats can tell of it: the job's own time is longer than this waits.
    jobs = dataclasses.replace(JOBS, timeout=3600, heartbeat=5)
    requested = await request_refresh(queue, store, "ann", "asked", jobs=jobs)
    first = await start_process(dataclasses.replace(settings, policy=SLOW), tmp_path)
    progress = await until(is_in(store, "ann", "training"))
    await until(lambda: more_than(store, "ann", progress["progress"]))
    trainers = children(first.pid)
    os.kill(first.pid, signal.SIGKILL)
    await first.wait()
    async with working(settings):
        done = await until(is_in(store, "ann", "completed"))
        job = await until(finished(queue, store, "ann"))
    assert done["job_id"] == requested.job_id
    assert (done["published"], done["to"]) == (True, 1)
    assert (job.status, job.attempts) == (Status.COMPLETE, 2)
    assert [record.version for record in await store.versions("ann")] == [1]
    stats = await queue_stats(queue)
    assert (stats.queued, stats.active, stats.counts) == (0, 0, {"published": 1})
    assert trainers
    assert not [pid for pid in trainers if alive(pid)]


async def more_than(store: Store, user: str, share: float) -> bool:
    progress = await store.progress(user)
    return progress is not None and progress["progress"] > share


async def start_process(settings: WorkerSettings, tmp_path: Path) -> asyncio.subprocess.Process:
    """A worker in a process of its own."""
    script = tmp_path / "worker.py"
    script.write_text(
        "import asyncio\n"
        "import datetime\n"
        "from pathlib import Path, PosixPath\n"
        "from personalization.gate import GatePolicy\n"
        "from personalization.jobs import JobPolicy\n"
        "from personalization.refresh import RefreshPolicy\n"
        "from personalization.train import Recipe\n"
        "from personalization.trial import TrialPolicy\n"
        "from personalization.when import When\n"
        "from personalization.worker import WorkerSettings, run_worker\n"
        f"asyncio.run(run_worker({settings!r}))\n"
    )
    root = Path(__file__).parent.parent
    return await asyncio.create_subprocess_exec(
        sys.executable, str(script), env={**os.environ, "PYTHONPATH": str(root)}
    )


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False


async def test_a_job_that_always_fails_ends_as_a_dead_letter(
    settings: WorkerSettings, queue: RefreshQueue, store: Store
):
    await store.append("ann", talk("ann", 40))
    shelf = settings.data / "adapters"
    shelf.mkdir()
    (shelf / store.adapter_id("ann")).write_text("a file where the folder should be")
    requested = await request_refresh(queue, store, "ann", "asked", jobs=JOBS)
    async with working(settings):
        failed = await until(is_in(store, "ann", "failed"))
    assert failed["code"] == "refresh_failed"
    assert failed["message"] == "the refresh failed 3 times and was given up"
    (letter,) = await dead_letters(queue)
    assert letter["job_id"] == requested.job_id
    assert letter["attempts"] == 3
    assert letter["adapter"] == store.adapter_id("ann")
    assert "ann" not in str(letter)
    assert "Error" in letter["error"]
    assert (await queue_stats(queue)).dead == 1
    assert await store.learned_since_refresh("ann") == 40
    again = await request_refresh(queue, store, "ann", "asked", jobs=JOBS)
    assert again.job_id != requested.job_id


async def test_what_failed_for_good_is_not_tried_again_at_the_persons_next_word(
    queue: RefreshQueue, store: Store, monkeypatch: pytest.MonkeyPatch
):
    async def fail(reason: str) -> str:
        asked = await request_refresh(queue, store, "ann", reason, jobs=JOBS)
        assert asked.state == "queued"
        job = await queue.dequeue(timeout=1)
        assert job is not None
        await job.update(status=Status.ACTIVE, started=1, attempts=1)
        await job.finish(Status.FAILED, error="the training process ended before its batch did")
        return asked.job_id

    await store.append("ann", talk("ann", 5))
    failed = await fail("turns")
    again = await request_refresh(queue, store, "ann", "turns", jobs=JOBS)
    assert (again.job_id, again.state) == (failed, "failed")
    assert (await queue_stats(queue)).queued == 0
    for reason in ("asked", "nightly"):
        await fail(reason)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 25 * 3600)
    await fail("turns")


async def test_a_job_that_two_workers_bury_is_one_dead_letter(queue: RefreshQueue, store: Store):
    """Its own, and one that took it for lost as the first was late."""
    await store.append("ann", talk("ann", 5))
    for _ in range(2):
        await request_refresh(queue, store, "ann", "asked", jobs=JOBS)
        job = await queue.dequeue(timeout=1)
        assert job is not None
        for _ in range(2):
            await queue.bury(job)
        await job.finish(Status.FAILED, error="the disk is full")
    first, second = await dead_letters(queue)
    assert first["job_id"] != second["job_id"]
    assert (await queue_stats(queue)).dead == 2


async def test_who_breaks_the_training_process_fails_alone(
    settings: WorkerSettings, queue: RefreshQueue, store: Store
):
    for user in ("ann", "bob", "cid"):
        await store.append(user, talk(user, 40))
        await request_refresh(queue, store, user, "asked", jobs=JOBS)
    serving = settings.data / "adapters" / store.adapter_id("ann") / "1"
    serving.mkdir(parents=True)
    (serving / "attune.json").write_text("[]")  # ends the process that reads it
    await store.next_version("ann")
    await store.add_version("ann", VersionRecord(1, 0, datetime.now(UTC), True, "better"))
    await store.compare_and_set("ann", 0, 1)
    async with working(settings):
        ends = [await until(is_in(store, user, "completed", "failed")) for user in ("bob", "cid", "ann")]
    assert [end["state"] for end in ends] == ["completed", "completed", "failed"]
    assert [letter["adapter"] for letter in await dead_letters(queue)] == [store.adapter_id("ann")]


async def test_a_job_that_comes_behind_the_forget_of_its_person_does_not_stay(
    queue: RefreshQueue, store: Store, monkeypatch: pytest.MonkeyPatch
):
    enqueue = queue.enqueue

    async def late(job: Job) -> Job | None:
        await store.forget("ann")
        await cancel_jobs(queue, store, "ann")
        return await enqueue(job)

    monkeypatch.setattr(queue, "enqueue", late)
    await request_refresh(queue, store, "ann", "turns")
    assert await queue.job(job_key(store, "ann")) is None


async def test_a_job_that_fails_after_its_person_was_forgotten_leaves_no_letter(
    queue: RefreshQueue, store: Store
):
    await store.append("ann", talk("ann", 5))
    await request_refresh(queue, store, "ann", "asked", jobs=JOBS)
    job = await queue.dequeue(timeout=1)
    assert job is not None
    await store.forget("ann")
    await cancel_jobs(queue, store, "ann")
    await job.finish(Status.FAILED, error="the disk is full")
    await after_job({"job": job, "queue": queue, "store": store})
    assert await dead_letters(queue) == []


async def test_someone_who_waits_twice_comes_to_both_ends(
    settings: WorkerSettings, queue: RefreshQueue, store: Store
):
    """As who is forgotten and comes back, or whose job was taken for lost, while a batch is on."""
    await store.append("ann", talk("ann", 5))
    await request_refresh(queue, store, "ann", "asked", jobs=JOBS)
    job = await queue.dequeue(timeout=1)
    assert job is not None
    async with gathering(settings, store) as gatherer, asyncio.timeout(200):
        ends = await asyncio.gather(gatherer.join(job, "ann"), gatherer.join(job, "ann"))
    assert [end.code for end in ends] == ["not_enough_turns"] * 2


async def test_where_somebody_always_asks_the_others_have_their_turn_too(
    settings: WorkerSettings, queue: RefreshQueue, store: Store
):
    jobs = {}
    for user, reason in (("ann", "asked"), ("bob", "asked"), ("cid", "nightly")):
        await store.append(user, talk(user, 5))
        await request_refresh(queue, store, user, reason, jobs=JOBS)
        jobs[user] = await queue.dequeue(timeout=1)
    async with gathering(settings, store, background_after_s=0.5) as gatherer, asyncio.timeout(200):

        async def keep_asking(user: str) -> None:
            while True:
                await gatherer.join(jobs[user], user)

        # Twice each, so that one of them waits whenever the other's batch ends.
        asking = [asyncio.create_task(keep_asking(user)) for user in ("ann", "bob", "ann", "bob")]
        assert (await gatherer.join(jobs["cid"], "cid")).code == "not_enough_turns"
        for task in asking:
            task.cancel()


@contextlib.asynccontextmanager
async def gathering(
    settings: WorkerSettings, store: Store, *, background_after_s: float = 600.0
) -> AsyncIterator[Gatherer]:
    config = read_config(settings.model_folder)
    trainer = Trainer(TrainerSettings(settings.model_folder, threads=1, device="cpu"))
    renderer = Renderer(settings.model_folder, config.max_position_embeddings)
    shelf = Shelf(settings.data / "adapters", config, 0)
    kit = Kit(store, shelf, renderer, trainer, POLICY, "small", lambda: datetime.now(UTC))
    gatherer = Gatherer(
        kit, gather_s=0.2, people=4, background_people=4, background_s=9,
        background_after_s=background_after_s, idle_trainer_s=60,
    )  # fmt: skip
    running = asyncio.create_task(gatherer.run())
    try:
        yield gatherer
    finally:
        running.cancel()
        await trainer.stop()


def test_nobody_is_given_up_before_their_turn_can_come(settings: WorkerSettings):
    """Where learning is slow and somebody always asks, those who did not go one by one, now and then."""
    usual = WorkerSettings(settings.data, settings.redis_url, settings.model_folder, "small", SECRET)
    in_line = usual.gather_people * usual.background_after_s
    assert usual.jobs.timeout > in_line
    assert JobPolicy() == usual.jobs


async def test_someone_forgotten_during_training_leaves_nothing_and_the_others_are_served(
    settings: WorkerSettings, queue: RefreshQueue, store: Store, redis: Redis
):
    slow = dataclasses.replace(SLOW, recipe=dataclasses.replace(SLOW.recipe, epochs=15))
    for user in ("ann", "bob"):
        await store.append(user, talk(user, 40))
        await request_refresh(queue, store, user, "asked", jobs=JOBS)
    async with working(dataclasses.replace(settings, policy=slow)):
        await until(is_in(store, "ann", "training"))
        await store.forget("ann")
        assert await cancel_jobs(queue, store, "ann") == 1
        await until(is_in(store, "bob", "completed"))
        await asyncio.sleep(0.5)  # whatever ann's job still does, it does now
    adapter_id = store.adapter_id("ann")
    assert (await store.pointer("ann")).version == 0
    assert not (settings.data / "adapters" / adapter_id).exists()
    left = [key.decode() async for key in redis.scan_iter(f"*{adapter_id}*")]
    assert left == [f"attune:life:{adapter_id}"]
    assert await store.progress("ann") is None
    assert await cancel_jobs(queue, store, "ann") == 0


async def test_a_cancelled_job_that_waits_is_never_run(queue: RefreshQueue, store: Store):
    for user in ("ann", "bob"):
        await store.append(user, talk(user, 5))
        await request_refresh(queue, store, user, "asked", jobs=JOBS)
    assert await cancel_jobs(queue, store, "ann") == 1
    job = await queue.dequeue(timeout=1)
    assert job is not None
    assert job.key == job_key(store, "bob")
    assert (await queue_stats(queue)).queued == 0
    again = await request_refresh(queue, store, "ann", "asked")
    assert again.state == "queued"


async def test_stopping_the_worker_puts_its_job_back(
    settings: WorkerSettings, queue: RefreshQueue, store: Store
):
    await store.append("ann", talk("ann", 40))
    await request_refresh(queue, store, "ann", "asked", jobs=JOBS)
    async with working(dataclasses.replace(settings, policy=SLOW)):
        await until(is_in(store, "ann", "training"))
    job = await queue.job(job_key(store, "ann"))
    assert job is not None
    assert (job.status, job.error) == (Status.QUEUED, "cancelled")
    assert (await queue_stats(queue)).active == 0


async def test_the_sweep_leaves_a_job_alone_whose_worker_is_just_starting_it(
    queue: RefreshQueue, store: Store
):
    await store.append("ann", talk("ann", 5))
    await request_refresh(queue, store, "ann", "asked", jobs=JOBS)
    job = await queue.dequeue(timeout=1)
    assert job is not None
    assert await queue.sweep(lock=1) == []  # taken from the queue, its worker has not said a word yet
    await job.update(status=Status.ACTIVE, started=int(time.time() * 1000))
    await asyncio.sleep(1.1)
    assert await queue.sweep(lock=1) == []
    assert (await queue_stats(queue)).active == 1


async def test_the_sweep_brings_back_a_job_whose_worker_never_said_a_word(queue: RefreshQueue, store: Store):
    await store.append("ann", talk("ann", 5))
    await request_refresh(queue, store, "ann", "asked", jobs=JOBS)
    assert await queue.dequeue(timeout=1) is not None
    assert await queue.sweep(lock=1) == []
    await asyncio.sleep(1.1)
    assert await queue.sweep(lock=1) == [queue.job_id(job_key(store, "ann"))]
    assert (await queue_stats(queue)).active == 0


async def test_the_sweep_clears_away_what_stands_for_a_job_that_is_gone(queue: RefreshQueue, store: Store):
    await store.append("ann", talk("ann", 5))
    await request_refresh(queue, store, "ann", "asked", jobs=JOBS)
    job = await queue.dequeue(timeout=1)
    assert job is not None
    await queue.client.delete(job.id)  # as when its time to live has passed
    assert await queue.sweep(lock=1) == []
    await asyncio.sleep(1.1)
    assert await queue.sweep(lock=1) == [job.id]
    assert (await queue_stats(queue)).active == 0


async def begun(queue: RefreshQueue) -> Job:
    """The next job, in the hands of a worker."""
    job = await queue.dequeue(timeout=1)
    assert job is not None
    await job.update(status=Status.ACTIVE, started=int(time.time() * 1000), attempts=job.attempts + 1)
    return job


async def test_the_sweep_does_not_take_the_next_attempt_for_the_one_it_suspected(
    queue: RefreshQueue, store: Store
):
    await store.append("ann", talk("ann", 5))
    await request_refresh(queue, store, "ann", "asked", jobs=dataclasses.replace(JOBS, retry_delay=0.0))
    first = await queue.dequeue(timeout=1)
    assert first is not None
    assert await queue.sweep(lock=1) == []
    await first.update(status=Status.ACTIVE, started=int(time.time() * 1000), attempts=1)
    await first.retry("it failed")
    assert await queue.dequeue(timeout=1) is not None
    await asyncio.sleep(1.1)
    assert await queue.sweep(lock=1) == []
    await asyncio.sleep(1.1)
    assert await queue.sweep(lock=1) == [first.id]


async def test_an_attempt_that_was_taken_for_lost_too_early_changes_nothing_of_the_next_one(
    queue: RefreshQueue, store: Store
):
    await store.append("ann", talk("ann", 5))
    jobs = dataclasses.replace(JOBS, retries=2, retry_delay=0.0)
    requested = await request_refresh(queue, store, "ann", "asked", jobs=jobs)
    slow = await begun(queue)
    slow.touched = 1
    await queue.retry(slow, "the worker was lost")
    last = await begun(queue)
    await slow.retry("cancelled")
    await slow.finish(Status.COMPLETE)
    stats = await queue_stats(queue)
    assert (stats.queued, stats.active) == (0, 1)
    await last.finish(Status.FAILED, error="it failed")
    await slow.update()
    await slow.retry("cancelled")
    await last.retry("cancelled")
    stored = await queue.job(job_key(store, "ann"))
    assert stored is not None
    assert stored.status == Status.FAILED
    again = await request_refresh(queue, store, "ann", "asked", jobs=jobs)
    assert again.job_id != requested.job_id


async def test_a_job_that_ended_while_it_stood_in_line_again_is_not_run(queue: RefreshQueue, store: Store):
    await store.append("ann", talk("ann", 5))
    await request_refresh(queue, store, "ann", "asked", jobs=dataclasses.replace(JOBS, retry_delay=0.0))
    slow = await begun(queue)
    await queue.retry(slow, "the worker was lost")
    await slow.finish(Status.COMPLETE)
    assert (await queue_stats(queue)).queued == 0
    await queue.client.rpush(queue.namespace("queued"), slow.id)  # as one that left the queue just before
    assert await queue.dequeue(timeout=1) is None
    stats = await queue_stats(queue)
    assert (stats.queued, stats.active) == (0, 0)


async def test_a_job_lost_at_every_attempt_ends_as_a_dead_letter(queue: RefreshQueue, store: Store):
    await store.append("ann", talk("ann", 5))
    await request_refresh(queue, store, "ann", "asked", jobs=dataclasses.replace(JOBS, retries=1))
    job = await queue.dequeue(timeout=1)
    assert job is not None
    long_ago = int(time.time() * 1000) - 200_000
    await job.update(status=Status.ACTIVE, started=long_ago, attempts=1)
    assert await queue.sweep(lock=1) == [job.id]
    (letter,) = await dead_letters(queue)
    assert letter["error"] == "the worker was lost at every attempt"


async def test_a_lost_night_is_no_dead_letter_and_stops_no_sweep(
    settings: WorkerSettings, queue: RefreshQueue, store: Store
):
    await store.append("ann", talk("ann", 5))
    night = Job(function="run_nightly", key="cron:run_nightly", timeout=600)
    await queue.enqueue(night)
    await request_refresh(queue, store, "ann", "nightly", jobs=dataclasses.replace(JOBS, retries=1))
    for _ in range(2):
        job = await queue.dequeue(timeout=1)
        assert job is not None
        await job.update(status=Status.ACTIVE, started=1, attempts=1)
    async with working(dataclasses.replace(settings, sweep_s=3600)):  # the one sweep that it begins with
        await until(is_in(store, "ann", "failed"))
    (letter,) = await dead_letters(queue)
    assert letter["adapter"] == store.adapter_id("ann")


async def test_an_erased_job_cannot_be_written_back_by_its_worker(queue: RefreshQueue, store: Store):
    await store.append("ann", talk("ann", 5))
    await request_refresh(queue, store, "ann", "asked", jobs=JOBS)
    job = await queue.dequeue(timeout=1)
    assert job is not None
    await cancel_jobs(queue, store, "ann")
    await job.update()
    await job.retry("cancelled")
    await job.finish(Status.COMPLETE)
    assert await queue.job(job_key(store, "ann")) is None
    later = await request_refresh(queue, store, "ann", "asked", jobs=JOBS)
    await job.finish(Status.COMPLETE)
    stored = await queue.job(job_key(store, "ann"))
    assert stored is not None
    assert stored.kwargs is not None
    assert (stored.kwargs["job_id"], stored.status) == (later.job_id, Status.QUEUED)


async def test_the_night_asks_for_those_for_whom_it_pays_those_who_gain_most_first(
    settings: WorkerSettings, queue: RefreshQueue, store: Store
):
    for number in range(5):
        await store.append(f"user{number}", talk(f"user{number}", 25 + 5 * number))
    await store.append("few", talk("few", 5))
    seen = talk("user0", 25)
    await store.mark_refreshed("user0", [turn.id for turn in seen])

    class Twice:
        """One early and one late moment."""

        def __init__(self) -> None:
            self.moments = [0.9, 0.1]

        def uniform(self, low: float, high: float) -> float:
            return low + (high - low) * self.moments.pop(0)

    context = {
        "settings": dataclasses.replace(
            settings, gather_people=3, nightly_spread_s=100.0, when=When(minimum_turns=20)
        ),
        "store": store,
        "queue": queue,
        "shelf": Shelf(settings.data / "adapters", read_config(settings.model_folder)),
        "random": Twice(),
    }
    before = time.time()
    assert await ask_tonight(context) == 4
    after = time.time()
    jobs = [await queue.job(job_key(store, f"user{number}")) for number in range(1, 5)]
    assert await queue.job(job_key(store, "user0")) is None
    assert await queue.job(job_key(store, "few")) is None
    at = [job.scheduled for job in jobs if isinstance(job, Job)]
    assert len(at) == 4
    assert before + 89 <= at[0] <= after + 90
    assert all(before + 9 <= early <= after + 10 for early in at[1:])
    assert (await queue_stats(queue)).scheduled == 4


async def test_the_night_asks_for_whose_version_came_of_one_that_saw_what_was_taken_out(
    settings: WorkerSettings, queue: RefreshQueue, store: Store
):
    context = {
        "settings": settings,
        "store": store,
        "queue": queue,
        "shelf": Shelf(settings.data / "adapters", read_config(settings.model_folder)),
        "random": random.Random(0),
    }
    ids = [turn.id for turn in talk("ann", 40)]
    await store.append("ann", talk("ann", 40))
    await store.mark_refreshed("ann", ids)
    for version, seen in ((1, ids[:20]), (2, ids[20:30]), (3, ids[30:])):  # one refused, one carried on
        assert await store.next_version("ann") == version
        record = VersionRecord(
            version, int(version == 3), datetime.now(UTC), version != 2, "", {}, 1, tuple(seen)
        )
        await store.add_version("ann", record)
    await store.compare_and_set("ann", 0, 3)
    await store.remove_turn("ann", ids[25])  # only the refused one saw it
    assert await ask_tonight(context) == 0
    await store.remove_turn("ann", ids[5])
    assert await ask_tonight(context) == 1
    await store.compare_and_set("ann", 3, 0)
    await cancel_jobs(queue, store, "ann")
    assert await ask_tonight(context) == 0


async def test_a_night_that_the_store_was_away_for_a_moment_in_is_gone_through_again(
    settings: WorkerSettings, queue: RefreshQueue, monkeypatch: pytest.MonkeyPatch
):
    asked = 0

    async def away_at_first(context: dict[str, Any]) -> int:
        nonlocal asked
        asked += 1
        if asked == 1:
            raise StoreUnavailable("away")
        return 0

    async def again() -> bool:
        return asked == 2

    monkeypatch.setattr(worker, "ask_tonight", away_at_first)
    async with working(dataclasses.replace(settings, nightly_hour=3)):
        job = await until(lambda: queue.job("cron:run_nightly"))
        await queue.client.zadd(queue._incomplete, {job.id: 1})  # it is three o'clock
        await until(again, seconds=30)


@pytest.mark.parametrize("later", [5, None])
async def test_another_hour_for_the_night_holds_from_the_next_night_on(
    settings: WorkerSettings, queue: RefreshQueue, later: int | None
):
    async with working(dataclasses.replace(settings, nightly_hour=3)):
        await until(lambda: queue.job("cron:run_nightly"))

    async def moved() -> bool:
        job = await queue.job("cron:run_nightly")
        hour = None if job is None else datetime.fromtimestamp(job.scheduled).hour
        return hour == later

    async with working(dataclasses.replace(settings, nightly_hour=later)):
        await until(moved, seconds=30)


async def test_a_night_that_was_missed_is_made_up_for(
    settings: WorkerSettings, queue: RefreshQueue, monkeypatch: pytest.MonkeyPatch
):
    asked = asyncio.Event()

    async def ask(context: dict[str, Any]) -> int:
        asked.set()
        return 0

    monkeypatch.setattr(worker, "ask_tonight", ask)
    missed = int(time.time()) - 600
    await queue.enqueue(Job(function="run_nightly", key="cron:run_nightly", scheduled=missed, timeout=600))
    async with working(dataclasses.replace(settings, nightly_hour=3)):
        await asyncio.wait_for(asked.wait(), 30)


async def test_a_night_that_was_missed_is_not_made_up_for_where_there_are_to_be_none(
    settings: WorkerSettings, queue: RefreshQueue
):
    missed = int(time.time()) - 600
    await queue.enqueue(Job(function="run_nightly", key="cron:run_nightly", scheduled=missed, timeout=600))

    async def gone() -> bool:
        return await queue.job("cron:run_nightly") is None  # a failed one would stay for a while

    async with working(dataclasses.replace(settings, nightly_hour=None)):
        await until(gone, seconds=10)


async def test_the_night_begins_at_its_hour_after_the_clocks_were_put_forward_too(
    settings: WorkerSettings, queue: RefreshQueue, monkeypatch: pytest.MonkeyPatch
):
    now = datetime.now(UTC)
    change = now + timedelta(hours=1)  # from then on the local time is an hour ahead of UTC
    first, last = change.timetuple().tm_yday - 1, (change + timedelta(days=60)).timetuple().tm_yday - 1
    monkeypatch.setenv("TZ", f"AAA0BBB,{first}/{change:%H:%M},{last}")
    time.tzset()
    hour = (now + timedelta(hours=4)).replace(minute=0, second=0, microsecond=0)
    try:
        async with working(dataclasses.replace(settings, nightly_hour=hour.hour)):
            job = await until(lambda: queue.job("cron:run_nightly"))
    finally:
        monkeypatch.undo()
        time.tzset()
    assert job.scheduled == (hour - timedelta(hours=1)).timestamp()
