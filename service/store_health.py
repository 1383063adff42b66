"""Whether the store answers. One failed call costs its whole timeout, so while it is away nobody else
asks."""

import asyncio
import contextlib

import structlog

from personalization.store import Store, StoreUnavailable
from service.metrics import Metrics

log = structlog.get_logger(__name__)


class StoreHealth:
    """`away` from a call's failure until a ping succeeds. The pings are this object's task; `close` ends
    it."""

    def __init__(self, store: Store, metrics: Metrics, *, every_s: float = 0.5) -> None:
        self._store = store
        self._metrics = metrics
        self._every_s = every_s
        self._probe: asyncio.Task[None] | None = None
        self._back = asyncio.Event()
        self._back.set()
        metrics.store_up.set(1)

    @property
    def away(self) -> bool:
        return not self._back.is_set()

    def failed(self) -> None:
        """A call raised StoreUnavailable."""
        if not self.away:
            log.warning("the store is away: replies go on unsaved until it is back")
            self._metrics.store_up.set(0)
            self._back.clear()
            self._probe = asyncio.create_task(self._wait_until_back(), name="store probe")

    async def back(self, within_s: float) -> bool:
        """Wait until the store answers again; False if it did not in time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._back.wait()
        return not self.away

    async def close(self) -> None:
        if self._probe is not None:
            self._probe.cancel()
            await asyncio.gather(self._probe, return_exceptions=True)

    async def _wait_until_back(self) -> None:
        while True:
            try:
                await self._store.ping()
            except StoreUnavailable:
                await asyncio.sleep(self._every_s)
            else:
                log.info("the store is back")
                self._metrics.store_up.set(1)
                self._back.set()
                return
