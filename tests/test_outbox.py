"""A socket's outbox: order, merging, bounds."""

import asyncio

import pytest

from service.events import Pong, TextDelta
from service.outbox import Outbox, OutboxFull


def delta(number: int, text: str = "x", reply: str = "resp_1") -> TextDelta:
    return TextDelta(response_id=reply, sequence_number=number, item_id="msg_1", delta=text)


async def drain(outbox: Outbox) -> list[object]:
    return [await outbox.get() for _ in range(len(outbox))]


async def test_few_events_leave_as_they_came() -> None:
    outbox = Outbox(merge_above=4)
    events = [delta(0), delta(1), Pong(id=1), delta(2)]
    for event in events:
        outbox.put(event)
    assert await drain(outbox) == events


async def test_text_merges_when_it_piles_up_and_keeps_the_last_number() -> None:
    outbox = Outbox(merge_above=2)
    for number, text in enumerate("abcdef"):
        outbox.put(delta(number, text))
    first, second = await drain(outbox)
    assert (first, second) == (delta(0, "a"), delta(5, "bcdef"))


async def test_replies_merge_each_with_itself_and_never_across_another_event_of_theirs() -> None:
    outbox = Outbox(merge_above=1)
    done = TextDelta(response_id="resp_1", sequence_number=9, item_id="msg_1", delta="")
    outbox.put(delta(0, "a", "resp_1"))
    outbox.put(delta(0, "A", "resp_2"))
    outbox.put(delta(1, "b", "resp_1"))
    outbox.put(delta(1, "B", "resp_2"))
    assert await drain(outbox) == [delta(1, "ab", "resp_1"), delta(1, "AB", "resp_2")]
    outbox.put(delta(2, "c"))
    outbox.put(Pong(id=1))
    outbox.put(done)
    assert len(outbox) == 2


async def test_text_sent_anew_is_not_merged_into_what_came_after_it() -> None:
    outbox = Outbox(merge_above=2)
    for number, text in enumerate("abcd"):
        outbox.put(delta(number, text))
    for number, text in enumerate("abcd"):  # a resume from the beginning
        outbox.put(delta(number, text))
    assert await drain(outbox) == [delta(0, "a"), delta(3, "bcd"), delta(3, "abcd")]


async def test_a_reader_that_never_comes_fills_it() -> None:
    outbox = Outbox(max_events=3, merge_above=10)
    for number in range(3):
        outbox.put(Pong(id=number))
    with pytest.raises(OutboxFull) as caught:
        outbox.put(Pong(id=3))
    assert caught.value.events == 4


async def test_merged_text_still_counts_against_the_bytes() -> None:
    outbox = Outbox(max_bytes=2_000, merge_above=1)
    for number in range(30):
        outbox.put(delta(number, "y" * 50))
    with pytest.raises(OutboxFull):
        outbox.put(delta(30, "y" * 1_000))
    assert len(outbox) == 1


async def test_one_event_of_any_size_fits_when_it_is_empty() -> None:
    outbox = Outbox(max_bytes=10)
    outbox.put(delta(0, "z" * 1_000))
    assert len(outbox) == 1


async def test_a_replay_waits_for_room() -> None:
    outbox = Outbox(merge_above=4)
    for number in range(6):
        outbox.put(Pong(id=number))
    waiting = asyncio.create_task(outbox.room(Pong(id=6)))
    await asyncio.sleep(0)
    assert not waiting.done()
    for _ in range(4):
        await outbox.get()
    await asyncio.wait_for(waiting, 30)


async def test_what_would_be_too_many_bytes_waits_until_it_is_not() -> None:
    outbox = Outbox(max_bytes=2_000)
    outbox.put(delta(0, "z" * 1_500))
    outbox.put(Pong(id=1))
    waiting = asyncio.create_task(outbox.room(delta(1, "z" * 1_500)))
    await asyncio.sleep(0)
    assert not waiting.done()
    await outbox.get()
    await asyncio.wait_for(waiting, 30)
    outbox.put(delta(1, "z" * 1_500))


async def test_get_waits_for_the_next_event() -> None:
    outbox = Outbox()
    waiting = asyncio.create_task(outbox.get())
    await asyncio.sleep(0)
    outbox.put(Pong(id=7))
    assert await asyncio.wait_for(waiting, 30) == Pong(id=7)
