"""Pinned host memory for packed adapters, which a device copies from without the host's help.

Pinning is slow, and torch's allocator rounds every request up to a power of two: up to twice an adapter's
bytes. So memory is pinned in large chunks of such a size, each cut into pieces of one size, as adapters come
in few. A piece returns when the tensor made of it is gone, a chunk without tensors is cut anew.
"""

import threading
import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor

CHUNK_BYTES = 256 << 20


@dataclass(slots=True)
class _Chunk:
    memory: Tensor  # bytes
    piece_bytes: int = 0
    free: list[int] = field(default_factory=list)  # where the pieces begin that no tensor uses

    @property
    def pieces(self) -> int:
        return len(self.memory) // self.piece_bytes

    def cut(self, piece_bytes: int) -> None:
        self.piece_bytes = piece_bytes
        self.free = list(range((self.pieces - 1) * piece_bytes, -1, -piece_bytes))


class PinnedMemory:
    """Matrices in pinned memory, from any thread. `pin` False serves tests where there is nothing to pin for.

    It never gives memory back to the system; `nbytes` is what it holds.
    """

    def __init__(self, *, pin: bool = True, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._pin = pin
        self._chunk_bytes = chunk_bytes
        self._chunks: list[_Chunk] = []
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        return sum(len(chunk.memory) for chunk in self._chunks)

    def empty(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """A matrix with any content. Its memory is used anew once this very object is gone, so keep it for
        as long as anything reads it; a view does not.
        """
        nbytes = shape[0] * shape[1] * dtype.itemsize
        with self._lock:
            chunk = self._chunk_for(nbytes)
            begin = chunk.free.pop()
        matrix = chunk.memory[begin : begin + nbytes].view(dtype).view(shape)
        # append alone, as this may run in the middle of anything: it is atomic, and waits for no lock
        weakref.finalize(matrix, chunk.free.append, begin).atexit = False
        return matrix

    def _chunk_for(self, piece_bytes: int) -> _Chunk:
        for chunk in self._chunks:
            if chunk.piece_bytes == piece_bytes and chunk.free:
                return chunk
        for chunk in self._chunks:
            if len(chunk.free) == chunk.pieces and len(chunk.memory) >= piece_bytes:
                chunk.cut(piece_bytes)
                return chunk
        size = max(self._chunk_bytes, piece_bytes)
        chunk = _Chunk(torch.empty(size, dtype=torch.uint8, pin_memory=self._pin))
        chunk.cut(piece_bytes)
        self._chunks.append(chunk)
        return chunk
