"""The gateway's app: WebSockets, HTTP, the page, health and metrics, around one `Session`.

`build_app` takes what the other rooms give it as a `GatewayDeps`; `gateway.py` makes those and serves.
"""

import asyncio
import contextlib
import os
import secrets
import socket as sockets_library
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import structlog
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from engine.client import EngineClient, EngineError, EngineLost
from engine.request import AdapterRef
from personalization.jobs import QueueStats
from personalization.prompt import Renderer
from personalization.store import RECONNECTED, Store, StoreUnavailable
from service import protocol
from service.attune_api import AttuneApi, AttuneServices
from service.auth import Authenticator
from service.engine_metrics import Observed
from service.errors import ApiError, Forbidden, NotAuthenticated, RateLimited
from service.events import SessionExpiring, pushed_event
from service.http import KNOWN_ERRORS, Door, as_api_error, error_handler, json_response
from service.limits import Limits, RateLimits
from service.metrics import CONTENT_TYPE, Metrics
from service.openai_api import OpenAIApi
from service.page import SecurityHeaders, page_app
from service.protocol import Codec, choose_subprotocol
from service.replies import Patience, Replies
from service.session import Session, SessionOptions
from service.sockets import Socket, SocketOptions, Sockets, SocketServices, close
from service.store_health import StoreHealth

log = structlog.get_logger(__name__)

READY_PATIENCE_S = 2.0
_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class GatewayOptions:
    """What one installation chooses."""

    token_key: bytes
    base_model: str
    adapter_root: Path
    page_folder: Path
    origins: frozenset[str] = frozenset()
    demo_hours: float | None = None  # life of a token given by name; None: nobody gets one
    samples: Sequence[dict[str, str]] = ()
    limits: Limits = field(default_factory=Limits)
    session: SessionOptions = field(default_factory=SessionOptions)
    sockets: SocketOptions = field(default_factory=SocketOptions)
    patience: Patience = field(default_factory=Patience)
    store_patience_s: float = 3.0  # how long of an absence of the store is waited out


@dataclass(frozen=True)
class GatewayDeps:
    """What the gateway is given; time and chance among it. See AttuneServices for the first three
    callables."""

    store: Store
    engine: EngineClient
    renderer: Renderer
    options: GatewayOptions
    refresh: Callable[[str, str], Awaitable[dict[str, Any]]]
    rollback: Callable[[str, int], Awaitable[int]]
    forget: Callable[[str], Awaitable[dict[str, Any]]]
    refreshes: Callable[[], Awaitable[QueueStats]]
    clock: Callable[[], float] = time.time
    new_id: Callable[[], str] = lambda: uuid.uuid4().hex
    new_seed: Callable[[], int] = lambda: secrets.randbits(63)


class Gateway:
    """Everything that lives as long as the app does."""

    def __init__(self, deps: GatewayDeps) -> None:
        self.deps = deps
        options = deps.options
        self.metrics = Metrics()
        self.health = StoreHealth(deps.store, self.metrics, patience_s=options.store_patience_s)
        self.limits = RateLimits(options.limits)
        self.auth = Authenticator(options.token_key, deps.store, origins=options.origins, clock=deps.clock)
        self.sockets = Sockets()
        self.replies = Replies(
            store=deps.store,
            health=self.health,
            speak=lambda reply, replies: self.session.speak(reply, replies),
            metrics=self.metrics,
            holder=f"{sockets_library.gethostname()}:{os.getpid()}:{deps.new_id()}",
            per_user=options.limits.replies_per_user,
            patience=options.patience,
        )
        self.session = Session(
            store=deps.store,
            health=self.health,
            engine=deps.engine,
            renderer=deps.renderer,
            replies=self.replies,
            metrics=self.metrics,
            options=options.session,
            refresh=deps.refresh,
            clock=deps.clock,
            new_id=deps.new_id,
            new_seed=deps.new_seed,
        )

    @contextlib.asynccontextmanager
    async def running(self, app: Starlette) -> AsyncIterator[None]:
        """The app's life: news from the store reach the sockets."""
        tasks = [
            asyncio.create_task(self._hear_news(), name="news"),
            asyncio.create_task(self._look_for_orphans(), name="orphans"),
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.replies.close()
            await self.health.close()

    async def announce_shutdown(self) -> None:
        """Tell every socket; they are closed right after."""
        self.sockets.tell_all(SessionExpiring(reason="shutdown", seconds=0))
        await asyncio.sleep(0.05)

    async def _look_for_orphans(self) -> None:
        while True:
            await asyncio.sleep(2 * self.deps.options.patience.lease)
            try:
                await self.replies.adopt_orphans()
            except StoreUnavailable:
                await self.health.back(60)
            except Exception:
                log.exception("orphaned replies could not be taken over")

    async def _hear_news(self) -> None:
        while True:
            try:
                async with self.deps.store.events() as events:
                    await self._catch_up()  # with what came while nobody listened, if anyone is here yet
                    async for message in events:
                        await self._tell(message)
            except StoreUnavailable:
                self.health.failed()
                await self.health.back(60)
            except Exception:
                log.exception("news failed")
                await asyncio.sleep(1)

    async def _tell(self, message: dict[str, Any]) -> None:
        """One announcement to its person's sockets; a new version is fetched before anyone asks for it."""
        if message.get("type") == RECONNECTED:
            await self._catch_up()
            return
        user = str(message.get("user"))
        event = pushed_event(message)
        match message:
            case {"type": "adapter.updated", "to": version} | {
                "type": "adapter.trial",
                "state": "begun",
                "version": version,
            } if version:
                with contextlib.suppress(EngineLost):
                    await self.deps.engine.prefetch(AdapterRef(self.deps.store.adapter_id(user), version))
            case {"type": "adapter.forgotten"}:
                self.session.forget(user)
        if event is not None:
            self.sockets.tell(user, event)

    async def _catch_up(self) -> None:
        """Announcements may have been missed: forget who was forgotten, and tell everyone here how their
        refresh stands now."""
        await self.session.forget_the_forgotten()
        for user in self.sockets.users():
            progress = await self.deps.store.progress(user)
            event = None if progress is None else pushed_event(progress)
            if event is not None:
                self.sockets.tell(user, event)

    # ------------------------------------------------------------ endpoints

    async def socket(self, websocket: WebSocket) -> None:
        """`GET /v1/responses` as a WebSocket. A foreign page is refused with 403; any other refusal is a
        close code, which a page can read."""
        where = websocket.client.host if websocket.client is not None else "local"
        offered = list(websocket.scope["subprotocols"])
        origin = websocket.headers.get("origin")
        chosen = choose_subprotocol(offered)
        try:
            self.auth.check_origin(origin)
            await self.limits.request(where)
            person = await self.auth.socket(websocket.headers.get("authorization"), offered, origin)
            with self.limits.socket(person.user):
                await websocket.accept(subprotocol=chosen)
                await Socket(websocket, person, Codec(chosen), self._socket_services()).run()
        except Forbidden:
            await websocket.close()
        except NotAuthenticated as error:
            await self.limits.failure(where)
            await self._refuse(websocket, chosen, protocol.NOT_AUTHENTICATED, error)
        except RateLimited as error:
            await self._refuse(websocket, chosen, protocol.TOO_MANY, error)
        except StoreUnavailable as error:  # in our words: Redis' own name its socket's path, to anyone
            await self._refuse(websocket, chosen, protocol.TRY_AGAIN_LATER, as_api_error(error))

    async def _refuse(self, websocket: WebSocket, chosen: str | None, code: int, error: ApiError) -> None:
        self.metrics.sockets_closed.labels(code=str(code)).inc()
        await websocket.accept(subprotocol=chosen)
        await close(websocket, code, str(error)[:120])

    def _socket_services(self) -> SocketServices:
        deps = self.deps
        return SocketServices(
            session=self.session,
            replies=self.replies,
            limits=self.limits,
            metrics=self.metrics,
            sockets=self.sockets,
            options=deps.options.sockets,
            base_model=deps.options.base_model,
            clock=deps.clock,
            new_id=deps.new_id,
            refresh=deps.refresh,
        )

    async def healthy(self, request: Request) -> Response:
        return json_response({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """Whether a message sent now would be saved and answered."""
        checks = {
            "store": await self._store_answers(),
            "engine": self.deps.engine.connected,
            "adapters": os.access(self.deps.options.adapter_root, os.R_OK | os.X_OK),
        }
        ready = all(checks.values())
        return json_response({"ready": ready, "checks": checks}, 200 if ready else 503)

    async def _store_answers(self) -> bool:
        try:
            async with asyncio.timeout(READY_PATIENCE_S):
                await self.deps.store.ping()
        except (StoreUnavailable, TimeoutError):
            self.health.failed()
            return False
        return True

    async def show_metrics(self, request: Request) -> Response:
        engine, refreshes = await asyncio.gather(
            _or_none(self.deps.engine.stats()), _or_none(self.deps.refreshes())
        )
        self.metrics.engine_up.set(self.deps.engine.connected)
        page = self.metrics.page() + Observed(engine, refreshes).page()
        return Response(page, media_type=CONTENT_TYPE)


async def _or_none(asked: Awaitable[_Answer]) -> _Answer | None:
    """What comes of it, if it comes soon."""
    with contextlib.suppress(TimeoutError, EngineError, StoreUnavailable):
        async with asyncio.timeout(READY_PATIENCE_S):
            return await asked
    return None


class CountRequests:
    """Counts HTTP answers by endpoint: paths hold ids, endpoints do not."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("endpoint"), "__name__", "page")
                method = scope["method"] if scope["method"] in ("GET", "POST", "DELETE", "HEAD") else "other"
                self._metrics.requests.labels(route=route, method=method, status=message["status"]).inc()
            await send(message)

        await self._app(scope, receive, counted if scope["type"] == "http" else send)


def build_app(deps: GatewayDeps) -> Starlette:
    gateway = Gateway(deps)
    door = Door(gateway.auth, gateway.limits)
    openai = OpenAIApi(door, gateway.session, gateway.replies, base_model=deps.options.base_model)
    attune = AttuneApi(
        AttuneServices(
            door=door,
            session=gateway.session,
            replies=gateway.replies,
            limits=gateway.limits,
            base_model=deps.options.base_model,
            clock=deps.clock,
            refresh=deps.refresh,
            rollback=deps.rollback,
            forget=deps.forget,
            demo_hours=deps.options.demo_hours,
            samples=deps.options.samples,
        )
    )
    answer = error_handler(gateway.metrics)
    app = Starlette(
        routes=[
            WebSocketRoute("/v1/responses", gateway.socket),
            *openai.routes(),
            *attune.routes(),
            Route("/health", gateway.healthy),
            Route("/ready", gateway.ready),
            Route("/metrics", gateway.show_metrics),
            Mount("/", page_app(deps.options.page_folder)),
        ],
        middleware=[
            Middleware(CountRequests, metrics=gateway.metrics),
            Middleware(SecurityHeaders),
        ],
        # By name, as Starlette raises what only `Exception` names again after the answer: uvicorn would log a
        # traceback and close the connection, and the answer would pass by the middleware.
        exception_handlers=dict.fromkeys((*KNOWN_ERRORS, Exception), answer),
        lifespan=gateway.running,
    )
    app.state.gateway = gateway
    return app
