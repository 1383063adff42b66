"""Mixed-adapter LoRA in Triton, straight from the pages; `reference.lora_pages` is the specification.

An adapter's matrices lie in the arena as tiles of 8 rank rows, A as [8, in], B transposed as [8, out], each
at a multiple of 8 elements: a compiler that does not know this loads them one number at a time. The adapter's
*table* (int64, in device memory) says where: entry ((layer * 7 + module) * 2 + half) * P + p is the element
offset of tile p of A (half 0) or B (half 1), -1 for none; behind these lie the scales, one float32 per layer
and module in the low half of an entry. P, the tiles of the adapter's largest module, is its own: nothing is
padded to the rank of the company.

The rows of a step come in *segments*, runs of at most SEGMENT_ROWS rows with one adapter: mostly a single
decode row, or a part of a prompt. A segment reads its adapter's tiles once. The product runs in two halves,
beside the base product, which reads the same x:

    shrink   v[t, m, r] = scale * x[t] . A[r]          one segment, pair of tiles and chunk of A at a time
    expand   delta[t, c] = sum_r v[t, m, r] * B[r, c]  one segment and block of columns at a time

A segment of one row is multiplied in plain arithmetic, of which there is enough while its tiles are fetched;
one of several on the tensor cores, the tiles being their left side and the rows their right.

v is float32, [splits, rows, modules of the group * 256]: the sides of A are cut into chunks whose sums are
added by the reader, in order, so that results do not depend on who runs first. The kernel that uses the
product (`fused`) adds delta to it.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from kernels.programs import allow_next, can_overlap, launch_options, num_processors, wait
from kernels.reference import RANK_TILE

NUM_MODULES = tl.constexpr(7)
MAX_RANK = tl.constexpr(256)
TILE = tl.constexpr(RANK_TILE)
PAIR = tl.constexpr(2 * RANK_TILE)  # ranks at a time: the left side of a tensor core's product has 16
SEGMENT_ROWS = 8  # its right side
CHUNK = 1024  # of a side of A, per program
COLUMNS = 512  # of delta, per program
PART = 256  # of these, at a time, where a segment has several rows: sums of all would leave no registers
THREADS = 128  # of a program
PROGRAMS = 8  # per processor: each takes some time to start, however little it has to do
REGISTERS = 128  # of a thread of shrink, so that enough of them are there to fetch


@dataclass(frozen=True, slots=True)
class LoraRows:
    """Which rows use which adapter, on the device; all int32 but `tables`.

    `items[g]` lists, for the group g, every pair of tiles of A that a segment needs, as segment << 16 |
    module of the group << 8 | pair.
    """

    tables: Tensor  # [S] int64: address of the table of the segment's adapter
    tile_strides: Tensor  # [S]: its P
    tiles: Tensor  # [S, 7]: tiles of each module, the most of any layer
    first_row: Tensor  # [S]
    row_count: Tensor  # [S]: at most SEGMENT_ROWS
    num_segments: Tensor  # [4]: the first (the rest keeps it aligned)
    items: tuple[Tensor, ...]  # of the 4 groups
    num_items: Tensor  # [4, 4]: the first of each row
    row_tiles: Tensor  # [T, 7]: `tiles` of every row, 0 for one without an adapter


@dataclass(frozen=True, slots=True)
class ItemPlaces:
    """For each item of each group, in each layer, its tiles of A in the arena and its scale; made by
    `resolve`."""

    offsets: Tensor  # [4, L, I, 2] int64, -1: no tile, or the adapter leaves this layer alone
    scales: Tensor  # [4, L, I] float32


def num_splits(in_features: int) -> int:
    """Into how many chunks a side of this size is cut: the first side of v."""
    return -(-in_features // CHUNK)


@triton.jit
def _resolve_kernel(
    items_0,
    items_1,
    items_2,
    items_3,
    num_items,
    offsets,
    scales,
    capacity,
    tables,
    tile_strides,
    num_layers,
    BLOCK: tl.constexpr,
):
    layer = tl.program_id(0)
    group = tl.program_id(1)
    count = tl.load(num_items + group * 4)
    items = tl.where(
        group == 0, items_0, tl.where(group == 1, items_1, tl.where(group == 2, items_2, items_3))
    )
    first_module = tl.where(group == 0, 0, tl.where(group == 1, 3, tl.where(group == 2, 4, 6)))
    out = (group * num_layers + layer).to(tl.int64) * capacity
    for begin in range(tl.program_id(2) * BLOCK, count, tl.num_programs(2) * BLOCK):
        i = begin + tl.arange(0, BLOCK)
        is_i = i < count
        code = tl.load(items + i, mask=is_i, other=0)
        segment = code >> 16
        entry = layer * NUM_MODULES + first_module + ((code >> 8) & 255)
        table = tl.load(tables + segment, mask=is_i, other=0).to(tl.pointer_type(tl.int64))
        stride = tl.load(tile_strides + segment, mask=is_i, other=0)
        bits = tl.load(table + num_layers * 14 * stride + entry, mask=is_i, other=0)
        for half in tl.static_range(2):
            tile = 2 * (code & 255) + half
            offset = tl.load(table + entry * 2 * stride + tile, mask=is_i & (tile < stride), other=-1)
            tl.store(offsets + 2 * (out + i) + half, offset, mask=is_i)
        tl.store(scales + out + i, bits.to(tl.int32).to(tl.float32, bitcast=True), mask=is_i)


@triton.jit
def _item(items, offsets, scales, at, work, total, chunks):
    """(code, offset of each rank's tile, scale) of the item of one piece of work; -1 for no tile."""
    item = work // chunks
    is_work = work < total
    tile = tl.arange(0, PAIR) // TILE
    is_tile = work + tl.zeros_like(tile) < total  # a block, as masks want it
    offset = tl.load(offsets + 2 * (at + item) + tile, mask=is_tile, other=-1)
    code = tl.load(items + item, mask=is_work, other=0)
    return code, tl.multiple_of(offset, TILE), tl.load(scales + at + item, mask=is_work, other=0.0)


@triton.jit
def _shrink_row(x, arena, out, offset, scale, begin, K, CHUNK: tl.constexpr, PDL: tl.constexpr):
    """A chunk of one row times a pair of tiles."""
    j = tl.arange(0, PAIR)
    k = begin + tl.arange(0, CHUNK)
    is_rank, is_k = offset >= 0, k < K
    tiles = arena + offset + (j % TILE) * K
    a = tl.load(tiles[:, None] + k[None, :], mask=is_rank[:, None] & is_k[None, :], other=0.0)
    wait(PDL)
    xs = tl.load(x + k, mask=is_k, other=0.0)
    u = tl.sum(a.to(tl.float32) * xs.to(tl.float32)[None, :], axis=1) * scale
    tl.store(out + j, u, mask=is_rank)


@triton.jit
def _shrink_rows(
    x, stride_x, arena, out, stride_v, offset, scale, count, begin, K,
    ROWS: tl.constexpr, WARPS: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A chunk of `count` rows times a pair of tiles: each warp has a part of the chunk, so that they are a
    batch of products."""
    j = tl.arange(0, PAIR)
    PART: tl.constexpr = CHUNK // WARPS
    k = begin + tl.arange(0, WARPS)[:, None, None] * PART + tl.arange(0, PART)[None, None, :]
    is_rank, is_k = offset >= 0, k < K
    tiles = arena + offset + (j % TILE) * K
    a = tl.load(tiles[None, :, None] + k, mask=is_rank[None, :, None] & is_k, other=0.0)
    wait(PDL)
    i = tl.arange(0, ROWS)
    rows = x + i * stride_x
    xs = tl.load(rows[None, :, None] + k, mask=(i < count)[None, :, None] & is_k, other=0.0)
    u = tl.sum(tl.dot(a, tl.permute(xs, (0, 2, 1)), input_precision=PRECISION), axis=0) * scale
    places = out + j[:, None] + i[None, :] * stride_v
    tl.store(places, u, mask=is_rank[:, None] & (i < count)[None, :])


@triton.jit(do_not_specialize=["at"])
def _shrink_kernel(
    x, stride_x, arena, v, stride_split, stride_v, items, num_items, offsets, scales, at,
    first_rows, row_counts, K,
    ROWS: tl.constexpr, WARPS: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    allow_next(PDL)
    chunks = tl.cdiv(K, CHUNK)
    total = tl.load(num_items) * chunks
    work = tl.program_id(0)
    code, offset, scale = _item(items, offsets, scales, at, work, total, chunks)
    while work < total:
        # Where the next tiles lie is asked for while these are fetched.
        following = work + tl.num_programs(0)
        next_code, next_offset, next_scale = _item(items, offsets, scales, at, following, total, chunks)
        segment = code >> 16
        first = tl.load(first_rows + segment).to(tl.int64)
        count = tl.load(row_counts + segment)
        chunk = work % chunks
        out = v + chunk * stride_split + first * stride_v
        out += ((code >> 8) & 255) * MAX_RANK + (code & 255) * PAIR
        here = x + first * stride_x
        if count == 1:
            _shrink_row(here, arena, out, offset, scale, chunk * CHUNK, K, CHUNK, PDL)
        else:
            _shrink_rows(
                here, stride_x, arena, out, stride_v, offset, scale, count, chunk * CHUNK, K,
                ROWS, WARPS, CHUNK, PRECISION, PDL,
            )  # fmt: skip
        work, code, offset, scale = following, next_code, next_offset, next_scale
    wait(PDL)  # also where there was nothing to do: what follows may only start when all before has ended


@triton.jit
def tiles_of(tiles, index, module):
    """How many tiles of a module the adapter of a row or segment has: none for a row without one. May be
    asked before `wait`: it is an input of the step."""
    return tl.load(tiles + index * NUM_MODULES + module)


@triton.jit
def _module_of(block, width_0, width_1, width_2, COLUMNS: tl.constexpr):
    """(module of the group, its width, where its columns begin, block of it) of a block of the columns of up
    to three modules side by side."""
    blocks_0 = tl.cdiv(width_0, COLUMNS)
    blocks_1 = blocks_0 + tl.cdiv(width_1, COLUMNS)
    slot = (block >= blocks_0).to(tl.int32) + (block >= blocks_1).to(tl.int32)
    width = tl.where(slot == 0, width_0, tl.where(slot == 1, width_1, width_2))
    left = tl.where(slot == 0, 0, tl.where(slot == 1, width_0, width_0 + width_1))
    return slot, width, left, block - tl.where(slot == 0, 0, tl.where(slot == 1, blocks_0, blocks_1))


@triton.jit
def _load_b(arena, offset, columns, is_column, width):
    """A tile's 8 rank rows and these columns of B -> [8, columns], 0 where there is no tile."""
    pointers = arena + offset + tl.arange(0, TILE)[:, None] * width + columns[None, :]
    is_tile = offset + tl.zeros_like(columns) >= 0  # a block, as masks want it
    return tl.load(pointers, mask=(is_tile & is_column)[None, :], other=0.0)


@triton.jit
def _load_v(v, stride_split, splits, offset, SPLITS: tl.constexpr):
    """v[.., :8], its chunks added up -> [8]; 0 where there is no tile."""
    s = tl.arange(0, SPLITS)
    is_split = (s < splits) & (offset + tl.zeros_like(s) >= 0)
    pointers = v + s[:, None] * stride_split + tl.arange(0, TILE)[None, :]
    return tl.sum(tl.load(pointers, mask=is_split[:, None], other=0.0), axis=0)


@triton.jit
def _expand_row(
    out, arena, v, stride_split, splits, table, count, begin, width,
    COLUMNS: tl.constexpr, SPLITS: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row of v times these columns, two tiles at a time.

    A thread loads WIDE numbers at once, since the compiler is told that offsets are multiples of it. They are
    of 8, but where a program has no 8 columns for each thread, that would give threads a part of the rank
    rows instead, and sums would have to travel between them.
    """
    columns = begin + tl.arange(0, COLUMNS)
    is_column = columns < width
    y = tl.zeros((COLUMNS,), dtype=tl.float32)
    offset_0 = tl.multiple_of(tl.load(table, mask=count > 0, other=-1), WIDE)
    offset_1 = tl.multiple_of(tl.load(table + 1, mask=count > 1, other=-1), WIDE)
    for tile in range(0, count, 2):
        b_0 = _load_b(arena, offset_0, columns, is_column, width)
        b_1 = _load_b(arena, offset_1, columns, is_column, width)
        # Where the next tiles lie is asked for while these are fetched.
        next_0 = tl.multiple_of(tl.load(table + tile + 2, mask=tile + 2 < count, other=-1), WIDE)
        next_1 = tl.multiple_of(tl.load(table + tile + 3, mask=tile + 3 < count, other=-1), WIDE)
        wait(PDL)
        u_0 = _load_v(v + tile * TILE, stride_split, splits, offset_0, SPLITS)
        u_1 = _load_v(v + (tile + 1) * TILE, stride_split, splits, offset_1, SPLITS)
        y += tl.sum(u_0[:, None] * b_0.to(tl.float32), axis=0)
        y += tl.sum(u_1[:, None] * b_1.to(tl.float32), axis=0)
        offset_0, offset_1 = next_0, next_1
    tl.store(out + columns, y.to(out.dtype.element_ty), mask=is_column)


@triton.jit
def _expand_rows(
    out, stride_delta, arena, v, stride_split, stride_v, splits, table, count, rows, begin, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """`rows` rows of v times these columns, two tiles at a time."""
    j = tl.arange(0, PAIR)
    s = tl.arange(0, SPLITS)[:, None, None]
    columns = begin + tl.arange(0, COLUMNS)
    is_column = columns < width
    i = tl.arange(0, ROWS)
    is_row = i < rows
    y = tl.zeros((COLUMNS, ROWS), dtype=tl.float32)
    offset = tl.multiple_of(tl.load(table + j // TILE, mask=j // TILE < count, other=-1), TILE)
    for tile in range(0, count, 2):
        is_rank = offset >= 0
        ranks = arena + offset + (j % TILE) * width
        is_b = is_rank[None, :] & is_column[:, None]
        b = tl.load(ranks[None, :] + columns[:, None], mask=is_b, other=0.0)
        is_next = tile + 2 + j // TILE < count
        next_offset = tl.load(table + tile + 2 + j // TILE, mask=is_next, other=-1)
        wait(PDL)
        places = v + tile * TILE + j[:, None] + i[None, :] * stride_v
        is_u = (s < splits) & (is_rank[:, None] & is_row[None, :])[None, :, :]
        u = tl.sum(tl.load(places[None, :, :] + s * stride_split, mask=is_u, other=0.0), axis=0)
        high = u.to(b.dtype)
        y = tl.dot(b, high, y, input_precision=PRECISION)
        if b.dtype != tl.float32:  # what rounding took from v
            y = tl.dot(b, (u - high.to(tl.float32)).to(b.dtype), y, input_precision=PRECISION)
        offset = tl.multiple_of(next_offset, TILE)
    places = out + columns[:, None] + i[None, :] * stride_delta
    tl.store(places, y.to(out.dtype.element_ty), mask=is_column[:, None] & is_row[None, :])


@triton.jit(do_not_specialize=["layer", "first_module"])
def _expand_kernel(
    delta, stride_delta, arena, v, stride_split, stride_v, splits,
    first_rows, row_counts, num_segments, tables, tile_strides, tiles,
    layer, first_module, width_0, width_1, width_2,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PART: tl.constexpr, SPLITS: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    allow_next(PDL)
    blocks = tl.cdiv(width_0, COLUMNS) + tl.cdiv(width_1, COLUMNS) + tl.cdiv(width_2, COLUMNS)
    total = tl.load(num_segments) * blocks
    work = tl.program_id(0)
    while work < total:
        segment = work // blocks
        slot, width, left, block = _module_of(work - segment * blocks, width_0, width_1, width_2, COLUMNS)
        module = first_module + slot
        first = tl.load(first_rows + segment).to(tl.int64)
        table = tl.load(tables + segment).to(tl.pointer_type(tl.int64))
        table += ((layer * NUM_MODULES + module) * 2 + 1) * tl.load(tile_strides + segment)
        count = tiles_of(tiles, segment, module)
        rows = tl.where(count > 0, tl.load(row_counts + segment), 0)
        here = v + first * stride_v + slot * MAX_RANK
        out = delta + first * stride_delta + left
        if rows == 1:
            _expand_row(
                out, arena, here, stride_split, splits, table, count, block * COLUMNS, width,
                COLUMNS, SPLITS, WIDE, PDL,
            )  # fmt: skip
        elif rows > 1:
            for part in range(0, COLUMNS, PART):
                _expand_rows(
                    out, stride_delta, arena, here, stride_split, stride_v, splits, table, count, rows,
                    block * COLUMNS + part, width, ROWS, PART, SPLITS, PRECISION, PDL,
                )  # fmt: skip
        work += tl.num_programs(0)
    wait(PDL)


@triton.jit
def load_delta(delta, count, at, columns, is_column):
    """What LoRA adds to these columns of a row, float32; 0 where its adapter has no tiles of the module."""
    is_changed = is_column & (count + tl.zeros_like(columns) > 0)  # a block, as masks want it
    return tl.load(delta + at + columns, mask=is_changed, other=0.0).to(tl.float32)


def resolve(rows: LoraRows, places: ItemPlaces, num_layers: int) -> None:
    """Look up where every item's tile lies in every layer: once a step, so that no layer has to."""
    _resolve_kernel[(num_layers, 4, 4)](
        *rows.items,
        rows.num_items,
        places.offsets,
        places.scales,
        places.offsets.shape[2],
        rows.tables,
        rows.tile_strides,
        num_layers,
        BLOCK=128,
        num_warps=4,
    )


def shrink(
    x: Tensor, v: Tensor, arena: Tensor, rows: LoraRows, places: ItemPlaces, layer: int, group: int
) -> None:
    """v[.., t, m * 256 + r] = scale * x[t] . A[r], by chunks, of one group.

    x [T, in]; v [splits, >= T, >= modules * 256] float32, changed where rows have ranks; `arena` flat.
    """
    pdl = can_overlap(x.device)
    _, num_layers, capacity, _ = places.offsets.shape
    _shrink_kernel[(PROGRAMS * num_processors(x.device),)](
        x, x.stride(0), arena, v, v.stride(0), v.stride(1), rows.items[group], rows.num_items[group],
        places.offsets, places.scales, (group * num_layers + layer) * capacity,
        rows.first_row, rows.row_count, x.shape[1],
        ROWS=SEGMENT_ROWS, WARPS=THREADS // 32, CHUNK=CHUNK, PRECISION="ieee", PDL=pdl,
        num_warps=THREADS // 32, maxnreg=REGISTERS if x.element_size() == 2 else None, **launch_options(pdl),
    )  # fmt: skip


def expand(
    delta: Tensor, v: Tensor, arena: Tensor, rows: LoraRows, most_segments: int, layer: int,
    first_module: int, widths: tuple[int, ...], splits: int,
) -> None:  # fmt: skip
    """delta[t, c(m)] = v[t, m] @ B[m] where a row's adapter changes module m, of at most `most_segments`
    segments. delta [T, sum(widths)]."""
    pdl = can_overlap(delta.device)
    padded = (*widths, 0, 0)[:3]
    work = most_segments * sum(-(-width // COLUMNS) for width in widths)
    _expand_kernel[(min(work, PROGRAMS * num_processors(delta.device)),)](
        delta, delta.stride(0), arena, v, v.stride(0), v.stride(1), splits,
        rows.first_row, rows.row_count, rows.num_segments, rows.tables, rows.tile_strides, rows.tiles,
        layer, first_module, *padded,
        ROWS=SEGMENT_ROWS, COLUMNS=COLUMNS, PART=min(PART, COLUMNS), SPLITS=triton.next_power_of_2(splits),
        WIDE=min(RANK_TILE, COLUMNS // THREADS), PRECISION="ieee", PDL=pdl,
        num_warps=THREADS // 32, num_stages=1, **launch_options(pdl),
    )  # fmt: skip
