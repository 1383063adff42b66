"""The gateway as a process: connect Redis and the engine, build the app, serve until cancelled."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import structlog
import uvicorn
from starlette.applications import Starlette

from engine.client import EngineClient
from personalization.prompt import Renderer
from personalization.store import Store, connect
from personalization.trial import TrialPolicy
from personalization.when import When
from service import protocol
from service.actions import Actions
from service.app import GatewayDeps, GatewayOptions, build_app
from service.auth import allowed_origins
from service.limits import Limits
from service.samples import SAMPLES, ensure_samples
from service.session import SessionOptions
from service.settings import Settings, read_or_create_secret, token_key, trial_seed
from service.uvicorn_protocol import AbortingWebSocketProtocol

log = structlog.get_logger(__name__)

ENGINE_PATIENCE_S = 3600.0  # a large model takes its time to load
REDIS_CONNECTIONS = 128  # opened as needed; more than are ever waited for at once


class Server(uvicorn.Server):
    """uvicorn without its signal handlers: whoever runs the process decides when it stops."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def server_config(app: Starlette, **changes: Any) -> uvicorn.Config:
    """`changes`: host and port, or uds, and whatever should differ. No compression: it more than doubles an
    idle socket's memory for frames too small to gain."""
    settings: dict[str, Any] = {
        "ws": AbortingWebSocketProtocol,
        "ws_max_size": protocol.MAX_FRAME_BYTES,
        "ws_per_message_deflate": False,
        "ws_ping_interval": 20.0,
        "ws_ping_timeout": 20.0,
        "log_config": None,
        "access_log": False,
        "log_level": "warning",
        "server_header": False,
        "timeout_graceful_shutdown": 5,
    }
    return uvicorn.Config(app, **(settings | changes))


async def serve(app: Starlette, **where: Any) -> None:
    """Serve until cancelled; then stop taking requests, close the sockets with 1012 and end."""
    server = Server(server_config(app, **where))
    serving = asyncio.create_task(server.serve())
    try:
        await asyncio.shield(serving)
    except asyncio.CancelledError:
        await app.state.gateway.announce_shutdown()
        server.should_exit = True
        await serving
        raise


def session_options(settings: Settings, secret: bytes) -> SessionOptions:
    """Sampling defaults as the model's makers set them in generation_config.json, where they did."""
    given: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        given = json.loads((Path(settings.model) / "generation_config.json").read_text())
    plain = SessionOptions()
    return SessionOptions(
        temperature=_number(given.get("temperature"), plain.temperature),
        top_p=_number(given.get("top_p"), plain.top_p),
        when=When(after_turns=settings.auto_refresh_after),
        trial=TrialPolicy(share=settings.trial_share, replies=settings.trial_replies),
        trial_seed=trial_seed(secret),
    )


def _number(value: object, otherwise: float) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else otherwise


async def run_gateway(settings: Settings) -> None:
    """Serve until cancelled."""
    secret = read_or_create_secret(settings.secret_path)
    redis = connect(settings.redis_address, max_connections=REDIS_CONNECTIONS)
    store = Store(redis, secret)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(store.close)
        engine = await EngineClient.connect(settings.engine_socket, timeout=ENGINE_PATIENCE_S)
        stack.push_async_callback(engine.close)
        context_length = engine.info.context_length
        renderer = await asyncio.to_thread(Renderer, Path(settings.model), context_length)

        async def connected() -> EngineClient:
            return engine

        actions = Actions(settings, store, redis, connected)

        async def forget(user: str) -> dict[str, Any]:
            return (await actions.forget(user)).as_dict()

        options = GatewayOptions(
            token_key=token_key(secret),
            base_model=settings.shown_model,
            adapter_root=settings.adapter_root,
            page_folder=settings.page_folder,
            origins=allowed_origins(settings.host, settings.port, settings.origins),
            demo_hours=settings.token_hours if settings.demo_sessions else None,
            samples=[sample.shown() for sample in SAMPLES] if settings.demo_sessions else (),
            session=session_options(settings, secret),
            limits=Limits.for_replies(settings.replies_per_minute),
        )
        app = build_app(
            GatewayDeps(
                store=store,
                engine=engine,
                renderer=renderer,
                options=options,
                refresh=actions.refresh,
                rollback=actions.rollback,
                forget=forget,
                refreshes=actions.refreshes,
            )
        )
        if settings.demo_sessions:
            await stack.enter_async_context(_samples(store, actions))
        log.info("gateway.ready", host=settings.host, port=settings.port)
        await serve(app, host=settings.host, port=settings.port)


@contextlib.asynccontextmanager
async def _samples(store: Store, actions: Actions) -> AsyncIterator[None]:
    """Bring in the sample people beside serving; without them everything else works."""

    async def bring_in() -> None:
        try:
            asked = await ensure_samples(store, actions.refresh)
            log.info("samples.ready", refreshes=len(asked))
        except Exception as error:
            log.warning("samples.failed", reason=str(error))

    task = asyncio.create_task(bring_in(), name="samples")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
