"""Who is asking. Identity comes only from a credential: a signed bearer token, or a ticket bought with one.

Browsers cannot set headers on a WebSocket, so a page trades its token for a ticket: random, single use, 60
seconds, bound to the person and the page's origin. It travels as a subprotocol, never in a URL that gets
logged."""

import hashlib
import secrets
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import jwt
import msgspec

from personalization.history import InvalidTurn, check_user
from service.errors import Forbidden, NotAuthenticated
from service.protocol import TICKET_PREFIX

AUDIENCE = "attune"
ALGORITHM = "HS256"
TICKET_SECONDS = 60


class Person(msgspec.Struct, frozen=True):
    """Whoever proved to be `user`, until `expires_at` (seconds since the epoch)."""

    user: str
    expires_at: float


class TicketStore(Protocol):
    async def put_ticket(self, ticket_hash: str, payload: bytes, *, ttl_s: float) -> None: ...
    async def take_ticket(self, ticket_hash: str) -> bytes | None: ...


class _Ticket(msgspec.Struct, frozen=True):
    person: Person
    origin: str | None


def allowed_origins(host: str, port: int, extra: Iterable[str] = ()) -> frozenset[str]:
    """The page's own addresses, as browsers write them, and `extra`. Never derived from a request's Host
    header: under DNS rebinding that header is the attacker's name."""
    hosts = {"localhost", "127.0.0.1", "[::1]"}
    if host not in ("0.0.0.0", "::"):
        hosts.add(f"[{host}]" if ":" in host else host)
    own = {f"http://{name}" if port == 80 else f"http://{name}:{port}" for name in hosts}
    return frozenset(origin.rstrip("/").lower() for origin in (*own, *extra))


class Authenticator:
    """Checks credentials and origins; signs tokens for the demo's user switcher."""

    def __init__(
        self,
        key: bytes,
        store: TicketStore,
        *,
        origins: frozenset[str],
        clock: Callable[[], float],
        new_ticket: Callable[[], str] = lambda: secrets.token_urlsafe(32),
    ) -> None:
        self._key = key
        self._store = store
        self._origins = origins
        self._clock = clock
        self._new_ticket = new_ticket

    def bearer(self, header: str | None) -> Person:
        """The person an Authorization header proves. Raises NotAuthenticated."""
        scheme, _, token = (header or "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise NotAuthenticated("expected the header 'Authorization: Bearer <token>'")
        try:
            claims = jwt.decode(
                token.strip(),
                self._key,
                algorithms=[ALGORITHM],
                audience=AUDIENCE,
                # Expiry is checked below, against our own clock.
                options={"require": ["sub", "exp", "aud"], "verify_exp": False, "verify_iat": False},
            )
        except jwt.PyJWTError:
            raise NotAuthenticated("the token is not one this service signed") from None
        person = Person(user=checked_user(claims["sub"]), expires_at=_expiry(claims["exp"]))
        self.check_expiry(person)
        return person

    def check_expiry(self, person: Person) -> None:
        """Raises NotAuthenticated once the credential has run out; asked again during long sockets."""
        if self._clock() >= person.expires_at:
            raise NotAuthenticated("the token has expired", code="token_expired")

    def sign(self, user: str, seconds: float) -> str:
        return signed(self._key, user, self._clock(), seconds)[0]

    def check_origin(self, origin: str | None) -> None:
        """Raises Forbidden when a browser says the request comes from a page that is not ours."""
        if origin is not None and origin not in self._origins:
            raise Forbidden(f"requests from pages of {origin!r:.100} are not accepted", code="wrong_origin")

    async def issue_ticket(self, person: Person, origin: str | None) -> str:
        """A ticket for one WebSocket. The store keeps its hash, so reading the store opens no socket."""
        ticket = self._new_ticket()
        payload = msgspec.msgpack.encode(_Ticket(person, origin))
        await self._store.put_ticket(_hash(ticket), payload, ttl_s=TICKET_SECONDS)
        return ticket

    async def redeem_ticket(self, ticket: str, origin: str | None) -> Person:
        """The person who bought the ticket. It is spent even when the origin is wrong. Raises
        NotAuthenticated."""
        payload = await self._store.take_ticket(_hash(ticket))
        if payload is None:
            raise NotAuthenticated(
                "the ticket is unknown, used or older than a minute", code="invalid_ticket"
            )
        found = msgspec.msgpack.decode(payload, type=_Ticket)
        if found.origin != origin:
            raise NotAuthenticated("the ticket was given to another origin", code="invalid_ticket")
        self.check_expiry(found.person)
        return found.person

    async def socket(self, header: str | None, offered: list[str], origin: str | None) -> Person:
        """The person of a WebSocket handshake: from its header if it has one, else from its ticket."""
        if header is not None:
            return self.bearer(header)
        for name in offered:
            if name.startswith(TICKET_PREFIX):
                return await self.redeem_ticket(name.removeprefix(TICKET_PREFIX), origin)
        raise NotAuthenticated("expected an Authorization header or a 'ticket.<value>' subprotocol")


def signed(key: bytes, user: str, now: float, seconds: float) -> tuple[str, int]:
    """A bearer token for `user`, and the second since the epoch at which it runs out."""
    expires_at = int(now + seconds)
    claims = {"sub": checked_user(user), "aud": AUDIENCE, "iat": int(now), "exp": expires_at}
    return jwt.encode(claims, key, algorithm=ALGORITHM), expires_at


def checked_user(user: Any) -> str:
    """A user's name as a token may carry it: one that can have a history. Raises NotAuthenticated."""
    try:
        return check_user(user)
    except InvalidTurn as error:
        raise NotAuthenticated(str(error)) from None


def _expiry(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise NotAuthenticated("expected a number as the token's expiry")
    return float(value)


def _hash(ticket: str) -> str:
    return hashlib.sha256(ticket.encode()).hexdigest()
