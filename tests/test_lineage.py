from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from personalization.lineage import clean, marks, seen, stand_ins
from personalization.store import VersionRecord

NOW = datetime(2026, 6, 1, tzinfo=UTC)


def record(
    version: int, parent: int, turns: str, *, accepted: bool = True, anew: bool = False
) -> VersionRecord:
    """`turns`: one letter for each turn it was trained on."""
    return VersionRecord(version, parent, NOW, accepted, "", {}, 1, tuple(turns), anew=anew)


CHAIN = [record(1, 0, "ab"), record(2, 1, "cd"), record(3, 2, "e", accepted=False), record(4, 2, "ef")]


def test_a_version_that_was_carried_on_has_seen_its_own_turns_and_its_ancestors():
    assert seen(CHAIN, 4) == set("abcdef")
    assert seen(CHAIN, 2) == set("abcd")
    assert seen(CHAIN, 0) == set()


def test_a_version_trained_anew_has_seen_its_own_turns_alone_and_passes_on_no_more():
    records = [*CHAIN, record(5, 4, "acg", anew=True), record(6, 5, "h")]
    assert seen(records, 5) == set("acg")
    assert seen(records, 6) == set("acgh")
    assert marks(records, "acdefgh") == {1: {"b"}, 2: {"b"}, 4: {"b"}}
    assert marks(records, "abcdefh") == {5: {"g"}, 6: {"g"}}


def test_taking_out_a_turn_marks_every_published_version_that_saw_it_and_no_other():
    assert marks(CHAIN, "abcdef") == {}
    assert marks(CHAIN, "abcde") == {4: {"f"}}
    assert marks(CHAIN, "abdef") == {2: {"c"}, 4: {"c"}}
    assert marks(CHAIN, "bcdf") == {1: {"a"}, 2: {"a"}, 4: {"a", "e"}}


def test_what_serves_is_to_be_beaten_unless_it_is_marked_and_then_the_newest_before_it_that_is_not():
    assert clean(CHAIN, "abcdef", 4) == 4
    assert clean(CHAIN, "abcdef", 2) == 2  # gone back to by hand
    assert clean(CHAIN, "abcde", 4) == 2
    assert clean(CHAIN, "abd", 4) == 1
    assert clean(CHAIN, "bcdef", 4) == 0
    assert clean(CHAIN, "abcde", 2) == 2  # what is marked above it does not matter


def test_a_version_above_the_serving_one_does_not_answer_the_person_went_back_from_it():
    records = [*CHAIN, record(5, 0, "g")]
    assert clean(records, "abdefg", 4) == 1
    assert clean(records, "bcdefg", 2) == 0


def test_a_version_that_was_gone_back_from_by_hand_does_not_return_when_a_later_one_is_marked():
    tried = [record(1, 0, "a", anew=True), record(2, 1, "ab", anew=True), record(3, 2, "abc", anew=True)]
    records = [*tried, record(4, 1, "abd", anew=True), record(5, 4, "abde", anew=True)]  # back from 3 to 1
    assert clean(records, "abcd", 5) == 4
    assert clean(records, "abc", 5) == 1
    assert stand_ins(records, "abcde", 5) == [4, 1]
    assert stand_ins(records, "abcde", 3) == [2, 1]  # and forward again
    assert clean([*tried, record(4, 0, "abd", anew=True)], "abc", 4) == 0  # back from 3 to the base


def test_records_that_name_each_other_as_parents_hold_nobody_up():
    around = [record(1, 2, "a", anew=True), record(2, 1, "b", anew=True), record(3, 3, "c", anew=True)]
    assert stand_ins(around, "abc", 2) == [1]
    assert stand_ins(around, "abc", 3) == []


def test_a_version_without_a_parent_is_clean_of_what_others_saw():
    records = [*CHAIN, record(5, 0, "bcdef")]
    assert clean(records, "bcdef", 5) == 5


def test_a_version_trained_anew_is_clean_of_what_its_rival_saw():
    records = [*CHAIN, record(5, 4, "bcdef", anew=True), record(6, 5, "bcdefg", anew=True)]
    assert clean(records, "bcdefg", 6) == 6
    assert clean(records, "bcdef", 6) == 5
    assert clean(records, "bcde", 6) == 0
    assert clean(records, "abcde", 6) == 2


def test_what_is_marked_is_found_by_reading_each_record_once():
    reads: list[int] = []

    class Noted(tuple[str, ...]):
        def __iter__(self) -> Iterator[str]:
            reads.append(len(self))
            return super().__iter__()

    long = [VersionRecord(v, v - 1, NOW, True, "", {}, 1, Noted([f"t{v}", "kept"])) for v in range(1, 201)]
    found = marks(long, {"kept", *(f"t{v}" for v in range(1, 200))})
    assert found == {200: {"t200"}}
    assert len(reads) == 200


DRAWN = st.lists(
    st.tuples(st.integers(0, 5), st.sets(st.sampled_from("abcdef")), st.booleans(), st.booleans()),
    max_size=6,
)


def made(drawn: Sequence[tuple[int, set[str], bool, bool]]) -> list[VersionRecord]:
    return [
        record(number, min(parent, number - 1), "".join(turns), accepted=accepted, anew=anew)
        for number, (parent, turns, accepted, anew) in enumerate(drawn, start=1)
    ]


@given(DRAWN, st.sets(st.sampled_from("abcdef")))
def test_marked_is_what_has_seen_a_turn_that_may_not_be_learned(drawn, learnable):
    records = made(drawn)
    expected = {each.version: seen(records, each.version) - learnable for each in records if each.accepted}
    assert marks(records, learnable) == {version: gone for version, gone in expected.items() if gone}


@given(
    DRAWN,
    st.sets(st.sampled_from("abcdef")),
    st.integers(0, 6),
)
def test_what_answers_instead_has_never_seen_a_turn_that_may_not_be_learned(drawn, learnable, serving):
    records = made(drawn)
    published = {each.version for each in records if each.accepted} | {0}
    serving = max(version for version in published if version <= serving)
    instead = clean(records, learnable, serving)
    assert instead in published
    assert instead <= serving
    assert seen(records, instead) <= learnable
