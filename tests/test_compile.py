"""Every kernel compiles for devices that are not here, and fits them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DEFINED = re.compile(r"def (_\w+_kernel)\(")
# Shared memory of one block, in KiB: the CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability". 8.6 also stands for 8.9 and 12.0, which have as much.
SHARED_KIB = {"8.6": 99, "9.0": 227}
MOST_SPILLED = 64  # bytes a thread: what a device's first cache hides
MOST_NARROW = 2  # loads of two bytes: single values, never a part of weights, adapters or K/V


@pytest.mark.parametrize("capability", SHARED_KIB)
def test_every_kernel_compiles_and_fits(capability: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernel_compiler", capability],
        cwd=ROOT, env={**environment, "TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    defined = {name for file in (ROOT / "kernels").glob("*.py") for name in DEFINED.findall(file.read_text())}
    assert {one["kernel"] for one in found} == defined
    for one in found:
        assert one["shared"] <= SHARED_KIB[capability] * 1024, one
        assert one["spilled"] <= MOST_SPILLED, one
        assert one["narrow"] <= MOST_NARROW, one
