"""What a step on a GPU is told: one block of memory on the device, always in the same place, filled once a
step.

Kernels read counts and offsets from here, so the same launches, recorded once, serve every batch of a size.
The host side is pinned and there are two of it: one may still be on its way while the next is written.
"""

from collections.abc import Sequence as Many
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.batch import Batch
from engine.model import GROUP_MODULES, GROUPS, MODULES
from engine.packing import AdapterLayout, ResidentAdapter
from kernels.attention import query_tiles
from kernels.lora import SEGMENT_ROWS, LoraRows

Ints = npt.NDArray[np.int32]

_ALIGN = 64  # bytes; kernels are compiled for aligned columns
_DTYPES = {"i4": torch.int32, "i8": torch.int64, "f4": torch.float32}
_MOST_PAIRS = 16  # of tiles of one module: rank 256
_NOTHING = ("token_source", "slots", "tile_sequence", "tile_first")  # where -1 says so, elsewhere 0


@dataclass(frozen=True, slots=True)
class Limits:
    """The most that a step may hold."""

    tokens: int
    rows: int  # sequences
    blocks: int  # of all sequences together
    query_rows: int  # rows of one tile of prompt attention

    def query_tiles(self, tokens: int) -> int:
        """Tiles of prompt attention in a step of so many tokens."""
        return -(-tokens // self.query_rows) + self.rows

    def segments(self, tokens: int) -> int:
        """Runs of rows with one adapter in a step of so many tokens."""
        return min(tokens, tokens // SEGMENT_ROWS + self.rows)


class StepInputs:
    """Named columns on the device, and `fill`, which writes them for a batch and starts the copy."""

    def __init__(self, limits: Limits, device: torch.device, num_layers: int) -> None:
        self.limits = limits
        self._device = device
        self._tables = _Tables(device, num_layers)
        self._blocks = _Blocks()
        rows, tokens = limits.rows, limits.tokens
        segments = limits.segments(tokens)
        items = segments * 3 * _MOST_PAIRS
        columns = {
            "tables": ("i8", segments),
            "seed": ("i8", rows),
            "token_ids": ("i4", tokens),
            "token_source": ("i4", tokens),
            "positions": ("i4", tokens),
            "slots": ("i4", tokens),
            "tile_strides": ("i4", segments),
            "tiles": ("i4", segments * 7),
            "first_row": ("i4", segments),
            "row_count": ("i4", segments),
            "num_segments": ("i4", 4),
            "num_items": ("i4", 16),
            "block_start": ("i4", rows),
            "context_lens": ("i4", rows),
            # context_lens of decode rows; 0 for padding, -1 where that may be rows of prompts
            "single_lens": ("i4", rows),
            "query_start": ("i4", rows + 1),
            "tile_sequence": ("i4", limits.query_tiles(tokens)),
            "tile_first": ("i4", limits.query_tiles(tokens)),
            "logits_rows": ("i4", rows),
            "top_k": ("i4", rows),
            "index": ("i4", rows),
            "temperature": ("f4", rows),
            "top_p": ("f4", rows),
            "min_p": ("f4", rows),
            # Long and seldom full: only what is used is copied.
            "row_tiles": ("i4", tokens * 7),
            **{f"items_{group}": ("i4", items) for group in GROUPS},
            "block_list": ("i4", limits.blocks),
        }
        places: dict[str, tuple[str, int, int]] = {}
        end = 0
        for name, (kind, length) in columns.items():
            places[name] = (kind, end, length)
            end += -(-length * int(kind[1]) // _ALIGN) * _ALIGN
            if name == "min_p":
                self._always = end
        is_cuda = device.type == "cuda"
        memory = torch.zeros(end, dtype=torch.uint8, device=device)
        self._memory = memory
        self._places = places
        self._hosts = [torch.zeros(end, dtype=torch.uint8, pin_memory=is_cuda) for _ in range(2)]
        self._events = [torch.cuda.Event() for _ in range(2)] if is_cuda else []
        self._host_columns = [
            {
                name: host.numpy()[at : at + length * int(kind[1])].view(kind)
                for name, (kind, at, length) in places.items()
            }
            for host in self._hosts
        ]
        self._next = 0
        self.column: dict[str, Tensor] = {
            name: memory[at : at + length * int(kind[1])].view(_DTYPES[kind])
            for name, (kind, at, length) in places.items()
        }
        column = self.column
        self.lora = LoraRows(
            tables=column["tables"],
            tile_strides=column["tile_strides"],
            tiles=column["tiles"].view(segments, 7),
            first_row=column["first_row"],
            row_count=column["row_count"],
            num_segments=column["num_segments"],
            items=tuple(column[f"items_{group}"] for group in GROUPS),
            num_items=column["num_items"].view(4, 4),
            row_tiles=column["row_tiles"].view(tokens, 7),
        )

    def lora_groups(self, batch: Batch) -> tuple[str, ...]:
        """The groups of modules that any adapter of the batch changes."""
        found = {group for facts in self._tables.of_all(batch.adapters) for group in facts.groups}
        return tuple(group for group in GROUPS if group in found)

    def fill(self, batch: Batch, padded_tokens: int, padded_singles: int, padded_sampled: int) -> None:
        """Write the columns for this batch, padded with rows that do nothing, and start copying them."""
        side = self._next
        self._next = 1 - side
        if self._events:
            self._events[side].synchronize()  # long past: two steps ago
        host = self._host_columns[side]
        blocks = self._blocks.of_all(batch)
        used = _fill(
            host, batch, blocks, padded_tokens, padded_singles, padded_sampled, self.limits.query_rows
        )
        used |= self._fill_lora(host, batch, padded_tokens)
        self._copy(side, 0, self._always)
        for name, length in used.items():
            _, at, _ = self._places[name]
            self._copy(side, at, at + 4 * length)
        if self._events:
            self._events[side].record()

    def fill_nothing(self) -> None:
        """A step without a row that does anything, of whatever shape; waits for those before it."""
        for event in self._events:
            event.synchronize()
        host = self._host_columns[0]
        for name, column in host.items():
            column[:] = -1 if name in _NOTHING else 0
        self._copy(0, 0, self._memory.shape[0])
        if self._events:
            self._events[0].record()  # the next step may write this side while the copy is under way

    def _copy(self, side: int, begin: int, end: int) -> None:
        self._memory[begin:end].copy_(self._hosts[side][begin:end], non_blocking=True)

    def _fill_lora(
        self, host: dict[str, npt.NDArray[np.generic]], batch: Batch, padded_tokens: int
    ) -> dict[str, int]:
        """Segments of rows with one adapter, and for each group the pairs of tiles that they need."""
        row_tiles = host["row_tiles"].reshape(-1, 7)
        row_tiles[:padded_tokens] = 0
        host["num_segments"][0] = 0
        host["num_items"][:] = 0
        if not batch.adapters:
            return {}
        facts = self._tables.of_all(batch.adapters)
        tiles = np.array([f.tiles for f in facts])
        of_rows = np.repeat(np.array(batch.adapter_of_seq), np.diff(batch.query_start))
        row_tiles[: len(of_rows)] = np.where(of_rows[:, None] >= 0, tiles[of_rows], 0)
        starts = _segments(of_rows)
        counts = np.diff(starts, append=len(of_rows))
        is_used = of_rows[starts] >= 0
        starts, counts, adapters = starts[is_used], counts[is_used], of_rows[starts][is_used]
        count = len(adapters)
        host["tables"][:count] = np.array([f.address for f in facts])[adapters]
        host["tile_strides"][:count] = np.array([f.stride for f in facts], dtype=np.int32)[adapters]
        host["tiles"][: 7 * count] = tiles[adapters].reshape(-1)
        host["first_row"][:count] = starts
        host["row_count"][:count] = counts
        host["num_segments"][0] = count
        return self._fill_items(host, facts, adapters) | {"row_tiles": 7 * padded_tokens}

    @staticmethod
    def _fill_items(
        host: dict[str, npt.NDArray[np.generic]], facts: Many["_Facts"], segments: npt.NDArray[np.int64]
    ) -> dict[str, int]:
        """For each group, the pairs of tiles of segments with these adapters, those of a shape together."""
        shapes: dict[int, _Shape] = {id(f.shape): f.shape for f in facts}
        shape_of = np.array([id(f.shape) for f in facts])[segments]
        members = [(shape, np.flatnonzero(shape_of == key) << 16) for key, shape in shapes.items()]
        used = {}
        for index, group in enumerate(GROUPS):
            column, end = host[f"items_{group}"], 0
            for shape, marks in members:
                items = shape.codes[group] + marks[:, None]
                column[end : end + items.size] = items.reshape(-1)
                end += items.size
            if end:
                host["num_items"][4 * index] = end
                used[f"items_{group}"] = end
        return used


def _segments(adapters: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Where a run of at most SEGMENT_ROWS rows of one adapter begins."""
    rows = np.arange(len(adapters))
    is_first = np.diff(adapters, prepend=-2) != 0
    since_first = rows - np.maximum.accumulate(np.where(is_first, rows, 0))
    return np.flatnonzero(since_first % SEGMENT_ROWS == 0)


class _Blocks:
    """The block lists of the last batch as arrays, as most sequences keep theirs from step to step."""

    def __init__(self) -> None:
        self._of: dict[str, tuple[tuple[int, ...], Ints]] = {}

    def of_all(self, batch: Batch) -> list[Ints]:
        before, self._of = self._of, {}
        for key, blocks in zip(batch.sequence_ids, batch.blocks, strict=True):
            entry = before.get(key)
            if entry is None or entry[0] is not blocks:
                entry = (blocks, np.array(blocks, dtype=np.int32))
            self._of[key] = entry
        return [entry[1] for entry in self._of.values()]


def _fill(
    host: dict[str, npt.NDArray[np.generic]],
    batch: Batch,
    blocks: Many[Ints],
    padded_tokens: int,
    padded_singles: int,
    padded_sampled: int,
    query_rows: int,
) -> dict[str, int]:
    tokens, sequences, sampled = len(batch.token_ids), len(batch.blocks), len(batch.logits_rows)
    for name, values, padding in (
        ("token_ids", batch.token_ids, 0),
        ("token_source", batch.token_source, -1),
        ("positions", batch.positions, 0),
        ("slots", batch.slots, -1),
    ):
        host[name][:tokens] = values
        host[name][tokens:padded_tokens] = padding
    lengths = np.fromiter(map(len, blocks), np.int32, sequences)
    ends = lengths.cumsum(dtype=np.int32)
    host["block_start"][:sequences] = ends - lengths
    host["context_lens"][:sequences] = batch.context_lens
    used = int(ends[-1])
    host["block_list"][:used] = np.concatenate(blocks)
    single = batch.num_single
    host["single_lens"][:single] = batch.context_lens[:single]
    host["single_lens"][single:padded_singles] = -1 if single < sequences else 0
    query_start = np.array(batch.query_start, dtype=np.int32)
    host["query_start"][: sequences + 1] = query_start
    if single < sequences:
        prompts = query_start.copy()
        prompts[: single + 1] = single  # no tiles for rows that the decode kernel attends for
        tiles = query_tiles(prompts, query_rows, len(host["tile_sequence"]))
        host["tile_sequence"][:], host["tile_first"][:] = tiles
    host["logits_rows"][:sampled] = batch.logits_rows
    host["logits_rows"][sampled:padded_sampled] = 0
    for name in ("temperature", "top_p", "top_k", "min_p", "seed", "index"):
        host[name][:sampled] = getattr(batch.sampling, name)
        host[name][sampled:padded_sampled] = 0  # temperature 0 reads no other column
    return {"block_list": used}


@dataclass(frozen=True, slots=True)
class _Facts:
    """What kernels and `fill` need to know of an adapter on the device."""

    table: Tensor  # kept alive; kernels know its address
    address: int
    stride: int
    shape: "_Shape"

    @property
    def tiles(self) -> Ints:
        return self.shape.tiles

    @property
    def groups(self) -> tuple[str, ...]:
        return self.shape.groups


class _Tables:
    """The offset table of every adapter in use, on the device; made when an adapter is first run."""

    def __init__(self, device: torch.device, num_layers: int) -> None:
        self._device = device
        self._num_layers = num_layers
        self._of: WeakKeyDictionary[ResidentAdapter, _Facts] = WeakKeyDictionary()
        self._shapes: WeakKeyDictionary[AdapterLayout, _Shape] = WeakKeyDictionary()
        # Those of the last batch by identity, which is found much faster than by value
        self._last: dict[int, tuple[ResidentAdapter, _Facts]] = {}

    def of_all(self, residents: Many[ResidentAdapter]) -> list[_Facts]:
        before, self._last = self._last, {}
        for resident in residents:
            key = id(resident)
            self._last[key] = before.get(key) or (resident, self.of(resident))
        return [facts for _, facts in self._last.values()]

    def of(self, resident: ResidentAdapter) -> _Facts:
        facts = self._of.get(resident)
        if facts is None:
            shape = self._shapes.get(resident.layout)
            if shape is None:
                shape = self._shapes[resident.layout] = _Shape.of(resident.layout, self._num_layers)
            entries = torch.from_numpy(shape.entries(resident.slabs))
            if self._device.type == "cuda":
                entries = entries.pin_memory().to(self._device, non_blocking=True)
            facts = _Facts(entries, entries.data_ptr(), shape.stride, shape)
            self._of[resident] = facts
        return facts


@dataclass(frozen=True, slots=True)
class _Shape:
    """The part of a table that adapters of one layout share."""

    offsets: npt.NDArray[np.int64]  # from the start of the image, -1: none
    scales: npt.NDArray[np.int64]  # float32 bits
    slab_elems: int
    stride: int
    tiles: Ints  # [7]
    codes: dict[str, Ints]  # by group: module of the group << 8 | pair, for all pairs of tiles
    groups: tuple[str, ...]  # that have tiles

    @classmethod
    def of(cls, layout: AdapterLayout, num_layers: int) -> "_Shape":
        stride = max((len(m.a_offsets) for m in layout.modules), default=1)
        offsets = np.full((num_layers, 7, 2, stride), -1, dtype=np.int64)
        scales = np.zeros((num_layers, 7), dtype=np.float32)
        tiles = np.zeros(7, dtype=np.int32)
        for m in layout.modules:
            module = MODULES.index(m.module)
            offsets[m.layer, module, 0, : len(m.a_offsets)] = m.a_offsets
            offsets[m.layer, module, 1, : len(m.b_offsets)] = m.b_offsets
            scales[m.layer, module] = m.scale
            tiles[module] = max(tiles[module], len(m.a_offsets))
        codes = {
            group: np.concatenate(
                [
                    (place << 8) + np.arange(-(-tiles[MODULES.index(module)] // 2), dtype=np.int32)
                    for place, module in enumerate(GROUP_MODULES[group])
                ]
            )
            for group in GROUPS
        }
        bits = scales.view(np.int32).astype(np.int64)
        groups = tuple(group for group in GROUPS if len(codes[group]))
        return cls(offsets.reshape(-1), bits.reshape(-1), layout.slab_elems, stride, tiles, codes, groups)

    def entries(self, slabs: Many[int]) -> npt.NDArray[np.int64]:
        """The table for an image that lies in these slabs."""
        at = np.asarray(slabs, dtype=np.int64)
        slab, within = np.divmod(self.offsets, self.slab_elems)
        absolute = np.where(self.offsets >= 0, at[slab] * self.slab_elems + within, -1)
        return np.concatenate((absolute, self.scales))
