"""Replies being written: each a log of numbered events that outlives the socket, and the process, it began
on.

An event is stored before anyone sees it, with the token ids it came from. So a client resumes by number, and
when a gateway dies, another takes the lease of an orphaned reply and goes on from the same tokens: sampling
depends on (seed, index) alone, so the text continues as if nothing had happened.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field

import msgspec
import structlog

from personalization.store import (
    EventsExpired,
    HistoryForgotten,
    LeaseLost,
    ResponseRecord,
    Store,
    StoreUnavailable,
    UnknownResponse,
)
from service.errors import Conflict, NotFound, RateLimited, ServerFault, Unavailable
from service.events import AnyReplyEvent
from service.metrics import Metrics
from service.reply import Entry, Plan, Reply, read_entry
from service.store_health import StoreHealth

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Patience:
    """How long things are waited for, in seconds."""

    orphan: float = 120.0  # a reply nobody listens to goes on this long
    keep: float = 30.0  # a finished reply stays in memory this long
    lease: float = 3.0  # after this a dead gateway's reply may be taken over
    follow: float = 0.1  # between looks at a reply that another gateway writes
    ttl: float = 6 * 3600.0  # how long a reply can be resumed or fetched


RUNNING = "running"  # a record's state until its reply is finished
Speak = Callable[["Reply", "Replies"], Awaitable[None]]


@dataclass
class Replies:
    """Every reply this process writes, follows or has just finished. Owns their tasks; `close` ends them."""

    store: Store
    health: StoreHealth
    speak: Speak
    metrics: Metrics
    holder: str  # names this process in leases
    per_user: int
    patience: Patience = Patience()
    _replies: dict[str, Reply] = field(default_factory=dict)
    _tasks: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    _timers: dict[str, asyncio.TimerHandle] = field(default_factory=dict)
    _asking: Counter[str] = field(default_factory=Counter)  # by person: replies not yet begun

    # ------------------------------------------------------------ asking

    def here(self, user: str, reply_id: str, same_as: str) -> Reply | None:
        """The reply of that id, if this process has it. Raises Conflict when it answers something else."""
        reply = self._replies.get(reply_id)
        return None if reply is None else _checked(reply, user, same_as)

    @contextlib.contextmanager
    def room(self, user: str) -> Iterator[None]:
        """Holds a person's place for one more reply while it is begun. Raises RateLimited: they have as many
        as they may at once."""
        under_way = sum(
            reply.plan.user == user and not (reply.done or reply.lost) for reply in self._replies.values()
        )
        if under_way + self._asking[user] >= self.per_user:
            raise RateLimited(f"at most {self.per_user} replies at once", retry_after=2)
        self._asking[user] += 1
        try:
            yield
        finally:
            self._asking[user] -= 1
            if not self._asking[user]:
                del self._asking[user]

    async def start(self, plan: Plan) -> Reply:
        """Begin a reply; or the one that the same request began before. Raises Conflict, HistoryForgotten.

        While the store is away it goes on without a net: what this process remembers is all there is.
        """
        try:
            created = await self.health.ask(
                lambda: self.store.create_response(
                    plan.user,
                    plan.id,
                    msgspec.msgpack.encode(plan),
                    holder=self.holder,
                    lease_s=self.patience.lease,
                    ttl_s=self.patience.ttl,
                    epoch=plan.epoch,
                    begun=plan.begun,
                )
            )
        except StoreUnavailable:
            created, stored = True, None
        else:
            stored = 0
        # The same request, sent twice at once, may have begun it here meanwhile.
        if not created or plan.id in self._replies:
            return await self.find(plan.user, plan.id, plan.fingerprint)
        return self._own(Reply(plan, stored=stored))

    async def find(self, user: str, reply_id: str, same_as: str | None = None) -> Reply:
        """A person's reply, wherever it is or was written. Another person's is as unknown as one that never
        was.

        Raises NotFound, and Conflict when `same_as` is given and the reply answers a different request.
        """
        reply = self._replies.get(reply_id) or await self._load(user, reply_id)
        return _checked(reply, user, same_as)

    async def cancel(self, user: str, reply_id: str) -> Reply:
        """Ask a reply to stop; it says so itself, with its last event. Raises NotFound, Conflict."""
        reply = await self.find(user, reply_id)
        if reply.done:
            return reply
        if not reply.running and not await self._claim(reply):
            raise Conflict("this reply is being written by another gateway", code="written_elsewhere")
        reply.cancel("cancelled")
        return reply

    async def delete(self, user: str, reply_id: str) -> None:
        """Forget a finished reply's log; one being written is stopped first. The history keeps its turns."""
        reply = await self.cancel(user, reply_id)
        await self._ended(reply)
        with contextlib.suppress(UnknownResponse):
            await self._tell_end(reply, ttl_s=0.001)
        self._drop(reply)

    async def stop_all(self, user: str) -> None:
        """Stop everything that is being written for a person here, and wait until it has stopped."""
        for reply in [reply for reply in self._replies.values() if reply.plan.user == user]:
            reply.cancel("cancelled")
            if reply.running:
                await self._ended(reply)
            self._drop(reply)

    def forget(self, user: str) -> None:
        """Let go of a person's replies that have ended. Others find out with their next word, or are of one
        who is back already."""
        for reply in [reply for reply in self._replies.values() if reply.plan.user == user]:
            if reply.done and not reply.running:
                self._drop(reply)

    async def _ended(self, reply: Reply) -> None:
        """Wait for the end of a reply's task, which still saves and asks for things after the last event."""
        task = self._tasks.get(reply.id)
        if task is not None:
            await asyncio.wait({task})

    def acknowledge(self, reply: Reply, number: int) -> None:
        """The client has everything up to `number`; once that is everything, memory need not keep it."""
        reply.acknowledged = max(reply.acknowledged, number)
        self._drop_if_read(reply)

    async def adopt_orphans(self) -> int:
        """Take over every reply whose gateway died, asked for or not: what a person was promised is written
        and saved even if they never come back for it. Returns how many. Raises StoreUnavailable."""
        adopted = 0
        for reply in [reply for reply in self._replies.values() if reply.untold]:
            with contextlib.suppress(UnknownResponse, LeaseLost):
                await self._finish(reply)
        for reply_id in await self.health.ask(self.store.orphans):
            mine = self._replies.get(reply_id)
            try:
                if mine is not None:
                    if mine.stored is None and not await self.store.read_response_events(reply_id):
                        mine.stored = 0  # it was begun there after all: only the answer was lost
                    if mine.done and not mine.running:  # its gateway died before it could say so
                        await self._finish(mine)
                    continue
                record = await self.store.adopt_response(
                    reply_id, holder=self.holder, lease_s=self.patience.lease
                )
                read = await self.store.read_response_events(reply_id)
                if record is not None and reply_id not in self._replies:
                    reply = self._take_up(record, read)
                    if reply.done:  # its gateway died before it could say so
                        await self._finish(reply)
                    adopted += 1
            except (UnknownResponse, EventsExpired, LeaseLost):  # it ended meanwhile, or is another's
                continue
            except (msgspec.MsgspecError, UnicodeDecodeError):  # such as another release wrote; others wait
                log.exception("an orphaned reply cannot be read", response_id=reply_id)
        return adopted

    async def close(self) -> None:
        """Stop writing. The logs stay; whoever is asked next goes on from them."""
        for timer in self._timers.values():
            timer.cancel()
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for reply in self._replies.values():
            await self._release(reply)

    # ------------------------------------------------------------ writing

    async def write(
        self, reply: Reply, events: Sequence[AnyReplyEvent], tokens: tuple[int, ...] = ()
    ) -> None:
        """Number the events, store them, then show them. Raises LeaseLost when another gateway took over.

        While the store is away they are shown all the same, and stored with the next ones that can be.
        """
        entries = reply.number(events, tokens)
        with contextlib.suppress(StoreUnavailable):
            await self._keep(reply, entries)
        reply.feed(entries)

    async def _keep(self, reply: Reply, entries: Sequence[Entry] = ()) -> None:
        """Store what could not be stored before, and the next entries. Raises StoreUnavailable, LeaseLost."""
        if reply.stored is None:
            return
        first = reply.stored
        unstored = [entry.stored() for entry in (*reply.entries[first:], *entries)]
        if unstored:
            await self.health.ask(
                lambda: self.store.append_response_events(
                    reply.id, first, unstored, holder=self.holder, ttl_s=self.patience.ttl
                )
            )
            reply.stored = first + len(unstored)

    # ------------------------------------------------------------ one task per reply

    def _own(self, reply: Reply) -> Reply:
        reply.on_left = self._watch
        self._replies[reply.id] = reply
        task = asyncio.create_task(self._drive(reply), name=f"reply {reply.id}")
        self._tasks[reply.id] = task
        task.add_done_callback(lambda task: self._forget_task(reply.id, task))
        self._watch(reply)
        return reply

    def _forget_task(self, reply_id: str, task: asyncio.Task[None]) -> None:
        """A reply that was let go may have been taken up again before its task had ended: that one stays."""
        if self._tasks.get(reply_id) is task:
            del self._tasks[reply_id]

    async def _drive(self, reply: Reply) -> None:
        """Write the reply whenever it is ours to write; else follow whoever writes it."""
        try:
            while not (reply.done or reply.lost):
                if await self._claim(reply):
                    await self._write_all(reply)
                else:
                    await self._follow(reply)
        except Exception:
            log.exception("reply failed", response_id=reply.id)
            reply.lose(ServerFault("an internal error; the reply was given up"))
        self._watch(reply)
        self._drop_if_read(reply)

    async def _write_all(self, reply: Reply) -> None:
        reply.running = True
        self.metrics.running.inc()
        if reply.entries:
            self.metrics.adopted.inc()
        renewal = asyncio.create_task(self._renew(reply))
        try:
            await self.speak(reply, self)
            await self._finish(reply)
        except LeaseLost:
            log.warning("another gateway took over a reply", response_id=reply.id)
        except (UnknownResponse, HistoryForgotten):
            self._give_up(reply)  # its person was forgotten meanwhile
        finally:
            renewal.cancel()
            await asyncio.gather(renewal, return_exceptions=True)
            self.metrics.running.dec()
            reply.running = False

    async def _finish(self, reply: Reply) -> None:
        """Tell the store that it is over; as soon as it is back, should it be away."""
        away = False
        try:
            await self._keep(reply)
            await self._tell_end(reply, ttl_s=self.patience.ttl)
        except StoreUnavailable:
            away = True
        finally:
            reply.untold = away and reply.stored is not None

    async def _tell_end(self, reply: Reply, *, ttl_s: float) -> None:
        response = reply.response
        if response is None or reply.stored is None:
            return
        await self.health.ask(
            lambda: self.store.finish_response(
                reply.id,
                response.status,
                msgspec.msgpack.encode(reply.plan),
                holder=self.holder,
                ttl_s=ttl_s,
            )
        )

    async def _claim(self, reply: Reply) -> bool:
        """Whether the reply is ours to write. One that began here stays ours while the store is away."""
        if reply.stored is None:
            return True
        try:
            return await self._lease(reply, self.patience.lease)
        except StoreUnavailable:
            return reply.running or not reply.entries

    async def _lease(self, reply: Reply, seconds: float) -> bool:
        return await self.health.ask(
            lambda: self.store.claim_response(reply.id, holder=self.holder, lease_s=seconds)
        )

    async def _release(self, reply: Reply) -> None:
        """Let the lease run out at once, so that whoever is asked next need not wait for it."""
        if reply.done or reply.stored is None:
            return
        with contextlib.suppress(StoreUnavailable):
            await self._lease(reply, 0.001)

    async def _renew(self, reply: Reply) -> None:
        while True:
            await asyncio.sleep(self.patience.lease / 3)
            await self._claim(reply)

    async def _follow(self, reply: Reply) -> None:
        """Read what another process writes."""
        await asyncio.sleep(self.patience.follow)
        try:
            read = await self.health.ask(
                lambda: self.store.read_response_events(reply.id, len(reply.entries) - 1)
            )
        except StoreUnavailable:
            await self.health.back(self.patience.orphan)
            return
        except (UnknownResponse, EventsExpired):
            self._give_up(reply)
            return
        reply.stored = len(reply.entries) + len(read)
        reply.feed([read_entry(data) for _, data in read])
        if not read and not await self._still_running(reply):
            self._give_up(reply)

    async def _still_running(self, reply: Reply) -> bool:
        """Whether anyone will ever add to the log of a reply that is not ours."""
        try:
            record = await self.health.ask(lambda: self.store.response(reply.plan.user, reply.id))
            ended = record.state != RUNNING
            return not ended or bool(await self.store.read_response_events(reply.id, len(reply.entries) - 1))
        except StoreUnavailable:
            return True
        except (UnknownResponse, EventsExpired):
            return False

    async def _load(self, user: str, reply_id: str) -> Reply:
        """A reply this process does not have: finished, orphaned, or written by another."""
        try:
            record = await self.health.ask(lambda: self.store.response(user, reply_id))
            read = await self.health.ask(lambda: self.store.read_response_events(reply_id))
        except UnknownResponse:
            raise NotFound(f"no response {reply_id!r:.80}", code="response_not_found") from None
        except EventsExpired:
            raise _gone(reply_id) from None
        except StoreUnavailable:
            raise Unavailable(
                "stored replies cannot be reached", code="store_unavailable", retry_after=2
            ) from None
        return self._replies.get(reply_id) or self._take_up(record, read)  # or someone loaded it meanwhile

    def _take_up(self, record: ResponseRecord, read: Sequence[tuple[int, bytes]]) -> Reply:
        plan = msgspec.msgpack.decode(record.body, type=Plan)
        entries = [read_entry(data) for _, data in read]
        return self._own(Reply(plan, entries, stored=len(entries)))

    # ------------------------------------------------------------ when nobody listens

    def _watch(self, reply: Reply) -> None:
        """(Re)start the clock on a reply nobody listens to: one being written is stopped, others are let
        go."""
        timer = self._timers.pop(reply.id, None)
        if timer is not None:
            timer.cancel()
        if reply.listeners or self._replies.get(reply.id) is not reply:
            return
        if reply.done and reply.running:  # it still saves and asks for things; `_drive` comes back here then
            return
        if reply.done or reply.lost:
            after, act = self.patience.keep, self._let_go
        else:
            after, act = self.patience.orphan, self._abandon
        self._timers[reply.id] = asyncio.get_running_loop().call_later(after, act, reply)

    def _abandon(self, reply: Reply) -> None:
        if reply.listeners:
            return
        if not reply.running:
            self._drop(reply)
        elif not reply.plan.background:
            reply.cancel("disconnected")

    def _let_go(self, reply: Reply) -> None:
        """Drop a reply that has ended; not before the store knows, which would have it written further like
        one whose gateway died."""
        if reply.untold:
            self._watch(reply)
        else:
            self._drop(reply)

    def _drop_if_read(self, reply: Reply) -> None:
        """Let go of an ended reply that its client has all of; not before its task has ended, for which
        forgetting the person waits. One that the store may have begun without saying so is still to be found
        there (`adopt_orphans`)."""
        read = reply.acknowledged >= len(reply.entries) - 1 and reply.stored is not None
        if reply.done and read and not reply.running and reply.listeners == 0:
            self._let_go(reply)

    def _give_up(self, reply: Reply) -> None:
        """Its log is gone, and what memory has of it goes as well."""
        reply.lose(_gone(reply.id))
        self._drop(reply)

    def _drop(self, reply: Reply) -> None:
        if self._replies.get(reply.id) is reply:
            del self._replies[reply.id]
        timer = self._timers.pop(reply.id, None)
        if timer is not None:
            timer.cancel()
        task = self._tasks.get(reply.id)
        if task is not None and task is not asyncio.current_task() and not reply.done:
            task.cancel()
            reply.lose(_gone(reply.id))


def _gone(reply_id: str) -> NotFound:
    return NotFound(f"the log of {reply_id!r:.80} is no longer kept", code="resume_expired")


def _checked(reply: Reply, user: str, same_as: str | None) -> Reply:
    if reply.plan.user != user:
        raise NotFound(f"no response {reply.id!r:.80}", code="response_not_found")
    if same_as is not None and reply.plan.fingerprint != same_as:
        raise Conflict(
            "this event_id was used for a different request", code="idempotency_conflict", param="event_id"
        )
    return reply
