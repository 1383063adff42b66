"""Which versions learned from which turns, and which may go on answering. Pure: asked of the records and of
what may be learned now, so that it can never disagree with either.

A version has seen the turns it was trained on, and one that was carried on from its parent those of that one
too. It is marked once one of them may no longer be learned: taken out by the person, rated down, put right.
"""

from collections.abc import Collection, Iterator, Sequence
from itertools import islice

from personalization.store_records import VersionRecord


def seen(records: Sequence[VersionRecord], version: int) -> frozenset[str]:
    """The ids of the turns that went into `version`."""
    ids: set[str] = set()
    for record in _line(records, version):
        ids.update(record.turn_ids)
        if record.anew:
            break
    return frozenset(ids)


def marks(records: Sequence[VersionRecord], learnable: Collection[str]) -> dict[int, frozenset[str]]:
    """The marked ones among the published versions, each with the turns it has seen that are not in
    `learnable`. Reads each record once: a person of a year has hundreds."""
    may = frozenset(learnable)
    gone: dict[int, frozenset[str]] = {}
    for record in sorted(records, key=lambda record: record.version):  # a parent is older
        inherited = frozenset() if record.anew else gone.get(record.parent, frozenset())
        gone[record.version] = frozenset(record.turn_ids) - may | inherited
    return {each.version: gone[each.version] for each in records if each.accepted and gone[each.version]}


def stand_ins(records: Sequence[VersionRecord], learnable: Collection[str], serving: int) -> list[int]:
    """The versions that may answer in place of the serving one, the newest first: its parent, and that
    one's, as far as they are not marked. Each was to do better than its parent, so these answered before it;
    one that was taken back, by hand or on trial, is nobody's parent unless the person came back to it."""
    marked = marks(records, learnable)
    parents = islice(_line(records, serving), 1, None)
    return [each.version for each in parents if each.accepted and each.version not in marked]


def clean(records: Sequence[VersionRecord], learnable: Collection[str], serving: int) -> int:
    """The version that answers if nothing better comes, and that the next one is judged against: the serving
    one, or when that is marked the newest that may stand in for it; 0, the base, when there is none."""
    if serving not in marks(records, learnable):
        return serving
    return next(iter(stand_ins(records, learnable, serving)), 0)


def _line(records: Sequence[VersionRecord], version: int) -> Iterator[VersionRecord]:
    """The version, its parent, that one's, and so on: each once, though damaged records name each other."""
    by_version = {record.version: record for record in records}
    while (record := by_version.pop(version, None)) is not None:
        yield record
        version = record.parent
