"""The engine's side of one reply: submit, go on after the engine died, fall back from a bad adapter, stop."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, replace

import structlog

from engine.client import EngineClient, EngineLost, Stream
from engine.request import (
    AdapterRef,
    FinishedEvent,
    FinishReason,
    Request,
    SamplingParams,
    TokensEvent,
    Usage,
)
from service.metrics import Metrics
from service.reply import Plan, Reply
from service.writing import Writing, timing_numbers

log = structlog.get_logger(__name__)

ADAPTER_UNAVAILABLE = "adapter_unavailable"
ENGINE_UNAVAILABLE = "engine_unavailable"
POLL_S = 0.1
MOST_LOSSES = 5  # engines in a row that were lost before a word: then it may be the reply that ends them


@dataclass(frozen=True)
class FellBack:
    """The version that was to answer could not be loaded; `version` goes on instead (0: the bare base)."""

    version: int
    notice: str


class Generation:
    """`versions` gives the person's other versions worth trying, best first; asked only when one is bad."""

    def __init__(
        self,
        engine: EngineClient,
        adapter_id: str,
        reply: Reply,
        writing: Writing,
        *,
        versions: Callable[[int], Awaitable[list[int]]],
        clock: Callable[[], float],
        patience_s: float,
        metrics: Metrics,
        new_id: Callable[[], str],
    ) -> None:
        self._engine = engine
        self._adapter_id = adapter_id
        self._reply = reply
        self._writing = writing
        self._versions = versions
        self._clock = clock
        self._patience_s = patience_s
        self._metrics = metrics
        self._new_id = new_id
        self._first_at: float | None = None
        self._last_at: float | None = None
        self._heard = 0
        self._stream: Stream | None = None
        self._is_cut = False

    async def events(self) -> AsyncGenerator[TokensEvent | FellBack | FinishedEvent, None]:
        """What the engine says of this reply, its deaths left out. The last event is a FinishedEvent."""
        plan, losses = self._reply.plan, 0
        while losses < MOST_LOSSES:
            if len(self._writing.tokens) >= plan.max_tokens:  # taken over after its last token
                yield self._ended("length")
                return
            if not self._engine.connected and not await self._engine_back():
                yield self._stopped_waiting()
                return
            try:
                async with contextlib.aclosing(self._attempt()) as events:
                    async for event in events:
                        if self._is_cut:
                            if isinstance(event, FinishedEvent):
                                yield self._as_cut(event)
                                return
                            continue
                        if isinstance(event, TokensEvent):
                            losses = 0
                            self._note(len(event.token_ids))
                        if not self._bad_adapter(event):
                            yield event
                        if isinstance(event, FinishedEvent):
                            break
                if not self._bad_adapter(event):
                    return
                yield await self._fall_back()
            except EngineLost:
                if self._is_cut:
                    yield self.stopped_here()
                    return
                losses += 1
                log.warning("the engine was lost during a reply", response_id=self._reply.id, losses=losses)
                self._metrics.resubmitted.inc()
        yield self._failed(f"the engine was lost {losses} times without a word of this reply")

    async def cut(self) -> None:
        """At a stop string, which the engine knows nothing of: no more tokens; the end tells its numbers."""
        assert self._stream is not None
        self._is_cut = True
        with contextlib.suppress(EngineLost):
            await self._stream.cancel()

    def stopped_here(self) -> FinishedEvent:
        """The end of a reply whose stop string was there already, or whose engine cannot tell any more."""
        return self._ended("stop")

    def numbers(self, finished: FinishedEvent) -> dict[str, str]:
        """The reply's timings as metadata; a taken-over reply has no honest time to its first token."""
        first = self.first_token_s
        rate = None
        if self._first_at is not None and self._last_at is not None and self._last_at > self._first_at:
            rate = (self._heard - 1) / (self._last_at - self._first_at)
        return timing_numbers(finished.timings, first, rate)

    @property
    def first_token_s(self) -> float | None:
        if self._first_at is None or len(self._writing.tokens) != self._heard:
            return None
        return max(0.0, self._first_at - self._reply.plan.created_at)

    async def _attempt(self) -> AsyncGenerator[TokensEvent | FinishedEvent, None]:
        """One submission. Asking the reply to stop, or no longer listening, cancels it in the engine."""
        stream = self._stream = await self._engine.submit(self._request())
        stopping = asyncio.create_task(self._stop_when_asked(stream))
        finished = False
        try:
            async for event in stream:
                finished = isinstance(event, FinishedEvent)
                yield event
        finally:
            stopping.cancel()
            if not finished:
                with contextlib.suppress(EngineLost):
                    await stream.cancel()

    def _request(self) -> Request:
        plan, writing = self._reply.plan, self._writing
        return Request(
            id=f"{plan.id}.{self._new_id()}",
            prompt=plan.prompt,
            sampling=sampling_of(plan),
            adapter=AdapterRef(self._adapter_id, writing.version) if writing.version else None,
            user_key=self._adapter_id,
            generated=tuple(writing.tokens),
        )

    async def _stop_when_asked(self, stream: Stream) -> None:
        await self._reply.cancelled.wait()
        with contextlib.suppress(EngineLost):
            await stream.cancel()

    def _bad_adapter(self, event: object) -> bool:
        return (
            isinstance(event, FinishedEvent)
            and event.error_code == ADAPTER_UNAVAILABLE
            and self._writing.version > 0
        )

    async def _fall_back(self) -> FellBack:
        """The best version below the bad one, else the base."""
        bad = self._writing.version
        version = next(iter(await self._versions(bad)), 0)
        log.warning("an adapter could not be loaded", version=bad, instead=version)
        self._metrics.fallbacks.inc()
        instead = f"version {version}" if version else "the base model"
        return FellBack(version, f"version {bad} could not be loaded, {instead} answered")

    async def _engine_back(self) -> bool:
        """Wait for the engine's next life; False when asked to stop or out of patience."""
        now = asyncio.get_running_loop().time  # by which a wait stays as long when the clock is set
        deadline = now() + self._patience_s
        while not self._engine.connected:
            if self._reply.cancelled.is_set() or now() >= deadline:
                return False
            await asyncio.sleep(POLL_S)
        return not self._reply.cancelled.is_set()

    def _stopped_waiting(self) -> FinishedEvent:
        if self._reply.cancelled.is_set():
            return self._ended("cancelled")
        return self._failed(f"the engine did not come back within {self._patience_s:.0f} s")

    def _failed(self, message: str) -> FinishedEvent:
        return FinishedEvent(
            request_id=self._reply.id,
            reason="error",
            usage=self._usage(),
            error_code=ENGINE_UNAVAILABLE,
            message=message,
        )

    def _as_cut(self, event: FinishedEvent) -> FinishedEvent:
        """The engine's end without what it wrote after the stop string."""
        usage = replace(event.usage, completion_tokens=len(self._writing.tokens))
        return replace(event, reason="stop", usage=usage, error_code=None, message=None)

    def _ended(self, reason: FinishReason) -> FinishedEvent:
        return FinishedEvent(request_id=self._reply.id, reason=reason, usage=self._usage())

    def _usage(self) -> Usage:
        return Usage(
            prompt_tokens=len(self._reply.plan.prompt),
            cached_tokens=0,
            completion_tokens=len(self._writing.tokens),
        )

    def _note(self, tokens: int) -> None:
        self._heard += tokens
        self._last_at = self._clock()
        if self._first_at is None:
            self._first_at = self._last_at


def sampling_of(plan: Plan) -> SamplingParams:
    return SamplingParams(
        temperature=plan.temperature,
        top_p=plan.top_p,
        top_k=plan.top_k,
        min_p=plan.min_p,
        seed=plan.seed,
        max_tokens=plan.max_tokens,
        stop_token_ids=plan.stop_token_ids,
    )
