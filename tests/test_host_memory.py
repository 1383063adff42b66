"""Memory for packed adapters: no two share any, what is gone is used anew, and little is held for long."""

import queue
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from engine.host_memory import PinnedMemory, Scratch


def test_matrices_that_live_never_share_memory() -> None:
    memory = PinnedMemory(pin=False, chunk_bytes=4096)
    own = random.Random(1)
    alive: dict[int, Tensor] = {}
    for number in range(2000):
        if alive and own.random() < 0.5:
            key = own.choice(list(alive))
            assert (alive.pop(key) == key).all()
        else:
            shape = (own.randint(1, 3), own.choice((64, 100, 512)))
            alive[number] = memory.empty(shape, torch.float32).fill_(number)
            assert alive[number].shape == shape
    for number, matrix in alive.items():
        assert (matrix == number).all()


def test_memory_of_what_is_gone_is_used_anew_by_the_same_size_and_by_others() -> None:
    memory = PinnedMemory(pin=False, chunk_bytes=4096)
    kept = [memory.empty((1, 256), torch.float32) for _ in range(4)]
    assert memory.nbytes == 4096
    del kept[1]
    again = memory.empty((1, 256), torch.float32)
    assert memory.nbytes == 4096
    del kept, again
    smaller = [memory.empty((3, 64), torch.bfloat16) for _ in range(10)]
    assert memory.nbytes == 4096
    assert len({matrix.data_ptr() for matrix in smaller}) == 10


def test_matrices_of_many_sizes_share_a_chunk() -> None:
    memory = PinnedMemory(pin=False, chunk_bytes=1 << 16)
    sizes = range(16, 16 * 80, 16)
    kept = [memory.empty((1, size), torch.uint8) for size in sizes]
    assert memory.nbytes == 1 << 16
    del kept[::2]  # what was in several gaps side by side is one
    del kept
    assert memory.empty((1, 1 << 16), torch.uint8).shape == (1, 1 << 16)
    assert memory.nbytes == 1 << 16


def test_what_is_larger_than_a_chunk_has_one_of_its_own() -> None:
    memory = PinnedMemory(pin=False, chunk_bytes=4096)
    assert memory.empty((5, 4096), torch.int16).shape == (5, 4096)
    assert memory.nbytes == 5 * 8192


def test_the_next_chunk_is_allocated_before_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    allocated: queue.Queue[tuple[str, Tensor]] = queue.Queue()

    def allocate(_: PinnedMemory, nbytes: int) -> Tensor:
        memory = torch.empty(nbytes, dtype=torch.uint8)
        allocated.put((threading.current_thread().name, memory))
        return memory

    monkeypatch.setattr(PinnedMemory, "_allocate", allocate)
    memory = PinnedMemory(chunk_bytes=4096)
    kept = [memory.empty((1, 4096), torch.uint8)]
    own, _ = allocated.get(timeout=10)
    assert own == threading.current_thread().name
    for number in range(3):  # nobody asks for more until it is there
        other, ahead = allocated.get(timeout=10)
        assert other != own
        kept.append(memory.empty((1, 4096), torch.uint8))
        assert kept[-1].data_ptr() == ahead.data_ptr()
        assert memory.nbytes == (2 + number) * 4096


def test_a_chunk_that_could_not_be_had_ahead_fails_who_needs_it_and_the_next_one_tries_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refused = [False, True, False, False]

    def allocate(_: PinnedMemory, nbytes: int) -> Tensor:
        if refused.pop(0):
            raise MemoryError("no memory to pin")
        return torch.empty(nbytes, dtype=torch.uint8)

    monkeypatch.setattr(PinnedMemory, "_allocate", allocate)
    memory = PinnedMemory(chunk_bytes=4096)
    first = memory.empty((1, 4096), torch.uint8)
    with pytest.raises(MemoryError):
        memory.empty((1, 64), torch.uint8)
    assert memory.empty((1, 64), torch.uint8).data_ptr() != first.data_ptr()
    assert memory.nbytes == 2 * 4096


def test_threads_may_ask_at_once() -> None:
    memory = PinnedMemory(pin=False, chunk_bytes=1 << 16)
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(300):
            matrix = memory.empty((2, 32), torch.int32).fill_(number)
            if not (matrix == number).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert memory.nbytes == 1 << 16


def test_a_thread_has_scratch_of_its_own_and_gets_the_same_anew() -> None:
    scratch = Scratch()
    first = scratch.take(1000)
    assert (len(first), first.dtype) == (1000, torch.uint8)
    assert scratch.take(10).data_ptr() == first.data_ptr()
    assert len(scratch.take(2000)) == 2000
    larger = scratch.take(2000)
    assert scratch.take(1000).data_ptr() == larger.data_ptr()
    with ThreadPoolExecutor(1) as other:
        assert other.submit(scratch.take, 1000).result().data_ptr() != larger.data_ptr()


def test_scratch_keeps_nothing_that_is_very_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.host_memory.MOST_SCRATCH_BYTES", 1000)
    scratch = Scratch()
    kept, large = scratch.take(1000), scratch.take(1001)
    assert len(large) == 1001
    assert scratch.take(1000).data_ptr() == kept.data_ptr()
