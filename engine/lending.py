"""What the engine lends to a trainer on its GPU: the base's weights, and the word whether anyone waits.

The trainer is a process of its own, so that a fault in learning never ends a reply. A second copy of the base
would cost as much memory as thousands of adapters, so the engine opens its own to it by CUDA's interprocess
handles: the same bytes on the device, mapped twice, written by nobody after loading.

Both sides meet in one file of the run folder, whose first page they share in memory:

    pid of the engine | bytes of the list | state | busy        then the list of handles, msgpack

The engine holds the file's lock while it lives; whoever can take the lock knows that it is gone.
"""

import fcntl
import hashlib
import json
import mmap
import os
import struct
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn
from torch.multiprocessing import reductions

from engine.model import Decoder, ModelConfig
from engine.weights import LoadedModel, loaded_config

_PAGE = mmap.PAGESIZE
_HEAD = struct.Struct("<QQB")  # pid, bytes of the list, state
_EMPTY, _LENT = 0, 1
_BUSY_AT = _HEAD.size
# An engine that died is back within this time, if it comes back: it has to load its weights again.
PATIENCE_S = 30.0
_POLL_S = 0.1


def trainer_bytes(chosen: int | None, device_bytes: int) -> int:
    """What a trainer may take of the device beside the weights: what was chosen, or a tenth of it all."""
    return device_bytes // 10 if chosen is None else chosen


class NothingLent(RuntimeError):
    """There is no base to borrow; the message says why."""


class _Piece(msgspec.Struct, frozen=True):
    """One tensor: where it lies in which allocation of the lender's. The fields behind `offset` are what
    `torch.multiprocessing` passes between processes for a CUDA storage."""

    name: str
    dtype: str
    shape: list[int]
    stride: list[int]
    offset: int
    device: int
    handle: bytes
    storage_bytes: int
    storage_offset: int
    counter: bytes
    counter_offset: int
    event: bytes
    event_sync: bool


class _List(msgspec.Struct, frozen=True):
    config_hash: str
    base_hash: str
    device_uuid: str
    pieces: list[_Piece]


class Lender:
    """The engine's side. Open from before the model is loaded until the process ends."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._file, fcntl.LOCK_EX)  # waits for a borrower that is just looking
        os.ftruncate(self._file, _PAGE)
        self._page = mmap.mmap(self._file, _PAGE)
        self._page[: _BUSY_AT + 1] = _HEAD.pack(os.getpid(), 0, _EMPTY) + b"\0"

    def lend(self, model: LoadedModel) -> None:
        """Open the model's weights to who can read the file. They must lie on one CUDA device, and stay."""
        parameters = dict(model.decoder.named_parameters())
        device = next(iter(parameters.values())).device
        self._write(
            _List(
                _config_hash(model.config),
                model.base_hash,
                _uuid(device.index or 0),
                [_piece(name, tensor.detach()) for name, tensor in parameters.items()],
            )
        )

    def tell(self, busy: bool) -> None:
        """Whether replies are being computed. Costs a byte's write: for every step."""
        self._page[_BUSY_AT] = busy

    def close(self) -> None:
        """Who still borrows sees it and ends; the weights may go then."""
        if not self._page.closed:
            self._page[: _HEAD.size] = _HEAD.pack(0, 0, _EMPTY)
            self._page.close()
            os.close(self._file)

    def _write(self, lent: _List) -> None:
        content = msgspec.msgpack.encode(lent)
        os.pwrite(self._file, content, _PAGE)
        self._page[: _HEAD.size] = _HEAD.pack(os.getpid(), len(content), _LENT)


class Borrowed:
    """The trainer's side: a base that another process holds. Raises NothingLent."""

    def __init__(
        self,
        path: Path,
        *,
        patience_s: float = PATIENCE_S,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Waits while the lender loads its model, and for `patience_s` for one that has gone."""
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            raise NothingLent(f"no engine lends here: {path.name} is not there") from None
        deadline = clock() + patience_s
        while True:
            if self._is_held():
                deadline = clock() + patience_s
                self._pid, size, state = self._head()
                if state == _LENT:
                    break
            elif clock() >= deadline:
                raise NothingLent("the engine that lent here is gone")
            sleep(_POLL_S)
        self._page = mmap.mmap(self._file, _PAGE, prot=mmap.PROT_READ)
        self._list = msgspec.msgpack.decode(os.pread(self._file, size, _PAGE), type=_List)

    @property
    def is_busy(self) -> bool:
        """Whether the engine computes replies just now."""
        return self._page[_BUSY_AT] != 0

    @property
    def is_there(self) -> bool:
        """Whether the lender still lives; without it what is borrowed must not be used any more."""
        pid, _, state = self._head()
        return (pid, state) == (self._pid, _LENT) and self._is_held()

    def model(self, folder: Path) -> LoadedModel:
        """The lent weights as the model of `folder`, whose config must be the lender's."""
        config, lent = loaded_config(folder), self._list
        if lent.config_hash != _config_hash(config):
            raise NothingLent(f"the engine serves another model than {folder}")
        if lent.device_uuid != _uuid(lent.pieces[0].device):
            raise NothingLent(f"the engine is on another device: {lent.device_uuid}")
        with torch.device("meta"):
            decoder = Decoder(config)
        parts = dict(decoder.named_modules())
        try:
            for piece in lent.pieces:
                owner, _, name = piece.name.rpartition(".")
                setattr(parts[owner], name, nn.Parameter(_tensor(piece), requires_grad=False))
        except RuntimeError as error:  # the driver will not map it: another user's, another container's
            raise NothingLent(str(error)) from error
        if config.tie_word_embeddings:
            decoder.head.weight = decoder.embed
        return LoadedModel(config, decoder.eval(), lent.base_hash)

    def _head(self) -> tuple[int, int, int]:
        content = os.pread(self._file, _HEAD.size, 0)
        pid, size, state = _HEAD.unpack(content.ljust(_HEAD.size, b"\0"))  # it may have just been made
        return pid, size, state

    def _is_held(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        fcntl.flock(self._file, fcntl.LOCK_UN)
        return False


def _config_hash(config: ModelConfig) -> str:
    return hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode()).hexdigest()


def _uuid(device: int) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


def _piece(name: str, tensor: Tensor) -> _Piece:
    _, given = reductions.reduce_tensor(tensor)  # type: ignore[no-untyped-call]
    (_, _, _, offset, _, _, device, handle, size, start, _, counter, counter_offset, event, sync) = given
    return _Piece(
        name,
        str(tensor.dtype).removeprefix("torch."),
        list(tensor.shape),
        list(tensor.stride()),
        offset,
        device,
        handle,
        size,
        start,
        counter,
        counter_offset,
        event,
        sync,
    )


def _tensor(piece: _Piece) -> Tensor:
    rebuilt: Any = reductions.rebuild_cuda_tensor(  # type: ignore[no-untyped-call]
        Tensor,
        torch.Size(piece.shape),
        tuple(piece.stride),
        piece.offset,
        torch.TypedStorage,
        getattr(torch, piece.dtype),
        piece.device,
        piece.handle,
        piece.storage_bytes,
        piece.storage_offset,
        False,
        piece.counter,
        piece.counter_offset,
        piece.event,
        piece.event_sync,
    )
    assert isinstance(rebuilt, Tensor)
    return rebuilt
