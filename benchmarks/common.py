"""What every benchmark prints about itself: the machine, the commit, and one last line of JSON."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """The processor, its vector instructions, the threads torch may use, and the versions in play."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next(
        (line.split(":", 1)[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")), ""
    )
    flags = next(
        (line.split(":", 1)[1].split() for line in cpuinfo.splitlines() if line.startswith("flags")), []
    )
    return {
        "processor": model or platform.processor(),
        "cores": cpuinfo.count("processor\t"),
        "vector": [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def gpu() -> dict[str, Any]:
    """The first CUDA device, its driver, and the versions in play; nothing without one."""
    if not torch.cuda.is_available():
        return {}
    properties = torch.cuda.get_device_properties(0)
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    return {
        "gpu": properties.name,
        "gpu_memory_bytes": properties.total_memory,
        "driver": driver or "unknown",
        "cuda": torch.version.cuda,
        "triton": triton,
    }


def commit() -> str:
    """The commit the numbers belong to, with `+` when the tree had changes."""
    revision = _output("git", "rev-parse", "--short", "HEAD")
    changed = _output("git", "status", "--porcelain", "-uno")
    return (revision or "unknown") + ("+" if changed else "")


def _output(*command: str) -> str:
    """What the command prints; nothing if it is not there or fails."""
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def report(name: str, numbers: dict[str, Any], *, keep: bool) -> None:
    """Print `numbers` as the last line, and with `keep` also write them to `results/<date>-<name>.json`."""
    record = {
        "benchmark": name,
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        **machine(),
        **numbers,
    }
    if keep:
        RESULTS.mkdir(exist_ok=True)
        target = RESULTS / f"{record['date']}-{name}.json"
        target.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record), flush=True)
