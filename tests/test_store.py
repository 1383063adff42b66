"""The store against a real Redis: what is kept, in which order, and who may still write."""

import asyncio
import json
import random
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from redis.asyncio import Redis

from personalization.history import InvalidTurn, Turn, dump, effective, learned, parse
from personalization.store import (
    APPEND_BATCH,
    EventsExpired,
    Forgotten,
    HistoryForgotten,
    LeaseLost,
    Pointer,
    Standing,
    Store,
    UnknownResponse,
    UnknownTurn,
    VersionRecord,
)
from tests.redis_fixture import SECRET

NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)


def turn(name: str, minute: int = 0, role: str = "user", **fields: object) -> Turn:
    author = "person" if role == "user" else "model"
    at = NOON + timedelta(minutes=minute)
    whole = {"conversation": "c", "text": f"text of {name}", "author": author, "role": role, "at": at}
    return Turn(id=name, **(whole | fields))


def reply(name: str, minute: int = 0, **fields: object) -> Turn:
    return turn(name, minute, "assistant", **fields)


def ids(turns: list[Turn]) -> list[str]:
    return [turn.id for turn in turns]


# Turns


async def test_what_is_appended_is_read_back_whole(store: Store) -> None:
    said = [
        turn("a", text="Grüße ☕\x00\n", at=NOON + timedelta(microseconds=1)),
        reply("b", 1, rating="up", version=3),
        reply("c", 2, author="person", corrects="unseen", removed=True, conversation="d:e/ü"),
    ]
    assert await store.append("ann", said) == 3
    assert await store.turns("ann") == said


async def test_turns_are_ordered_by_time_and_ties_by_arrival(store: Store) -> None:
    await store.append("ann", [turn("z", 5), turn("y", 5), turn("late", 9)])
    await store.append("ann", [turn("a", 5), turn("early", 1)])
    assert ids(await store.turns("ann")) == ["early", "z", "y", "a", "late"]


async def test_appending_again_changes_nothing(store: Store) -> None:
    said = [turn("a"), reply("b", 1)]
    assert await store.append("ann", said) == 2
    assert await store.append("ann", [*said, turn("a", 7, text="other words")]) == 0
    assert await store.turns("ann") == said


async def test_recent_gives_the_newest_turns_oldest_first(store: Store) -> None:
    await store.append("ann", [turn(f"t{minute}", minute) for minute in range(9)])
    assert ids(await store.recent("ann", 3)) == ["t6", "t7", "t8"]
    assert len(await store.recent("ann", 100)) == 9
    assert await store.recent("ann", 0) == []


async def test_a_long_import_keeps_its_order_across_batches(store: Store) -> None:
    said = [turn(f"t{number}") for number in range(2 * APPEND_BATCH + 5)]
    assert await store.append("ann", said) == len(said)
    assert await store.turns("ann") == said


async def test_two_people_share_nothing_even_with_the_same_turn_ids(store: Store) -> None:
    await store.append("ann", [turn("t", text="ann's")])
    await store.append("bob", [turn("t", text="bob's")])
    await store.rate("bob", "t", "down")
    assert [(turn.text, turn.rating) for turn in await store.turns("ann")] == [("ann's", None)]
    assert [(turn.text, turn.rating) for turn in await store.turns("bob")] == [("bob's", "down")]


async def test_conversations_are_listed_newest_first_with_title_time_and_size(store: Store) -> None:
    await store.append("ann", [turn("a", 1, conversation="old"), reply("b", 2, conversation="old")])
    await store.append("ann", [turn("c", 5, conversation="new", text="  What a\nlong " + "day " * 40)])
    new, old = await store.conversations("ann")
    assert (old.id, old.title, old.last_at, old.turns) == ("old", "text of a", NOON + timedelta(minutes=2), 2)
    assert (new.id, new.last_at, new.turns) == ("new", NOON + timedelta(minutes=5), 1)
    assert new.title.startswith("What a long day")
    assert len(new.title) <= 80
    assert new.title.endswith("…")
    assert [each.id for each in await store.conversations("ann", limit=1)] == ["new"]


async def test_an_older_turn_that_arrives_late_does_not_make_its_conversation_older(store: Store) -> None:
    await store.append("ann", [turn("a", 5)])
    await store.append("ann", [turn("b", 1)])
    (summary,) = await store.conversations("ann")
    assert (summary.last_at, summary.title) == (NOON + timedelta(minutes=5), "text of b")


async def test_one_conversation_is_read_without_the_others(store: Store) -> None:
    await store.append("ann", [turn("a", 1), turn("b", 2, conversation="other"), reply("d", 3)])
    assert ids(await store.conversation("ann", "c")) == ["a", "d"]
    assert await store.conversation("ann", "no such") == []
    assert await store.conversation("bob", "c") == []


async def test_a_rating_can_be_given_changed_and_taken_back(store: Store) -> None:
    await store.append("ann", [reply("b")])
    for rating in ("up", "down", None):
        await store.rate("ann", "b", rating)
        assert (await store.turn("ann", "b")).rating == rating


@pytest.mark.parametrize("act", ["rate", "correct", "remove", "read"])
async def test_a_turn_that_is_not_this_persons_is_unknown(store: Store, act: str) -> None:
    await store.append("bob", [reply("b")])
    acts: dict[str, Callable[[], object]] = {
        "rate": lambda: store.rate("ann", "b", "up"),
        "correct": lambda: store.correct("ann", "b", "better"),
        "remove": lambda: store.remove_turn("ann", "b"),
        "read": lambda: store.turn("ann", "b"),
    }
    with pytest.raises(UnknownTurn, match="'b'") as caught:
        await acts[act]()
    assert caught.value.turn_id == "b"
    assert await store.turns("bob") == [reply("b")]


async def test_a_correction_stands_after_its_original_and_takes_its_place_in_learning(store: Store) -> None:
    await store.append("ann", [turn("a"), reply("b", 1, rating="up"), turn("d", 2)])
    correction = await store.correct("ann", "b", "better")
    assert (correction.role, correction.author, correction.corrects) == ("assistant", "person", "b")
    said = await store.turns("ann")
    assert ids(said) == ["a", "b", correction.id, "d"]
    assert [learned(each) for each in said] == [True, False, True, True]


async def test_a_second_correction_replaces_the_first_even_when_made_of_the_first(store: Store) -> None:
    await store.append("ann", [reply("b")])
    first = await store.correct("ann", "b", "better")
    second = await store.correct("ann", first.id, "best")
    assert second.corrects == "b"
    assert [each.id for each in await store.turns("ann") if learned(each)] == [second.id]
    assert await store.learned_count("ann") == 1


@pytest.mark.parametrize("late", ["made here", "brought in"])
async def test_the_newest_correction_is_the_one_that_came_last_whatever_its_time(
    store: Store, late: str
) -> None:
    brought = reply("first", 5, author="person", corrects="b")
    await store.append("ann", [turn("a"), reply("b", 1), brought])
    if late == "made here":
        newest = (await store.correct("ann", "b", "best")).id  # in the place of what it corrects
    else:
        await store.append("ann", [reply("second", 3, author="person", corrects="b")])
        newest = "second"
    said = await store.turns("ann")
    assert [each.id for each in said if learned(each)] == ["a", newest]
    assert ids(effective(said)) == ["a", newest]
    assert await store.learned_count("ann") == 2


async def test_a_correction_takes_the_place_of_all_there_were_of_corrections_too(store: Store) -> None:
    first = reply("first", 2, author="person", corrects="b")
    second = reply("second", 3, author="person", corrects="first")
    await store.append("ann", [reply("b", 1), first, second])
    newest = (await store.correct("ann", "b", "best of all")).id
    said = await store.turns("ann")
    assert [each.id for each in said if learned(each)] == ids(effective(said)) == [newest]
    assert await store.learned_count("ann") == 1


async def test_turns_that_correct_each_other_hold_nobody_up(store: Store) -> None:
    around = [reply(name, author="person", corrects=other) for name, other in ("bc", "cb", "dd")]
    later = [reply(f"of {name}", 1, author="person", corrects=name) for name in "bcd"]
    assert await store.append("ann", [*around, *later]) == 6
    assert [each.id for each in await store.turns("ann") if learned(each)] == ["of c", "of d"]


async def test_a_history_brought_to_another_person_keeps_which_correction_is_the_newest(store: Store) -> None:
    brought = reply("first", 5, author="person", corrects="b")
    await store.append("ann", [turn("a"), reply("b", 1), brought])
    newest = (await store.correct("ann", "b", "best")).id  # stands before the one that it replaced
    lines = [line.encode() for line in dump("bob", await store.turns("ann"))]
    await store.append("bob", parse(lines).turns["bob"])
    assert [each.id for each in await store.turns("bob") if learned(each)] == ["a", newest]
    assert await store.learned_count("bob") == 2
    again = (await store.correct("bob", "b", "better still")).id
    assert [each.id for each in await store.turns("bob") if learned(each)] == ["a", again]


async def test_a_long_chain_of_corrections_of_corrections_holds_nobody_up(store: Store, redis: Redis) -> None:
    chain = [reply(f"c{n}", author="person", corrects=f"c{n - 1}") for n in range(1, 1_000)]
    await store.append("ann", [reply("c0"), *chain])
    await redis.config_resetstat()
    await store.append("ann", [reply(f"of c{n}", author="person", corrects=f"c{n}") for n in range(50)])
    assert (await redis.info("commandstats"))["cmdstat_hget"]["calls"] < 5_000


async def test_a_correction_of_who_is_forgotten_meanwhile_is_not_kept(store: Store, redis: Redis) -> None:
    class ForgottenMeanwhile(Store):
        async def turn(self, user: str, turn_id: str) -> Turn:
            found = await super().turn(user, turn_id)
            await self.forget(user)
            return found

    await store.append("ann", [reply("b")])
    with pytest.raises(HistoryForgotten):
        await ForgottenMeanwhile(redis, SECRET).correct("ann", "b", "better")
    assert await store.turns("ann") == []


async def test_only_replies_can_be_corrected(store: Store) -> None:
    await store.append("ann", [turn("a")])
    with pytest.raises(InvalidTurn, match="expected an assistant's turn to correct, got 'user'"):
        await store.correct("ann", "a", "better")


async def test_a_removed_turn_stays_in_the_conversation_and_is_never_learned(store: Store) -> None:
    await store.append("ann", [turn("a"), reply("b", 1)])
    await store.remove_turn("ann", "a")
    await store.remove_turn("ann", "b")
    await store.rate("ann", "b", "up")
    assert [(each.id, each.removed) for each in await store.turns("ann")] == [("a", True), ("b", True)]
    assert await store.learned_count("ann") == 0


async def test_a_long_history_comes_and_goes_in_parts_that_hold_nobody_up(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = [turn(f"t{number}", number) for number in range(2_500)]
    await store.append("ann", said)
    sizes: list[int] = []
    execute = store._redis.execute_command

    async def note(*command: Any, **options: Any) -> Any:
        answer = await execute(*command, **options)
        parts = [command, answer, *(answer if isinstance(answer, tuple | list) else ())]
        sizes.extend(len(part) for part in parts if isinstance(part, tuple | list | set))
        return answer

    monkeypatch.setattr(store._redis, "execute_command", note)
    names = ids(said)
    assert await store.turns("ann") == await store.conversation("ann", "c") == said
    assert await store.learned_ids("ann") == set(names)
    await store.mark_refreshed("ann", names)
    assert await store.learned_since_refresh("ann") == 0
    assert max(sizes) < 1_200


async def test_what_is_put_in_while_a_history_is_read_doubles_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("personalization.store.READ_BATCH", 3)
    await store.append("ann", [turn(f"t{number}", number) for number in range(1, 9)])
    join = store._join_turns

    async def put_in(user: str, names: Sequence[bytes]) -> list[Turn]:
        await store.append("ann", [turn("early", 0)])
        return await join(user, names)

    monkeypatch.setattr(store, "_join_turns", put_in)
    assert ids(await store.turns("ann")) == [f"t{number}" for number in range(1, 9)]


# What a refresh has seen


async def test_learned_turns_are_fresh_until_a_refresh_has_seen_them(store: Store) -> None:
    await store.append("ann", [turn("a"), reply("b", 1), turn("d", 2), turn("blank", 3, text=" ")])
    assert await store.learned_since_refresh("ann") == 2
    await store.mark_refreshed("ann", ["a", "b"])
    assert await store.learned_since_refresh("ann") == 1
    assert await store.learned_count("ann") == 2
    await store.append("ann", [turn("a"), turn("e", 4)])
    assert await store.learned_since_refresh("ann") == 2


async def test_a_reply_that_is_rated_up_becomes_fresh_and_one_rated_down_leaves(store: Store) -> None:
    await store.append("ann", [reply("b")])
    await store.rate("ann", "b", "up")
    assert await store.learned_since_refresh("ann") == 1
    await store.rate("ann", "b", "down")
    assert await store.learned_since_refresh("ann") == 0


@pytest.mark.parametrize("seed", range(8))
async def test_the_counts_agree_with_the_rule_after_anything_people_do(store: Store, seed: int) -> None:
    rng = random.Random(seed)
    names = [f"t{number}" for number in range(8)]
    for _ in range(60):
        name = rng.choice(names)
        known = ids(await store.turns("ann"))
        match rng.choice(["append", "rate", "correct", "remove"]):
            case "append":
                role, text = rng.choice(["user", "assistant"]), rng.choice(["hi", " "])
                await store.append("ann", [turn(name, rng.randrange(9), role, text=text)])
            case "rate" if name in known:
                await store.rate("ann", name, rng.choice(["up", "down", None]))
            case "correct" if known:
                target = await store.turn("ann", rng.choice(known))
                if target.role == "assistant":
                    await store.correct("ann", target.id, "better")
            case "remove" if name in known:
                await store.remove_turn("ann", name)
        to_learn = [each.id for each in await store.turns("ann") if learned(each)]
        assert await store.learned_count("ann") == len(to_learn)
        assert await store.learned_since_refresh("ann") == len(to_learn)


# The adapter


async def test_everyone_begins_on_the_bare_base(store: Store) -> None:
    assert await store.pointer("nobody") == Pointer(0, None, 0)


async def test_the_pointer_moves_only_from_where_it_is_expected(redis: Redis) -> None:
    store = Store(redis, SECRET, clock=lambda: NOON)
    assert await store.compare_and_set("ann", 0, 1)
    assert not await store.compare_and_set("ann", 0, 1)
    assert not await store.compare_and_set("ann", 0, 2)
    assert await store.compare_and_set("ann", 1, 2)
    assert await store.pointer("ann") == Pointer(2, NOON, 0)
    assert (await store.pointer("bob")).version == 0


async def test_of_many_that_publish_at_once_one_wins(store: Store) -> None:
    versions = [await store.next_version("ann") for _ in range(20)]
    won = await asyncio.gather(*(store.compare_and_set("ann", 0, version) for version in versions))
    assert won.count(True) == 1
    assert (await store.pointer("ann")).version == versions[won.index(True)]


async def test_version_numbers_are_never_given_out_twice(store: Store) -> None:
    numbers = await asyncio.gather(*(store.next_version("ann") for _ in range(20)))
    assert sorted(numbers) == list(range(1, 21))
    await store.compare_and_set("ann", 0, 30)
    assert await store.next_version("ann") == 31


async def test_version_records_are_kept_in_order_and_never_change(store: Store) -> None:
    second = VersionRecord(2, 1, NOON, False, "no gain", {"gain": -0.01}, 12, ("a", "b"))
    first = VersionRecord(1, 0, NOON, True, "better", {"gain": 0.1}, population=3, anew=True)
    await store.add_version("ann", second)
    await store.add_version("ann", first)
    await store.add_version("ann", VersionRecord(1, 0, NOON, False, "rewritten"))
    assert await store.versions("ann") == [first, second]
    assert await store.next_version("ann") == 3


async def test_a_record_that_does_not_say_so_is_of_no_version_trained_anew(
    store: Store, redis: Redis
) -> None:
    await store.add_version("ann", VersionRecord(2, 1, NOON, True, "better", turn_ids=("a",), anew=True))
    key = store._key("ann", "versions")
    old = json.loads(await redis.hget(key, "2") or b"")
    del old["anew"]
    await redis.hset(key, "2", json.dumps(old))
    (record,) = await store.versions("ann")
    assert (record.parent, record.turn_ids, record.anew) == (1, ("a",), False)


async def test_users_are_those_with_turns_or_versions(store: Store) -> None:
    await store.append("ann", [turn("a")])
    await store.add_version("bob", VersionRecord(1, 0, NOON, True, "imported"))
    await store.append("carol", [])
    await store.pointer("dave")
    assert sorted([user async for user in store.users()]) == ["ann", "bob"]


async def test_all_of_many_users_are_found_once(store: Store) -> None:
    names = [f"user {number}" for number in range(1_200)]
    for first in range(0, len(names), 100):
        await asyncio.gather(*(store.append(name, [turn("a")]) for name in names[first : first + 100]))
    assert sorted([user async for user in store.users()]) == sorted(names)


def test_an_adapter_id_is_64_hex_characters_and_depends_on_the_secret(store: Store, redis: Redis) -> None:
    named = store.adapter_id("ann")
    assert len(named) == 64
    assert int(named, 16) > 0
    assert named == Store(redis, SECRET).adapter_id("ann") != Store(redis, b"other").adapter_id("ann")
    assert named != store.adapter_id("Ann")


# Forgetting


async def everything_of(store: Store, user: str) -> None:
    """Leave a trace of the person in every kind of key."""
    await store.append(user, [turn("a"), reply("b", 1), turn("d", 2, conversation="other")])
    await store.rate(user, "b", "up")
    await store.correct(user, "b", "better")
    await store.remove_turn(user, "d")
    version = await store.next_version(user)
    await store.add_version(user, VersionRecord(version, 0, NOON, True, "better"))
    await store.compare_and_set(user, 0, version)
    await store.publish_progress(user, {"job_id": "j", "state": "training"})
    await store.create_response(user, f"{user}-1", b"{}", holder="g", lease_s=9, ttl_s=90)
    await store.append_response_events(f"{user}-1", 0, [b"words"], holder="g", ttl_s=90)
    await store.create_response(user, f"{user}-2", b"{}", holder="g", lease_s=9, ttl_s=90)
    await store.finish_response(f"{user}-2", "completed", b"{}", holder="g", ttl_s=90)


async def test_forget_leaves_nothing_but_a_nameless_tombstone_and_says_what_it_took(
    store: Store, redis: Redis
) -> None:
    await everything_of(store, "ann")
    before = set(await redis.keys("*"))
    forgotten = await store.forget("ann")
    life = f"attune:life:{store.adapter_id('ann')}".encode()
    assert await redis.keys("*") == [life]
    kept = await redis.hgetall(life)
    assert abs(int(kept.pop(b"forgotten")) / 1e6 - datetime.now(UTC).timestamp()) < 60
    assert kept == {b"epoch": b"1", b"version": b"1", b"floor": b"1"}
    assert forgotten == Forgotten(4, 2, 1, 2, forgotten.keys, 1)
    assert forgotten.keys == len(before - {life, b"attune:users", b"attune:responses:running"})


async def test_forget_takes_nothing_of_anyone_else(store: Store, redis: Redis) -> None:
    await everything_of(store, "bob")
    before = {key: await redis.dump(key) for key in await redis.keys("*")}
    await everything_of(store, "ann")
    await store.forget("ann")
    kept = [key for key in await redis.keys("*") if key != f"attune:life:{store.adapter_id('ann')}".encode()]
    assert {key: await redis.dump(key) for key in kept} == before


async def test_forgetting_someone_unknown_finds_nothing(store: Store) -> None:
    assert await store.forget("nobody") == Forgotten(0, 0, 0, 0, 0, 1)


async def test_work_from_before_a_forget_can_write_nothing(store: Store, redis: Redis) -> None:
    await everything_of(store, "ann")
    epoch, before = (await store.pointer("ann")).epoch, datetime.now(UTC)
    await store.forget("ann")
    late = [
        lambda: store.append("ann", [turn("ghost")], epoch=epoch),
        lambda: store.next_version("ann", epoch=epoch),
        lambda: store.add_version("ann", VersionRecord(9, 0, NOON, True, "late"), epoch=epoch),
        lambda: store.mark_refreshed("ann", ["a"], epoch=epoch),
        lambda: store.publish_progress("ann", {"state": "gating"}, epoch=epoch),
        lambda: store.create_response("ann", "r", b"{}", holder="g", lease_s=9, ttl_s=9, epoch=epoch),
        lambda: store.append("ann", [turn("ghost")], begun=before),
        lambda: store.create_response("ann", "r", b"{}", holder="g", lease_s=9, ttl_s=9, begun=before),
    ]
    for write in late:
        with pytest.raises(HistoryForgotten) as caught:
            await write()
        assert caught.value.user == "ann"
    assert not await store.compare_and_set("ann", 0, 9, epoch=epoch)
    with pytest.raises(UnknownResponse):
        await store.append_response_events("ann-1", 1, [b"ghost"], holder="g", ttl_s=90)
    assert await redis.keys("*") == [f"attune:life:{store.adapter_id('ann')}".encode()]


async def test_a_version_from_before_a_forget_is_refused_even_without_the_epoch(store: Store) -> None:
    await store.append("ann", [turn("a")])
    version = await store.next_version("ann")
    await store.forget("ann")
    assert not await store.compare_and_set("ann", 0, version)
    with pytest.raises(HistoryForgotten):
        await store.add_version("ann", VersionRecord(version, 0, NOON, True, "late"))
    assert [user async for user in store.users()] == []


async def test_a_person_may_come_back_after_a_forget_as_new(store: Store) -> None:
    await everything_of(store, "ann")
    await store.forget("ann")
    pointer = await store.pointer("ann")
    assert (pointer.version, pointer.epoch) == (0, 1)
    assert await store.append("ann", [turn("a", text="hello again")], epoch=pointer.epoch) == 1
    assert [each.text for each in await store.turns("ann")] == ["hello again"]
    assert await store.append("ann", [turn("b")], begun=datetime.now(UTC)) == 1
    now = datetime.now(UTC)
    assert await store.create_response("ann", "r", b"{}", holder="g", lease_s=9, ttl_s=9, begun=now)
    version = await store.next_version("ann", epoch=pointer.epoch)
    assert version == 2
    assert await store.compare_and_set("ann", 0, version, epoch=pointer.epoch)


# News


async def test_whoever_listens_hears_of_every_move_progress_and_forget(store: Store) -> None:
    async with store.events() as events:
        await store.compare_and_set("ann", 0, 1)
        await store.publish_progress("ann", {"job_id": "j", "state": "training", "progress": 0.5})
        await store.forget("ann")
        heard = [await anext(events) for _ in range(3)]
    adapter = store.adapter_id("ann")
    assert heard == [
        {"type": "adapter.updated", "user": "ann", "adapter": adapter, "from": 0, "to": 1},
        {"type": "adapter.refresh", "user": "ann", "job_id": "j", "state": "training", "progress": 0.5},
        {"type": "adapter.forgotten", "user": "ann", "adapter": adapter},
    ]


async def test_nothing_is_missed_from_the_moment_the_block_is_entered(store: Store) -> None:
    for version in range(30):
        async with store.events() as events:
            await store.compare_and_set("ann", version, version + 1)
            assert (await anext(events))["to"] == version + 1


async def test_a_pointer_that_did_not_move_is_no_news(store: Store) -> None:
    async with store.events() as events:
        await store.compare_and_set("ann", 7, 8)
        await store.compare_and_set("ann", 0, 1)
        assert (await anext(events))["to"] == 1


async def test_the_newest_progress_waits_for_those_who_come_later(store: Store) -> None:
    assert await store.progress("ann") is None
    await store.publish_progress("ann", {"state": "queued"})
    await store.publish_progress("ann", {"state": "completed", "to": 1})
    assert await store.progress("ann") == {"state": "completed", "to": 1}


# Replies under way


async def begin(store: Store, user: str = "ann", holder: str = "g1", lease_s: float = 30) -> bool:
    return await store.create_response(user, "r", b"asked", holder=holder, lease_s=lease_s, ttl_s=60)


async def test_a_reply_is_recorded_followed_and_finished(store: Store) -> None:
    assert await begin(store)
    await store.append_response_events("r", 0, [b"zero", b"one"], holder="g1", ttl_s=60)
    await store.append_response_events("r", 2, [b"two"], holder="g1", ttl_s=60)
    assert await store.read_response_events("r") == [(0, b"zero"), (1, b"one"), (2, b"two")]
    assert await store.read_response_events("r", after=1) == [(2, b"two")]
    assert await store.read_response_events("r", after=2) == []
    await store.finish_response("r", "completed", b"answer", holder="g1", ttl_s=60)
    record = await store.response("ann", "r")
    assert (record.user, record.state, record.body) == ("ann", "completed", b"answer")
    assert await store.orphans() == []


async def test_a_response_id_is_taken_once(store: Store) -> None:
    assert await begin(store)
    assert not await begin(store, holder="g2")
    assert not await begin(store, user="bob")
    assert (await store.response("ann", "r")).user == "ann"


async def test_another_persons_response_is_as_unknown_as_none(store: Store) -> None:
    await begin(store)
    with pytest.raises(UnknownResponse) as others:
        await store.response("bob", "r")
    with pytest.raises(UnknownResponse) as none:
        await store.response("bob", "q")
    assert str(others.value).replace("'r'", "'q'") == str(none.value)


async def test_events_sent_again_are_there_once(store: Store) -> None:
    await begin(store)
    await store.append_response_events("r", 0, [b"zero", b"one"], holder="g1", ttl_s=60)
    await store.append_response_events("r", 0, [b"zero", b"one", b"two"], holder="g1", ttl_s=60)
    assert await store.read_response_events("r") == [(0, b"zero"), (1, b"one"), (2, b"two")]


async def test_whoever_asks_for_trimmed_events_is_told(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("personalization.store.MAX_RESPONSE_EVENTS", 3)
    await begin(store)
    await store.append_response_events("r", 0, [b"words"] * 10, holder="g1", ttl_s=60)
    assert [number for number, _ in await store.read_response_events("r", after=6)] == [7, 8, 9]
    with pytest.raises(EventsExpired, match="expected event 5 of response 'r', got 7") as caught:
        await store.read_response_events("r", after=4)
    assert caught.value.oldest == 7


async def test_a_response_that_is_gone_is_unknown(store: Store) -> None:
    with pytest.raises(UnknownResponse):
        await store.read_response_events("r")
    with pytest.raises(UnknownResponse):
        await store.append_response_events("r", 0, [b"zero"], holder="g1", ttl_s=60)
    with pytest.raises(UnknownResponse):
        await store.finish_response("r", "completed", b"", holder="g1", ttl_s=60)
    assert not await store.claim_response("r", holder="g1", lease_s=30)


async def test_a_held_reply_is_nobody_elses_and_its_holder_may_renew(store: Store) -> None:
    await begin(store)
    assert await store.orphans() == []
    assert not await store.claim_response("r", holder="g2", lease_s=30)
    assert await store.claim_response("r", holder="g1", lease_s=30)


async def test_of_many_gateways_exactly_one_adopts_an_orphan(store: Store) -> None:
    await begin(store, lease_s=0.03)
    await asyncio.sleep(0.06)
    assert await store.orphans() == ["r"]
    adopted = await asyncio.gather(
        *(store.adopt_response("r", holder=f"g{number}", lease_s=30) for number in range(2, 12))
    )
    (record,) = [each for each in adopted if each is not None]
    assert (record.id, record.user, record.body) == ("r", "ann", b"asked")
    assert await store.orphans() == []


async def test_a_gateway_that_lost_its_lease_can_write_no_more(store: Store) -> None:
    await begin(store, lease_s=0.03)
    await asyncio.sleep(0.06)
    await store.adopt_response("r", holder="g2", lease_s=30)
    with pytest.raises(LeaseLost, match="'r'"):
        await store.append_response_events("r", 0, [b"late"], holder="g1", ttl_s=60)
    with pytest.raises(LeaseLost):
        await store.finish_response("r", "completed", b"", holder="g1", ttl_s=60)
    assert await store.read_response_events("r") == []


async def test_a_finished_reply_is_nobodys_to_adopt(store: Store) -> None:
    await begin(store)
    await store.finish_response("r", "completed", b"", holder="g1", ttl_s=60)
    assert await store.adopt_response("r", holder="g2", lease_s=30) is None


async def test_a_reply_and_its_events_go_when_their_time_is_over(store: Store, redis: Redis) -> None:
    await begin(store)
    await store.append_response_events("r", 0, [b"zero"], holder="g1", ttl_s=60)
    await store.finish_response("r", "completed", b"", holder="g1", ttl_s=0.03)
    await asyncio.sleep(0.06)
    with pytest.raises(UnknownResponse):
        await store.response("ann", "r")
    assert await redis.keys("attune:response:*") == []


async def test_an_orphan_whose_record_has_run_out_leaves_the_list(store: Store, redis: Redis) -> None:
    await store.create_response("ann", "r", b"", holder="g1", lease_s=0.02, ttl_s=0.02)
    await asyncio.sleep(0.06)
    assert await store.orphans() == ["r"]
    assert await store.adopt_response("r", holder="g2", lease_s=30) is None
    assert await store.orphans() == []


# Tickets


async def test_a_ticket_is_taken_once_by_one_of_many(store: Store) -> None:
    await store.put_ticket("hash", b"ann", ttl_s=60)
    taken = await asyncio.gather(*(store.take_ticket("hash") for _ in range(20)))
    assert sorted(taken, key=bool)[-1] == b"ann"
    assert taken.count(None) == 19


async def test_a_ticket_runs_out(store: Store) -> None:
    await store.put_ticket("hash", b"ann", ttl_s=0.02)
    await asyncio.sleep(0.05)
    assert await store.take_ticket("hash") is None


async def test_the_standing_says_what_is_new_and_how_the_last_refresh_did(store: Store) -> None:
    assert await store.standing("ann") == Standing(0, 0, None)
    await store.append("ann", [turn("a"), turn("b", 1), turn("c", 2)])
    records = [
        VersionRecord(1, 0, NOON, True, "better", {"gain": 0.1}, 1, ("a",)),
        VersionRecord(2, 1, NOON, False, "worse", {"gain": -0.1}, 1, ("a", "b")),
    ]
    for record in records:
        assert await store.next_version("ann") == record.version
        await store.add_version("ann", record)
    await store.compare_and_set("ann", 0, 1)
    await store.mark_refreshed("ann", ["a", "b"])
    assert await store.standing("ann") == Standing(3, 1, records[1])
    await store.remove_turn("ann", "b")
    assert await store.standing("ann") == Standing(2, 1, records[1])
