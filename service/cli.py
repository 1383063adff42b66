"""`attune …`: the commands. The only file that reads the environment and the arguments.

A command other than the processes themselves works on the service that runs on `--data`: it finds that
service's settings in its folder. Exit code 1: the service failed; 2: it cannot be done as asked.
"""

import asyncio
import errno
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from engine.client import EngineClient, EngineError
from personalization.history import InvalidTurn, dump
from personalization.lineage import marks
from personalization.store import Pointer, Store, StoreError, VersionRecord, connect
from service import evaluation, logs, operations, processes
from service.actions import Actions, NotPossible
from service.auth import signed
from service.chat import ChatRefused, chat
from service.errors import ApiError
from service.forget import Removed
from service.model_folder import ModelNotFound, resolve_model
from service.redis_child import RedisUnavailable
from service.settings import LONGEST_TOKEN_HOURS, Settings, SettingsError, read_or_create_secret, token_key
from service.supervisor import USER_ERROR, AlreadyRunning, ChildGaveUp, running_settings
from service.supervisor import serve as supervise

ENGINE_TIMEOUT_S = 20.0
A_TURN = (
    '{"user": "ada", "conversation": "1", "at": "2026-01-31T12:00:00Z", "role": "user", "text": "Hello!"}'
)
T = TypeVar("T")
app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown"
)


class NotRunning(RuntimeError):
    def __init__(self, data: Path) -> None:
        super().__init__(f"Attune does not run on {data}: start it with `attune serve`, or name its --data")


# Answers to what was asked; anything else that is raised is a fault of ours and keeps its traceback.
ASKED_WRONGLY = (
    SettingsError,
    ModelNotFound,
    AlreadyRunning,
    NotRunning,
    RedisUnavailable,
    ChildGaveUp,
    InvalidTurn,
    ApiError,
    ChatRefused,
    operations.Refused,
    NotPossible,
    processes.ModelUnusable,
)
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # where the output goes, or in the data folder
SERVICE_FAILED = (StoreError, EngineError, operations.LearningFailed, ConnectionError, TimeoutError)

Data = Annotated[Path | None, typer.Option(help="Data folder of the service. [default: ./data]")]
Json = Annotated[bool, typer.Option("--json", help="Answer as JSON.")]
JsonLog = Annotated[bool, typer.Option("--json", help="Log lines as JSON.")]
User = Annotated[str, typer.Argument(help="The person's name, as in their token.")]
Model = Annotated[str | None, typer.Option(help="demo, a Hugging Face folder, or a hub id. [default: demo]")]
RedisUrl = Annotated[str | None, typer.Option(help="Use this Redis. [default: a private one is started]")]
Port = Annotated[int | None, typer.Option(help="[default: 8080]")]
Host = Annotated[str | None, typer.Option(help="[default: 127.0.0.1, this machine only]")]


def main() -> None:
    try:
        try:
            app()
        finally:
            flush_output()
    except ASKED_WRONGLY as error:
        fail(str(error), USER_ERROR)
    except SERVICE_FAILED as error:
        fail(str(error) or type(error).__name__, 1)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        fail(str(error), 1)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def flush_output() -> None:
    """Write what was printed while a failure of that can be told; else the interpreter tries at its end."""
    try:
        if sys.stdout is not None:  # None: it was closed
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # which tries again all the same
        raise


def fail(message: str, code: int) -> None:
    sys.stderr.write(f"attune: {message}\n")
    sys.exit(code)


# ---------------------------------------------------------------- the processes


@app.command()
def serve(
    data: Data = None, model: Model = None, port: Port = None, host: Host = None, redis_url: RedisUrl = None,
    as_json: JsonLog = False,
) -> None:  # fmt: skip
    """Start everything: Redis, engine, gateway, worker. Ctrl-C stops it."""
    settings = read_settings(
        data=data, model=model, port=port, host=host, redis_url=redis_url,
        log_format="json" if as_json else None,
    )  # fmt: skip
    logs.configure("serve", settings.log_level, settings.log_format)
    settings = settings.model_copy(
        update={"model": str(resolve_model(settings.model)), "model_name": settings.shown_model}
    )
    stop_on_signal(
        lambda stop: supervise(settings, os.environ, stop, lambda: announce(settings, as_json=as_json))
    )


@app.command()
def engine(data: Data = None, model: Model = None, as_json: JsonLog = False) -> None:
    """Start the engine alone. Settings come from ATTUNE_* variables."""
    run_process("engine", processes.run_engine, as_json, data=data, model=model)


@app.command()
def gateway(
    data: Data = None, model: Model = None, port: Port = None, host: Host = None, redis_url: RedisUrl = None,
    as_json: JsonLog = False,
) -> None:  # fmt: skip
    """Start the gateway alone. Settings come from ATTUNE_* variables."""
    flags = {"data": data, "model": model, "port": port, "host": host, "redis_url": redis_url}
    run_process("gateway", processes.run_gateway, as_json, **flags)


@app.command()
def worker(
    data: Data = None, model: Model = None, redis_url: RedisUrl = None, as_json: JsonLog = False
) -> None:
    """Start the worker that learns, alone. Settings come from ATTUNE_* variables."""
    run_process("worker", processes.run_worker, as_json, data=data, model=model, redis_url=redis_url)


def run_process(
    name: str,
    run: Callable[[Settings, asyncio.Event], Coroutine[Any, Any, None]],
    as_json: bool,
    **flags: Any,
) -> None:
    settings = read_settings(**flags, log_format="json" if as_json else None)
    logs.configure(name, settings.log_level, settings.log_format)
    folder = resolve_model(settings.model)
    settings = settings.model_copy(update={"model": str(folder), "model_name": settings.shown_model})
    stop_on_signal(lambda stop: run(settings, stop))


def stop_on_signal(run: Callable[[asyncio.Event], Coroutine[Any, Any, None]]) -> None:
    """Run until done; the first SIGINT, SIGTERM or SIGHUP sets the event that `run` was given."""

    async def watched() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, stop.set)
        await run(stop)

    asyncio.run(watched())


def announce(settings: Settings, *, as_json: bool) -> None:
    """Tell the person where the page is and how to get a token."""
    if as_json:
        print(json.dumps({"ready": True, "page": settings.page_address}), flush=True)
        return
    place = "" if settings.data == Path.cwd() / "data" else f" --data {shlex.quote(str(settings.data))}"
    called = Path(sys.argv[0])
    command = str(called).removeprefix(str(Path.cwd()) + os.sep) if called.name == "attune" else "attune"
    command = shlex.quote(command)
    print(
        f"\n  Attune is ready, on the model {settings.shown_model}.\n\n"
        f"  page    {settings.page_address}\n"
        f"  chat    {command} chat --user YOUR_NAME{place}\n"
        f"  token   {command} token YOUR_NAME{place}\n"
        f"          for the SDK: base_url={settings.page_address}/v1, api_key=the token\n"
        f"  stop    Ctrl-C\n",
        flush=True,
    )


# ---------------------------------------------------------------- people


@app.command()
def token(
    user: User,
    hours: Annotated[
        float | None,
        typer.Option(min=0.001, max=LONGEST_TOKEN_HOURS, help="How long it is good for. [default: 24]"),
    ] = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Print a bearer token for a person."""
    settings = read_settings(data=data, token_hours=hours)
    settings = running_settings(settings) or settings
    text, expires_at = sign(settings, user, hours or settings.token_hours)
    answer({"user": user, "token": text, "expires_at": expires_at}, text, as_json=as_json)


@app.command("chat")
def chat_command(
    user: Annotated[str, typer.Option(help="Who you are.")] = "me", data: Data = None, as_json: Json = False
) -> None:
    """Chat in the terminal. With --json: a line in, its events out, one a line."""
    settings = find_service(data)
    asyncio.run(chat(settings.page_address, sign(settings, user, settings.token_hours)[0], as_json=as_json))


@app.command("import")
def import_command(
    file: Annotated[
        typer.FileBinaryRead, typer.Argument(help="JSON Lines, one turn a line; - is standard input.")
    ],
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Import histories. Importing a file again changes nothing."""

    async def run(store: Store, _: Actions) -> operations.Imported:
        with progress("importing") as show:
            return await operations.import_histories(store, file, on_progress=show)

    done = with_store(data, run)
    for error in done.errors:
        sys.stderr.write(f"line {error.number}: {error.message}\n")
    people = "1 person" if done.users == 1 else f"{done.users} people"
    text = f"{done.new} new turns of {done.turns}, from {people}"
    answer(
        done.as_dict(),
        text + (f"; {len(done.errors)} bad lines left out" if done.errors else ""),
        as_json=as_json,
    )
    if done.errors and not done.turns:
        fail(f"expected a turn on each line, like {A_TURN}", USER_ERROR)


@app.command()
def export(user: User, data: Data = None, as_json: Json = False) -> None:
    """Print a person's history as JSON Lines, as `attune import` reads it."""

    async def run(store: Store, _: Actions) -> list[str]:
        return list(dump(user, await store.turns(user)))

    lines = with_store(data, run)
    if as_json:
        print(json.dumps([json.loads(line) for line in lines], ensure_ascii=False))
    else:
        sys.stdout.writelines(line + "\n" for line in lines)


@app.command()
def refresh(
    user: Annotated[str | None, typer.Argument(help="The person's name.")] = None,
    everyone: Annotated[bool, typer.Option("--all", help="Everyone with a history.")] = False,
    wait: Annotated[bool, typer.Option(help="Follow it to its end.")] = False,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Learn a new adapter version from a person's history."""
    if everyone == (user is not None):
        raise operations.Refused("expected a person's name or --all")

    async def run(store: Store, actions: Actions) -> list[operations.Refreshed]:
        people = [user] if user is not None else [name async for name in store.users()]
        if not people:
            raise operations.Refused("nobody has a history yet: import one with `attune import FILE`")
        reason = "asked" if user is not None else "all"  # those for whom nobody asks do not go first
        with progress("learning") as show:
            return await operations.refresh(
                store, people, lambda who: actions.refresh(who, reason), wait=wait, on_progress=show
            )

    done = with_store(data, run)
    lines = [
        f"{one.user}: "
        + (f"version {one.version}{', on trial' * one.trial}" if one.published else one.reason or one.state)
        for one in done
    ]
    answer({"refreshed": [asdict(one) for one in done]}, "\n".join(lines), as_json=as_json)
    failures = {one.code for one in done if one.state == "failed"}
    if "refresh_failed" in failures:
        sys.exit(1)
    if failures and not everyone:  # of everyone, some have too little to learn from
        sys.exit(USER_ERROR)


@app.command()
def adapters(user: User, data: Data = None, as_json: Json = False) -> None:
    """List a person's adapter versions; * is the one that answers, ~ the one on trial, ! has learned from
    turns taken out since."""

    async def run(store: Store, _: Actions) -> tuple[Pointer, list[VersionRecord], set[str]]:
        return await store.pointer(user), await store.versions(user), await store.learned_ids(user)

    pointer, records, learnable = with_store(data, run)
    marked, serving = marks(records, learnable), pointer.version
    tried, share = (pointer.trial.version, pointer.trial.share) if pointer.trial else (None, 0.0)
    lines = [
        f"{'*' if record.version == serving else '~' if record.version == tried else ' '}"
        f"{'!' if record.version in marked else ' '}"
        f"{record.version:>4}  {record.created_at:%Y-%m-%d %H:%M}  "
        f"{'accepted' if record.accepted else 'refused '}  {record.reason}"
        + (f"; {len(marked[record.version])} turns taken out since" if record.version in marked else "")
        + (f"; on trial, {share:.0%} of the replies" if record.version == tried else "")
        + (f"; trial ended: {record.trial.outcome}" if record.trial else "")
        for record in records
    ]
    if serving == 0:
        lines.insert(0, "*    0  the bare base model")
    versions = [
        asdict(record)
        | {
            "created_at": record.created_at.isoformat(),
            "marked": sorted(marked.get(record.version, ())),
            "trial": record.trial and record.trial.outcome,
        }
        for record in records
    ]
    told = {"user": user, "serving": serving, "trial": tried, "versions": versions}
    answer(told, "\n".join(lines), as_json=as_json)


@app.command()
def rollback(
    user: User,
    version: Annotated[int, typer.Argument(min=0, help="0 is the bare base model.")],
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Answer with an earlier version again."""

    async def run(store: Store, actions: Actions) -> int:
        return await actions.rollback(user, version)

    before = with_store(data, run)
    answer(
        {"user": user, "from": before, "to": version},
        f"{user}: version {before} -> {version}",
        as_json=as_json,
    )


@app.command("import-adapter")
def import_adapter(
    user: User,
    folder: Annotated[Path, typer.Argument(help="A PEFT LoRA folder (safetensors).")],
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Give a person an adapter that was trained elsewhere."""

    async def run(store: Store, actions: Actions) -> int:
        return await actions.import_adapter(user, folder)

    version = with_store(data, run)
    answer({"user": user, "version": version}, f"{user}: version {version}", as_json=as_json)


@app.command()
def population(
    file: Annotated[
        typer.FileBinaryRead, typer.Argument(help="JSON Lines, one turn a line; - is standard input.")
    ],
    epochs: Annotated[int, typer.Option(min=1, help="How often each turn is seen.")] = 1,
    data: Data = None,
    model: Model = None,
    as_json: Json = False,
) -> None:
    """Train the adapter that everyone's versions start from, on text of your choice. It never reads
    what users wrote."""
    asked = read_settings(data=data, model=model)
    settings = running_settings(asked) or asked
    processes.chosen_device(settings)  # told now, not by a trainer that ends
    with processes.about_the_model(*processes.what_models_lack()), progress("learning") as show:
        made = asyncio.run(operations.make_population(settings, file, epochs=epochs, on_progress=show))
    kept = f"population adapter {made['number']}" if made["number"] else "not kept"
    answer(made, f"{kept}, from {made['turns']} turns: {made['reason']}", as_json=as_json)


@app.command("evaluate")
def evaluate_command(
    file: Annotated[
        typer.FileBinaryRead, typer.Argument(help="JSON Lines, one turn a line; - is standard input.")
    ],
    people: Annotated[
        int | None, typer.Option(min=1, help="At most so many. [default: all; 12 without a GPU]")
    ] = None,
    only_loss: Annotated[bool, typer.Option(help="The losses alone, without the long parts.")] = False,
    page: Annotated[Path, typer.Option(help="Where the page of plots goes.")] = Path("evaluation.html"),
    data: Data = None,
    model: Model = None,
    as_json: Json = False,
) -> None:
    """Measure what learning is worth on a history file: a table, one line of JSON, and a page of plots."""
    from personalization.evaluate import Extent, NothingToMeasure

    if not page.parent.is_dir() or page.is_dir():  # told now, not when all is measured
        raise operations.Refused(f"--page: expected a file in a folder that exists, got {page}")
    settings = read_settings(data=data, model=model)
    started = time.monotonic()

    def say(text: str) -> None:
        sys.stderr.write(f"{time.monotonic() - started:7.1f} s  {text}\n")

    extent = Extent(people=people)
    if only_loss:
        extent = Extent(
            people=people, selection_turns=0, curve=(), refreshes=0, from_population=False, stacks=()
        )
    try:
        with processes.about_the_model(*processes.what_models_lack()):
            done = evaluation.measure(
                resolve_model(settings.model),
                file,
                extent,
                device=processes.chosen_device(settings),
                threads=settings.train_threads,
                say=say,
            )
    except NothingToMeasure as error:
        raise operations.Refused(str(error)) from None
    if not as_json:
        print(evaluation.table(done.numbers))
    print(json.dumps(done.numbers), flush=True)
    page.write_text(evaluation.page(done), encoding="utf-8")  # last: it may have no place
    say(f"the plots are in {page}")


@app.command("forget")
def forget_command(
    user: User,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Remove everything of a person: history, adapters, copies, jobs."""
    if not yes and sys.stdin.isatty():
        typer.confirm(f"Remove everything of {user}? This cannot be undone.", abort=True)

    async def run(store: Store, actions: Actions) -> Removed:
        return await actions.forget(user)

    gone = with_store(data, run)
    text = (
        f"{user} is forgotten: {gone.turns} turns in {gone.conversations} conversations, "
        f"{gone.versions} adapter records, {gone.folders} adapter folders ({gone.disk_bytes:,} bytes), "
        f"{gone.host_bytes:,} bytes in memory, {gone.device_slabs} pages and "
        f"{gone.kv_blocks} cached blocks on the device, {gone.jobs} jobs"
        + ("" if gone.log_rewritten else "; Redis' file still holds deleted words until its next rewrite")
    )
    answer({"user": user, **gone.as_dict()}, text, as_json=as_json)


# ---------------------------------------------------------------- shared


def read_settings(**flags: Any) -> Settings:
    return Settings.read(os.environ, **flags)


def find_service(data: Path | None) -> Settings:
    """The settings of the running service; those given by hand when its Redis is. Raises NotRunning."""
    asked = read_settings(data=data)
    running = running_settings(asked)
    if running is None and asked.redis_url is None:
        raise NotRunning(asked.data)
    return running or asked


def with_store(data: Path | None, run: Callable[[Store, Actions], Coroutine[Any, Any, T]]) -> T:
    """Run a command against the running service's store; the engine is called when it needs one."""
    settings = find_service(data)

    async def connected() -> T:
        redis = connect(settings.redis_address)
        store = Store(redis, read_or_create_secret(settings.secret_path))
        async with AsyncExitStack() as opened:
            opened.push_async_callback(store.close)

            async def engine() -> EngineClient:
                client = EngineClient.connect(settings.engine_socket, timeout=ENGINE_TIMEOUT_S)
                return await opened.enter_async_context(await client)

            return await run(store, Actions(settings, store, redis, engine))

    return asyncio.run(connected())


def sign(settings: Settings, user: str, hours: float) -> tuple[str, int]:
    key = token_key(read_or_create_secret(settings.secret_path))
    return signed(key, user, time.time(), hours * 3600)


def answer(value: dict[str, Any], text: str, *, as_json: bool) -> None:
    print(json.dumps(value, ensure_ascii=False) if as_json else text)


@contextmanager
def progress(what: str) -> Iterator[operations.Progress]:
    """A bar on standard error, when that is a terminal: `learning [#####               ]  25 %  3 of 12`."""

    def show(share: float, detail: str) -> None:
        if sys.stderr.isatty():
            bar = "#" * int(share * 20)
            sys.stderr.write(f"\r\x1b[K{what} [{bar:20}] {share:4.0%}  {detail}")
            sys.stderr.flush()

    try:
        yield show
    finally:
        if sys.stderr.isatty():
            sys.stderr.write("\r\x1b[K")


if __name__ == "__main__":
    main()
