"""The interchange format, line by line, and which turns are learned from."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from personalization.history import (
    EARLIEST,
    LATEST,
    MAX_LINE_BYTES,
    MAX_TEXT_CHARS,
    InvalidTurn,
    LineError,
    Turn,
    dump,
    effective,
    learned,
    parse,
)

NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)


def test_the_readme_shows_lines_that_can_be_read() -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_bytes()
    shown = readme.partition(b"```json\n")[2].partition(b"```")[0].splitlines()
    parsed = parse(shown)
    assert parsed.errors == []
    assert [turn.role for turn in parsed.turns["ada"]] == ["user", "assistant"]


def line(**fields: object) -> bytes:
    """A good line with some fields changed; a field set to `...` is left out."""
    whole = {
        "user": "ann",
        "conversation": "c",
        "at": "2026-05-01T12:00:00Z",
        "role": "user",
        "text": "hello",
    }
    return json.dumps({name: value for name, value in (whole | fields).items() if value is not ...}).encode()


def turn(name: str = "t", **fields: object) -> Turn:
    whole = {"conversation": "c", "at": NOON, "role": "user", "text": "hello", "author": "person"}
    return Turn(id=name, **(whole | fields))


names = st.text(
    st.characters(exclude_categories=("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs")),
    min_size=1,
    max_size=20,
)
turns = st.builds(
    Turn,
    id=names,
    conversation=names,
    at=st.datetimes(
        min_value=EARLIEST.replace(tzinfo=None), max_value=(LATEST - timedelta(days=1)).replace(tzinfo=None)
    ).map(lambda at: at.replace(tzinfo=UTC)),
    role=st.sampled_from(["user", "assistant"]),
    text=st.text(st.characters(exclude_categories=("Cs",)), max_size=60),
    author=st.sampled_from(["person", "model"]),
    rating=st.sampled_from(["up", "down", None]),
    version=st.none() | st.integers(0, 10_000),
    corrects=st.none() | names,
    removed=st.booleans(),
)


@given(user=names, said=st.lists(turns, max_size=8))
def test_what_is_dumped_is_parsed_as_the_same_turns_in_order_of_time(user: str, said: list[Turn]) -> None:
    parsed = parse(text.encode() for text in dump(user, said))
    assert parsed.errors == []
    assert parsed.turns.get(user, []) == sorted(said, key=lambda turn: turn.at)


@given(said=st.lists(turns, min_size=1, max_size=8))
def test_a_dump_of_imported_turns_needs_no_ids_and_gives_them_again(said: list[Turn]) -> None:
    plain = [{**json.loads(text), "id": None} for text in dump("ann", said)]
    imported = parse(json.dumps(each).encode() for each in plain).turns["ann"]
    again = list(dump("ann", imported))
    assert not any("id" in json.loads(text) for text in again)
    assert parse(text.encode() for text in again).turns["ann"] == imported


def test_the_same_file_gives_the_same_ids_and_equal_lines_different_ones() -> None:
    file = [line(text="yes"), line(text="yes"), line(text="no")]
    first, second = parse(file).turns["ann"], parse(file).turns["ann"]
    assert [turn.id for turn in first] == [turn.id for turn in second]
    assert len({turn.id for turn in first}) == 3


def test_two_people_who_say_the_same_have_different_ids() -> None:
    parsed = parse([line(user="ann"), line(user="bob")])
    assert parsed.turns["ann"][0].id != parsed.turns["bob"][0].id


def test_author_defaults_to_the_person_for_user_turns_and_to_the_model_for_replies() -> None:
    parsed = parse(
        [line(), line(role="assistant"), line(role="assistant", author="person"), line(author=None)]
    )
    assert [turn.author for turn in parsed.turns["ann"]] == ["person", "model", "person", "person"]


def test_turns_are_ordered_by_time_and_ties_by_place_in_the_file() -> None:
    parsed = parse(
        [
            line(text="b", at="2026-05-01T12:00:00"),
            line(text="c", at="2026-05-01T14:00:00+02:00"),
            line(text="a", at="2026-05-01T11:59:59.999999Z"),
        ]
    )
    assert [turn.text for turn in parsed.turns["ann"]] == ["a", "b", "c"]


def test_a_time_without_an_offset_is_utc_and_one_with_an_offset_becomes_utc() -> None:
    parsed = parse(
        [line(at="2026-05-01T12:00:00"), line(at="2026-05-01T14:00:00+02:00"), line(at="2026-05-01")]
    )
    assert [turn.at for turn in parsed.turns["ann"]] == [NOON - timedelta(hours=12), NOON, NOON]
    assert all(turn.at.tzinfo is UTC for turn in parsed.turns["ann"])


def test_unknown_fields_blank_lines_and_a_byte_order_mark_are_passed_over() -> None:
    parsed = parse(
        [b"\xef\xbb\xbf" + line(mood="fine", tags=[1, {}]), b"", b"  \r\n", line(text="again") + b"\r\n"]
    )
    assert parsed.errors == []
    assert [turn.text for turn in parsed.turns["ann"]] == ["hello", "again"]


BAD_LINES = {
    "not JSON": (b'{"user": "ann", ', "line: expected JSON"),
    "not an object": (b'["ann"]', "line: expected a JSON object"),
    "not UTF-8": (b'{"user": "\xff\xfe"}', "line: expected UTF-8"),
    "nested too deep": (b"[" * 100_000, "line: expected JSON"),
    "a number too long to read": (b'{"user": ' + b"9" * 5_000 + b"}", "line: expected JSON"),
    "too long a line": (b" " * MAX_LINE_BYTES + line(), "line: expected at most 1048576 bytes"),
    "no user": (line(user=...), "user: expected a value, got 'nothing'"),
    "no conversation": (line(conversation=...), "conversation: expected a value"),
    "no time": (line(at=...), "at: expected a value"),
    "no role": (line(role=...), "role: expected a value"),
    "no text": (line(text=...), "text: expected a value"),
    "user not a string": (line(user=7), "user: expected a string, got 7"),
    "user empty": (line(user=""), "user: expected 1 to 256 printable characters"),
    "user with a line end": (line(user="a\nb"), "user: expected 1 to 256 printable characters"),
    "conversation null": (line(conversation=None), "conversation: expected a string, got None"),
    "time a number": (line(at=1714564800), "at: expected an ISO-8601 date, got 1714564800"),
    "time not a date": (line(at="yesterday"), "at: expected an ISO-8601 date, got 'yesterday'"),
    "a day that is none": (line(at="2026-02-30T00:00:00"), "at: expected an ISO-8601 date"),
    "before the calendar": (line(at="0001-01-01T00:00:00+14:00"), "at: expected an ISO-8601 date"),
    "long ago": (line(at="1815-12-10"), "at: expected a date from 1970 to 2099"),
    "far ahead": (line(at="2100-01-01T00:00:00Z"), "at: expected a date from 1970 to 2099"),
    "unknown role": (line(role="system"), 'role: expected "user" or "assistant", got \'system\''),
    "role a list": (line(role=["user"]), 'role: expected "user" or "assistant"'),
    "text a number": (line(text=5), "text: expected a string, got 5"),
    "text too long": (line(text="x" * (MAX_TEXT_CHARS + 1)), "text: expected at most 65536 characters"),
    "half a surrogate pair": (line(text="\ud800"), "text: expected whole Unicode characters"),
    "half a pair in a name": (line(user="\ud800"), "user: expected 1 to 256 printable characters"),
    "unknown author": (line(author="robot"), 'author: expected "person" or "model", got \'robot\''),
    "unknown rating": (line(rating="meh"), 'rating: expected "up" or "down", got \'meh\''),
    "rating a number": (line(rating=1), "rating: expected"),
    "id too long": (line(id="x" * 257), "id: expected 1 to 256 printable characters"),
    "version negative": (line(version=-1), "version: expected an adapter version from 0"),
    "version true": (line(version=True), "version: expected an adapter version from 0"),
    "removed a string": (line(removed="no"), "removed: expected true or false, got 'no'"),
}


@pytest.mark.parametrize(("bad", "message"), BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_bad_line_is_reported_with_its_number_and_the_rest_is_imported(bad: bytes, message: str) -> None:
    parsed = parse([line(text="before"), b"", bad, line(text="after")])
    assert [turn.text for turn in parsed.turns["ann"]] == ["before", "after"]
    assert [error.number for error in parsed.errors] == [3]
    assert parsed.errors[0].message.startswith(message)
    assert len(parsed.errors[0].message) < 300


@given(st.binary(max_size=80))
def test_no_bytes_whatever_stop_an_import(noise: bytes) -> None:
    parsed = parse([noise, line()])
    assert [turn.text for turn in parsed.turns["ann"]] == ["hello"]


def test_a_turn_from_the_future_is_refused_when_the_present_is_given() -> None:
    parsed = parse([line(at="2027-01-01"), line()], not_after=NOON)
    assert parsed.errors == [
        LineError(1, "at: expected not after 2026-05-01T12:00:00+00:00, got '2027-01-01T00:00:00+00:00'")
    ]
    assert len(parsed.turns["ann"]) == 1


def test_a_turn_refuses_a_date_without_a_zone_and_turns_others_into_utc() -> None:
    with pytest.raises(InvalidTurn, match="a date with a time zone") as caught:
        turn(at=datetime(2026, 5, 1))
    assert caught.value.field == "at"
    moved = turn(at=NOON.astimezone(timezone(timedelta(hours=9))))
    assert moved == turn(at=NOON)
    assert moved.at.tzinfo is UTC


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (turn(), True),
        (turn(role="assistant", author="person"), True),
        (turn(role="assistant", author="model"), False),
        (turn(role="assistant", author="model", rating="up"), True),
        (turn(role="assistant", author="model", rating="down"), False),
        (turn(rating="down"), False),
        (turn(removed=True), False),
        (turn(role="assistant", author="model", rating="up", removed=True), False),
        (turn(text=" \n"), False),
    ],
)
def test_learned_are_a_persons_turns_and_replies_rated_up_and_nothing_else(
    said: Turn, expected: bool
) -> None:
    assert learned(said) is expected


def test_a_corrected_turn_gives_its_place_to_its_newest_correction() -> None:
    ask, reply, thanks = turn("ask"), turn("reply", role="assistant", author="model"), turn("thanks")
    first = turn("first", role="assistant", text="better", corrects="reply")
    second = turn("second", role="assistant", text="best", corrects="reply")
    assert effective([ask, reply, first, thanks, second]) == [ask, second, thanks]


def test_a_correction_of_a_correction_stands_in_the_place_of_both() -> None:
    reply = turn("reply", role="assistant", author="model")
    first = turn("first", role="assistant", corrects="reply")
    second = turn("second", role="assistant", corrects="first")
    assert effective([reply, first, second]) == [second]


def test_a_correction_without_its_original_stays_where_it_is() -> None:
    correction = turn("correction", role="assistant", corrects="long gone")
    assert effective([turn("ask"), correction]) == [turn("ask"), correction]


@given(st.lists(turns, max_size=6, unique_by=lambda turn: turn.id), st.data())
def test_effective_ends_and_changes_nothing_the_second_time(said: list[Turn], data: st.DataObject) -> None:
    ids = [turn.id for turn in said]
    linked = [replace(turn, corrects=data.draw(st.none() | st.sampled_from(ids))) for turn in said]
    once = effective(linked)
    assert len({turn.id for turn in once}) == len(once)
    assert effective(once) == once
