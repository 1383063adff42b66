"""Trials: the arithmetic and the decision, the books in a real Redis, and replies of a real engine."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import websockets
from hypothesis import given
from hypothesis import strategies as st

from engine.adapter_files import version_folder, write_adapter
from personalization.history import Turn
from personalization.lineage import stand_ins
from personalization.store import Pointer, Store, Trial, TrialEnd, VersionRecord, Votes
from personalization.trial import Tally, TrialPolicy, above, decide, on_trial, settle
from service.session import SessionOptions
from tests.tiny_service import Running, TinyService, random_adapter

pytest_plugins = ("tests.service_fixtures",)

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)
POLICY = TrialPolicy(share=0.25)
votes = st.builds(Votes, st.integers(0, 30), st.integers(0, 30))


# The arithmetic


@given(votes, votes)
def test_the_closed_form_is_the_integral(one: Votes, other: Votes):
    steps = 2000
    points = [(at + 0.5) / steps for at in range(steps)]

    def density(p: float, seen: Votes) -> float:
        return p**seen.up * (1 - p) ** seen.down

    total_one, total_other = (sum(density(p, seen) for p in points) for seen in (one, other))
    below, found = 0.0, 0.0
    for p in points:
        step = density(p, other) / total_other
        found += density(p, one) / total_one * (below + step / 2)
        below += step
    assert above(one, other) == pytest.approx(found, abs=2e-3)
    assert above(one, other) + above(other, one) == pytest.approx(1, abs=1e-9)


# The decision


@pytest.mark.parametrize(
    ("replies", "tried", "before", "expected"),
    [
        (1, (0, 0), (0, 0), "goes on"),
        (29, (0, 0), (20, 1), "goes on"),
        (30, (0, 0), (20, 1), "promoted"),  # nobody complains
        (2, (0, 2), (10, 1), "rolled back"),
        (1, (0, 1), (10, 0), "goes on"),  # one vote is no verdict
        (5, (0, 3), (0, 0), "rolled back"),
        (9, (3, 3), (4, 4), "goes on"),
        (9, (5, 3), (18, 1), "rolled back"),  # not bad, but worse than before
        (6, (4, 0), (2, 2), "promoted"),
        (30, (4, 4), (6, 4), "rolled back"),  # in doubt, after long enough: the one that is known
        (30, (5, 4), (5, 5), "promoted"),
    ],
)
def test_ratings_decide_and_without_any_the_number_of_replies(replies, tried, before, expected):
    assert decide(Tally(replies, Votes(*tried), Votes(*before)), HOUR, POLICY) == expected


def test_a_trial_of_someone_who_seldom_writes_ends_by_time():
    tally = Tally(3, Votes(0, 0), Votes(0, 0))
    assert decide(tally, timedelta(days=13), POLICY) == "goes on"
    assert decide(tally, timedelta(days=14), POLICY) == "promoted"


@given(votes, votes, st.integers(0, 40), st.integers(1, 5))
def test_more_complaints_never_turn_a_roll_back_into_a_promotion(tried, before, replies, more):
    worse = replace(tried, down=tried.down + more)
    if decide(Tally(replies, tried, before), HOUR, POLICY) == "rolled back":
        assert decide(Tally(replies, worse, before), HOUR, POLICY) == "rolled back"


def test_the_share_is_kept_and_a_reply_asked_for_again_is_answered_by_the_same_version():
    pointer = Pointer(1, NOW, 0, Trial(2, 0.25, NOW))
    drawn = [on_trial(pointer, f"reply{number}", b"seed") for number in range(4000)]
    assert sum(drawn) == pytest.approx(1000, abs=110)  # four standard deviations
    assert drawn == [on_trial(pointer, f"reply{number}", b"seed") for number in range(4000)]
    other = [on_trial(pointer, f"reply{number}", b"other") for number in range(4000)]
    assert sum(a and b for a, b in zip(drawn, other, strict=True)) == pytest.approx(250, abs=70)
    assert not on_trial(replace(pointer, trial=None), "reply0", b"seed")


@pytest.mark.parametrize("wrong", [{"share": 1.0}, {"share": -0.1}, {"certainty": 0.5}, {"replies": 0}])
def test_a_policy_that_cannot_be_is_refused(wrong: dict[str, Any]):
    with pytest.raises(ValueError, match="expected"):
        TrialPolicy(**wrong)


# The books


def said(number: int, version: int, **fields: Any) -> Turn:
    at = datetime.now(UTC) + timedelta(seconds=number)
    whole = {"role": "assistant", "text": "a reply", "author": "model", "version": version} | fields
    return Turn(id=f"r{number}", conversation="c", at=at, **whole)


async def with_two_versions(store: Store, *, share: float = 0.5) -> None:
    """ann, on version 1, with version 2 on trial."""
    for version in (1, 2):
        assert await store.next_version("ann") == version
        await store.add_version("ann", VersionRecord(version, version - 1, NOW, True, "better"))
    assert await store.compare_and_set("ann", 0, 1)
    assert await store.begin_trial("ann", 1, 2, share)


async def test_a_trial_stands_beside_the_pointer_and_everyone_hears_of_it(store: Store):
    async with store.events() as events:
        await with_two_versions(store)
        assert (await anext(events))["type"] == "adapter.updated"
        told = await anext(events)
    assert (told["type"], told["version"], told["share"], told["state"]) == ("adapter.trial", 2, 0.5, "begun")
    pointer = await store.pointer("ann")
    assert (pointer.version, pointer.trial and (pointer.trial.version, pointer.trial.share)) == (1, (2, 0.5))
    assert not await store.begin_trial("ann", 7, 3, 0.5)  # another serves
    assert (await store.standing("ann")).trial


async def test_votes_and_corrections_are_counted_by_the_version_that_wrote(store: Store):
    await with_two_versions(store)
    imported = replace(said(8, 1), version=None)  # from elsewhere
    await store.append("ann", [*(said(n, 1 + n % 2) for n in range(8)), imported])
    for number, rating in ((0, "up"), (2, "up"), (4, "down"), (1, "up"), (3, "down"), (8, "up")):
        await store.rate("ann", f"r{number}", rating)
    await store.rate("ann", "r5", "up")
    await store.correct("ann", "r5", "rather this")
    assert await store.votes("ann") == {1: Votes(2, 1), 2: Votes(1, 2)}
    since = (await store.pointer("ann")).trial
    assert since is not None
    assert await store.replies_by("ann", 2, since=since.since) == 4
    assert await store.replies_by("ann", 2, since=(await store.turn("ann", "r4")).at) == 2


async def test_votes_on_what_another_installations_version_wrote_are_none_on_ours(store: Store):
    """An export brought to a new installation tells which versions wrote it; numbers begin anew there."""
    old = [replace(said(n, 1 + n % 2, rating="down"), at=NOW - timedelta(days=n)) for n in range(1, 9)]
    await store.append("ann", old)
    await with_two_versions(store)
    await store.append("ann", [said(9, 2), said(10, 0, rating="up")])
    await store.rate("ann", "r9", "up")
    assert await store.votes("ann") == {0: Votes(1, 0), 2: Votes(1, 0)}
    assert await settle(store, "ann", POLICY, datetime.now(UTC)) is None


async def test_ratings_that_fall_end_the_trial_and_the_version_before_answers_all(store: Store):
    await with_two_versions(store)
    await store.append("ann", [said(n, 1 + n % 2) for n in range(8)])
    for number in (0, 2, 4):
        await store.rate("ann", f"r{number}", "up")
    assert await settle(store, "ann", POLICY, datetime.now(UTC)) is None
    for number in (1, 3):
        await store.rate("ann", f"r{number}", "down")
    end = await settle(store, "ann", POLICY, datetime.now(UTC))
    assert end is not None
    assert (end.version, end.outcome, end.numbers["down"], end.numbers["before_up"]) == (
        2,
        "rolled back",
        2,
        3,
    )
    pointer = await store.pointer("ann")
    assert (pointer.version, pointer.trial) == (1, None)
    one, two = await store.versions("ann")
    assert (one.trial, two.trial) == (None, end)
    assert two.accepted
    three = VersionRecord(3, 1, NOW, True, "better", {}, 1, ("gone",), anew=True)
    assert stand_ins([one, two, three], set(), 3) == [1]
    assert await settle(store, "ann", POLICY, datetime.now(UTC)) is None


async def test_enough_replies_without_complaint_promote_it(store: Store):
    await with_two_versions(store)
    await store.append("ann", [said(n, 2) for n in range(30)])
    async with store.events() as events:
        end = await settle(store, "ann", POLICY, datetime.now(UTC))
        told = await anext(events)
    assert end is not None
    assert (end.outcome, end.numbers["replies"]) == ("promoted", 30)
    assert (told["type"], told["from"], told["to"]) == ("adapter.updated", 1, 2)
    pointer = await store.pointer("ann")
    assert (pointer.version, pointer.trial) == (2, None)


async def test_of_two_who_end_a_trial_one_does(store: Store):
    await with_two_versions(store)
    pointer = await store.pointer("ann")
    end = TrialEnd(2, 0.5, NOW, NOW, "rolled back")
    assert await store.begin_trial("ann", 1, 3, 0.5, end=replace(end, outcome="replaced"))
    assert not await store.end_trial("ann", end, epoch=pointer.epoch)
    assert not await store.compare_and_set("ann", 1, 2, epoch=pointer.epoch, trial=2, end=end)
    assert await store.compare_and_set("ann", 1, 3, epoch=pointer.epoch, trial=3, end=replace(end, version=3))
    assert (await store.versions("ann"))[1].trial == replace(end, outcome="replaced")


async def test_forgetting_leaves_nothing_of_a_trial_and_none_can_begin_from_before(store: Store):
    await with_two_versions(store)
    epoch = (await store.pointer("ann")).epoch
    await store.forget("ann")
    assert (await store.pointer("ann")).trial is None
    assert not await store.begin_trial("ann", 0, 2, 0.5, epoch=epoch)
    assert not await store.begin_trial("ann", 0, 2, 0.5)  # a number from before
    assert await store.versions("ann") == []


# Replies


@asynccontextmanager
async def trying(service: TinyService, share: float) -> AsyncIterator[Running]:
    """ann's version 1 answers, version 2 is on trial."""
    await service.give_adapter("ann", 1)
    version = await service.store.next_version("ann")
    folder = version_folder(service.adapter_root, service.store.adapter_id("ann"), version)
    model = service.model.loaded
    write_adapter(folder, random_adapter(model, 2), model.config, base_model="t")
    await service.store.add_version("ann", VersionRecord(version, 1, NOW, True, "better"))
    assert await service.store.begin_trial("ann", 1, version, share)
    options = SessionOptions(max_output_tokens=1, trial=replace(POLICY, replies=6), trial_seed=b"seed")
    async with service.gateway(session=options) as gateway:
        yield gateway


async def test_both_versions_answer_and_after_enough_replies_the_new_one_alone(service: TinyService):
    async with trying(service, 0.5) as gateway:
        client = gateway.client("ann")
        served: list[str] = []
        while (await service.store.pointer("ann")).trial is not None:
            assert len(served) < 60
            key = {"idempotency-key": f"key{len(served)}"}  # names the reply, so that all draw the same
            reply = await client.responses.create(model="me", input="hello", extra_headers=key)
            assert reply.metadata is not None
            served.append(reply.metadata["adapter_version"])
            await gateway.done_with(reply.id)  # the trial ends just after its last reply
        assert served.count("2") == 6
        assert "1" in served
        for _ in range(4):
            reply = await client.responses.create(model="me", input="hello")
            assert reply.metadata is not None
            assert reply.metadata["adapter_version"] == "2"


async def test_where_the_version_on_trial_cannot_be_loaded_the_one_that_serves_answers(service: TinyService):
    """And not one between them, which the person took back."""
    await service.give_adapter("ann", 1)
    await service.give_adapter("ann", 2)
    assert await service.store.compare_and_set("ann", 2, 1)
    tried = await service.store.next_version("ann")
    await service.store.add_version("ann", VersionRecord(tried, 1, NOW, True, "better"))  # but has no files
    assert await service.store.begin_trial("ann", 1, tried, 1.0)
    async with service.gateway() as gateway:
        reply = await gateway.client("ann").responses.create(model="me", input="hello", max_output_tokens=1)
        assert reply.metadata is not None
        assert reply.metadata["adapter_version"] == "1"
        assert f"version {tried} could not be loaded, version 1 answered" in reply.metadata["notice"]


async def test_complaints_on_the_socket_roll_it_back(service: TinyService):
    async with trying(service, 0.5) as gateway:
        await service.store.append("ann", [said(n, 1 + n % 2) for n in range(4)])
        await service.store.rate("ann", "r0", "up")
        url, protocols = gateway.socket_url, ["attune.v1.json"]
        headers = gateway.headers("ann")
        async with websockets.connect(url, subprotocols=protocols, additional_headers=headers) as connection:
            for number in (1, 3):
                rating = {"type": "feedback.create", "item_id": f"r{number}", "rating": "down"}
                await connection.send(json.dumps(rating))
            told: dict[str, Any] = {}
            while told.get("type") != "adapter.trial":
                told = json.loads(await asyncio.wait_for(connection.recv(), 60))
        assert told == {"type": "adapter.trial", "version": 2, "share": 0.5, "state": "rolled back"}
        assert (await service.store.pointer("ann")).trial is None


async def test_the_same_request_again_and_a_version_asked_for_by_number_are_not_drawn(service: TinyService):
    async with trying(service, 0.5) as gateway:
        client = gateway.client("ann")
        for number in range(4):
            reply = await client.responses.create(model="me@1", input="hello")
            assert reply.metadata is not None
            assert reply.metadata["adapter_version"] == "1"
            key = {"idempotency-key": f"key{number}"}
            first, again = [
                await client.responses.create(model="me", input="hello", extra_headers=key) for _ in range(2)
            ]
            assert first.id == again.id
            assert first.metadata == again.metadata
