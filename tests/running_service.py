"""The whole service, started for real: Redis, engine, gateway and worker under their supervisor.

For the journeys and the benchmarks; nothing here is a fake. Use one per module, starting takes seconds.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
READY_WITHIN_S = 180.0
STOPPED_WITHIN_S = 60.0
PROCESSES = ("redis", "engine", "gateway", "worker")


class ServiceFailed(RuntimeError):
    """The service did not do what it should; the end of its log is in the message."""


def free_port() -> int:
    """None that the kernel gives to whoever connects meanwhile: the service listens seconds later."""
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("expected a free port, found none")


def process_name(pid: int) -> str | None:
    """redis, engine, gateway or worker, read off the process' arguments; None for any other."""
    try:
        argv = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    except OSError:
        return None
    if "redis-server" in argv[0] or "valkey-server" in argv[0]:
        return "redis"
    return next((n for n in PROCESSES if argv[1:4] == ["-m", "service.cli", n]), None)


@dataclass
class RunningService:
    """A service of one data folder. `address` is the page's; commands go through `attune`."""

    data: Path
    port: int
    log: Path
    supervisor: subprocess.Popen[bytes]
    environment: dict[str, str]

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def attune(self, *arguments: str, code: int = 0, text: str | None = None) -> str:
        """Run a command against this service; its standard output. Fails unless it exits with `code`."""
        done = subprocess.run(
            [sys.executable, "-m", "service.cli", *arguments, "--data", str(self.data)],
            cwd=ROOT, env=self.environment, input=text, capture_output=True, text=True, timeout=500,
        )  # fmt: skip
        if done.returncode != code:
            raise ServiceFailed(f"{arguments}: exit code {done.returncode}, expected {code}\n{done.stderr}")
        return done.stdout if code == 0 else done.stderr

    def json(self, *arguments: str, text: str | None = None) -> Any:
        return json.loads(self.attune(*arguments, "--json", text=text))

    def token(self, user: str) -> str:
        return self.attune("token", user).strip()

    def pids(self) -> dict[str, int]:
        """The processes that are up now, by name."""
        children = (
            Path(f"/proc/{self.supervisor.pid}/task/{self.supervisor.pid}/children").read_text().split()
        )
        return {name: int(pid) for pid in children if (name := process_name(int(pid)))}

    def kill(self, name: str) -> int:
        """kill -9 one process, once it is up; returns the pid it had."""
        self.wait_restarted(name, 0)
        pid = self.pids()[name]
        os.kill(pid, signal.SIGKILL)
        return pid

    def wait_restarted(self, name: str, old: int, within_s: float = 120.0) -> None:
        deadline = time.monotonic() + within_s
        while self.pids().get(name) in (None, old):
            if time.monotonic() > deadline:
                raise ServiceFailed(f"{name} was not started again\n{self.log_tail()}")
            time.sleep(0.05)

    def log_tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def stop(self) -> int:
        """Ask the supervisor to end; its exit code. Everything it started must be gone then."""
        left = self.pids() if self.supervisor.poll() is None else {}
        self.supervisor.terminate()
        try:
            code = self.supervisor.wait(STOPPED_WITHIN_S)
        except subprocess.TimeoutExpired:
            self.supervisor.kill()
            self.supervisor.wait()
            raise ServiceFailed(f"did not stop within {STOPPED_WITHIN_S} s\n{self.log_tail()}") from None
        orphans = [f"{name} {pid}" for name, pid in left.items() if process_name(pid) == name]
        if orphans:
            raise ServiceFailed(f"still there after the supervisor: {orphans}")
        return code


@contextmanager
def running_service(data: Path, *, model: str = "demo", **variables: str) -> Iterator[RunningService]:
    """Start the service on `data`, wait until it is ready, stop it at the end.

    `variables` are settings as the environment has them, without the prefix: `auto_refresh_after="0"`.
    """
    data.mkdir(parents=True, exist_ok=True)
    log, port = data.with_name(data.name + ".log"), free_port()
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("ATTUNE_")},
        **{f"ATTUNE_{key.upper()}": value for key, value in variables.items()},
        "PYTHONPATH": str(ROOT),
    }
    argv = [sys.executable, "-m", "service.cli", "serve"]
    argv += ["--data", str(data), "--model", model, "--port", str(port), "--json"]
    with log.open("wb") as output:
        supervisor = subprocess.Popen(
            argv, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    service = RunningService(data, port, log, supervisor, environment)
    try:
        deadline = time.monotonic() + READY_WITHIN_S
        while b'"ready": true' not in log.read_bytes():
            if supervisor.poll() is not None or time.monotonic() > deadline:
                raise ServiceFailed(f"not ready\n{service.log_tail()}")
            time.sleep(0.1)
        yield service
    finally:
        if supervisor.poll() is None:
            service.stop()
