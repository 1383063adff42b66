"""What every benchmark prints about itself: the machine, the commit, and one last line of JSON."""

from __future__ import annotations

import json
import platform
import subprocess
import time
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


def commit() -> str:
    """The commit the numbers belong to, with `+` when the tree had changes."""
    here = Path(__file__).parent
    revision = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True
    )
    changed = subprocess.run(
        ["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True
    )
    return (revision.stdout.strip() or "unknown") + ("+" if changed.stdout.strip() else "")


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
