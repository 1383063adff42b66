"""Our own HTTP endpoints, for the page and for scripts: a person's adapter, history and what was learned."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from personalization.history import CLOCK_SKEW, Turn, dump, learned, parse
from personalization.lineage import marks
from personalization.store import Pointer, Store, UnknownTurn, VersionRecord
from personalization.trial import shown, tally
from service.auth import TICKET_SECONDS, checked_user
from service.errors import BadRequest, Conflict, Forbidden, NotAuthenticated, NotFound
from service.http import Door, address, json_response, read_json, read_limited
from service.limits import RateLimits
from service.protocol import MAX_FRAME_BYTES, FeedbackCreate
from service.replies import Replies
from service.session import Session

MAX_IMPORT_BYTES = 64 << 20
LOOPBACK = ("127.0.0.1", "::1", "local")


class AskDemo(msgspec.Struct):
    user: str


class AskRollback(msgspec.Struct):
    version: int


@dataclass(frozen=True)
class AttuneServices:
    """`refresh` → {job_id, state}; `rollback` raises LookupError for a version it cannot go back to; `forget`
    says what it removed. `demo_hours` None: nobody gets a token by name."""

    door: Door
    session: Session
    replies: Replies
    limits: RateLimits
    base_model: str
    clock: Callable[[], float]
    refresh: Callable[[str, str], Awaitable[dict[str, Any]]]
    rollback: Callable[[str, int], Awaitable[int]]
    forget: Callable[[str], Awaitable[dict[str, Any]]]
    demo_hours: float | None = None
    samples: Sequence[dict[str, str]] = field(default_factory=tuple)


class AttuneApi:
    def __init__(self, services: AttuneServices) -> None:
        self._services = services
        self._door = services.door
        self._store: Store = services.session.store

    def routes(self) -> list[Route]:
        return [
            Route("/attune/tickets", self.create_ticket, methods=["POST"]),
            Route("/attune/demo/session", self.create_demo_session, methods=["POST"]),
            Route("/attune/me", self.me, methods=["GET"]),
            Route("/attune/me", self.forget, methods=["DELETE"]),
            Route("/attune/conversations", self.conversations, methods=["GET"]),
            Route("/attune/conversations/{conversation:path}", self.conversation, methods=["GET"]),
            Route("/attune/versions", self.versions, methods=["GET"]),
            Route("/attune/versions/{version}/turns", self.version_turns, methods=["GET"]),
            Route("/attune/rollback", self.rollback, methods=["POST"]),
            Route("/attune/refresh", self.refresh, methods=["POST"]),
            Route("/attune/import", self.import_history, methods=["POST"]),
            Route("/attune/export", self.export, methods=["GET"]),
            Route("/attune/feedback", self.feedback, methods=["POST"]),
            Route("/attune/turns/learned", self.learned, methods=["GET"]),
            Route("/attune/turns/{turn:path}/learning", self.unlearn, methods=["DELETE"]),
        ]

    # ------------------------------------------------------------ coming in

    async def create_ticket(self, request: Request) -> Response:
        person = await self._door.person(request)
        ticket = await self._door.auth.issue_ticket(person, request.headers.get("origin"))
        return json_response({"ticket": ticket, "expires_in": TICKET_SECONDS})

    async def create_demo_session(self, request: Request) -> Response:
        """A token by name, for the page's user switcher on one machine."""
        await self._door.knock(request)
        hours = self._services.demo_hours
        if hours is None:
            raise NotFound("demo users are not enabled here")
        if address(request) not in LOOPBACK:
            raise Forbidden("demo users exist on this machine only")
        try:
            user = checked_user((await read_json(request, AskDemo)).user)
        except NotAuthenticated as error:
            raise BadRequest(error.message, param="user") from None
        return json_response({"token": self._door.auth.sign(user, hours * 3600), "user": user})

    # ------------------------------------------------------------ the person

    async def me(self, request: Request) -> Response:
        user = (await self._door.person(request)).user
        services = self._services
        pointer = await self._store.pointer(user)
        limits = services.limits.limits
        return json_response(
            {
                "user": user,
                "adapter": {
                    "version": pointer.version,
                    "base": services.base_model,
                    "updated_at": None if pointer.updated_at is None else pointer.updated_at.isoformat(),
                },
                "learned_turns": await self._store.learned_count(user),
                "learned_since_refresh": await self._store.learned_since_refresh(user),
                "auto_refresh_after": services.session.options.when.after_turns,
                "refresh": await self._store.progress(user),
                "limits": {
                    "replies_per_user": limits.replies_per_user,
                    "replies_per_socket": limits.replies_per_socket,
                    "sockets_per_user": limits.sockets_per_user,
                    "frame_bytes": MAX_FRAME_BYTES,
                    "context_tokens": services.session.renderer.context_length,
                },
                "samples": list(services.samples),
            }
        )

    async def forget(self, request: Request) -> Response:
        """Forget the caller everywhere. What is being written for them is stopped first, so that no word of
        it is saved afterwards."""
        user = (await self._door.person(request)).user
        await self._services.replies.stop_all(user)
        self._services.session.forget(user)
        return json_response({"forgotten": await self._services.forget(user)})

    # ------------------------------------------------------------ history

    async def conversations(self, request: Request) -> Response:
        user = (await self._door.person(request)).user
        found = await self._store.conversations(user)
        return json_response(
            {
                "conversations": [
                    {"id": each.id, "title": each.title, "last_at": each.last_at, "turns": each.turns}
                    for each in found
                ]
            }
        )

    async def conversation(self, request: Request) -> Response:
        user = (await self._door.person(request)).user
        name = request.path_params["conversation"]
        turns = await self._store.conversation(user, name)
        if not turns:
            raise NotFound(f"no conversation {name!r:.160}", code="conversation_not_found")
        return json_response({"id": name, "turns": [turn_shown(turn) for turn in turns]})

    async def import_history(self, request: Request) -> Response:
        """Add the body's turns, JSON Lines, to the caller's history. Lines of other people are errors."""
        user = (await self._door.person(request)).user
        epoch = (await self._store.pointer(user)).epoch
        body = await read_limited(request, MAX_IMPORT_BYTES)
        now = datetime.fromtimestamp(self._services.clock(), UTC)
        parsed = await asyncio.to_thread(parse, body.splitlines(), not_after=now + CLOCK_SKEW)
        turns = parsed.turns.get(user, [])
        foreign = sum(len(others) for name, others in parsed.turns.items() if name != user)
        errors = [{"line": error.number, "message": error.message} for error in parsed.errors]
        if foreign:
            told = f"{foreign} turns are of other users than {user!r} and were left out"
            errors.insert(0, {"line": 0, "message": told})
        new = await self._store.append(user, turns, epoch=epoch)
        return json_response({"imported": new, "known": len(turns) - new, "errors": errors})

    async def export(self, request: Request) -> Response:
        user = (await self._door.person(request)).user
        turns = await self._store.turns(user)

        async def lines() -> AsyncGenerator[bytes, None]:
            for line in dump(user, turns):
                yield line.encode() + b"\n"

        headers = {"content-disposition": 'attachment; filename="attune-history.jsonl"'}
        return StreamingResponse(lines(), media_type="application/x-ndjson", headers=headers)

    # ------------------------------------------------------------ learning

    async def feedback(self, request: Request) -> Response:
        """What `feedback.create` does on a socket: the body is that event, the answer `feedback.created`."""
        user = (await self._door.person(request)).user
        saved = await self._services.session.feedback(user, await read_json(request, FeedbackCreate))
        await self._services.session.settle_trial(user)
        return json_response(saved)

    async def learned(self, request: Request) -> Response:
        user = (await self._door.person(request)).user
        turns = await self._store.turns(user)
        return json_response({"turns": [turn_shown(turn) for turn in turns if learned(turn)]})

    async def unlearn(self, request: Request) -> Response:
        user = (await self._door.person(request)).user
        turn = request.path_params["turn"]
        try:
            await self._store.remove_turn(user, turn)
        except UnknownTurn:
            raise NotFound(f"no turn {turn!r:.80}", code="turn_not_found") from None
        return json_response({"id": turn, "learning": False})

    async def refresh(self, request: Request) -> Response:
        user = (await self._door.person(request)).user
        return json_response(await self._services.refresh(user, "asked"), 202)

    async def versions(self, request: Request) -> Response:
        user = (await self._door.person(request)).user
        pointer = await self._store.pointer(user)
        records = await self._store.versions(user)
        marked = marks(records, await self._store.learned_ids(user))
        return json_response(
            {
                "serving": pointer.version,
                "trial": await self._trial_shown(user, pointer),
                "versions": [
                    version_shown(each, pointer, marked.get(each.version, frozenset()))
                    for each in reversed(records)
                ],
            }
        )

    async def _trial_shown(self, user: str, pointer: Pointer) -> dict[str, Any] | None:
        trial, policy = pointer.trial, self._services.session.options.trial
        if trial is None:
            return None
        counted = await tally(self._store, user, pointer)
        return {
            "version": trial.version,
            "share": trial.share,
            "since": trial.since,
            "needed": policy.replies,
            **shown(counted),
        }

    async def version_turns(self, request: Request) -> Response:
        """What one version, published or refused, was trained on, oldest first. `learned` says of each turn
        whether the next one may learn it too."""
        user = (await self._door.person(request)).user
        version = request.path_params["version"]
        records = await self._store.versions(user)
        record = next((each for each in records if str(each.version) == version), None)
        if record is None:
            raise NotFound(f"no version {version:.80}", code="version_not_found")
        turns = await self._store.turns_named(user, record.turn_ids)
        return json_response({"version": record.version, "turns": [turn_shown(turn) for turn in turns]})

    async def rollback(self, request: Request) -> Response:
        user = (await self._door.person(request)).user
        version = (await read_json(request, AskRollback)).version
        records = await self._store.versions(user)
        if version != 0 and not any(each.version == version and each.accepted for each in records):
            raise NotFound(f"no version {version} to go back to", code="version_not_found", param="version")
        try:
            await self._services.rollback(user, version)
        except LookupError as error:
            raise Conflict(str(error), code="version_unavailable") from None
        return json_response({"version": version})


def turn_shown(turn: Turn) -> dict[str, Any]:
    return {
        "id": turn.id,
        "conversation": turn.conversation,
        "role": turn.role,
        "text": turn.text,
        "at": turn.at,
        "author": turn.author,
        "rating": turn.rating,
        "version": turn.version,
        "corrects": turn.corrects,
        "learned": learned(turn),
    }


def version_shown(record: VersionRecord, pointer: Pointer, gone: frozenset[str]) -> dict[str, Any]:
    """`marked` counts the turns that went into it and are not to be learned any more."""
    return {
        "version": record.version,
        "parent": record.parent,
        "created_at": record.created_at,
        "accepted": record.accepted,
        "serving": record.version == pointer.version,
        "reason": record.reason,
        "numbers": dict(record.numbers),
        "examples": record.examples,
        "turns": len(record.turn_ids),
        "marked": len(gone),
        "population": record.population,
        "on_trial": pointer.trial is not None and record.version == pointer.trial.version,
        "trial": record.trial,
    }
