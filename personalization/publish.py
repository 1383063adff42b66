"""A version comes to life: write aside, fsync, check, rename, then move the pointer by compare-and-set.

A version is whole on disk before anyone can learn its number from the pointer, and it never changes. Of two
who publish on the same parent the later loses the compare-and-set and takes its folder away again; so does a
job that began before its person was forgotten. What a crash leaves behind is found and removed by `tidy`.

    <adapter root>/<adapter id>/<version>/      adapter_config.json, adapter_model.safetensors, attune.json
    <adapter root>/<adapter id>/.aside-*        being written, or being removed
"""

import asyncio
import json
import os
import shutil
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import structlog
import torch

from engine.adapter_files import (
    META_FILE,
    AdapterError,
    LoraWeights,
    read_adapter,
    version_folder,
    write_adapter,
)
from engine.model import ModelConfig
from personalization.store import HistoryForgotten, Pointer, Store, VersionRecord
from personalization.trial import ended

log = structlog.get_logger()

_ASIDE = ".aside-"
FREE_BYTES_FLOOR = 256 << 20
# A folder without a record may be one that somebody is just publishing; after so long it is a leftover.
LEFTOVER_AFTER_S = 3600.0


class PublishError(Exception):
    """Base of what keeps a version from being published."""


class DiskFull(PublishError):
    """Less room than the floor: `expected` (least) and `got`, in bytes. What serves stays."""

    def __init__(self, expected: int, got: int) -> None:
        super().__init__(f"expected {expected >> 20} MiB of free disk for a new version, got {got >> 20} MiB")
        self.expected = expected
        self.got = got


class Superseded(PublishError):
    """The pointer moved while this version was made: `expected` parent."""

    def __init__(self, expected: int) -> None:
        super().__init__(f"expected version {expected} to be serving still; another version took its place")
        self.expected = expected


class UnknownVersion(PublishError, LookupError):
    """No such version to go back to: `version`."""

    def __init__(self, version: int, reason: str) -> None:
        super().__init__(f"expected a published version, got {version}: {reason}")
        self.version = version


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a version comes from; attune.json beside the weights. `parent` is the version it was judged
    against, of an imported one the version it took the place of (0: none), `population` the population
    adapter that it began with (0: none), `numbers` are the gate's, `turn_ids` what it learned from, `seed`
    None for an imported one."""

    base_model: str
    base_hash: str
    created_at: datetime
    reason: str
    parent: int = 0
    examples: int = 0
    turn_ids: tuple[str, ...] = ()
    numbers: dict[str, float] = field(default_factory=dict)
    seed: int | None = None
    population: int = 0


@dataclass(frozen=True, slots=True)
class Removed:
    """What `remove_versions` took from the disk."""

    versions: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Shelf:
    """Where versions are kept and for which model. `free_bytes_floor`: no new version below it."""

    root: Path
    config: ModelConfig
    free_bytes_floor: int = FREE_BYTES_FLOOR


async def publish(
    shelf: Shelf,
    store: Store,
    user: str,
    weights: LoraWeights,
    origin: Origin,
    before: Pointer,
    *,
    share: float = 0.0,
) -> int:
    """Make `weights` the person's next version, if the one of `before` still serves. Returns its number.
    `share` above 0: it answers so many of their replies on trial, until what they say of those decides
    (`trial.py`). A trial that is under way is over.

    Raises DiskFull, AdapterError (the weights are not fit to be served), Superseded, HistoryForgotten.
    """
    check_room(shelf)
    version, folder = await _next_place(shelf, store, user, before.epoch)
    meta = _meta(version, origin)
    await asyncio.to_thread(place, folder, weights, meta, shelf.config)
    end = None if before.trial is None else ended(before, "replaced", origin.created_at)
    if share:
        moved = await store.begin_trial(user, before.version, version, share, epoch=before.epoch, end=end)
    else:
        moved = await store.compare_and_set(user, before.version, version, epoch=before.epoch, end=end)
    if not moved:
        await asyncio.to_thread(_take_away, folder)
        if (await store.pointer(user)).epoch != before.epoch:
            raise HistoryForgotten(user)
        raise Superseded(before.version)
    try:
        # After the pointer, so that who lost leaves no record; `recorded_versions` makes up for a crash here.
        await store.add_version(user, _record(version, meta), epoch=before.epoch)
    except HistoryForgotten:
        await asyncio.to_thread(_take_away, folder)
        raise
    return version


async def note_refusal(store: Store, user: str, origin: Origin, before: Pointer) -> int:
    """Keep the numbers of a candidate that the gate refused; it gets a number but no folder."""
    version = await store.next_version(user, epoch=before.epoch)
    meta = _meta(version, origin)
    await store.add_version(user, _record(version, meta, accepted=False), epoch=before.epoch)
    return version


async def rollback(
    shelf: Shelf, store: Store, user: str, version: int, *, before: Pointer | None = None
) -> Pointer:
    """Let `version` (0: the bare base) serve again, if the one of `before` (None: whichever) still does;
    returns the pointer as it was. A trial is over by it, in favour of its version if that is the one.
    Raises UnknownVersion, AdapterError, Superseded."""
    before = before or await store.pointer(user)
    records = await recorded_versions(shelf, store, user, before)  # of the one that is left too
    if version != 0:
        record = next((each for each in records if each.version == version), None)
        if record is None or not record.accepted:
            raise UnknownVersion(version, "this person has none of that number that was ever published")
        folder = version_folder(shelf.root, store.adapter_id(user), version)
        if not folder.is_dir():
            raise UnknownVersion(version, "its files are gone")
        await asyncio.to_thread(read_adapter, folder, shelf.config)
    end = None if before.trial is None else ended(before, "by hand", datetime.now(UTC))
    if not await store.compare_and_set(user, before.version, version, epoch=before.epoch, end=end):
        raise Superseded(before.version)
    return before


async def import_adapter(
    shelf: Shelf, store: Store, user: str, folder: Path, *, base_model: str, base_hash: str
) -> int:
    """Publish any PEFT LoRA folder as the person's next version; the gate is not asked. Raises AdapterError,
    DiskFull, Superseded."""
    before = await store.pointer(user)
    await recorded_versions(shelf, store, user, before)
    weights = await asyncio.to_thread(read_adapter, folder, shelf.config)
    said = f"imported from {folder.name}"
    origin = Origin(base_model, base_hash, datetime.now(UTC), said, parent=before.version)
    return await publish(shelf, store, user, weights, origin, before)


def remove_versions(root: Path, adapter_id: str) -> Removed:
    """Take every version of a person from the disk. Forget the person in the store first: a job that still
    runs finds its epoch old and removes what it wrote since."""
    folder = version_folder(root, adapter_id, 1).parent
    if not folder.is_dir():
        return Removed(0, 0)
    versions = sum(path.name.isdecimal() for path in folder.iterdir())
    nbytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    _take_away(folder)
    return Removed(versions, nbytes)


async def tidy(shelf: Shelf, store: Store, *, now: float | None = None) -> int:
    """Remove what crashes left under the adapter root: folders being written, versions without a record,
    people who are gone. Lost records come back (`recorded_versions`). Returns how many folders went.

    A store that never gave a person a version is not the one that their adapters belong to: another Redis, or
    one that lost its file. Then nothing of theirs is removed."""
    if not shelf.root.is_dir():
        return 0
    before = (time.time() if now is None else now) - LEFTOVER_AFTER_S
    people = sorted(path for path in shelf.root.iterdir() if path.is_dir())
    ever_known = await store.ever_knew([person.name for person in people])
    if strangers := len(people) - len(ever_known):
        log.warning("versions.of_nobody", folder=str(shelf.root), people=strangers)
    users = {store.adapter_id(user): user async for user in store.users()}
    removed = 0
    for person in (each for each in people if each.name in ever_known):
        known = await _known_versions(shelf, store, users.get(person.name))
        for folder in [*_inside(person), person]:
            keep = bool(_inside(person)) if folder == person else folder.name in known
            if not keep and _changed_at(folder) < before:
                await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
                removed += 1
    return removed


async def recorded_versions(shelf: Shelf, store: Store, user: str, pointer: Pointer) -> list[VersionRecord]:
    """The person's versions, oldest first. One that answers, if only on trial, gets its record back from
    attune.json if a crash, or a store that went away, came between the two: without it nobody could tell
    what it has learned. A file that cannot be read is logged, and its version goes on without a record."""
    found = await store.versions(user)
    for version in pointer.answering - {record.version for record in found} - {0}:
        meta_file = version_folder(shelf.root, store.adapter_id(user), version) / META_FILE
        if not meta_file.is_file():
            continue
        try:
            record = _record(version, json.loads(meta_file.read_text(encoding="utf-8")))
        except (OSError, ValueError, LookupError, TypeError):
            log.exception("versions.unreadable", file=str(meta_file))
            continue
        await store.add_version(user, record, epoch=pointer.epoch)
        found = await store.versions(user)
    return found


async def _next_place(shelf: Shelf, store: Store, user: str, epoch: int) -> tuple[int, Path]:
    """The next version's number and folder. A store that lost its newest words gives numbers out again whose
    folders are there still; what was known by such a number stays what it was."""
    while True:
        version = await store.next_version(user, epoch=epoch)
        folder = version_folder(shelf.root, store.adapter_id(user), version)
        if not folder.exists():
            return version, folder


async def _known_versions(shelf: Shelf, store: Store, user: str | None) -> set[str]:
    if user is None:
        return set()
    pointer = await store.pointer(user)
    known = {record.version for record in await recorded_versions(shelf, store, user, pointer)}
    return {str(version) for version in known | pointer.answering}


def _inside(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except FileNotFoundError:  # its person was forgotten meanwhile
        return []


def _changed_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # somebody finished with it meanwhile
        return float("inf")


def check_room(shelf: Shelf) -> None:
    """Raises DiskFull."""
    shelf.root.mkdir(mode=0o700, parents=True, exist_ok=True)
    free = shutil.disk_usage(shelf.root).free
    if free < shelf.free_bytes_floor:
        raise DiskFull(shelf.free_bytes_floor, free)


def _meta(version: int, origin: Origin) -> dict[str, Any]:
    return {
        **asdict(origin),
        "version": version,
        "created_at": origin.created_at.isoformat(),
        "turn_ids": list(origin.turn_ids),
        "anew": True,  # where this is missing the version was carried on from its parent
    }


def _record(version: int, meta: dict[str, Any], *, accepted: bool = True) -> VersionRecord:
    return VersionRecord(
        version=version,
        parent=meta["parent"],
        created_at=datetime.fromisoformat(meta["created_at"]),
        accepted=accepted,
        reason=meta["reason"],
        numbers=meta["numbers"],
        examples=meta["examples"],
        turn_ids=tuple(meta["turn_ids"]),
        population=meta["population"],
        anew=meta.get("anew", False),
    )


def place(folder: Path, weights: LoraWeights, meta: dict[str, Any], config: ModelConfig) -> None:
    """Write an adapter beside its place, make sure of it, and rename it there."""
    aside = folder.parent / f"{_ASIDE}{uuid.uuid4().hex}"
    aside.mkdir(mode=0o700, parents=True)
    try:
        write_adapter(aside, weights, config, base_model=meta["base_model"], dtype=torch.float32)
        text = json.dumps(meta, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        (aside / META_FILE).write_text(text, encoding="utf-8")
        read_adapter(aside, config)  # what the engine will do: NaN, shapes and names are found here
        for path in (*aside.iterdir(), aside):
            _sync(path)
        aside.rename(folder)
        for path in (folder.parent, folder.parent.parent):
            _sync(path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _take_away(folder: Path) -> None:
    """Remove a folder so that no reader ever sees half of it: first it loses its name."""
    aside = folder.parent / f"{_ASIDE}{uuid.uuid4().hex}"
    try:
        folder.rename(aside)
    except FileNotFoundError:  # forgotten in the meantime
        return
    shutil.rmtree(aside)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


__all__: Sequence[str] = [
    "AdapterError", "DiskFull", "Origin", "PublishError", "Removed", "Shelf", "Superseded", "UnknownVersion",
    "check_room", "import_adapter", "note_refusal", "publish", "recorded_versions", "remove_versions",
    "rollback", "tidy",
]  # fmt: skip
