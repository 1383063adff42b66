"""After the verdict: what judged is learned too, by those for whom that goes well."""

from dataclasses import replace

import pytest
import torch

from engine.adapter_files import LoraWeights
from engine.weights import LoadedModel
from personalization.finish import Accepted, _anew, finish
from personalization.gate import Gate, GatePolicy, scaled
from personalization.prompt import Example
from personalization.score import next_token, token_losses
from personalization.train import Person, Recipe, plan, train
from tests.small_model import habits, small_model

RECIPE = Recipe(rank=4, alpha=8, learning_rate=5e-3, epochs=2, tokens_per_step=32)
POLICY = GatePolicy(max_drift=100.0)  # a model this small is moved by anything
ROWS = habits(1, 24)
NEWEST = habits(5, 6)


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return small_model()


@pytest.fixture(scope="module")
def judged(model: LoadedModel) -> list[LoraWeights]:
    people = [Person(ROWS, seed=1), Person(habits(2, 20), seed=2)]
    return [each.weights for each in train(model, people, RECIPE)]


def loss(model: LoadedModel, weights: LoraWeights | None) -> float:
    return float(torch.cat(token_losses(model, NEWEST, weights)).mean())


def calm(model: LoadedModel) -> list[Example]:
    """What the base itself would say: no adapter can be better at it."""
    rows = []
    for first in (3, 9, 20, 41):
        ids = [first]
        for _ in range(20):
            ids.append(next_token(model, ids, None))
        rows.append(Example(tuple(ids), (False,) + (True,) * 20))
    return rows


def test_the_newest_rows_are_learned_and_the_older_ones_are_not_lost(
    model: LoadedModel, judged: list[LoraWeights]
) -> None:
    gate = Gate(model, habits(13, 4))
    (weights,) = finish(model, gate, [Accepted(Person(ROWS, 1), NEWEST)], RECIPE, POLICY)
    assert loss(model, weights) < loss(model, judged[0]) - 0.3
    old = [float(torch.cat(token_losses(model, ROWS, each)).mean()) for each in (judged[0], weights, None)]
    assert old[1] - old[0] < 0.3 * (old[2] - old[0])


def test_without_newest_rows_the_candidate_comes_again_at_its_strength_from_where_it_began(
    model: LoadedModel, judged: list[LoraWeights]
) -> None:
    gate = Gate(model, habits(13, 4))
    anew, weaker = finish(
        model, gate, [Accepted(Person(ROWS, 1), []), Accepted(Person(ROWS, 1), [], 0.5)], RECIPE, POLICY
    )
    assert loss(model, anew) == pytest.approx(loss(model, judged[0]), abs=1e-4)
    assert loss(model, weaker) == pytest.approx(loss(model, scaled(judged[0], 0.5)), abs=1e-4)
    (carried_on,) = finish(model, gate, [Accepted(Person(ROWS, 1, judged[1]), [])], RECIPE, POLICY)
    (expected,) = train(model, [Person(ROWS, 1, judged[1])], RECIPE)
    assert loss(model, carried_on) == pytest.approx(loss(model, expected.weights), abs=1e-4)


def test_more_rows_cost_no_epoch_that_the_candidate_had() -> None:
    rows = habits(1, 24)
    steps = len(plan(rows, RECIPE, 3))
    tight = replace(RECIPE, most_steps=steps)
    assert len({step.epoch for step in plan([*rows, *NEWEST], tight, 3)}) == RECIPE.epochs - 1
    person = _anew(Accepted(Person(rows, 3), NEWEST), tight)
    assert person.recipe is not None
    assert len({step.epoch for step in plan(person.examples, person.recipe, 3)}) == RECIPE.epochs
    once = _anew(Accepted(Person(rows, 3), NEWEST), replace(RECIPE, most_steps=1))
    assert once.recipe is not None
    assert once.recipe.epochs == 1


def test_company_changes_nothing(model: LoadedModel) -> None:
    gate = Gate(model, habits(13, 4))
    people = [Accepted(Person(ROWS, 3), NEWEST), Accepted(Person(habits(2, 20), 4), habits(6, 3))]
    together = finish(model, gate, people, RECIPE, POLICY)
    for person, beside in zip(people, together, strict=True):
        (alone,) = finish(model, gate, [person], RECIPE, POLICY)
        assert loss(model, alone) == pytest.approx(loss(model, beside), abs=1e-3)
    assert finish(model, gate, [], RECIPE, POLICY) == []


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        (GatePolicy(max_drift=1e-3), "refused: on neutral text the loss per token rose by"),
        (GatePolicy(max_drift=100.0, max_norm=1e-3), "refused: q_proj of layer 0 grew to"),
    ],
)
def test_who_would_be_refused_for_it_stays_as_judged(
    model: LoadedModel, policy: GatePolicy, reason: str
) -> None:
    gate = Gate(model, calm(model))
    person = Accepted(Person(ROWS, 3), NEWEST)
    (learned,) = finish(model, gate, [person], RECIPE, POLICY)
    assert learned is not None
    (fault,) = gate.faults([learned], policy)
    assert fault is not None
    assert fault.startswith(reason)
    assert finish(model, gate, [person], RECIPE, policy) == [None]


def test_numbers_that_are_none_are_a_fault(model: LoadedModel, judged: list[LoraWeights]) -> None:
    broken = LoraWeights(judged[0].modules[:1])
    broken.modules[0].a[0, 0] = float("nan")
    (fault,) = Gate(model, habits(13, 4)).faults([broken], POLICY)
    assert fault is not None
    assert "not finite" in fault
