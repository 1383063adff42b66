"""Engine: owns the device. `step()` is its table of contents: schedule → build → run → apply → events.

It knows token ids, pages and adapters. It has no thread of its own besides the readers of adapter files:
one caller submits, cancels and steps, never two at once (`server` does so for many connections).
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from engine.adapter_files import LoraWeights, read_adapter, version_folder
from engine.adapters import AdapterCache
from engine.batch import build_batch
from engine.config import ConfigError, EngineConfig
from engine.packing import PackedAdapter, ResidentAdapter, min_slab_elems, pack_adapter
from engine.pages import BrokenBooks, PagePool
from engine.prefix import PrefixCache
from engine.request import (
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
from engine.scheduler import OUTPUT_TOKEN_COST, ArenaExceeded, Scheduler, held
from engine.weights import LoadedModel

log = logging.getLogger(__name__)

DEFAULT_BLOCK_SIZE = 16


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


@dataclass(frozen=True, slots=True)
class Ran:
    """What became of a chunk: a token if it wanted one, or the error of the batch that held it alone."""

    chunk: Chunk
    token: int | None = None
    error: Exception | None = None


@dataclass(slots=True)
class StepStats:
    """Sums since the start, in seconds and counts; a mean is a quotient of two of them."""

    steps: int = 0
    schedule_s: float = 0.0
    build_s: float = 0.0
    run_s: float = 0.0
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
    ) -> None:
        """`on_load` is called from a loader thread when an adapter's load has ended and a step may find more
        to do. `read` gives an adapter's weights in place of its folder under `adapter_root`, in a loader
        thread as well.
        """
        self.config = config
        self.model = model
        self.on_load = on_load
        self._clock = clock
        self.block_size, arena = _make_arena(config, model)
        num_slabs, slab_elems = arena.shape
        slab_bytes = slab_elems * arena.element_size()
        self._slab_bytes = slab_bytes
        self._runner = Runner(model, arena, self.block_size)
        self._pool = PagePool(num_slabs)
        self._prefix = PrefixCache(self._pool, self.block_size, model.base_hash, enabled=config.prefix_cache)
        self._readers = ThreadPoolExecutor(config.load_threads, thread_name_prefix="adapter-reader")

        def from_disk(ref: AdapterRef) -> LoraWeights:
            return read_adapter(version_folder(adapter_root, ref.id, ref.version), model.config)

        read = read or from_disk

        def load(ref: AdapterRef) -> PackedAdapter:
            return pack_adapter(read(ref), model.config, slab_elems, arena.dtype)

        def place(ref: AdapterRef, packed: PackedAdapter, slabs: tuple[int, ...]) -> ResidentAdapter:
            self._runner.copy_in(packed.image, slabs)
            return ResidentAdapter(ref=ref, layout=packed.layout, slabs=slabs)

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
            max_loading=2 * config.load_threads,  # one being read and one in line, so that no reader idles
            retry_s=config.failed_load_retry_s,
            notify=loaded,
        )
        self._scheduler = Scheduler(
            config, self._pool, self._prefix, self._adapters, clock, slab_bytes=slab_bytes
        )
        self._eos = frozenset(model.config.eos_token_ids)
        self._sequences: dict[str, Sequence] = {}
        self._pending: list[Event] = []  # of requests that ended between steps
        self._steps = StepStats()
        self._loaded = threading.Event()  # set by loader threads

    @property
    def context_length(self) -> int:
        return self.model.config.max_position_embeddings

    @property
    def has_work(self) -> bool:
        """There are events to fetch, requests to finish, or loads to take in: `step` is worth calling."""
        return bool(self._pending or self._sequences or self._adapters.has_landed)

    @property
    def is_stalled(self) -> bool:
        """Every request waits for a load, so a step does nothing until `on_load` is called."""
        if self._pending or self._scheduler.running or self._adapters.has_landed:
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
        self._runner.drop_copies()
        slabs, host_bytes = self._adapters.forget(adapter_id)
        return Forgotten(
            device_slabs=slabs,
            host_bytes=host_bytes,
            kv_blocks=self._prefix.forget(adapter_id),
            cancelled_requests=len(cancelled),
        )

    def step(self) -> list[Event]:
        """Move every running request on by one token or one prompt chunk; never waits for disk."""
        events, self._pending = self._pending, []
        started = self._clock()
        self._adapters.poll()
        plan = self._scheduler.schedule()
        self._steps.schedule_s += self._clock() - started
        events += [self._failed(sequence, error) for sequence, error in plan.refused]
        if plan.chunks:
            self._count(plan.chunks)
            ran = self._run(plan.chunks)
            started = self._clock()
            for outcome in ran:
                events += self._apply(outcome)
            self._steps.apply_s += self._clock() - started
        return events

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
        running, waiting = self._scheduler.running, list(self._scheduler.waiting)
        if any(sequence.blocks or sequence.resident is not None for sequence in waiting):
            raise BrokenBooks("a waiting request holds pages")
        if {id(s) for s in (*running, *waiting)} != {id(s) for s in self._sequences.values()}:
            raise BrokenBooks("the engine and its scheduler do not know the same requests")
        blocks, adapters = held(running)
        self._prefix.check_integrity(blocks)
        self._adapters.check_integrity(adapters)

    def close(self) -> None:
        self._readers.shutdown(wait=False, cancel_futures=True)

    # Inside a step

    def _run(self, chunks: Many[Chunk]) -> list[Ran]:
        """Run the chunks as one batch; if it fails, each alone, so that only the guilty one is failed.

        Running a chunk again writes the same K/V to the same places, so nothing is undone first.
        """
        try:
            started = self._clock()
            batch = build_batch(chunks, self.block_size)
            built = self._clock()
            tokens = iter(self._runner.run(batch))
            self._steps.build_s += built - started
            self._steps.run_s += self._clock() - built
            return [Ran(chunk, next(tokens) if chunk.wants_token else None) for chunk in chunks]
        except Exception as error:
            self._steps.failed_batches += 1
            log.exception("a batch of %d rows failed", len(chunks))
            if len(chunks) == 1:
                return [Ran(chunks[0], error=error)]
        return [ran for chunk in chunks for ran in self._run((chunk,))]

    def _apply(self, ran: Ran) -> list[Event]:
        sequence, sampling = ran.chunk.sequence, ran.chunk.sequence.request.sampling
        if ran.error is not None:
            return [self._end(sequence, "error", error=ran.error)]
        self._scheduler.advance(ran.chunk)
        if ran.token is None:
            return []
        if sequence.first_token_at is None:
            sequence.first_token_at = self._clock()
        if ran.token in sampling.stop_token_ids or (ran.token in self._eos and not sampling.ignore_eos):
            return [self._end(sequence, "stop")]
        events: list[Event] = [TokensEvent(sequence.id, (ran.token,), sequence.num_output)]
        sequence.tokens.append(ran.token)
        self._scheduler.charge(sequence, OUTPUT_TOKEN_COST)
        self._steps.output_tokens += 1
        if sequence.num_output >= sampling.max_tokens:
            events.append(self._end(sequence, "length"))
        return events

    def _failed(self, sequence: Sequence, error: Exception) -> FinishedEvent:
        """The scheduler has already let this request go."""
        del self._sequences[sequence.id]
        return self._finished(sequence, "error", error=error)

    def _end(
        self, sequence: Sequence, reason: FinishReason, *, error: Exception | None = None
    ) -> FinishedEvent:
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
        timings = Timings(
            queued_s=admitted_at - arrived,
            adapter_load_s=ready_at - arrived if sequence.adapter_tier == "disk" else 0.0,
            adapter_tier=sequence.adapter_tier,
            first_token_s=None if sequence.first_token_at is None else sequence.first_token_at - arrived,
        )
        return FinishedEvent(
            request_id=sequence.id,
            reason=reason,
            usage=Usage(sequence.num_prompt, sequence.cached_tokens, sequence.num_output),
            timings=timings,
            error_code=None if error is None else error_code(error),
            message=None if error is None else str(error) or type(error).__name__,
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
