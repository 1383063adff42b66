"""The wire, inbound: what clients ask, as typed structs, and frames in and out. Pure; no socket, no store.

A frame is JSON text, or msgpack bytes under the subprotocol `attune.v1.msgpack`. `Codec.decode` and
`read_event` turn a frame into a `ClientEvent`; `Codec.encode` turns any event of `events.py` into a frame.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin

import msgpack
import msgspec
from msgspec import UNSET, Struct, UnsetType

from service.errors import BadRequest
from service.events import ConversationRef

JSON = "attune.v1.json"
MSGPACK = "attune.v1.msgpack"
TICKET_PREFIX = "ticket."
MAX_FRAME_BYTES = 1 << 20
MAX_DEPTH = 32  # nested containers in one frame; ours need five

# Close codes beyond RFC 6455's: the numbers of graphql-transport-ws.
GOING_AWAY, WRONG_FRAME_KIND, TOO_BIG, TRY_AGAIN_LATER = 1001, 1003, 1009, 1013
MALFORMED, NOT_AUTHENTICATED, TOO_MANY = 4400, 4401, 4429

T = TypeVar("T")
_MODEL = re.compile(r"me(?:@v?(\d{1,9}))?", re.ASCII)


class MalformedFrame(ValueError):
    """A frame that is no message at all. The socket is closed with `close_code`."""

    def __init__(self, expected: str, close_code: int = MALFORMED) -> None:
        super().__init__(f"expected {expected}")
        self.close_code = close_code


# ---------------------------------------------------------------- what a client asks


class ModelName(NamedTuple):
    """`base`: no adapter. `me`: `version` None, the newest. `me@3`: that version of the caller's own."""

    base: bool
    version: int | None


def parse_model(name: str) -> ModelName | None:
    """The three forms a model may have; None for anything else, whoever's it may be."""
    if name == "base":
        return ModelName(base=True, version=None)
    found = _MODEL.fullmatch(name)
    if found is None:
        return None
    return ModelName(base=False, version=None if found[1] is None else int(found[1]))


class InputItem(Struct):
    """A message of `input` (Responses) or `messages` (chat). `content` is text or a list of text parts."""

    role: str = "user"
    content: Any = ""
    type: str = "message"


class _Asked(Struct, kw_only=True):
    """What both ways to ask for a reply share. `store: false` is neither saved nor learned from."""

    model: str = "me"
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    store: bool | None = None
    stream: bool | None = None
    metadata: dict[str, str] | None = None
    conversation: str | ConversationRef | None = None
    tools: list[Any] | None = None


class OutputFormat(Struct):
    type: str = "text"


class TextOptions(Struct):
    format: OutputFormat | None = None


class CreateResponse(_Asked, kw_only=True):
    """The body of `POST /v1/responses`, and the fields of `response.create`.

    `input` None with a `conversation` asks again for a reply to its last user turn.
    """

    input: str | list[InputItem] | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    previous_response_id: str | None = None
    background: bool | None = None
    text: TextOptions | None = None


class StreamOptions(Struct):
    include_usage: bool = False


class CreateChatCompletion(_Asked, kw_only=True):
    """The body of `POST /v1/chat/completions`."""

    messages: list[InputItem]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int | None = None
    response_format: OutputFormat | None = None
    stream_options: StreamOptions | None = None


class ResponseCreate(CreateResponse, kw_only=True, tag="response.create"):
    """`event_id` is the idempotency key: the same one again attaches to the reply it began."""

    event_id: str | None = None
    stream_id: str | None = None


class ResponseCancel(Struct, kw_only=True, tag="response.cancel"):
    response_id: str
    event_id: str | None = None


class ResponseResume(Struct, kw_only=True, tag="response.resume"):
    response_id: str
    starting_after: int = -1
    event_id: str | None = None
    stream_id: str | None = None


class ResponseAck(Struct, kw_only=True, tag="response.ack"):
    response_id: str
    sequence_number: int
    event_id: str | None = None


class FeedbackCreate(Struct, kw_only=True, tag="feedback.create"):
    """`item_id` is a turn's id. A null `rating` takes a rating back; `correction` is what it should have
    said."""

    item_id: str
    rating: Literal["up", "down"] | UnsetType | None = UNSET
    correction: str | None = None
    event_id: str | None = None


class RefreshCreate(Struct, kw_only=True, tag="adapter.refresh.create"):
    event_id: str | None = None


class Typing(Struct, kw_only=True, tag="typing"):
    """The person began to write: their adapter may be fetched now."""

    event_id: str | None = None


class Ping(Struct, kw_only=True, tag="ping"):
    id: str | int | None = None
    event_id: str | None = None


ClientEvent = (
    ResponseCreate
    | ResponseCancel
    | ResponseResume
    | ResponseAck
    | FeedbackCreate
    | RefreshCreate
    | Typing
    | Ping
)
_CLIENT_EVENTS: dict[str, type[ClientEvent]] = {
    str(kind.__struct_config__.tag): kind for kind in get_args(ClientEvent)
}


class UnreadableEvent(BadRequest):
    """A message that cannot be acted on: unknown type, or a field of the wrong kind. The socket stays."""

    def __init__(self, message: str, *, code: str, param: str | None, event_id: str | None) -> None:
        super().__init__(message, code=code, param=param)
        self.event_id = event_id


def read_event(message: Mapping[str, Any]) -> ClientEvent:
    """A decoded frame as one of the events above. Unknown fields are ignored. Raises UnreadableEvent."""
    event_id = message.get("event_id")
    event_id = event_id if isinstance(event_id, str) else None
    name = message.get("type")
    kind = _CLIENT_EVENTS.get(name) if isinstance(name, str) else None
    if kind is None:
        expected = ", ".join(_CLIENT_EVENTS)
        raise UnreadableEvent(
            f"unknown event type {name!r:.80}; expected one of {expected}",
            code="unknown_event",
            param="type",
            event_id=event_id,
        )
    try:
        return convert(message, kind)
    except BadRequest as error:
        raise UnreadableEvent(error.message, code=error.code, param=error.param, event_id=event_id) from None


def convert(value: Any, kind: type[T]) -> T:
    """`value` checked against the struct `kind`. Raises BadRequest that names the field."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise _bad_field(error, kind) from None


def read_body(body: bytes, kind: type[T]) -> T:
    """A JSON body as the struct `kind`. Raises BadRequest."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _bad_field(error, kind) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"expected a JSON object: {error}", code="invalid_json") from None


def _bad_field(error: msgspec.ValidationError, kind: type[Any]) -> BadRequest:
    message, _, path = str(error).partition(" - at `$")
    missing = re.search(r"required field `(\w+)`", message)
    param = missing[1] if missing else path.strip("`").lstrip(".") or None
    choices = _choices(kind, param)
    if choices and (wrong := message.removeprefix("Invalid enum value ")) != message:
        message = f"expected {' or '.join(choices)}, got {wrong}"
    return BadRequest(f"{param}: {message}" if param else message, param=param)


def _choices(kind: type[Any], param: str | None) -> list[str]:
    """The values that a field of the struct takes, as JSON, if it names them; msgspec says only that another
    was given."""
    (wanted,) = [field.type for field in msgspec.structs.fields(kind) if field.encode_name == param] or [None]
    parts = (wanted, *get_args(wanted))
    named = [json.dumps(value) for part in parts if get_origin(part) is Literal for value in get_args(part)]
    return [*named, "null"] if named and type(None) in parts else named


def text_of(content: Any, param: str) -> str:
    """The text of a message's content: a string, or its text parts joined. Raises BadRequest."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRequest(f"{param}: expected a string or a list, got {type(content).__name__}", param=param)
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if isinstance(part, dict) else None
        if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
            raise BadRequest(f"{param}: expected text parts, got {kind!r}", param=param)
        texts.append(text)
    return "".join(texts)


def conversation_of(asked: str | ConversationRef | None) -> str | None:
    """The conversation's name; imported ones may be called anything printable. Raises BadRequest."""
    name = asked.id if isinstance(asked, ConversationRef) else asked
    if name is not None and not (1 <= len(name) <= 256 and name.isprintable() and name.strip()):
        raise BadRequest(
            f"conversation: expected 1 to 256 printable characters, got {name!r:.160}", param="conversation"
        )
    return name


# ---------------------------------------------------------------- frames


class Codec:
    """One socket's way to write frames. `extensions`: whether unasked events of ours may be sent."""

    def __init__(self, subprotocol: str | None) -> None:
        self.subprotocol = subprotocol
        self.binary = subprotocol == MSGPACK
        self.extensions = subprotocol is not None

    def encode(self, event: Any) -> str | bytes:
        if self.binary:
            packed: bytes = msgpack.packb(msgspec.to_builtins(event), use_bin_type=True)
            return packed
        return msgspec.json.encode(event).decode()

    def decode(self, frame: str | bytes) -> dict[str, Any]:
        """The object in a frame. Raises MalformedFrame: wrong kind of frame, not decodable, not an object."""
        if isinstance(frame, bytes) is not self.binary:
            wanted = "a binary frame (msgpack)" if self.binary else "a text frame (JSON)"
            raise MalformedFrame(f"{wanted}, got the other kind", WRONG_FRAME_KIND)
        size = len(frame) if isinstance(frame, bytes) else len(frame.encode())
        if size > MAX_FRAME_BYTES:
            raise MalformedFrame(f"at most {MAX_FRAME_BYTES} bytes, got {size}", TOO_BIG)
        try:
            message = _unpack(frame) if isinstance(frame, bytes) else msgspec.json.decode(frame)
            _check_depth(message)
        except (ValueError, msgpack.StackError, msgspec.MsgspecError, RecursionError) as error:
            form = "msgpack" if self.binary else "JSON"
            raise MalformedFrame(f"one {form} object: {type(error).__name__}") from None
        if not isinstance(message, dict):
            raise MalformedFrame(f"an object, got {type(message).__name__}")
        return message


def _unpack(frame: bytes) -> Any:
    """One msgpack value. Extension types and binary are refused: no message of ours has them."""
    return msgpack.unpackb(
        frame,
        raw=False,
        strict_map_key=True,
        ext_hook=_refuse_extension,
        timestamp=0,
        max_ext_len=0,
        max_bin_len=0,
        max_str_len=len(frame),
        max_array_len=len(frame),
        max_map_len=len(frame),
    )


def _refuse_extension(code: int, data: bytes) -> Any:
    raise ValueError(f"expected no extension types, got {code}")


def _check_depth(message: Any) -> None:
    """Deep nesting overflows the stack of whatever walks it next; ours is five deep at most."""
    level = [message]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for value in level
            if isinstance(value, dict | list)
            for child in (value.values() if isinstance(value, dict) else value)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"expected at most {MAX_DEPTH} nested levels")


def choose_subprotocol(offered: list[str]) -> str | None:
    """The protocol we answer with: the client's first that we speak. A ticket is never the answer."""
    return next((name for name in offered if name in (JSON, MSGPACK)), None)
