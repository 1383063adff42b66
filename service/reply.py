"""One reply as a log: its plan, its numbered events with the tokens they came from, and who listens to it
here."""

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from service.errors import ApiError, BadRequest
from service.events import (
    TERMINAL,
    AnyReplyEvent,
    Created,
    InProgress,
    Response,
    TextDelta,
    json_bytes,
    read_reply_event,
)


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """All that is needed to write a reply, or to write the rest of it somewhere else."""

    id: str
    user: str
    epoch: int | None  # of the person's history; None when the store was away
    model: str  # as asked: base, me, me@3
    version: int  # the adapter version it begins on; 0 is the bare base
    conversation: str
    item_id: str  # of the assistant's turn
    user_turn_id: str | None
    created_at: float
    prompt: tuple[int, ...]
    history_turns: int
    truncated: bool
    seed: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    max_tokens: int
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    save: bool  # append the reply to the person's history
    saved: bool  # the person's own turn is in their history
    unsaved: str | None = None  # what they said, if the store was away for that; saved with the reply
    background: bool = False
    instructions: str | None = None
    previous_response_id: str | None = None
    metadata: dict[str, str] = msgspec.field(default_factory=dict)
    fingerprint: str = ""  # of the request, so that one event_id cannot mean two things
    notice: str | None = None
    said_at: float = 0.0  # where the message stands in the history, and the reply at the earliest

    @property
    def begun(self) -> datetime:
        return datetime.fromtimestamp(self.created_at, UTC)

    @property
    def said(self) -> datetime:
        return max(self.begun, datetime.fromtimestamp(self.said_at, UTC))


# Fields of a message that say nothing of what is asked.
CARRIED_BY = ("type", "event_id", "stream_id", "stream", "stream_options")


def fingerprint(asked: msgspec.Struct) -> str:
    """The same for the same question, on a socket or over HTTP."""
    fields: dict[str, Any] = msgspec.to_builtins(asked)
    return hashlib.sha256(
        json_bytes({name: value for name, value in fields.items() if name not in CARRIED_BY})
    ).hexdigest()


class Entry(msgspec.Struct, frozen=True):
    """One event of the log, and the tokens that arrived with it."""

    event: AnyReplyEvent
    tokens: tuple[int, ...] = ()

    def stored(self) -> bytes:
        return msgspec.msgpack.encode((json_bytes(self.event), self.tokens))


def read_entry(data: bytes) -> Entry:
    event, tokens = msgspec.msgpack.decode(data, type=tuple[bytes, tuple[int, ...]])
    return Entry(read_reply_event(event), tokens)


class Reply:
    """The log of one reply, as far as this process knows it, and whoever listens to it here."""

    def __init__(self, plan: Plan, entries: Sequence[Entry] = (), *, stored: int | None = 0) -> None:
        self.plan = plan
        self.entries = list(entries)
        self.stored = stored  # how many of them the store has; None: it does not know this reply
        self.lost: ApiError | None = None  # why its end will never be seen here
        self.listeners = 0
        self.acknowledged = -1
        self.cancelled: asyncio.Event = asyncio.Event()
        self.cancel_reason = "cancelled"
        self.running = False  # it is this process that writes it
        self.untold = False  # it ended, and the store was away for that
        self._news = asyncio.Event()
        self.on_left: Callable[[Reply], None] = lambda reply: None

    @property
    def id(self) -> str:
        return self.plan.id

    @property
    def done(self) -> bool:
        return bool(self.entries) and isinstance(self.entries[-1].event, TERMINAL)

    @property
    def tokens(self) -> tuple[int, ...]:
        """Everything generated, as far as the log goes."""
        return tuple(token for entry in self.entries for token in entry.tokens)

    @property
    def text(self) -> str:
        return "".join(entry.event.delta for entry in self.entries if isinstance(entry.event, TextDelta))

    @property
    def response(self) -> Response | None:
        """The newest picture of the whole reply; None before it was created."""
        for entry in reversed(self.entries):
            if isinstance(entry.event, (Created, InProgress, *TERMINAL)):
                return entry.event.response
        return None

    def cancel(self, reason: str) -> None:
        if not self.cancelled.is_set():
            self.cancel_reason = reason
            self.cancelled.set()

    def number(self, events: Sequence[AnyReplyEvent], tokens: tuple[int, ...]) -> list[Entry]:
        """The events as the next entries of the log; the tokens go with the first."""
        for at, event in enumerate(events, start=len(self.entries)):
            event.response_id, event.sequence_number = self.id, at
        return [Entry(event, tokens if at == 0 else ()) for at, event in enumerate(events)]

    def lose(self, error: ApiError) -> None:
        """There will be no end; everyone who listens gets `error`."""
        self.lost = error
        self._news.set()

    def feed(self, entries: Sequence[Entry]) -> None:
        """Add to the log and wake everyone who listens."""
        self.entries.extend(entries)
        self._news.set()
        self._news = asyncio.Event()

    def check_start(self, after: int) -> None:
        """Whoever waits for what comes after that number waits for nothing if the log has ended before it. It
        may, where its gateway died with events that were shown and not stored. Raises BadRequest."""
        if self.done and after >= len(self.entries):
            raise BadRequest(
                f"starting_after: expected below {len(self.entries)}, got {after}", param="starting_after"
            )

    async def events(self, after: int = -1) -> AsyncGenerator[AnyReplyEvent, None]:
        """The events numbered above `after`, those there are and those to come, to the last. Raises
        ApiError."""
        at = max(0, after + 1)
        self.listeners += 1
        try:
            while True:
                news = self._news
                while at < len(self.entries):
                    yield self.entries[at].event
                    at += 1
                if self.done:
                    self.check_start(after)
                    return
                if self.lost is not None:
                    raise self.lost
                await news.wait()
        finally:
            self.listeners -= 1
            self.on_left(self)

    async def finished(self) -> Response:
        """The whole reply, when it is."""
        async for _ in self.events(len(self.entries) - 1):
            pass
        response = self.response
        assert response is not None
        return response
