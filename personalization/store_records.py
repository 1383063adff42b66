"""What the store hands out, and the errors it raises.

Errors: StoreError
          StoreUnavailable    Redis is down, too slow, or refuses writes; nothing is known of the write's
                              fate, and every write here may simply be sent again
          HistoryForgotten    the person was forgotten since the epoch that was passed
          UnknownTurn         no such turn of this person
          UnknownResponse     no such response of this person, or no longer
          LeaseLost           another gateway has taken this response over
          EventsExpired       the events asked for are no longer kept
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime


class StoreError(Exception):
    """Base of everything the store raises by name."""


class StoreUnavailable(StoreError):
    """Redis did not answer, or refused to write. `reason` is Redis' own word."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(f"the store is unavailable: {reason}")


class HistoryForgotten(StoreError):
    """The work began before the person was forgotten; nothing was written."""

    def __init__(self, user: str) -> None:
        self.user = user
        super().__init__("the person's data was forgotten while this was under way")


class UnknownTurn(StoreError, LookupError):
    def __init__(self, turn_id: str) -> None:
        self.turn_id = turn_id
        super().__init__(f"expected a turn of this person, got {turn_id!r}")


class UnknownResponse(StoreError, LookupError):
    """Also the answer for somebody else's response: who asks cannot tell the two apart."""

    def __init__(self, response_id: str) -> None:
        self.response_id = response_id
        super().__init__(f"expected a response of this person, got {response_id!r}")


class LeaseLost(StoreError):
    def __init__(self, response_id: str) -> None:
        self.response_id = response_id
        super().__init__(f"response {response_id!r} is now written by another gateway")


class EventsExpired(StoreError, LookupError):
    """`oldest` is the first event number still kept, None when there are none."""

    def __init__(self, response_id: str, after: int, oldest: int | None) -> None:
        self.response_id, self.after, self.oldest = response_id, after, oldest
        super().__init__(
            f"expected event {after + 1} of response {response_id!r}, got {oldest} as the oldest"
        )


@dataclass(frozen=True, slots=True)
class Trial:
    """A version that answers a `share` of a person's replies, above 0 and below 1, before it may answer
    all."""

    version: int
    share: float
    since: datetime


@dataclass(frozen=True, slots=True)
class TrialEnd:
    """How a trial ended: `outcome` is promoted | rolled back | by hand | replaced | taken out; `numbers` are
    what was counted (see `trial.py`), empty when the end had nothing to do with that."""

    version: int
    share: float
    began: datetime
    ended: datetime
    outcome: str
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Votes:
    """Of one version's replies: how many were rated up, and how many rated down or corrected."""

    up: int
    down: int


@dataclass(frozen=True, slots=True)
class Pointer:
    """The version that answers (0 is the bare base), since when, the person's epoch for fencing, and the
    version on trial if there is one."""

    version: int
    updated_at: datetime | None
    epoch: int
    trial: Trial | None = None

    @property
    def answering(self) -> frozenset[int]:
        """The versions that answer, if only on trial."""
        return frozenset({self.version} if self.trial is None else {self.version, self.trial.version})


@dataclass(frozen=True, slots=True)
class ConversationSummary:
    id: str
    title: str
    last_at: datetime
    turns: int


@dataclass(frozen=True, slots=True)
class VersionRecord:
    """One trained or imported version, accepted by the gate or not. `numbers` are the gate's; `turn_ids` what
    it was trained on; `trial` how its trial ended, if it had one that did; `population` the number of the
    population adapter that it began with; `anew`: it was trained from nothing else. Where that was
    not noted yet, the version was carried on from its parent."""

    version: int
    parent: int
    created_at: datetime
    accepted: bool
    reason: str
    numbers: Mapping[str, float] = field(default_factory=dict)
    examples: int = 0
    turn_ids: tuple[str, ...] = ()
    trial: TrialEnd | None = None
    population: int = 0
    anew: bool = False


@dataclass(frozen=True, slots=True)
class Standing:
    """How a person stands between two refreshes. `learned`: turns there are to learn from; `fresh`: those of
    them that no refresh has seen; `newest`: the record of the last refresh, whatever came of it; `trial`: a
    version is on trial."""

    learned: int
    fresh: int
    newest: VersionRecord | None
    trial: bool = False


@dataclass(frozen=True, slots=True)
class Forgotten:
    """What `forget` took out of Redis; `epoch` is the person's new one."""

    turns: int
    conversations: int
    versions: int
    responses: int
    keys: int
    epoch: int


@dataclass(frozen=True, slots=True)
class ResponseRecord:
    """A reply that can be resumed. `body` is the gateway's own; `state` is "running" until it is finished."""

    id: str
    user: str
    state: str
    body: bytes
