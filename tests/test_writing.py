"""A reply's events from its tokens: whole characters, stop strings, and the same text wherever a log broke
off."""

from collections.abc import Iterator, Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.request import FinishedEvent, Usage
from personalization.prompt import Renderer
from service.events import Completed, Failed, Incomplete, TextDelta, TextDone
from service.reply import Entry, Plan, Reply, read_entry
from service.writing import Ending, Writing
from tests.tiny_service import TinyModel

pytest_plugins = ("tests.service_fixtures",)


@pytest.fixture(scope="module")
def renderer(tiny_model: TinyModel) -> Renderer:
    return tiny_model.renderer()


def plan(stop: tuple[str, ...] = ()) -> Plan:
    return Plan(
        id="resp_1",
        user="ann",
        epoch=0,
        model="me",
        version=3,
        conversation="c",
        item_id="msg_1",
        user_turn_id="turn_1",
        created_at=1.0,
        prompt=(1, 2),
        history_turns=4,
        truncated=False,
        seed=7,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        min_p=0.0,
        max_tokens=100,
        stop=stop,
        stop_token_ids=(),
        save=True,
        saved=True,
        metadata={"mine": "yes", "seed": "forged"},
    )


def tokens(renderer: Renderer, text: str) -> tuple[int, ...]:
    return tuple(renderer._encode(text))


def heard(reply: Reply, renderer: Renderer, pieces: Sequence[Sequence[int]]) -> Writing:
    """A writing that hears the pieces one by one, with everything it says in the reply's log."""
    writing = Writing(reply, renderer.stream_decoder())
    if not reply.entries:
        reply.feed(reply.number(writing.opening(), ()))
    for piece in pieces:
        writing.hear(piece)
        log(reply, writing)
    return writing


def log(reply: Reply, writing: Writing) -> None:
    events, carried = writing.take()
    if events:
        reply.feed(reply.number(events, carried))


def test_deltas_are_whole_characters_and_carry_every_token(renderer: Renderer) -> None:
    reply = Reply(plan())
    ids = tokens(renderer, "año 🙂!")
    heard(reply, renderer, [[token] for token in ids])
    deltas = [entry.event.delta for entry in reply.entries if isinstance(entry.event, TextDelta)]
    assert "".join(deltas) == "año 🙂!"
    assert "🙂" in deltas
    assert reply.tokens == ids


def test_an_entry_is_stored_and_read_back(renderer: Renderer) -> None:
    reply = Reply(plan())
    heard(reply, renderer, [tokens(renderer, "hello")])
    assert [read_entry(entry.stored()) for entry in reply.entries] == reply.entries


_pieces = st.lists(st.sampled_from(["a", "b", "ab", "é", "🙂", " ", "STOP", "ST"]), max_size=12)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(_pieces, st.integers(0, 60), st.booleans())
def test_a_log_that_broke_off_anywhere_goes_on_to_the_same_text(
    renderer: Renderer, pieces: list[str], cut: int, stop: bool
) -> None:
    stops = ("STOP", "bb") if stop else ()
    ids = tokens(renderer, "".join(pieces))
    whole = Reply(plan(stops))
    writing = heard(whole, renderer, [[token] for token in ids])
    writing.finish()
    log(whole, writing)

    first = Reply(plan(stops))
    heard(first, renderer, [[token] for token in ids[:cut]])
    stored = [read_entry(entry.stored()) for entry in first.entries]
    second = Reply(plan(stops), stored)
    logged = len(second.tokens)
    rest = heard(second, renderer, [ids[logged:]] if ids[logged:] else [])
    rest.finish()
    log(second, rest)
    assert second.text == whole.text
    assert rest.text == writing.text
    assert rest.stopped is writing.stopped


@pytest.mark.parametrize(("said", "stop"), [("one ST", ("STOP",)), ("one 🙂", ())])
def test_a_log_that_broke_off_before_its_closing_events_says_nothing_twice(
    renderer: Renderer, said: str, stop: tuple[str, ...]
) -> None:
    first = Reply(plan(stop))
    ids = tokens(renderer, said)[: None if stop else -1]  # without a stop: half a character at the end
    writing = heard(first, renderer, [ids])
    writing.finish()
    log(first, writing)
    rest = heard(Reply(plan(stop), first.entries), renderer, [])
    rest.finish()
    assert rest.take() == ([], ())
    assert rest.text == writing.text


def test_ours_wins_over_the_clients_metadata(renderer: Renderer) -> None:
    response = Writing(Reply(plan()), renderer.stream_decoder()).picture("in_progress")
    assert response.metadata["mine"] == "yes"
    assert response.metadata["seed"] == "7"
    assert (response.metadata["adapter_version"], response.metadata["user_turn_id"]) == ("3", "turn_1")


def test_another_version_is_remembered_by_whoever_takes_over(renderer: Renderer) -> None:
    reply = Reply(plan())
    writing = heard(reply, renderer, [])
    reply.feed(reply.number(writing.served_by(2, "version 3 could not be loaded"), ()))
    taken_over = Writing(Reply(plan(), reply.entries), renderer.stream_decoder())
    assert taken_over.version == 2
    assert taken_over.notices == ["version 3 could not be loaded"]


def endings() -> Iterator[tuple[FinishedEvent, bool, str, type, str, str | None]]:
    usage = Usage(2, 0, 3)

    def event(reason: str, code: str | None = None) -> FinishedEvent:
        return FinishedEvent("r", reason, usage, error_code=code, message=code)  # type: ignore[arg-type]

    yield event("stop"), False, "cancelled", Completed, "completed", None
    yield event("cancelled"), True, "cancelled", Completed, "completed", None
    yield event("length"), False, "cancelled", Incomplete, "incomplete", "max_output_tokens"
    yield event("cancelled"), False, "cancelled", Incomplete, "cancelled", "cancelled"
    yield event("cancelled"), False, "disconnected", Incomplete, "incomplete", "disconnected"
    yield event("error", "oom"), False, "cancelled", Failed, "failed", None


@pytest.mark.parametrize(("finished", "stopped", "cancel", "kind", "status", "reason"), list(endings()))
def test_each_way_to_end_has_its_event_and_status(
    renderer: Renderer,
    finished: FinishedEvent,
    stopped: bool,
    cancel: str,
    kind: type,
    status: str,
    reason: str | None,
) -> None:
    reply = Reply(plan())
    writing = heard(reply, renderer, [tokens(renderer, "hi")])
    ending = Ending.of(finished, stopped=stopped, cancel_reason=cancel)
    events = writing.closing(ending, finished.usage, {"queue_s": "0.1"}, 9.0)
    last = events[-1]
    assert isinstance(last, kind)
    assert isinstance(last, Completed | Incomplete | Failed)
    assert isinstance(events[0], TextDone)
    assert events[0].text == "hi"
    assert last.response.status == status
    details = last.response.incomplete_details
    assert (None if details is None else details.reason) == reason
    assert last.response.output[0].content[0].text == "hi"
    assert last.response.metadata["queue_s"] == "0.1"
    assert (last.response.error is not None) is (status == "failed")
    assert (last.response.completed_at == 9.0) is (status == "completed")


def test_numbers_count_on_from_the_log(renderer: Renderer) -> None:
    reply = Reply(plan(), [Entry(TextDelta(item_id="m", delta="a", sequence_number=0))])
    (entry,) = reply.number([TextDelta(item_id="m", delta="b")], (5,))
    assert (entry.event.sequence_number, entry.event.response_id, entry.tokens) == (1, "resp_1", (5,))
