"""Asking the store: not too much at once, and not while it is known to be away."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog

from personalization.store import Store, StoreUnavailable
from service.metrics import Metrics

log = structlog.get_logger(__name__)
T = TypeVar("T")

CALLS_AT_ONCE = 48  # fewer than the client has connections: a call's deadline is for Redis, not for a queue


class StoreHealth:
    """The store is `away` from a call's failure until a ping succeeds. One failed call costs its whole
    timeout, so meanwhile nobody else pays it. For the first `patience_s` of an absence calls wait for its
    end, since most are restarts; after that they fail at once. `close` ends the pinging."""

    def __init__(
        self, store: Store, metrics: Metrics, *, patience_s: float = 3.0, every_s: float = 0.25
    ) -> None:
        self._store = store
        self._metrics = metrics
        self._patience_s = patience_s
        self._every_s = every_s
        self._slots = asyncio.Semaphore(CALLS_AT_ONCE)
        self._away_since = 0.0
        self._probe: asyncio.Task[None] | None = None
        self._here = asyncio.Event()
        self._here.set()
        metrics.store_up.set(1)

    @property
    def away(self) -> bool:
        return not self._here.is_set()

    async def ask(self, call: Callable[[], Awaitable[T]]) -> T:
        """What `call` answers. Raises StoreUnavailable, and what else `call` raises."""
        async with self._slots:
            if not await self.back():  # it may have gone while this stood in line
                raise StoreUnavailable("it has been away for a while")
            try:
                return await call()
            except StoreUnavailable:
                self.failed()
                raise

    async def back(self, patience_s: float | None = None) -> bool:
        """Whether the store is here, once it is or has been away for `patience_s`."""
        if self.away:
            patience = self._patience_s if patience_s is None else patience_s
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(self._away_since + patience):
                    await self._here.wait()
        return not self.away

    def failed(self) -> None:
        """A call raised StoreUnavailable."""
        if not self.away:
            log.warning("the store is away: replies go on unsaved until it is back")
            self._metrics.store_up.set(0)
            self._here.clear()
            self._away_since = asyncio.get_running_loop().time()
            self._probe = asyncio.create_task(self._wait_until_back(), name="store probe")

    async def close(self) -> None:
        if self._probe is not None:
            self._probe.cancel()
            await asyncio.gather(self._probe, return_exceptions=True)

    async def _wait_until_back(self) -> None:
        while True:
            try:
                await self._store.ping()
            except Exception:  # whatever it says, such as that a script keeps it busy: it is not back
                await asyncio.sleep(self._every_s)
            else:
                log.info("the store is back")
                self._metrics.store_up.set(1)
                self._here.set()
                return
