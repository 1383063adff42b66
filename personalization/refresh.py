"""One refresh, from a person's turns to the version that answers next:
store → examples → train → gate → publish.

The next version is trained anew, over all turns that may be learned, and judged against the serving one, its
rival, by turns that neither has learned. If the person has since taken out a turn that the serving one saw,
the rival is the newest version that has seen no such turn (see `lineage.py`), and the serving one is left
whatever the gate says. Where the rival cannot be loaded, as when the base model is another one now, there is
none, and the bare base is to be beaten.

Many people share one training batch. Each one's end is their own: a history that cannot be read or a full
disk fails that person and nobody else.
"""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from engine.adapter_files import version_folder
from personalization import lineage
from personalization.examples import hold_out, serving_rows, windows
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
from personalization.store import HistoryForgotten, Pointer, Store
from personalization.train import Recipe
from personalization.trainer import Judged, Judging, Progress, Task, Trainer, read_for
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
    clean: int  # what answers if nothing better comes; another than the pointer's when that one is marked
    rival: int  # the version to do better than: `clean`, or 0, the bare base, where that cannot be loaded
    population: int  # the population adapter to begin with
    task: Task
    lesson: "Lesson"
    expected_gain: float


async def refresh(users: Sequence[str], kit: Kit, say: Say, end: End) -> None:
    """Refresh everyone in `users`, in one batch. `say` gets progress, `end` each person's outcome as soon as
    it is there.

    Raises TrainerDied when the batch broke off; those who have not come to an end then were not changed.
    """
    prepared: dict[str, _Prepared] = {}
    for user, got in zip(users, await _each(users, lambda user: _prepare(user, kit)), strict=True):
        if isinstance(got, Outcome):
            await end(got)
        else:
            prepared[got.task.id] = got
            await say(user, {"state": "training", "progress": 0.0})
    if not prepared:
        return

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
            else:
                each = prepared[event.id]
                await end(await _attempt(each.user, _conclude(each, event, kit)))


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


async def _prepare(user: str, kit: Kit) -> _Prepared | Outcome:
    """What there is to learn for one person, or why nothing is learned now."""
    pointer = await kit.store.pointer(user)
    turns = await kit.store.turns(user)
    records = await recorded_versions(kit.shelf, kit.store, user, pointer)
    learnable = {turn.id for turn in turns if learned(turn)}
    if pointer.trial is not None and pointer.trial.version in lineage.marks(records, learnable):
        await kit.store.end_trial(user, ended(pointer, "taken out", kit.clock()), epoch=pointer.epoch)
        pointer = replace(pointer, trial=None)
    adapter_id = kit.store.adapter_id(user)
    clean = lineage.clean(records, learnable, pointer.version)
    rival = clean if clean and await _loads(kit, adapter_id, clean) else 0
    seen = lineage.seen(records, rival)
    lesson = await asyncio.to_thread(choose, turns, seen, kit.renderer, kit.policy)
    if pointer.trial is not None and clean == pointer.version:
        tried = pointer.trial.version
        known = _known(turns, lineage.seen(records, tried), kit.policy)
        # It may not have learned those that judged it; a refresh has seen them all the same.
        is_old = known.issuperset(lesson.all_turns) or not await kit.store.learned_since_refresh(user)
        # The same again would only begin its trial anew.
        if is_old and await _loads(kit, adapter_id, tried):
            await kit.store.mark_refreshed(user, lesson.all_turns, epoch=pointer.epoch)
            reason = f"nothing new to learn since version {tried}, which is on trial"
            return Outcome(user, "completed", before=clean, after=clean, reason=reason)
    hindrance = _hindrance(lesson, rival, kit.policy)
    if hindrance is not None:
        reason, code = hindrance
        # Else an archive of old turns would ask for a refresh at every word, each as futile as this one.
        await kit.store.mark_refreshed(user, lesson.known, epoch=pointer.epoch)
        if clean != pointer.version:
            return await _leave(user, pointer, clean, kit, reason)
        state = "completed" if code is None else "failed"
        return Outcome(user, state, before=clean, after=clean, reason=reason, code=code)
    check_room(kit.shelf)  # before the work, which would be done again at each attempt
    population, start = newest(kit.population)
    task = Task(
        id=adapter_id,
        train=lesson.train,
        gate=lesson.gate,
        rival=version_folder(kit.shelf.root, adapter_id, rival) if rival else None,
        seed=_seed(adapter_id, pointer),
        start=start,
        newest=lesson.newest,
    )
    expected = curve(len(lesson.all_turns)) - curve(len(lesson.all_turns) - lesson.new)
    return _Prepared(user, pointer, clean, rival, population, task, lesson, expected)


async def _loads(kit: Kit, adapter_id: str, version: int) -> bool:
    """Whether a version can be loaded, on the base that is trained here."""
    base_hash = await kit.trainer.base_hash()
    folder = version_folder(kit.shelf.root, adapter_id, version)
    return await asyncio.to_thread(read_for, base_hash, folder, kit.shelf.config) is not None


def _hindrance(lesson: "Lesson", rival: int, policy: RefreshPolicy) -> tuple[str, str | None] | None:
    """Why there is nothing to train, and the code of it if that is a failure; None where there is."""
    found, needed = len(lesson.all_turns), policy.minimum_turns
    if found < needed:
        return f"not enough turns yet: {found} of {needed} to learn from", "not_enough_turns"
    if not lesson.new:
        return f"nothing new to learn since version {rival}", None
    needed = 2 * policy.gate.min_turns  # half of them are held out to judge by
    if rival and lesson.new < needed:
        return (
            f"not enough new turns since version {rival}: {lesson.new} of {needed} to learn from",
            "not_enough_turns",
        )
    return None


async def _leave(user: str, pointer: Pointer, clean: int, kit: Kit, reason: str) -> Outcome:
    """Nothing better came of it, but the serving version has seen what it should not: `clean` answers
    again, or the base should its files be gone."""
    try:
        await rollback(kit.shelf, kit.store, user, clean, before=pointer)
    except (UnknownVersion, AdapterError):
        clean = 0
        await rollback(kit.shelf, kit.store, user, clean, before=pointer)
    instead = f"version {clean}" if clean else "the base model"
    left = f"version {pointer.version} had learned from turns since taken out, {instead} answers again"
    return Outcome(
        user, "completed", before=pointer.version, after=clean, reason=f"{left}; {reason}", code="left"
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
        parent=prepared.rival if judged.opposed else 0,
        examples=len(lesson.train) + (len(lesson.newest) if judged.finished else 0),
        turn_ids=(*lesson.trained_turns, *(lesson.newest_turns if judged.finished else ())),
        numbers=numbers,
        seed=prepared.task.seed,
        population=prepared.population if judged.began else 0,
    )
    after = pointer.version
    # What the person wants gone does not answer beside the new version, not even for a while.
    share = kit.policy.trial_share if prepared.clean == pointer.version else 0.0
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
    if not verdict.accepted and prepared.clean != pointer.version:
        return replace(await _leave(user, pointer, prepared.clean, kit, verdict.reason), numbers=numbers)
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
    """Rows to train on and to judge by, and the turns learned in the first. `newest`: the turns held out, as
    rows to learn from when they have judged. `all_turns`: all that there are to learn; `known`: those of
    them that are not new to the rival."""

    train: list[Example]
    gate: list[Example]
    newest: list[Example]
    trained_turns: tuple[str, ...]
    newest_turns: tuple[str, ...]
    all_turns: tuple[str, ...]
    known: tuple[str, ...]

    @property
    def new(self) -> int:
        return len(self.all_turns) - len(self.known)


def choose(turns: Sequence[Turn], seen: Collection[str], renderer: Renderer, policy: RefreshPolicy) -> Lesson:
    """What the next version learns: all turns but those held out to judge it, the newest `most_turns` of
    them. None of the ids in `seen`, those of the turns that its rival learned, judges it. A turn that the
    person took out is in no row to learn from, not even as context. Pure."""
    known = _known(turns, seen, policy)
    held = hold_out(turns, policy.gate_fraction, known, most=policy.most_turns)
    judged, newest = set(held.gate), set(held.newest)
    before, after = held.said[: held.cut], held.said[held.cut :]
    gate = serving_rows(
        before, after, renderer, most_tokens=policy.gate_tokens, learn=lambda turn: turn.id in judged
    )
    older, latest = (_newest(part, policy.most_turns) for part in (_without(held.said, newest), after))
    train = windows(older, renderer, policy.row_tokens)
    newest_rows = windows(latest, renderer, policy.row_tokens, lambda turn: turn.id in newest)
    trained_turns = tuple(turn.id for turn in older if learned(turn))
    newest_turns = tuple(turn.id for turn in latest if turn.id in newest)
    all_turns = (*held.train, *held.newest)
    not_new = tuple(turn_id for turn_id in all_turns if turn_id in known)
    return Lesson(train, gate, newest_rows, trained_turns, newest_turns, all_turns, not_new)


def _known(turns: Sequence[Turn], seen: Collection[str], policy: RefreshPolicy) -> frozenset[str]:
    """The turns that are not new to a rival: those it has seen, and those further back than the newest
    `most_turns`, which it was not to see either."""
    lessons = [turn.id for turn in sorted(turns, key=lambda turn: turn.at) if learned(turn)]
    return frozenset(seen).union(lessons[: -policy.most_turns] if seen else ())


def _without(said: Sequence[Turn], held_out: Collection[str]) -> list[Turn]:
    """All but the turns held out and what was said upon each, until the next turn to learn."""
    kept: list[Turn] = []
    is_out = False
    for turn in said:
        if learned(turn):
            is_out = turn.id in held_out
        if not is_out:
            kept.append(turn)
    return kept


def _newest(said: Sequence[Turn], most: int) -> list[Turn]:
    """The newest `most` turns to learn, and of the others, which are their context, those said since the last
    that is left out."""
    kept = [turn for turn in said if not turn.removed]
    lessons = [place for place, turn in enumerate(kept) if learned(turn)]
    return kept[lessons[-most - 1] + 1 :] if len(lessons) > most else kept


def _seed(adapter_id: str, pointer: Pointer) -> int:
    """The same refresh, run again after a crash, trains the same weights."""
    named = f"{adapter_id}:{pointer.epoch}:{pointer.version}"
    return int.from_bytes(hashlib.sha256(named.encode()).digest()[:7], "big")
