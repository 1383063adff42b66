"""Copies of K/V for the CPU's decode step, in the order in which a step reads them. The pages stay the truth.

On a CPU a step of a few rows is spent on many small products. Reading pages costs one product per sequence
and per adapter; reading lanes, in which all decoding rows lie side by side, costs one for all. A lane is
filled from pages when its row joins the decoding batch, follows along as the row grows, and is zeroed when
the row leaves or when anyone else writes to one of its slabs, so it never outlives what it copies.
"""

import math
from collections.abc import Hashable, Iterable
from collections.abc import Sequence as Many
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.model import ModelConfig

_COLUMN_STEP = 128  # positions a K/V lane grows by, at least
_PADDING_LIMIT = 4  # columns of all lanes may be this many times the positions they hold …
_PADDING_FREE = 4096  # … beyond so many


def rearrange(lanes: list[Hashable], wanted: Many[Hashable]) -> tuple[list[tuple[int, int]], list[int]]:
    """Make `lanes` hold just the keys of `wanted`, moving as few as possible. Changes `lanes`.

    Returns (moves, joined): moves (from, to) to be done in order, each from the end into the place of one who
    left; then the places of those who joined. Both leave no gap, so lanes 0 … len(wanted) - 1 are in use.
    """
    staying = set(wanted)
    moves = []
    place = 0
    while place < len(lanes):
        if lanes[place] in staying:
            place += 1
            continue
        last = lanes.pop()
        if place < len(lanes):
            lanes[place] = last
            moves.append((len(lanes), place))
    present = set(lanes)
    joining = [key for key in wanted if key not in present]
    joined = list(range(len(lanes), len(lanes) + len(joining)))
    lanes += joining
    return moves, joined


class Gone:
    """The key of a lane whose owner is no longer wanted: equal to nothing but itself."""


@dataclass(slots=True)
class _Held:
    """What a K/V lane copies: positions 0 … length - 1 of a sequence whose slabs are `blocks`."""

    blocks: tuple[int, ...]
    length: int


class KvLanes:
    """K and V of all decoding sequences, side by side, their newest positions in one common column.

    k [L, lanes, Hkv, D, columns], v [L, lanes, Hkv, columns, D]: position p of a lane of length n is column
    end - n + p, so every lane's next token goes to column `end`, and a sliding window is the same columns for
    all. K lies transposed because that is how its product reads it without repacking.
    """

    def __init__(self, config: ModelConfig, slabs: Tensor, budget_bytes: int) -> None:
        self.end = 0
        self._config = config
        self._slabs = slabs  # [num_slabs, L, 2, block_size, Hkv, D]
        self._budget = budget_bytes
        self._ids: list[Hashable] = []
        self._held: dict[Hashable, _Held] = {}
        self._asked: tuple[str, ...] = ()  # the sequences of the last call, and the rows chosen of them
        self._rows: tuple[int, ...] = ()
        self._memory, self._spare = slabs.new_empty(0), slabs.new_empty(0)
        self._k, self._v, self._mask = self._new_buffers(0, 0)

    def __len__(self) -> int:
        return len(self._ids)

    def hold(
        self, ids: tuple[str, ...], blocks: Many[tuple[int, ...]], context_lens: Many[int]
    ) -> tuple[int, ...]:
        """Make the lanes hold all but the newest position of these sequences; the row of each lane.

        A sequence may be left out: one so long that all others would be padded to its length, or that does
        not fit the budget, also as it grows.
        """
        is_full = self._ids and self.end == self._num_columns  # with more, it may be too much for the budget
        if (
            not is_full
            and ids == self._asked
            and all(self._follows(ids[row], blocks[row], context_lens[row]) for row in self._rows)
        ):
            return self._rows
        lengths = [length - 1 for length in context_lens]
        chosen = self._choose(lengths)
        row_of: dict[Hashable, int] = {ids[row]: row for row in chosen}
        for key, row in row_of.items():
            if not self._follows(key, blocks[row], context_lens[row]):
                self._held.pop(key, None)
        self._drop_all_but(set(row_of) & set(self._held), wanted=list(row_of))
        longest = max((lengths[row] for row in chosen), default=0)
        if self._ids and (
            self.end >= self._num_columns or longest > self.end or len(self._ids) > self._k.shape[1]
        ):
            self._resize(longest)
        for lane, key in enumerate(self._ids):
            if key not in self._held:
                self._fill(lane, key, blocks[row_of[key]], lengths[row_of[key]])
        self._asked, self._rows = ids, tuple(row_of[key] for key in self._ids)
        return self._rows

    def advance(self, blocks: Many[tuple[int, ...]]) -> None:
        """The column `end` of every lane has been written: it is part of the lanes now. blocks by lane."""
        for key, own in zip(self._ids, blocks, strict=True):
            held = self._held[key]
            held.blocks = own
            held.length += 1
        self.end += 1

    def written(self, slabs: Iterable[int]) -> None:
        """Someone else has written to these slabs: lanes that copy one of them are stale."""
        changed = set(slabs)
        stale = {key for key, held in self._held.items() if not changed.isdisjoint(held.blocks)}
        if stale:
            self._asked, self._rows = (), ()
            for key in stale:
                del self._held[key]

    def clear(self) -> None:
        self._ids, self._held, self._asked, self._rows, self.end = [], {}, (), (), 0
        self._memory, self._spare = self._slabs.new_empty(0), self._slabs.new_empty(0)
        self._k, self._v, self._mask = self._new_buffers(0, 0)

    def columns(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Where this step's K and V go: per layer [lanes, Hkv, D]."""
        lanes = len(self)
        return self._k[:, :lanes, :, :, self.end].unbind(0), self._v[:, :lanes, :, self.end].unbind(0)

    def views(self, window: int | None = None) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
        """Per layer K [N, D, n] and V [N, n, D], and the mask [N, 1, n], with N = lanes * Hkv.

        The n columns end with `end`; the mask is -inf where a lane holds nothing.
        """
        lanes = len(self) * self._config.num_kv_heads
        first = self.end - max(held.length for held in self._held.values())
        if window is not None:
            first = max(first, self.end + 1 - window)
        columns = slice(first, self.end + 1)
        return (
            self._k.flatten(1, 2)[:, :lanes, :, columns].unbind(0),
            self._v.flatten(1, 2)[:, :lanes, columns].unbind(0),
            self._mask.flatten(0, 1)[:lanes, :, columns],
        )

    @property
    def _num_columns(self) -> int:
        return self._v.shape[3]

    def _follows(self, key: Hashable, blocks: tuple[int, ...], context_len: int) -> bool:
        held = self._held.get(key)
        return (
            held is not None
            and held.length == context_len - 1
            and (held.blocks == blocks or held.blocks == blocks[: len(held.blocks)])
        )

    def _choose(self, lengths: list[int]) -> list[int]:
        """The rows that get a lane: all, or the shorter ones if the longest would cost too much padding."""
        rows = sorted(range(len(lengths)), key=lambda row: lengths[row])
        total = sum(lengths)
        while rows:
            columns = len(rows) * lengths[rows[-1]]
            spare = columns <= _PADDING_LIMIT * total or columns <= _PADDING_FREE
            if spare and self._bytes(len(rows), lengths[rows[-1]] + 1) <= self._budget:
                break
            total -= lengths[rows.pop()]
        return sorted(rows)

    def _bytes(self, lanes: int, columns: int) -> int:
        per_position = self._slabs[0, :, :, 0].numel() * self._slabs.element_size()
        return lanes * columns * per_position

    def _drop_all_but(self, valid: set[Hashable], wanted: list[Hashable]) -> None:
        """Keep the valid lanes, in place as far as possible; lanes of all wanted, the others zeroed."""
        before = len(self._ids)
        self._ids = [key if key in valid else Gone() for key in self._ids]
        moves, _ = rearrange(self._ids, wanted)
        self._held = {key: held for key, held in self._held.items() if key in valid}
        for source, target in moves:
            self._k[:, target, ..., : self.end].copy_(self._k[:, source, ..., : self.end])
            self._v[:, target, :, : self.end].copy_(self._v[:, source, :, : self.end])
            self._mask[target].copy_(self._mask[source])
        self._k[:, len(valid) : before].zero_()
        self._v[:, len(valid) : before].zero_()

    def _fill(self, lane: int, key: Hashable, blocks: tuple[int, ...], length: int) -> None:
        block_size = self._slabs.shape[3]
        used = blocks[: -(-length // block_size)]
        pages = self._slabs[torch.tensor(used, dtype=torch.int64)]  # [n, L, 2, block_size, Hkv, D]
        positions = pages.permute(2, 1, 4, 0, 3, 5).flatten(3, 4)[..., :length, :]  # [2, L, Hkv, length, D]
        start = self.end - length
        self._k[:, lane, :, :, :start].zero_()  # masked, but a NaN left there would get through
        self._v[:, lane, :, :start].zero_()
        self._k[:, lane, :, :, start : self.end].copy_(positions[0].transpose(-1, -2))
        self._v[:, lane, :, start : self.end].copy_(positions[1])
        self._mask[lane, :, :, :start] = -math.inf
        self._mask[lane, :, :, start:] = 0
        self._held[key] = _Held(blocks, length)

    def _resize(self, longest: int) -> None:
        """Move the lanes to a buffer in which `longest` positions end, with room for more."""
        held = [self._held.get(key) for key in self._ids]
        kept = max((item.length for item in held if item is not None), default=0)
        room = max(_COLUMN_STEP, longest // 4)
        columns = -(-(longest + room) // _COLUMN_STEP) * _COLUMN_STEP
        old_k, old_v, old_mask, old_end = self._k, self._v, self._mask, self.end
        count = lanes = old_k.shape[1]
        if len(self._ids) > lanes:
            lanes = max(len(self._ids), lanes * 3 // 2)
        self._k, self._v, self._mask = self._new_buffers(lanes, columns)
        self.end = longest
        if kept:
            source, target, before = (
                slice(old_end - kept, old_end),
                slice(longest - kept, longest),
                longest - kept,
            )
            self._k[:, :count, ..., :before].zero_()
            self._v[:, :count, :, :before].zero_()
            self._k[:, :count, :, :, target].copy_(old_k[..., source])
            self._v[:, :count, :, target].copy_(old_v[:, :, :, source])
            self._mask[:count, :, :, target].copy_(old_mask[..., source])
            self._mask[:count, ..., :before] = -math.inf

    def _new_buffers(self, lanes: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
        """Buffers not yet written (the mask: all open), in the memory that the present ones do not use.

        Two pieces of memory take turns: fresh memory costs a page fault every 4 KiB, which for the megabytes
        of a buffer is longer than a step.
        """
        config = self._config
        layers, heads, dim = config.num_layers, config.num_kv_heads, config.head_dim
        size = layers * lanes * heads * dim * columns
        self._memory, self._spare = self._spare, self._memory
        if self._memory.numel() < 2 * size:
            self._memory = self._slabs.new_empty(2 * size)
        return (
            self._memory[:size].view(layers, lanes, heads, dim, columns),
            self._memory[size : 2 * size].view(layers, lanes, heads, columns, dim),
            self._slabs.new_zeros(lanes, heads, 1, columns),
        )
