"""Turns → rows: split by time, windows of whole turns, the same rows for the same turns."""

import dataclasses
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from personalization.examples import cut_by_time, hold_out, serving_rows, training_rows
from personalization.history import Turn, learned, served_turns
from personalization.prompt import Example, Renderer
from tests.tiny_tokenizers import TEMPLATES, write_tokenizer

NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)


@pytest.fixture(scope="session")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    return Renderer(write_tokenizer(tmp_path_factory.mktemp("tokenizer"), TEMPLATES["demo"]), 2048)


def turn(place: int, role: str = "user", text: str | None = None, **fields: object) -> Turn:
    author = "person" if role == "user" else "model"
    whole = {"conversation": f"c{place // 6}", "author": author, "at": NOON + timedelta(minutes=place)}
    return Turn(id=f"t{place}", role=role, text=text or f"word {place} said", **(whole | fields))


def talk(turns: int) -> list[Turn]:
    return [turn(place, ("user", "assistant")[place % 2]) for place in range(turns)]


def shown(renderer: Renderer, rows: list[Example]) -> list[str]:
    return [renderer._tokenizer.decode(list(row.token_ids), skip_special_tokens=False) for row in rows]


def taught(renderer: Renderer, rows: list[Example]) -> str:
    """All learned tokens, in order."""
    ids = [token for row in rows for token, learn in zip(row.token_ids, row.learn_mask, strict=True) if learn]
    return renderer._tokenizer.decode(ids, skip_special_tokens=False)


def words(turns: list[Turn]) -> str:
    return "".join(f"{turn.text}<|end|>" for turn in turns)


def test_the_newest_learned_turns_are_the_gates_and_never_trained_on() -> None:
    turns = talk(40)
    held = hold_out(random.Random(3).sample(turns, len(turns)), 0.2)
    lessons = [turn.id for turn in turns if learned(turn)]
    assert (held.train, held.gate) == (tuple(lessons[:16]), tuple(lessons[16:]))
    assert held.said == turns
    assert turns[held.cut].id == lessons[16]
    nothing = hold_out(turns, 0.0)
    assert (nothing.train, nothing.gate, nothing.cut) == (tuple(lessons), (), 40)


def test_what_is_known_is_held_out_from_nobody_and_of_the_rest_at_most_half() -> None:
    turns = talk(40)
    lessons = [turn.id for turn in turns if learned(turn)]
    assert hold_out(turns, 0.2, lessons[:-6]).gate == tuple(lessons[-3:])
    assert hold_out(turns, 0.2, lessons[:-12]).gate == tuple(lessons[-4:])
    assert hold_out(turns, 0.2, lessons[-2:]).gate == tuple(lessons[-6:-2])  # known, though newer
    assert hold_out(turns, 0.2, lessons).gate == ()


def test_a_gate_turn_that_repeats_trained_words_is_not_judged() -> None:
    held = hold_out([*talk(20), turn(20, text="  WORD 4   said"), turn(22, text="something new")], 0.15)
    assert held.gate == ("t22",)
    assert "t20" not in held.train


def test_one_learned_turn_is_trained_on_and_two_are_shared() -> None:
    assert hold_out([], 0.1).gate == ()
    assert hold_out([turn(0)], 0.1).gate == ()
    both = hold_out([turn(0), turn(2)], 0.1)
    assert (both.train, both.gate) == (("t0",), ("t2",))


@pytest.mark.parametrize("wrong", [1.0, -0.1])
def test_a_fraction_that_cannot_be_is_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match=f"gate_fraction: expected 0 to below 1, got {wrong}"):
        hold_out(talk(4), wrong)


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), turns=st.integers(0, 60), window=st.integers(40, 200))
def test_every_learned_turn_is_taught_once_and_no_row_is_too_long(
    seed: int, turns: int, window: int, renderer: Renderer
) -> None:
    rng = random.Random(seed)
    history = [
        turn(place, rng.choice(["user", "assistant"]), f"{place} " + "more words " * rng.randrange(3))
        for place in range(turns)
    ]
    rows = training_rows(history, renderer, window)
    cleaned = [renderer._clean(turn.text) for turn in history if learned(turn)]
    assert taught(renderer, rows) == "".join(f"{text}<|end|>" for text in cleaned)
    for row in rows:
        assert len(row.token_ids) == len(row.learn_mask) <= window
        assert any(row.learn_mask)


def test_the_same_turns_in_any_order_give_the_same_rows(renderer: Renderer) -> None:
    turns = talk(50)
    shuffled = random.Random(3).sample(turns, len(turns))
    assert training_rows(shuffled, renderer, 64) == training_rows(turns, renderer, 64)


def test_a_shorter_window_makes_more_and_shorter_rows_of_the_same_words(renderer: Renderer) -> None:
    long, short = (training_rows(talk(60), renderer, tokens) for tokens in (400, 40))
    assert len(short) > 3 * len(long)
    assert max(len(row.token_ids) for row in short) <= 40
    assert taught(renderer, short) == taught(renderer, long)


def test_rows_are_filled_with_whole_turns_in_the_order_they_were_said(renderer: Renderer) -> None:
    rows = training_rows(talk(40), renderer, 100)
    texts = shown(renderer, rows)
    assert all(text.startswith("<s><|") and text.endswith("<|end|>") for text in texts)
    told = "".join(texts)
    places = [told.index(f"word {place} said") for place in range(0, 40, 2)]
    assert places == sorted(places)
    assert all(len(row.token_ids) > 60 for row in rows[:-1])


def test_a_turn_longer_than_the_window_is_cut_at_its_end(renderer: Renderer) -> None:
    rows = training_rows([turn(0), turn(2, text="long " * 100), turn(4)], renderer, 50)
    assert [len(row.token_ids) for row in rows][1] == 50
    assert len(rows) == 3
    assert shown(renderer, rows)[2].endswith("word 4 said<|end|>")


def test_no_row_is_longer_than_what_the_model_can_be_served(tmp_path: Path) -> None:
    narrow = Renderer(write_tokenizer(tmp_path, TEMPLATES["demo"]), 64)
    assert training_rows(talk(40), narrow, 1024) == training_rows(talk(40), narrow, 64)


def test_a_corrected_reply_is_taught_as_corrected(renderer: Renderer) -> None:
    wrong = turn(1, "assistant", "wrong", removed=True)
    right = turn(9, "assistant", "right", author="person", corrects="t1")
    rows = training_rows([turn(0), wrong, turn(2), right], renderer, 512)
    assert shown(renderer, rows) == [
        "<s><|user|>word 0 said<|end|><|assistant|>right<|end|><|user|>word 2 said<|end|>"
    ]


def test_what_comes_after_the_last_learned_turn_of_a_row_is_left_out(renderer: Renderer) -> None:
    rows = training_rows([turn(0), *(turn(place, "assistant") for place in range(1, 9))], renderer, 512)
    assert shown(renderer, rows) == ["<s><|user|>word 0 said<|end|>"]


def test_rows_with_nothing_to_learn_are_left_out(renderer: Renderer) -> None:
    assert training_rows([turn(place, "assistant") for place in range(20)], renderer, 512) == []
    assert training_rows([], renderer, 512) == []


def test_time_cuts_a_history_into_seven_one_and_two_tenths_of_what_is_learned() -> None:
    turns = talk(101)
    parts = cut_by_time(list(reversed(turns)))
    assert [*parts.history, *parts.gate, *parts.test] == turns
    assert [sum(map(learned, part)) for part in (parts.history, parts.gate, parts.test)] == [36, 5, 10]
    assert all(learned(part[0]) for part in (parts.gate, parts.test))
    few = cut_by_time(talk(3))
    assert (len(few.history), few.gate, few.test) == (3, [], [])


@pytest.mark.parametrize("context", [64, 160, 4096])
def test_a_held_out_turn_stands_behind_the_very_prompt_that_serving_would_give(
    tmp_path: pytest.TempPathFactory, context: int
) -> None:
    renderer = Renderer(write_tokenizer(tmp_path, TEMPLATES["demo"]), context)
    turns = [turn(place, ("user", "assistant")[place % 2], author="person") for place in range(60)]
    before, judged = turns[:40], turns[40:]
    rows = serving_rows(before, judged, renderer, reply_tokens=16)
    assert taught(renderer, rows) == words(judged)
    for reply in judged[1::2]:
        place = turns.index(reply)
        prompt = renderer.prompt(turns[: place - 6], turns[place - 6 : place], max_new_tokens=16)
        expected = (*prompt.token_ids, *renderer._encode(reply.text))
        assert any(row.token_ids[: len(expected)] == expected for row in rows), reply.id
    assert len(rows) == 1 if context == 4096 else len(rows) > 1


def test_replies_that_were_asked_for_again_are_nowhere_as_serving_does_not_show_them(
    renderer: Renderer,
) -> None:
    again = [
        turn(1, "assistant", version=1),
        turn(2, "assistant", version=1),
        turn(3, "assistant", version=2),
    ]
    history = [turn(0), *again, turn(4)]
    served = renderer.prompt([], served_turns(history), max_new_tokens=16)
    (judged,) = serving_rows(history[:4], history[4:], renderer)
    (trained,) = training_rows(history, renderer, 512)
    assert judged.token_ids == trained.token_ids == served.token_ids[: len(judged.token_ids)]
    assert hold_out(history, 0.5).said == [turn(0), again[2], turn(4)]
    liked = [turn(0), turn(1, "assistant", version=1, rating="up"), *again[1:], turn(4)]
    assert taught(renderer, training_rows(liked, renderer, 512)) == words([turn(0), liked[1], turn(4)])


def test_a_reply_is_nowhere_though_the_one_asked_for_in_its_place_was_put_right(renderer: Renderer) -> None:
    first, again = (turn(place, "assistant", version=1) for place in (1, 2))
    right = turn(9, "assistant", "right", author="person", corrects="t2", at=again.at)
    history = [turn(0), first, dataclasses.replace(again, removed=True), right, turn(4)]
    served = renderer.prompt([], served_turns(history), max_new_tokens=16)
    (trained,) = training_rows(history, renderer, 512)
    (judged,) = serving_rows(history[:4], history[4:], renderer)
    assert judged.token_ids == trained.token_ids == served.token_ids[: len(judged.token_ids)]
    assert hold_out(history, 0.5).said == [turn(0), right, turn(4)]


def test_held_out_rows_are_cut_at_the_context_and_hold_only_what_was_asked_for(renderer: Renderer) -> None:
    long = turn(0, text="word " * 3000)
    (row,) = serving_rows([], [long, turn(1), turn(2)], renderer, learn=lambda each: each.id == "t0")
    assert len(row.token_ids) == renderer.context_length
    assert serving_rows([turn(0)], [turn(1, "assistant")], renderer) == []
