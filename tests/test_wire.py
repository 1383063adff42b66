"""Frames and messages as bytes: what is encoded comes back, what is no message is refused."""

from contextlib import suppress
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import wire
from engine.request import AdapterRef, Request, SamplingParams, Timings, Usage

INFO = wire.EngineInfo("demo", "abc", 2048, 8192, (0, 2), 17)
REQUEST = Request(
    id="resp_1",
    prompt=(1, 2, 3),
    sampling=SamplingParams(temperature=0, top_k=5, seed=-(2**63), max_tokens=9, stop_token_ids=(7,)),
    adapter=AdapterRef("ada0", 3),
    user_key="ada0",
    priority=-1,
    generated=(4, 5),
)
FROM_GATEWAY: list[wire.FromGateway] = [
    wire.Hello(1, "gateway-1"),
    wire.Submit(1, REQUEST),
    wire.Submit(2, Request("r", (1,))),
    wire.Cancel(1),
    wire.Prefetch(AdapterRef("ada0", 1)),
    wire.Forget(1, "ada0"),
    wire.GetStats(2),
    wire.CheckIntegrity(3),
]
FROM_ENGINE: list[wire.FromEngine] = [
    wire.Welcome(1, INFO),
    wire.Refused("malformed_frame", "why"),
    wire.Events(
        [
            wire.Tokens(1, 0, (5, 6)),
            wire.Finished(2, "error", Usage(3, 0, 0), Timings(0.5, 0.25, "disk", None), "code", "message"),
        ]
    ),
    wire.Answer(1, {"pages": {"free": 3}}),
    wire.Failure(2, "broken_books", "why"),
]


def name_of(message: object) -> str:
    return type(message).__name__


def body_of(message: Any) -> bytes:
    (body,) = wire.FrameReader(1 << 20).feed(wire.encode(message))
    return body


@pytest.mark.parametrize("message", FROM_GATEWAY, ids=name_of)
def test_a_gateways_message_comes_back_as_it_was(message: wire.FromGateway) -> None:
    assert wire.decode_from_gateway(body_of(message)) == message


@pytest.mark.parametrize("message", FROM_ENGINE, ids=name_of)
def test_an_engines_message_comes_back_as_it_was(message: wire.FromEngine) -> None:
    assert wire.decode_from_engine(body_of(message)) == message


@given(st.data())
def test_frames_arrive_whole_however_the_bytes_are_cut(data: st.DataObject) -> None:
    stream = b"".join(map(wire.encode, FROM_GATEWAY))
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=12).map(sorted))
    reader = wire.FrameReader(1 << 20)
    bodies: list[bytes] = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        bodies += reader.feed(stream[start:end])
    assert [wire.decode_from_gateway(body) for body in bodies] == FROM_GATEWAY


def test_a_frame_over_the_limit_is_refused_at_its_header() -> None:
    reader = wire.FrameReader(100)
    assert list(reader.feed((100).to_bytes(4, "big") + b"x" * 100)) == [b"x" * 100]
    with pytest.raises(wire.FrameTooLarge, match="expected at most 100 bytes, got 101"):
        list(reader.feed((101).to_bytes(4, "big")))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "truncated"),
        (b"\xc1", "malformed"),
        (msgspec.msgpack.encode([1, 2]), "Expected `object`"),
        (msgspec.msgpack.encode({"type": "sudo"}), "Invalid value 'sudo'"),
        (msgspec.msgpack.encode({"type": "cancel"}), "missing required field `stream`"),
        (msgspec.msgpack.encode({"type": "cancel", "stream": "1"}), "Expected `int`, got `str`"),
        (msgspec.msgpack.encode({"type": "cancel", "stream": 1, "force": True}), "unknown field `force`"),
        (
            msgspec.msgpack.encode({"type": "prefetch", "adapter": {"id": "a", "version": 0}}),
            "integer from 1",
        ),
        (
            msgspec.msgpack.encode({"type": "submit", "stream": 1, "request": {"id": "a", "prompt": []}}),
            "prompt: expected at least one token",
        ),
        (
            msgspec.msgpack.encode(
                {
                    "type": "submit",
                    "stream": 1,
                    "request": {"id": "a", "prompt": [1], "sampling": {"temperature": float("nan")}},
                }
            ),
            "temperature: expected 0 to 100",
        ),
        (b"\x81\xa4type\xa2\xff\xfe", "message:"),
    ],
)
def test_what_is_no_message_is_refused_with_the_reason(body: bytes, reason: str) -> None:
    with pytest.raises(wire.FrameError, match=reason):
        wire.decode_from_gateway(body)


@given(st.binary(max_size=60))
def test_no_bytes_can_do_worse_than_be_refused(body: bytes) -> None:
    with suppress(wire.FrameError):
        wire.decode_from_gateway(body)
