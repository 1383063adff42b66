"""The sample people: valid histories, clearly different voices, brought in once."""

import json
from datetime import UTC, datetime, timedelta
from statistics import median

import pytest

from personalization.history import Turn, learned, parse
from personalization.store import Store, VersionRecord
from service.samples import SAMPLES, UnknownSample, ensure_samples, load

NAMES = [sample.name for sample in SAMPLES]


def history(name: str) -> list[Turn]:
    parsed = parse(load(name))
    assert parsed.errors == []
    assert list(parsed.turns) == [name]
    return parsed.turns[name]


def preferred(name: str) -> list[str]:
    """The replies this person put right or rated up."""
    return [turn.text for turn in history(name) if turn.role == "assistant" and learned(turn)]


class Requests:
    """Takes refresh requests down."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    async def __call__(self, user: str, reason: str) -> None:
        self.asked.append((user, reason))


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_has_enough_to_learn_from_over_several_weeks(name: str) -> None:
    turns = history(name)
    assert sum(learned(turn) and turn.author == "person" for turn in turns) >= 80
    assert len({turn.conversation for turn in turns}) >= 10
    assert turns[-1].at - turns[0].at > timedelta(weeks=5)
    assert turns[-1].at < datetime(2026, 1, 1, tzinfo=UTC)  # an import refuses turns from the future


@pytest.mark.parametrize("name", NAMES)
def test_every_line_of_a_sample_says_that_it_is_one(name: str) -> None:
    assert all(json.loads(line)["sample"] is True for line in load(name))


@pytest.mark.parametrize("name", NAMES)
def test_turns_alternate_and_time_never_runs_backwards(name: str) -> None:
    before: dict[str, Turn] = {}
    for turn in history(name):
        previous = before.get(turn.conversation)
        if previous is None:
            assert turn.role == "user"
        else:
            assert turn.role != previous.role
            assert turn.at > previous.at
        before[turn.conversation] = turn


def test_no_sample_repeats_itself_or_another() -> None:
    texts = [turn.text for name in NAMES for turn in history(name)]
    assert len(texts) == len(set(texts))


def test_each_voice_can_be_told_from_the_others_by_its_surface() -> None:
    words = {name: median(len(text.split()) for text in preferred(name)) for name in NAMES}
    assert max(words["Bram"], words["Wen"]) < 20 < 35 < words["Odile"]
    assert all(text == text.lower() for text in preferred("Wen"))
    assert all(text != text.lower() for name in ("Bram", "Odile") for text in preferred(name))
    assert all(text.startswith("Oh") and text.endswith("!") for text in preferred("Odile"))
    assert not any("!" in text for name in ("Bram", "Wen") for text in preferred(name))
    mate = {
        name: sum("mate" in text.split() or "mate." in text for text in preferred(name)) for name in NAMES
    }
    assert mate["Bram"] > 20
    assert mate["Odile"] == mate["Wen"] == 0


def test_an_unknown_sample_is_refused_by_name() -> None:
    with pytest.raises(UnknownSample, match="expected one of Bram, Odile, Wen, got 'Nobody'"):
        load("Nobody")


async def test_samples_are_brought_in_whole_and_a_refresh_is_asked_for_each(store: Store) -> None:
    requests = Requests()
    assert await ensure_samples(store, requests) == NAMES
    assert requests.asked == [(name, "sample") for name in NAMES]
    for name in NAMES:
        assert [turn.id for turn in await store.turns(name)] == [turn.id for turn in history(name)]


async def test_bringing_samples_in_again_adds_nothing(store: Store) -> None:
    await ensure_samples(store, Requests())
    before = {name: len(await store.turns(name)) for name in NAMES}
    await ensure_samples(store, Requests())
    assert {name: len(await store.turns(name)) for name in NAMES} == before


async def test_a_sample_that_had_a_refresh_is_not_refreshed_again_at_the_next_start(store: Store) -> None:
    await ensure_samples(store, Requests())
    refused = VersionRecord(
        version=await store.next_version("Wen"),
        parent=0,
        created_at=datetime(2025, 11, 1, tzinfo=UTC),
        accepted=False,
        reason="no measurable change",
        numbers={},
        examples=10,
        turn_ids=(),
    )
    await store.add_version("Wen", refused)
    requests = Requests()
    assert await ensure_samples(store, requests) == ["Bram", "Odile"]
    assert [user for user, _ in requests.asked] == ["Bram", "Odile"]
