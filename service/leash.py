"""Run a program that cannot outlive its parent: `python leash.py PARENT_PID PROGRAM ARGUMENT…`.

Linux kills us (SIGKILL) when the parent ends, however it ends, and keeps that promise over exec, so it holds
for programs that are not ours, such as Redis. Elsewhere there is no such signal and the program just runs.
"""

import ctypes
import os
import sys
from collections.abc import Sequence

PR_SET_PDEATHSIG = 1
SIGKILL = 9


def command(argv: Sequence[str]) -> list[str]:
    """`argv` as it must be started by this process for the leash to hold."""
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *argv]


def main() -> None:
    parent, program = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, SIGKILL)
        if os.getppid() != parent:  # it ended before the promise was made
            sys.exit(1)
    os.execv(program[0], program)


if __name__ == "__main__":
    main()
