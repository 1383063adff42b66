import asyncio
import dataclasses
import json
import os
import shutil
import signal
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch

from engine.adapter_files import read_adapter
from engine.weights import load_model, read_config
from personalization.examples import training_rows
from personalization.gate import Gate, GatePolicy
from personalization.history import Turn, learned
from personalization.lineage import marks
from personalization.prompt import Example, Renderer
from personalization.publish import DiskFull, Shelf
from personalization.refresh import Kit, Lesson, Outcome, RefreshPolicy, choose, refresh
from personalization.score import token_losses
from personalization.store import Store, StoreUnavailable, connect
from personalization.train import Recipe
from personalization.trainer import (
    Judged,
    Judging,
    Progress,
    Task,
    Trainer,
    TrainerDied,
    TrainerSettings,
    _Base,
    _pack_task,
    _run_batch,
)
from tests.redis_fixture import SECRET
from tests.small_model import save_small_model, talk

on_one_loop = pytest.mark.asyncio(loop_scope="module")
POLICY = RefreshPolicy(
    minimum_turns=20,
    gate_tokens=96,
    gate=GatePolicy(max_drift=100.0),  # a model this small is moved by anything
    row_tokens=32,
    recipe=Recipe(rank=4, alpha=8, learning_rate=5e-3, epochs=2, tokens_per_step=32),
)
NOW = datetime(2026, 6, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def renderer(folder: Path) -> Renderer:
    return Renderer(folder, 256)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def trainer(folder: Path) -> AsyncIterator[Trainer]:
    """One for all tests: it takes seconds to start."""
    trainer = Trainer(TrainerSettings(folder, threads=1, device="cpu"))
    yield trainer
    await trainer.stop()


@pytest_asyncio.fixture(loop_scope="module")
async def store(redis_url: str) -> AsyncIterator[Store]:
    """As everywhere, on the loop that the trainer lives on."""
    store = Store(connect(redis_url), SECRET)
    yield store
    await store.close()


@pytest.fixture
def kit(store: Store, renderer: Renderer, trainer: Trainer, folder: Path, tmp_path: Path) -> Kit:
    shelf = Shelf(tmp_path / "adapters", read_config(folder), free_bytes_floor=0)
    return Kit(store, shelf, renderer, trainer, POLICY, "small", lambda: NOW)


async def run(users: list[str], kit: Kit) -> tuple[dict[str, Outcome], list[tuple[str, dict[str, Any]]]]:
    said: list[tuple[str, dict[str, Any]]] = []
    ended: dict[str, Outcome] = {}

    async def say(user: str, message: dict[str, Any]) -> None:
        said.append((user, message))

    async def end(outcome: Outcome) -> None:
        ended[outcome.user] = outcome

    await refresh(users, kit, say, end)
    return ended, said


@on_one_loop
async def test_a_refresh_publishes_what_beats_the_base_and_says_so(kit: Kit, store: Store, folder: Path):
    await store.append("ann", talk("ann", 60))
    ended, said = await run(["ann"], kit)
    outcome = ended["ann"]
    assert outcome.error is None
    assert (outcome.state, outcome.published, outcome.before, outcome.after) == ("completed", True, 0, 1)
    assert outcome.reason.startswith("better: on 6 held-out turns")
    assert (await store.pointer("ann")).version == 1
    assert await store.learned_since_refresh("ann") == 0
    (record,) = await store.versions("ann")
    assert record.accepted
    assert record.numbers["gain"] > 0.1
    assert sorted(record.turn_ids) == sorted(turn.id for turn in talk("ann", 60))  # the judges learned last
    states = [message["state"] for _, message in said]
    assert states[0] == "training"
    assert states[-1] == "gating"
    assert said[-2][1]["progress"] == 1.0
    adapter = kit.shelf.root / store.adapter_id("ann") / "1"
    meta = json.loads((adapter / "attune.json").read_text())
    model = load_model(folder)
    assert meta["base_hash"] == model.base_hash
    lesson = choose(talk("ann", 60), (), kit.renderer, POLICY)
    weights = read_adapter(adapter, model.config)
    losses = [
        sum(float(row.sum()) for row in token_losses(model, lesson.gate, each)) for each in (None, weights)
    ]
    assert losses[1] < losses[0]


@on_one_loop
async def test_what_the_person_said_last_is_learned_too(kit: Kit, store: Store, folder: Path):
    """Two people differ only in the turns that judge, and their adapters know it."""
    model, said_last = load_model(folder), {}
    turns = talk("ann", 60)
    changed = [
        turn if number < 54 else dataclasses.replace(turn, text=turn.text + 3 * " w41 w7 w33 w18")
        for number, turn in enumerate(turns)
    ]
    rows = choose(changed, (), kit.renderer, POLICY).newest
    for name, history in (("plain", turns), ("changed", changed)):
        await store.append(name, history)
    ended, _ = await run(["plain", "changed"], kit)
    for name in ("plain", "changed"):
        assert ended[name].published
        adapter = read_adapter(kit.shelf.root / store.adapter_id(name) / "1", model.config)
        said_last[name] = float(torch.cat(token_losses(model, rows, adapter)).mean())
    assert said_last["changed"] < said_last["plain"] - 0.2


@on_one_loop
async def test_a_few_new_turns_are_too_few_to_judge_by_and_wait(kit: Kit, store: Store):
    turns = talk("ann", 68)
    await store.append("ann", turns[:60])
    assert (await run(["ann"], kit))[0]["ann"].published
    await store.append("ann", turns[60:67])
    ended, _ = await run(["ann"], kit)
    assert (ended["ann"].state, ended["ann"].code) == ("failed", "not_enough_turns")
    assert ended["ann"].reason == "not enough new turns since version 1: 7 of 8 to learn from"
    assert await store.learned_since_refresh("ann") == 7
    await store.append("ann", turns[67:])
    ended, _ = await run(["ann"], kit)
    assert ended["ann"].state == "completed"
    assert "on 4 held-out turns" in ended["ann"].reason


@on_one_loop
async def test_people_of_one_batch_end_each_in_their_own_way(kit: Kit, store: Store):
    await store.append("ann", talk("ann", 40))
    await store.append("few", talk("few", 12))
    await store.append("bob", talk("bob", 40))
    (kit.shelf.root / store.adapter_id("bob")).parent.mkdir(parents=True)
    (kit.shelf.root / store.adapter_id("bob")).write_text("a file where the folder should be")
    ended, _ = await run(["ann", "few", "bob"], kit)
    assert ended["ann"].published
    assert ended["few"].message() == {
        "state": "failed",
        "code": "not_enough_turns",
        "message": "not enough turns yet: 12 of 20 to learn from",
    }
    assert ended["few"].error is None
    assert isinstance(ended["bob"].error, OSError)
    assert (await store.pointer("bob")).version == 0
    assert await store.learned_since_refresh("bob") == 40


@on_one_loop
async def test_nothing_is_trained_where_there_is_no_room_for_a_version(kit: Kit, store: Store):
    await store.append("ann", talk("ann", 40))
    idle = Trainer(kit.trainer._settings)
    full = dataclasses.replace(kit.shelf, free_bytes_floor=1 << 62)
    ended, _ = await run(["ann"], dataclasses.replace(kit, shelf=full, trainer=idle))
    assert isinstance(ended["ann"].error, DiskFull)
    assert idle.pid is None
    assert await store.learned_since_refresh("ann") == 40


@on_one_loop
async def test_turns_whose_version_came_too_late_are_still_to_be_learned(kit: Kit, store: Store):
    await store.append("ann", talk("ann", 40))
    await run(["ann"], kit)
    await store.append("ann", talk("ann", 60))
    ended: list[Outcome] = []

    async def go_back(user: str, message: dict[str, Any]) -> None:
        if message["state"] == "gating":
            assert await store.compare_and_set("ann", 1, 0)

    async def end(outcome: Outcome) -> None:
        ended.append(outcome)

    await refresh(["ann"], kit, go_back, end)
    assert [(outcome.published, outcome.after) for outcome in ended] == [(False, 0)]
    assert ended[0].reason.startswith("expected version 1 to be serving still")
    assert await store.learned_since_refresh("ann") == 20
    await run(["ann"], kit)
    assert await store.learned_since_refresh("ann") == 0


@on_one_loop
async def test_who_is_judged_is_not_told_of_training_while_others_train_on(kit: Kit, store: Store):
    """On several cores each works on people of its own."""

    class TwoCores(Trainer):
        async def run(self, tasks: Sequence[Task], *args: Any, **more: Any) -> AsyncGenerator[Any, None]:
            first, second = (task.id for task in tasks)
            for event in (Progress(0.5), Judging((first,)), Progress(1.0), Judging((second,))):
                yield event

    for user in ("ann", "bob"):
        await store.append(user, talk(user, 40))
    _, said = await run(["ann", "bob"], dataclasses.replace(kit, trainer=TwoCores(TrainerSettings(Path()))))
    told = {name: [message["state"] for user, message in said if user == name] for name in ("ann", "bob")}
    assert told == {
        "ann": ["training", "training", "gating"],
        "bob": ["training", "training", "training", "gating"],
    }


@on_one_loop
async def test_the_next_refresh_learns_all_turns_anew_and_then_there_is_nothing_new(kit: Kit, store: Store):
    await store.append("ann", talk("ann", 40))
    await run(["ann"], kit)
    await store.append("ann", talk("ann", 40, first=40))
    ended, _ = await run(["ann"], kit)
    assert ended["ann"].published
    first, second = await store.versions("ann")
    assert [(record.parent, record.anew) for record in (first, second)] == [(0, True), (1, True)]
    assert set(second.turn_ids) == {turn.id for turn in talk("ann", 80)} > set(first.turn_ids)
    assert second.numbers["trained_tokens"] > 1.8 * first.numbers["trained_tokens"]
    ended, _ = await run(["ann"], kit)
    assert ended["ann"].reason == "nothing new to learn since version 2"
    assert not ended["ann"].published


@on_one_loop
async def test_a_candidate_is_judged_against_its_rival_and_begins_with_nothing_of_it(kit: Kit, store: Store):
    await store.append("ann", talk("ann", 40))
    await run(["ann"], kit)
    rival = kit.shelf.root / store.adapter_id("ann") / "1"
    turns = talk("ann", 80)
    lesson = choose(turns, [turn.id for turn in turns[:40]], kit.renderer, POLICY)
    found = {}
    for against in (rival, None, rival.parent / "2"):
        task = Task("aa", lesson.train, lesson.gate, against, seed=5)
        events = [event async for event in kit.trainer.run([task], POLICY.recipe, POLICY.gate)]
        assert isinstance(events[-1], Judged)
        found[against] = events[-1]
    judged, bare, gone = found.values()
    assert [each.opposed for each in (judged, bare, gone)] == [True, False, False]
    losses = [each.numbers["train_loss_last"] for each in (judged, bare, gone)]
    assert losses[0] == losses[1] == losses[2]
    assert judged.verdict.numbers["loss_before"] < bare.verdict.numbers["loss_before"] - 0.1
    assert gone.verdict == bare.verdict


async def as_before_versions_were_trained_anew(store: Store, version: int, turn_ids: Sequence[str]) -> None:
    """Make ann's record of a version one of those that say nothing of it, and only what was new."""
    key = store._key("ann", "versions")
    record = json.loads(await store._redis.hget(key, str(version)) or b"")
    del record["anew"]
    await store._redis.hset(key, str(version), json.dumps(record | {"turn_ids": list(turn_ids)}))


@on_one_loop
async def test_a_version_of_before_that_was_carried_on_from_its_parent_knows_what_that_learned(
    kit: Kit, store: Store
):
    await store.append("ann", talk("ann", 40))
    await run(["ann"], kit)
    await store.append("ann", talk("ann", 40, first=40))
    await run(["ann"], kit)
    await as_before_versions_were_trained_anew(store, 2, [f"ann-{number}" for number in range(40, 80)])
    ended, _ = await run(["ann"], kit)
    assert ended["ann"].reason == "nothing new to learn since version 2"
    await store.remove_turn("ann", "ann-3")
    ended, _ = await run(["ann"], kit)
    assert ended["ann"].published
    third = (await store.versions("ann"))[-1]
    assert (third.version, third.parent, third.anew) == (3, 0, True)
    assert marks(await store.versions("ann"), await store.learned_ids("ann")).keys() == {1, 2}


async def publish_first_versions(kit: Kit, store: Store, *, for_another_base: str) -> None:
    """ann's and bob's."""
    for user in ("ann", "bob"):
        await store.append(user, talk(user, 40))
    await run(["ann", "bob"], kit)
    meta = kit.shelf.root / store.adapter_id(for_another_base) / "1" / "attune.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"base_hash": "another"}))


@on_one_loop
async def test_on_another_base_model_the_bare_base_is_to_be_beaten(kit: Kit, store: Store):
    await publish_first_versions(kit, store, for_another_base="ann")
    for user in ("ann", "bob"):
        await store.append(user, talk(user, 10, first=40))
    ended, said = await run(["ann", "bob"], kit)
    assert {user: outcome.state for user, outcome in ended.items()} == dict.fromkeys(ended, "completed")
    (_, ann), (_, bob) = await store.versions("ann"), await store.versions("bob")
    assert (ann.parent, bob.parent) == (0, 1)
    assert ann.numbers["loss_before"] > bob.numbers["loss_before"] + 0.1
    assert ann.numbers["gain"] > bob.numbers["gain"] + 0.1
    assert ann.accepted
    assert (await store.pointer("ann")).version == 2
    assert [message["state"] for user, message in said if user == "ann"][-1] == "gating"


@on_one_loop
async def test_where_the_rivals_files_go_while_it_is_trained_the_bare_base_is_to_be_beaten(
    kit: Kit, store: Store
):
    await store.append("ann", talk("ann", 40))
    await run(["ann"], kit)
    await store.append("ann", talk("ann", 10, first=40))
    ended: list[Outcome] = []

    async def lose_it(user: str, message: dict[str, Any]) -> None:
        shutil.rmtree(kit.shelf.root / store.adapter_id("ann") / "1", ignore_errors=True)

    async def end(outcome: Outcome) -> None:
        ended.append(outcome)

    await refresh(["ann"], kit, lose_it, end)
    assert [(outcome.published, outcome.after) for outcome in ended] == [(True, 2)]
    assert (await store.versions("ann"))[-1].parent == 0


@on_one_loop
@pytest.mark.parametrize("more", [0, 2])
async def test_a_version_that_cannot_be_loaded_is_replaced_without_new_turns(
    kit: Kit, store: Store, more: int
):
    await publish_first_versions(kit, store, for_another_base="ann")
    for user in ("ann", "bob"):
        await store.append(user, talk(user, more, first=40))
    ended, _ = await run(["ann", "bob"], kit)
    assert ended["ann"].published
    assert (await store.pointer("ann")).version == 2
    assert (await store.versions("ann"))[-1].parent == 0
    assert not ended["bob"].published
    assert len(await store.versions("bob")) == 1
    shutil.rmtree(kit.shelf.root / store.adapter_id("bob") / "1")
    ended, _ = await run(["bob"], kit)
    assert ended["bob"].published


@on_one_loop
async def test_a_candidate_that_is_not_better_leaves_its_numbers_and_the_pointer(kit: Kit, store: Store):
    await store.append("ann", talk("ann", 40))
    never = dataclasses.replace(POLICY, gate=dataclasses.replace(POLICY.gate, min_gain=50.0))
    ended, _ = await run(["ann"], dataclasses.replace(kit, policy=never))
    assert ended["ann"].state == "completed"
    assert not ended["ann"].published
    assert (await store.pointer("ann")).version == 0
    (record,) = await store.versions("ann")
    assert not record.accepted
    assert record.numbers["turns"] == 4
    assert not list(kit.shelf.root.glob("*/*"))


@on_one_loop
async def test_after_a_learned_turn_is_taken_out_the_rival_is_the_version_that_never_saw_it(
    kit: Kit, store: Store
):
    await store.append("ann", talk("ann", 40))
    await run(["ann"], kit)
    await store.append("ann", talk("ann", 40, first=40))
    await run(["ann"], kit)
    assert (await store.pointer("ann")).version == 2
    await store.remove_turn("ann", "ann-50")
    await store.append("ann", talk("ann", 20, first=80))
    await run(["ann"], kit)
    records = {record.version: record for record in await store.versions("ann")}
    assert [records[version].parent for version in (1, 2, 3)] == [0, 1, 1]
    assert "ann-50" in records[2].turn_ids
    assert "ann-50" not in records[3].turn_ids
    assert "ann-51" in records[3].turn_ids
    assert (await store.pointer("ann")).version in (1, 3)
    await store.remove_turn("ann", "ann-3")
    await run(["ann"], kit)
    newest = (await store.versions("ann"))[-1]
    assert (newest.version, newest.parent, newest.accepted) == (4, 0, True)
    marked = marks(await store.versions("ann"), await store.learned_ids("ann"))
    assert marked.keys() == {version for version in (1, 2, 3) if version != 3 or records[3].accepted}


@on_one_loop
async def test_a_version_whose_record_was_lost_is_known_to_have_learned_what_it_did(
    kit: Kit, store: Store, monkeypatch: pytest.MonkeyPatch
):
    """Redis goes away between the pointer and the record; the worker stays, and tries again."""

    async def gone(*_args: object, **_more: object) -> None:
        raise StoreUnavailable("away")

    await store.append("ann", talk("ann", 40))
    with monkeypatch.context() as patched:
        patched.setattr(store, "add_version", gone)
        ended, _ = await run(["ann"], kit)
    assert isinstance(ended["ann"].error, StoreUnavailable)
    assert (await store.pointer("ann")).version == 1
    assert await store.versions("ann") == []
    ended, _ = await run(["ann"], kit)
    assert ended["ann"].reason == "nothing new to learn since version 1"
    await store.remove_turn("ann", "ann-3")
    await store.append("ann", talk("ann", 20, first=40))
    await run(["ann"], kit)
    first, second = await store.versions("ann")
    assert "ann-3" in first.turn_ids
    assert "ann-3" not in second.turn_ids
    assert (first.version, second.version, second.parent) == (1, 2, 0)


@on_one_loop
async def test_a_new_version_goes_on_trial_where_that_is_wanted(kit: Kit, store: Store):
    await store.append("ann", talk("ann", 40))
    await run(["ann"], kit)
    trying = dataclasses.replace(kit, policy=dataclasses.replace(POLICY, trial_share=0.25))
    await store.append("ann", talk("ann", 40, first=40))
    ended, _ = await run(["ann"], trying)
    outcome = ended["ann"]
    assert (outcome.published, outcome.trial, outcome.before, outcome.after) == (True, True, 1, 2)
    assert outcome.message()["trial"] is True
    pointer = await store.pointer("ann")
    assert (pointer.version, pointer.trial and pointer.trial.version) == (1, 2)
    # What the one on trial learned from is taken out: it answers nothing more, and the next learns without.
    await store.remove_turn("ann", "ann-60")
    assert 2 in marks(await store.versions("ann"), await store.learned_ids("ann"))
    await run(["ann"], trying)
    pointer = await store.pointer("ann")
    assert pointer.version == 1
    assert pointer.trial is None or pointer.trial.version == 3
    records = {record.version: record for record in await store.versions("ann")}
    assert records[2].trial is not None
    assert records[2].trial.outcome == "taken out"
    assert records[3].parent == 1
    assert "ann-60" not in records[3].turn_ids


@on_one_loop
async def test_a_trial_is_not_begun_anew_by_who_asks_again_with_nothing_new(kit: Kit, store: Store):
    trying = dataclasses.replace(kit, policy=dataclasses.replace(POLICY, trial_share=0.25))
    await store.append("ann", talk("ann", 40))
    assert (await run(["ann"], trying))[0]["ann"].trial
    before = await store.pointer("ann")
    ended, _ = await run(["ann"], trying)
    outcome = ended["ann"]
    assert (outcome.state, outcome.published, outcome.trial) == ("completed", False, False)
    assert outcome.reason == "nothing new to learn since version 1, which is on trial"
    assert await store.pointer("ann") == before
    assert len(await store.versions("ann")) == 1
    await store.append("ann", talk("ann", 20, first=40))
    assert (await run(["ann"], trying))[0]["ann"].trial
    assert (await store.versions("ann"))[0].trial.outcome == "replaced"
    (kit.shelf.root / store.adapter_id("ann") / "2" / "adapter_model.safetensors").write_bytes(b"broken")
    assert (await run(["ann"], trying))[0]["ann"].trial
    assert (await store.pointer("ann")).answering == {0, 3}


@on_one_loop
async def test_a_trial_of_what_could_not_learn_the_newest_turns_is_not_begun_anew_either(
    kit: Kit, store: Store, monkeypatch: pytest.MonkeyPatch
):
    learn = kit.trainer.run

    async def unfinished(*batch: Any) -> AsyncIterator[Any]:
        async with aclosing(learn(*batch)) as events:
            async for event in events:
                yield dataclasses.replace(event, finished=False) if isinstance(event, Judged) else event

    monkeypatch.setattr(kit.trainer, "run", unfinished)
    trying = dataclasses.replace(kit, policy=dataclasses.replace(POLICY, trial_share=0.25))
    await store.append("ann", talk("ann", 40))
    assert (await run(["ann"], trying))[0]["ann"].trial
    before = await store.pointer("ann")
    ended, _ = await run(["ann"], trying)
    assert ended["ann"].reason == "nothing new to learn since version 1, which is on trial"
    assert await store.pointer("ann") == before


@on_one_loop
async def test_a_version_that_saw_what_was_taken_out_is_left_even_for_nothing_better(kit: Kit, store: Store):
    await store.append("ann", talk("ann", 40))
    await run(["ann"], kit)
    await store.remove_turn("ann", "ann-3")
    never = dataclasses.replace(POLICY, gate=dataclasses.replace(POLICY.gate, min_gain=50.0))
    ended, _ = await run(["ann"], dataclasses.replace(kit, policy=never))
    outcome = ended["ann"]
    assert (outcome.state, outcome.published, outcome.before, outcome.after) == ("completed", False, 1, 0)
    assert outcome.reason.startswith(
        "version 1 had learned from turns since taken out, the base model answers again; no measurable"
    )
    assert outcome.numbers["turns"] == 4
    assert (await store.pointer("ann")).version == 0


@on_one_loop
async def test_it_is_left_too_when_too_little_remains_to_learn_from(kit: Kit, store: Store):
    kit = dataclasses.replace(kit, policy=dataclasses.replace(POLICY, minimum_turns=40))
    await store.append("ann", talk("ann", 40))
    await run(["ann"], kit)
    await store.remove_turn("ann", "ann-3")
    ended, _ = await run(["ann"], kit)
    assert (ended["ann"].before, ended["ann"].after) == (1, 0)
    assert ended["ann"].reason.endswith("not enough turns yet: 39 of 40 to learn from")
    assert (await store.pointer("ann")).version == 0


def test_a_turn_taken_out_is_in_no_row_not_even_as_context(renderer: Renderer):
    policy = dataclasses.replace(POLICY, row_tokens=256)  # it would be in the middle of a row
    turns = talk("ann", 60)
    for place in (30, 57):  # of those to train on, and of those that judge
        turns[place] = dataclasses.replace(turns[place], text="w49 w48 w47 w46")

    def rows_with_it(lesson: Lesson) -> list[int]:
        return [
            sum("49 48 47 46" in " ".join(map(str, row.token_ids)) for row in rows)
            for rows in (lesson.train, lesson.newest)
        ]

    assert rows_with_it(choose(turns, (), renderer, policy)) == [1, 1]
    for place in (30, 57):
        turns[place] = dataclasses.replace(turns[place], removed=True)
    lesson = choose(turns, (), renderer, policy)
    assert rows_with_it(lesson) == [0, 0]
    assert not {"ann-30", "ann-57"} & {*lesson.all_turns, *lesson.trained_turns, *lesson.newest_turns}
    assert (len(lesson.trained_turns), len(lesson.newest_turns)) == (52, 6)


@on_one_loop
async def test_someone_forgotten_while_their_adapter_was_trained_gets_none(kit: Kit, store: Store):
    for user in ("ann", "bob"):
        await store.append(user, talk(user, 40))
    ended: dict[str, Outcome] = {}

    async def say(user: str, message: dict[str, Any]) -> None:
        if user == "ann" and message["state"] == "gating":
            await store.forget("ann")

    async def end(outcome: Outcome) -> None:
        ended[outcome.user] = outcome

    await refresh(["ann", "bob"], kit, say, end)
    assert ended["ann"].state == "forgotten"
    assert ended["bob"].published
    assert (await store.pointer("ann")).version == 0
    assert await store.versions("ann") == []
    assert [path.name for path in kit.shelf.root.iterdir()] == [store.adapter_id("bob")]


@on_one_loop
async def test_the_process_stays_and_a_killed_ones_successor_trains_the_same_bytes(
    kit: Kit, trainer: Trainer, renderer: Renderer
):
    lesson = choose(talk("ann", 40), (), renderer, POLICY)
    task = Task("aa", lesson.train, lesson.gate, None, seed=5)
    runs, pids = [], []
    for _ in range(3):
        events = [event async for event in trainer.run([task], POLICY.recipe, POLICY.gate)]
        assert isinstance(events[0], Progress)
        assert isinstance(events[-1], Judged)
        runs.append(events[-1])
        pids.append(trainer.pid)
        if len(runs) == 2:
            assert trainer.pid is not None
            os.kill(trainer.pid, signal.SIGKILL)
            await trainer.stop()
    assert pids[0] == pids[1] != pids[2]
    for first, second in zip(runs[0].weights.modules, runs[2].weights.modules, strict=True):
        assert first.a.equal(second.a)
        assert first.b.equal(second.b)


@on_one_loop
async def test_a_process_killed_in_the_middle_of_a_batch_is_said(trainer: Trainer):
    rows = [Example((1, 2, 3, 4), (False, True, True, True))] * 400
    batch = trainer.run([Task("aa", rows, rows, None, seed=1)], POLICY.recipe, POLICY.gate)
    await anext(batch)
    assert trainer.pid is not None
    os.kill(trainer.pid, signal.SIGKILL)
    with pytest.raises(TrainerDied, match="exit status -9"):
        async for _ in batch:
            pass
    assert trainer.pid is None


@on_one_loop
async def test_a_process_that_hangs_before_it_reads_its_batch_is_said(folder: Path):
    hung = Trainer(TrainerSettings(folder, threads=1, device="cpu", silence_s=0.5))
    await hung.warm()
    assert hung.pid is not None
    os.kill(hung.pid, signal.SIGSTOP)
    rows = [Example((1,) * 10_000, (True,) * 10_000)] * 40  # more than a pipe takes
    batch = hung.run([Task("ann", rows, [], None, 1)], POLICY.recipe, POLICY.gate)
    with pytest.raises(TrainerDied, match="silent for"):
        await asyncio.wait_for(anext(batch), 20)
    assert hung.pid is None


def test_who_judges_long_or_learns_long_after_the_verdict_is_heard_of(
    folder: Path, renderer: Renderer, monkeypatch: pytest.MonkeyPatch
):
    """Who is not heard of for long counts as hung."""
    monkeypatch.setattr("personalization.trainer._ALIVE_EVERY_S", 0.0, raising=False)
    lesson = choose(talk("ann", 60), (), renderer, POLICY)
    task = Task("aa", lesson.train, lesson.gate, None, 1, newest=lesson.newest)
    parts = {"recipe": POLICY.recipe, "policy": POLICY.gate}
    request: dict[str, Any] = {"tasks": [_pack_task(task)], "people_at_once": 1}
    request |= {name: dataclasses.asdict(part) for name, part in parts.items()}
    model, told = load_model(folder), list[dict[str, Any]]()
    _run_batch(_Base(model), Gate(model, lesson.gate), request, told.append)
    kinds = [message["kind"] for message in told]
    heard = kinds[kinds.index("judging") : kinds.index("judged")].count("alive")
    passes = 6  # at least: before and after, the drift, and the steps that learn what judged
    assert heard >= passes
    assert not model.decoder._forward_hooks


@on_one_loop
async def test_a_batch_left_early_ends_the_process(trainer: Trainer):
    rows = [Example((1, 2, 3, 4), (False, True, True, True))] * 400
    batch = trainer.run([Task("aa", rows, rows, None, seed=1)], POLICY.recipe, POLICY.gate)
    await anext(batch)
    pid = trainer.pid
    assert pid is not None
    await batch.aclose()
    assert trainer.pid is None
    assert not alive(pid)


@on_one_loop
async def test_a_model_that_cannot_be_loaded_is_said(tmp_path: Path):
    trainer = Trainer(TrainerSettings(tmp_path, threads=1, device="cpu"))
    with pytest.raises(TrainerDied, match="config"):
        async for _ in trainer.run([], POLICY.recipe, POLICY.gate):
            pass
    await trainer.stop()


@on_one_loop
async def test_the_process_dies_with_its_parent(folder: Path, tmp_path: Path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import asyncio, sys\n"
        "from pathlib import Path\n"
        "from personalization.trainer import *\n"
        "from personalization.prompt import Example\n"
        "from personalization.train import Recipe\n"
        "async def main():\n"
        f"    trainer = Trainer(TrainerSettings(Path({str(folder)!r}), threads=1, device='cpu'))\n"
        "    rows = [Example((1, 2, 3), (False, True, True))] * 50_000\n"
        "    batch = trainer.run([Task('aa', rows, [], None, 1)], Recipe(), GatePolicy())\n"
        "    await anext(batch)\n"
        "    print(trainer.pid, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    root = Path(__file__).parent.parent
    parent = await asyncio.create_subprocess_exec(
        sys.executable,
        str(script),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert parent.stdout is not None
    pid = int(await parent.stdout.readline())
    assert alive(pid)
    parent.kill()
    await parent.wait()
    for _ in range(1000):
        if not alive(pid):
            break
        await asyncio.sleep(0.05)
    assert not alive(pid)


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False


def test_the_first_version_learns_all_but_the_newest(renderer: Renderer):
    turns = talk("ann", 60)
    lesson = choose(turns, (), renderer, POLICY)
    assert lesson.all_turns == tuple(turn.id for turn in turns)
    assert lesson.trained_turns == tuple(turn.id for turn in turns[:54])
    assert learned_tokens(lesson.train) > 54 * 6
    assert max(len(row.token_ids) for row in lesson.train) <= POLICY.row_tokens
    assert any(len(row.token_ids) > POLICY.gate_tokens // 2 for row in lesson.gate)


def test_all_turns_are_learned_in_the_order_of_time_whether_the_rival_knew_them_or_not(renderer: Renderer):
    turns = talk("ann", 120)
    ids = tuple(turn.id for turn in turns)
    first = choose(turns, (), renderer, POLICY)
    lesson = choose(turns, ids[:72], renderer, POLICY)
    assert lesson.train == first.train == training_rows(turns[:108], renderer, POLICY.row_tokens)
    assert learned_turns(lesson.train) == 108
    assert lesson.trained_turns == ids[:108]
    assert (first.new, lesson.new) == (120, 48)


def test_nobody_is_judged_by_what_the_rival_has_learned(renderer: Renderer):
    turns = talk("ann", 100)
    ids = [turn.id for turn in turns]
    for seen, judges in ((90, 5), (96, 2), (99, 0), (100, 0), (40, 10)):
        lesson = choose(turns, ids[:seen], renderer, POLICY)
        assert list(lesson.newest_turns) == ids[100 - judges :]
        assert learned_turns(lesson.gate) == learned_turns(lesson.newest) == judges
        assert learned_turns(lesson.train) == 100 - judges
        assert sorted(lesson.all_turns) == sorted(ids)
        assert lesson.new == 100 - seen


def test_what_is_new_may_be_old_and_what_the_rival_learned_since_is_learned_too(renderer: Renderer):
    """Old replies rated up, or an archive brought along, are held out; what came later is not."""
    turns = talk("ann", 100)
    turns[30] = dataclasses.replace(turns[30], author="model")  # said upon the last of them
    new = [turn.id for turn in turns[20:30]]
    lesson = choose(turns, [turn.id for turn in turns if turn.id not in new], renderer, POLICY)
    assert lesson.newest_turns == tuple(new[5:])
    kept = [*turns[:25], *turns[31:]]
    assert lesson.trained_turns == tuple(turn.id for turn in kept)
    assert lesson.train == training_rows(kept, renderer, POLICY.row_tokens)
    assert learned_turns(lesson.gate) == learned_turns(lesson.newest) == 5
    assert (len(lesson.all_turns), lesson.new) == (99, 10)


def test_held_out_words_that_were_trained_judge_nobody_and_are_learned_all_the_same(renderer: Renderer):
    turns = talk("ann", 60)
    turns[57] = dataclasses.replace(turns[57], text=turns[3].text)
    lesson = choose(turns, (), renderer, POLICY)
    assert learned_turns(lesson.gate) == 5
    assert learned_turns(lesson.newest) == 6


def test_what_was_said_before_the_first_learned_turn_is_its_context(renderer: Renderer):
    turns = talk("ann", 60)
    turns[0] = dataclasses.replace(turns[0], author="model")
    (opening, *_) = choose(turns, (), renderer, POLICY).train
    alone = renderer.example(turns[:1]).token_ids
    assert opening.token_ids[: len(alone)] == alone
    assert not any(opening.learn_mask[: len(alone)])
    # Where older ones are left out as too far back, it is what was said since the last of those.
    turns[29] = dataclasses.replace(turns[29], author="model")
    few = dataclasses.replace(POLICY, most_turns=24)
    lesson = choose(turns, (), renderer, few)
    alone = renderer.example(turns[29:30]).token_ids
    assert lesson.trained_turns == tuple(turn.id for turn in turns[30:54])
    assert lesson.train[0].token_ids[: len(alone)] == alone


def test_what_the_first_version_left_out_as_too_far_back_is_not_new_to_the_next(renderer: Renderer):
    turns = talk("ann", 88)
    ids = [turn.id for turn in turns]
    policy = dataclasses.replace(POLICY, most_turns=40)
    first = choose(turns[:80], (), renderer, policy)
    assert first.trained_turns == tuple(ids[32:72])
    lesson = choose(turns, (*first.trained_turns, *first.newest_turns), renderer, policy)
    assert lesson.trained_turns == tuple(ids[44:84])
    assert (learned_turns(lesson.train), learned_turns(lesson.gate), lesson.new) == (40, 4, 8)
    assert lesson.newest_turns == tuple(ids[84:])
    assert lesson.all_turns == tuple(ids)


def test_a_very_long_history_costs_no_more_than_a_long_one(renderer: Renderer):
    """What judges is scored, and then learned: a tenth of an imported archive would be more than all else."""
    turns = talk("ann", 200)
    few = dataclasses.replace(POLICY, most_turns=12)
    lesson = choose(turns, (), renderer, few)
    assert lesson.newest_turns == tuple(turn.id for turn in turns[188:])
    assert lesson.trained_turns == tuple(turn.id for turn in turns[176:188])
    assert learned_turns(lesson.newest) == learned_turns(lesson.train) == 12
    assert lesson.all_turns == tuple(turn.id for turn in turns)


@on_one_loop
async def test_a_long_history_waits_for_new_turns_too(kit: Kit, store: Store):
    few = dataclasses.replace(kit, policy=dataclasses.replace(POLICY, most_turns=30))
    await store.append("ann", talk("ann", 60))
    ended, _ = await run(["ann"], few)
    assert ended["ann"].published
    await store.append("ann", talk("ann", 63))
    ended, _ = await run(["ann"], few)
    assert ended["ann"].reason == "not enough new turns since version 1: 3 of 8 to learn from"


@on_one_loop
async def test_old_turns_that_are_not_new_to_anyone_do_not_ask_for_a_refresh_again_and_again(
    kit: Kit, store: Store
):
    few = dataclasses.replace(kit, policy=dataclasses.replace(POLICY, most_turns=30))
    await store.append("ann", talk("ann", 40, first=100))
    assert (await run(["ann"], few))[0]["ann"].published
    await store.append("ann", talk("ann", 100))  # an archive of what was said long before
    await store.append("ann", talk("ann", 3, first=140))
    ended, _ = await run(["ann"], few)
    assert ended["ann"].reason == "not enough new turns since version 1: 3 of 8 to learn from"
    assert await store.learned_since_refresh("ann") == 3


@on_one_loop
async def test_what_only_a_refused_version_saw_is_new_and_judges_the_next_one(kit: Kit, store: Store):
    await store.append("ann", talk("ann", 40))
    await run(["ann"], kit)
    await store.append("ann", talk("ann", 20, first=40))
    never = dataclasses.replace(POLICY, gate=dataclasses.replace(POLICY.gate, min_gain=50.0))
    for versions in (2, 3):
        ended, _ = await run(["ann"], dataclasses.replace(kit, policy=never))
        assert "on 6 held-out turns" in ended["ann"].reason
        records = await store.versions("ann")
        assert [record.accepted for record in records] == [True, *[False] * (versions - 1)]
        assert (records[-1].parent, records[-1].anew) == (1, True)
        assert sorted(records[-1].turn_ids) == sorted(turn.id for turn in talk("ann", 54))


def test_others_turns_are_context_and_held_out_turns_are_nowhere_in_training(renderer: Renderer):
    turns = [
        dataclasses.replace(turn, author="model") if turn.role == "assistant" else turn
        for turn in talk("ann", 80)
    ]
    lesson = choose(turns, (), renderer, dataclasses.replace(POLICY, row_tokens=64))
    assert len(lesson.all_turns) == sum(map(learned, turns)) == 40
    assert learned_turns(lesson.train) == len(lesson.trained_turns) == 36
    assert sum(len(row.token_ids) for row in lesson.train) > 1.5 * learned_tokens(lesson.train)
    held_out = {renderer.example([turn]).token_ids for turn in turns[72:]}
    trained = [row.token_ids for row in lesson.train]
    for words in held_out:
        assert not any(words == ids[at : at + len(words)] for ids in trained for at in range(len(ids)))


def is_in(turns: list[Turn], rows: list[Example], renderer: Renderer) -> bool:
    """Whether these turns follow each other in a row."""
    ids = renderer.example(turns).token_ids
    return any(ids == row.token_ids[at : at + len(ids)] for row in rows for at in range(len(row.token_ids)))


@pytest.mark.parametrize("taken_out", [True, False])
def test_a_reply_is_shown_though_the_turn_after_it_is_taken_out_or_held_out(
    taken_out: bool, renderer: Renderer
):
    """It then stands before the next one, and yet that was not asked for in its place."""
    turns = [
        dataclasses.replace(turn, author="model", version=0) if turn.role == "assistant" else turn
        for turn in talk("ann", 60)
    ]
    turns[24] = dataclasses.replace(turns[24], removed=taken_out)
    turns[25] = dataclasses.replace(turns[25], rating="up")
    seen = () if taken_out else {turn.id for turn in turns} - {"ann-22", "ann-24"}
    lesson = choose(turns, seen, renderer, dataclasses.replace(POLICY, row_tokens=256))
    assert is_in([*turns[22:24], *turns[25:27]], lesson.train, renderer)


def test_a_correction_is_learned_in_the_place_of_what_it_corrects_whenever_it_was_written(renderer: Renderer):
    turns = talk("ann", 60)
    right = dataclasses.replace(turns[3], id="right", at=turns[33].at, corrects="ann-3")
    turns[3] = dataclasses.replace(turns[3], author="model", removed=True)
    lesson = choose([*turns, right], (), renderer, dataclasses.replace(POLICY, row_tokens=256))
    assert is_in([turns[2], dataclasses.replace(right, corrects=None), turns[4]], lesson.train, renderer)


def learned_tokens(rows: list[Example]) -> int:
    return sum(sum(row.learn_mask) for row in rows)


def learned_turns(rows: list[Example]) -> int:
    """Every learned turn ends with the end token, which is learned too."""
    return sum(
        learn and token == 53
        for row in rows
        for token, learn in zip(row.token_ids, row.learn_mask, strict=True)
    )
