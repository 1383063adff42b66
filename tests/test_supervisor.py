"""The supervisor's promises, kept by real processes: restart, stop, no orphans, one service per folder."""

import asyncio
import errno
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from service.processes import require_no_engine
from service.settings import Settings, SettingsError
from service.supervisor import (
    AlreadyRunning,
    Child,
    ChildGaveUp,
    Program,
    data_lock,
    require_free_port,
    restart_delay,
    running_settings,
    until,
)


def shell(script: str, grace_s: float = 5.0) -> Program:
    return Program("test", ("/bin/sh", "-c", script), dict(os.environ), grace_s)


async def pid_after(child: Child, old: int | None) -> int:
    """The pid of the next start after `old`."""

    async def new() -> bool:
        return child.pid not in (None, old)

    async with asyncio.timeout(60):
        await until(new)
    assert child.pid is not None
    return child.pid


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except FileNotFoundError:
        return True


async def test_a_child_that_is_killed_is_started_again() -> None:
    child = Child(shell("sleep 60"))
    keeping = asyncio.create_task(child.keep())
    first = await pid_after(child, None)
    os.kill(first, signal.SIGKILL)
    second = await pid_after(child, first)
    assert second != first
    assert child.starts == 2
    keeping.cancel()
    await child.stop()
    assert child.pid is None
    assert gone(second)


async def test_a_child_for_which_there_is_no_process_now_is_started_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    child, start = Child(shell("sleep 60")), asyncio.create_subprocess_exec

    async def refused_once(*argv: Any, **options: Any) -> asyncio.subprocess.Process:
        if child.starts == 1:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return await start(*argv, **options)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", refused_once)
    keeping = asyncio.create_task(child.keep())
    await pid_after(child, None)
    assert child.starts == 2
    keeping.cancel()
    await child.stop()


async def test_a_child_that_leaves_with_code_two_is_not_started_again() -> None:
    child = Child(shell("exit 2"))
    with pytest.raises(ChildGaveUp):
        await child.keep()
    assert child.starts == 1


async def test_a_child_that_ignores_the_request_to_end_is_killed_after_its_grace(tmp_path: Path) -> None:
    deaf = tmp_path / "deaf"
    child = Child(shell(f"trap '' TERM; touch {deaf}; while true; do sleep 0.1; done", grace_s=0.5))
    keeping = asyncio.create_task(child.keep())
    pid = await pid_after(child, None)
    while not deaf.exists():  # noqa: ASYNC110 - another process sets it
        await asyncio.sleep(0.02)
    keeping.cancel()
    began = time.monotonic()
    await child.stop()
    assert time.monotonic() - began >= 0.5
    assert gone(pid)


def test_children_die_when_their_parent_is_killed(tmp_path: Path) -> None:
    script = (
        "import subprocess, sys, time\n"
        "from service import leash\n"
        "child = subprocess.Popen(leash.command(['/bin/sleep', '60']))\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert not gone(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 60
    while not gone(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert gone(pid)


def test_the_pause_before_a_restart_doubles_up_to_a_bound() -> None:
    delays = [restart_delay(failures) for failures in range(1, 12)]
    assert delays[:3] == [0.1, 0.2, 0.4]
    assert delays == sorted(delays)
    assert delays[-1] == 10.0


def test_a_data_folder_has_one_service(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with data_lock(lock), pytest.raises(AlreadyRunning, match=f"process {os.getpid()}"), data_lock(lock):
        pytest.fail("two services on one folder")
    with data_lock(lock):
        pass


def test_commands_find_the_settings_of_the_running_service_by_its_folder(tmp_path: Path) -> None:
    asked = Settings.read({}, data=tmp_path)
    running = Settings.read({}, data=tmp_path, port=9321)
    running.run_folder.mkdir()
    (running.run_folder / "service.json").write_text(
        "{" + ",".join(f'"{k}":"{v}"' for k, v in running.environment().items()) + "}"
    )
    assert running_settings(asked) is None  # what a killed service left behind does not count
    with data_lock(asked.lock_path):
        assert running_settings(asked) == running


def test_a_folder_that_cannot_be_looked_into_is_named(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.symlink_to(lock)  # what nobody may open, root included
    with pytest.raises(SettingsError, match="lock: expected a file to read"):
        running_settings(Settings.read({}, data=tmp_path))
    with pytest.raises(SettingsError, match="expected a folder to write in"), data_lock(lock):
        pytest.fail("a lock that was never held")


@pytest.mark.parametrize("written", ["", '{"ATTUNE_DATA": "/da'])
def test_a_service_whose_settings_are_half_written_does_not_run_yet(tmp_path: Path, written: str) -> None:
    asked = Settings.read({}, data=tmp_path)
    asked.run_folder.mkdir()
    (asked.run_folder / "service.json").write_text(written)
    with data_lock(asked.lock_path):
        assert running_settings(asked) is None


async def test_a_taken_port_is_refused_before_anything_starts() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SettingsError, match=f"127.0.0.1:{port}: Address already in use"):
            await require_free_port("127.0.0.1", port)
    await require_free_port("127.0.0.1", port)


async def test_a_port_is_tried_at_every_address_that_the_gateway_will_listen_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = socket.getaddrinfo

    def both(host: str, port: int, *about: Any, **more: Any) -> list[Any]:  # as where localhost is two
        if host != "localhost":
            return known(host, port, *about, **more)
        return [*known("127.0.0.1", port, *about, **more), *known("::1", port, *about, **more)]

    monkeypatch.setattr(socket, "getaddrinfo", both)
    try:
        taken = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("this machine has no IPv6")
    with taken:
        port = taken.getsockname()[1]
        with pytest.raises(SettingsError, match="Address already in use"):
            await require_free_port("localhost", port)
    await require_free_port("localhost", port)


async def test_a_port_that_is_taken_of_ipv4_alone_is_free_for_ipv6() -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    with socket.create_server(("0.0.0.0", 0)) as taken:
        await require_free_port("::", taken.getsockname()[1])


async def test_an_engine_that_lives_keeps_its_socket(tmp_path: Path) -> None:
    path = tmp_path / "engine.sock"
    await require_no_engine(path)
    living = await asyncio.start_unix_server(lambda _, writer: writer.close(), path)
    with pytest.raises(SettingsError, match="an engine answers here"):
        await require_no_engine(path, within_s=0.2)
    going = asyncio.create_task(require_no_engine(path, within_s=30))  # as those of a killed supervisor do
    await asyncio.sleep(0.2)
    living.close()
    await going
    assert path.exists()  # as after a kill -9: nobody answers, and the file stays
