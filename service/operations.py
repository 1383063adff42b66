"""What the commands do to the running service: import histories, refresh people. No printing, no arguments.

Each takes the store and whatever else it needs, reports progress through a callback, and returns what it did.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from personalization.history import CLOCK_SKEW, LineError, parse
from personalization.store import Store
from service.model_folder import resolve_model
from service.settings import Settings

Progress = Callable[[float, str], None]  # share done (0 to 1), what is being done
LOOK_EVERY_S = 5.0


class Refused(ValueError):
    """The command cannot be carried out as asked; the message says expected and got."""


class LearningFailed(RuntimeError):
    """The training process ended in the middle; the message says why, as far as it could."""


# ---------------------------------------------------------------- import


@dataclass(frozen=True)
class Imported:
    """`turns` were read well, `new` of them were not there before; `errors` are the lines left out."""

    users: int
    turns: int
    new: int
    errors: list[LineError]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


async def import_histories(store: Store, lines: Iterable[bytes], on_progress: Progress) -> Imported:
    """Read the interchange format and append what is new. Appending twice changes nothing. Raises
    HistoryForgotten when a person is forgotten meanwhile."""
    on_progress(0.0, "reading")
    parsed = await asyncio.to_thread(parse, lines, not_after=datetime.now(UTC) + CLOCK_SKEW)
    total, done, new = sum(map(len, parsed.turns.values())), 0, 0
    for user, turns in parsed.turns.items():
        epoch = (await store.pointer(user)).epoch
        new += await store.append(user, turns, epoch=epoch)
        done += len(turns)
        on_progress(done / total, f"{done} of {total} turns")
    return Imported(len(parsed.turns), total, new, parsed.errors)


# ---------------------------------------------------------------- population


async def make_population(
    settings: Settings, lines: Iterable[bytes], *, epochs: int, on_progress: Progress
) -> dict[str, Any]:
    """Train a population adapter on the histories in `lines`, in a process of its own. Raises Refused,
    LearningFailed, and what a Renderer raises of the model's folder."""
    from engine.weights import read_config
    from personalization.population import NothingToLearn, Workshop, make
    from personalization.prompt import Renderer
    from personalization.trainer import Trainer, TrainerDied, TrainerSettings

    folder = resolve_model(settings.model)
    config = await asyncio.to_thread(read_config, folder)
    renderer = await asyncio.to_thread(Renderer, folder, config.max_position_embeddings)
    trainer = Trainer(TrainerSettings(folder, settings.train_threads, settings.device))
    workshop = Workshop(settings.population_root, config, renderer, trainer, settings.shown_model)
    try:
        made = await make(
            lines,
            workshop,
            epochs=epochs,
            now=datetime.now(UTC),
            on_progress=lambda share: on_progress(share, "training"),
        )
    except NothingToLearn as error:
        raise Refused(str(error)) from None
    except TrainerDied as error:
        raise LearningFailed(str(error)) from None
    finally:
        await trainer.stop()
    return asdict(made)


# ---------------------------------------------------------------- refresh


@dataclass(frozen=True)
class Refreshed:
    """How one person's refresh ended. `state` is completed, failed, or queued when nobody waited; `code` says
    what kind of failure: refresh_failed is the service's."""

    user: str
    job_id: str
    state: str
    published: bool = False
    trial: bool = False
    version: int = 0
    reason: str = ""
    code: str = ""


async def refresh(
    store: Store,
    users: Sequence[str],
    enqueue: Callable[[str], Awaitable[dict[str, Any]]],
    *,
    wait: bool,
    on_progress: Progress,
) -> list[Refreshed]:
    """Ask for a refresh of each person and, if `wait`, follow them to their ends. `enqueue` → {job_id, …}.

    News arrive by pub/sub, which loses what is said while Redis is away; so the kept state is read as well.
    """
    results: dict[str, Refreshed] = {}
    shares: dict[str, float] = {}
    async with store.events() as events:
        epochs = {user: (await store.pointer(user)).epoch for user in users if wait}
        jobs = {user: str((await enqueue(user))["job_id"]) for user in users}
        if not wait:
            return [Refreshed(user, job, "queued") for user, job in jobs.items()]

        def take(user: str, state: dict[str, Any] | None) -> None:
            if state is None or user in results or state.get("job_id") != jobs.get(user):
                return
            shares[user] = float(state.get("progress") or 0.0)
            if state.get("state") in ("completed", "failed"):
                shares[user] = 1.0
                results[user] = Refreshed(
                    user=user,
                    job_id=jobs[user],
                    state=state["state"],
                    published=bool(state.get("published")),
                    trial=bool(state.get("trial")),
                    version=int(state.get("to") or 0),
                    reason=str(state.get("reason") or state.get("message") or ""),
                    code=str(state.get("code") or ""),
                )
            on_progress(sum(shares.values()) / len(jobs), f"{len(results)} of {len(jobs)} people")

        def forgotten(user: str) -> None:  # and so is the job
            end = {"state": "failed", "code": "forgotten", "message": "forgotten meanwhile"}
            take(user, {"job_id": jobs[user], **end})

        looked = time.monotonic()
        news = asyncio.ensure_future(anext(events))
        try:
            while len(results) < len(jobs):
                await asyncio.wait({news}, timeout=LOOK_EVERY_S)
                if news.done():
                    event = news.result()
                    user = event.get("user")
                    if user in jobs and event.get("type") == "adapter.forgotten":
                        forgotten(user)
                    elif user in jobs and "state" in event:
                        take(user, event)
                    news = asyncio.ensure_future(anext(events))
                if time.monotonic() - looked > LOOK_EVERY_S:
                    looked = time.monotonic()
                    for user in jobs.keys() - results.keys():
                        take(user, await store.progress(user))
                        if (await store.pointer(user)).epoch != epochs[user]:
                            forgotten(user)
        finally:
            news.cancel()
            with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration):
                await news
    return [results[user] for user in jobs]
