from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from personalization.store import Standing, VersionRecord
from personalization.when import EXPECTED, When, curve, due_now, due_tonight, expected_gain

NOW = datetime(2026, 6, 1, 3, tzinfo=UTC)
POLICY = When()
TWO_HOURS = timedelta(hours=2)


def standing(
    learned: int,
    fresh: int,
    *,
    gained: float | None = None,
    expected: float = 0.04,
    ago: timedelta = TWO_HOURS,
) -> Standing:
    """`gained`: what the last refresh gained where `expected` was expected; None: there was none."""
    newest = None
    if gained is not None:
        newest = VersionRecord(1, 0, NOW - ago, gained > 0, "", {"gain": gained, EXPECTED: expected})
    return Standing(learned, fresh, newest)


@pytest.mark.parametrize(
    ("turns", "measured"), [(20, 0.015), (50, 0.033), (100, 0.053), (200, 0.069), (400, 0.081)]
)
def test_the_curve_is_the_one_that_was_measured(turns: int, measured: float):
    assert curve(turns) == pytest.approx(measured, abs=0.006)


@pytest.mark.parametrize(
    ("learned", "fresh", "expected"),
    [
        (49, 49, False),
        (50, 50, True),
        (99, 49, False),
        (100, 50, True),
        (400, 50, False),  # a long history gains little from as many turns
        (550, 150, True),
        (550, 0, False),
    ],
)
def test_a_refresh_starts_at_once_when_enough_is_new_and_promises_enough(learned, fresh, expected):
    found = due_now(standing(learned, fresh), POLICY)
    assert found.due is expected
    assert found.why


def test_zero_turns_is_never_at_once_and_the_night_goes_on():
    never = When(after_turns=0)
    assert not due_now(standing(500, 500), never).due
    assert due_tonight(standing(500, 500), NOW, never).due


def test_a_version_that_could_not_be_loaded_is_due_unless_one_was_tried_since():
    tried = standing(60, 0, gained=0.04)
    assert due_now(tried, POLICY, lost=1).due
    assert not due_now(tried, POLICY).due
    assert not due_now(tried, POLICY, lost=2).due
    assert not due_now(standing(60, 0), POLICY, lost=0).due
    assert not due_now(standing(49, 0, gained=0.04), POLICY, lost=1).due
    assert not due_now(tried, When(after_turns=0), lost=1).due


def test_refreshes_that_do_not_pay_are_tried_less_often_and_good_ones_more():
    assert due_now(standing(120, 50, gained=0.04), POLICY).due
    assert not due_now(standing(120, 50, gained=-0.01), POLICY).due
    assert due_now(standing(400, 350, gained=-0.01), POLICY).due  # so much is new that it is worth a try
    assert not due_now(standing(300, 50, gained=0.04), POLICY).due
    assert due_now(standing(300, 50, gained=0.2), POLICY).due


def test_the_night_takes_what_is_worth_less_and_what_has_waited_long():
    assert not due_tonight(standing(100, 1, gained=0.04), NOW, POLICY).due
    assert due_tonight(standing(100, 8, gained=0.04), NOW, POLICY).due
    few = due_tonight(standing(100, 7, gained=0.04), NOW, POLICY)
    assert (few.due, few.why) == (False, "not enough new turns yet: 7 of 8 to judge by")
    assert not due_now(standing(100, 6, gained=0.04), POLICY).due
    week = timedelta(days=7)
    assert not due_tonight(standing(1000, 8, gained=0.04), NOW, POLICY).due
    assert due_tonight(standing(1000, 8, gained=0.04, ago=week), NOW, POLICY).due
    assert not due_tonight(standing(1000, 7, gained=0.04, ago=week), NOW, POLICY).due
    assert not due_tonight(standing(100, 0, gained=0.04, ago=week), NOW, POLICY).due
    assert not due_tonight(standing(49, 49), NOW, POLICY).due


def test_what_was_taken_out_is_unlearned_in_the_next_night_whatever_it_gains():
    assert due_tonight(standing(100, 0, gained=0.04), NOW, POLICY, marked=True).due
    assert due_tonight(standing(10, 0, gained=0.04), NOW, POLICY, marked=True).due


@given(st.integers(0, 5000), st.integers(0, 5000), st.integers(0, 200))
def test_more_that_is_new_never_promises_less(known: int, fresh: int, more: int):
    less = expected_gain(standing(known + fresh, fresh), POLICY)
    assert 0 <= less <= expected_gain(standing(known + fresh + more, fresh + more), POLICY)
    if due_now(standing(known + fresh, fresh), POLICY).due:
        assert due_tonight(standing(known + fresh, fresh), NOW, POLICY).due


@pytest.mark.parametrize(
    "wrong", [{"after_turns": -1}, {"worth_at_night": 0.5}, {"worth_at_night": -0.1}, {"trust": 0.5}]
)
def test_a_policy_that_cannot_be_is_refused(wrong: dict[str, float]):
    with pytest.raises(ValueError, match="expected"):
        When(**wrong)
