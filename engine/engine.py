"""Engine: owns the device. `step()` is its table of contents: schedule → build → launch → collect → events.

On a device that works beside the host, `runner.ahead` is 1: a step is launched before the tokens of the one
before it are taken, so the device never waits for the host. It then finds those tokens itself; here their
places hold UNKNOWN until they are collected. A reply that turns out to have ended by then has one row too
many in the step under way, whose token is dropped; its pages may be given away at once, as the device does
everything in the order it was launched.

It knows token ids, pages and adapters. It has no thread of its own besides the readers of adapter files:
one caller submits, cancels and steps, never two at once (`server` does so for many connections).
"""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.adapter_files import (
    LoraWeights,
    StoredWeights,
    check_base,
    read_stored,
    version_folder,
)
from engine.adapters import AdapterCache, Copy
from engine.batch import Batch, build_batch
from engine.config import ConfigError, EngineConfig
from engine.host_memory import PinnedMemory, Scratch
from engine.packing import PackedAdapter, ResidentAdapter, min_slab_elems, on_heap, pack_adapter
from engine.pages import BrokenBooks, PagePool
from engine.prefix import PrefixCache
from engine.request import (
    UNKNOWN,
    AdapterRef,
    Chunk,
    Event,
    FinishedEvent,
    FinishReason,
    Forgotten,
    Request,
    Sequence,
    Timings,
    TokensEvent,
    Usage,
)
from engine.runner import Runner
from engine.sampler import LogitsNotFinite
from engine.scheduler import OUTPUT_TOKEN_COST, ArenaExceeded, Scheduler, held
from engine.weights import LoadedModel

log = logging.getLogger(__name__)

DEFAULT_BLOCK_SIZE = 16
MAX_MESSAGE = 1000  # characters of an error that are told


class RequestRefused(ValueError):
    """A request that the engine does not take. `code` names the reason; nothing of it was kept."""

    code = "refused"


class ContextExceeded(RequestRefused):
    code = "context_length_exceeded"

    def __init__(self, prompt: int, max_tokens: int, limit: int) -> None:
        super().__init__(
            f"prompt of {prompt} tokens + max_tokens {max_tokens}: expected at most {limit} together"
        )
        self.prompt = prompt
        self.max_tokens = max_tokens
        self.limit = limit


class TokenOutOfRange(RequestRefused):
    code = "invalid_token"

    def __init__(self, token: int, vocab_size: int) -> None:
        super().__init__(f"token id: expected 0 to {vocab_size - 1}, got {token}")
        self.token = token
        self.vocab_size = vocab_size


class DuplicateRequest(RequestRefused):
    code = "duplicate_request"


class Overloaded(RequestRefused):
    code = "overloaded"

    def __init__(self, limit: int) -> None:
        super().__init__(f"queue: expected fewer than {limit} waiting requests, it is full")
        self.limit = limit


class Launched(Protocol):
    """A step on its way."""

    def tokens(self) -> list[int]:
        """Wait for it: a token id per row that wanted one, in the order of the chunks; UNKNOWN where the
        logits were not finite. An error here is one of the device, not of a request.
        """

    def device_s(self) -> float:
        """Seconds the device worked on it, once `tokens` has returned; 0 where nobody measured."""


class Device(Protocol):
    """What runs batches: runner.Runner, or the GPU's.

    `ahead`: how many steps may be launched and not collected while the next one is scheduled, 0 or 1. Steps
    and copies take effect in the order they were asked for. `launch` raises for a batch it cannot run, with
    nothing of it begun that running it again would not repair. `prepare`, while nothing is in flight, does
    beforehand a part of what a first step of its kind would have to do, and says whether there may be more.
    """

    @property
    def ahead(self) -> int: ...
    def launch(self, batch: Batch) -> Launched: ...
    def copy_in(self, image: Tensor, slabs: Many[int]) -> Copy: ...
    def drop_copies(self) -> None: ...
    def prepare(self) -> bool: ...


MakeDevice = Callable[[EngineConfig, LoadedModel, Tensor, int], Device]  # …, the arena, the block size


def make_runner(config: EngineConfig, model: LoadedModel, arena: Tensor, block_size: int) -> Device:
    """The device that `config` names."""
    if arena.device.type != "cuda":
        return Runner(model, arena, block_size)
    from engine.gpu_runner import GpuRunner  # here, as Triton is installed where there is a GPU only

    return GpuRunner(
        model, arena, block_size, max_tokens=config.max_tokens_per_step, max_rows=config.max_running
    )


@dataclass(frozen=True, slots=True)
class InFlight:
    """A launched step whose tokens were not collected yet, and its chunks that want one."""

    launched: Launched
    drawing: tuple[Chunk, ...]


@dataclass(slots=True)
class StepStats:
    """Sums since the start, in seconds and counts; a mean is a quotient of two of them."""

    steps: int = 0
    schedule_s: float = 0.0
    build_s: float = 0.0
    launch_s: float = 0.0  # on the CPU, all of the model's work
    wait_s: float = 0.0  # for the device
    device_s: float = 0.0  # of the device's own clock, copies of inputs and results included
    apply_s: float = 0.0
    rows: int = 0
    tokens: int = 0
    output_tokens: int = 0
    adapters: int = 0  # distinct ones in each step, summed
    failed_batches: int = 0
    last_rows: int = 0
    last_tokens: int = 0
    last_adapters: int = 0
    finished: dict[FinishReason, int] = field(
        default_factory=lambda: {"stop": 0, "length": 0, "cancelled": 0, "error": 0}
    )


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A picture of the engine between two steps; every group is a flat mapping of numbers."""

    step: dict[str, Any]
    queue: dict[str, float]  # waiting, oldest_wait_s, running, loading; admitted, preemptions
    pages: dict[str, int]  # total, free, kv, kv_idle, adapter, adapter_idle; slab_bytes, block_size
    prefix: dict[str, int]  # lookup_tokens, hit_tokens, evictions
    adapters: dict[str, Any]  # resident, host_bytes, found by tier, loads, failures, seconds, evictions

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Engine:
    def __init__(
        self,
        config: EngineConfig,
        model: LoadedModel,
        adapter_root: Path,
        clock: Callable[[], float] = time.monotonic,
        *,
        on_load: Callable[[], None] = lambda: None,
        read: Callable[[AdapterRef], LoraWeights] | None = None,
        make_device: MakeDevice = make_runner,
    ) -> None:
        """`on_load` is called from a loader thread when an adapter's load has ended and a step may find more
        to do. `read`, called from those threads too, replaces reading adapters from `adapter_root`.
        """
        self.config = config
        self.model = model
        self.on_load = on_load
        self._clock = clock
        self.block_size, arena = _make_arena(config, model)
        num_slabs, slab_elems = arena.shape
        slab_bytes = slab_elems * arena.element_size()
        self._slab_bytes = slab_bytes
        self._device = make_device(config, model, arena, self.block_size)
        self._pool = PagePool(num_slabs)
        self._prefix = PrefixCache(self._pool, self.block_size, model.base_hash, enabled=config.prefix_cache)
        is_cuda = arena.device.type == "cuda"
        load_threads = config.load_threads or (8 if is_cuda else 2)
        self._readers = ThreadPoolExecutor(load_threads, thread_name_prefix="adapter-reader")
        allocate = PinnedMemory().empty if is_cuda else on_heap

        of_file, of_numbers = Scratch(), Scratch()

        def read_file(ref: AdapterRef) -> StoredWeights:
            folder = version_folder(adapter_root, ref.id, ref.version)
            check_base(folder, model.base_hash)
            return read_stored(folder, model.config, of_file.take)

        def load(ref: AdapterRef) -> PackedAdapter:
            weights = read_file(ref) if read is None else read(ref)
            return pack_adapter(weights, model.config, slab_elems, arena.dtype, allocate, of_numbers.take)

        def place(
            ref: AdapterRef, packed: PackedAdapter, slabs: tuple[int, ...]
        ) -> tuple[ResidentAdapter, Copy]:
            copy = self._device.copy_in(packed.image, slabs)
            return ResidentAdapter(ref=ref, layout=packed.layout, slabs=slabs), copy

        def loaded() -> None:
            self._loaded.set()
            self.on_load()

        self._adapters = AdapterCache(
            self._pool,
            load,
            place,
            self._readers,
            clock,
            host_bytes=config.host_cache_bytes,
            max_loading=2 * load_threads,  # one being read and one in line, so that no reader idles
            retry_s=config.failed_load_retry_s,
            notify=loaded,
        )
        self._scheduler = Scheduler(
            config, self._pool, self._prefix, self._adapters, clock, slab_bytes=slab_bytes
        )
        self._eos = frozenset(model.config.eos_token_ids)
        self._sequences: dict[str, Sequence] = {}
        self._pending: list[Event] = []  # of requests that ended between steps
        self._in_flight: deque[InFlight] = deque()  # oldest first
        self._prepares = True  # until that fails
        self._steps = StepStats()
        self._loaded = threading.Event()  # set by loader threads

    @property
    def context_length(self) -> int:
        return self.model.config.max_position_embeddings

    @property
    def has_work(self) -> bool:
        """There are events to fetch, requests to finish, steps to collect, or loads to take in: `step` is
        worth calling.
        """
        return bool(self._pending or self._sequences or self._in_flight or self._adapters.has_landed)

    @property
    def is_stalled(self) -> bool:
        """Every request waits for a load, so a step does nothing until `on_load` is called."""
        if self._pending or self._in_flight or self._scheduler.running or self._adapters.has_landed:
            return False
        return self._adapters.num_loading > 0 and all(
            sequence.request.adapter is not None
            and not self._adapters.ready(sequence.request.adapter)
            and self._adapters.failure(sequence.request.adapter, sequence.arrived_at) is None
            for sequence in self._scheduler.waiting
        )

    def submit(self, request: Request) -> None:
        """Queue a request. Raises RequestRefused (or ArenaExceeded) for one that could never be answered."""
        if request.id in self._sequences:
            raise DuplicateRequest(f"request id: expected a new one, {request.id!r} is still running")
        max_tokens = request.sampling.max_tokens
        if len(request.prompt) + max_tokens > self.context_length:
            raise ContextExceeded(len(request.prompt), max_tokens, self.context_length)
        for token in (*request.prompt, *request.generated):
            if not 0 <= token < self.model.config.vocab_size:
                raise TokenOutOfRange(token, self.model.config.vocab_size)
        sequence = Sequence(request)
        if self._scheduler.slabs_for(sequence) > self._pool.total:
            raise ArenaExceeded(self._scheduler.slabs_for(sequence), self._pool.total)
        if self._scheduler.num_waiting >= self.config.max_waiting:
            raise Overloaded(self.config.max_waiting)
        if len(request.generated) >= max_tokens:  # was lost between its last token and its end
            sequence.arrived_at = self._clock()
            self._pending.append(self._finished(sequence, "length"))
            return
        self._sequences[request.id] = sequence
        self._scheduler.add(sequence)
        if request.adapter is not None:
            self._adapters.prefetch(request.adapter)

    def cancel(self, request_id: str) -> None:
        """End a request now; its FinishedEvent comes with the next step. An unknown id is one that has
        ended.
        """
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._pending.append(self._end(sequence, "cancelled"))

    def prefetch(self, ref: AdapterRef) -> None:
        """The adapter will probably be asked for soon. A hint: it neither fails nor waits."""
        self._adapters.prefetch(ref)

    def forget(self, adapter_id: str) -> Forgotten:
        """Drop every copy of every version of this adapter but the files, and all K/V computed for its user.

        Remove the files first, or a request may load them again. Requests that use the adapter, or whose
        `user_key` is this id, are cancelled: what they would go on to write would be made from what is to
        be forgotten.
        """
        cancelled = [s.id for s in self._sequences.values() if adapter_id in s.labels]
        for request_id in cancelled:
            self.cancel(request_id)
        self._device.drop_copies()
        slabs, host_bytes = self._adapters.forget(adapter_id)
        return Forgotten(
            device_slabs=slabs,
            host_bytes=host_bytes,
            kv_blocks=self._prefix.forget(adapter_id),
            cancelled_requests=len(cancelled),
        )

    def step(self) -> list[Event]:
        """Move every running request on by one token or one prompt chunk; never waits for disk.

        Raises what the device throws when it is lost; the engine is of no use then.
        """
        events, self._pending = self._pending, []
        started = self._clock()
        self._adapters.poll()
        plan = self._scheduler.schedule()
        self._steps.schedule_s += self._clock() - started
        events += [self._failed(sequence, error) for sequence, error in plan.refused]
        if plan.chunks:
            self._count(plan.chunks)
            events += self._launch(plan.chunks)
        events += self._collect(leave=self._device.ahead if plan.chunks else 0)
        return events

    def prepare(self) -> bool:
        """While there is no work: make the device ready for a kind of step that it has not seen. Takes about
        a tenth of a second, at first more; False when all likely ones were seen, or one could not be made.
        """
        if self.has_work or not self._prepares:
            return False
        try:
            return self._device.prepare()
        except torch.AcceleratorError:
            raise
        except Exception:  # of a step that may never come, say for want of memory: no reason to end
            log.exception("steps are not prepared any more")
            self._prepares = False
            return False

    def drain(self) -> Iterator[Event]:
        """Step until nothing is left to do, sleeping while every request waits for a load."""
        while self.has_work:
            self._loaded.clear()
            if self.is_stalled:
                self._loaded.wait()
            yield from self.step()

    def stats(self) -> EngineStats:
        pool, loads, now = self._pool, self._adapters.stats, self._clock()
        return EngineStats(
            step=asdict(self._steps),
            queue={
                "waiting": self._scheduler.num_waiting,
                "oldest_wait_s": max((now - s.arrived_at for s in self._scheduler.waiting), default=0.0),
                "running": len(self._scheduler.running),
                "loading": self._adapters.num_loading,
                "copying": self._adapters.num_copying,
                "admitted": self._scheduler.stats.admitted,
                "preemptions": self._scheduler.stats.preemptions,
            },
            pages={
                "total": pool.total,
                "free": pool.free_slabs,
                "kv": pool.owned("kv"),
                "kv_idle": pool.resting("kv"),
                "adapter": pool.owned("adapter"),
                "adapter_idle": pool.resting("adapter"),
                "slab_bytes": self._slab_bytes,
                "block_size": self.block_size,
            },
            prefix={
                "lookup_tokens": self._scheduler.stats.lookup_tokens,
                "hit_tokens": self._scheduler.stats.hit_tokens,
                "evictions": pool.evictions["kv"],
            },
            adapters={
                "resident": self._adapters.num_resident,
                "host_bytes": self._adapters.host_bytes,
                "device_evictions": pool.evictions["adapter"],
                **asdict(loads),
            },
        )

    def check_integrity(self) -> None:
        """Raise BrokenBooks unless free + kv + adapters == total and every page has exactly the users it
        should.
        """
        self._pool.check_integrity()
        drawing = Counter(id(c.sequence) for step in self._in_flight for c in step.drawing)
        for sequence in self._sequences.values():
            if drawing[id(sequence)] != len(sequence.tokens) - sequence.num_known:
                raise BrokenBooks(f"request {sequence.id}: tokens being drawn differ from those unknown")
        running, waiting = self._scheduler.running, list(self._scheduler.waiting)
        if any(sequence.blocks or sequence.resident is not None for sequence in waiting):
            raise BrokenBooks("a waiting request holds pages")
        if {id(s) for s in (*running, *waiting)} != {id(s) for s in self._sequences.values()}:
            raise BrokenBooks("the engine and its scheduler do not know the same requests")
        blocks, adapters = held(running)
        self._prefix.check_integrity(blocks)
        self._adapters.check_integrity(adapters)

    def close(self, *, wait: bool = False) -> None:
        """No adapter is read any more. `wait`: also not by a thread that had begun to, and would hold on to
        the engine's memory until it ends."""
        self._readers.shutdown(wait=wait, cancel_futures=True)

    # Inside a step

    def _launch(self, chunks: Many[Chunk]) -> list[Event]:
        """Start the chunks as one batch; if that fails, each alone, so that only the guilty one is failed.

        Running a chunk again writes the same K/V to the same places, so nothing is undone first.
        """
        started = self._clock()
        try:
            batch = build_batch(chunks, self.block_size)
            built = self._clock()
            launched = self._device.launch(batch)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            self._steps.failed_batches += 1
            log.exception("a batch of %d rows failed", len(chunks))
            return self._launch_alone(chunks, error)
        self._steps.build_s += built - started
        self._steps.launch_s += self._clock() - built
        drawing = tuple(chunk for chunk in chunks if chunk.wants_token)
        for chunk in chunks:
            self._scheduler.advance(chunk)
        for index, chunk in enumerate(drawing):
            chunk.sequence.tokens.append(UNKNOWN)
            chunk.sequence.result_index = index
        self._in_flight.append(InFlight(launched, drawing))
        return []

    def _launch_alone(self, chunks: Many[Chunk], error: Exception) -> list[Event]:
        """The batch of these chunks failed. First the step before it is collected: it knows nothing of this,
        and then every token is known.
        """
        events = self._collect(leave=0)
        for chunk in chunks:
            if chunk.sequence.is_over:
                continue
            if len(chunks) == 1:
                if isinstance(error, LogitsNotFinite):
                    self._scheduler.disown(chunk.sequence)
                events.append(self._end(chunk.sequence, "error", error=error))
            else:
                events += self._launch((chunk,))
                events += self._collect(leave=0)
        return events

    def _collect(self, leave: int) -> list[Event]:
        """Take the tokens of all launched steps but the newest `leave`, and what follows from them."""
        events: list[Event] = []
        while len(self._in_flight) > leave:
            step = self._in_flight[0]
            started = self._clock()
            tokens = step.launched.tokens()
            self._in_flight.popleft()
            arrived = self._clock()
            for row, (chunk, token) in enumerate(zip(step.drawing, tokens, strict=True)):
                if token == UNKNOWN:
                    self._scheduler.disown(chunk.sequence)
                if not chunk.sequence.is_over:
                    self._apply(chunk.sequence, row, token, events)
            self._steps.wait_s += arrived - started
            self._steps.device_s += step.launched.device_s()
            self._steps.apply_s += self._clock() - arrived
        return events

    def _apply(self, sequence: Sequence, row: int, token: int, events: list[Event]) -> None:
        sampling = sequence.request.sampling
        if token == UNKNOWN:
            events.append(self._end(sequence, "error", error=LogitsNotFinite([row])))
            return
        if token in sampling.stop_token_ids or (token in self._eos and not sampling.ignore_eos):
            events.append(self._end(sequence, "stop"))
            return
        if sequence.first_token_at is None:
            sequence.first_token_at = self._clock()
        known = sequence.num_known
        events.append(TokensEvent(sequence.request.id, (token,), known - sequence.num_prompt))
        sequence.tokens[known] = token
        sequence.num_known = known = known + 1
        self._scheduler.register(sequence)
        self._scheduler.charge(sequence, OUTPUT_TOKEN_COST)
        self._steps.output_tokens += 1
        if known == sequence.most_tokens:
            events.append(self._end(sequence, "length"))

    def _failed(self, sequence: Sequence, error: Exception) -> FinishedEvent:
        """The scheduler has already let this request go."""
        sequence.is_over = True
        del self._sequences[sequence.id]
        return self._finished(sequence, "error", error=error)

    def _end(
        self, sequence: Sequence, reason: FinishReason, *, error: Exception | None = None
    ) -> FinishedEvent:
        sequence.is_over = True
        sequence.drop_unknown()
        self._scheduler.remove(sequence)
        del self._sequences[sequence.id]
        return self._finished(sequence, reason, error=error)

    def _finished(
        self, sequence: Sequence, reason: FinishReason, *, error: Exception | None = None
    ) -> FinishedEvent:
        self._steps.finished[reason] += 1
        now, arrived = self._clock(), sequence.arrived_at
        admitted_at = now if sequence.admitted_at is None else sequence.admitted_at
        ready_at = admitted_at if sequence.adapter_ready_at is None else sequence.adapter_ready_at
        # A reply that goes on may find more than its prompt: the tokens it had written before, too.
        cached = min(sequence.cached_tokens, sequence.num_prompt)
        timings = Timings(
            queued_s=admitted_at - arrived,
            adapter_load_s=ready_at - arrived if sequence.adapter_tier == "disk" else 0.0,
            adapter_tier=sequence.adapter_tier,
            first_token_s=None if sequence.first_token_at is None else sequence.first_token_at - arrived,
        )
        return FinishedEvent(
            request_id=sequence.id,
            reason=reason,
            usage=Usage(sequence.num_prompt, cached, sequence.num_output),
            timings=timings,
            error_code=None if error is None else error_code(error),
            message=None if error is None else _message(error),
        )

    def _count(self, chunks: Many[Chunk]) -> None:
        steps = self._steps
        steps.steps += 1
        steps.last_rows = len(chunks)
        steps.last_tokens = sum(chunk.length for chunk in chunks)
        adapters = {chunk.sequence.request.adapter for chunk in chunks} - {None}
        steps.last_adapters = len(adapters)
        steps.rows += steps.last_rows
        steps.tokens += steps.last_tokens
        steps.adapters += steps.last_adapters


def error_code(error: Exception) -> str:
    """The name a client sees for an error: its own `code`, or one of two for what the device throws."""
    code = getattr(error, "code", None)
    if isinstance(code, str):
        return code
    is_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "not enough memory" in str(error)
    return "out_of_memory" if is_memory else "engine_failure"


def _message(error: Exception) -> str:
    """What a client is told. It may quote a file from anyone: what UTF-8 cannot hold is escaped, and what is
    long is cut, so that it can be sent.
    """
    text = str(error) or type(error).__name__
    return text[:MAX_MESSAGE].encode(errors="backslashreplace").decode()


def _make_arena(config: EngineConfig, model: LoadedModel) -> tuple[int, torch.Tensor]:
    """The block size and the arena [num_slabs, slab_elems]; a slab is the K/V of one block
    over all layers.
    """
    shape = model.config
    elems_per_token = shape.num_layers * 2 * shape.num_kv_heads * shape.head_dim
    least = -(-min_slab_elems(shape) // elems_per_token)
    block_size = config.block_size
    if block_size is None:
        block_size = max(DEFAULT_BLOCK_SIZE, 1 << (least - 1).bit_length())
    elif block_size < least:
        raise ConfigError(
            "block_size", f"{least} or more, so that a slab holds an adapter's widest tile", block_size
        )
    dtype: torch.dtype = getattr(torch, config.dtype)
    slab_elems = block_size * elems_per_token
    slab_bytes = slab_elems * dtype.itemsize
    num_slabs = config.arena_bytes // slab_bytes
    if num_slabs < 2:
        raise ConfigError("arena_bytes", f"at least two slabs of {slab_bytes} bytes", config.arena_bytes)
    # Zeros, not empty: masked positions of a fresh slab are multiplied by 0, and 0 × NaN is NaN.
    return block_size, torch.zeros(num_slabs, slab_elems, dtype=dtype, device=config.device)
