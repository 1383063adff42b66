"""What waits to be written to one socket: bounded, and merging text when the reader is slow.

Kernel buffers take megabytes before a write blocks, so without a bound of our own a client that stopped
reading would be noticed only by the memory it costs.
"""

import asyncio
from collections import deque
from typing import Any

from msgspec.structs import replace

from service.events import ReplyEvent, TextDelta, json_bytes


class OutboxFull(Exception):
    """The client reads too slowly: `events` and `size` bytes were waiting."""

    def __init__(self, events: int, size: int) -> None:
        super().__init__(f"the client reads too slowly: {events} events, {size} bytes waiting")
        self.events = events
        self.size = size


class Outbox:
    """A queue with one reader. Up to `merge_above` events wait as they are; above that, text deltas of one
    reply that follow each other become one, with the last one's number."""

    def __init__(self, *, max_events: int = 256, max_bytes: int = 256 * 1024, merge_above: int = 32) -> None:
        self._max_events = max_events
        self._max_bytes = max_bytes
        self._merge_above = merge_above
        self._waiting: deque[Any] = deque()
        self._size = 0
        self._arrived = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._taken = asyncio.Event()

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, event: Any) -> None:
        """Raises OutboxFull when the event does not fit; one event always fits an empty outbox."""
        first = not self._waiting
        self._waiting.append(event)
        self._size += _size(event)
        if len(self._waiting) > self._merge_above:
            self._merge_last(event)
            self._room.clear()
        if not first and (len(self._waiting) > self._max_events or self._size > self._max_bytes):
            raise OutboxFull(len(self._waiting), self._size)
        self._arrived.set()

    async def get(self) -> Any:
        while not self._waiting:
            self._arrived.clear()
            await self._arrived.wait()
        event = self._waiting.popleft()
        self._size -= _size(event)
        if len(self._waiting) <= self._merge_above // 2:
            self._room.set()
        self._taken.set()
        return event

    async def room(self, event: Any) -> None:
        """Returns when few events wait and `event` fits beside them; live text does not wait for it."""
        await self._room.wait()
        while self._waiting and self._size + _size(event) > self._max_bytes:
            self._taken.clear()
            await self._taken.wait()

    def _merge_last(self, event: Any) -> None:
        """Merge `event`, just appended, into the last earlier event of its reply when both are text."""
        if not isinstance(event, TextDelta):
            return
        for index in range(len(self._waiting) - 2, -1, -1):
            earlier = self._waiting[index]
            if isinstance(earlier, ReplyEvent) and earlier.response_id == event.response_id:
                # What a resume sends anew begins before what waits already.
                if isinstance(earlier, TextDelta) and earlier.sequence_number < event.sequence_number:
                    self._waiting.pop()
                    self._waiting[index] = replace(event, delta=earlier.delta + event.delta)
                    self._size -= _size(earlier) + _size(event) - _size(self._waiting[index])
                return


def _size(event: Any) -> int:
    return 160 + len(event.delta) if isinstance(event, TextDelta) else len(json_bytes(event))
