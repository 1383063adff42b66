"""How much one person and one address may ask. Counted in this process, so a store that is away stops
nobody."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Self

from limits import RateLimitItem, parse
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter

from service.errors import RateLimited


@dataclass(frozen=True)
class Limits:
    """Rates are written as the `limits` library reads them: "120/minute"."""

    replies: str = "120/minute"  # one person
    messages: str = "1200/minute"  # one person, every frame and request
    address_requests: str = "6000/minute"  # one address, whoever it says it is
    address_failures: str = "60/minute"  # one address, failed credentials
    sockets_per_user: int = 16
    replies_per_user: int = 8  # at once
    replies_per_socket: int = 4  # at once

    @classmethod
    def for_replies(cls, per_minute: int) -> Self:
        """Limits of a service where one person may ask for so many replies, and send ten frames for each."""
        return cls(replies=f"{per_minute}/minute", messages=f"{10 * per_minute}/minute")


@dataclass
class RateLimits:
    limits: Limits
    _storage: MemoryStorage = field(default_factory=MemoryStorage)
    _sockets: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._limiter = SlidingWindowCounterRateLimiter(self._storage)
        self._replies = parse(self.limits.replies)
        self._messages = parse(self.limits.messages)
        self._requests = parse(self.limits.address_requests)
        self._failures = parse(self.limits.address_failures)

    async def reply(self, user: str) -> None:
        """Each of these counts one and raises RateLimited when it is one too many."""
        await self._hit(self._replies, "replies", "user", user)

    async def message(self, user: str) -> None:
        await self._hit(self._messages, "messages", "user", user)

    async def request(self, address: str) -> None:
        await self._hit(self._requests, "requests", "address", address)
        if not await self._limiter.test(self._failures, "failures", address):
            raise RateLimited("too many failed credentials from this address", retry_after=60)

    async def failure(self, address: str) -> None:
        """Counts a failed credential; the next `request` of this address is refused when there were too
        many."""
        await self._limiter.hit(self._failures, "failures", address)

    @contextmanager
    def socket(self, user: str) -> Iterator[None]:
        """Holds one of the person's sockets. Raises RateLimited when they have too many."""
        held = self._sockets.get(user, 0)
        if held >= self.limits.sockets_per_user:
            raise RateLimited(f"at most {self.limits.sockets_per_user} sockets per user", retry_after=5)
        self._sockets[user] = held + 1
        try:
            yield
        finally:
            self._sockets[user] -= 1
            if not self._sockets[user]:
                del self._sockets[user]

    async def _hit(self, limit: RateLimitItem, what: str, whose: str, name: str) -> None:
        if not await self._limiter.hit(limit, what, name):
            window = await self._limiter.get_window_stats(limit, what, name)
            raise RateLimited(
                f"more than {limit} {what} from one {whose}", retry_after=window.reset_time - time.time()
            )
