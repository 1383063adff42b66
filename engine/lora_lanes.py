"""Copies of adapters for the CPU's decode step, side by side as lanes.py explains it for K/V."""

import math
from collections.abc import Hashable
from collections.abc import Sequence as Many
from dataclasses import dataclass
from functools import lru_cache
from operator import is_

import torch
from torch import Tensor

from engine.lanes import Gone, rearrange
from engine.model import GROUP_MODULES, GROUPS, ModelConfig, module_shape
from engine.packing import AdapterLayout, ModuleTiles, ResidentAdapter
from kernels import RANK_TILE


@dataclass(frozen=True, slots=True)
class _Product:
    """One second product: chunk c of `columns` of y += u[ranks of c] @ b[c], b [chunks, rank, width].

    The modules of a group that are all there and of one rank are multiplied at once, their columns cut into
    chunks of equal width; `block_of_chunk` says whose ranks a chunk takes (None: chunk c takes block c).
    """

    ranks: slice
    rank: int
    columns: slice
    width: int
    chunks: int
    block_of_chunk: Tensor | None

    @property
    def elems(self) -> int:
        return self.chunks * self.rank * self.width


@dataclass(frozen=True, slots=True)
class _Part:
    """What a lane holds of one layer and group: A of its modules [ranks, in], then b of each product."""

    layer: int
    group: str
    in_features: int
    ranks: int  # of all modules, each padded to tiles
    products: tuple[_Product, ...]


Views = dict[tuple[int, str], tuple[Tensor, list[tuple[_Product, Tensor]]]]


class LoraLanes:
    """The adapters of all decoding rows that have one layout.

    The buffer holds part after part, each for all lanes, so that a step reads it from front to back.
    """

    def __init__(self, config: ModelConfig, layout: AdapterLayout, arena: Tensor) -> None:
        self.layout = layout
        self._parts, self._unit, self._units, self._factors = _plan_lane(config, layout)
        self._arena = arena.view(-1, self._unit)
        self._adapters: list[Hashable] = []
        self._asked: list[ResidentAdapter] = []  # rows of the last call, and the answer
        self._rows: list[int] = []
        self._capacity = 0
        self._buffer = arena.new_zeros(0)
        self._views: Views = {}

    @property
    def lane_elems(self) -> int:
        return self._units.numel() * self._unit

    @property
    def nbytes(self) -> int:
        return self._buffer.numel() * self._buffer.element_size()

    def hold(self, residents: Many[ResidentAdapter]) -> list[int]:
        """Make the lanes hold these adapters, one lane for each row, and return the row of each lane."""
        if len(residents) == len(self._asked) == len(self._adapters) and all(
            map(is_, residents, self._asked)
        ):
            return self._rows
        counts: dict[Hashable, int] = {}
        keys: list[Hashable] = []
        for resident in residents:  # rows that share an adapter each have a lane of it
            key = (resident.ref, resident.slabs)
            counts[key] = counts.get(key, 0) + 1
            keys.append((key, counts[key]))
        self._rearrange(keys, residents)
        row_of = {key: row for row, key in enumerate(keys)}
        self._asked, self._rows = list(residents), [row_of[key] for key in self._adapters]
        return self._rows

    def written(self, slabs: set[int]) -> None:
        """Someone has written to these slabs: lanes that copy one of them are stale."""
        for lane, key in enumerate(self._adapters):
            if isinstance(key, tuple) and not slabs.isdisjoint(key[0][1]):
                self._adapters[lane] = Gone()
                self._asked = []

    def apply(self, layer: int, group: str, x: Tensor, y: Tensor) -> None:
        """y[i] += delta of lane i for x[i], in place. x [lanes, in], y [lanes, sum of out], contiguous."""
        found = self._views.get((layer, group))
        if found is None:
            return
        a, products = found
        u = torch.bmm(x.unsqueeze(1), a)  # [lanes, 1, ranks]
        for product, b in products:
            if product.width * product.chunks == y.shape[1]:
                if product.block_of_chunk is not None:
                    u = u.view(len(u), -1, product.rank).index_select(1, product.block_of_chunk)
                y.view(-1, 1, product.width).baddbmm_(u.view(-1, 1, product.rank), b)
            else:  # baddbmm_ into some columns of y would go row by row
                y[:, None, product.columns].add_(torch.bmm(u[:, :, product.ranks], b))

    def _rearrange(self, keys: list[Hashable], residents: Many[ResidentAdapter]) -> None:
        before = len(self._adapters)
        moves, joined = rearrange(self._adapters, keys)
        if len(keys) > self._capacity:
            self._grow(max(len(keys), 2 * self._capacity), before)
        parts = self._by_part(self._buffer, self._capacity)
        for part in parts:
            for source, target in moves:
                part[target].copy_(part[source])
            part[len(keys) - len(joined) : before].zero_()
        resident_of = dict(zip(keys, residents, strict=True))
        for lane in joined:
            flat = self._read(resident_of[self._adapters[lane]])
            for part, piece in zip(parts, self._by_part(flat, 1), strict=True):
                part[lane].copy_(piece[0])
        self._views = self._make_views(parts, len(keys))

    def _grow(self, capacity: int, used: int) -> None:
        grown = self._buffer.new_zeros(capacity * self.lane_elems)
        for old, new in zip(
            self._by_part(self._buffer, self._capacity), self._by_part(grown, capacity), strict=True
        ):
            new[:used].copy_(old[:used])
        self._buffer, self._capacity = grown, capacity

    def _by_part(self, buffer: Tensor, lanes: int) -> list[Tensor]:
        """A and each b of every part, in order: [lanes, elements]."""
        sizes = []
        for part in self._parts:
            sizes += [part.ranks * part.in_features, *(product.elems for product in part.products)]
        pieces = torch.split(buffer, [lanes * size for size in sizes])
        return [piece.view(lanes, size) for piece, size in zip(pieces, sizes, strict=True)]

    def _read(self, resident: ResidentAdapter) -> Tensor:
        """One lane, flat, from the adapter's pages."""
        per_slab = self.layout.slab_elems // self._unit
        slabs = torch.tensor(resident.slabs)[self._units // per_slab]
        units = self._arena.index_select(0, slabs * per_slab + self._units % per_slab)
        return units.mul_(self._factors).view(-1)

    def _make_views(self, parts: list[Tensor], lanes: int) -> Views:
        views: Views = {}
        pieces = iter(parts)
        for part in self._parts:
            a = next(pieces)[:lanes].view(lanes, part.ranks, part.in_features).transpose(1, 2)
            products = []
            for product in part.products:
                b = next(pieces)[:lanes].view(lanes * product.chunks, product.rank, product.width)
                products.append((product, b))
            views[part.layer, part.group] = (a, products)
        return views


@lru_cache(maxsize=64)  # as many as there are layouts; lanes themselves come and go with their rows
def _plan_lane(config: ModelConfig, layout: AdapterLayout) -> tuple[tuple[_Part, ...], int, Tensor, Tensor]:
    """A lane as a gather of units of the image: (parts, unit size, unit per place [U], its factor [U, 1])."""
    unit = math.gcd(layout.slab_elems, *(w for m in layout.modules for w in (m.in_features, m.out_features)))
    parts: list[_Part] = []
    units: list[Tensor] = []
    factors: list[Tensor] = []

    def take(starts: list[int], length: int, factor: float) -> None:
        """Rows of `length` elements that start at these elements of the image."""
        index = torch.tensor(starts)[:, None] // unit + torch.arange(length // unit)
        units.append(index.flatten())
        factors.append(torch.full((index.numel(), 1), factor))

    for layer, group, modules in _by_group(layout):
        for m in modules:
            take(_rows(m.a_offsets, m.in_features), m.in_features, 1.0)
        products = _products(config, group, modules)
        for product, of in products:
            for m in of:
                for column in range(0, m.out_features, product.width):
                    rows = [start + column for start in _rows(m.b_offsets, m.out_features)]
                    take(rows, product.width, m.scale)
        ranks = sum(map(_padded, modules))
        parts.append(_Part(layer, group, modules[0].in_features, ranks, tuple(p for p, _ in products)))
    return tuple(parts), unit, torch.cat(units), torch.cat(factors)


def _products(
    config: ModelConfig, group: str, modules: list[ModuleTiles]
) -> list[tuple[_Product, list[ModuleTiles]]]:
    """The second products of a group, each with its modules: one for all of them if they are alike."""
    widths = [m.out_features for m in modules]
    rank = _padded(modules[0])
    if len(modules) == len(GROUP_MODULES[group]) and all(_padded(m) == rank for m in modules):
        width = math.gcd(*widths)
        blocks = [block for block, m in enumerate(modules) for _ in range(m.out_features // width)]
        direct = blocks == list(range(len(blocks)))
        whole = slice(0, sum(widths))
        block_of_chunk = None if direct else torch.tensor(blocks)
        ranks = slice(0, rank * len(modules))
        return [(_Product(ranks, rank, whole, width, len(blocks), block_of_chunk), modules)]
    found = []
    first_rank = 0
    for m in modules:
        ranks = slice(first_rank, first_rank + _padded(m))
        columns = _columns(config, group, m.module)
        found.append((_Product(ranks, _padded(m), columns, m.out_features, 1, None), [m]))
        first_rank = ranks.stop
    return found


def _by_group(layout: AdapterLayout) -> list[tuple[int, str, list[ModuleTiles]]]:
    """The modules of a layout by layer and group, in the order in which lanes hold them."""
    found: dict[tuple[int, str], list[ModuleTiles]] = {}
    for m in layout.modules:
        group = next(group for group in GROUPS if m.module in GROUP_MODULES[group])
        found.setdefault((m.layer, group), []).append(m)
    return [(layer, group, modules) for (layer, group), modules in found.items()]


def _columns(config: ModelConfig, group: str, module: str) -> slice:
    """Which columns of a group's output a module has."""
    modules = GROUP_MODULES[group]
    before = modules[: modules.index(module)]
    begin = sum(module_shape(config, other)[0] for other in before)
    return slice(begin, begin + module_shape(config, module)[0])


def _rows(offsets: tuple[int, ...], width: int) -> list[int]:
    """Where each rank row of these tiles starts."""
    return [offset + row * width for offset in offsets for row in range(RANK_TILE)]


def _padded(tiles: ModuleTiles) -> int:
    return RANK_TILE * len(tiles.a_offsets)
