"""An adapter in slabs: where each piece of A and B lies, and the image that is copied into the arena.

The arena is [num_slabs, slab_elems]; K/V blocks and adapters take slabs of the same size. A module of rank r
is cut into ceil(r / 8) tiles of A, [8, in], and as many of B transposed, [8, out]; the last tile's missing
rank rows are zeros. A tile lies whole inside one slab, slabs need not be adjacent, and no module an adapter
lacks takes any room.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.adapter_files import LoraModule, LoraWeights, StoredModule, StoredWeights, empty_bytes
from engine.model import MODULES, ModelConfig, module_shape
from engine.request import AdapterRef
from kernels import RANK_TILE


class SlabTooSmall(ValueError):
    """A tile does not fit in a slab: `expected` (least) and `got`, in elements."""

    def __init__(self, expected: int, got: int) -> None:
        super().__init__(f"expected slabs of at least {expected} elements, got {got}")
        self.expected = expected
        self.got = got


Allocate = Callable[[tuple[int, int], torch.dtype], Tensor]  # a matrix of this shape, with any content


def on_heap(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Memory for an image from the process' own heap."""
    return torch.empty(shape, dtype=dtype)


@dataclass(frozen=True, slots=True)
class Run:
    """Adjacent tiles of one matrix: `rows` rank rows from `first` on lie at `offset`, one after the other."""

    offset: int
    first: int
    rows: int


@dataclass(frozen=True, slots=True)
class ModuleTiles:
    """Where one module lies: for each tile of 8 rank rows its element offset from the start of the image."""

    layer: int
    module: str
    rank: int
    scale: float
    in_features: int
    out_features: int
    a_offsets: tuple[int, ...]
    b_offsets: tuple[int, ...]
    a_runs: tuple[Run, ...]  # the same places, as few copies as possible
    b_runs: tuple[Run, ...]


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class AdapterLayout:
    """The places of all tiles of one adapter shape (modules, ranks, scales); adapters of a shape share it."""

    slab_elems: int
    slabs_needed: int
    modules: tuple[ModuleTiles, ...]
    gaps: tuple[tuple[int, int], ...]  # from .. to, in elements: what no run writes

    @property
    def tile_elems(self) -> int:
        """Elements of all tiles; the rest of the slabs is waste."""
        return sum(
            RANK_TILE * (len(m.a_offsets) * m.in_features + len(m.b_offsets) * m.out_features)
            for m in self.modules
        )


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """The host form: copied slab by slab into the arena."""

    layout: AdapterLayout
    image: Tensor  # [slabs_needed, slab_elems]


@dataclass(frozen=True, slots=True)
class TileTable:
    """Element offsets into the arena of every tile, for kernels.

    tiles_a and tiles_b [L, 7, P] int64, the modules in the order of MODULES, -1 beyond a module's own tiles;
    scales [L, 7] float32, 0 for a module the adapter lacks.
    """

    tiles_a: Tensor
    tiles_b: Tensor
    scales: Tensor


@dataclass(frozen=True, slots=True, weakref_slot=True)
class ResidentAdapter:
    """The device form: slab i of the image lies in slab slabs[i] of the arena."""

    ref: AdapterRef
    layout: AdapterLayout
    slabs: tuple[int, ...]

    def table(self, num_layers: int) -> TileTable:
        """Where the tiles lie now. The caller keeps it; it is rebuilt from the layout at each call."""
        most = max((len(m.a_offsets) for m in self.layout.modules), default=0)
        tiles_a = torch.full((num_layers, len(MODULES), most), -1, dtype=torch.int64)
        tiles_b = tiles_a.clone()
        scales = torch.zeros(num_layers, len(MODULES))
        for m in self.layout.modules:
            at = (m.layer, MODULES.index(m.module))
            scales[at] = m.scale
            tiles_a[at][: len(m.a_offsets)] = torch.tensor([self._at(offset) for offset in m.a_offsets])
            tiles_b[at][: len(m.b_offsets)] = torch.tensor([self._at(offset) for offset in m.b_offsets])
        return TileTable(tiles_a, tiles_b, scales)

    def _at(self, offset: int) -> int:
        slab, within = divmod(offset, self.layout.slab_elems)
        return self.slabs[slab] * self.layout.slab_elems + within


def pack_adapter(
    weights: LoraWeights | StoredWeights,
    config: ModelConfig,
    slab_elems: int,
    dtype: torch.dtype = torch.float32,
    allocate: Allocate = on_heap,
    take: Callable[[int], Tensor] = empty_bytes,
) -> PackedAdapter:
    """The host form of an adapter, in memory that `allocate` gives; `take` gives bytes for its numbers in
    another dtype. Raises SlabTooSmall when a tile of this model does not fit in a slab.
    """
    stored = weights if isinstance(weights, StoredWeights) else _stored(weights)
    layout, copies = plan(stored.modules, config, slab_elems)
    image = allocate((layout.slabs_needed, slab_elems), dtype)
    numbers = stored.numbers
    if numbers.dtype != dtype:
        numbers = take(len(numbers) * dtype.itemsize).view(dtype).copy_(numbers)
    target, source = _bits(image).reshape(-1), _bits(numbers)
    for begin, end in layout.gaps:
        target[begin:end] = 0
    for copy in copies:
        copy.run(target, source)
    return PackedAdapter(layout, image)


def _stored(weights: LoraWeights) -> StoredWeights:
    """The same as one run of numbers."""
    modules, parts, end = [], [], 0
    for m in weights.modules:
        modules.append(StoredModule(m.layer, m.module, m.rank, m.scale, end, end + m.a.numel()))
        parts += [m.a.detach().reshape(-1), m.b.detach().reshape(-1)]
        end += m.a.numel() + m.b.numel()
    return StoredWeights(tuple(modules), torch.cat(parts))


def min_slab_elems(config: ModelConfig) -> int:
    """The largest tile of this model: the least a slab must hold."""
    return RANK_TILE * max(max(module_shape(config, module)) for module in MODULES)


def unpack(layout: AdapterLayout, image: Tensor) -> LoraWeights:
    """The weights of an image, as float32: the inverse of pack, up to the image's dtype."""
    flat = image.reshape(-1).float()
    return LoraWeights(
        tuple(
            LoraModule(
                m.layer,
                m.module,
                _read_tiles(flat, m.a_offsets, m.in_features)[: m.rank],
                _read_tiles(flat, m.b_offsets, m.out_features)[: m.rank].t().contiguous(),
                m.scale,
            )
            for m in layout.modules
        )
    )


@dataclass(slots=True)
class Copies:
    """`count` equal matrices [rows, width] of an image, each `step` elements behind the other, and where
    their numbers come from: the first at `source`, the others and the next row and column a stride behind."""

    target: int
    source: int
    rows: int
    width: int
    source_strides: tuple[int, int]  # row, column
    count: int = 1
    step: int = 0
    source_step: int = 0

    def takes(self, other: "Copies") -> bool:
        """Whether `other`, one matrix, goes on where this ends; then it does."""
        alike = (self.rows, self.width, self.source_strides)
        if alike != (other.rows, other.width, other.source_strides):
            return False
        step = other.target - self.target - (self.count - 1) * self.step
        source_step = other.source - self.source - (self.count - 1) * self.source_step
        if self.count > 1 and (step, source_step) != (self.step, self.source_step):
            return False
        self.count, self.step, self.source_step = self.count + 1, step, source_step
        return True

    def run(self, target: "_Bits", source: "_Bits") -> None:
        shape, size = (self.count, self.rows, self.width), target.itemsize
        to = (self.step * size, self.width * size, size)
        of = (self.source_step * size, *(stride * size for stride in self.source_strides))
        place = np.ndarray(shape, target.dtype, target.data, self.target * size, to)
        place[...] = np.ndarray(shape, source.dtype, source.data, self.source * size, of)


@lru_cache(maxsize=64)  # nearly all adapters of a service have one of a few shapes
def plan(
    modules: tuple[StoredModule, ...], config: ModelConfig, slab_elems: int
) -> tuple["AdapterLayout", tuple[Copies, ...]]:
    """Where everything goes, and in as few copies as possible: between any two of them another thread may
    take the interpreter, and give it back only after its milliseconds."""
    layout = lay_out(tuple((m.layer, m.module, m.rank, m.scale) for m in modules), config, slab_elems)
    wanted: list[tuple[str, str, Copies]] = []
    for m, tiles in zip(modules, layout.modules, strict=True):
        width = tiles.in_features
        for run in tiles.a_runs:
            copy = Copies(run.offset, m.a + run.first * width, run.rows, width, (width, 1))
            wanted.append(("A", m.module, copy))
        for run in tiles.b_runs:
            copy = Copies(run.offset, m.b + run.first, run.rows, tiles.out_features, (1, m.rank))
            wanted.append(("B", m.module, copy))
    wanted.sort(key=lambda each: (*each[:2], each[2].target))
    copies: list[Copies] = []
    for _, _, copy in wanted:
        if not copies or not copies[-1].takes(copy):
            copies.append(copy)
    return layout, tuple(copies)


Shape = tuple[tuple[int, str, int, float], ...]  # layer, module, rank, scale


@lru_cache(maxsize=64)  # nearly all adapters of a service have one of a few shapes
def lay_out(shape: Shape, config: ModelConfig, slab_elems: int) -> AdapterLayout:
    """Places for all tiles, first-fit decreasing; of few sizes, so that each walks the slabs once.

    One module of all layers after the other, in the order that their names have in a file: so most of what
    lies side by side in a slab does so in the file.
    """
    sizes = {module: module_shape(config, module) for module in MODULES}  # (out, in)
    if (least := min_slab_elems(config)) > slab_elems:
        raise SlabTooSmall(least, slab_elems)
    wanted: dict[int, list[tuple[int, str]]] = {}  # tile width -> (index of the module, "a" or "b") per tile
    order = sorted(range(len(shape)), key=lambda index: (shape[index][1], str(shape[index][0])))
    for half in "ab":
        for index in order:
            _, module, rank, _ = shape[index]
            width = sizes[module][half == "a"]
            wanted.setdefault(width, []).extend([(index, half)] * -(-rank // RANK_TILE))
    used: list[int] = []  # elements taken of each slab
    offsets: dict[tuple[int, str], list[int]] = {}
    for width in sorted(wanted, reverse=True):
        size, slab = RANK_TILE * width, 0
        for key in wanted[width]:
            while slab < len(used) and used[slab] + size > slab_elems:
                slab += 1
            if slab == len(used):
                used.append(0)
            offsets.setdefault(key, []).append(slab * slab_elems + used[slab])
            used[slab] += size
    modules = []
    for index, (layer, module, rank, scale) in enumerate(shape):
        out_features, in_features = sizes[module]
        a, b = tuple(offsets[index, "a"]), tuple(offsets[index, "b"])
        a_runs, b_runs = tuple(_runs(a, rank, in_features)), tuple(_runs(b, rank, out_features))
        modules.append(
            ModuleTiles(layer, module, rank, scale, in_features, out_features, a, b, a_runs, b_runs)
        )
    gaps = tuple(_gaps(modules, len(used) * slab_elems))
    return AdapterLayout(slab_elems, len(used), tuple(modules), gaps)


def _runs(offsets: tuple[int, ...], rank: int, width: int) -> Iterator[Run]:
    size = RANK_TILE * width
    begin = 0
    for tile in range(1, len(offsets) + 1):
        if tile == len(offsets) or offsets[tile] != offsets[tile - 1] + size:
            first = begin * RANK_TILE
            yield Run(offsets[begin], first, min(rank, tile * RANK_TILE) - first)
            begin = tile


def _gaps(modules: list[ModuleTiles], elems: int) -> Iterator[tuple[int, int]]:
    """Room for rank rows that there are not, and the ends of slabs."""
    written = sorted(
        (run.offset, run.offset + run.rows * width)
        for m in modules
        for run, width in chain(
            ((run, m.in_features) for run in m.a_runs), ((run, m.out_features) for run in m.b_runs)
        )
    )
    end = 0
    for begin, next_end in written:
        if begin > end:
            yield end, begin
        end = next_end
    if end < elems:
        yield end, elems


_Bits = npt.NDArray[np.int16] | npt.NDArray[np.int32]


def _bits(tensor: Tensor) -> _Bits:
    """The numbers as integers of their size, for NumPy: it has no bfloat16, and turns a matrix in a fifth of
    the time.
    """
    integers = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
    bits: _Bits = tensor.detach().view(integers).numpy()
    return bits


def _read_tiles(flat: Tensor, offsets: tuple[int, ...], width: int) -> Tensor:
    tiles = [flat[offset : offset + RANK_TILE * width].view(RANK_TILE, width) for offset in offsets]
    return torch.cat(tiles)
