"""The engine's process: an asyncio loop that serves gateways over a Unix socket and steps the engine
beside it.

A step runs in one worker thread, so the socket stays responsive. What gateways ask for is kept in order
and done between steps, on the loop's thread, so that the engine is never touched by two threads at once.
"""

import asyncio
import logging
import os
import signal
import socket
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

from engine import wire
from engine.config import EngineConfig
from engine.engine import DuplicateRequest, Engine, RequestRefused
from engine.pages import BrokenBooks
from engine.request import Event, Request, Timings, TokensEvent, Usage
from engine.scheduler import ArenaExceeded
from engine.weights import load_model

log = logging.getLogger(__name__)

MAX_COMMANDS = 1024  # asked for and not yet done; beyond that the readers of all connections wait


class _Connection:
    def __init__(self, number: int, writer: asyncio.StreamWriter, max_unsent_bytes: int) -> None:
        self.number = number
        self.client = ""  # given by its hello
        self.is_open = True
        self._writer = writer
        self._max_unsent_bytes = max_unsent_bytes

    def send(self, message: wire.FromEngine) -> None:
        """Never waits: one gateway that does not read must not hold up the others. It is cut off instead."""
        if not self.is_open:
            return
        self._writer.write(wire.encode(message))
        unsent = self._writer.transport.get_write_buffer_size()
        if unsent > self._max_unsent_bytes:
            log.warning("connection %d is closed: %d bytes unsent", self.number, unsent)
            self.is_open = False
            self._writer.transport.abort()


class EngineServer:
    """Connections, and the loop that steps. `serve` runs it on a socket."""

    def __init__(self, engine: Engine, model_name: str, on_busy: Callable[[bool], None]) -> None:
        self._on_busy = on_busy
        config = engine.model.config
        self.info = wire.EngineInfo(
            model_name=model_name,
            base_hash=engine.model.base_hash,
            context_length=engine.context_length,
            vocab_size=config.vocab_size,
            eos_token_ids=config.eos_token_ids,
            pid=os.getpid(),
        )
        self._engine = engine
        self._config = engine.config
        self._wake = asyncio.Event()
        self._commands: deque[Callable[[], None]] = deque()  # to be done before the next step, in order
        self._has_room = asyncio.Event()
        self._next_connection = 0
        self._tasks: set[asyncio.Task[None]] = set()  # one per connection
        self._is_closed = False
        # Engine request id -> where its events go. A lost connection keeps its entries until they end.
        self._streams: dict[str, tuple[_Connection, int]] = {}
        self._orphans: dict[str, list[_Connection]] = {}  # by client: lost, with requests still running

    async def step_forever(self) -> None:
        loop = asyncio.get_running_loop()

        def wake() -> None:
            loop.call_soon_threadsafe(self._wake.set)

        self._engine.on_load = wake
        with ThreadPoolExecutor(1, thread_name_prefix="step", initializer=self._set_threads) as stepper:
            try:
                while True:
                    self._wake.clear()
                    while self._commands:
                        self._commands.popleft()()
                    self._has_room.set()
                    works = self._engine.has_work and not self._engine.is_stalled
                    self._on_busy(works)
                    if works:
                        self._dispatch(await loop.run_in_executor(stepper, self._engine.step))
                    elif not await loop.run_in_executor(stepper, self._engine.prepare):
                        await self._wake.wait()
            finally:
                self._engine.on_load = lambda: None

    def _set_threads(self) -> None:
        """Before any adapter is read: its readers take this number over. Beside a GPU they have one thread
        each, as there are several of them."""
        threads = self._config.threads or (None if self._config.device == "cpu" else 1)
        if threads is not None:
            torch.set_num_threads(threads)

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection from its hello to its end; whatever it does wrong closes it alone."""
        if self._is_closed:  # it came in as the server ended: nobody would do what it asks
            writer.close()
            return
        connection = _Connection(self._next_connection, writer, self._config.max_unsent_bytes)
        self._next_connection += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._read(connection, reader)
        except wire.FrameError as error:
            log.warning("connection %d is closed: %s", connection.number, error)
            connection.send(wire.Refused(error.code, str(error)))
        except (ConnectionError, asyncio.CancelledError):
            pass  # the peer is gone, or the server ends
        finally:
            self._tasks.discard(task)
            connection.is_open = False
            self._lose(connection)
            writer.close()
            with suppress(Exception):
                await writer.wait_closed()  # for ever, if the peer neither reads nor goes

    async def close(self) -> None:
        self._is_closed = True
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _read(self, connection: _Connection, reader: asyncio.StreamReader) -> None:
        frames = wire.FrameReader(self._config.max_frame_bytes)
        while data := await reader.read(1 << 16):
            for body in frames.feed(data):
                message = wire.decode_from_gateway(body)
                if isinstance(message, wire.Hello):
                    self._greet(connection, message)
                elif not connection.client:
                    raise wire.FrameError(f"first message: expected a hello, got {type(message).__name__}")
                else:
                    while len(self._commands) >= MAX_COMMANDS:
                        self._has_room.clear()
                        await self._has_room.wait()
                    self._commands.append(partial(self._do, connection, message))
                    self._wake.set()

    def _greet(self, connection: _Connection, hello: wire.Hello) -> None:
        if hello.protocol != wire.PROTOCOL:
            raise ProtocolMismatch(wire.PROTOCOL, hello.protocol)
        if connection.client or not hello.client:
            raise wire.FrameError("hello: expected once, with the client's name")
        connection.client = hello.client
        # This gateway has given up what it asked for over its lost connections, and may ask for it again.
        for orphan in self._orphans.pop(hello.client, []):
            self._cancel_all(orphan)
        connection.send(wire.Welcome(wire.PROTOCOL, self.info))

    # Between steps

    def _do(self, connection: _Connection, message: wire.FromGateway) -> None:
        match message:
            case wire.Submit():
                self._submit(connection, message.stream, message.request)
            case wire.Cancel():
                self._engine.cancel(_engine_id(connection, message.stream))
            case wire.Prefetch():
                self._engine.prefetch(message.adapter)
            case wire.Forget():
                forgotten = self._engine.forget(message.adapter_id)
                connection.send(wire.Answer(message.call, asdict(forgotten)))
            case wire.GetStats():
                connection.send(wire.Answer(message.call, self._engine.stats().as_dict()))
            case wire.CheckIntegrity():
                try:
                    self._engine.check_integrity()
                except BrokenBooks as error:
                    connection.send(wire.Failure(message.call, "broken_books", str(error)))
                else:
                    connection.send(wire.Answer(message.call, {}))

    def _submit(self, connection: _Connection, stream: int, request: Request) -> None:
        if not connection.is_open:
            return  # was lost before this was done; nobody waits for it
        engine_id = _engine_id(connection, stream)
        try:
            if engine_id in self._streams:  # though it may be over: its end is still to be sent
                raise DuplicateRequest(f"stream: expected a new number, {stream} is still in use")
            self._engine.submit(replace(request, id=engine_id))
        except (RequestRefused, ArenaExceeded) as error:
            usage = Usage(len(request.prompt), 0, len(request.generated))
            refusal = wire.Finished(stream, "error", usage, Timings(), error.code, str(error))
            connection.send(wire.Events([refusal]))
        else:
            self._streams[engine_id] = (connection, stream)

    def _dispatch(self, events: Iterable[Event]) -> None:
        """One message per connection, whatever the number of its replies."""
        outgoing: dict[_Connection, list[wire.Tokens | wire.Finished]] = {}
        for event in events:
            connection, stream = self._streams[event.request_id]
            item: wire.Tokens | wire.Finished
            if isinstance(event, TokensEvent):
                item = wire.Tokens(stream, event.first_index, event.token_ids)
            else:
                del self._streams[event.request_id]
                item = wire.Finished(
                    stream, event.reason, event.usage, event.timings, event.error_code, event.message
                )
            outgoing.setdefault(connection, []).append(item)
        for connection, items in outgoing.items():
            connection.send(wire.Events(items))

    # Lost connections

    def _lose(self, connection: _Connection) -> None:
        """Its replies run on for a while: what they have computed serves the gateway that asks again."""
        if not any(owner is connection for owner, _ in self._streams.values()):
            return
        self._orphans.setdefault(connection.client, []).append(connection)
        loop = asyncio.get_running_loop()
        loop.call_later(self._config.disconnect_grace_s, self._give_up, connection)

    def _give_up(self, connection: _Connection) -> None:
        lost = self._orphans.get(connection.client, [])
        if connection in lost:
            lost.remove(connection)
            if not lost:
                del self._orphans[connection.client]
            self._cancel_all(connection)

    def _cancel_all(self, connection: _Connection) -> None:
        for engine_id, (owner, _) in self._streams.items():
            if owner is connection:
                self._commands.append(partial(self._engine.cancel, engine_id))
        self._wake.set()


class ProtocolMismatch(wire.FrameError):
    code = "protocol_mismatch"

    def __init__(self, expected: int, got: int) -> None:
        super().__init__(f"protocol version: expected {expected}, got {got}")
        self.expected = expected
        self.got = got


def _engine_id(connection: _Connection, stream: int) -> str:
    """Two gateways may number alike; the engine's ids must differ."""
    return f"{connection.number}.{stream}"


async def serve(
    engine: Engine,
    socket_path: Path,
    *,
    model_name: str = "",
    on_ready: Callable[[], None] = lambda: None,
    on_busy: Callable[[bool], None] = lambda busy: None,
) -> None:
    """Serve until cancelled; an error of the engine's own ends it by raising. Closes the engine.

    `on_busy` is told before each step, and when there is nothing to compute."""
    server = EngineServer(engine, model_name, on_busy)
    listener, inode = _bind(socket_path)
    try:
        sockets = await asyncio.start_unix_server(server.accept, sock=listener)
        try:
            on_ready()
            await server.step_forever()
        finally:
            sockets.close()
            await server.close()
    finally:
        _unbind(listener, socket_path, inode)
        engine.close()


def _bind(path: Path) -> tuple[socket.socket, int]:
    """A socket that only our own user can connect to, and the inode of its file. One left behind by an engine
    that died is replaced.
    """
    with suppress(FileNotFoundError):
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    path.chmod(0o600)  # before it listens, so nobody can have connected yet
    return listener, path.stat().st_ino


def _unbind(listener: socket.socket, path: Path, inode: int) -> None:
    """An engine that took our place has a socket of its own there, which stays."""
    listener.close()
    with suppress(FileNotFoundError):
        if path.stat().st_ino == inode:
            path.unlink()


def run_engine(
    config: EngineConfig,
    model_folder: Path,
    model_name: str,
    adapter_root: Path,
    socket_path: Path,
    ready: Callable[[], None],
) -> None:
    """The engine process: load the model, call `ready` when requests can come, serve until SIGTERM or
    SIGINT.
    """
    model = load_model(model_folder, device=config.device, dtype=getattr(torch, config.dtype))
    engine = Engine(config, model, adapter_root)
    log.info("engine: %s on %s, %d context", model_name, config.device, engine.context_length)
    asyncio.run(_serve_until_signal(engine, socket_path, model_name, ready))


async def _serve_until_signal(
    engine: Engine, socket_path: Path, model_name: str, ready: Callable[[], None]
) -> None:
    serving = asyncio.create_task(serve(engine, socket_path, model_name=model_name, on_ready=ready))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, serving.cancel)
    with suppress(asyncio.CancelledError):
        await serving
