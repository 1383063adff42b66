"""The messages between gateway and engine, and their frames. Pure: bytes in, messages out.

A frame is a 4-byte big-endian length and that many bytes of msgpack. Every message is validated against
its type on arrival. A stream is a number the client gives to each request of a connection; a call is a
number it gives to each question that has one answer.
"""

from collections.abc import Iterator
from typing import Any

import msgspec

from engine.request import AdapterRef, FinishReason, Request, Timings, Usage

PROTOCOL = 1
_HEADER = 4


class FrameError(ValueError):
    """Bytes that are no message of this protocol. The connection they came from is closed."""

    code = "malformed_frame"


class FrameTooLarge(FrameError):
    code = "frame_too_large"

    def __init__(self, size: int, limit: int) -> None:
        super().__init__(f"frame: expected at most {limit} bytes, got {size}")
        self.size = size
        self.limit = limit


class EngineInfo(msgspec.Struct, frozen=True):
    """What a gateway must know of the engine it talks to."""

    model_name: str
    base_hash: str
    context_length: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    pid: int


# From the gateway


class Hello(msgspec.Struct, frozen=True, tag="hello", forbid_unknown_fields=True):
    """First message of a connection. `client` is the same on every connection of one gateway."""

    protocol: int
    client: str


class Submit(msgspec.Struct, frozen=True, tag="submit", forbid_unknown_fields=True):
    stream: int
    request: Request


class Cancel(msgspec.Struct, frozen=True, tag="cancel", forbid_unknown_fields=True):
    stream: int


class Prefetch(msgspec.Struct, frozen=True, tag="prefetch", forbid_unknown_fields=True):
    adapter: AdapterRef


class Forget(msgspec.Struct, frozen=True, tag="forget", forbid_unknown_fields=True):
    call: int
    adapter_id: str


class GetStats(msgspec.Struct, frozen=True, tag="stats", forbid_unknown_fields=True):
    call: int


class CheckIntegrity(msgspec.Struct, frozen=True, tag="check", forbid_unknown_fields=True):
    call: int


FromGateway = Hello | Submit | Cancel | Prefetch | Forget | GetStats | CheckIntegrity


# From the engine


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    protocol: int
    info: EngineInfo


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The connection ends here, and why."""

    code: str
    message: str


class Tokens(msgspec.Struct, frozen=True, array_like=True, tag="t"):
    stream: int
    first_index: int
    token_ids: tuple[int, ...]


class Finished(msgspec.Struct, frozen=True, array_like=True, tag="f"):
    stream: int
    reason: FinishReason
    usage: Usage
    timings: Timings
    error_code: str | None
    message: str | None


class Events(msgspec.Struct, frozen=True, tag="events"):
    """Everything that one step brought to one connection."""

    items: list[Tokens | Finished]


class Answer(msgspec.Struct, frozen=True, tag="answer"):
    call: int
    value: dict[str, Any]


class Failure(msgspec.Struct, frozen=True, tag="failure"):
    call: int
    code: str
    message: str


FromEngine = Welcome | Refused | Events | Answer | Failure

# What msgspec raises for bytes that it cannot read; the last for what is nested too deep.
_NOT_READ = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

_encoder = msgspec.msgpack.Encoder()
_from_gateway = msgspec.msgpack.Decoder(FromGateway)
_from_engine = msgspec.msgpack.Decoder(FromEngine)


def encode(message: FromGateway | FromEngine) -> bytes:
    """The message as one frame."""
    body = _encoder.encode(message)
    return len(body).to_bytes(_HEADER, "big") + body


def decode_from_gateway(body: bytes) -> FromGateway:
    """Raises FrameError, which names the field that is wrong."""
    try:
        message: FromGateway = _from_gateway.decode(body)
    except _NOT_READ as error:
        raise FrameError(f"message: {error}") from error
    return message


def decode_from_engine(body: bytes) -> FromEngine:
    try:
        message: FromEngine = _from_engine.decode(body)
    except _NOT_READ as error:
        raise FrameError(f"message: {error}") from error
    return message


class FrameReader:
    """Cuts a stream of bytes into the bodies of its frames, holding no more than one unfinished frame."""

    def __init__(self, max_frame_bytes: int) -> None:
        self._limit = max_frame_bytes
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The bodies completed by these bytes. Raises FrameTooLarge as soon as a header
        announces too much.
        """
        self._buffer += data
        while len(self._buffer) >= _HEADER:
            size = int.from_bytes(self._buffer[:_HEADER], "big")
            if size > self._limit:
                raise FrameTooLarge(size, self._limit)
            if len(self._buffer) < _HEADER + size:
                return
            body = bytes(self._buffer[_HEADER : _HEADER + size])
            del self._buffer[: _HEADER + size]
            yield body
