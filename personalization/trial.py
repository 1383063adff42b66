"""Trying before trusting: a new version first answers a share of a person's replies; what they say of those,
against what they said of the version before, decides whether it answers all of them or none.

Each version's replies are liked with an unknown chance p. A vote up is a like; a vote down, or a correction,
is none; a reply without either says nothing. From a uniform prior p is Beta(1 + up, 1 + down), and the
probability that one version's p lies above another's has a closed form (Evan Miller, "Formulas for Bayesian
A/B Testing", 2015).
"""

import hashlib
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from math import exp, lgamma, log
from typing import Literal

from personalization.store import Pointer, Store, TrialEnd, Votes


@dataclass(frozen=True, slots=True)
class TrialPolicy:
    """share       of a person's replies that a new version answers on trial; 0: no trial, all at once
    replies     after so many of them, with no ratings against it, it answers all
    certainty   how sure it must be that a version is better, or worse, to decide sooner
    least       votes up, or down, without which nothing is decided sooner
    at_latest   a trial of someone who seldom writes ends after so long
    """

    share: float = 0.0
    replies: int = 30
    certainty: float = 0.8
    least: int = 2
    at_latest: timedelta = timedelta(days=14)

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise ValueError(f"share: expected 0 to below 1, got {self.share}")
        if not 0.5 < self.certainty < 1:
            raise ValueError(f"certainty: expected above 0.5 and below 1, got {self.certainty}")
        for name in ("replies", "least"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class Tally:
    """What was said so far of the version on trial and of the one before; `replies` are those on trial."""

    replies: int
    tried: Votes
    before: Votes

    @property
    def better(self) -> float:
        """The probability that the version on trial is the better one."""
        return above(self.tried, self.before)


Decision = Literal["promoted", "rolled back", "goes on"]


def decide(tally: Tally, lasted: timedelta, policy: TrialPolicy) -> Decision:
    """Ratings first; without any that say enough, the number of replies and the time."""
    better, tried = tally.better, tally.tried
    if tried.down >= policy.least and 1 - better >= policy.certainty:
        return "rolled back"
    if tried.up >= policy.least and better >= policy.certainty:
        return "promoted"
    if tally.replies >= policy.replies or lasted >= policy.at_latest:
        return "promoted" if better >= 0.5 or not tried.down else "rolled back"
    return "goes on"


def above(one: Votes, other: Votes) -> float:
    """P(p_one > p_other) for p ~ Beta(1 + up, 1 + down):

    sum over i = 0 … a-1 of B(c + i, b + d) / ((b + i) B(1 + i, b) B(c, d)), where one is Beta(a, b) and the
    other Beta(c, d)."""
    a, b, c, d = 1 + one.up, 1 + one.down, 1 + other.up, 1 + other.down
    return sum(
        exp(_log_beta(c + i, b + d) - log(b + i) - _log_beta(1 + i, b) - _log_beta(c, d)) for i in range(a)
    )


def _log_beta(a: int, b: int) -> float:
    return lgamma(a) + lgamma(b) - lgamma(a + b)


def on_trial(pointer: Pointer, reply_id: str, seed: bytes) -> bool:
    """Whether this reply is one of the share that the version on trial answers: the same reply, asked for
    again, is answered by the same version."""
    if pointer.trial is None:
        return False
    drawn = hashlib.blake2b(reply_id.encode(), key=seed, digest_size=8).digest()
    return int.from_bytes(drawn, "big") < pointer.trial.share * 2**64


async def tally(store: Store, user: str, pointer: Pointer) -> Tally:
    """Count for the trial that `pointer` has."""
    assert pointer.trial is not None
    votes = await store.votes(user)
    replies = await store.replies_by(user, pointer.trial.version, since=pointer.trial.since)
    none = Votes(0, 0)
    return Tally(replies, votes.get(pointer.trial.version, none), votes.get(pointer.version, none))


async def settle(store: Store, user: str, policy: TrialPolicy, now: datetime) -> TrialEnd | None:
    """End the person's trial if there is one and enough was said. None: none, it goes on, or someone else
    ended it this moment."""
    pointer = await store.pointer(user)
    trial = pointer.trial
    if trial is None:
        return None
    counted = await tally(store, user, pointer)
    decision = decide(counted, now - trial.since, policy)
    if decision == "goes on":
        return None
    end = ended(pointer, decision, now, counted)
    if decision == "promoted":
        moved = await store.compare_and_set(
            user, pointer.version, trial.version, epoch=pointer.epoch, trial=trial.version, end=end
        )
    else:
        moved = await store.end_trial(user, end, epoch=pointer.epoch)
    return end if moved else None


def ended(pointer: Pointer, outcome: str, now: datetime, counted: Tally | None = None) -> TrialEnd:
    """How the trial that `pointer` has came to its end."""
    assert pointer.trial is not None
    numbers = {} if counted is None else shown(counted)
    return TrialEnd(pointer.trial.version, pointer.trial.share, pointer.trial.since, now, outcome, numbers)


def shown(counted: Tally) -> dict[str, float]:
    """The tally as numbers with names."""
    before = {f"before_{name}": count for name, count in asdict(counted.before).items()}
    return {"replies": counted.replies, **asdict(counted.tried), **before, "better": round(counted.better, 3)}
