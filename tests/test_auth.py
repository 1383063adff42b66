"""Credentials: what is accepted, what is not, and what a ticket is good for."""

import time
from typing import Any

import jwt
import pytest

from personalization.store import Store
from service.auth import Authenticator, Person, allowed_origins
from service.errors import Forbidden, NotAuthenticated

KEY = b"k" * 32
PAGE = "http://localhost:8080"


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def auth(store: Store, clock: Clock) -> Authenticator:
    return Authenticator(KEY, store, origins=allowed_origins("127.0.0.1", 8080), clock=clock)


def token(clock: Clock, key: bytes = KEY, algorithm: str = "HS256", **changes: Any) -> str:
    claims = {"sub": "ann", "aud": "attune", "exp": clock.now + 60} | changes
    kept = {name: value for name, value in claims.items() if value is not None}
    return "Bearer " + jwt.encode(kept, key, algorithm=algorithm)


async def test_a_signed_token_proves_its_user(auth: Authenticator, clock: Clock) -> None:
    assert auth.bearer("Bearer " + auth.sign("ann", 60)) == Person("ann", clock.now + 60)
    assert auth.bearer(token(clock).replace("Bearer", "bearer")).user == "ann"


async def test_a_token_runs_out(auth: Authenticator, clock: Clock) -> None:
    person = auth.bearer(token(clock))
    clock.now += 60
    with pytest.raises(NotAuthenticated, match="expired"):
        auth.bearer(token(clock, exp=clock.now))
    with pytest.raises(NotAuthenticated, match="expired"):
        auth.check_expiry(person)


@pytest.mark.parametrize(
    "changes",
    [
        {"key": b"x" * 32},
        {"algorithm": "HS512", "key": b"k" * 64},
        {"aud": "other"},
        {"aud": None},
        {"exp": None},
        {"sub": None},
        {"sub": ""},
        {"sub": "a\nb"},
        {"sub": "  "},
        {"sub": "x" * 257},
    ],
)
async def test_any_other_token_is_refused(auth: Authenticator, clock: Clock, changes: dict[str, Any]) -> None:
    with pytest.raises(NotAuthenticated):
        auth.bearer(token(clock, **changes))


async def test_an_unsigned_token_is_refused(auth: Authenticator, clock: Clock) -> None:
    unsigned = jwt.encode({"sub": "ann", "aud": "attune", "exp": clock.now + 60}, None, algorithm="none")
    with pytest.raises(NotAuthenticated):
        auth.bearer(f"Bearer {unsigned}")


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Basic YTpi", "Bearer a.b.c", "x"])
async def test_a_header_without_a_token_is_refused(auth: Authenticator, header: str | None) -> None:
    with pytest.raises(NotAuthenticated):
        auth.bearer(header)


async def test_a_ticket_opens_one_socket_of_its_person(auth: Authenticator, clock: Clock) -> None:
    ann = Person("ann", clock.now + 60)
    ticket = await auth.issue_ticket(ann, PAGE)
    assert await auth.socket(None, ["attune.v1.json", f"ticket.{ticket}"], PAGE) == ann
    with pytest.raises(NotAuthenticated) as caught:
        await auth.socket(None, [f"ticket.{ticket}"], PAGE)
    assert caught.value.code == "invalid_ticket"


async def test_a_ticket_is_spent_by_the_wrong_origin(auth: Authenticator, clock: Clock) -> None:
    ticket = await auth.issue_ticket(Person("ann", clock.now + 60), PAGE)
    for origin in ("http://127.0.0.1:8080", PAGE):
        with pytest.raises(NotAuthenticated):
            await auth.redeem_ticket(ticket, origin)


async def test_a_ticket_is_no_better_than_the_token_it_was_bought_with(
    auth: Authenticator, clock: Clock
) -> None:
    ticket = await auth.issue_ticket(Person("ann", clock.now + 10), None)
    clock.now += 10
    with pytest.raises(NotAuthenticated, match="expired"):
        await auth.redeem_ticket(ticket, None)


async def test_a_ticket_lives_a_minute_in_the_store_by_its_hash_only(
    auth: Authenticator, clock: Clock, redis: Any
) -> None:
    ticket = await auth.issue_ticket(Person("ann", clock.now + 60), PAGE)
    (key,) = await redis.keys("*")
    assert ticket.encode() not in key
    assert 50_000 < await redis.pttl(key) <= 60_000


async def test_a_socket_without_any_credential_is_refused(auth: Authenticator) -> None:
    with pytest.raises(NotAuthenticated):
        await auth.socket(None, ["attune.v1.json"], PAGE)
    with pytest.raises(NotAuthenticated):
        await auth.socket(None, ["ticket."], PAGE)


async def test_only_our_own_pages_may_ask(auth: Authenticator) -> None:
    for origin in (None, PAGE, "http://127.0.0.1:8080", "http://[::1]:8080"):
        auth.check_origin(origin)
    for origin in ("null", "http://evil.example", "http://localhost:8081", "https://localhost:8080", ""):
        with pytest.raises(Forbidden):
            auth.check_origin(origin)


def test_more_origins_can_be_named() -> None:
    origins = allowed_origins("0.0.0.0", 80, ["https://chat.example/", "https://Talk.Example"])
    assert {"https://chat.example", "https://talk.example"} <= origins
    assert not any("0.0.0.0" in origin for origin in origins)


@pytest.mark.parametrize(
    ("host", "port", "origin"),
    [
        ("chat.example", 8080, "http://chat.example:8080"),
        ("Chat.Example", 8080, "http://chat.example:8080"),
        ("127.0.0.1", 80, "http://127.0.0.1"),  # a browser leaves http's own port out
        ("fd00::7", 8080, "http://[fd00::7]:8080"),
    ],
)
def test_the_pages_own_origin_is_written_as_a_browser_does(host: str, port: int, origin: str) -> None:
    assert origin in allowed_origins(host, port)


def test_the_clock_is_ours_not_the_librarys(store: Store) -> None:
    past = Authenticator(KEY, store, origins=frozenset(), clock=lambda: 1_000.0)
    assert past.bearer("Bearer " + past.sign("ann", 60)).expires_at == 1_060.0
    now = Authenticator(KEY, store, origins=frozenset(), clock=time.time)
    with pytest.raises(NotAuthenticated):
        now.bearer("Bearer " + past.sign("ann", 60))
