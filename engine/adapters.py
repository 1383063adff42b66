"""AdapterCache: every adapter version is on disk; some are packed in host memory, some lie on the device.

    disk ──load, in a thread──► host (LRU, bounded in bytes) ──place──► device slabs (pinned while used)

A load never runs inside a step: a request whose adapter is not in host memory waits, others go on. On the
device an adapter that nobody uses rests in the pool's eviction order beside idle K/V. A version never
changes, so nothing is ever re-read; a failed load is answered with its error for a short while and then
tried anew.
"""

import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Executor, Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from engine.pages import BrokenBooks, PagePool
from engine.request import AdapterRef, AdapterTier

log = logging.getLogger(__name__)

MAX_PREFETCHES = 4096  # waiting to be started; beyond that the oldest is dropped, it was a hint only
MAX_FAILURES = 1024  # failed loads remembered
_FADING = 0.95  # by each image read: one large adapter is no reason to read few at once for ever


class Layout(Protocol):
    @property
    def slabs_needed(self) -> int: ...


class Image(Protocol):
    @property
    def nbytes(self) -> int: ...


class Packed(Protocol):
    """The host form of an adapter: packing.PackedAdapter."""

    @property
    def layout(self) -> Layout: ...
    @property
    def image(self) -> Image: ...


class Resident(Protocol):
    """The device form of an adapter: packing.ResidentAdapter."""

    @property
    def slabs(self) -> tuple[int, ...]: ...


class Copy(Protocol):
    """An image on its way to the device, or there already."""

    def done(self) -> bool: ...


class AdapterUnavailable(Exception):
    """An adapter version could not be loaded: `ref`, and the error that loading it gave as the cause."""

    code = "adapter_unavailable"

    def __init__(self, ref: AdapterRef, error: BaseException) -> None:
        super().__init__(f"adapter {ref}: {type(error).__name__}: {error}")
        self.ref = ref


@dataclass(slots=True)
class _OnDevice:
    resident: Resident
    pins: int = 0


@dataclass(frozen=True, slots=True)
class _OnItsWay:
    copy: Copy
    since: float


@dataclass(frozen=True, slots=True)
class _Read:
    packed: Packed
    seconds: float


@dataclass(slots=True)
class _Failure:
    error: AdapterUnavailable
    at: float


@dataclass(slots=True)
class LoadStats:
    """Loads from disk since the start; seconds from the start of reading to the packed image."""

    loads: int = 0
    failures: int = 0
    seconds: float = 0.0
    longest_s: float = 0.0
    placements: int = 0  # host → device copies
    copies: int = 0  # of those, the ones seen to end after they began
    copy_s: float = 0.0  # theirs, from their start to the first poll that found them done
    host_evictions: int = 0
    found: dict[AdapterTier, int] = field(default_factory=lambda: {"device": 0, "host": 0, "disk": 0})


class AdapterCache:
    """`load(ref)` runs in the executor and returns a packed adapter or raises; `place(ref, packed, slabs)`
    starts to copy it into these slabs of the arena; `notify()` is called from a loader thread whenever a load
    has ended.
    """

    def __init__(
        self,
        pool: PagePool,
        load: Callable[[AdapterRef], Packed],
        place: Callable[[AdapterRef, Any, tuple[int, ...]], tuple[Resident, Copy]],
        executor: Executor,
        clock: Callable[[], float],
        *,
        host_bytes: int,
        max_loading: int,
        retry_s: float,
        notify: Callable[[], None] = lambda: None,
    ) -> None:
        self.host_limit = host_bytes
        self.host_bytes = 0
        self.stats = LoadStats()
        self._pool = pool
        self._load = load
        self._place = place
        self._executor = executor
        self._clock = clock
        self._max_loading = max_loading
        self._retry_s = retry_s
        self._notify = notify
        self._device: dict[AdapterRef, _OnDevice] = {}
        self._copying: dict[AdapterRef, _OnItsWay] = {}  # of those on the device, oldest first
        self._host: OrderedDict[AdapterRef, Packed] = OrderedDict()  # least recently used first
        self._largest_image = 0  # bytes, of those read lately
        self._loading: dict[AdapterRef, Future[_Read]] = {}
        self._failed: OrderedDict[AdapterRef, _Failure] = OrderedDict()
        self._prefetching: dict[AdapterRef, None] = {}  # asked for by presence, not started; oldest first
        self._needed: dict[AdapterRef, None] = {}  # host copies that waiting requests will use, in order
        # Filled by loader threads; a deque's append and popleft are atomic.
        self._landed: deque[tuple[AdapterRef, Future[_Read]]] = deque()
        pool.on_evicted("adapter", self._on_evicted)

    # Asking

    def tier(self, ref: AdapterRef) -> AdapterTier:
        """Where the adapter is now; "disk" says nothing about whether it exists there."""
        if ref in self._device:
            return "device"
        return "host" if ref in self._host else "disk"

    def failure(self, ref: AdapterRef, since: float) -> AdapterUnavailable | None:
        """The error of the adapter's last load, if that ended after `since` or is too fresh to try again."""
        failure = self._failed.get(ref)
        if failure is None or (failure.at < since and not self._is_fresh(failure)):
            return None
        return failure.error

    def ready(self, ref: AdapterRef) -> bool:
        return ref in self._device or ref in self._host

    def is_copying(self, ref: AdapterRef) -> bool:
        """Whether the copy to the device was still under way at the last poll. It may be used: the runner
        lets a step wait for it.
        """
        return ref in self._copying

    def slabs_to_place(self, ref: AdapterRef) -> int:
        """Slabs that pinning a ready adapter takes from the pool: 0 if it is on the device."""
        return 0 if ref in self._device else self._host[ref].layout.slabs_needed

    def slabs_of(self, ref: AdapterRef) -> int:
        """Slabs a ready adapter occupies on the device."""
        on_device = self._device.get(ref)
        return len(on_device.resident.slabs) if on_device else self._host[ref].layout.slabs_needed

    @property
    def changes(self) -> tuple[int, ...]:
        """While this stays the same, every adapter is where it was, as far as `ready` can tell."""
        stats, evicted = self.stats, self._pool.evictions["adapter"]
        return (
            stats.loads, stats.failures, stats.placements, stats.host_evictions, evicted, len(self._loading),
        )  # fmt: skip

    @property
    def num_loading(self) -> int:
        return len(self._loading)

    @property
    def num_copying(self) -> int:
        """Copies to the device that had not ended at the last poll."""
        return len(self._copying)

    @property
    def num_resident(self) -> int:
        return len(self._device)

    @property
    def has_landed(self) -> bool:
        return bool(self._landed)

    # Loading

    def require(self, refs: Iterable[AdapterRef]) -> None:
        """Waiting requests need these, most urgent first: keep what is in host memory, load what is not.

        Host copies wait for their request without being evicted, so the loads started are those whose
        images the host limit can hold besides (always at least one).
        """
        needed: dict[AdapterRef, None] = {}
        room = self.host_limit
        for ref in refs:
            if ref in needed or ref in self._device:
                continue
            packed = self._host.get(ref)
            cost = self._largest_image if packed is None else packed.image.nbytes  # unread: a cautious guess
            if needed and cost > room:
                break
            needed[ref] = None
            room -= cost
        self._needed = needed
        for ref in needed:
            if ref in self._host:
                self._host.move_to_end(ref)  # out of the way of _trim_host
            else:
                self._start(ref)
        self._trim_host()

    def prefetch(self, ref: AdapterRef) -> None:
        """Bring the adapter nearer: into host memory, and onto the device if there is room without
        evicting. Where it is already, it becomes the most recently used.
        """
        if ref in self._host:
            self._host.move_to_end(ref)
        if self._pool.wake(ref, "adapter"):
            self._pool.rest(ref, self._device[ref].resident.slabs, "adapter")
        self._prefetching[ref] = None
        if len(self._prefetching) > MAX_PREFETCHES:
            del self._prefetching[next(iter(self._prefetching))]
        self._start_prefetches()

    def poll(self) -> None:
        """Take in the loads and copies that have ended since the last call."""
        for ref in [ref for ref, under_way in self._copying.items() if under_way.copy.done()]:
            self.stats.copies += 1
            self.stats.copy_s += self._clock() - self._copying.pop(ref).since
        while self._landed:
            ref, future = self._landed.popleft()
            if self._loading.get(ref) is not future:
                continue  # forgotten while it was being read
            del self._loading[ref]
            error = future.exception()
            if error is not None:
                self._fail(ref, error)
                continue
            read = future.result()
            self.stats.loads += 1
            self.stats.seconds += read.seconds
            self.stats.longest_s = max(self.stats.longest_s, read.seconds)
            self._keep_on_host(ref, read.packed)
        self._start_prefetches()

    # The device

    def pin(self, ref: AdapterRef) -> Resident | None:
        """Use a ready adapter: it stays on the device until as many unpins. None if the pool has no room
        for it.

        Raises AdapterUnavailable if copying it to the device fails.
        """
        entry = self._device.get(ref)
        if entry is None:
            entry = self._place_on_device(ref)
            if entry is None:
                return None
        elif entry.pins == 0:
            self._pool.wake(ref, "adapter")
        entry.pins += 1
        if ref in self._host:
            self._host.move_to_end(ref)
        return entry.resident

    def unpin(self, ref: AdapterRef) -> None:
        entry = self._device[ref]
        entry.pins -= 1
        if entry.pins < 0:
            raise BrokenBooks(f"adapter {ref} was unpinned more often than pinned")
        if entry.pins == 0:
            self._pool.rest(ref, entry.resident.slabs, "adapter")

    def forget(self, adapter_id: str) -> tuple[int, int]:
        """Drop all versions of the adapter everywhere but on disk; returns (device slabs, host bytes)
        given back.

        No version may be pinned: the engine cancels the adapter's requests first.
        """
        slabs = 0
        for ref in [ref for ref in self._device if ref.id == adapter_id]:
            entry = self._device.pop(ref)
            self._copying.pop(ref, None)
            if entry.pins or not self._pool.wake(ref, "adapter"):
                raise BrokenBooks(f"adapter {ref} is forgotten while {entry.pins} requests use it")
            self._pool.free(entry.resident.slabs, "adapter")
            slabs += len(entry.resident.slabs)
        before = self.host_bytes
        for ref in [ref for ref in self._host if ref.id == adapter_id]:
            self.host_bytes -= self._host.pop(ref).image.nbytes
        for ref in [ref for ref in self._loading if ref.id == adapter_id]:
            self._loading.pop(ref).cancel()
        for ref in [ref for ref in self._failed if ref.id == adapter_id]:
            del self._failed[ref]
        self._prefetching = {ref: None for ref in self._prefetching if ref.id != adapter_id}
        self._needed = {ref: None for ref in self._needed if ref.id != adapter_id}
        return slabs, before - self.host_bytes

    def check_integrity(self, pinned: Iterable[AdapterRef]) -> None:
        """Raise BrokenBooks unless the pins are exactly `pinned` and slabs and bytes add up."""
        expected = dict.fromkeys(self._device, 0)
        for ref in pinned:
            if ref not in expected:
                raise BrokenBooks(f"a sequence uses adapter {ref}, which is not on the device")
            expected[ref] += 1
        pins = {ref: entry.pins for ref, entry in self._device.items()}
        if pins != expected:
            raise BrokenBooks(f"adapter pins: {pins} counted, {expected} found")
        if not self._copying.keys() <= self._device.keys():
            raise BrokenBooks("an adapter is being copied to where it has no slabs")
        slabs = [slab for entry in self._device.values() for slab in entry.resident.slabs]
        if len(set(slabs)) != len(slabs) or len(slabs) != self._pool.owned("adapter"):
            raise BrokenBooks(
                f"adapters hold {len(slabs)} slabs, the pool says {self._pool.owned('adapter')}"
            )
        idle = sum(len(e.resident.slabs) for e in self._device.values() if e.pins == 0)
        if idle != self._pool.resting("adapter"):
            raise BrokenBooks(f"unpinned adapters hold {idle} slabs, {self._pool.resting('adapter')} rest")
        held = sum(packed.image.nbytes for packed in self._host.values())
        if held != self.host_bytes:
            raise BrokenBooks(f"host tier: {self.host_bytes} bytes counted, {held} held")

    def _start(self, ref: AdapterRef) -> None:
        if ref in self._loading or len(self._loading) >= self._max_loading:
            return
        failure = self._failed.get(ref)
        if failure is not None:
            if self._is_fresh(failure):
                return
            del self._failed[ref]
        future = self._executor.submit(self._read, ref)
        self._loading[ref] = future
        future.add_done_callback(lambda done: self._land(ref, done))

    def _is_fresh(self, failure: _Failure) -> bool:
        return self._clock() - failure.at < self._retry_s

    def _read(self, ref: AdapterRef) -> _Read:
        """Runs in the loader's thread."""
        started = self._clock()
        return _Read(self._load(ref), self._clock() - started)

    def _land(self, ref: AdapterRef, future: Future[_Read]) -> None:
        """Runs in the loader's thread, or in ours if the load ended first: only hands over."""
        if not future.cancelled():
            self._landed.append((ref, future))
            self._notify()

    def _start_prefetches(self) -> None:
        if self._prefetching:  # behind what requests wait for
            for ref in self._needed:
                if not self.ready(ref) and ref not in self._failed:
                    self._start(ref)
        while self._prefetching and len(self._loading) < self._max_loading:
            ref = next(iter(self._prefetching))
            del self._prefetching[ref]
            if ref in self._host:
                self._place_if_free(ref)
            elif ref not in self._device:
                self._start(ref)

    def _fail(self, ref: AdapterRef, error: BaseException) -> AdapterUnavailable:
        self.stats.failures += 1
        failure = _Failure(AdapterUnavailable(ref, error), self._clock())
        self._failed[ref] = failure
        self._failed.move_to_end(ref)
        if len(self._failed) > MAX_FAILURES:
            self._failed.popitem(last=False)
        log.warning("adapter %s v%d is unavailable: %s", ref.id[:8], ref.version, error)
        return failure.error

    def _keep_on_host(self, ref: AdapterRef, packed: Packed) -> None:
        self._host[ref] = packed
        self.host_bytes += packed.image.nbytes
        self._largest_image = max(int(_FADING * self._largest_image), packed.image.nbytes)
        if ref not in self._needed:
            self._place_if_free(ref)
        self._trim_host()

    def _trim_host(self) -> None:
        while self.host_bytes > self.host_limit:
            old = next((ref for ref in self._host if ref not in self._needed), None)
            if old is None:
                return
            self.host_bytes -= self._host.pop(old).image.nbytes
            self.stats.host_evictions += 1

    def _place_if_free(self, ref: AdapterRef) -> None:
        """What was prefetched has nothing to wait for later, if there is room that nobody uses now."""
        if ref in self._device or self._pool.free_slabs < self._host[ref].layout.slabs_needed:
            return
        # An error is kept in _failed, where the request that wants the adapter will find it.
        with suppress(AdapterUnavailable):
            entry = self._place_on_device(ref)
            if entry is not None:
                self._pool.rest(ref, entry.resident.slabs, "adapter")

    def _place_on_device(self, ref: AdapterRef) -> _OnDevice | None:
        packed = self._host[ref]
        slabs = self._pool.allocate(packed.layout.slabs_needed, "adapter")
        if slabs is None:
            return None
        try:
            started = self._clock()
            resident, copy = self._place(ref, packed, tuple(slabs))
        except Exception as error:
            self._pool.free(slabs, "adapter")
            raise self._fail(ref, error) from error
        self.stats.placements += 1
        if not copy.done():
            self._copying[ref] = _OnItsWay(copy, started)
        entry = self._device[ref] = _OnDevice(resident)
        return entry

    def _on_evicted(self, item: Hashable) -> None:
        assert isinstance(item, AdapterRef)
        del self._device[item]
        self._copying.pop(item, None)
