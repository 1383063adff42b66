"""Frames and messages: what is understood, what is refused, and how."""

import contextlib

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import BadRequest
from service.events import (
    Completed,
    Created,
    Response,
    TextDelta,
    error_event,
    json_bytes,
    pushed_event,
    read_reply_event,
)
from service.protocol import (
    JSON,
    MAX_FRAME_BYTES,
    MSGPACK,
    Codec,
    CreateResponse,
    FeedbackCreate,
    MalformedFrame,
    ResponseCreate,
    ResponseResume,
    UnreadableEvent,
    choose_subprotocol,
    conversation_of,
    parse_model,
    read_body,
    read_event,
    text_of,
)

DELTA = TextDelta(response_id="resp_1", sequence_number=4, item_id="msg_1", delta="héllo")


def test_a_delta_is_openais_delta_with_our_number() -> None:
    assert Codec(JSON).encode(DELTA) == (
        '{"type":"response.output_text.delta","response_id":"resp_1","sequence_number":4,"item_id":"msg_1",'
        '"delta":"héllo","output_index":0,"content_index":0,"logprobs":[]}'
    )


def test_msgpack_carries_the_same_fields_as_json() -> None:
    packed = Codec(MSGPACK).encode(DELTA)
    assert isinstance(packed, bytes)
    assert Codec(MSGPACK).decode(packed) == Codec(JSON).decode(Codec(JSON).encode(DELTA))


def test_a_stored_event_comes_back_as_it_was() -> None:
    response = Response(id="resp_1", created_at=1.5, status="completed", model="me", metadata={"seed": "7"})
    for event in (DELTA, Created(response=response), Completed(response=response)):
        assert read_reply_event(json_bytes(event)) == event


def test_a_create_message_is_read_with_its_defaults() -> None:
    event = read_event({"type": "response.create", "input": "hi", "event_id": "e1", "surprise": [1]})
    assert isinstance(event, ResponseCreate)
    assert (event.model, event.input, event.event_id, event.seed) == ("me", "hi", "e1", None)


def test_a_resume_without_a_number_begins_at_the_beginning() -> None:
    event = read_event({"type": "response.resume", "response_id": "resp_1"})
    assert event == ResponseResume(response_id="resp_1", starting_after=-1)


def test_an_unknown_type_is_an_error_that_names_the_message() -> None:
    with pytest.raises(UnreadableEvent) as caught:
        read_event({"type": "response.dance", "event_id": "e9"})
    assert (caught.value.code, caught.value.event_id, caught.value.param) == ("unknown_event", "e9", "type")


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"type": "response.create", "seed": "x"}, "seed"),
        ({"type": "response.create", "metadata": {"a": 1}}, "metadata[...]"),
        ({"type": "response.resume"}, "response_id"),
        ({"type": "feedback.create", "item_id": "t", "rating": "great"}, "rating"),
    ],
)
def test_a_field_of_the_wrong_kind_is_named(message: dict[str, object], param: str) -> None:
    with pytest.raises(UnreadableEvent) as caught:
        read_event(message)
    assert caught.value.param == param


def test_a_value_that_is_none_of_a_few_is_told_which_they_are() -> None:
    with pytest.raises(UnreadableEvent) as caught:
        read_event({"type": "feedback.create", "item_id": "t", "rating": "great"})
    assert str(caught.value) == """rating: expected "up" or "down" or null, got 'great'"""


def test_a_rating_of_null_is_not_the_same_as_no_rating() -> None:
    taken_back = read_event({"type": "feedback.create", "item_id": "t", "rating": None})
    left_out = read_event({"type": "feedback.create", "item_id": "t"})
    assert isinstance(taken_back, FeedbackCreate)
    assert isinstance(left_out, FeedbackCreate)
    assert taken_back.rating is None
    assert left_out.rating is not None


@pytest.mark.parametrize(
    ("name", "base", "version"),
    [
        ("base", True, None),
        ("me", False, None),
        ("me@3", False, 3),
        ("me@v12", False, 12),
        ("me@0", False, 0),
    ],
)
def test_three_forms_name_a_model(name: str, base: bool, version: int | None) -> None:
    assert parse_model(name) == (base, version)


@pytest.mark.parametrize(
    "name", ["", "me@", "me@-1", "me@1.5", "ME", "you", "you@1", "me@٣", "me\n", "base@1", "../x"]
)
def test_nothing_else_names_a_model(name: str) -> None:
    assert parse_model(name) is None


@pytest.mark.parametrize("frame", ["", "{", "[1]", "null", '{"a":1}x', '{"type":NaN}', "[" * 100_000])
def test_text_that_is_no_object_is_malformed(frame: str) -> None:
    with pytest.raises(MalformedFrame) as caught:
        Codec(JSON).decode(frame)
    assert caught.value.close_code == 4400


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xc1",
        msgpack.packb([1]),
        msgpack.packb({"a": 1}) + b"\x00",
        b"\xdd\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\x91" * 100_000 + b"\xc0",
        msgpack.packb({"a": msgpack.ExtType(5, b"x")}),
        msgpack.packb({"a": msgpack.Timestamp(1)}),
        msgpack.packb({1: 2}),
        msgpack.packb({"a": b"\xff"}),
        b"\x81\xa1\xff\xc0",
        msgpack.packb({"a": [[[[[[]]]]]]}, use_bin_type=True)[:-1],
    ],
)
def test_hostile_msgpack_is_malformed_and_nothing_else(frame: bytes) -> None:
    with pytest.raises(MalformedFrame) as caught:
        Codec(MSGPACK).decode(frame)
    assert caught.value.close_code == 4400


def test_nesting_beyond_any_message_of_ours_is_malformed_in_both_forms() -> None:
    deep: object = {}
    for _ in range(40):
        deep = {"a": deep}
    with pytest.raises(MalformedFrame):
        Codec(MSGPACK).decode(msgpack.packb(deep))
    with pytest.raises(MalformedFrame):
        Codec(JSON).decode(json_bytes(deep).decode())


def test_the_wrong_kind_of_frame_has_its_own_code() -> None:
    for codec, frame in ((Codec(JSON), b"{}"), (Codec(MSGPACK), "{}")):
        with pytest.raises(MalformedFrame) as caught:
            codec.decode(frame)
        assert caught.value.close_code == 1003


def test_a_frame_beyond_the_limit_is_too_big() -> None:
    with pytest.raises(MalformedFrame) as caught:
        Codec(JSON).decode('{"a":"' + "é" * (MAX_FRAME_BYTES // 2) + '"}')
    assert caught.value.close_code == 1009


@given(st.binary(max_size=200))
def test_random_bytes_are_an_object_or_malformed(frame: bytes) -> None:
    with contextlib.suppress(MalformedFrame):
        assert isinstance(Codec(MSGPACK).decode(frame), dict)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text("a/é\n", max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("a/é\n", max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
_types = st.sampled_from(["response.create", "response.resume", "feedback.create", "ping", "?"])


@given(_types, st.dictionaries(st.sampled_from(["input", "seed", "event_id", "model", "item_id"]), _json))
def test_any_object_is_an_event_or_a_named_error(kind: str, fields: dict[str, object]) -> None:
    with contextlib.suppress(UnreadableEvent):
        assert read_event({**fields, "type": kind}).__struct_config__.tag == kind


def test_a_body_that_is_not_json_or_has_a_wrong_field_is_a_bad_request() -> None:
    with pytest.raises(BadRequest, match="JSON") as caught:
        read_body(b"{", CreateResponse)
    assert caught.value.code == "invalid_json"
    with pytest.raises(BadRequest) as caught:
        read_body(b'{"temperature": "hot"}', CreateResponse)
    assert caught.value.param == "temperature"


def test_content_is_text_or_text_parts() -> None:
    assert text_of("hi", "c") == "hi"
    assert text_of([{"type": "input_text", "text": "a"}, {"type": "text", "text": "b"}], "c") == "ab"
    for content in (3, None, [3], [{"type": "input_image", "image_url": "x"}], [{"type": "text"}]):
        with pytest.raises(BadRequest) as caught:
            text_of(content, "c")
        assert caught.value.param == "c"


def test_a_conversation_has_a_plain_name() -> None:
    assert conversation_of("Büro / 3") == "Büro / 3"
    for name in ("", " ", "x" * 257, "a\n"):
        with pytest.raises(BadRequest):
            conversation_of(name)


def test_a_ticket_is_never_the_answer_to_a_handshake() -> None:
    assert choose_subprotocol(["ticket.abc", MSGPACK, JSON]) == MSGPACK
    assert choose_subprotocol(["ticket.abc"]) is None
    assert choose_subprotocol([]) is None


def test_an_error_event_says_it_in_both_vocabularies() -> None:
    event = error_event(BadRequest("no", param="seed"), event_id="e1")
    assert (event.code, event.status, event.error.code, event.error.param) == (
        "invalid_request",
        400,
        "invalid_request",
        "seed",
    )
    assert b"stream_id" not in json_bytes(event)


def test_announcements_reach_a_person_without_their_name_or_id() -> None:
    assert pushed_event({"type": "adapter.updated", "user": "ann", "adapter": "ff", "from": 1, "to": 2}) == {
        "type": "adapter.updated",
        "from": 1,
        "to": 2,
    }
    training = {"type": "adapter.refresh", "user": "ann", "job_id": "j", "state": "training", "progress": 0.5}
    assert pushed_event(training) == {
        "type": "adapter.refresh.progress",
        "job_id": "j",
        "state": "training",
        "progress": 0.5,
    }
    assert pushed_event({"type": "store.reconnected"}) is None
