"""One WebSocket: a reader, an actor, a writer, and a task for each reply it listens to.

The reader only reads: uvicorn stops reading while a message lies unread, and with it pongs. The actor does
what the messages ask, in order. The writer takes events from a bounded outbox. A closed socket cancels none
of its replies, nor what was asked before it closed."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import structlog
from msgspec.structs import replace
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from service import protocol
from service.auth import Person
from service.errors import ApiError, RateLimited
from service.events import (
    AdapterState,
    Pong,
    SessionCreated,
    SessionExpiring,
    TextDelta,
    error_event,
)
from service.http import as_api_error
from service.input import refuse_formats, refuse_tools, said_in_response
from service.limits import RateLimits
from service.metrics import Metrics
from service.outbox import Outbox, OutboxFull
from service.protocol import Codec, MalformedFrame, conversation_of
from service.replies import Replies
from service.reply import Reply
from service.session import Session
from service.uvicorn_protocol import ABORT

log = structlog.get_logger(__name__)

CLOSE_PATIENCE_S = 1.0
MAX_UNHANDLED = 64  # messages of one socket


@dataclass(frozen=True)
class SocketOptions:
    """Ages in seconds."""

    max_age: float = 3600.0
    warn_before: float = 60.0
    prefetch_every: float = 5.0


class Sockets:
    """Every open socket, by person: who hears of a new adapter."""

    def __init__(self) -> None:
        self._open: dict[str, set[Socket]] = {}

    def add(self, socket: "Socket") -> None:
        self._open.setdefault(socket.person.user, set()).add(socket)

    def remove(self, socket: "Socket") -> None:
        peers = self._open[socket.person.user]
        peers.discard(socket)
        if not peers:
            del self._open[socket.person.user]

    def users(self) -> list[str]:
        return list(self._open)

    def tell(self, user: str, event: Any) -> None:
        for socket in list(self._open.get(user, ())):
            socket.push(event)

    def tell_all(self, event: Any) -> None:
        for user in self.users():
            self.tell(user, event)


@dataclass
class SocketServices:
    """What a socket works with."""

    session: Session
    replies: Replies
    limits: RateLimits
    metrics: Metrics
    sockets: Sockets
    options: SocketOptions
    base_model: str
    clock: Callable[[], float]
    new_id: Callable[[], str]
    refresh: Callable[[str, str], Awaitable[dict[str, Any]]]


class _Close(Exception):
    """End the socket with this code."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


@dataclass(eq=False)
class Socket:
    websocket: WebSocket
    person: Person
    codec: Codec
    services: SocketServices
    conversation: str | None = None  # of the newest message; the next one goes on with it
    _outbox: Outbox = field(default_factory=Outbox)
    _listening: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    _inbox: asyncio.Queue[dict[str, Any]] = field(default_factory=asyncio.Queue)
    _overflow: asyncio.Event = field(default_factory=asyncio.Event)
    _prefetched_at: float = float("-inf")

    async def run(self) -> None:
        """Serve the socket, already accepted, until either side ends it."""
        services = self.services
        services.metrics.sockets.inc()
        services.sockets.add(self)
        tasks = self._start(self._read, self._write, self._watch_outbox)
        try:
            await self._greet()
            tasks += self._start(self._act, self._grow_old)
            acting = tasks[-2]
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            await self._end(done)
            if acting not in done:  # what a client said before the end is still acted on
                tasks += self._start(self._inbox.join)
                await asyncio.wait([acting, tasks[-1]], return_when=asyncio.FIRST_COMPLETED)
        finally:
            services.sockets.remove(self)
            services.metrics.sockets.dec()
            tasks += self._listening.values()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _start(self, *works: Callable[[], Coroutine[Any, Any, None]]) -> list[asyncio.Task[None]]:
        return [asyncio.create_task(work(), name=f"socket {work.__name__}") for work in works]

    def push(self, event: Any) -> None:
        """An event of ours that nobody asked for; plain Responses sockets do not get those."""
        if self.codec.extensions:
            self._put(event)

    # ------------------------------------------------------------ life

    async def _greet(self) -> None:
        pointer = await self.services.session.pointer(self.person.user)
        limits = self.services.limits.limits
        self.push(
            SessionCreated(
                session_id=f"sess_{self.services.new_id()}",
                user=self.person.user,
                adapter=AdapterState(
                    version=pointer.version,
                    base=self.services.base_model,
                    updated_at=None if pointer.updated_at is None else pointer.updated_at.isoformat(),
                ),
                limits={
                    "replies_per_socket": limits.replies_per_socket,
                    "replies_per_user": limits.replies_per_user,
                    "frame_bytes": protocol.MAX_FRAME_BYTES,
                    "max_age_s": int(self.services.options.max_age),
                },
                expires_at=self.person.expires_at,
            )
        )
        await self._prefetch()

    async def _end(self, done: set[asyncio.Task[None]]) -> None:
        """Close as the task that ended first says."""
        error = next((task.exception() for task in done if task.exception() is not None), None)
        if error is None or isinstance(error, WebSocketDisconnect):
            return
        if isinstance(error, _Close):
            code, reason = error.code, error.reason
        else:
            log.error("socket failed", exc_info=error)
            code, reason = 1011, "internal error"
        self.services.metrics.sockets_closed.labels(code=str(code)).inc()
        await close(self.websocket, code, reason)

    async def _grow_old(self) -> None:
        """Announce and then end the socket: at its age limit, or when the credential runs out."""
        options, now = self.services.options, self.services.clock()
        left = self.person.expires_at - now
        by_age = options.max_age <= left
        left = min(left, options.max_age)
        await asyncio.sleep(max(0.0, left - options.warn_before))
        notice = min(left, options.warn_before)
        self.push(SessionExpiring(reason="max_age" if by_age else "credential", seconds=notice))
        await asyncio.sleep(notice)
        if by_age:
            raise _Close(protocol.GOING_AWAY, "the socket has reached its age limit")
        raise self._expired()

    @staticmethod
    def _expired() -> _Close:
        return _Close(protocol.NOT_AUTHENTICATED, "the credential has expired")

    async def _watch_outbox(self) -> None:
        await self._overflow.wait()
        raise _Close(protocol.TRY_AGAIN_LATER, "the client reads too slowly")

    async def _write(self) -> None:
        while True:
            frame = self.codec.encode(await self._outbox.get())
            if isinstance(frame, bytes):
                await self.websocket.send_bytes(frame)
            else:
                await self.websocket.send_text(frame)

    def _put(self, event: Any) -> None:
        try:
            self._outbox.put(event)
        except OutboxFull:
            self._overflow.set()

    # ------------------------------------------------------------ reading

    async def _read(self) -> None:
        while True:
            message = await self.websocket.receive()
            if message["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(message.get("code", 1005))
            # `_grow_old` sleeps through a machine's own sleep, and through a clock that is set.
            if self.services.clock() >= self.person.expires_at:
                raise self._expired()
            frame = message.get("text")
            try:
                fields = self.codec.decode(message["bytes"] if frame is None else frame)
            except MalformedFrame as error:
                raise _Close(error.close_code, str(error)[:120]) from None
            if self._inbox.qsize() >= MAX_UNHANDLED:
                raise _Close(protocol.TOO_MANY, "messages come faster than they can be acted on")
            self._inbox.put_nowait(fields)

    async def _act(self) -> None:
        """Messages one after the other, in the order they came; the reader does not wait for this."""
        while True:
            await self._handle(await self._inbox.get())
            self._inbox.task_done()

    async def _handle(self, fields: dict[str, Any]) -> None:
        """Do what one message asks. What goes wrong is answered with an error event; the socket stays
        open."""
        named = {key: fields[key] for key in ("event_id", "stream_id") if isinstance(fields.get(key), str)}
        reply_id = fields.get("response_id")
        try:
            await self.services.limits.message(self.person.user)
            await self._do(protocol.read_event(fields))
            return
        except Exception as error:
            problem = as_api_error(error)
        self.services.metrics.refused.labels(code=problem.code).inc()
        self._put(error_event(problem, response_id=reply_id if isinstance(reply_id, str) else None, **named))

    async def _do(self, event: protocol.ClientEvent) -> None:
        match event:
            case protocol.ResponseCreate():
                await self._create(event)
            case protocol.ResponseCancel():
                await self.services.replies.cancel(self.person.user, event.response_id)
            case protocol.ResponseResume():
                await self._resume(event)
            case protocol.ResponseAck():
                reply = await self.services.replies.find(self.person.user, event.response_id)
                self.services.replies.acknowledge(reply, event.sequence_number)
            case protocol.FeedbackCreate():
                await self._feedback(event)
            case protocol.RefreshCreate():
                job = await self.services.refresh(self.person.user, "asked")
                self._put({"type": "adapter.refresh.queued", "event_id": event.event_id, **job})
            case protocol.Typing():
                await self._prefetch()
            case protocol.Ping():
                self._put(Pong(id=event.id))

    async def _create(self, event: protocol.ResponseCreate) -> None:
        services, user = self.services, self.person.user
        self._check_room()
        refuse_tools(event.tools)
        refuse_formats(None if event.text is None else event.text.format, "text.format")
        conversation = conversation_of(event.conversation) or self.conversation
        if event.previous_response_id is not None:
            before = await services.replies.find(user, event.previous_response_id)
            conversation = before.plan.conversation
        await services.limits.reply(user)
        reply = await services.session.answer(
            user, event, said_in_response(event), conversation, key=event.event_id
        )
        self.conversation = reply.plan.conversation
        self._listen(reply, -1, event.stream_id)

    async def _resume(self, event: protocol.ResponseResume) -> None:
        self._check_room(event.response_id)
        reply = await self.services.replies.find(self.person.user, event.response_id)
        reply.check_start(event.starting_after)
        self.services.metrics.resumed.inc()
        self.conversation = reply.plan.conversation
        self._listen(reply, event.starting_after, event.stream_id)

    async def _feedback(self, event: protocol.FeedbackCreate) -> None:
        session, user = self.services.session, self.person.user
        self._put(await session.feedback(user, event))
        await session.settle_trial(user)

    async def _prefetch(self) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._prefetched_at >= self.services.options.prefetch_every:
            self._prefetched_at = now
            await self.services.session.prefetch(self.person.user)

    # ------------------------------------------------------------ replies

    def _check_room(self, reply_id: str | None = None) -> None:
        most = self.services.limits.limits.replies_per_socket
        if len(self._listening.keys() - {reply_id}) >= most:
            raise RateLimited(f"at most {most} replies at once on one socket", retry_after=2)

    def _listen(self, reply: Reply, after: int, stream_id: str | None) -> None:
        """Send the reply's events from `after` on. A socket hears one reply once: a resume starts it anew."""
        before = self._listening.pop(reply.id, None)
        if before is not None:
            before.cancel()
        task = asyncio.create_task(self._forward(reply, after, stream_id), name=f"listen {reply.id}")
        self._listening[reply.id] = task
        task.add_done_callback(lambda done: self._stopped_listening(reply.id, done))

    def _stopped_listening(self, reply_id: str, task: asyncio.Task[None]) -> None:
        if self._listening.get(reply_id) is task:
            del self._listening[reply_id]
        if not task.cancelled() and task.exception() is not None:
            log.error("a reply could not be forwarded", response_id=reply_id, exc_info=task.exception())

    async def _forward(self, reply: Reply, after: int, stream_id: str | None) -> None:
        """Events that are there already wait for room in the outbox, and so do those that repeat the whole
        reply; live text does not wait for anyone."""
        live_from = len(reply.entries)
        try:
            async with contextlib.aclosing(reply.events(after)) as events:
                async for event in events:
                    if event.sequence_number < live_from or not isinstance(event, TextDelta):
                        await self._outbox.room(event)
                    self._put(event if stream_id is None else replace(event, stream_id=stream_id))
        except ApiError as error:
            self._put(error_event(error, response_id=reply.id, stream_id=stream_id))


async def close(websocket: WebSocket, code: int, reason: str) -> None:
    """Close, or drop the connection when the client does not even read the close frame."""
    if websocket.application_state is WebSocketState.DISCONNECTED:
        return
    try:
        async with asyncio.timeout(CLOSE_PATIENCE_S):
            await websocket.close(code, reason)
    except (TimeoutError, RuntimeError, WebSocketDisconnect):
        abort = websocket.scope.get("extensions", {}).get(ABORT)
        if abort is not None:
            abort()
