"""What each process of the service does, from settings to end: engine, gateway, worker.

Rooms are imported inside the functions: the gateway needs no torch, and the engine no web server.
"""

import asyncio
import contextlib
import gc
import os
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from service.settings import Settings, SettingsError, private_folder, read_or_create_secret

if TYPE_CHECKING:
    from engine.config import EngineConfig

log = structlog.get_logger()
MIB = 1 << 20
ENGINE_GONE_WITHIN_S = 10.0  # one whose supervisor was just killed goes a moment after it
LOOK_EVERY_S = 0.5
WORKER_NICENESS = 10  # learning yields to talking where both want the same cores


class ModelUnusable(ValueError):
    """The model's folder is not one we can serve; the message is the loader's."""


async def until_stopped(work: Coroutine[Any, Any, None], stop: asyncio.Event) -> None:
    """Run `work` until it ends or `stop` is set; an error in it is raised."""
    working, stopped = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({working, stopped}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopped.cancel()
        working.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await working


@contextlib.contextmanager
def about_the_model(*errors: type[Exception]) -> Iterator[None]:
    """What is wrong with the model's folder, as one ModelUnusable: starting again would not help."""
    try:
        yield
    except errors as error:
        raise ModelUnusable(str(error)) from None


def what_models_lack() -> tuple[type[Exception], ...]:
    """What is raised of a model's folder that cannot be learned with."""
    from engine.weights import ModelError
    from personalization.prompt import UNUSABLE_TOKENIZER

    return ModelError, *UNUSABLE_TOKENIZER


@contextlib.contextmanager
def out_of_collections() -> Iterator[None]:
    """Collections of garbage inside do not look at what there is by now: a full one, during which no token
    is sent, takes about a tenth of a second with all that an engine has imported."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def engine_config(
    settings: Settings, device: str, dtype: str, memory: tuple[int, int] | None
) -> "EngineConfig":
    """The engine's configuration; what the settings leave open follows the device.

    `memory`: of a GPU, the bytes that are free behind the model, and all. The arena takes what is free but
    for learning's part, a tenth, and 2 GiB that the step's buffers need; a step is long enough to multiply at
    full speed. None: a CPU.
    """
    from engine.config import EngineConfig
    from engine.lending import trainer_bytes

    arena, host, tokens = 1024 * MIB, 512 * MIB, 512
    if memory is not None:
        free, total = memory
        for_learning = trainer_bytes(settings.training_bytes, total)
        arena = max(64 * MIB, (free - for_learning) * 9 // 10 - 2048 * MIB)
        host, tokens = 8192 * MIB, 2048
    return EngineConfig(
        arena_bytes=arena if settings.arena_mb is None else settings.arena_mb * MIB,
        host_cache_bytes=host if settings.host_cache_mb is None else settings.host_cache_mb * MIB,
        max_running=settings.max_running,
        max_tokens_per_step=settings.max_step_tokens or tokens,
        device=device,
        dtype=dtype,
        threads=settings.threads or None,
    )


def chosen_device(settings: Settings) -> str:
    """cpu or cuda. Raises SettingsError: a GPU that is not there does not come by starting again."""
    import torch

    if settings.device == "cuda" and not torch.cuda.is_available():
        raise SettingsError("ATTUNE_DEVICE", "expected a GPU that PyTorch can use for cuda, found none")
    if settings.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return settings.device


async def require_no_engine(socket: Path, within_s: float = ENGINE_GONE_WITHIN_S) -> None:
    """Refuse to take the place of an engine that lives: a gateway would go on with the one, and every command
    ask the other. Raises SettingsError when it is still there after `within_s`."""
    deadline = time.monotonic() + within_s
    while True:
        try:
            _, writer = await asyncio.open_unix_connection(socket)
        except OSError:  # nobody there, or a file that a killed one left
            return
        writer.close()
        if time.monotonic() > deadline:
            raise SettingsError(str(socket), "an engine answers here: stop it, or choose another --data")
        await asyncio.sleep(LOOK_EVERY_S)


async def run_engine(settings: Settings, stop: asyncio.Event) -> None:
    """Load the model, answer on the engine's socket. Raises ModelUnusable, SettingsError."""
    import torch

    from engine.config import ConfigError
    from engine.engine import Engine
    from engine.lending import Lender
    from engine.server import serve
    from engine.weights import ModelError, load_model

    device = chosen_device(settings)
    dtype = settings.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    private_folder(settings.run_folder)
    private_folder(settings.adapter_root)
    await require_no_engine(settings.engine_socket)
    with contextlib.ExitStack() as stack:
        lender = None
        if device == "cuda":  # from the start: who wants to borrow waits for what is being loaded
            lender = stack.enter_context(contextlib.closing(Lender(settings.lent_path)))
        with about_the_model(ModelError):
            model = await asyncio.to_thread(
                load_model, Path(settings.model), device=device, dtype=getattr(torch, dtype)
            )
        memory = torch.cuda.mem_get_info() if device == "cuda" else None
        config = engine_config(settings, device, dtype, memory)
        try:
            engine = Engine(config, model, settings.adapter_root)
        except ConfigError as error:  # the one thing that depends on the model
            raise SettingsError("ATTUNE_ARENA_MB", str(error)) from None
        log.info("engine.loaded", model=settings.shown_model, device=device, dtype=dtype)
        if lender is not None:
            lender.lend(model)
        stack.enter_context(out_of_collections())
        await until_stopped(
            serve(
                engine,
                settings.engine_socket,
                model_name=settings.shown_model,
                on_ready=lambda: log.info("engine.ready"),
                on_busy=(lambda busy: None) if lender is None else lender.tell,
            ),
            stop,
        )


async def run_gateway(settings: Settings, stop: asyncio.Event) -> None:
    """Answer WebSockets and HTTP. Raises ModelUnusable."""
    from personalization.prompt import UNUSABLE_TOKENIZER
    from service.gateway import run_gateway as run

    with about_the_model(*UNUSABLE_TOKENIZER), out_of_collections():
        await until_stopped(run(settings), stop)


async def run_worker(settings: Settings, stop: asyncio.Event) -> None:
    """Learn from what people wrote. Raises ModelUnusable."""
    from personalization.gate import GatePolicy
    from personalization.refresh import RefreshPolicy
    from personalization.trial import TrialPolicy
    from personalization.worker import WorkerSettings
    from personalization.worker import run_worker as run

    os.nice(WORKER_NICENESS)
    worker = WorkerSettings(
        data=settings.data,
        redis_url=settings.redis_address,
        model_folder=Path(settings.model),
        model_name=settings.shown_model,
        secret=read_or_create_secret(settings.secret_path),
        policy=RefreshPolicy(trial_share=settings.trial_share, gate=GatePolicy(max_drift=settings.max_drift)),
        trial=TrialPolicy(share=settings.trial_share, replies=settings.trial_replies),
        threads=settings.train_threads,
        device=settings.device,
        lent=settings.lent_path,
        training_share=settings.training_share,
        training_bytes=settings.training_bytes,
        nightly_hour=settings.nightly_hour,
    )
    with about_the_model(*what_models_lack()):
        await until_stopped(run(worker), stop)
