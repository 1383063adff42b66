"""The engine lends its weights to the trainer: who sees what when, on any machine; the weights on a GPU."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.lending import Borrowed, NothingLent, trainer_bytes
from engine.weights import load_model
from personalization.score import token_losses
from tests.small_model import habits, save_small_model

ROOT = Path(__file__).parent.parent
# Lends an empty list, which needs no GPU: all but the weights.
LENDS_NOTHING = r"""
import sys
from pathlib import Path
from engine import lending
lender = lending.Lender(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.readline()
lender._write(lending._List("another", "base", "device", []))
print("lent", flush=True)
for line in sys.stdin:
    if line == "close\n":
        lender.close()
    else:
        lender.tell(line == "busy\n")
    print("done", flush=True)
"""
LENDS = """
import sys
from pathlib import Path
from engine.lending import Lender
from engine.weights import load_model
lender = Lender(Path(sys.argv[1]))
lender.lend(load_model(Path(sys.argv[2]), device="cuda"))
print("lent", flush=True)
sys.stdin.readline()
"""


class Engine:
    """A process that lends."""

    def __init__(self, program: str, *arguments: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, *map(str, arguments)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def hears(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def says(self, expected: str) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline().strip() == expected

    def end(self) -> None:
        with self.process:  # closes its pipes and waits for it
            self.process.kill()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lent"


@pytest.fixture
def engine(path: Path) -> Iterator[Engine]:
    engine = Engine(LENDS_NOTHING, path)
    engine.says("held")
    yield engine
    engine.end()


def test_where_no_engine_was_nothing_is_waited_for(path: Path) -> None:
    with pytest.raises(NothingLent, match="no engine lends here"):
        Borrowed(path, sleep=lambda seconds: pytest.fail("waited"))


def test_who_comes_early_waits_until_the_model_is_loaded(engine: Engine, path: Path) -> None:
    naps = 0

    def sleep(seconds: float) -> None:
        nonlocal naps
        naps += 1
        if naps == 3:
            engine.hears("")
            engine.says("lent")

    assert Borrowed(path, patience_s=0.0, sleep=sleep).is_there
    assert naps == 3
    assert path.stat().st_mode & 0o777 == 0o600


def test_the_borrower_sees_who_is_busy_and_when_the_engine_closes(engine: Engine, path: Path) -> None:
    engine.hears("")
    engine.says("lent")
    borrowed = Borrowed(path)
    assert not borrowed.is_busy
    for word in ("busy", "idle", "busy"):
        engine.hears(word)
        engine.says("done")
        assert borrowed.is_busy == (word == "busy")
    assert borrowed.is_there
    engine.hears("close")
    engine.says("done")
    assert engine.process.poll() is None
    assert not borrowed.is_there


def test_an_engine_that_is_killed_is_seen_to_be_gone_and_the_next_one_is_another(
    engine: Engine, path: Path
) -> None:
    engine.hears("")
    engine.says("lent")
    borrowed = Borrowed(path)
    os.kill(engine.process.pid, signal.SIGKILL)
    engine.process.wait()
    assert not borrowed.is_there
    with pytest.raises(NothingLent, match="gone"):
        Borrowed(path, patience_s=0.2)
    following = Engine(LENDS_NOTHING, path)
    try:
        following.says("held")
        following.hears("")
        following.says("lent")
        assert not borrowed.is_there
        assert Borrowed(path).is_there
    finally:
        following.end()


def test_another_model_is_not_borrowed(engine: Engine, path: Path, tmp_path: Path) -> None:
    engine.hears("")
    engine.says("lent")
    folder = save_small_model(tmp_path / "model")
    with pytest.raises(NothingLent, match="another model"):
        Borrowed(path).model(folder)


def test_learning_may_take_a_tenth_of_the_device_unless_it_is_said() -> None:
    assert trainer_bytes(None, 1000) == 100
    assert trainer_bytes(7, 1000) == 7


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_lent_weights_are_the_same_memory_and_predict_the_same(path: Path, tmp_path: Path) -> None:
    folder = save_small_model(tmp_path / "model")
    engine = Engine(LENDS, path, folder)
    try:
        engine.says("lent")
        borrowed = Borrowed(path)
        before = torch.cuda.memory_allocated()
        lent = borrowed.model(folder)
        assert torch.cuda.memory_allocated() == before
        own = load_model(folder, device="cuda")
        assert lent.base_hash == own.base_hash
        rows = habits(2, 4)
        for one, other in zip(token_losses(lent, rows, None), token_losses(own, rows, None), strict=True):
            assert torch.equal(one, other)
    finally:
        engine.end()
    deadline = time.monotonic() + 5
    while borrowed.is_there and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not borrowed.is_there
