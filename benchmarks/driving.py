"""An engine driven through its public API: requests to their ends, steady decoding, first tokens.

Every reply is held to what was asked for, so that no figure comes from work left undone.
"""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from engine.engine import Engine
from engine.request import AdapterRef, FinishedEvent, Request, SamplingParams, TokensEvent

_labels = count()


class WrongReply(RuntimeError):
    """A request did not end as it was asked to: `request`, `expected`, `got`."""

    def __init__(self, request: str, expected: str, got: object) -> None:
        super().__init__(f"request {request}: expected {expected}, got {got}")
        self.request = request
        self.expected = expected
        self.got = got


class OverBudget(RuntimeError):
    """A row took longer than it may: `limit` in seconds."""

    def __init__(self, limit: float) -> None:
        super().__init__(f"expected to be done within {limit:.0f} s")
        self.limit = limit


@dataclass
class Budget:
    """Seconds that something may take from now on."""

    seconds: float
    started: float = field(default_factory=time.monotonic)

    def check(self) -> None:
        if time.monotonic() - self.started > self.seconds:
            raise OverBudget(self.seconds)


@dataclass(frozen=True)
class Work:
    """A reply to be written greedily: exactly `output` tokens after `prompt`."""

    prompt: tuple[int, ...]
    output: int
    adapter: AdapterRef | None = None


def uniform_lengths(
    requests: int, prompt: tuple[int, int], output: tuple[int, int], seed: int
) -> list[tuple[int, int]]:
    """(prompt, output) lengths, each uniform from its first to its last bound."""
    chooser = random.Random(seed)
    return [(chooser.randint(*prompt), chooser.randint(*output)) for _ in range(requests)]


def make_work(
    vocab_size: int, lengths: Iterable[tuple[int, int]], adapters: Sequence[AdapterRef | None], seed: int
) -> list[Work]:
    """One piece of work per (prompt, output) length, with the adapters in turn. Prompts are random tokens,
    so none shares a beginning with another.
    """
    chooser = random.Random(seed)
    tokens = range(vocab_size)
    return [
        Work(tuple(chooser.choices(tokens, k=prompt)), output, adapters[index % len(adapters)])
        for index, (prompt, output) in enumerate(lengths)
    ]


class Driven:
    """An engine with a loop around it that sleeps while all requests wait for adapters."""

    def __init__(self, engine: Engine, loaded: threading.Event, budget: Budget) -> None:
        """`loaded` is set by the engine's `on_load`."""
        self.engine = engine
        self._loaded = loaded
        self.budget = budget

    def submit(self, work: Iterable[Work]) -> list[Request]:
        """Each piece of work is a user of its own."""
        requests = []
        for each in work:
            name = f"r{next(_labels)}"
            sampling = SamplingParams(temperature=0.0, max_tokens=each.output, ignore_eos=True)
            requests.append(Request(name, each.prompt, sampling, each.adapter, user_key=name))
        for request in requests:
            self.engine.submit(request)
        return requests

    def step(self) -> list[TokensEvent | FinishedEvent]:
        self.budget.check()
        self._loaded.clear()
        if self.engine.is_stalled:
            self._loaded.wait(0.001)  # or a copy to the device is on its way, which tells nobody
        return self.engine.step()

    def load(self, refs: Sequence[AdapterRef], *, on_device: bool = False) -> None:
        """Have these adapters read into host memory, as presence would; with `on_device`, wait until those
        that have room there are on the device."""
        failures = self.engine.stats().adapters["failures"]
        for begin in range(0, len(refs), 1024):  # the engine remembers a few thousand prefetches only
            for ref in refs[begin : begin + 1024]:
                self.engine.prefetch(ref)
            while True:
                self._loaded.clear()
                self.step()
                queue = self.engine.stats().queue
                if not queue["loading"] and not (on_device and queue["copying"]):
                    break
                self._loaded.wait(0.001 if on_device else 0.05)
        if self.engine.stats().adapters["failures"] != failures:
            raise WrongReply("prefetch", "adapters that load", "a failure; the log names it")

    def drain(self) -> None:
        """Step until nothing is left to do."""
        while self.engine.has_work:
            self.step()

    def run(self, work: Sequence[Work]) -> Run:
        """All of it at once, to the end."""
        before = self.engine.stats().as_dict()
        started = time.perf_counter()
        requests = self.submit(work)
        replies: dict[str, list[int]] = {request.id: [] for request in requests}
        first: dict[str, float] = {}
        tiers: dict[str, int] = {}
        seconds = 0.0
        while self.engine.has_work:
            events = self.step()
            now = time.perf_counter() - started
            for event in events:
                if isinstance(event, TokensEvent):
                    first.setdefault(event.request_id, now)
                    replies[event.request_id].extend(event.token_ids)
                    seconds = now
                else:
                    if event.reason != "length":
                        raise WrongReply(event.request_id, "an end by length", event.message or event.reason)
                    tier = event.timings.adapter_tier
                    tiers[tier] = tiers.get(tier, 0) + 1
        for request, each in zip(requests, work, strict=True):
            if len(replies[request.id]) != each.output:
                raise WrongReply(request.id, f"{each.output} tokens", len(replies[request.id]))
        self.engine.check_integrity()
        return Run(
            seconds,
            [tuple(replies[request.id]) for request in requests],
            [first[request.id] for request in requests],
            tiers,
            changes(before, self.engine.stats().as_dict()),
        )

    def decode(self, work: Sequence[Work], steps: int, *, settle: int = 8) -> Steady:
        """Seconds between the ends of `steps` steps in each of which all of the work gets one token."""
        requests = self.submit(work)
        got: dict[str, int] = {request.id: 0 for request in requests}
        seconds: list[float] = []
        context = 0
        previous = time.perf_counter()
        before: dict[str, Any] = {}
        quiet = -settle  # steps at full batch so far, less those that settle the clocks
        partial = 0
        while len(seconds) < steps:
            events = self.step()
            now = time.perf_counter()
            for event in events:
                if isinstance(event, FinishedEvent):
                    raise WrongReply(
                        event.request_id, "to decode on", f"{event.reason} {event.message or ''}"
                    )
                got[event.request_id] += len(event.token_ids)
            if len(events) == len(requests):
                quiet += 1
                if quiet > 0:
                    seconds.append(now - previous)
                    context += sum(got.values()) + sum(len(each.prompt) for each in work)
            elif quiet > 0:
                partial += 1
            if quiet == 0 and not before:
                before = self.engine.stats().as_dict()
            previous = now
        after = changes(before, self.engine.stats().as_dict())
        for request in requests:
            self.engine.cancel(request.id)
        self.drain()
        self.engine.check_integrity()
        return Steady(tuple(seconds), context / steps, len(requests), partial, after)

    def first_token(self, work: Work) -> tuple[float, str]:
        """Seconds from submitting to the first token, and where the adapter was found."""
        run = self.run([work])
        return run.first_s[0], next(iter(run.tiers))


@dataclass(frozen=True)
class Run:
    """Work done from the first submit to the last token. Times in seconds."""

    seconds: float
    replies: list[tuple[int, ...]]
    first_s: list[float]
    tiers: dict[str, int]  # where the adapters were when they were asked for
    stats: dict[str, Any]  # of the engine: what its sums grew by

    @property
    def output_tokens(self) -> int:
        return sum(map(len, self.replies))

    @property
    def tokens_per_s(self) -> float:
        return self.output_tokens / self.seconds


@dataclass(frozen=True)
class Steady:
    """Steps of a full batch that decodes."""

    seconds: tuple[float, ...]
    context_tokens: float  # of all rows together, mean of the steps
    rows: int
    partial: int  # steps in between in which not all rows got a token; not counted
    stats: dict[str, Any]

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    @property
    def split_ms(self) -> dict[str, float]:
        """Milliseconds per step of everything the engine keeps seconds of."""
        step = self.stats["step"]
        return {
            key.removesuffix("_s"): round(1e3 * value / max(1, step["steps"]), 3)
            for key, value in step.items()
            if key.endswith("_s")
        }


def changes(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """The difference of two nested mappings of numbers; what is no number, or new, is taken from `after`."""
    found: dict[str, Any] = {}
    for key, value in after.items():
        old = before.get(key)
        if isinstance(value, dict):
            found[key] = changes(old if isinstance(old, dict) else {}, value)
        elif isinstance(value, int | float) and isinstance(old, int | float):
            found[key] = value - old
        else:
            found[key] = value
    return found
