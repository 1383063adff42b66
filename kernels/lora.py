"""Mixed-adapter LoRA in Triton, straight from the pages; `reference.lora_pages` is the specification.

An adapter's matrices lie in the arena as tiles of 8 rank rows, A as [8, in], B transposed as [8, out], each
at a multiple of 8 elements: a compiler that does not know this loads them one number at a time. The adapter's
*table* (int64, in device memory) says where: entry ((layer * 7 + module) * 2 + half) * P + p is the element
offset of tile p of A (half 0) or B (half 1), -1 for none; behind these lie the scales, one float32 per layer
and module in the low half of an entry. P, the tiles of the adapter's largest module, is its own: nothing is
padded to the rank of the company.

The product runs in two halves, beside the base product, which reads the same x:

    shrink   v[t, m, r] = scale * x[t] . A[r]          one tile and chunk at a time
    expand   delta[t, c] = sum_r v[t, m, r] * B[r, c]  added by the kernel that uses the product (`fused`)

v is float32, [splits, rows, modules of the group * 256]: the sides of A are cut into chunks whose sums are
added by the reader, in order, so that results do not depend on who runs first. Prompts use the tensor cores
instead (`shrink_prompts`, `expand_prompts`).
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
CHUNK = 1024  # of a side of A, per program
ROWS_PER_SEGMENT = 8  # decode rows of one adapter that share one read of a tile
PROMPT_ROWS = 64  # prompt rows of one adapter that one program multiplies
COLUMNS, THREADS = 512, 128  # of a decode row, per program of expand; threads of that program
FEW_PROGRAMS = 6  # per processor: so few leave it registers for two tiles at a time in each


@dataclass(frozen=True, slots=True)
class LoraRows:
    """Which rows use which adapter, on the device; all int32 but `tables`.

    Each decode row names its adapter; rows without one have no tiles. Rows of prompts name none, and their
    tiles are negative: decode kernels are launched for more rows than there are, and pass over these.
    Segments are runs of rows of one adapter; prompts are cut into tiles of at most PROMPT_ROWS rows.
    `items[g]` lists, for the group g, every tile of A that decode rows need, as segment << 16 | module of
    the group << 8 | tile.
    """

    row_tables: Tensor  # [D] int64: address of the table of the decode row's adapter
    row_strides: Tensor  # [D]: its P
    row_tiles: Tensor  # [T, 7]: tiles of each module, the most of any layer
    tables: Tensor  # [S] int64
    tile_strides: Tensor  # [S]
    tiles: Tensor  # [S, 7]
    first_row: Tensor  # [S]
    row_count: Tensor  # [S]
    items: tuple[Tensor, ...]  # of the 4 groups
    num_items: Tensor  # [4, 4]: the first of each row (the rest keeps them aligned)
    prompt_first_row: Tensor  # [N]
    prompt_row_count: Tensor  # [N]
    prompt_segment: Tensor  # [N]
    num_prompt_tiles: Tensor  # [4]: the first


@dataclass(frozen=True, slots=True)
class ItemPlaces:
    """For each item of each group, in each layer, its tile of A in the arena and its scale; made by
    `resolve`."""

    offsets: Tensor  # [4, L, I] int64, -1: the adapter leaves this layer alone
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
        offset = tl.load(table + entry * 2 * stride + (code & 255), mask=is_i, other=-1)
        bits = tl.load(table + num_layers * 14 * stride + entry, mask=is_i, other=0)
        tl.store(offsets + out + i, offset, mask=is_i)
        tl.store(scales + out + i, bits.to(tl.int32).to(tl.float32, bitcast=True), mask=is_i)


@triton.jit
def _item(items, offsets, scales, at, work, total, chunks):
    """(code, offset, scale) of the item of one piece of work; offset -1 for one beyond the last."""
    item = work // chunks
    is_work = work < total
    code = tl.load(items + item, mask=is_work, other=0)
    offset = tl.multiple_of(tl.load(offsets + at + item, mask=is_work, other=-1), TILE)
    return code, offset, tl.load(scales + at + item, mask=is_work, other=0.0)


@triton.jit(do_not_specialize=["at"])
def _shrink_rows_kernel(
    x,
    stride_x,
    arena,
    v,
    stride_split,
    stride_v,
    items,
    num_items,
    offsets,
    scales,
    at,
    first_rows,
    row_counts,
    K,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    allow_next(PDL)
    chunks = tl.cdiv(K, CHUNK)
    total = tl.load(num_items) * chunks
    r = tl.arange(0, TILE)
    work = tl.program_id(0)
    code, offset, scale = _item(items, offsets, scales, at, work, total, chunks)
    while work < total:
        # Where the next tile lies is asked for while this one is fetched.
        following = work + tl.num_programs(0)
        next_code, next_offset, next_scale = _item(items, offsets, scales, at, following, total, chunks)
        if offset >= 0:
            chunk = work % chunks
            k = chunk * CHUNK + tl.arange(0, CHUNK)
            a = tl.load(arena + offset + r[:, None] * K + k[None, :], mask=k[None, :] < K, other=0.0)
            segment = code >> 16
            row = tl.load(first_rows + segment)
            count = tl.load(row_counts + segment)
            column = ((code >> 8) & 255) * MAX_RANK + (code & 255) * TILE
            wait(PDL)
            here = row.to(tl.int64)
            xs = tl.load(x + here * stride_x + k, mask=k < K, other=0.0)
            for following_row in range(1, count + 1):  # fetched while this one is multiplied
                end = tl.where(following_row < count, K, 0)
                next_xs = tl.load(x + (here + 1) * stride_x + k, mask=k < end, other=0.0)
                u = tl.sum(a.to(tl.float32) * xs.to(tl.float32)[None, :], axis=1) * scale
                tl.store(v + chunk * stride_split + here * stride_v + column + r, u)
                here, xs = here + 1, next_xs
        work, code, offset, scale = following, next_code, next_offset, next_scale
    wait(PDL)  # also where there was nothing to do: what follows may only start when all before has ended


@triton.jit
def tiles_of(tiles, index, module):
    """How many tiles of a module the adapter of a row or segment has: none for a row without one, negative in
    a row of a prompt. May be asked before `wait`: it is an input of the step."""
    return tl.load(tiles + index * NUM_MODULES + module)


@triton.jit
def adapter_of(index, tables, tile_strides, tiles, module):
    """(table, P, tiles of the module) of the adapter of a row or segment."""
    table = tl.load(tables + index).to(tl.pointer_type(tl.int64))
    return table, tl.load(tile_strides + index), tiles_of(tiles, index, module)


@triton.jit
def tile_offset(table, stride, count, matrix, tile, WIDE: tl.constexpr):
    """Element offset of a tile, or of each of several; -1 beyond the adapter's own. `matrix` is twice the
    entry for A, one more for B.

    A thread loads WIDE numbers at once, since the compiler is told that offsets are multiples of it. They are
    of 8, but a program of few columns has no 8 for each thread: it would give threads a part of the rank rows
    instead, and sums would have to travel between them.
    """
    return tl.multiple_of(tl.load(table + matrix * stride + tile, mask=tile < count, other=-1), WIDE)


@triton.jit
def load_b(arena, offset, columns, is_column, width):
    """A tile's 8 rank rows and these columns of B -> [8, columns], 0 where there is no tile."""
    pointers = arena + offset + tl.arange(0, TILE)[:, None] * width + columns[None, :]
    is_tile = offset + tl.zeros_like(columns) >= 0  # a block, as masks want it
    return tl.load(pointers, mask=(is_tile & is_column)[None, :], other=0.0)


@triton.jit
def load_v(v, stride_split, splits, place, offset, SPLITS: tl.constexpr):
    """v[.., place : place + 8], its chunks added up -> [8]; 0 where there is no tile."""
    s = tl.arange(0, SPLITS)
    is_split = (s < splits) & (offset + tl.zeros_like(s) >= 0)
    pointers = v + s[:, None] * stride_split + place + tl.arange(0, TILE)[None, :]
    return tl.sum(tl.load(pointers, mask=is_split[:, None], other=0.0), axis=0)


@triton.jit
def module_of(block, width_0, width_1, width_2, COLUMNS: tl.constexpr):
    """(module of the group, its width, where its columns begin, block of it) of a block of the columns of up
    to three modules side by side."""
    blocks_0 = tl.cdiv(width_0, COLUMNS)
    blocks_1 = blocks_0 + tl.cdiv(width_1, COLUMNS)
    slot = (block >= blocks_0).to(tl.int32) + (block >= blocks_1).to(tl.int32)
    width = tl.where(slot == 0, width_0, tl.where(slot == 1, width_1, width_2))
    left = tl.where(slot == 0, 0, tl.where(slot == 1, width_0, width_0 + width_1))
    return slot, width, left, block - tl.where(slot == 0, 0, tl.where(slot == 1, blocks_0, blocks_1))


@triton.jit(do_not_specialize=["layer", "first_module"])
def _expand_rows_kernel(
    delta, stride_delta, arena, tables, tile_strides, tiles, v, stride_split, stride_v, splits,
    layer, first_module, width_0, width_1, width_2,
    COLUMNS: tl.constexpr, IN_PAIRS: tl.constexpr, WIDE: tl.constexpr, SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    allow_next(PDL)
    row = tl.program_id(0)
    slot, width, left, block = module_of(tl.program_id(1), width_0, width_1, width_2, COLUMNS)
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    is_column = columns < width
    module = first_module + slot
    table, stride, count = adapter_of(row, tables, tile_strides, tiles, module)
    matrix = (layer * NUM_MODULES + module) * 2 + 1
    place = row.to(tl.int64) * stride_v + slot * MAX_RANK
    first = tile_offset(table, stride, count, matrix, 0, WIDE)
    b = load_b(arena, first, columns, is_column, width)
    wait(PDL)
    if count > 0:
        u = load_v(v, stride_split, splits, place, first, SPLITS)
        y = tl.sum(u[:, None] * b.to(tl.float32), axis=0)
        # In each turn, where the next tiles lie is asked for while these are fetched.
        next_0 = tile_offset(table, stride, count, matrix, 1, WIDE)
        if IN_PAIRS:
            next_1 = tile_offset(table, stride, count, matrix, 2, WIDE)
            for tile in range(1, count, 2):
                offset_0, offset_1 = next_0, next_1
                next_0 = tile_offset(table, stride, count, matrix, tile + 2, WIDE)
                next_1 = tile_offset(table, stride, count, matrix, tile + 3, WIDE)
                b_0 = load_b(arena, offset_0, columns, is_column, width)
                b_1 = load_b(arena, offset_1, columns, is_column, width)
                u_0 = load_v(v, stride_split, splits, place + tile * TILE, offset_0, SPLITS)
                u_1 = load_v(v, stride_split, splits, place + (tile + 1) * TILE, offset_1, SPLITS)
                y += tl.sum(u_0[:, None] * b_0.to(tl.float32), axis=0)
                y += tl.sum(u_1[:, None] * b_1.to(tl.float32), axis=0)
        else:
            for tile in range(1, count):
                offset_0 = next_0
                next_0 = tile_offset(table, stride, count, matrix, tile + 1, WIDE)
                b_0 = load_b(arena, offset_0, columns, is_column, width)
                u_0 = load_v(v, stride_split, splits, place + tile * TILE, offset_0, SPLITS)
                y += tl.sum(u_0[:, None] * b_0.to(tl.float32), axis=0)
        tl.store(
            delta + row.to(tl.int64) * stride_delta + left + columns, y.to(delta.dtype.element_ty),
            mask=is_column,
        )  # fmt: skip


@triton.jit
def load_delta(delta, count, at, columns, is_column):
    """What LoRA adds to these columns of a row, float32; 0 where its adapter has no tiles of the module."""
    is_changed = is_column & (count + tl.zeros_like(columns) != 0)  # a block, as masks want it
    return tl.load(delta + at + columns, mask=is_changed, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["layer", "first_module", "num_modules"])
def _shrink_prompts_kernel(
    x, stride_x, arena, v, stride_split, stride_v,
    prompt_rows, prompt_counts, prompt_segments, num_tiles, tables, tile_strides, tiles,
    layer, num_layers, first_module, num_modules, K,
    ROWS: tl.constexpr, RANKS: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    allow_next(PDL)
    wait(PDL)
    chunks = tl.cdiv(K, CHUNK)
    total = tl.load(num_tiles) * num_modules * chunks
    i = tl.arange(0, ROWS)
    j = tl.arange(0, RANKS)
    work = tl.program_id(0)
    while work < total:
        tile = work // (num_modules * chunks)
        rest = work - tile * num_modules * chunks
        slot = rest // chunks
        chunk = rest - slot * chunks
        segment = tl.load(prompt_segments + tile)
        row = tl.load(prompt_rows + tile)
        count = tl.load(prompt_counts + tile)
        module = first_module + slot
        table, stride, tiles_here = adapter_of(segment, tables, tile_strides, tiles, module)
        entry = layer * NUM_MODULES + module
        scale = tl.load(table + num_layers * 14 * stride + entry).to(tl.int32).to(tl.float32, bitcast=True)
        rows = (row + i).to(tl.int64)
        end = tl.minimum(K, (chunk + 1) * CHUNK)
        for begin in range(0, tiles_here * TILE, RANKS):
            offsets = tile_offset(table, stride, tiles_here, entry * 2, (begin + j) // TILE, TILE)
            u = tl.zeros((ROWS, RANKS), dtype=tl.float32)
            for k0 in range(chunk * CHUNK, end, BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                is_k = k < end
                xs = tl.load(
                    x + rows[:, None] * stride_x + k[None, :],
                    mask=(i < count)[:, None] & is_k[None, :],
                    other=0.0,
                )
                a = tl.load(
                    arena + offsets[None, :] + (j % TILE)[None, :] * K + k[:, None],
                    mask=(offsets >= 0)[None, :] & is_k[:, None],
                    other=0.0,
                )
                u = tl.dot(xs, a, u, input_precision=PRECISION)
            place = rows * stride_v + slot * MAX_RANK + begin
            tl.store(
                v + chunk * stride_split + place[:, None] + j[None, :],
                u * scale,
                mask=(i < count)[:, None] & (begin + j < MAX_RANK)[None, :],
            )
        work += tl.num_programs(0)


@triton.jit(do_not_specialize=["layer", "first_module", "num_modules"])
def _expand_prompts_kernel(
    delta, stride_delta, arena, v, stride_split, stride_v, splits,
    prompt_rows, prompt_counts, prompt_segments, num_tiles, tables, tile_strides, tiles,
    layer, first_module, num_modules, width_0, width_1, width_2,
    ROWS: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr, PDL:
    tl.constexpr,
):  # fmt: skip
    allow_next(PDL)
    wait(PDL)
    blocks = tl.cdiv(width_0, COLUMNS) + tl.cdiv(width_1, COLUMNS) + tl.cdiv(width_2, COLUMNS)
    total = tl.load(num_tiles) * blocks
    i = tl.arange(0, ROWS)
    j = tl.arange(0, RANKS)
    c = tl.arange(0, COLUMNS)
    work = tl.program_id(0)
    while work < total:
        tile = work // blocks
        slot, width, left, block = module_of(work - tile * blocks, width_0, width_1, width_2, COLUMNS)
        columns = block * COLUMNS + c
        is_column = columns < width
        segment = tl.load(prompt_segments + tile)
        row = tl.load(prompt_rows + tile)
        count = tl.load(prompt_counts + tile)
        module = first_module + slot
        table, stride, tiles_here = adapter_of(segment, tables, tile_strides, tiles, module)
        entry = layer * NUM_MODULES + module
        if tiles_here > 0:
            rows = (row + i).to(tl.int64)
            y = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
            for begin in range(0, tiles_here * TILE, RANKS):
                offsets = tile_offset(table, stride, tiles_here, entry * 2 + 1, (begin + j) // TILE, TILE)
                b = tl.load(
                    arena + offsets[:, None] + (j % TILE)[:, None] * width + columns[None, :],
                    mask=(offsets >= 0)[:, None] & is_column[None, :],
                    other=0.0,
                )
                place = rows[:, None] * stride_v + slot * MAX_RANK + (begin + j)[None, :]
                is_u = (i < count)[:, None] & (offsets >= 0)[None, :]
                u = tl.zeros((ROWS, RANKS), dtype=tl.float32)
                for split in range(splits):
                    u += tl.load(v + split * stride_split + place, mask=is_u, other=0.0)
                y = tl.dot(u.to(b.dtype), b, y, input_precision=PRECISION)
            tl.store(
                delta + rows[:, None] * stride_delta + left + columns[None, :], y.to(delta.dtype.element_ty),
                mask=(i < count)[:, None] & is_column[None, :],
            )  # fmt: skip
        work += tl.num_programs(0)


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


def shrink_decode(
    x: Tensor, v: Tensor, arena: Tensor, rows: LoraRows, places: ItemPlaces, layer: int, group: int
) -> None:
    """v[.., t, m * 256 + r] = scale * x[t] . A[r], by chunks, for the decode rows of one group.

    x [T, in]; v [splits, >= T, >= modules * 256] float32, changed where decode rows have ranks; `arena` flat.
    """
    pdl = can_overlap(x.device)
    _, num_layers, capacity = places.offsets.shape
    _shrink_rows_kernel[(8 * num_processors(x.device),)](
        x,
        x.stride(0),
        arena,
        v,
        v.stride(0),
        v.stride(1),
        rows.items[group],
        rows.num_items[group],
        places.offsets,
        places.scales,
        (group * num_layers + layer) * capacity,
        rows.first_row,
        rows.row_count,
        x.shape[1],
        CHUNK=CHUNK,
        PDL=pdl,
        num_warps=4,
        **launch_options(pdl),
    )


def shrink_prompts(
    x: Tensor,
    v: Tensor,
    arena: Tensor,
    rows: LoraRows,
    layer: int,
    num_layers: int,
    first_module: int,
    num_modules: int,
) -> None:
    """`shrink_decode` for the rows of prompts, on the tensor cores."""
    pdl = can_overlap(x.device)
    _shrink_prompts_kernel[(4 * num_processors(x.device),)](
        x, x.stride(0), arena, v, v.stride(0), v.stride(1),
        rows.prompt_first_row, rows.prompt_row_count, rows.prompt_segment, rows.num_prompt_tiles,
        rows.tables, rows.tile_strides, rows.tiles,
        layer, num_layers, first_module, num_modules, x.shape[1],
        ROWS=PROMPT_ROWS, RANKS=16, BLOCK_K=min(256 // x.element_size(), CHUNK), CHUNK=CHUNK,
        PRECISION="ieee", PDL=pdl, num_warps=4, num_stages=4, **launch_options(pdl),
    )  # fmt: skip


def expand_decode(
    delta: Tensor, v: Tensor, arena: Tensor, rows: LoraRows, count: int, layer: int, first_module: int,
    widths: tuple[int, ...], splits: int,
) -> None:  # fmt: skip
    """delta[t, c(m)] = v[t, m] @ B[m] for the decode rows among the first `count`, where a row's adapter
    changes module m. delta [>= count, sum(widths)]."""
    pdl = can_overlap(delta.device)
    padded = (*widths, 0, 0)[:3]
    blocks = sum(-(-width // COLUMNS) for width in widths)
    is_few = count * blocks <= FEW_PROGRAMS * num_processors(delta.device)
    _expand_rows_kernel[(count, blocks)](
        delta, delta.stride(0), arena, rows.row_tables, rows.row_strides, rows.row_tiles,
        v, v.stride(0), v.stride(1), splits, layer, first_module, *padded,
        COLUMNS=COLUMNS, IN_PAIRS=is_few, WIDE=COLUMNS // THREADS, SPLITS=triton.next_power_of_2(splits),
        PDL=pdl, num_warps=THREADS // 32, **launch_options(pdl),
    )  # fmt: skip


def expand_prompts(
    delta: Tensor, v: Tensor, arena: Tensor, rows: LoraRows, layer: int, first_module: int,
    widths: tuple[int, ...], splits: int,
) -> None:  # fmt: skip
    """`expand_decode` for the rows of prompts, on the tensor cores."""
    pdl = can_overlap(delta.device)
    padded = (*widths, 0, 0)[:3]
    _expand_prompts_kernel[(4 * num_processors(delta.device),)](
        delta, delta.stride(0), arena, v, v.stride(0), v.stride(1), splits,
        rows.prompt_first_row, rows.prompt_row_count, rows.prompt_segment, rows.num_prompt_tiles,
        rows.tables, rows.tile_strides, rows.tiles,
        layer, first_module, len(widths), *padded,
        ROWS=PROMPT_ROWS, RANKS=16, COLUMNS=128, PRECISION="ieee", PDL=pdl,
        num_warps=4, **launch_options(pdl),
    )  # fmt: skip
