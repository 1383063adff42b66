"""Limits per person and per address."""

import pytest

from service.errors import RateLimited
from service.limits import Limits, RateLimits


async def test_one_reply_too_many_says_when_to_come_back() -> None:
    limits = RateLimits(Limits(replies="2/minute"))
    await limits.reply("ann")
    await limits.reply("ann")
    with pytest.raises(RateLimited) as caught:
        await limits.reply("ann")
    assert caught.value.retry_after is not None
    assert 0 < caught.value.retry_after <= 60
    assert 1 <= int(caught.value.headers()["retry-after"]) <= 60


async def test_one_persons_limit_is_not_anothers() -> None:
    limits = RateLimits(Limits(replies="1/minute", messages="1/minute"))
    await limits.reply("ann")
    await limits.reply("ben")
    await limits.message("ann")


async def test_an_address_that_keeps_failing_is_shut_out_whoever_it_says_it_is() -> None:
    limits = RateLimits(Limits(address_failures="2/minute"))
    for _ in range(2):
        await limits.request("10.0.0.1")
        await limits.failure("10.0.0.1")
    with pytest.raises(RateLimited):
        await limits.request("10.0.0.1")
    await limits.request("10.0.0.2")


async def test_sockets_are_counted_while_they_are_open() -> None:
    limits = RateLimits(Limits(sockets_per_user=1))
    with limits.socket("ann"):
        with pytest.raises(RateLimited), limits.socket("ann"):
            pass
        with limits.socket("ben"):
            pass
    with limits.socket("ann"):
        pass


async def test_what_a_person_may_ask_is_chosen_and_ten_frames_go_with_each_reply() -> None:
    limits = RateLimits(Limits.for_replies(3))
    for _ in range(3):
        await limits.reply("ann")
    with pytest.raises(RateLimited, match="3 per 1 minute"):
        await limits.reply("ann")
    for _ in range(30):
        await limits.message("ann")
    with pytest.raises(RateLimited, match="30 per 1 minute"):
        await limits.message("ann")
