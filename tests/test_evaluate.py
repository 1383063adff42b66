"""Evaluation on invented people: it shows learning where there is some, and none where there is none."""

import dataclasses
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from engine.weights import load_model
from personalization.evaluate import (
    Bench,
    Evaluation,
    Extent,
    NothingToMeasure,
    _first_is_lowest,
    _rows,
    _selection,
    _stranger,
    evaluate,
    interval,
    subject_of,
)
from personalization.gate import GatePolicy
from personalization.history import Turn, dump, parse
from personalization.prompt import Example, Renderer
from personalization.refresh import RefreshPolicy
from personalization.train import Recipe
from service.evaluation import _scale, page, served, table
from tests.small_model import save_small_model, talk
from tests.test_cli import attune

POLICY = RefreshPolicy(
    minimum_turns=20,
    gate_tokens=96,
    row_tokens=32,
    recipe=Recipe(rank=4, alpha=8, learning_rate=5e-3, epochs=2, tokens_per_step=32),
    gate=GatePolicy(max_drift=100.0),  # a model this small is moved by anything
)
EXTENT = Extent(selection_turns=2, curve=(20, 40, 400), refreshes=2, stacks=(1, 4), solo=2)
PEOPLE = ("ann", "bob", "cleo", "dan")


def histories() -> dict[str, list[Turn]]:
    return {user: talk(user, 80) for user in PEOPLE} | {"few": talk("few", 12)}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = save_small_model(tmp_path_factory.mktemp("small"))
    return Bench(load_model(folder), Renderer(folder, 256), POLICY)


@pytest.fixture(scope="module")
def done(bench: Bench) -> Evaluation:
    return evaluate(histories(), bench, EXTENT)


def test_who_says_much_the_same_is_learned_and_a_strangers_adapter_does_not_help(done: Evaluation) -> None:
    numbers = done.numbers
    assert (numbers["people"], numbers["left_out"]) == (4, 1)
    loss = numbers["loss"]
    assert loss["context"]["gain"] == 0
    assert loss["adapter + context"]["gain_interval"][0] > 0.1
    assert loss["adapter"]["loss"] < loss["base"]["loss"] - 0.1
    assert loss["swapped adapter + context"]["gain"] < loss["adapter + context"]["gain"] - 0.1
    assert loss["adapter + context, gated, as judged"]["loss"] == loss["adapter + context"]["loss"]
    assert loss["adapter + context, after the gate"]["loss"] < loss["adapter + context"]["loss"] - 0.01
    assert numbers["harm"]["everyone"]["after"]["worse"] == 0
    assert numbers["harm"]["everyone"]["people"] == {"count": 4, "accepted": 4}
    assert numbers["authors"]["hits_at_1"] == 1.0
    assert numbers["authors"]["chance"] == 0.25


def test_every_part_is_measured_as_far_as_the_histories_go(done: Evaluation) -> None:
    numbers = done.numbers
    assert [row["turns"] for row in numbers["curve"]] == [20, 40]
    assert numbers["curve"][1]["gain"] > 0
    assert numbers["in_a_row"]["accepted"] > 0
    assert numbers["in_a_row"]["in a row"]["gain"] > 0.1
    assert [row["people"] for row in numbers["stacked"]["sizes"]] == [1, 4]
    assert numbers["selection"]["asked"] == 8
    from_population = numbers["from_population"]
    assert from_population["own"]["gain_interval"][0] > 0.1
    assert from_population["swapped"]["gain"] < from_population["own"]["gain"] - 0.1
    loss = numbers["loss"]
    both = from_population["over context"]["gain"]
    assert both > loss["population adapter + context"]["gain"] + 0.1
    assert from_population["over context, after the gate"]["gain"] > both + 0.01  # what judged is learned too
    assert from_population["harm"]["everyone"]["people"] == {"count": 4, "accepted": 4}
    assert from_population["harm"]["everyone"]["before"]["gain"] == both
    assert from_population["drift"]["most_published"] <= POLICY.gate.max_drift
    json.dumps(numbers)


def test_an_engine_serves_what_was_measured(bench: Bench, done: Evaluation) -> None:
    assert [question.adapter is not None for question in done.questions] == [True] * 4
    assert served(bench.model, done.questions) == {"asked": 4, "with_adapter": 4, "same_first_token": 1.0}
    mixed = [*done.questions, dataclasses.replace(done.questions[0], adapter=None, token=-1)]
    assert served(bench.model, mixed)["same_first_token"] == 0.8


def test_people_who_turn_to_something_else_are_made_worse_and_the_gate_keeps_that_away(bench: Bench) -> None:
    """What was learned up to the gate is of words that are never said again."""
    chooser = random.Random(5)

    def said(turn: Turn, number: int) -> Turn:
        known = range(10) if number < 56 else range(30, 50)
        return dataclasses.replace(turn, text=" ".join(f"w{chooser.choice(known)}" for _ in range(8)))

    changed = {user: [said(turn, number) for number, turn in enumerate(talk(user, 80))] for user in PEOPLE}
    eager = dataclasses.replace(
        bench,
        policy=dataclasses.replace(
            POLICY, recipe=dataclasses.replace(POLICY.recipe, learning_rate=0.02, epochs=4)
        ),
    )
    only_loss = Extent(selection_turns=0, curve=(), refreshes=0, from_population=False, stacks=())
    numbers = evaluate(changed, eager, only_loss).numbers
    harm = numbers["harm"]["everyone"]
    assert harm["before"]["worse_noteworthy"] == 1.0
    assert harm["after"]["worse_noteworthy"] == 0.0
    assert numbers["loss"]["adapter + context, after the gate"]["gain"] == 0.0
    assert set(numbers) & {"curve", "selection", "in_a_row", "from_population", "stacked"} == set()


def test_what_was_measured_is_told_whole_and_names_nobody(done: Evaluation) -> None:
    told = table(done.numbers)
    for part in (
        "adapter + context, after the gate", "made worse", "drift", "author among", "learned from",
        "begun from the population's",
    ):  # fmt: skip
        assert part in told
    shown = page(done)
    assert shown.count("<svg") == 3
    assert "<script" not in shown
    assert "http" not in shown
    assert not any(user in shown.split() for user in PEOPLE)


def test_one_person_alone_is_measured_without_strangers(bench: Bench) -> None:
    numbers = evaluate({"ann": talk("ann", 60)}, bench, dataclasses.replace(EXTENT, stacks=())).numbers
    assert "swapped adapter + context" not in numbers["loss"]
    assert "authors" not in numbers
    assert numbers["loss"]["adapter + context"]["gain"] > 0


def test_someone_whose_oldest_turns_may_not_be_learned_is_measured_all_the_same(bench: Bench) -> None:
    turns = [dataclasses.replace(turn, removed=place < 30) for place, turn in enumerate(talk("ann", 60))]
    extent = dataclasses.replace(EXTENT, stacks=(), curve=())
    done = evaluate({"ann": turns}, bench, extent)
    assert done.numbers["in_a_row"]["from zero"]["loss_on_the_oldest"] is None
    assert "loss on the oldest turns none" in table(done.numbers)


def test_an_engine_is_asked_with_a_prompt_though_the_template_opens_with_the_persons_words(
    tmp_path: Path,
) -> None:
    folder = save_small_model(tmp_path)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    bench = Bench(load_model(folder), Renderer(folder, 256), dataclasses.replace(POLICY, gate_tokens=32))
    long = [dataclasses.replace(turn, text=8 * turn.text) for turn in talk("ann", 60)]  # each fills a window
    extent = Extent(selection_turns=0, curve=(), refreshes=0, from_population=False, stacks=())
    (question,) = evaluate({"ann": long}, bench, extent).questions
    assert len(question.prompt) == 1


def test_nobody_with_enough_turns_is_said(bench: Bench) -> None:
    with pytest.raises(NothingToMeasure, match=r"expected someone with 20 turns .* got 1 people without"):
        evaluate({"few": talk("few", 12)}, bench, EXTENT)


def test_an_interval_holds_the_mean_and_is_the_same_each_time() -> None:
    values = [random.Random(1).gauss(1.0, 1.0) for _ in range(1)] + [0.0, 1.0, 2.0, 3.0] * 5
    low, high = interval(values)
    assert low < sum(values) / len(values) < high
    assert interval(values) == [low, high]
    assert interval([2.0]) == [2.0, 2.0]


def test_the_command_measures_a_file_and_writes_its_page(tmp_path: Path) -> None:
    model = save_small_model(tmp_path / "model")
    file, plots = tmp_path / "histories.jsonl", tmp_path / "plots.html"
    turns = {user: talk(user, 70) for user in PEOPLE[:2]}
    late = [dataclasses.replace(turn, at=turn.at + timedelta(days=400)) for turn in turns["bob"]]
    file.write_text("\n".join([*dump("ann", turns["ann"]), *dump("bob", late), "not a line"]) + "\n")
    options = ("--model", str(model), "--data", str(tmp_path / "data"), "--page", str(plots), "--only-loss")
    told = attune("evaluate", str(file), *options, "--json", ATTUNE_DEVICE="cpu")
    numbers = json.loads(told)
    assert (numbers["people"], numbers["people_in_file"], numbers["bad_lines"]) == (2, 2, 1)
    assert plots.read_text().startswith("<!doctype html>")
    astray = tmp_path / "astray.html"
    astray.symlink_to(tmp_path / "not there" / "plots.html")
    lost = [sys.executable, "-m", "service.cli", "evaluate", str(file), *options, "--page", str(astray)]
    on_cpu = os.environ | {"ATTUNE_DEVICE": "cpu"}
    done = subprocess.run(lost, capture_output=True, text=True, check=False, timeout=120, env=on_cpu)
    assert done.returncode == 1  # no page can be written there; what was measured is told before
    assert json.loads(done.stdout.splitlines()[-1])["loss"] == numbers["loss"]
    nowhere = str(tmp_path / "no folder" / "plots.html")
    error = attune("evaluate", str(file), *options, "--page", nowhere, code=2)
    assert error == f"attune: --page: expected a file in a folder that exists, got {nowhere}\n"
    file.write_text("not a line")
    error = attune("evaluate", str(file), *options, code=2, ATTUNE_DEVICE="cpu")
    assert "0 people, 0 turns; 1 bad lines left out" in error
    assert "expected someone with 50 turns to learn" in error


def test_a_plot_of_zeros_has_them_on_the_ground() -> None:
    assert _scale([0.0, 0.0])(0.0) == _scale([0.0, 1.0])(0.0) > _scale([0.0, -1.0])(0.0)


@pytest.mark.parametrize("people", [4, 5, 7, 12])
def test_a_stranger_is_someone_else_who_begins_from_the_same(people: int) -> None:
    strangers = [_stranger(place, people) for place in range(people)]
    assert sorted(strangers) == list(range(people))
    assert all(other != place and other % 2 == place % 2 for place, other in enumerate(strangers))


def test_a_message_is_picked_behind_the_replies_that_came_before_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What somebody else said is not learned, but it is what the message answers."""
    shown: list[tuple[list[Turn], Turn]] = []

    def note(before: Sequence[Turn], turn: Turn, *rest: Any) -> list[Example]:
        shown.append((list(before), turn))
        return _rows(before, turn, *rest)

    monkeypatch.setattr("personalization.evaluate._rows", note)
    answered = {
        user: [dataclasses.replace(t, author="model" if t.role == "assistant" else "person") for t in turns]
        for user, turns in histories().items()
    }
    subjects = [subject for user in PEOPLE if (subject := subject_of(user, answered[user], bench))]
    shown.clear()
    assert _selection(bench, subjects, [None] * len(subjects), EXTENT)["asked"] == 8
    assert len(shown) == 80
    for before, turn in shown:
        user, number = turn.id.split("-")[:2]
        assert before[-1].id == f"{user}-{int(number) - 1}"


def test_exports_that_overlap_are_one_history(bench: Bench) -> None:
    turns = talk("ann", 80)
    lines = [line.encode() for part in (turns[:60], turns[30:]) for line in dump("ann", part)]
    whole, twice = (subject_of("ann", each, bench) for each in (turns, parse(lines).turns["ann"]))
    assert whole == twice


def test_a_reply_that_was_put_right_is_not_measured_though_it_was_rated_up(bench: Bench) -> None:
    turns = talk("ann", 80)
    wrong = dataclasses.replace(turns[71], id="wrong", author="model", rating="up", text="w1 w2 w3")
    turns[71] = dataclasses.replace(turns[71], corrects="wrong")
    subject = subject_of("ann", [*turns[:71], wrong, *turns[71:]], bench)
    assert subject is not None
    assert (subject.turns, subject.fresh) == (80, turns[64:])


@pytest.mark.parametrize(
    ("values", "picked"),
    [([0.9, 2.0, 1.0], True), ([0.9, 0.5, 1.0], False), ([1.0, 1.0, 2.0], False), ([math.nan, 2.0], False)],
)
def test_what_is_not_below_all_others_was_not_picked(values: list[float], picked: bool) -> None:
    assert _first_is_lowest(values) is picked


def test_nobody_who_was_refused_is_made_worse_by_rounding(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters beside each other take so much room that a row has other company than it had without them."""
    monkeypatch.setattr("personalization.score._LAID_OUT_BYTES", 300_000)
    strict = dataclasses.replace(POLICY.gate, min_gain=2.1, strengths=(1.0,))
    halved = dataclasses.replace(bench, policy=dataclasses.replace(POLICY, gate=strict))
    people = {f"p{number}": talk(f"p{number}", 60 + 3 * number) for number in range(9)}
    only_loss = Extent(selection_turns=0, curve=(), refreshes=0, from_population=False, stacks=())
    harm = evaluate(people, halved, only_loss).numbers["harm"]["everyone"]
    assert 0 < harm["people"]["accepted"] < 9
    assert harm["after"]["worse"] == 0
    assert harm["after"]["worst_decile"] == 0
