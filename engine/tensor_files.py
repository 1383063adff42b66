"""The header of a safetensors file, read and checked before any library opens the file.

Layout of the format: 8 bytes little-endian header length N, N bytes of JSON
`{name: {"dtype": str, "shape": [int], "data_offsets": [begin, end]}}`, then the tensor bytes.
JSON libraries keep the last of two equal keys, so a file could carry a tensor twice and show each reader
another one; a pickle renamed to .safetensors must never reach an unpickler. Both are refused here.

    FileRefused(ValueError)
    ├── ModelError            a model folder that cannot be served
    └── AdapterError          an adapter folder that cannot be served
        NotSafetensors, DuplicateTensor, TooManyTensors, TooLarge, WrongShape: both of the above
"""

import json
import os
import struct
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, TypeGuard

MAX_HEADER_BYTES = 64 << 20
MAX_TENSORS = 200_000

# bytes of one element
DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "U32": 4, "U64": 8,
}  # fmt: skip


class FileRefused(ValueError):
    """A file from outside that is not served."""


class ModelError(FileRefused):
    """A model folder that cannot be served."""


class AdapterError(FileRefused):
    """An adapter folder that cannot be served."""


class NotSafetensors(ModelError, AdapterError):
    """Not a safetensors file: `path`, `reason`."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path.name}: expected a safetensors file, got {reason}")
        self.path = path
        self.reason = reason


class DuplicateTensor(ModelError, AdapterError):
    """A tensor name is there twice: `name`."""

    def __init__(self, where: str, name: str) -> None:
        super().__init__(f"{where}: expected every tensor once, got {name!r} twice")
        self.name = name


class TooManyTensors(ModelError, AdapterError):
    """More tensors than the file can need: `limit`, `got`."""

    def __init__(self, where: str, limit: int, got: int) -> None:
        super().__init__(f"{where}: expected at most {limit} tensors, got {got}")
        self.limit = limit
        self.got = got


class TooLarge(ModelError, AdapterError):
    """A file, or its header, is larger than it can need to be: `limit` and `got` in bytes."""

    def __init__(self, where: str, limit: int, got: int) -> None:
        super().__init__(f"{where}: expected at most {limit} bytes, got {got}")
        self.limit = limit
        self.got = got


class WrongShape(ModelError, AdapterError):
    """A tensor has another shape than the model gives it: `name`, `expected`, `got`."""

    def __init__(self, where: str, name: str, expected: object, got: object) -> None:
        super().__init__(f"{where}: {name}: expected shape {expected}, got {got}")
        self.name = name
        self.expected = expected
        self.got = got


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One entry of the header; `begin` and `end` are byte offsets into the data part."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(
    path: Path, *, max_header_bytes: int = MAX_HEADER_BYTES, max_tensors: int = MAX_TENSORS
) -> dict[str, TensorSpec]:
    """The tensors of a safetensors file by name, every offset checked against shape and file size.

    Raises NotSafetensors, DuplicateTensor, TooManyTensors or TooLarge.
    """
    with path.open("rb", buffering=0) as file:
        header, data_bytes = take_header(path, file, max_header_bytes=max_header_bytes)
    return parse_header(path, header, data_bytes, max_tensors=max_tensors)


def take_header(path: Path, file: FileIO, *, max_header_bytes: int = MAX_HEADER_BYTES) -> tuple[bytes, int]:
    """(the header, the bytes of the data part) of an unbuffered file, which then stands where that begins.

    Raises NotSafetensors or TooLarge.
    """
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    if len(prefix) < 8:
        raise NotSafetensors(path, f"a file of {size} bytes")
    (length,) = struct.unpack("<Q", prefix)
    if length > size - 8:
        # So a pickle begins, or the archive that torch puts it in, and headers of some honest lengths.
        if prefix[:2] == b"PK" or (prefix[0] == 0x80 and prefix[1] in range(2, 6)):
            raise NotSafetensors(path, "a Python pickle")
        raise NotSafetensors(path, f"a header of {length} bytes in a file of {size} bytes")
    if length > max_header_bytes:
        raise TooLarge(f"header of {path.name}", max_header_bytes, length)
    return file.read(length), size - 8 - length


def parse_header(
    path: Path, header: bytes, data_bytes: int, *, max_tensors: int = MAX_TENSORS
) -> dict[str, TensorSpec]:
    """The tensors by name, every offset checked against shape and the bytes of the data part.

    Raises NotSafetensors, DuplicateTensor or TooManyTensors.
    """
    pairs = _top_level_pairs(path, header)
    count = sum(name != "__metadata__" for name, _ in pairs)
    if count > max_tensors:
        raise TooManyTensors(path.name, max_tensors, count)
    return _check_specs(path, pairs, data_bytes)


def data_start(file: FileIO) -> int:
    """Where the data part begins, in an unbuffered file whose header was checked."""
    file.seek(0)
    (length,) = struct.unpack("<Q", file.read(8))
    return 8 + int(length)


def read_whole(path: Path, file: FileIO, content: memoryview) -> None:
    """Fill `content` from an unbuffered file. Raises NotSafetensors where the file ends before."""
    read = 0
    while read < len(content):  # one call reads 2 GiB at most
        more = file.readinto(content[read:])
        if not more:
            raise NotSafetensors(path, "one that became shorter")
        read += more


def _top_level_pairs(path: Path, raw: bytes) -> list[tuple[str, Any]]:
    def keep_pairs(pairs: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
        return pairs  # a list instead of a dict: equal keys stay visible

    try:
        parsed = json.loads(raw.decode("utf-8"), object_pairs_hook=keep_pairs)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise NotSafetensors(path, f"a header that is not JSON ({error})") from error
    if not raw.lstrip().startswith(b"{"):
        raise NotSafetensors(path, "a header that is not a JSON object")
    pairs: list[tuple[str, Any]] = parsed
    seen: set[str] = set()
    for name, _ in pairs:
        if name in seen:
            raise DuplicateTensor(path.name, name)
        seen.add(name)
    return pairs


def _check_specs(path: Path, pairs: list[tuple[str, Any]], data_bytes: int) -> dict[str, TensorSpec]:
    specs: dict[str, TensorSpec] = {}
    for name, entry in pairs:
        if name == "__metadata__":
            continue
        specs[name] = _spec(path, name, entry)
    end = 0
    for name, spec in sorted(specs.items(), key=lambda item: (item[1].begin, item[1].end)):
        if spec.begin != end:
            raise NotSafetensors(path, f"{name} at byte {spec.begin}, where {end} was expected")
        end = spec.end
    if end != data_bytes:
        raise NotSafetensors(path, f"{data_bytes} bytes of tensors, where the header describes {end}")
    return specs


def _spec(path: Path, name: str, entry: object) -> TensorSpec:
    fields: dict[str, Any] = (
        dict(entry) if isinstance(entry, list) and all(isinstance(pair, tuple) for pair in entry) else {}
    )
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not (isinstance(dtype, str) and _are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
        raise NotSafetensors(path, f"a header entry for {name!r} without dtype, shape and data_offsets")
    if dtype not in DTYPE_BYTES:
        raise NotSafetensors(path, f"{name} of unknown dtype {dtype!r}")
    expected = DTYPE_BYTES[dtype]
    for side in shape:
        expected *= side
    if offsets[1] - offsets[0] != expected:
        raise NotSafetensors(
            path, f"{name} of {offsets[1] - offsets[0]} bytes, where its shape needs {expected}"
        )
    return TensorSpec(dtype, tuple(shape), offsets[0], offsets[1])


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
