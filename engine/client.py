"""The engine as a gateway sees it: submit a request, iterate over its events; survive the engine's death.

EngineError
├── EngineLost        the connection broke; what ran on it must be submitted again, with `generated`
├── EngineRefused     the engine closed the connection and said why: `code`
└── CallFailed        a question was answered with an error: `code`
"""

import asyncio
import logging
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from engine import wire
from engine.request import AdapterRef, Event, FinishedEvent, Forgotten, Request, TokensEvent
from engine.wire import EngineInfo

log = logging.getLogger(__name__)

FIRST_RETRY_S, LAST_RETRY_S = 0.02, 1.0
MAX_FRAME_BYTES = 64 << 20  # of the engine's answers: our own process, so only a guard against nonsense


class EngineError(Exception):
    code = "engine_error"


class EngineLost(EngineError):
    code = "engine_lost"


class EngineRefused(EngineError):
    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class CallFailed(EngineError):
    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Stream:
    """The events of one request, ended by its FinishedEvent. Raises EngineLost if the engine dies before
    that.
    """

    def __init__(self, client: "EngineClient", number: int, request: Request) -> None:
        self.request = request
        self._client = client
        self._number = number
        # Bounded by the request itself: one event per output token, and the end.
        self._arrived: asyncio.Queue[Event | EngineError] = asyncio.Queue()
        self._is_over = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        if self._is_over:
            raise StopAsyncIteration
        event = await self._arrived.get()
        if isinstance(event, EngineError):
            self._is_over = True
            raise event
        self._is_over = isinstance(event, FinishedEvent)
        return event

    async def cancel(self) -> None:
        """Ask the engine to stop; the FinishedEvent that follows says "cancelled", or that it was over
        already.
        """
        self._client._cancel(self._number)

    def _put(self, event: Event | EngineError) -> None:
        self._arrived.put_nowait(event)


class EngineClient:
    """Made by `connect`. Reconnects by itself; methods wait for the connection, `timeout` seconds at most."""

    def __init__(self, path: Path, *, reconnect: bool, timeout: float) -> None:
        self._path = path
        self._reconnect = reconnect
        self._timeout = timeout
        self._name = uuid.uuid4().hex  # the same over reconnections
        self._info: EngineInfo | None = None
        self._writer: asyncio.StreamWriter | None = None  # while connected
        self._is_up = asyncio.Event()
        self._end: EngineError | None = None  # why there will be no connection any more
        self._streams: dict[int, Stream] = {}
        self._calls: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._next_number = 0
        self._task: asyncio.Task[None] | None = None

    @classmethod
    async def connect(cls, path: Path, *, reconnect: bool = True, timeout: float = 60.0) -> Self:
        """Wait until the engine answers at `path`. Raises EngineLost after `timeout` seconds, or
        EngineRefused.
        """
        client = cls(path, reconnect=reconnect, timeout=timeout)
        client._task = asyncio.create_task(client._stay_connected(), name="engine-client")
        try:
            await client._connected()
        except BaseException:
            await client.close()
            raise
        return client

    @property
    def connected(self) -> bool:
        return self._writer is not None

    @property
    def info(self) -> EngineInfo:
        """Of the engine now connected, or of the last one."""
        assert self._info is not None, "connect() returns after the first welcome"
        return self._info

    async def submit(self, request: Request) -> Stream:
        """Send the request. A request the engine refuses has a stream of one FinishedEvent with its error."""
        writer = await self._connected()
        stream = Stream(self, self._number(), request)
        message = wire.encode(wire.Submit(stream._number, request))
        self._streams[stream._number] = stream
        writer.write(message)
        try:
            with suppress(ConnectionError):  # the reading side sees the loss too, and tells every stream
                await writer.drain()
        except asyncio.CancelledError:
            self._cancel(stream._number)  # nobody has the stream who could
            raise
        return stream

    async def prefetch(self, ref: AdapterRef) -> None:
        """A hint; without a connection it is dropped."""
        if self._writer is not None:
            self._writer.write(wire.encode(wire.Prefetch(ref)))

    async def forget(self, adapter_id: str) -> Forgotten:
        writer = await self._connected()
        number = self._number()
        return Forgotten(**await self._ask(writer, number, wire.Forget(number, adapter_id)))

    async def stats(self) -> dict[str, Any]:
        writer = await self._connected()
        number = self._number()
        return await self._ask(writer, number, wire.GetStats(number))

    async def check_integrity(self) -> None:
        """Raises CallFailed with code "broken_books" and what does not add up."""
        writer = await self._connected()
        number = self._number()
        await self._ask(writer, number, wire.CheckIntegrity(number))

    async def close(self) -> None:
        """Open streams and calls raise EngineLost."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
            self._task = None
        self._end = self._end or EngineLost("the client was closed")
        self._is_up.set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    # Sending

    def _number(self) -> int:
        self._next_number += 1
        return self._next_number

    def _cancel(self, number: int) -> None:
        if self._writer is not None and number in self._streams:
            self._writer.write(wire.encode(wire.Cancel(number)))

    async def _connected(self) -> asyncio.StreamWriter:
        try:
            async with asyncio.timeout(self._timeout):
                while self._writer is None:
                    if self._end is not None:
                        raise self._end
                    await self._is_up.wait()
        except TimeoutError:
            raise EngineLost(f"no engine answers at {self._path} after {self._timeout:g} s") from None
        return self._writer

    async def _ask(
        self, writer: asyncio.StreamWriter, number: int, message: wire.FromGateway
    ) -> dict[str, Any]:
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._calls[number] = answer
        try:
            writer.write(wire.encode(message))
            return await answer
        finally:
            del self._calls[number]

    # The connection

    async def _stay_connected(self) -> None:
        """Connect, read until the connection ends, and again; the time between attempts doubles up to a
        second.
        """
        pause = FIRST_RETRY_S
        while self._end is None:
            began = time.monotonic()
            try:
                await self._read_one_connection()
            except (OSError, wire.FrameError) as error:
                log.debug("engine at %s: %s", self._path, error)
            except EngineRefused as refusal:
                log.error("the engine at %s closed the connection: %s", self._path, refusal)
                if refusal.code == "protocol_mismatch":  # which no further attempt will mend
                    self._end = refusal
            finally:
                was_up = self._writer is not None
                self._drop_connection()
            if was_up:
                log.warning("the connection to the engine at %s was lost", self._path)
                pause = FIRST_RETRY_S
                if not self._reconnect:
                    self._end = self._end or EngineLost("the connection to the engine was lost")
            if self._end is None:
                await asyncio.sleep(max(0.0, pause - (time.monotonic() - began)))
                pause = min(2 * pause, LAST_RETRY_S)
        self._is_up.set()

    async def _read_one_connection(self) -> None:
        reader, writer = await asyncio.open_unix_connection(str(self._path))
        try:
            writer.write(wire.encode(wire.Hello(wire.PROTOCOL, self._name)))
            frames = wire.FrameReader(MAX_FRAME_BYTES)
            while data := await reader.read(1 << 16):
                for body in frames.feed(data):
                    self._take(wire.decode_from_engine(body), writer)
        finally:
            writer.close()

    def _drop_connection(self) -> None:
        self._writer = None
        self._is_up.clear()
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream._put(self._end or EngineLost("the engine was lost while it wrote this reply"))
        for answer in self._calls.values():
            if not answer.done():
                answer.set_exception(self._end or EngineLost("the engine was lost before it answered"))

    def _take(self, message: wire.FromEngine, writer: asyncio.StreamWriter) -> None:
        match message:
            case wire.Welcome():
                self._info = message.info
                self._writer = writer
                self._is_up.set()
            case wire.Refused():
                raise EngineRefused(message.code, message.message)
            case wire.Events():
                for item in message.items:
                    self._hand_over(item)
            case wire.Answer():
                answer = self._calls.get(message.call)
                if answer is not None and not answer.done():
                    answer.set_result(message.value)
            case wire.Failure():
                answer = self._calls.get(message.call)
                if answer is not None and not answer.done():
                    answer.set_exception(CallFailed(message.code, message.message))

    def _hand_over(self, item: wire.Tokens | wire.Finished) -> None:
        stream = self._streams.get(item.stream)
        if stream is None:
            return
        request_id = stream.request.id
        if isinstance(item, wire.Tokens):
            stream._put(TokensEvent(request_id, item.token_ids, item.first_index))
        else:
            del self._streams[item.stream]
            stream._put(
                FinishedEvent(
                    request_id, item.reason, item.usage, item.timings, item.error_code, item.message
                )
            )
