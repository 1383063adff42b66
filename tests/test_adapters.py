"""Disk → host → device: loads run when the test says so, time passes when the test says so."""

from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.adapters import AdapterCache, AdapterUnavailable
from engine.pages import BrokenBooks, PagePool
from engine.request import AdapterRef

A1, A2, B1, C1 = AdapterRef("a", 1), AdapterRef("a", 2), AdapterRef("b", 1), AdapterRef("c", 1)


@dataclass(frozen=True)
class Shape:
    slabs_needed: int


@dataclass(frozen=True)
class Bytes:
    nbytes: int


@dataclass(frozen=True)
class Packed:
    layout: Shape
    image: Bytes


@dataclass(frozen=True)
class Placed:
    ref: AdapterRef
    slabs: tuple[int, ...]


@dataclass
class Copying:
    is_done: bool

    def done(self) -> bool:
        return self.is_done


class LaterExecutor(Executor):
    """Runs what was submitted when the test calls `run_one`."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Future[Any], Callable[[], Any]]] = []

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.waiting.append((future, lambda: fn(*args, **kwargs)))
        return future

    def run_one(self) -> None:
        future, call = self.waiting.pop(0)
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(call())
        except Exception as error:
            future.set_exception(error)

    def run_all(self) -> None:
        while self.waiting:
            self.run_one()


class World:
    def __init__(
        self, slabs: int = 8, host_bytes: int = 1000, max_loading: int = 4, retry_s: float = 1.0
    ) -> None:
        self.now = 0.0
        self.disk: dict[AdapterRef, Packed | Exception] = {
            ref: Packed(Shape(2), Bytes(100)) for ref in (A1, A2, B1, C1)
        }
        self.reads: list[AdapterRef] = []
        self.read_s = 0.0
        self.notified = 0
        self.place_error: Exception | None = None
        self.copies: list[Copying] = []
        self.copies_are_instant = True
        self.pool = PagePool(slabs)
        self.readers = LaterExecutor()
        self.cache = AdapterCache(
            self.pool,
            self.load,
            self.place,
            self.readers,
            lambda: self.now,
            host_bytes=host_bytes,
            max_loading=max_loading,
            retry_s=retry_s,
            notify=self.notify,
        )
        self.pool.on_evicted("kv", lambda item: None)

    def load(self, ref: AdapterRef) -> Packed:
        self.reads.append(ref)
        self.now += self.read_s
        found = self.disk[ref]
        if isinstance(found, Exception):
            raise found
        return found

    def place(self, ref: AdapterRef, packed: Packed, slabs: tuple[int, ...]) -> tuple[Placed, Copying]:
        if self.place_error is not None:
            raise self.place_error
        assert len(slabs) == packed.layout.slabs_needed
        self.copies.append(Copying(self.copies_are_instant))
        return Placed(ref, slabs), self.copies[-1]

    def notify(self) -> None:
        self.notified += 1

    def bring(self, *refs: AdapterRef) -> None:
        """What waiting requests do: require until each has landed."""
        for _ in range(2 * len(refs) + 1):
            self.cache.require(refs)
            self.readers.run_all()
            self.cache.poll()


def test_an_adapter_goes_from_disk_to_host_to_device() -> None:
    world = World()
    assert world.cache.tier(A1) == "disk"
    world.cache.require([A1])
    assert not world.cache.ready(A1)
    world.readers.run_one()
    assert world.notified == 1
    world.cache.poll()
    assert world.cache.tier(A1) == "host"
    assert world.cache.slabs_to_place(A1) == 2
    assert world.cache.pin(A1) == Placed(A1, (0, 1))
    assert world.cache.tier(A1) == "device"
    assert world.cache.slabs_to_place(A1) == 0
    assert world.pool.owned("adapter") == 2


def test_an_adapter_asked_for_twice_is_read_once() -> None:
    world = World()
    world.cache.prefetch(A1)
    world.cache.require([A1, A1])
    world.bring(A1)
    world.bring(A1)
    assert world.reads == [A1]


def test_a_prefetch_fills_the_device_only_where_room_is_free() -> None:
    world = World(slabs=3)
    world.cache.prefetch(A1)
    world.cache.prefetch(B1)
    world.readers.run_all()
    world.cache.poll()
    assert world.cache.tier(A1) == "device"
    assert world.cache.tier(B1) == "host"
    assert world.pool.evictions["adapter"] == 0


def test_a_prefetch_brings_what_is_in_host_memory_to_the_device_where_room_is_free() -> None:
    world = World(slabs=2)
    world.bring(A1, B1)
    assert world.cache.tier(A1) == world.cache.tier(B1) == "host"
    world.cache.prefetch(A1)
    assert world.cache.tier(A1) == "device"
    assert world.pool.resting("adapter") == 2
    world.cache.prefetch(B1)  # no room is free, and a hint evicts nothing
    assert world.cache.tier(A1) == "device"
    assert world.cache.tier(B1) == "host"
    world.cache.prefetch(A1)
    assert world.reads == [A1, B1]
    assert len(world.copies) == 1
    world.cache.check_integrity([])


def test_what_was_prefetched_again_is_not_the_next_to_go() -> None:
    world = World(slabs=4, host_bytes=200)
    world.bring(A1, B1)
    for ref in (A1, B1):
        world.cache.pin(ref)
        world.cache.unpin(ref)
    world.cache.prefetch(A1)
    world.bring(C1)  # the host holds two
    world.cache.pin(C1)  # and so does the device
    assert (world.cache.tier(A1), world.cache.tier(B1)) == ("device", "disk")
    assert world.pool.resting("adapter") == 2


def test_a_full_host_lets_go_of_what_was_used_longest_ago_and_nobody_waits_for() -> None:
    world = World(slabs=1, host_bytes=300)
    world.bring(A1, A2, B1)
    world.cache.require([A1])
    world.cache.prefetch(C1)
    world.readers.run_all()
    world.cache.poll()
    assert [world.cache.tier(ref) for ref in (A1, A2, B1, C1)] == ["host", "disk", "host", "host"]
    assert world.cache.stats.host_evictions == 1
    world.cache.check_integrity([])


def test_more_prefetches_than_readers_are_started_as_others_land() -> None:
    world = World(max_loading=1)
    for ref in (A1, B1, C1):
        world.cache.prefetch(ref)
    assert len(world.readers.waiting) == 1
    for _ in range(3):
        world.readers.run_all()
        world.cache.poll()
    assert all(world.cache.ready(ref) for ref in (A1, B1, C1))


def test_what_a_request_waits_for_is_read_before_what_was_only_prefetched() -> None:
    world = World(max_loading=1)
    for ref in (A1, A2, B1, C1):
        world.cache.prefetch(ref)
    world.cache.require([C1, B1])
    for _ in range(4):
        world.readers.run_one()
        world.cache.poll()
    assert world.reads == [A1, C1, B1, A2]


def test_a_pinned_adapter_is_not_evicted_and_the_least_recently_used_one_is() -> None:
    world = World(slabs=6)
    world.bring(A1, B1, C1)
    for ref in (A1, B1, C1):
        assert world.cache.pin(ref) is not None
    assert world.pool.allocate(1, "kv") is None
    world.cache.unpin(C1)
    world.cache.unpin(A1)
    assert world.pool.allocate(1, "kv") is not None
    assert [world.cache.tier(ref) for ref in (A1, B1, C1)] == ["device", "device", "host"]
    world.cache.check_integrity([B1])


def test_an_adapter_used_by_two_rows_stays_until_the_second_lets_go() -> None:
    world = World(slabs=2)
    world.bring(A1)
    assert world.cache.pin(A1) is world.cache.pin(A1)
    world.cache.unpin(A1)
    assert world.pool.allocate(1, "kv") is None
    world.cache.unpin(A1)
    assert world.pool.allocate(1, "kv") is not None


def test_pinning_without_room_changes_nothing() -> None:
    world = World(slabs=2)
    world.bring(A1, B1)
    world.cache.pin(A1)
    assert world.cache.pin(B1) is None
    world.pool.check_integrity()
    world.cache.check_integrity([A1])


def test_the_host_tier_keeps_to_its_bytes_and_drops_the_oldest() -> None:
    world = World(slabs=1, host_bytes=250)
    world.bring(A1)
    world.bring(B1)
    world.bring(C1)
    world.cache.require([])
    assert world.cache.host_bytes == 200
    assert [world.cache.tier(ref) for ref in (A1, B1, C1)] == ["disk", "host", "host"]
    assert world.cache.stats.host_evictions == 1


def test_an_image_larger_than_the_host_tier_still_reaches_its_request() -> None:
    world = World(host_bytes=0)
    world.bring(A1)
    assert world.cache.ready(A1)
    assert world.cache.pin(A1) is not None
    world.cache.require([])
    assert world.cache.host_bytes == 0
    assert world.cache.tier(A1) == "device"


def test_waiting_requests_do_not_evict_each_others_host_copies() -> None:
    world = World(slabs=1, host_bytes=200)
    world.bring(A1)
    world.bring(A1, B1, C1)
    assert [world.cache.tier(ref) for ref in (A1, B1, C1)] == ["host", "host", "disk"]
    assert world.reads == [A1, B1]
    world.bring(C1)
    assert world.cache.tier(C1) == "host"


def test_after_one_large_adapter_small_ones_are_read_together_again() -> None:
    world = World(host_bytes=400)
    world.disk[A1] = Packed(Shape(2), Bytes(400))
    small = [AdapterRef(f"small{number}", 1) for number in range(44)]
    world.disk.update(dict.fromkeys(small, Packed(Shape(2), Bytes(100))))
    world.bring(A1)
    world.cache.require(small[:4])
    assert world.cache.num_loading == 1  # they may be as large
    for ref in small[:40]:
        world.bring(ref)
    world.cache.require(small[40:])
    assert world.cache.num_loading == 4


def test_the_time_of_a_load_is_that_of_reading_alone() -> None:
    world = World()
    world.read_s = 2.0
    world.bring(A1, B1)  # the second waits for the first
    world.now += 5.0
    world.cache.prefetch(C1)
    world.readers.run_all()
    world.now += 5.0  # a long step
    world.cache.poll()
    stats = world.cache.stats
    assert (stats.loads, stats.seconds, stats.longest_s) == (3, 6.0, 2.0)


def test_a_failed_load_names_its_adapter_and_cause() -> None:
    world = World()
    world.disk[A1] = ValueError("rank: expected 1 to 256, got 0")
    world.bring(A1)
    error = world.cache.failure(A1, since=0.0)
    assert isinstance(error, AdapterUnavailable)
    assert error.ref == A1
    assert error.code == "adapter_unavailable"
    assert str(error) == "adapter a@1: ValueError: rank: expected 1 to 256, got 0"
    assert (world.cache.stats.loads, world.cache.stats.failures) == (0, 1)


def test_a_failed_load_is_not_repeated_at_once_and_not_remembered_for_ever() -> None:
    world = World(retry_s=1.0)
    world.disk[A1] = OSError("gone")
    world.bring(A1)
    world.bring(A1)
    assert world.reads == [A1]
    world.now = 0.9
    assert world.cache.failure(A1, since=0.9) is not None
    world.now = 1.0
    assert world.cache.failure(A1, since=0.9) is None
    world.disk[A1] = Packed(Shape(1), Bytes(1))
    world.bring(A1)
    assert world.reads == [A1, A1]
    assert world.cache.ready(A1)


def test_who_waited_for_a_failed_load_hears_of_it_however_late() -> None:
    world = World(retry_s=0.0)
    world.disk[A1] = OSError("gone")
    world.bring(A1)
    world.now = 50.0
    assert world.cache.failure(A1, since=0.0) is not None


def test_an_adapter_that_cannot_be_copied_to_the_device_is_unavailable_and_holds_no_slabs() -> None:
    world = World()
    world.bring(A1)
    world.place_error = MemoryError("device")
    with pytest.raises(AdapterUnavailable, match="MemoryError: device"):
        world.cache.pin(A1)
    assert world.pool.free_slabs == world.pool.total
    world.cache.check_integrity([])


def test_a_copy_is_under_way_until_a_poll_finds_it_done() -> None:
    world = World()
    world.bring(A1)
    world.copies_are_instant = False
    assert world.cache.pin(A1) is not None
    world.now = 2.0
    world.cache.poll()
    assert world.cache.is_copying(A1)
    world.copies[0].is_done = True
    world.cache.poll()
    assert not world.cache.is_copying(A1)
    assert (world.cache.stats.copies, world.cache.stats.copy_s) == (1, 2.0)


@pytest.mark.parametrize("how", ["evicted", "forgotten"])
def test_an_adapter_that_leaves_while_it_is_copied_is_not_waited_for(how: str) -> None:
    world = World()
    world.bring(A1)
    world.copies_are_instant = False
    world.cache.pin(A1)
    world.cache.unpin(A1)
    if how == "evicted":
        assert world.pool.allocate(8, "kv") is not None
    else:
        world.cache.forget("a")
    assert not world.cache.is_copying(A1)
    world.cache.check_integrity([])


def test_forget_drops_every_version_everywhere_and_nothing_else() -> None:
    world = World()
    world.bring(A1, A2, B1)
    for ref in (A1, B1):
        world.cache.pin(ref)
        world.cache.unpin(ref)
    assert world.cache.forget("a") == (2, 200)
    assert [world.cache.tier(ref) for ref in (A1, A2, B1)] == ["disk", "disk", "device"]
    assert world.pool.owned("adapter") == 2
    assert world.cache.forget("a") == (0, 0)


def test_a_load_that_ends_after_forget_is_thrown_away() -> None:
    world = World()
    world.cache.require([A1])
    future, call = world.readers.waiting[0]
    future.set_running_or_notify_cancel()
    world.cache.forget("a")
    future.set_result(call())
    world.cache.poll()
    assert world.cache.tier(A1) == "disk"
    assert world.cache.host_bytes == 0


def test_forget_refuses_while_a_request_uses_the_adapter() -> None:
    world = World()
    world.bring(A1)
    world.cache.pin(A1)
    with pytest.raises(BrokenBooks, match="while 1 requests use it"):
        world.cache.forget("a")


def test_the_integrity_check_finds_a_leaked_pin() -> None:
    world = World()
    world.bring(A1)
    world.cache.pin(A1)
    with pytest.raises(BrokenBooks, match="pins"):
        world.cache.check_integrity([])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_history_leaves_clean_books(data: st.DataObject) -> None:
    world = World(slabs=7, host_bytes=250, max_loading=2)
    world.disk[B1] = OSError("gone")
    world.disk[C1] = Packed(Shape(3), Bytes(150))
    pinned: list[AdapterRef] = []
    refs = st.sampled_from([A1, A2, B1, C1])
    actions = ["require", "prefetch", "run", "poll", "pin", "unpin", "forget", "kv", "wait"]
    for _ in range(40):
        action = data.draw(st.sampled_from(actions))
        if action == "require":
            world.cache.require(data.draw(st.lists(refs, max_size=4)))
        elif action == "prefetch":
            world.cache.prefetch(data.draw(refs))
        elif action == "run" and world.readers.waiting:
            world.readers.run_one()
        elif action == "poll":
            world.cache.poll()
        elif action == "pin":
            ref = data.draw(refs)
            if world.cache.ready(ref) and world.cache.pin(ref) is not None:
                pinned.append(ref)
        elif action == "unpin" and pinned:
            world.cache.unpin(pinned.pop(data.draw(st.integers(0, len(pinned) - 1))))
        elif action == "forget":
            adapter_id = data.draw(st.sampled_from("abc"))
            if all(ref.id != adapter_id for ref in pinned):
                world.cache.forget(adapter_id)
        elif action == "kv":
            taken = world.pool.allocate(data.draw(st.integers(1, 4)), "kv")
            if taken is not None:
                world.pool.free(taken, "kv")
        elif action == "wait":
            world.now += 0.6
        world.pool.check_integrity()
        world.cache.check_integrity(pinned)
