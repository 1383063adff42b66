"""`attune serve`: Redis, engine, gateway and worker as child processes, kept alive and stopped together.

The supervisor holds the data folder's lock, so one folder has one service. Its children die with it
(leash.py), run in their own process groups (Ctrl-C reaches only the supervisor, which stops them in order),
and are started again when they die, after a pause that grows with each failure. A child that leaves with
exit code 2 says that starting again cannot help: the supervisor stops everything and passes the code on.
"""

import asyncio
import fcntl
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import structlog

from engine.config import PINNING
from service import leash
from service.redis_child import LOG_FILE, RedisBinary, answers, find_redis, redis_argv, sync_files
from service.settings import (
    Settings,
    SettingsError,
    expecting,
    make_folder,
    private_folder,
    read_or_create_secret,
)

USER_ERROR = 2
FIRST_DELAY_S, LONGEST_DELAY_S = 0.1, 10.0
STEADY_S = 30.0  # a process that lived this long has not failed at starting
SYNC_EVERY_S = 1.0
POLL_S = 0.1
LOCK_ATTEMPTS = 5  # a command that asks whether we run holds the lock for a moment

log = structlog.get_logger()


class AlreadyRunning(RuntimeError):
    """Another supervisor holds the data folder."""

    def __init__(self, data: Path, holder: str) -> None:
        super().__init__(
            f"{data} is in use by process {holder}: stop it, or choose another folder with --data"
        )


class ChildGaveUp(RuntimeError):
    """A child left with exit code 2: what is wrong stands in its last lines, and a restart cannot mend it."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} cannot start (see its message above)")
        self.name = name


@dataclass(frozen=True)
class Program:
    """One child: what to run, and how long it may take to end when asked."""

    name: str
    argv: tuple[str, ...]
    environment: Mapping[str, str]
    grace_s: float = 10.0
    log_file: Path | None = None  # where it says what is wrong, when not on our standard error


def restart_delay(failures: int) -> float:
    """Seconds before start number `failures + 1` in a row: 0.1, 0.2, 0.4 … 10."""
    return min(LONGEST_DELAY_S, FIRST_DELAY_S * 2.0 ** max(0, failures - 1))


class Child:
    """One program, kept alive until it is stopped."""

    def __init__(self, program: Program, clock: Callable[[], float] = time.monotonic) -> None:
        self.program = program
        self.starts = 0
        self._clock = clock
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        alive = self._process is not None and self._process.returncode is None
        return self._process.pid if self._process and alive else None

    async def keep(self) -> None:
        """Start the program and start it again whenever it ends. Runs until cancelled; raises ChildGaveUp."""
        name, failures = self.program.name, 0
        while True:
            started = self._clock()
            self.starts += 1
            try:
                self._process = await asyncio.create_subprocess_exec(
                    *leash.command(self.program.argv),
                    env=dict(self.program.environment),
                    stdin=asyncio.subprocess.DEVNULL,
                    start_new_session=True,
                )
            except OSError as error:  # no memory or no process left for now: the others go on meanwhile
                failures += 1
                delay = restart_delay(failures)
                log.error("process.not_started", child=name, error=str(error), restart_in_s=delay)
                await asyncio.sleep(delay)
                continue
            log.debug("process.started", child=name, pid=self._process.pid)
            code = await self._process.wait()
            if code == USER_ERROR:
                raise ChildGaveUp(name)
            failures = 1 if self._clock() - started > STEADY_S else failures + 1
            delay = restart_delay(failures)
            where = {"see": self.program.log_file} if self.program.log_file else {}
            log.warning("process.died", child=name, code=code, restart_in_s=delay, **where)
            await asyncio.sleep(delay)

    async def stop(self) -> None:
        """Ask the program to end; after its grace time it is killed."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        process.terminate()
        try:
            async with asyncio.timeout(self.program.grace_s):
                await process.wait()
        except TimeoutError:
            log.warning("process.killed", child=self.program.name, after_s=self.program.grace_s)
            process.kill()
            await process.wait()


class Supervisor:
    """The processes of one installation. `environment` is what children inherit besides the settings."""

    def __init__(
        self, settings: Settings, environment: Mapping[str, str], announce: Callable[[], None]
    ) -> None:
        self.children: dict[str, Child] = {}
        self._settings = settings
        self._environment = environment
        self._announce = announce

    async def run(self, stop: asyncio.Event) -> None:
        """Everything up until `stop` is set, then everything down. Raises ChildGaveUp, RedisUnavailable."""
        living = asyncio.create_task(self._live())
        asked = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({living, asked}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            log.info("service.stopping")
            for task in (living, asked):
                task.cancel()
            (ended, _) = await asyncio.gather(living, asked, return_exceptions=True)
            # Gateway and worker first: what they still have to say needs the engine and Redis.
            for names in (("gateway", "worker"), ("engine",), ("redis",)):
                await asyncio.gather(*(self.children[n].stop() for n in names if n in self.children))
        if isinstance(ended, BaseExceptionGroup):
            raise ended.exceptions[0]
        if isinstance(ended, Exception):
            raise ended

    async def _live(self) -> None:
        settings = self._settings
        async with asyncio.TaskGroup() as group:
            if settings.redis_url is None:
                await self._start_redis(group)
                group.create_task(self._sync_redis_files())
            for name, threads in child_threads(settings).items():
                self._start(group, self._python(name, threads))
            began = time.monotonic()
            await until(lambda: answers_ready(settings.host, settings.port))
            log.info("service.ready", seconds=round(time.monotonic() - began, 1))
            self._announce()

    def _start(self, group: asyncio.TaskGroup, program: Program) -> None:
        child = self.children[program.name] = Child(program)
        group.create_task(child.keep())

    async def _start_redis(self, group: asyncio.TaskGroup) -> None:
        settings = self._settings
        binary: RedisBinary = await find_redis(self._environment.get("PATH", os.defpath))
        if binary.warning:
            log.warning("redis.version", advice=binary.warning)
        # The children of a supervisor that was just killed go a moment after its lock does.
        async with asyncio.timeout(10):
            await until(lambda: _negate(answers(settings.redis_socket)))
        folder, always = private_folder(settings.redis_folder), settings.fsync == "always"
        argv = redis_argv(binary.path, folder, settings.redis_socket, always_sync=always)
        self._start(group, Program("redis", tuple(argv), self._environment, log_file=folder / LOG_FILE))
        await until(lambda: answers(settings.redis_socket))
        log.info("redis.ready", version=".".join(map(str, binary.version)), binary=binary.path)

    async def _sync_redis_files(self) -> None:
        synced: dict[Path, tuple[int, int]] = {}
        while True:
            try:
                await asyncio.to_thread(sync_files, self._settings.redis_folder, synced)
            except OSError as error:  # a full or failing disk: Redis says so to its clients, we keep trying
                log.error("redis.sync_failed", error=str(error))
            await asyncio.sleep(SYNC_EVERY_S)

    def _python(self, name: str, threads: int) -> Program:
        environment = {
            **PINNING,
            **self._environment,
            **self._settings.environment(),
            # Threads of libgomp spin while they wait for work; beside other processes on few cores that costs
            # more than the arithmetic itself.
            "OMP_WAIT_POLICY": "PASSIVE",
            "OMP_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONUNBUFFERED": "1",
        }
        return Program(name, (sys.executable, "-m", "service.cli", name), environment)


def cores() -> int:
    """Cores this process may use (a container's share, not the machine's)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def child_threads(settings: Settings) -> dict[str, int]:
    """Arithmetic threads of each of our processes, in the order they are started."""
    return {
        "engine": settings.threads or cores(),
        "gateway": 1,
        "worker": settings.train_threads or cores(),
    }


async def until(ready: Callable[[], Awaitable[bool]]) -> None:
    """Return once `ready()` is true, asking every tenth of a second."""
    while True:
        if await ready():
            return
        await asyncio.sleep(POLL_S)


async def _negate(answer: Awaitable[bool]) -> bool:
    return not await answer


async def answers_ready(host: str, port: int, timeout_s: float = 2.0) -> bool:
    """True when `GET /ready` says 200: Redis, engine and adapter folder are there."""
    target = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    writer = None
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(target, port)
            writer.write(
                f"GET /ready HTTP/1.1\r\nHost: {target}:{port}\r\nConnection: close\r\n\r\n".encode()
            )
            status = await reader.readline()
            return status.split()[1:2] == [b"200"]
    except (OSError, TimeoutError):
        return False
    finally:
        if writer is not None:
            writer.close()


async def require_free_port(host: str, port: int) -> None:
    """Refuse a taken port now, in one line, instead of a gateway that dies again and again. Tried as the
    gateway will: a name may stand for several addresses, and `::` is none of IPv4's."""
    loop = asyncio.get_running_loop()
    try:
        (await loop.create_server(asyncio.Protocol, host, port, start_serving=False)).close()
    except OSError as error:
        number = error.errno or 0  # below 0 where a name cannot be found, which has words of its own
        reason = os.strerror(number) if number > 0 else error.strerror or str(error)
        raise SettingsError("--port", f"cannot listen on {host}:{port}: {reason}") from None


@contextmanager
def data_lock(path: Path) -> Iterator[None]:
    """Hold the data folder for this process. Raises AlreadyRunning, SettingsError."""
    make_folder(path.parent)
    with expecting(path.parent, "a folder to write in"):
        opened = path.open("a+")
    with opened as file:
        for attempt in range(LOCK_ATTEMPTS):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if attempt + 1 == LOCK_ATTEMPTS:
                    file.seek(0)
                    raise AlreadyRunning(path.parent, file.read().strip() or "unknown") from None
                time.sleep(POLL_S)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def is_running(path: Path) -> bool:
    """Whether a supervisor holds the lock file `path`. Raises SettingsError when that cannot be seen."""
    with expecting(path, "a file to read"):
        try:
            with path.open() as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except BlockingIOError:
            return True
    return False


def _running_file(settings: Settings) -> Path:
    return settings.run_folder / "service.json"


def running_settings(settings: Settings) -> Settings | None:
    """The settings of the service that runs on `settings.data`, or None: commands need only the folder."""
    if not is_running(settings.lock_path):
        return None
    try:
        return Settings.read(json.loads(_running_file(settings).read_text()))
    except (FileNotFoundError, json.JSONDecodeError):  # it has the lock and is about to write, or writing
        return None


async def serve(
    settings: Settings, environment: Mapping[str, str], stop: asyncio.Event, announce: Callable[[], None]
) -> None:
    """Run the service until `stop` is set.

    Raises AlreadyRunning, SettingsError, RedisUnavailable or ChildGaveUp, with everything stopped again.
    """
    with data_lock(settings.lock_path):
        await require_free_port(settings.host, settings.port)
        private_folder(settings.run_folder)
        private_folder(settings.adapter_root)
        read_or_create_secret(settings.secret_path)
        running = _running_file(settings)
        running.unlink(missing_ok=True)
        descriptor = os.open(running, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)  # holds the Redis password
        with os.fdopen(descriptor, "w") as file:
            json.dump(settings.environment(), file)
        try:
            await Supervisor(settings, environment, announce).run(stop)
        finally:
            running.unlink(missing_ok=True)
