"""One reply's events, made from its tokens. Pure: no engine, no store, no clock of its own."""

from collections.abc import Sequence
from typing import Protocol

from engine.request import FinishedEvent, Timings, Usage
from service.events import (
    AnyReplyEvent,
    Completed,
    ConversationRef,
    Created,
    Failed,
    Incomplete,
    IncompleteDetails,
    InProgress,
    InputDetails,
    ItemAdded,
    ItemDone,
    OutputMessage,
    OutputText,
    PartAdded,
    PartDone,
    ReplyStatus,
    ReplyUsage,
    Response,
    ResponseFault,
    TextDelta,
    TextDone,
)
from service.reply import Plan, Reply
from service.stops import StopText


class Decoder(Protocol):
    """Token ids to text, whole characters only."""

    def push(self, ids: Sequence[int]) -> str: ...
    def finish(self) -> str: ...


class Ending:
    """How a reply ended: one of the names below, and what the client is told of it."""

    def __init__(self, status: ReplyStatus, reason: str | None = None, fault: ResponseFault | None = None):
        self.status = status
        self.reason = reason
        self.fault = fault

    @classmethod
    def of(cls, finished: FinishedEvent, *, stopped: bool, cancel_reason: str) -> "Ending":
        """`stopped`: by a stop string, which the engine sees as a cancel."""
        if stopped or finished.reason == "stop":
            return cls("completed")
        if finished.reason == "length":
            return cls("incomplete", "max_output_tokens")
        if finished.reason == "cancelled":
            return cls("cancelled" if cancel_reason == "cancelled" else "incomplete", cancel_reason)
        return cls.failed(finished.error_code or "server_error", finished.message or "the engine failed")

    @classmethod
    def failed(cls, code: str, message: str) -> "Ending":
        return cls("failed", fault=ResponseFault(code=code, message=message))


class Writing:
    """A reply as it grows. Begun from a log that already has entries, it goes on where they stop: text
    depends on the joined tokens alone, so what was held back when the log broke off comes first."""

    def __init__(self, reply: Reply, decoder: Decoder) -> None:
        self.plan: Plan = reply.plan
        self.version = reply.plan.version
        self.notices = _notices(reply.plan.notice)
        self.tokens: list[int] = []
        self.text = reply.text  # as shown so far
        self.history_saved = reply.plan.saved
        self._decoder = decoder
        self._stops = StopText(reply.plan.stop)
        self._unlogged: tuple[int, ...] = ()  # tokens that no event has carried yet
        self._ready = ""  # text that no event has carried yet
        self._ahead = 0  # characters that the log has already of what is still held back
        response = reply.response
        if response is not None:
            self.version = int(response.metadata["adapter_version"])
            self.notices = _notices(response.metadata.get("notice"))
        logged = reply.tokens
        if logged:
            self.tokens.extend(logged)
            said = self._stops.push(decoder.push(logged))
            self._ready = said[len(self.text) :]
            self._ahead = max(0, len(self.text) - len(said))

    @property
    def stopped(self) -> bool:
        """A stop string was written: nothing after it will be shown."""
        return self._stops.stopped

    def opening(self) -> list[AnyReplyEvent]:
        item_id = self.plan.item_id
        return [
            Created(response=self.picture("in_progress")),
            InProgress(response=self.picture("in_progress")),
            ItemAdded(item=OutputMessage(id=item_id)),
            PartAdded(item_id=item_id, part=OutputText()),
        ]

    def hear(self, token_ids: Sequence[int]) -> None:
        """New tokens. `take` gives what they add to the text."""
        self.tokens.extend(token_ids)
        self._unlogged += tuple(token_ids)
        self._say(self._stops.push(self._decoder.push(token_ids)))

    def take(self) -> tuple[list[AnyReplyEvent], tuple[int, ...]]:
        """The events of what was heard since the last time, and the tokens they carry. No text, no events:
        the tokens wait for the next event that has some."""
        if not self._ready:
            return [], ()
        delta, self._ready = self._ready, ""
        tokens, self._unlogged = self._unlogged, ()
        self.text += delta
        return [TextDelta(item_id=self.plan.item_id, delta=delta)], tokens

    def served_by(self, version: int, notice: str) -> list[AnyReplyEvent]:
        """Another version has to go on with the reply; the client is told."""
        self.version = version
        self.notices.append(notice)
        return [InProgress(response=self.picture("in_progress"))]

    def note(self, notice: str, *, holds: bool) -> None:
        """Whether the client is to be told this at the end."""
        others = [each for each in self.notices if each != notice]
        self.notices = [*others, notice] if holds else others

    def finish(self) -> None:
        """No more tokens: what was held back, half a character or a possible stop string, is text after
        all."""
        self._say(self._stops.push(self._decoder.finish()) + self._stops.flush())

    def _say(self, text: str) -> None:
        self._ready += text[self._ahead :]
        self._ahead = max(0, self._ahead - len(text))

    def closing(
        self, ending: Ending, usage: Usage | None, numbers: dict[str, str], completed_at: float
    ) -> list[AnyReplyEvent]:
        """The last events. `numbers` are the timings to put in the metadata."""
        item_id = self.plan.item_id
        picture = self.picture(ending.status, ending=ending, usage=usage, numbers=numbers)
        if ending.status == "completed":
            picture.completed_at = completed_at
            last: AnyReplyEvent = Completed(response=picture)
        elif ending.status == "failed":
            last = Failed(response=picture)
        else:
            last = Incomplete(response=picture)
        return [
            TextDone(item_id=item_id, text=self.text),
            PartDone(item_id=item_id, part=OutputText(text=self.text)),
            ItemDone(item=self._message("completed" if ending.status == "completed" else "incomplete")),
            last,
        ]

    def picture(
        self,
        status: ReplyStatus,
        *,
        ending: Ending | None = None,
        usage: Usage | None = None,
        numbers: dict[str, str] | None = None,
    ) -> Response:
        """The whole reply as it stands."""
        plan = self.plan
        reason = ending.reason if ending is not None else None
        return Response(
            id=plan.id,
            created_at=plan.created_at,
            status=status,
            model=plan.model,
            output=[] if ending is None else [self._message("completed" if reason is None else "incomplete")],
            error=None if ending is None else ending.fault,
            incomplete_details=None if reason is None else IncompleteDetails(reason=reason),
            instructions=plan.instructions,
            metadata=self._metadata(numbers or {}),
            conversation=ConversationRef(id=plan.conversation),
            previous_response_id=plan.previous_response_id,
            max_output_tokens=plan.max_tokens,
            temperature=plan.temperature,
            top_p=plan.top_p,
            store=plan.save,
            background=plan.background,
            usage=None if usage is None else _usage(usage),
        )

    def _metadata(self, numbers: dict[str, str]) -> dict[str, str]:
        """The client's own, then ours, which wins."""
        plan = self.plan
        ours = {
            "adapter_version": str(self.version),
            "history_turns": str(plan.history_turns),
            "history_truncated": _flag(plan.truncated),
            "history_saved": _flag(self.history_saved),
            "seed": str(plan.seed),
            **numbers,
        }
        if plan.user_turn_id is not None:
            ours["user_turn_id"] = plan.user_turn_id
        if self.notices:
            ours["notice"] = "; ".join(self.notices)
        return plan.metadata | ours

    def _message(self, status: str) -> OutputMessage:
        return OutputMessage(id=self.plan.item_id, status=status, content=[OutputText(text=self.text)])


def timing_numbers(
    timings: Timings, first_token_s: float | None, tokens_per_s: float | None
) -> dict[str, str]:
    """Where the time went, as metadata: seconds with three decimals."""
    numbers = {
        "queue_s": f"{timings.queued_s:.3f}",
        "adapter_load_s": f"{timings.adapter_load_s:.3f}",
        "adapter_tier": timings.adapter_tier,
    }
    if first_token_s is not None:
        numbers["first_token_s"] = f"{first_token_s:.3f}"
    if tokens_per_s is not None:
        numbers["tokens_per_s"] = f"{tokens_per_s:.1f}"
    return numbers


def _usage(usage: Usage) -> ReplyUsage:
    return ReplyUsage(
        input_tokens=usage.prompt_tokens,
        output_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        input_tokens_details=InputDetails(cached_tokens=usage.cached_tokens),
    )


def _notices(told: str | None) -> list[str]:
    return told.split("; ") if told else []


def _flag(value: bool) -> str:
    return "true" if value else "false"
