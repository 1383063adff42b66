"""One refresh, from a person's turns to the version that answers next:
store → examples → train → gate → publish.

It starts from the serving version, unless the person has since taken out a turn that this one learned from:
then from the newest version that has not seen such a turn (see `lineage.py`), and the serving one is left
whatever the gate says. If that version cannot be carried on, as when the base model is another one now, the
next one is learned anew, from all turns.

Many people share one training batch. Each one's end is their own: a history that cannot be read or a full
disk fails that person and nobody else.
"""

import asyncio
import hashlib
import random
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from engine.adapter_files import version_folder
from personalization import lineage
from personalization.examples import hold_out, serving_rows, training_rows
from personalization.gate import GatePolicy
from personalization.history import Turn, learned
from personalization.population import newest
from personalization.prompt import Example, Renderer
from personalization.publish import (
    AdapterError,
    Origin,
    Shelf,
    Superseded,
    UnknownVersion,
    check_room,
    note_refusal,
    publish,
    recorded_versions,
    rollback,
)
from personalization.store import HistoryForgotten, Pointer, Store, VersionRecord
from personalization.train import Recipe
from personalization.trainer import Judged, Judging, Progress, Stranded, Task, Trainer, read_to_go_on
from personalization.trial import ended
from personalization.when import EXPECTED, curve

_Result = TypeVar("_Result")
PREPARED_AT_ONCE = 8

# (user, message): what a refresh has to say of one person, a state of the wire and its fields.
Say = Callable[[str, dict[str, Any]], Awaitable[None]]
End = Callable[["Outcome"], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class RefreshPolicy:
    """How to learn. Turns are learned turns.

    minimum_turns   before that many there is no adapter: context alone serves better
    gate_fraction   of the newest turns, held out for the gate
    gate_tokens     most tokens of a gate row: what serving would show before the turns that are judged
    row_tokens      most tokens of a training row: whole conversations, as an adapter adds to their context
    most_turns      the newest turns that are trained on, and the most that are held out: further back a
                    history pays less than it costs
    trial_share     of the replies, that a new version answers on trial at first; 0: all of them at once
    replay          tokens of older turns trained with each token of new ones, when a version is carried on
    recipe          as `benchmarks/sweep_learning.py` chose it. Rows and steps of 1024 tokens gain as much as
                    those of 512 and drift less. A long history, learned three times over, made its person
                    worse, so it is seen once
    """

    minimum_turns: int = 50
    gate_fraction: float = 0.1
    gate_tokens: int = 2048
    row_tokens: int = 1024
    most_turns: int = 400
    trial_share: float = 0.0
    replay: float = 1.0
    recipe: Recipe = field(
        default_factory=lambda: Recipe(learning_rate=2e-3, tokens_per_step=1024, most_steps=32)
    )
    gate: GatePolicy = field(default_factory=GatePolicy)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one person's refresh ended. `error`: it may go better next time; everything else is final."""

    user: str
    state: str  # completed | failed | forgotten
    published: bool = False
    trial: bool = False
    before: int = 0
    after: int = 0
    reason: str = ""
    numbers: dict[str, float] = field(default_factory=dict)
    code: str | None = None
    error: Exception | None = None

    def message(self) -> dict[str, Any]:
        """The outcome as it is told."""
        if self.state == "completed":
            return {
                "state": "completed",
                "progress": 1.0,
                "from": self.before,
                "to": self.after,
                "published": self.published,
                "trial": self.trial,
                "numbers": self.numbers,
                "reason": self.reason,
            }
        return {"state": "failed", "code": self.code, "message": self.reason}


@dataclass(frozen=True, slots=True)
class Kit:
    """What a refresh works with. `population`: where population adapters are kept."""

    store: Store
    shelf: Shelf
    renderer: Renderer
    trainer: Trainer
    policy: RefreshPolicy
    model_name: str
    clock: Callable[[], datetime]
    population: Path | None = None


@dataclass(frozen=True, slots=True)
class _Prepared:
    user: str
    pointer: Pointer
    start: int  # the version that is carried on; 0: none
    instead: int  # what answers if nothing better comes; another than the pointer's when that one is marked
    population: int  # the population adapter to begin with where no version is carried on
    task: Task
    lesson: "Lesson"
    expected_gain: float


async def refresh(users: Sequence[str], kit: Kit, say: Say, end: End, *, anew: bool = False) -> None:
    """Refresh everyone in `users`, in one batch. `say` gets progress, `end` each person's outcome as soon as
    it is there. `anew`: no version is carried on; a batch of those whose version cannot be comes by itself.

    Raises TrainerDied when the batch broke off; those who have not come to an end then were not changed.
    """
    prepared: dict[str, _Prepared] = {}
    for user, got in zip(users, await _each(users, lambda user: _prepare(user, kit, anew)), strict=True):
        if isinstance(got, Outcome):
            await end(got)
        else:
            prepared[got.task.id] = got
            await say(user, {"state": "training", "progress": 0.0})
    if not prepared:
        return

    stranded: list[str] = []
    training = set(prepared)
    tasks = [each.task for each in prepared.values()]
    policy = kit.policy
    batch = kit.trainer.run(tasks, policy.recipe, policy.gate)
    async with aclosing(batch):
        async for event in batch:
            if isinstance(event, Progress):
                for task_id in training:
                    told = {"state": "training", "progress": round(event.share, 3)}
                    await say(prepared[task_id].user, told)
            elif isinstance(event, Judging):
                training.difference_update(event.ids)
                for task_id in event.ids:
                    await say(prepared[task_id].user, {"state": "gating", "progress": 1.0})
            elif isinstance(event, Stranded):
                training.discard(event.id)
                stranded.append(prepared[event.id].user)
            else:
                each = prepared[event.id]
                await end(await _attempt(each.user, _conclude(each, event, kit)))
    if stranded:
        await refresh(stranded, kit, say, end, anew=True)


async def _each(users: Sequence[str], work: Callable[[str], Awaitable[_Result]]) -> list[_Result | Outcome]:
    """Everyone's part of the work, some side by side: the tokenizer leaves Python's lock alone."""
    room = asyncio.Semaphore(PREPARED_AT_ONCE)

    async def one(user: str) -> _Result | Outcome:
        async with room:
            return await _attempt(user, work(user))

    return list(await asyncio.gather(*map(one, users)))


async def _attempt(user: str, work: Awaitable[_Result]) -> _Result | Outcome:
    """Do one person's part of the work; what goes wrong is theirs alone."""
    try:
        return await work
    except HistoryForgotten:
        return Outcome(user, "forgotten", reason="forgotten", code="forgotten")
    except Exception as error:
        return Outcome(user, "failed", reason=str(error), code="refresh_failed", error=error)


async def _prepare(user: str, kit: Kit, anew: bool) -> _Prepared | Outcome:
    """What there is to learn for one person, or why nothing is learned now."""
    pointer = await kit.store.pointer(user)
    turns = await kit.store.turns(user)
    records = await recorded_versions(kit.shelf, kit.store, user, pointer)
    learnable = {turn.id for turn in turns if learned(turn)}
    instead = lineage.start(records, learnable, pointer.version)
    start = 0 if anew else instead
    if pointer.trial is not None and pointer.trial.version in lineage.marks(records, learnable):
        await kit.store.end_trial(user, ended(pointer, "taken out", kit.clock()), epoch=pointer.epoch)
        pointer = replace(pointer, trial=None)
    lesson = await asyncio.to_thread(choose, turns, records, start, kit.renderer, kit.policy)
    found, needed = len(lesson.all_turns), kit.policy.minimum_turns
    if found < needed:
        reason = f"not enough turns yet: {found} of {needed} to learn from"
        if instead != pointer.version:
            return await _leave(user, pointer, instead, kit, reason)
        return Outcome(
            user,
            "failed",
            before=pointer.version,
            after=pointer.version,
            reason=reason,
            code="not_enough_turns",
        )
    new = len(set(lesson.all_turns) - _known(turns, records, start, kit.policy))
    needed = 2 * kit.policy.gate.min_turns  # half of them are held out to judge by
    too_few = not lesson.train or bool(start and new < needed)
    if start and too_few and not await _can_go_on(kit, kit.store.adapter_id(user), start):
        return await _prepare(user, kit, anew=True)
    if not lesson.train:
        await kit.store.mark_refreshed(user, lesson.all_turns, epoch=pointer.epoch)
        reason = f"nothing new to learn since version {start}"
        if instead != pointer.version:
            return await _leave(user, pointer, instead, kit, reason)
        return Outcome(user, "completed", before=instead, after=instead, reason=reason)
    if too_few:
        reason = f"not enough new turns since version {start}: {new} of {needed} to learn from"
        if instead != pointer.version:
            return await _leave(user, pointer, instead, kit, reason)
        return Outcome(user, "failed", before=start, after=start, reason=reason, code="not_enough_turns")
    check_room(kit.shelf)  # before the work, which would be done again at each attempt
    adapter_id = kit.store.adapter_id(user)
    population, shared = newest(kit.population)
    task = Task(
        id=adapter_id,
        train=lesson.train,
        gate=lesson.gate,
        serving=version_folder(kit.shelf.root, adapter_id, start) if start else None,
        seed=_seed(adapter_id, pointer),
        start=shared if start == 0 else None,
        newest=lesson.newest,
    )
    expected = curve(len(lesson.all_turns)) - curve(len(lesson.all_turns) - new)
    return _Prepared(user, pointer, start, instead, population, task, lesson, expected)


async def _can_go_on(kit: Kit, adapter_id: str, version: int) -> bool:
    """Whether a version can be loaded, on the base that is trained here."""
    base_hash = await kit.trainer.base_hash()
    folder = version_folder(kit.shelf.root, adapter_id, version)
    return await asyncio.to_thread(read_to_go_on, folder, kit.shelf.config, base_hash) is not None


async def _leave(user: str, pointer: Pointer, start: int, kit: Kit, reason: str) -> Outcome:
    """Nothing better came of it, but the serving version has seen what it should not: `start` answers
    again, or the base should its files be gone."""
    try:
        await rollback(kit.shelf, kit.store, user, start, before=pointer)
    except (UnknownVersion, AdapterError):
        start = 0
        await rollback(kit.shelf, kit.store, user, start, before=pointer)
    instead = f"version {start}" if start else "the base model"
    left = f"version {pointer.version} had learned from turns since taken out, {instead} answers again"
    return Outcome(
        user, "completed", before=pointer.version, after=start, reason=f"{left}; {reason}", code="left"
    )


async def _conclude(prepared: _Prepared, judged: Judged, kit: Kit) -> Outcome:
    """Publish what the gate accepted, keep the numbers of what it refused."""
    user, pointer, lesson, verdict = prepared.user, prepared.pointer, prepared.lesson, judged.verdict
    numbers = judged.numbers | verdict.numbers | {EXPECTED: prepared.expected_gain}
    origin = Origin(
        base_model=kit.model_name,
        base_hash=judged.base_hash,
        created_at=kit.clock(),
        reason=verdict.reason,
        parent=prepared.start,
        examples=len(lesson.train) + (len(lesson.newest) if judged.finished else 0),
        turn_ids=(*lesson.trained_turns, *(lesson.newest_turns if judged.finished else ())),
        numbers=numbers,
        seed=prepared.task.seed,
        population=prepared.population if judged.began else 0,
    )
    after = pointer.version
    # What the person wants gone does not answer beside the new version, not even for a while.
    share = kit.policy.trial_share if prepared.instead == pointer.version else 0.0
    if verdict.accepted:
        try:
            after = await publish(kit.shelf, kit.store, user, judged.weights, origin, pointer, share=share)
        except Superseded as error:  # and the turns are still to be learned
            after = (await kit.store.pointer(user)).version
            return Outcome(
                user, "completed", before=pointer.version, after=after, reason=str(error), numbers=numbers
            )
    else:
        await note_refusal(kit.store, user, origin, pointer)
    await kit.store.mark_refreshed(user, lesson.all_turns, epoch=pointer.epoch)
    if not verdict.accepted and prepared.instead != pointer.version:
        return replace(await _leave(user, pointer, prepared.instead, kit, verdict.reason), numbers=numbers)
    return Outcome(
        user,
        "completed",
        published=verdict.accepted,
        trial=verdict.accepted and share > 0,
        before=pointer.version,
        after=after,
        reason=verdict.reason,
        numbers=numbers,
    )


@dataclass(frozen=True, slots=True)
class Lesson:
    """Rows to train on and to judge by, and the turns learned in the first. `newest`: the turns that judge,
    as rows to learn from when they have. `all_turns`: all that there are to learn."""

    train: list[Example]
    gate: list[Example]
    newest: list[Example]
    trained_turns: tuple[str, ...]
    newest_turns: tuple[str, ...]
    all_turns: tuple[str, ...]


def choose(
    turns: Sequence[Turn],
    records: Sequence[VersionRecord],
    start: int,
    renderer: Renderer,
    policy: RefreshPolicy,
) -> Lesson:
    """What the next version, carried on from `start`, learns: the turns that this one and its ancestors never
    saw, and for each token of those `replay` tokens of rows of the older ones, drawn at random. A turn that
    the person took out is in no row, not even as context. Pure."""
    seen = lineage.seen(records, start)
    known = _known(turns, records, start, policy)
    held = hold_out(turns, policy.gate_fraction, known, most=policy.most_turns)
    judged = set(held.gate)
    gate = serving_rows(
        held.said[: held.cut],
        held.said[held.cut :],
        renderer,
        most_tokens=policy.gate_tokens,
        learn=lambda turn: turn.id in judged,
    )
    trained = held.train[-policy.most_turns :]
    old, new = _by_age(turns, set(trained), seen)
    train = training_rows(new, renderer, policy.row_tokens)
    room = policy.replay * sum(len(row.token_ids) for row in train)
    replayed = training_rows(old, renderer, policy.row_tokens) if room else []
    random.Random(start).shuffle(replayed)
    for row in replayed:
        if room <= 0:
            break
        room -= len(row.token_ids)
        train.append(row)
    latest = [turn for turn in held.said[held.cut :] if not turn.removed]
    newest_turns = tuple(turn.id for turn in latest if learned(turn))
    all_turns = (*held.train, *newest_turns)
    newest_rows = training_rows(latest, renderer, policy.row_tokens)
    return Lesson(train, gate, newest_rows, trained, newest_turns, all_turns)


def _known(
    turns: Sequence[Turn], records: Sequence[VersionRecord], start: int, policy: RefreshPolicy
) -> frozenset[str]:
    """The turns that are not new to whoever goes on from `start`: those it has seen, and those further back
    than the newest `most_turns`, which it was not to see either."""
    seen = lineage.seen(records, start)
    lessons = [turn.id for turn in sorted(turns, key=lambda turn: turn.at) if learned(turn)]
    return seen.union(lessons[: -policy.most_turns]) if seen else seen


def _by_age(
    turns: Sequence[Turn], trainable: set[str], seen: Collection[str]
) -> tuple[list[Turn], list[Turn]]:
    """Trainable turns that were seen and that were not, each with the unlearned turns that follow it, which
    are its context. Turns held out, and what follows them, are in neither."""
    old: list[Turn] = []
    new: list[Turn] = []
    place: list[Turn] | None = new if not seen else old
    for turn in sorted(turns, key=lambda turn: turn.at):
        if turn.removed:
            continue
        if learned(turn):
            if turn.id not in trainable:
                place = None
            else:
                place = old if turn.id in seen else new
        if place is not None:
            place.append(turn)
    return old, new


def _seed(adapter_id: str, pointer: Pointer) -> int:
    """The same refresh, run again after a crash, trains the same weights."""
    named = f"{adapter_id}:{pointer.epoch}:{pointer.version}"
    return int.from_bytes(hashlib.sha256(named.encode()).digest()[:7], "big")
