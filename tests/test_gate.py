import dataclasses
import math

import pytest
import torch

from engine.adapter_files import LoraWeights
from personalization.gate import Case, Gate, GatePolicy, scaled, student_quantile, weigh
from personalization.prompt import Example
from personalization.score import token_losses
from personalization.train import Person, Recipe, train
from tests.small_model import habits, small_model

RECIPE = Recipe(rank=4, alpha=8, learning_rate=5e-3, epochs=3, tokens_per_step=32)


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def own(model):
    (trained,) = train(model, [Person(habits(1, 30), seed=1)], RECIPE)
    return trained.weights


@pytest.fixture(scope="module")
def strangers(model):
    (trained,) = train(model, [Person(habits(2, 30), seed=1)], RECIPE)
    return trained.weights


HELD_OUT = habits(1, 45)[30:]
NEUTRAL = habits(13, 4)


def judge(model, candidate, serving, held_out, policy):
    (verdict,) = Gate(model, NEUTRAL).judge([Case(candidate, serving, held_out)], policy)
    return verdict


def policy(**fields):
    """This model is small enough for every adapter to shift what it says of anything."""
    return GatePolicy(**{"max_drift": 100.0, **fields})


def test_what_learned_the_persons_habits_is_accepted_over_the_base(model, own):
    verdict = judge(model, own, None, HELD_OUT, policy())
    assert verdict.accepted
    assert verdict.reason.startswith("better: on 15 held-out turns")
    numbers = verdict.numbers
    assert numbers["turns"] == 15
    assert numbers["tokens"] == sum(sum(row.learn_mask) for row in HELD_OUT)
    assert numbers["gain"] == pytest.approx(numbers["loss_before"] - numbers["loss_after"])
    assert 0 < numbers["gain_low"] < numbers["gain"] < numbers["gain_high"]


def test_a_strangers_adapter_is_refused_as_worse_than_ones_own(model, own, strangers):
    verdict = judge(model, strangers, own, HELD_OUT, policy())
    assert not verdict.accepted
    assert verdict.reason.startswith("worse")
    assert verdict.numbers["gain_high"] < 0


def test_the_serving_version_itself_brings_no_measurable_change(model, own):
    verdict = judge(model, own, own, HELD_OUT, policy())
    assert not verdict.accepted
    assert verdict.reason.startswith("no measurable change yet")
    assert verdict.numbers["gain"] == 0


def test_the_same_gain_on_few_turns_that_disagree_is_not_enough(model, own, strangers):
    mixed = [*habits(1, 3), *habits(2, 2)]  # the stranger's adapter is good for two rows and bad for three
    cautious = policy(confidence=0.95)
    assert not judge(model, own, strangers, mixed, cautious).accepted
    assert judge(model, own, strangers, habits(1, 5), cautious).accepted


def test_the_interval_is_that_of_a_ratio_over_turns():
    sizes, better = [1, 2, 3, 2], [0.5, 0.2, 0.9, -0.1]
    rows = [Example((0,) * (1 + size), (False,) + (True,) * size) for size in sizes]
    before = [torch.full((size,), 2.0) for size in sizes]
    after = [row - gained / size for row, gained, size in zip(before, better, sizes, strict=True)]
    numbers = weigh(rows, before, after, policy()).numbers
    gain = 1.5 / 8
    spread = sum((d - gain * n) ** 2 for d, n in zip(better, sizes, strict=True))
    reach = student_quantile(0.8, 3) * math.sqrt(4 / 3 * spread) / 8
    assert numbers["gain"] == pytest.approx(gain)
    assert numbers["gain_low"] == pytest.approx(gain - reach)
    assert numbers["gain_high"] == pytest.approx(gain + reach)
    assert numbers["confidence"] == pytest.approx(0.6)


@pytest.mark.parametrize("held_out", [[], [Example((1, 2, 3), (False, False, False))], HELD_OUT[:3]])
def test_too_little_held_out_is_said_and_gives_no_average(model, own, held_out):
    verdict = judge(model, own, None, held_out, policy())
    assert not verdict.accepted
    turns = 3 if len(held_out) == 3 else 0
    assert verdict.reason == f"too little to judge by: {turns} held-out turns of 4 needed"
    assert set(verdict.numbers) == {"turns", "tokens", "drift"}


def test_the_least_number_of_turns_is_enough_to_judge_by(model, own):
    verdict = judge(model, own, None, HELD_OUT[:4], policy(min_turns=4))
    assert verdict.numbers["turns"] == 4
    assert "gain" in verdict.numbers


def test_two_turns_of_one_row_count_as_two(model, own):
    first, second = HELD_OUT[:2]
    row = Example(first.token_ids + second.token_ids, first.learn_mask + second.learn_mask)
    assert judge(model, own, None, [row] * 3, policy()).numbers["turns"] == 6


def test_weights_that_are_not_finite_are_refused_before_anything_is_computed(model, own):
    broken = list(own.modules)
    broken[3] = dataclasses.replace(broken[3], a=broken[3].a * torch.nan)
    verdict = judge(model, LoraWeights(tuple(broken)), None, HELD_OUT, policy())
    assert not verdict.accepted
    assert verdict.reason == "refused: o_proj of layer 0 holds numbers that are not finite"
    assert verdict.numbers == {}


def test_weights_that_exploded_are_refused(model, own):
    grown = LoraWeights(tuple(dataclasses.replace(m, b=m.b * 1e4) for m in own.modules))
    verdict = judge(model, grown, None, HELD_OUT, policy())
    assert not verdict.accepted
    assert "times the base's norm, at most 2 is allowed" in verdict.reason


def test_a_loss_that_is_not_finite_is_refused_whoevers_it_is(model, own):
    # Each weight is finite and within the norms allowed; what they give together is not.
    broken = LoraWeights(
        tuple(dataclasses.replace(m, a=m.a * 1e20, b=m.b * 1e20) for m in own.modules if m.module == "o_proj")
    )
    lenient = policy(max_norm=1e60)
    for candidate, serving, whose in ((broken, own, "its"), (own, broken, "the serving version's")):
        verdict = judge(model, candidate, serving, HELD_OUT, lenient)
        assert not verdict.accepted
        assert whose in verdict.reason
        assert "not a finite number" in verdict.reason
        assert all(math.isfinite(value) for value in verdict.numbers.values())


def test_what_is_better_for_the_person_and_worse_for_everything_else_is_refused(model, own):
    free = judge(model, own, None, HELD_OUT, policy())
    assert free.accepted
    rows = [torch.cat(token_losses(model, NEUTRAL, each)).mean() for each in (None, own)]
    assert free.numbers["drift"] == pytest.approx(float(rows[1] - rows[0]), abs=1e-4)
    assert free.numbers["drift"] > 0.02
    strict = judge(model, own, None, HELD_OUT, GatePolicy())
    assert not strict.accepted
    assert strict.reason.startswith("refused: on neutral text the loss per token rose by")
    assert strict.numbers == free.numbers


def test_what_drifts_too_much_may_pass_at_part_of_its_strength(model, own):
    drifts = {
        strength: Gate(model, NEUTRAL).drifts([scaled(own, strength)])[0] for strength in (1.0, 0.7, 0.45)
    }
    assert drifts[0.7] < drifts[1.0]
    limit = policy(max_drift=(drifts[0.7] + drifts[1.0]) / 2)
    verdict = judge(model, own, None, HELD_OUT, limit)
    assert (verdict.accepted, verdict.strength) == (True, 0.7)
    assert verdict.numbers["drift"] == pytest.approx(drifts[0.7], abs=1e-4)
    whole = judge(model, own, None, HELD_OUT, dataclasses.replace(limit, strengths=(1.0,)))
    assert not whole.accepted
    with pytest.raises(ValueError, match="strengths: expected some above 0"):
        policy(strengths=(0.0,))


def test_a_verdict_does_not_depend_on_who_else_is_judged(model, own, strangers):
    broken = LoraWeights(tuple(dataclasses.replace(m, a=m.a * torch.nan) for m in own.modules))
    cases = [
        Case(own, None, HELD_OUT),
        Case(broken, None, HELD_OUT),
        Case(strangers, own, HELD_OUT[:7]),
        Case(own, own, []),
    ]
    gate = Gate(model, NEUTRAL)
    together = gate.judge(cases, policy())
    for case, verdict in zip(cases, together, strict=True):
        (alone,) = gate.judge([case], policy())
        assert (alone.accepted, alone.reason) == (verdict.accepted, verdict.reason)
        assert alone.numbers == pytest.approx(verdict.numbers, abs=1e-4)
    assert gate.judge([], policy()) == []


@pytest.mark.parametrize(
    ("probability", "freedom", "table"),
    [(0.8, 3, 0.978), (0.9, 3, 1.638), (0.9, 14, 1.345), (0.975, 3, 3.182), (0.975, 30, 2.042)],
)
def test_quantiles_of_student_are_those_of_the_table(probability, freedom, table):
    assert student_quantile(probability, freedom) == pytest.approx(table, rel=0.04)
