"""The wire, outbound: OpenAI's Responses events and ours, as typed structs. Pure.

Events of a reply carry `response_id` and a `sequence_number` that counts from 0 without gaps; a `TextDelta`
that stands for several merged ones carries the last one's number, so `starting_after` means the same either
way."""

from collections.abc import Mapping
from typing import Any, Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType, field

from service.errors import ApiError

ReplyStatus = Literal["queued", "in_progress", "completed", "incomplete", "cancelled", "failed"]


class ConversationRef(Struct):
    id: str


# ---------------------------------------------------------------- a reply


class OutputText(Struct, kw_only=True):
    type: str = "output_text"
    text: str = ""
    annotations: list[Any] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)


class OutputMessage(Struct, kw_only=True):
    id: str
    type: str = "message"
    role: str = "assistant"
    status: str = "in_progress"
    content: list[OutputText] = field(default_factory=list)


class ResponseFault(Struct, kw_only=True):
    code: str
    message: str


class IncompleteDetails(Struct, kw_only=True):
    reason: str


class InputDetails(Struct, kw_only=True):
    cached_tokens: int = 0
    cache_write_tokens: int = 0


class OutputDetails(Struct, kw_only=True):
    reasoning_tokens: int = 0


class ReplyUsage(Struct, kw_only=True):
    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: InputDetails = field(default_factory=InputDetails)
    output_tokens_details: OutputDetails = field(default_factory=OutputDetails)


class Response(Struct, kw_only=True):
    """OpenAI's Response. Everything Attune adds is in `metadata`, as strings, where clients expect extras."""

    id: str
    object: str = "response"
    created_at: float
    completed_at: float | None = None
    status: ReplyStatus
    model: str
    output: list[OutputMessage] = field(default_factory=list)
    error: ResponseFault | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    conversation: ConversationRef | None = None
    previous_response_id: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    store: bool = True
    background: bool = False
    parallel_tool_calls: bool = False
    tool_choice: str = "none"
    tools: list[Any] = field(default_factory=list)
    usage: ReplyUsage | None = None


class ReplyEvent(Struct, kw_only=True):
    """An event of one reply. Its number is set when it is written to the reply's log."""

    response_id: str = ""
    sequence_number: int = -1
    stream_id: str | UnsetType = UNSET


class Created(ReplyEvent, kw_only=True, tag="response.created"):
    response: Response


class InProgress(ReplyEvent, kw_only=True, tag="response.in_progress"):
    """Also sent later when something about the reply changed: another version had to serve it."""

    response: Response


class ItemAdded(ReplyEvent, kw_only=True, tag="response.output_item.added"):
    item: OutputMessage
    output_index: int = 0


class PartAdded(ReplyEvent, kw_only=True, tag="response.content_part.added"):
    item_id: str
    part: OutputText
    output_index: int = 0
    content_index: int = 0


class TextDelta(ReplyEvent, kw_only=True, tag="response.output_text.delta"):
    item_id: str
    delta: str
    output_index: int = 0
    content_index: int = 0
    logprobs: list[Any] = field(default_factory=list)


class TextDone(ReplyEvent, kw_only=True, tag="response.output_text.done"):
    item_id: str
    text: str
    output_index: int = 0
    content_index: int = 0
    logprobs: list[Any] = field(default_factory=list)


class PartDone(ReplyEvent, kw_only=True, tag="response.content_part.done"):
    item_id: str
    part: OutputText
    output_index: int = 0
    content_index: int = 0


class ItemDone(ReplyEvent, kw_only=True, tag="response.output_item.done"):
    item: OutputMessage
    output_index: int = 0


class Completed(ReplyEvent, kw_only=True, tag="response.completed"):
    response: Response


class Incomplete(ReplyEvent, kw_only=True, tag="response.incomplete"):
    """Stopped early: `max_output_tokens`, `cancelled` (status `cancelled`) or `disconnected`."""

    response: Response


class Failed(ReplyEvent, kw_only=True, tag="response.failed"):
    response: Response


Terminal = Completed | Incomplete | Failed
TERMINAL = (Completed, Incomplete, Failed)
AnyReplyEvent = (
    Created
    | InProgress
    | ItemAdded
    | PartAdded
    | TextDelta
    | TextDone
    | PartDone
    | ItemDone
    | Completed
    | Incomplete
    | Failed
)
_reply_decoder = msgspec.json.Decoder(AnyReplyEvent)


def read_reply_event(data: bytes) -> AnyReplyEvent:
    """A stored event, back from `json_bytes`."""
    event: AnyReplyEvent = _reply_decoder.decode(data)
    return event


def json_bytes(event: Any) -> bytes:
    return msgspec.json.encode(event)


# ---------------------------------------------------------------- what else a socket is told


class AdapterState(Struct, kw_only=True):
    version: int
    base: str
    updated_at: str | None = None


class SessionCreated(Struct, kw_only=True, tag="session.created"):
    session_id: str
    user: str
    adapter: AdapterState
    limits: dict[str, int]
    expires_at: float


class SessionExpiring(Struct, kw_only=True, tag="session.expiring"):
    reason: Literal["max_age", "credential", "shutdown"]
    seconds: float


class Pong(Struct, kw_only=True, tag="pong"):
    id: str | int | None = None


class FeedbackCreated(Struct, kw_only=True, tag="feedback.created"):
    """Saved. `correction_id` is the id of the turn that holds the correction."""

    item_id: str
    rating: Literal["up", "down"] | None = None
    correction_id: str | None = None
    event_id: str | None = None


class ErrorDetail(Struct, kw_only=True):
    type: str
    code: str
    message: str
    param: str | None = None


class ErrorEvent(Struct, kw_only=True, tag="error"):
    """What was asked for could not be done; the socket stays open. `error` is OpenAI's form of the same."""

    code: str
    message: str
    param: str | None = None
    event_id: str | None = None
    retryable: bool = False
    status: int = 500
    error: ErrorDetail
    response_id: str | UnsetType = UNSET
    stream_id: str | UnsetType = UNSET


def error_event(
    error: ApiError,
    *,
    event_id: str | None = None,
    stream_id: str | None = None,
    response_id: str | None = None,
) -> ErrorEvent:
    return ErrorEvent(
        code=error.code,
        message=error.message,
        param=error.param,
        event_id=event_id,
        retryable=error.retryable,
        status=error.status,
        error=ErrorDetail(type=error.type, code=error.code, message=error.message, param=error.param),
        response_id=UNSET if response_id is None else response_id,
        stream_id=UNSET if stream_id is None else stream_id,
    )


_PUSHED = ("adapter.updated", "adapter.trial", "adapter.forgotten")
_REFRESH_STATES = {
    "queued": "adapter.refresh.queued",
    "training": "adapter.refresh.progress",
    "gating": "adapter.refresh.progress",
    "completed": "adapter.refresh.completed",
    "failed": "adapter.refresh.failed",
}


def pushed_event(message: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the store announced, as the event the person's sockets get; None for what is not for them.

    {"type": "adapter.updated", "user": …, "from": 1, "to": 2}               the same, less whose it is
    {"job_id": …, "state": "training", "progress": 0.4, "user": …}           adapter.refresh.progress
    """
    fields = {key: value for key, value in message.items() if key not in ("user", "type", "adapter")}
    name = message.get("type")
    if name in _PUSHED:
        return {"type": name, **fields}
    state = _REFRESH_STATES.get(str(message.get("state")))
    return None if state is None else {"type": state, **fields}
