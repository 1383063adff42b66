import dataclasses
import json
import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.adapter_files import AdapterError, LoraModule, LoraWeights, NotFinite, read_adapter, write_adapter
from personalization import publish as room
from personalization.history import Turn
from personalization.lineage import stand_ins
from personalization.publish import DiskFull, Origin, Shelf, Superseded, UnknownVersion
from personalization.store import HistoryForgotten, Pointer, Store
from personalization.store_lua import life_key
from tests.redis_fixture import SECRET
from tests.small_model import CONFIG

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
ORIGIN = Origin(
    base_model="demo",
    base_hash="abc",
    created_at=NOW,
    reason="better",
    examples=3,
    turn_ids=("t1", "t2"),
    numbers={"gain": 0.1},
    seed=7,
)


def weights(value: float = 0.5) -> LoraWeights:
    a, b = torch.full((2, 32), value), torch.full((32, 2), value)
    return LoraWeights(
        (LoraModule(0, "q_proj", a, b, 2.0), LoraModule(1, "o_proj", a.clone(), b.clone(), 2.0))
    )


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path / "adapters", CONFIG, free_bytes_floor=0)


async def known(store: Store, user: str = "ann") -> str:
    await store.append(user, [Turn("t1", "c", NOW, "user", "hello", "person")])
    return store.adapter_id(user)


def on_disk(shelf: Shelf) -> list[str]:
    return sorted(str(path.relative_to(shelf.root).parts[1]) for path in shelf.root.glob("*/*"))


async def test_a_version_is_whole_on_disk_recorded_and_serving(shelf, store):
    adapter_id = await known(store)
    version = await room.publish(shelf, store, "ann", weights(), ORIGIN, await store.pointer("ann"))
    assert version == 1
    assert (await store.pointer("ann")).version == 1
    folder = shelf.root / adapter_id / "1"
    assert torch.equal(read_adapter(folder, CONFIG).modules[1].a, weights().modules[1].a)
    meta = json.loads((folder / "attune.json").read_text())
    assert meta["base_hash"] == "abc"
    assert (meta["version"], meta["parent"], meta["seed"], meta["turn_ids"]) == (1, 0, 7, ["t1", "t2"])
    assert meta["anew"] is True
    (record,) = await store.versions("ann")
    assert (record.version, record.accepted, record.numbers) == (1, True, {"gain": 0.1})
    assert on_disk(shelf) == ["1"]


async def test_of_two_on_the_same_parent_the_later_loses_and_leaves_no_folder(shelf, store):
    await known(store)
    parent = await store.pointer("ann")
    await room.publish(shelf, store, "ann", weights(), ORIGIN, parent)
    with pytest.raises(Superseded):
        await room.publish(shelf, store, "ann", weights(), ORIGIN, parent)
    assert (await store.pointer("ann")).version == 1
    assert [record.version for record in await store.versions("ann")] == [1]
    assert on_disk(shelf) == ["1"]


async def test_of_two_on_trial_on_the_same_parent_the_later_loses_too(shelf, store):
    """As one that was taken for lost too early, and the one that came for it."""
    await known(store)
    await room.publish(shelf, store, "ann", weights(), ORIGIN, await store.pointer("ann"))
    parent = await store.pointer("ann")
    await room.publish(shelf, store, "ann", weights(), ORIGIN, parent, share=0.25)
    with pytest.raises(Superseded):
        await room.publish(shelf, store, "ann", weights(), ORIGIN, parent, share=0.25)
    pointer = await store.pointer("ann")
    assert (pointer.version, pointer.trial.version) == (1, 2)
    assert on_disk(shelf) == ["1", "2"]


async def test_a_job_from_before_the_person_was_forgotten_publishes_nothing(shelf, store):
    await known(store)
    parent = await store.pointer("ann")
    await store.forget("ann")
    with pytest.raises(HistoryForgotten):
        await room.publish(shelf, store, "ann", weights(), ORIGIN, parent)
    assert on_disk(shelf) == []


async def test_forgetting_between_number_and_pointer_takes_the_folder_away_again(shelf, store, monkeypatch):
    await known(store)
    parent = await store.pointer("ann")
    place = room.place

    def place_while_forgotten(folder, *rest):
        place(folder, *rest)
        assert folder.is_dir()
        placed.append(folder)

    placed: list[Path] = []
    monkeypatch.setattr(room, "place", place_while_forgotten)
    number = store.next_version

    async def number_then_forget(user, **rest):
        version = await number(user, **rest)
        await store.forget(user)
        return version

    monkeypatch.setattr(store, "next_version", number_then_forget)
    with pytest.raises(HistoryForgotten):
        await room.publish(shelf, store, "ann", weights(), ORIGIN, parent)
    assert placed
    assert on_disk(shelf) == []
    assert (await store.pointer("ann")).version == 0


async def test_forgetting_right_behind_the_pointer_takes_the_folder_away_again(shelf, store, monkeypatch):
    await known(store)
    parent = await store.pointer("ann")
    move = store.compare_and_set

    async def move_then_forget(user, *rest, **more):
        moved = await move(user, *rest, **more)
        await store.forget(user)
        return moved

    monkeypatch.setattr(store, "compare_and_set", move_then_forget)
    with pytest.raises(HistoryForgotten):
        await room.publish(shelf, store, "ann", weights(), ORIGIN, parent)
    assert on_disk(shelf) == []
    assert await store.versions("ann") == []


async def test_weights_that_are_not_finite_never_get_a_place(shelf, store):
    await known(store)
    with pytest.raises(NotFinite):
        await room.publish(shelf, store, "ann", weights(float("nan")), ORIGIN, await store.pointer("ann"))
    assert (await store.pointer("ann")).version == 0
    assert on_disk(shelf) == []


async def test_below_the_floor_of_free_disk_nothing_is_written(shelf, store):
    await known(store)
    full = dataclasses.replace(shelf, free_bytes_floor=1 << 60)
    with pytest.raises(DiskFull, match="expected 1099511627776 MiB of free disk"):
        await room.publish(full, store, "ann", weights(), ORIGIN, await store.pointer("ann"))
    assert on_disk(shelf) == []


async def test_a_full_disk_while_writing_leaves_nothing_behind(shelf, store, monkeypatch):
    await known(store)

    def no_space(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(room, "_sync", no_space)
    with pytest.raises(OSError, match="No space"):
        await room.publish(shelf, store, "ann", weights(), ORIGIN, await store.pointer("ann"))
    assert on_disk(shelf) == []
    assert (await store.pointer("ann")).version == 0


async def test_files_and_folders_are_synced_before_the_pointer_moves(shelf, store, monkeypatch):
    adapter_id = await known(store)
    synced: list[str] = []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    await room.publish(shelf, store, "ann", weights(), ORIGIN, await store.pointer("ann"))
    files, aside, parents = synced[:3], synced[3], synced[4:]
    assert sorted(files) == ["adapter_config.json", "adapter_model.safetensors", "attune.json"]
    assert aside.startswith(".aside-")
    assert parents == [adapter_id, "adapters"]


async def test_rolling_back_and_forward_again(shelf, store):
    await known(store)
    for value in (0.1, 0.2):
        await room.publish(shelf, store, "ann", weights(value), ORIGIN, await store.pointer("ann"))
    assert (await room.rollback(shelf, store, "ann", 1)).version == 2
    assert (await store.pointer("ann")).version == 1
    await room.rollback(shelf, store, "ann", 0)
    await room.rollback(shelf, store, "ann", 2)
    assert (await store.pointer("ann")).version == 2
    assert await room.publish(shelf, store, "ann", weights(0.3), ORIGIN, await store.pointer("ann")) == 3


async def test_on_trial_the_version_before_stays_and_either_can_be_chosen_by_hand(shelf, store):
    await known(store)
    await room.publish(shelf, store, "ann", weights(0.1), ORIGIN, await store.pointer("ann"))
    for expected in (1, 3):
        before = await store.pointer("ann")
        version = await room.publish(shelf, store, "ann", weights(0.2), ORIGIN, before, share=0.25)
        pointer = await store.pointer("ann")
        assert (pointer.version, pointer.trial.version, pointer.trial.share) == (1, version, 0.25)
        chosen = version if expected == 3 else 1
        await room.rollback(shelf, store, "ann", chosen)
        pointer = await store.pointer("ann")
        assert (pointer.version, pointer.trial) == (expected, None)
    ends = [record.trial for record in await store.versions("ann")]
    assert [end and end.outcome for end in ends] == [None, "by hand", "by hand"]


async def test_a_version_published_during_a_trial_takes_its_place(shelf, store):
    await known(store)
    for share in (0.0, 0.25, 0.25):
        await room.publish(shelf, store, "ann", weights(), ORIGIN, await store.pointer("ann"), share=share)
    pointer = await store.pointer("ann")
    assert (pointer.version, pointer.trial.version) == (1, 3)
    await room.publish(shelf, store, "ann", weights(), ORIGIN, pointer)
    pointer = await store.pointer("ann")
    assert (pointer.version, pointer.trial) == (4, None)
    ends = [record.trial for record in await store.versions("ann")]
    assert [end and end.outcome for end in ends] == [None, "replaced", "replaced", None]
    assert on_disk(shelf) == ["1", "2", "3", "4"]


async def test_one_cannot_go_back_to_what_was_never_published(shelf, store):
    await known(store)
    refused = await room.note_refusal(store, "ann", ORIGIN, await store.pointer("ann"))
    for version in (refused, 9):
        with pytest.raises(UnknownVersion):
            await room.rollback(shelf, store, "ann", version)
    await room.publish(shelf, store, "ann", weights(), ORIGIN, await store.pointer("ann"))
    (shelf.root / store.adapter_id("ann") / "2" / "adapter_model.safetensors").write_bytes(b"broken")
    await room.rollback(shelf, store, "ann", 0)
    with pytest.raises(AdapterError):
        await room.rollback(shelf, store, "ann", 2)
    assert (await store.pointer("ann")).version == 0


async def test_a_refused_candidate_leaves_its_numbers_and_no_folder(shelf, store):
    await known(store)
    version = await room.note_refusal(store, "ann", ORIGIN, await store.pointer("ann"))
    (record,) = await store.versions("ann")
    assert (record.version, record.accepted, record.reason) == (version, False, "better")
    assert record.anew
    assert not shelf.root.exists()


async def test_any_peft_folder_can_be_imported_as_the_next_version(shelf, store, tmp_path):
    await known(store)
    write_adapter(tmp_path / "theirs", weights(0.3), CONFIG, base_model="elsewhere", dtype=torch.bfloat16)
    version = await room.import_adapter(
        shelf, store, "ann", tmp_path / "theirs", base_model="demo", base_hash="abc"
    )
    (record,) = await store.versions("ann")
    assert record.version == version == (await store.pointer("ann")).version
    assert record.reason == "imported from theirs"
    stored = load_file(shelf.root / store.adapter_id("ann") / "1" / "adapter_model.safetensors")
    assert len(stored) == 4
    await room.import_adapter(shelf, store, "ann", tmp_path / "theirs", base_model="demo", base_hash="abc")
    assert stand_ins(await store.versions("ann"), set(), 2) == [1]


async def test_removing_a_persons_versions_leaves_the_others(shelf, store):
    for user in ("ann", "bob"):
        await known(store, user)
        for _ in range(2):
            await room.publish(shelf, store, user, weights(), ORIGIN, await store.pointer(user))
    removed = room.remove_versions(shelf.root, store.adapter_id("ann"))
    assert removed.versions == 2
    assert removed.nbytes > 1000
    assert [path.name for path in shelf.root.iterdir()] == [store.adapter_id("bob")]
    assert room.remove_versions(shelf.root, store.adapter_id("ann")) == room.Removed(0, 0)


async def test_tidying_removes_what_crashes_left_and_nothing_else(shelf, store, redis):
    await known(store)
    await redis.hset(life_key("f" * 64), "epoch", 1)  # somebody who was forgotten
    await room.publish(shelf, store, "ann", weights(), ORIGIN, await store.pointer("ann"))
    person = shelf.root / store.adapter_id("ann")
    leftovers = [person / ".aside-1", person / "7", shelf.root / ("f" * 64) / "1"]
    for folder in leftovers:
        folder.mkdir(parents=True)
    assert await room.tidy(shelf, store) == 0  # they may be somebody's work just now
    later = time.time() + timedelta(hours=2).total_seconds()
    assert await room.tidy(shelf, store, now=later) == 4
    assert on_disk(shelf) == ["1"]
    assert [path.name for path in shelf.root.iterdir()] == [person.name]


async def test_someone_forgotten_while_folders_are_tidied_stops_nothing(shelf, store, redis):
    class ForgottenMeanwhile(Store):
        async def pointer(self, user: str) -> Pointer:
            room.remove_versions(shelf.root, self.adapter_id("ann"))
            room.remove_versions(shelf.root, self.adapter_id("bob"))
            return await super().pointer(user)

    for user in ("ann", "bob", "cat"):
        await known(store, user)
        await room.publish(shelf, store, user, weights(), ORIGIN, await store.pointer(user))
    (shelf.root / store.adapter_id("cat") / "7").mkdir()
    later = time.time() + timedelta(hours=2).total_seconds()
    assert await room.tidy(shelf, ForgottenMeanwhile(redis, SECRET), now=later) == 1
    assert [path.name for path in shelf.root.iterdir()] == [store.adapter_id("cat")]


async def test_tidying_removes_nothing_when_the_store_is_not_the_one_of_these_adapters(shelf, store, redis):
    """As with another Redis' address, or one whose file was lost."""
    await known(store)
    await room.publish(shelf, store, "ann", weights(), ORIGIN, await store.pointer("ann"))
    later = time.time() + timedelta(hours=2).total_seconds()
    await redis.flushdb()
    assert await room.tidy(shelf, store, now=later) == 0
    assert on_disk(shelf) == ["1"]
    # But who was forgotten is known to have been there, if nobody else is.
    await known(store)
    await store.next_version("ann")
    await store.forget("ann")
    assert await room.tidy(shelf, store, now=later) == 2
    assert on_disk(shelf) == []


async def test_a_store_that_lost_its_file_learns_of_one_person_and_the_others_keep_their_folders(
    shelf, store, redis
):
    for user in ("ann", "bob"):
        await known(store, user)
        for _ in range(2):
            await room.publish(shelf, store, user, weights(), ORIGIN, await store.pointer(user))
    await redis.flushdb()
    await known(store)
    # The numbers begin anew, beside the folders of those that were.
    assert await room.publish(shelf, store, "ann", weights(0.25), ORIGIN, await store.pointer("ann")) == 3
    later = time.time() + timedelta(hours=2).total_seconds()
    assert await room.tidy(shelf, store, now=later) == 2
    theirs = {user: shelf.root / store.adapter_id(user) for user in ("ann", "bob")}
    assert sorted(path.name for path in theirs["ann"].iterdir()) == ["3"]
    assert sorted(path.name for path in theirs["bob"].iterdir()) == ["1", "2"]


async def test_tidying_gives_a_serving_version_the_record_that_a_crash_cost(shelf, store):
    adapter_id = await known(store)
    folder = shelf.root / adapter_id / "1"
    room.place(folder, weights(), room._meta(1, ORIGIN), CONFIG)
    assert await store.next_version("ann") == 1
    assert await store.compare_and_set("ann", 0, 1)
    await room.tidy(shelf, store, now=time.time() + 7200)
    (record,) = await store.versions("ann")
    assert (record.version, record.turn_ids, record.anew) == (1, ("t1", "t2"), True)
    assert folder.is_dir()


@pytest.mark.parametrize("how", ["rolled back", "imported over"])
async def test_a_version_whose_record_a_crash_cost_can_be_returned_to_after_it_was_left(
    shelf, store, tmp_path, how
):
    adapter_id = await known(store)
    room.place(shelf.root / adapter_id / "1", weights(), room._meta(1, ORIGIN), CONFIG)
    assert await store.next_version("ann") == 1
    assert await store.compare_and_set("ann", 0, 1)  # and then the crash
    if how == "rolled back":
        await room.rollback(shelf, store, "ann", 0)
    else:
        write_adapter(tmp_path / "a", weights(0.3), CONFIG, base_model="demo", dtype=torch.float32)
        await room.import_adapter(shelf, store, "ann", tmp_path / "a", base_model="demo", base_hash="abc")
    await room.tidy(shelf, store, now=time.time() + 7200)
    await room.rollback(shelf, store, "ann", 1)
    assert (await store.pointer("ann")).version == 1
    assert (await store.versions("ann"))[0].turn_ids == ("t1", "t2")


@pytest.mark.parametrize("damage", ["[]", "{}", '{"parent": 0', '{"parent": 0, "created_at": 5}'])
async def test_a_serving_version_whose_file_is_damaged_goes_on_without_a_record(shelf, store, damage):
    folder = shelf.root / await known(store) / "1"
    room.place(folder, weights(), room._meta(1, ORIGIN), CONFIG)
    (folder / "attune.json").write_text(damage)
    assert await store.compare_and_set("ann", 0, 1)
    assert await room.tidy(shelf, store, now=time.time() + 7200) == 0
    assert folder.is_dir()
    assert await store.versions("ann") == []


async def test_a_version_whose_file_does_not_say_so_was_not_trained_anew(shelf, store):
    adapter_id = await known(store)
    meta = room._meta(1, dataclasses.replace(ORIGIN, parent=4))
    del meta["anew"]
    room.place(shelf.root / adapter_id / "1", weights(), meta, CONFIG)
    assert await store.compare_and_set("ann", 0, 1)
    (record,) = await room.recorded_versions(shelf, store, "ann", await store.pointer("ann"))
    assert (record.parent, record.anew) == (4, False)


async def test_tidying_keeps_a_version_on_trial_and_gives_it_its_record(shelf, store):
    adapter_id = await known(store)
    folder = shelf.root / adapter_id / "1"
    room.place(folder, weights(), room._meta(1, ORIGIN), CONFIG)
    assert await store.next_version("ann") == 1
    assert await store.begin_trial("ann", 0, 1, 0.5)  # and then the crash
    await room.tidy(shelf, store, now=time.time() + 7200)
    assert folder.is_dir()
    (record,) = await store.versions("ann")
    assert (record.version, record.turn_ids) == (1, ("t1", "t2"))
