"""When a person's next refresh pays. Pure: the same standing at the same time gives the same answer.

What a version is worth grows with the turns n it was learned from, ever more slowly:

    g(n) = 0.0266 ln(1 + n / 20)      nats per token, on top of the context

fitted to what adapters gained on held-out turns of self-dialogue at 20 to 400 learned turns (0.018 against
0.015 measured at 20, 0.033 at 50, 0.048 against 0.053 at 100, 0.081 at 400). A refresh learns from all n
turns; where the last one saw s of them, it is expected to add g(n) - g(s), times how much better or worse
that one did than was expected of it. So a new person is refreshed often and cheaply, one with a long history,
all of which is learned again, after many new turns, and one whose refreshes keep being refused ever less
often.

That no two refreshes of a person run at once is the queue's doing (`jobs.py`).
"""

import math
from dataclasses import dataclass
from datetime import datetime, timedelta

from personalization.store_records import Standing

EXPECTED = "expected_gain"  # among a version's numbers: what was expected of it when it was trained


@dataclass(frozen=True, slots=True)
class When:
    """Turns are learned turns, gains nats per token.

    minimum_turns   before that many there is nothing to try: context alone serves better
    least_new       new turns below which a version could not be judged against the last one
    after_turns     at least so many new ones start a refresh at once; 0: never at once, the night only
    worth_at_once   expected gain that is worth a refresh at once
    worth_at_night  the same for the night, when nobody waits for the device
    at_latest       as many new turns as can be judged are learned in the night after so long, whatever they
                    promise
    trust           most that a person's last refresh can raise or lower what is expected, as a factor
    """

    minimum_turns: int = 50
    least_new: int = 8
    after_turns: int = 50
    worth_at_once: float = 0.008
    worth_at_night: float = 0.001
    at_latest: timedelta = timedelta(days=7)
    trust: float = 4.0

    def __post_init__(self) -> None:
        for name in ("minimum_turns", "least_new", "after_turns"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        if not 0 <= self.worth_at_night <= self.worth_at_once:
            raise ValueError(
                f"worth_at_night: expected 0 to worth_at_once ({self.worth_at_once}), "
                f"got {self.worth_at_night}"
            )
        if self.trust < 1:
            raise ValueError(f"trust: expected at least 1, got {self.trust}")


@dataclass(frozen=True, slots=True)
class Due:
    """Whether to refresh, what it is expected to gain, and why so, in words."""

    due: bool
    gain: float
    why: str


def curve(turns: int) -> float:
    """g(n), see the top of this file."""
    return 0.0266 * math.log1p(turns / 20)


def expected_gain(standing: Standing, policy: When) -> float:
    """What a refresh now is expected to add for this person, in nats per token."""
    seen = max(0, standing.learned - standing.fresh)
    return max(0.0, curve(standing.learned) - curve(seen)) * _own_factor(standing, policy)


def due_now(standing: Standing, policy: When, *, lost: int = 0) -> Due:
    """Asked after each reply: is it worth a refresh at once? `lost`: the version that was to answer and could
    not be loaded, as its files are gone or for another base; 0: none."""
    gain = expected_gain(standing, policy)
    newest = 0 if standing.newest is None else standing.newest.version
    if 0 < lost == newest and policy.after_turns and standing.learned >= policy.minimum_turns:
        return Due(True, gain, f"version {lost} cannot answer, and no newer one was tried")
    hindrance = _hindrance(standing, policy)
    if hindrance:
        return Due(False, gain, hindrance)
    if not policy.after_turns or standing.fresh < policy.after_turns:
        return Due(False, gain, f"{standing.fresh} new turns of {policy.after_turns or 'no number'}")
    if gain < policy.worth_at_once:
        return Due(False, gain, f"expected to gain {gain:.4f}, at once from {policy.worth_at_once:g} on")
    return Due(True, gain, f"{standing.fresh} new turns, expected to gain {gain:.4f}")


def due_tonight(standing: Standing, now: datetime, policy: When, *, marked: bool = False) -> Due:
    """Asked each night of everyone. Who has an answering version that is marked (see `lineage.py`) is always
    due."""
    gain = expected_gain(standing, policy)
    if marked:
        return Due(True, gain, "turns were taken out that the version that answers has seen")
    hindrance = _hindrance(standing, policy)
    if hindrance:
        return Due(False, gain, hindrance)
    if gain >= policy.worth_at_night:
        return Due(True, gain, f"{standing.fresh} new turns, expected to gain {gain:.4f}")
    if standing.newest is None or now - standing.newest.created_at >= policy.at_latest:
        return Due(True, gain, f"{standing.fresh} new turns, the last refresh is long ago")
    return Due(False, gain, f"expected to gain {gain:.4f}, at night from {policy.worth_at_night:g} on")


def _hindrance(standing: Standing, policy: When) -> str:
    if standing.learned < policy.minimum_turns:
        return f"not enough turns yet: {standing.learned} of {policy.minimum_turns} to learn from"
    if not standing.fresh:
        return "nothing new"
    if standing.fresh < min(policy.least_new, standing.learned):
        return f"not enough new turns yet: {standing.fresh} of {policy.least_new} to judge by"
    if standing.trial:
        return "a version is on trial"
    return ""


def _own_factor(standing: Standing, policy: When) -> float:
    """How this person's last refresh did against what was expected of it, published or refused."""
    numbers = {} if standing.newest is None else standing.newest.numbers
    measured, expected = numbers.get("gain"), numbers.get(EXPECTED)
    if measured is None or not expected:
        return 1.0
    return min(policy.trust, max(1 / policy.trust, measured / expected))
