"""Host memory: pinned for packed adapters, which a device copies from without the host's help, and each
reader's own for what it reads.

Pinning is slow, and torch's allocator rounds every request up to a power of two: up to twice an adapter's
bytes. So memory is pinned in large chunks of such a size, and each matrix takes the first gap that holds it:
adapters may come in any number of sizes. Its room returns when the tensor is gone. While one chunk is filled
the next is pinned, as readers who wait for that read nothing.
"""

import threading
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

CHUNK_BYTES = 256 << 20
MOST_SCRATCH_BYTES = 128 << 20  # kept by a thread; what is larger is taken from the system
_ALIGN = 64  # bytes


@dataclass(slots=True)
class _Chunk:
    memory: Tensor  # bytes
    gaps: list[tuple[int, int]]  # from .. to, in order, no two adjacent
    returned: list[tuple[int, int]] = field(default_factory=list)  # gaps since, in any order

    def take(self, nbytes: int) -> int | None:
        """Where the first gap of so many bytes begins, which is then taken; None if there is none."""
        if self.returned:
            self._take_back()
        for index, (begin, end) in enumerate(self.gaps):
            if end - begin >= nbytes:
                self.gaps[index : index + 1] = [(begin + nbytes, end)] if end - begin > nbytes else []
                return begin
        return None

    def _take_back(self) -> None:
        while self.returned:
            self.gaps.append(self.returned.pop())
        gaps: list[tuple[int, int]] = []
        for begin, end in sorted(self.gaps):
            if gaps and gaps[-1][1] == begin:
                gaps[-1] = (gaps[-1][0], end)
            else:
                gaps.append((begin, end))
        self.gaps = gaps


class PinnedMemory:
    """Matrices in pinned memory, from any thread. `pin` False serves tests where there is nothing to pin for.

    It never gives memory back to the system; `nbytes` is what it holds, without the chunk that is
    pinned ahead.
    """

    def __init__(self, *, pin: bool = True, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._pin = pin
        self._chunk_bytes = chunk_bytes
        self._chunks: list[_Chunk] = []
        self._lock = threading.Lock()
        self._next: Future[Tensor] | None = None
        self._pinner = ThreadPoolExecutor(1, thread_name_prefix="pin-ahead")

    @property
    def nbytes(self) -> int:
        return sum(len(chunk.memory) for chunk in self._chunks)

    def empty(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """A matrix with any content. Its memory is used anew once this very object is gone, so keep it for
        as long as anything reads it; a view does not.
        """
        nbytes = shape[0] * shape[1] * dtype.itemsize
        taken = -(-nbytes // _ALIGN) * _ALIGN
        with self._lock:
            chunk, begin = self._take(taken)
        matrix = chunk.memory[begin : begin + nbytes].view(dtype).view(shape)
        # append alone, as this may run in the middle of anything: it is atomic, and waits for no lock
        weakref.finalize(matrix, chunk.returned.append, (begin, begin + taken)).atexit = False
        return matrix

    def _take(self, nbytes: int) -> tuple[_Chunk, int]:
        for chunk in self._chunks:
            begin = chunk.take(nbytes)
            if begin is not None:
                return chunk, begin
        memory = self._chunk() if nbytes <= self._chunk_bytes else self._allocate(nbytes)
        size = len(memory)
        chunk = _Chunk(memory, [(nbytes, size)] if size > nbytes else [])
        self._chunks.append(chunk)
        return chunk, 0

    def _chunk(self) -> Tensor:
        ready, self._next = self._next, None  # first, so that one that could not be had is tried anew
        memory = ready.result() if ready else self._allocate(self._chunk_bytes)
        self._next = self._pinner.submit(self._allocate, self._chunk_bytes)
        return memory

    def _allocate(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._pin)


class Scratch(threading.local):
    """Bytes of each thread its own, used anew the next time it takes some.

    Fresh memory is cleared by the kernel page by page, and threads that ask for it wait for each other.
    """

    def __init__(self) -> None:
        self._kept = torch.empty(0, dtype=torch.uint8)

    def take(self, count: int) -> Tensor:
        """So many, of any content, until the thread takes the next ones."""
        if count > MOST_SCRATCH_BYTES:
            return torch.empty(count, dtype=torch.uint8)
        if len(self._kept) < count:
            self._kept = torch.empty(count, dtype=torch.uint8)
        return self._kept[:count]
