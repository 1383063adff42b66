"""Between the engine and the log: text is logged as fast as the store takes it, and no faster."""

import asyncio
from types import TracebackType

from service.replies import Replies
from service.reply import Reply
from service.writing import Writing


class Pen:
    """While one write is under way, what else is heard waits and goes into the next event, whole. So a slow
    store makes fewer, longer events, and a reply never falls behind its engine."""

    def __init__(self, replies: Replies, reply: Reply, writing: Writing) -> None:
        self._replies = replies
        self._reply = reply
        self._writing = writing
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "Pen":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def touch(self) -> None:
        """Something was heard. Raises what the last write raised."""
        if self._task is not None and self._task.done():
            self._task.result()
            self._task = None
        if self._task is None:
            self._task = asyncio.create_task(self._write())

    async def lift(self) -> None:
        """Everything heard so far is in the log when this returns. Raises what a write raised."""
        if self._task is not None:
            await self._task
            self._task = None
        await self._write()

    async def _write(self) -> None:
        while True:
            events, tokens = self._writing.take()
            if not events:
                return
            await self._replies.write(self._reply, events, tokens)
