"""What Redis keeps of each person: turns, the adapter pointer, versions, replies under way. The keys and the
transitions are in `store_lua.py`.

Turns are append-only and known by their id, so appending again changes nothing; they are ordered by (`at`,
order of arrival). A person's turns lie in one hash and their order in a sorted set, so the newest N cost two
calls however long the history is. Ratings and removals lie beside the turns and are joined on reading.

`pointer` also gives the person's epoch. Whoever reads it at the start of a piece of work and hands it back
with each write can never write for a person who was forgotten in between (HistoryForgotten). Where it could
not be read, the moment at which the work began does the same.

Reads are pipelines without MULTI: a server that is full refuses even to queue a read.

The errors are StoreUnavailable and its siblings in `store_records.py`.
"""

import asyncio
import hashlib
import hmac
import itertools
import json
import uuid
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import aclosing, asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, cast

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.client import PubSub
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError, ReadOnlyError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from personalization import store_lua as lua
from personalization.history import Author, InvalidTurn, Rating, Role, Turn, check_user
from personalization.store_lua import UPDATES
from personalization.store_records import (
    ConversationSummary,
    EventsExpired,
    Forgotten,
    HistoryForgotten,
    LeaseLost,
    Pointer,
    ResponseRecord,
    Standing,
    StoreError,
    StoreUnavailable,
    Trial,
    TrialEnd,
    UnknownResponse,
    UnknownTurn,
    VersionRecord,
    Votes,
)

__all__ = [
    "UPDATES",
    "ConversationSummary",
    "EventsExpired",
    "Forgotten",
    "HistoryForgotten",
    "LeaseLost",
    "Pointer",
    "ResponseRecord",
    "Standing",
    "Store",
    "StoreError",
    "StoreUnavailable",
    "Trial",
    "TrialEnd",
    "UnknownResponse",
    "UnknownTurn",
    "VersionRecord",
    "Votes",
    "connect",
    "talking_to_redis",
]

APPEND_BATCH = 1_000  # turns in one Lua call, some 10 ms of the server's time
READ_BATCH = 1_000  # turns, or ids, in one answer
TITLE_CHARS = 80
MAX_RESPONSE_EVENTS = 20_000
PROGRESS_KEPT_MS = 7 * 24 * 3600 * 1000
RECONNECTED = "store.reconnected"

_EPOCH_START = datetime(1970, 1, 1, tzinfo=UTC)


def connect(url: str, *, max_connections: int = 64) -> Redis:
    """A client as the store wants it: bytes, a pool that waits, one-second calls, retries with jitter."""
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=max_connections,
        timeout=2.0,
        socket_timeout=1.0,
        socket_connect_timeout=1.0,
        retry=Retry(ExponentialWithJitterBackoff(base=0.05, cap=0.5), 8),
        decode_responses=False,
    )
    return Redis.from_pool(pool)


class Store:
    """One per process. `secret` makes the adapter ids; `deadline_s` bounds every call, retries included."""

    def __init__(
        self,
        redis: Redis,
        secret: bytes,
        *,
        deadline_s: float = 4.0,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._redis = redis
        self._secret = secret
        self._deadline_s = deadline_s
        self._clock = clock

    def adapter_id(self, user: str) -> str:
        """HMAC-SHA256 of the user's name, 64 hex characters: names folders and keys without naming the
        person."""
        return hmac.new(self._secret, check_user(user).encode("utf-8"), hashlib.sha256).hexdigest()

    async def ping(self) -> None:
        await self._ask(self._redis.ping())

    async def close(self) -> None:
        await self._redis.aclose()

    # Turns

    async def append(
        self, user: str, turns: Sequence[Turn], *, epoch: int | None = None, begun: datetime | None = None
    ) -> int:
        """Add the turns that are not there yet, in the order given; how many those were. Up to 1,000 turns
        are one transaction; a longer import is several, and can be sent again after a failure. `begun` is
        heeded where there is no `epoch`."""
        added = 0
        for start in range(0, len(turns), APPEND_BATCH):
            arguments: list[str | bytes | int] = [_fence(epoch, begun), user, self.adapter_id(user)]
            for turn in turns[start : start + APPEND_BATCH]:
                arguments += _turn_arguments(turn)
            added += self._live(user, await self._transit(lua.APPEND, user, *arguments))
        return added

    async def turns(self, user: str) -> list[Turn]:
        """The whole history, oldest first."""
        return await self._all_turns(user, "order")

    async def recent(self, user: str, limit: int) -> list[Turn]:
        """The newest `limit` turns, oldest first."""
        if limit <= 0:
            return []
        return await self._read_turns(user, self._redis.zrange(self._key(user, "order"), -limit, -1))

    async def turns_named(self, user: str, turn_ids: Sequence[str]) -> list[Turn]:
        """Those of the turns that there are, in the order of their names."""
        return await self._join_turns(user, [turn_id.encode() for turn_id in turn_ids])

    async def conversation(self, user: str, conversation_id: str) -> list[Turn]:
        """One conversation, oldest first; empty if there is none of that name."""
        return await self._all_turns(user, lua.CONVERSATION_PART + conversation_id)

    async def turn(self, user: str, turn_id: str) -> Turn:
        """Raises UnknownTurn."""
        found = await self._join_turns(user, [turn_id.encode()])
        if not found:
            raise UnknownTurn(turn_id)
        return found[0]

    async def conversations(self, user: str, limit: int = 200) -> list[ConversationSummary]:
        """The newest conversations, newest first, each titled by its first turn."""
        newest = await self._ask(
            self._redis.zrange(self._key(user, "conversations"), 0, limit - 1, desc=True, withscores=True)
        )
        keys = [self._key(user, lua.CONVERSATION_PART) + name.decode() for name, _ in newest]
        pipe = self._redis.pipeline(transaction=False)
        for key in keys:
            pipe.zcard(key)
            pipe.zrange(key, 0, 0)
        sizes = await self._ask(pipe.execute())
        heads = [_member_id(head[0]) if head else b"" for head in sizes[1::2]]
        firsts = await self._join_turns(user, heads)
        titles = {turn.conversation: _title(turn.text) for turn in firsts}
        return [
            ConversationSummary(name.decode(), titles[name.decode()], _from_micros(score), size)
            for (name, score), size in zip(newest, sizes[::2], strict=True)
            if name.decode() in titles  # else it was forgotten between the calls
        ]

    async def rate(self, user: str, turn_id: str, rating: Rating | None) -> None:
        """Raises UnknownTurn."""
        if rating not in ("up", "down", None):
            raise InvalidTurn("rating", '"up", "down" or null', rating)
        if not await self._transit(lua.RATE, user, turn_id, _or_empty(rating)):
            raise UnknownTurn(turn_id)

    async def correct(self, user: str, turn_id: str, text: str) -> Turn:
        """Append a person's version of an assistant's turn, right after it. It is learned; the corrected
        turn, and any earlier correction of it, no longer are. Raises UnknownTurn, HistoryForgotten."""
        epoch = (await self.pointer(user)).epoch
        corrected = await self.turn(user, turn_id)
        if corrected.role != "assistant":
            raise InvalidTurn("role", "an assistant's turn to correct", corrected.role)
        correction = Turn(
            id=uuid.uuid4().hex,
            conversation=corrected.conversation,
            at=corrected.at,
            role="assistant",
            text=text,
            author="person",
            corrects=corrected.corrects or corrected.id,
        )
        await self.append(user, [correction], epoch=epoch)
        return correction

    async def remove_turn(self, user: str, turn_id: str) -> None:
        """Never learn from this turn again; it stays in the conversation. Raises UnknownTurn."""
        if not await self._transit(lua.REMOVE, user, turn_id):
            raise UnknownTurn(turn_id)

    async def learned_count(self, user: str) -> int:
        """How many turns there are to learn from."""
        return int(await self._ask(self._redis.scard(self._key(user, "learned"))))

    async def learned_ids(self, user: str) -> set[str]:
        """The ids of the turns to learn from."""
        cursor, ids = 0, set[str]()
        while True:
            asked = self._redis.sscan(self._key(user, "learned"), cursor, count=READ_BATCH)
            cursor, page = await self._ask(asked)
            ids.update(turn_id.decode() for turn_id in page)
            if cursor == 0:
                return ids

    async def learned_since_refresh(self, user: str) -> int:
        """How many of them no refresh has seen."""
        return int(await self._ask(self._redis.scard(self._key(user, "fresh"))))

    async def standing(self, user: str) -> Standing:
        """What decides when the next refresh pays (see `when.py`); cheap enough to ask after each reply."""
        pipe = self._redis.pipeline(transaction=False)
        pipe.scard(self._key(user, "learned"))
        pipe.scard(self._key(user, "fresh"))
        pipe.hget(self._life(user), "version")
        pipe.hexists(self._key(user, "pointer"), "trial")
        learned, fresh, given_out, tried = await self._ask(pipe.execute())
        version = int(given_out or 0)
        body = await self._ask(self._redis.hget(self._key(user, "versions"), str(version)))
        newest = None if body is None else _read_version(version, body)
        return Standing(learned, fresh, newest, trial=bool(tried))

    async def votes(self, user: str) -> dict[int, Votes]:
        """What the person said of the replies of each version. A reply older than the version of that number
        was brought along from elsewhere, where another one had it."""
        pipe = self._redis.pipeline(transaction=False)
        pipe.hgetall(self._key(user, "ratings"))
        pipe.hkeys(self._key(user, "corrections"))
        ratings, corrected = await self._ask(pipe.execute())
        turns = await self._join_turns(user, list({*ratings, *corrected}))
        wrong = {turn_id.decode() for turn_id in corrected}
        made = await self._made(user, {turn.version for turn in turns if turn.version})
        counts: dict[int, list[int]] = {}
        for turn in turns:
            if turn.author != "model" or turn.version is None:
                continue
            if turn.at >= made.get(turn.version, turn.at):
                down = turn.id in wrong or turn.rating == "down"
                counts.setdefault(turn.version, [0, 0])[down] += 1
        return {version: Votes(up, down) for version, (up, down) in counts.items()}

    async def _made(self, user: str, versions: Collection[int]) -> dict[int, datetime]:
        """When those of these versions were made that are known."""
        if not versions:
            return {}
        numbers = list(versions)
        bodies = await self._ask(self._redis.hmget(self._key(user, "versions"), [*map(str, numbers)]))
        found = zip(numbers, bodies, strict=True)
        return {version: _read_version(version, body).created_at for version, body in found if body}

    async def replies_by(self, user: str, version: int, *, since: datetime) -> int:
        """How many replies that version wrote from `since` on."""
        newer = self._redis.zrange(self._key(user, "order"), _to_micros(since), "+inf", byscore=True)
        turns = await self._read_turns(user, newer)
        return sum(turn.author == "model" and turn.version == version for turn in turns)

    async def mark_refreshed(self, user: str, turn_ids: Iterable[str], *, epoch: int | None = None) -> None:
        """A refresh has seen these turns, whether the gate then accepted its result or not."""
        ids = list(turn_ids)
        for start in range(0, max(1, len(ids)), APPEND_BATCH):
            batch = ids[start : start + APPEND_BATCH]
            await self._fenced(lua.MARK_REFRESHED, user, _or_empty(epoch), *batch)

    async def users(self) -> AsyncIterator[str]:
        """Everyone with turns or versions, in no order; people who come meanwhile may be missed."""
        cursor = 0
        seen: set[bytes] = set()
        while True:
            cursor, page = await self._ask(self._redis.hscan(lua.USERS, cursor, count=500))
            for adapter_id, user in page.items():
                if adapter_id not in seen:
                    seen.add(adapter_id)
                    yield user.decode()
            if cursor == 0:
                return

    async def ever_knew(self, adapter_ids: Sequence[str]) -> set[str]:
        """Those of them that ever had a version here, forgotten or not."""
        known: set[str] = set()
        for start in range(0, len(adapter_ids), READ_BATCH):
            batch = adapter_ids[start : start + READ_BATCH]
            pipe = self._redis.pipeline(transaction=False)
            for adapter_id in batch:
                pipe.exists(lua.life_key(adapter_id))
            lives = await self._ask(pipe.execute())
            known.update(adapter_id for adapter_id, there in zip(batch, lives, strict=True) if there)
        return known

    # The adapter

    async def pointer(self, user: str) -> Pointer:
        pipe = self._redis.pipeline(transaction=False)
        pipe.hget(self._life(user), "epoch")  # first: a forget in between makes it too old, never too new
        pipe.hmget(self._key(user, "pointer"), ["version", "updated_at", "trial", "share", "since"])
        epoch, (version, updated_at, tried, share, since) = await self._ask(pipe.execute())
        return Pointer(
            int(version or 0),
            _from_micros(int(updated_at)) if updated_at else None,
            int(epoch or 0),
            Trial(int(tried), float(share), _from_micros(int(since))) if tried else None,
        )

    async def compare_and_set(
        self,
        user: str,
        expected: int,
        new: int,
        *,
        epoch: int | None = None,
        trial: int | None = None,
        end: TrialEnd | None = None,
    ) -> bool:
        """Move the pointer from `expected` to `new` and tell everyone; False if it stood elsewhere, or if
        `new` or `epoch` is from before the person was forgotten. A trial ends by it, as `end` says; `trial`:
        only while that version is on trial."""
        adapter_id = self.adapter_id(user)
        message = {
            "type": "adapter.updated",
            "user": user,
            "adapter": adapter_id,
            "from": expected,
            "to": new,
        }
        moved = await self._transit(
            lua.COMPARE_AND_SET,
            user,
            _or_empty(epoch),
            expected,
            new,
            _to_micros(self._clock()),
            uuid.uuid4().hex,
            user,
            adapter_id,
            _pack(message),
            _or_empty(trial),
            _pack_end(end),
        )
        return bool(moved)

    async def begin_trial(
        self,
        user: str,
        expected: int,
        version: int,
        share: float,
        *,
        epoch: int | None = None,
        end: TrialEnd | None = None,
    ) -> bool:
        """Let `version` answer a share of the replies, while `expected` answers the others, and tell
        everyone; False as in `compare_and_set`. The trial that `end` is of ends by it; where another one has
        begun, that goes on, and False."""
        adapter_id = self.adapter_id(user)
        begun = await self._transit(
            lua.BEGIN_TRIAL,
            user,
            _or_empty(epoch),
            expected,
            version,
            repr(share),
            _to_micros(self._clock()),
            uuid.uuid4().hex,
            user,
            adapter_id,
            _pack(_trial_news(user, adapter_id, version, share, "begun")),
            _pack_end(end),
            _or_empty(None if end is None else end.version),
        )
        return bool(begun)

    async def end_trial(self, user: str, end: TrialEnd, *, epoch: int | None = None) -> bool:
        """The version on trial answers nothing any more, and everyone is told; False if it was not on trial.
        To end a trial well, move the pointer to its version."""
        news = _trial_news(user, self.adapter_id(user), end.version, end.share, end.outcome)
        ended = await self._transit(
            lua.END_TRIAL, user, _or_empty(epoch), end.version, _pack_end(end), _pack(news)
        )
        return bool(ended)

    async def next_version(self, user: str, *, epoch: int | None = None) -> int:
        """A version number that was never given out before and never will be again, `forget` included."""
        return await self._fenced(lua.NEXT_VERSION, user, _or_empty(epoch))

    async def add_version(self, user: str, record: VersionRecord, *, epoch: int | None = None) -> None:
        """Versions never change: a record that is there already stays."""
        body = {
            "parent": record.parent,
            "created_at": record.created_at.isoformat(),
            "accepted": record.accepted,
            "reason": record.reason,
            "numbers": dict(record.numbers),
            "examples": record.examples,
            "turn_ids": list(record.turn_ids),
            "population": record.population,
            "anew": record.anew,
        }
        await self._fenced(
            lua.ADD_VERSION,
            user,
            _or_empty(epoch),
            record.version,
            _pack(body),
            user,
            self.adapter_id(user),
        )

    async def versions(self, user: str) -> list[VersionRecord]:
        """Oldest first."""
        pipe = self._redis.pipeline(transaction=False)
        pipe.hgetall(self._key(user, "versions"))
        pipe.hgetall(self._key(user, "trials"))
        records, trials = await self._ask(pipe.execute())
        return sorted(
            (_read_version(int(version), body, trials.get(version)) for version, body in records.items()),
            key=lambda record: record.version,
        )

    async def forget(self, user: str) -> Forgotten:
        """Remove everything Redis has of the person, in one step, and tell everyone. What began before can no
        longer write (see `pointer`); the person may come back as new at once."""
        adapter_id = self.adapter_id(user)
        message = {"type": "adapter.forgotten", "user": user, "adapter": adapter_id}
        counts = await self._transit(lua.FORGET, user, adapter_id, _pack(message))
        return Forgotten(*(int(count) for count in counts))

    # News

    async def publish_progress(
        self, user: str, progress: Mapping[str, Any], *, epoch: int | None = None
    ) -> None:
        """Tell everyone how a refresh gets on, and keep the newest word for those who come later."""
        message = {"type": "adapter.refresh", "user": user, **progress}
        await self._fenced(
            lua.PROGRESS, user, _or_empty(epoch), _pack(dict(progress)), PROGRESS_KEPT_MS, _pack(message)
        )

    async def progress(self, user: str) -> dict[str, Any] | None:
        """The newest progress published for this person."""
        newest = await self._ask(self._redis.get(self._key(user, "refresh")))
        return None if newest is None else cast(dict[str, Any], json.loads(newest))

    @asynccontextmanager
    async def events(self) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
        """Everything published from the moment the block is entered. After Redis was away comes
        `{"type": "store.reconnected"}`: messages may be missing, so read the state again."""
        pubsub = self._redis.pubsub()
        try:
            await self._ask(pubsub.subscribe(UPDATES))
            await self._ask(_subscribed(pubsub))
            async with aclosing(_listen(pubsub)) as messages:
                yield messages
        finally:
            await pubsub.aclose()  # type: ignore[no-untyped-call]

    # Replies under way

    async def create_response(
        self,
        user: str,
        response_id: str,
        body: bytes,
        *,
        holder: str,
        lease_s: float,
        ttl_s: float,
        epoch: int | None = None,
        begun: datetime | None = None,
    ) -> bool:
        """Record a reply as running and held by this gateway; False if there is one of that id already.
        `begun` is heeded where there is no `epoch`."""
        made = await self._run(
            lua.CREATE_RESPONSE,
            [_response_key(response_id), self._key(user, "responses"), self._life(user)],
            [
                _fence(epoch, begun),
                response_id,
                user,
                "running",
                body,
                holder,
                _ms(lease_s),
                _ms(ttl_s),
                uuid.uuid4().hex,
            ],
        )
        return bool(self._live(user, made))

    async def response(self, user: str, response_id: str) -> ResponseRecord:
        """Raises UnknownResponse, for another person's too."""
        # Keys with a colon behind a response's id are its parts.
        record = None if ":" in response_id else await self._response(response_id)
        if record is None or record.user != user:
            raise UnknownResponse(response_id)
        return record

    async def append_response_events(
        self, response_id: str, first: int, events: Sequence[bytes], *, holder: str, ttl_s: float
    ) -> None:
        """Add the events numbered `first`, `first + 1`, …; numbers that are there already are skipped.
        Raises UnknownResponse (forgotten or expired), LeaseLost."""
        arguments = [response_id, holder, _ms(ttl_s), MAX_RESPONSE_EVENTS, first, *events]
        self._held(response_id, await self._run_response(lua.APPEND_RESPONSE, response_id, arguments))

    async def read_response_events(self, response_id: str, after: int = -1) -> list[tuple[int, bytes]]:
        """The events numbered above `after`. Ask `response` first whether they are this person's to read.
        Raises UnknownResponse, EventsExpired."""
        key = _response_key(response_id)
        pipe = self._redis.pipeline(transaction=False)
        pipe.exists(key)
        pipe.xrange(f"{key}:events", min=f"{after + 2}-0")
        pipe.xrange(f"{key}:events", count=1)
        exists, entries, oldest = await self._ask(pipe.execute())
        if not exists:
            raise UnknownResponse(response_id)
        events = [(_event_number(entry_id), fields[b"e"]) for entry_id, fields in entries]
        if oldest and _event_number(oldest[0][0]) > after + 1:
            raise EventsExpired(response_id, after, _event_number(oldest[0][0]))
        return events

    async def finish_response(
        self, response_id: str, state: str, body: bytes, *, holder: str, ttl_s: float
    ) -> None:
        """The reply has come to its end. Raises UnknownResponse, LeaseLost."""
        arguments = [response_id, holder, state, body, _ms(ttl_s)]
        self._held(response_id, await self._run_response(lua.FINISH_RESPONSE, response_id, arguments))

    async def claim_response(self, response_id: str, *, holder: str, lease_s: float) -> bool:
        """Renew the lease, or take over a running reply whose gateway let its lease run out. Of all that try,
        one gets True."""
        arguments = [response_id, holder, _ms(lease_s)]
        return bool(await self._run_response(lua.CLAIM_RESPONSE, response_id, arguments))

    async def adopt_response(self, response_id: str, *, holder: str, lease_s: float) -> ResponseRecord | None:
        """Claim and read; None if another was faster or it is gone."""
        if not await self.claim_response(response_id, holder=holder, lease_s=lease_s):
            return None
        return await self._response(response_id)

    async def orphans(self) -> list[str]:
        """Running replies that nobody holds."""
        running = sorted(
            member.decode() for member in await self._ask(self._redis.smembers(lua.RUNNING_RESPONSES))
        )
        if not running:
            return []
        leases = await self._ask(self._redis.mget([f"{_response_key(each)}:lease" for each in running]))
        return [each for each, lease in zip(running, leases, strict=True) if lease is None]

    # Tickets

    async def put_ticket(self, ticket_hash: str, payload: bytes, *, ttl_s: float) -> None:
        await self._ask(self._redis.set(lua.TICKET_PREFIX + ticket_hash, payload, px=_ms(ttl_s)))

    async def take_ticket(self, ticket_hash: str) -> bytes | None:
        """The payload, to one caller only; None if it was never there, is used, or has run out."""
        payload = await self._ask(self._redis.getdel(lua.TICKET_PREFIX + ticket_hash))
        return cast("bytes | None", payload)

    # Inside

    def _key(self, user: str, part: str) -> str:
        return lua.user_prefix(self.adapter_id(user)) + part

    def _life(self, user: str) -> str:
        return lua.life_key(self.adapter_id(user))

    async def _ask(self, call: Any) -> Any:
        """Await a call to Redis within the deadline; its failures by our names."""
        try:
            with talking_to_redis():
                async with asyncio.timeout(self._deadline_s):
                    return await call
        except TimeoutError as error:
            raise StoreUnavailable(f"no answer within {self._deadline_s} s") from error

    async def _run(self, script: str, keys: Sequence[str], arguments: Sequence[Any]) -> Any:
        return await self._ask(self._redis.register_script(script)(keys=keys, args=arguments))

    async def _transit(self, script: str, user: str, *arguments: str | bytes | int) -> Any:
        adapter_id = self.adapter_id(user)
        return await self._run(script, [lua.user_prefix(adapter_id), lua.life_key(adapter_id)], arguments)

    async def _fenced(self, script: str, user: str, *arguments: str | bytes | int) -> int:
        return self._live(user, await self._transit(script, user, *arguments))

    def _live(self, user: str, answer: Any) -> int:
        if answer == -1:
            raise HistoryForgotten(user)
        return int(answer)

    async def _run_response(self, script: str, response_id: str, arguments: Sequence[Any]) -> int:
        return int(await self._run(script, [_response_key(response_id)], arguments))

    def _held(self, response_id: str, answer: int) -> None:
        if answer == 0:
            raise UnknownResponse(response_id)
        if answer == -1:
            raise LeaseLost(response_id)

    async def _response(self, response_id: str) -> ResponseRecord | None:
        user, state, body = await self._ask(
            self._redis.hmget(_response_key(response_id), ["user", "state", "body"])
        )
        return None if user is None else ResponseRecord(response_id, user.decode(), state.decode(), body)

    async def _all_turns(self, user: str, part: str) -> list[Turn]:
        """The turns of a sorted set, some at a time: a long history in one answer would outlast the deadline
        and hold up everyone. One that comes in meanwhile may move another behind the place that was read, so
        that it comes twice."""
        turns: dict[str, Turn] = {}
        for first in itertools.count(0, READ_BATCH):
            members = await self._ask(
                self._redis.zrange(self._key(user, part), first, first + READ_BATCH - 1)
            )
            found = await self._join_turns(user, [_member_id(member) for member in members])
            turns.update((turn.id, turn) for turn in found)
            if len(members) < READ_BATCH:
                break
        return list(turns.values())

    async def _read_turns(self, user: str, members: Any) -> list[Turn]:
        return await self._join_turns(user, [_member_id(member) for member in await self._ask(members)])

    async def _join_turns(self, user: str, ids: Sequence[bytes]) -> list[Turn]:
        """The turns with what was said of them since, in the order of `ids`; ids without a turn are
        skipped."""
        turns: list[Turn] = []
        for start in range(0, len(ids), READ_BATCH):
            batch = list(ids[start : start + READ_BATCH])
            pipe = self._redis.pipeline(transaction=False)
            for part in ("turns", "ratings", "removed"):
                pipe.hmget(self._key(user, part), batch)
            bodies, ratings, removed = await self._ask(pipe.execute())
            turns += [
                _read_turn(turn_id, body, rating, gone)
                for turn_id, body, rating, gone in zip(batch, bodies, ratings, removed, strict=True)
                if body is not None
            ]
        return turns


@contextmanager
def talking_to_redis() -> Iterator[None]:
    """What Redis cannot do now is a StoreUnavailable, and a cancellation within ends the task for sure."""
    try:
        with _cancellable():
            yield
    except (RedisConnectionError, RedisTimeoutError, OutOfMemoryError, ReadOnlyError) as error:
        raise StoreUnavailable(str(error)) from error
    except ResponseError as error:
        if "MISCONF" in str(error) or "OOM" in str(error):  # disk or memory is full
            raise StoreUnavailable(str(error)) from error
        raise


async def _subscribed(pubsub: PubSub) -> None:
    """Wait until the server has said so: what is published from then on arrives."""
    while await pubsub.get_message(timeout=1.0) is None:
        pass


@contextmanager
def _cancellable() -> Iterator[None]:
    """A cancellation within ends the task for sure. The client waits with asyncio.wait_for, which in Python
    3.11 drops one that arrives together with the result or an error: a task that only ever talks to Redis
    would never end."""
    task = asyncio.current_task()
    cancels = task.cancelling() if task else 0
    try:
        yield
    finally:
        if task and task.cancelling() > cancels:
            raise asyncio.CancelledError


async def _listen(pubsub: PubSub) -> AsyncGenerator[dict[str, Any], None]:
    while True:
        try:
            with _cancellable():
                message = await pubsub.get_message(timeout=1.0)
        except (RedisConnectionError, RedisTimeoutError):
            await asyncio.sleep(0.2)  # then it connects and subscribes anew
            continue
        if message is None:
            continue
        if message["type"] == "subscribe":
            yield {"type": RECONNECTED}
        elif message["type"] == "message":
            yield json.loads(message["data"])


def _turn_arguments(turn: Turn) -> list[str | bytes | int]:
    body = {
        "conversation": turn.conversation,
        "at": _to_micros(turn.at),
        "role": turn.role,
        "text": turn.text,
    }
    body["author"] = turn.author
    if turn.version is not None:
        body["version"] = turn.version
    if turn.corrects is not None:
        body["corrects"] = turn.corrects
    return [
        turn.id,
        _to_micros(turn.at),
        turn.conversation,
        _pack(body),
        turn.author if turn.text.strip() else "blank",
        _or_empty(turn.rating),
        "1" if turn.removed else "",
        _or_empty(turn.corrects),
    ]


def _read_turn(turn_id: bytes, body: bytes, rating: bytes | None, removed: bytes | None) -> Turn:
    said = json.loads(body)
    return Turn(
        id=turn_id.decode(),
        conversation=said["conversation"],
        at=_from_micros(said["at"]),
        role=cast(Role, said["role"]),
        text=said["text"],
        author=cast(Author, said["author"]),
        rating=None if rating is None else cast(Rating, rating.decode()),
        version=said.get("version"),
        corrects=said.get("corrects"),
        removed=removed is not None,
    )


def _trial_news(user: str, adapter_id: str, version: int, share: float, state: str) -> dict[str, Any]:
    about = {"version": version, "share": share, "state": state}
    return {"type": "adapter.trial", "user": user, "adapter": adapter_id, **about}


def _pack_end(end: TrialEnd | None) -> bytes:
    if end is None:
        return b""
    times = {"began": end.began.isoformat(), "ended": end.ended.isoformat()}
    return _pack({**times, "share": end.share, "outcome": end.outcome, "numbers": dict(end.numbers)})


def _read_end(version: int, body: bytes | None) -> TrialEnd | None:
    if not body:
        return None
    end = json.loads(body)
    began, ended = (datetime.fromisoformat(end[name]) for name in ("began", "ended"))
    return TrialEnd(version, end["share"], began, ended, end["outcome"], end["numbers"])


def _read_version(version: int, body: bytes, end: bytes | None = None) -> VersionRecord:
    record = json.loads(body)
    return VersionRecord(
        version=version,
        parent=record["parent"],
        created_at=datetime.fromisoformat(record["created_at"]),
        accepted=record["accepted"],
        reason=record["reason"],
        numbers=record["numbers"],
        examples=record["examples"],
        turn_ids=tuple(record["turn_ids"]),
        trial=_read_end(version, end),
        population=record.get("population", 0),
        anew=record.get("anew", False),
    )


def _title(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= TITLE_CHARS else line[: TITLE_CHARS - 1].rstrip() + "…"


def _pack(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8")


def _or_empty(value: str | int | None) -> str:
    return "" if value is None else str(value)


def _fence(epoch: int | None, begun: datetime | None) -> str:
    return f"@{_to_micros(begun)}" if epoch is None and begun is not None else _or_empty(epoch)


def _to_micros(at: datetime) -> int:
    return (at - _EPOCH_START) // timedelta(microseconds=1)


def _from_micros(micros: float) -> datetime:
    return _EPOCH_START + timedelta(microseconds=int(micros))


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def _member_id(member: bytes) -> bytes:
    return member.split(b":", 1)[1]


def _response_key(response_id: str) -> str:
    return lua.RESPONSE_PREFIX + response_id


def _event_number(entry_id: bytes) -> int:
    """Stream ids begin at 1-0, events at 0."""
    return int(entry_id.split(b"-", 1)[0]) - 1
