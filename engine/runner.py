"""The device: holds model and arena, runs a Batch, returns token ids.

On the CPU, rows of single tokens run on lanes (copies of their K/V and adapters, see lanes.py); prompts, and
rows for which lanes would take too much memory, run straight on the pages. Which of the two changes nothing
but rounding.
"""

from collections.abc import Sequence as Many
from dataclasses import dataclass

import torch
from torch import Tensor

import kernels
from engine.batch import Batch
from engine.lanes import KvLanes
from engine.lora_lanes import LoraLanes
from engine.model import GROUP_MODULES, GROUPS, MODULES, ModelConfig, module_shape
from engine.packing import AdapterLayout
from engine.sampler import sample
from engine.weights import LoadedModel

LANE_BYTES = 512 << 20  # for K/V lanes; as much again for adapter lanes
PACK_BYTES = 1 << 30  # models up to this size keep a second, packed copy of their matrices on the CPU


@dataclass(frozen=True, slots=True)
class Ran:
    """A step that has run: nothing to wait for."""

    _tokens: list[int]

    def tokens(self) -> list[int]:
        return self._tokens

    def device_s(self) -> float:
        return 0.0


@dataclass(frozen=True, slots=True)
class Copied:
    """A copy that has been made."""

    def done(self) -> bool:
        return True


class Runner:
    """Runs batches on one model and one arena [num_slabs, slab_elems], both on the same device.

    Everything written to the arena goes through this class, which is what keeps the lanes true.
    """

    ahead = 0  # a step is over when `launch` returns

    def __init__(
        self, model: LoadedModel, arena: Tensor, block_size: int, *, lane_bytes: int = LANE_BYTES
    ) -> None:
        config = model.config
        kv_shape = (config.num_layers, 2, block_size, config.num_kv_heads, config.head_dim)
        self._decoder = model.decoder
        self._config = config
        self._arena = arena
        self._slabs = arena[:, : torch.Size(kv_shape).numel()].view(-1, *kv_shape)
        self._kv = KvLanes(config, self._slabs, lane_bytes)
        self._lora_lane_bytes = lane_bytes
        self._lora: dict[int, LoraLanes] = {}  # by identity of the layout, which the lanes keep alive
        model.decoder.pack(PACK_BYTES)

    def launch(self, batch: Batch) -> Ran:
        return Ran(self.run(batch))

    def run(self, batch: Batch) -> list[int]:
        """One token id per row that wants one, in the order of the chunks."""
        if not batch.logits_rows:
            self.logits(batch)
            return []
        token_ids: list[int] = sample(self.logits(batch), batch.sampling).tolist()
        return token_ids

    def logits(self, batch: Batch) -> Tensor:
        """[R, vocab] float32, in the order of the chunks."""
        try:
            with torch.inference_mode():
                return self._forward(batch)
        except BaseException:
            self.drop_copies()  # a lane half written is worth nothing
            raise

    def copy_in(self, image: Tensor, slabs: Many[int]) -> Copied:
        """Copy the image [n, slab_elems] of a packed adapter into these n slabs."""
        self._arena.index_copy_(0, torch.tensor(slabs), image.to(self._arena.dtype))
        self._written(slabs)
        return Copied()

    def prepare(self) -> bool:
        """A first step costs nothing that others do not."""
        return False

    def drop_copies(self) -> None:
        """Let go of everything copied from pages; the next step copies what it needs."""
        self._kv.clear()
        self._lora.clear()

    def _forward(self, batch: Batch) -> Tensor:
        single = batch.num_single
        in_lanes = self._kv.hold(
            batch.sequence_ids[:single], batch.blocks[:single], batch.context_lens[:single]
        )
        plan = _Plan(batch, in_lanes)
        attend = _Attend(self._config, self._slabs, self._kv, plan)
        lora = self._lora_of(plan) if batch.adapters else None
        hidden: Tensor = self._decoder(plan.token_ids, plan.positions, attend, lora)
        attend.finish()
        self._written(attend.written)
        if not plan.logits_rows:
            return hidden.new_zeros(0, self._config.vocab_size)
        if plan.logits_rows != list(range(hidden.shape[0])):
            hidden = hidden[plan.logits_rows]
        return self._decoder.logits(hidden)

    def _lora_of(self, plan: "_Plan") -> "_Lora":
        """Which rows run on lanes of their layout, and which straight on pages."""
        batch = plan.batch
        rows_of: dict[int, list[int]] = {}  # single rows by layout
        for row, sequence in enumerate(plan.sequences):
            if (adapter := batch.adapter_of_seq[sequence]) >= 0:
                rows_of.setdefault(id(batch.adapters[adapter].layout), []).append(row)
        room = self._lora_lane_bytes
        laned: list[_Laned] = []
        for rows in rows_of.values():
            residents = [batch.adapters[batch.adapter_of_seq[plan.sequences[row]]] for row in rows]
            lanes = self._lora.get(id(residents[0].layout)) or self._new_lanes(residents[0].layout)
            size = len(rows) * lanes.lane_elems * self._arena.element_size()
            if size <= room:
                room -= size
                laned.append(_Laned(lanes, [rows[index] for index in lanes.hold(residents)]))
        if batch.num_single:
            self._release({id(on.lanes.layout) for on in laned}, room)
        return _Lora(self._config, self._arena, plan, laned)

    def _release(self, used: set[int], room: int) -> None:
        """Empty the lanes of layouts that no row has now; keep their memory as far as it fits in `room`."""
        for key, lanes in list(self._lora.items()):
            if key not in used:
                lanes.hold([])
                room -= lanes.nbytes
                if room < 0:
                    del self._lora[key]

    def _new_lanes(self, layout: AdapterLayout) -> LoraLanes:
        lanes = LoraLanes(self._config, layout, self._arena)
        self._lora[id(layout)] = lanes
        return lanes

    def _written(self, slabs: Many[int]) -> None:
        changed = set(slabs)
        if changed:
            self._kv.written(changed)
            for lanes in self._lora.values():
                lanes.written(changed)


class _Plan:
    """A batch with its single rows in the order of the lanes: those on lanes, other single rows, prompts."""

    def __init__(self, batch: Batch, in_lanes: tuple[int, ...]) -> None:
        self.batch = batch
        self.num_lanes = len(in_lanes)
        single, total = batch.num_single, batch.num_tokens
        # sequences[row]: which sequence of the batch a single row belongs to; there, row and sequence are one
        self.sequences = list(in_lanes)
        if self.num_lanes < single:
            on_lanes = set(in_lanes)
            self.sequences += [row for row in range(single) if row not in on_lanes]
        self.token_ids, self.positions = torch.from_numpy(batch.token_ids), torch.from_numpy(batch.positions)
        slots = torch.from_numpy(batch.slots)
        self.slot_block, self.slot_offset = slots // batch.block_size, slots % batch.block_size
        self.logits_rows = list(batch.logits_rows)
        if self.sequences != list(range(single)):
            order = torch.tensor([*self.sequences, *range(single, total)])
            self.token_ids, self.positions = self.token_ids[order], self.positions[order]
            self.slot_block, self.slot_offset = self.slot_block[order], self.slot_offset[order]
            place = {sequence: row for row, sequence in enumerate(self.sequences)}
            self.logits_rows = [place.get(row, row) for row in self.logits_rows]

    @property
    def paged_sequences(self) -> list[int]:
        """The sequences of the batch that are not on lanes, in the order of their rows."""
        return [*self.sequences[self.num_lanes :], *range(self.batch.num_single, len(self.batch.blocks))]


class _Attend:
    """Attention of one step: one product for all lanes, then each other sequence on its pages."""

    def __init__(self, config: ModelConfig, slabs: Tensor, kv: KvLanes, plan: _Plan) -> None:
        self._config = config
        self._slabs = slabs
        self._kv = kv
        self._plan = plan
        self._scale = config.head_dim**-0.5
        self._lanes = plan.num_lanes
        if self._lanes:
            self._newest: list[Tensor] = []  # K and V of each layer so far, [lanes, Hkv, D]
            self._k_columns, self._v_columns = kv.columns()
            self._full = kv.views()
            self._windowed = kv.views(config.sliding_window) if config.sliding_layers else self._full
        self._paged = plan.paged_sequences
        if self._paged:
            batch = plan.batch
            lengths = [batch.query_start[s + 1] - batch.query_start[s] for s in self._paged]
            self._query_start = [0]
            for length in lengths:
                self._query_start.append(self._query_start[-1] + length)
            self._context_lens = [batch.context_lens[s] for s in self._paged]
            self._tables = batch.block_tables[self._paged]
            self._block = plan.slot_block[self._lanes :]
            self._offset = plan.slot_offset[self._lanes :]

    @property
    def written(self) -> list[int]:
        """Slabs written to for sequences that are not on lanes."""
        return self._block.tolist() if self._paged else []

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not self._paged:
            return self._on_lanes(layer, q, k, v)
        n = self._lanes
        kernels.write_kv(k[n:], v[n:], self._slabs, layer, self._block, self._offset)
        paged = kernels.paged_attention(
            q[n:],
            self._slabs,
            layer,
            self._tables,
            self._context_lens,
            self._query_start,
            self._scale,
            self._config.window(layer),
        )
        return torch.cat((self._on_lanes(layer, q[:n], k[:n], v[:n]), paged)) if n else paged

    def _on_lanes(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        windowed = layer in self._config.sliding_layers
        keys, values, mask = self._windowed if windowed else self._full
        self._k_columns[layer].copy_(k)
        self._v_columns[layer].copy_(v)
        self._newest += (k, v)
        num_heads, dim = q.shape[1:]
        heads = q.reshape(keys[layer].shape[0], -1, dim)  # [lanes * Hkv, G, D]
        mixed = kernels.lane_attention(heads, keys[layer], values[layer], mask, self._scale)
        return mixed.view(-1, num_heads, dim)

    def finish(self) -> None:
        """Write the lanes' new K/V of all layers to their pages."""
        n = self._lanes
        if not n:
            return
        plan = self._plan
        newest = torch.stack(self._newest)
        kernels.write_kv_all_layers(newest, self._slabs, plan.slot_block[:n], plan.slot_offset[:n])
        self._kv.advance([plan.batch.blocks[s] for s in plan.sequences[:n]])


class _Laned:
    """Token rows that run on the lanes of one layout; rows[i] is the row of lane i."""

    def __init__(self, lanes: LoraLanes, rows: list[int]) -> None:
        self.lanes = lanes
        self.rows = rows
        first = rows[0]
        is_run = rows == list(range(first, first + len(rows)))
        self._index = slice(first, first + len(rows)) if is_run else torch.tensor(rows)

    def apply(self, layer: int, group: str, x: Tensor, y: Tensor) -> None:
        part = y[self._index]
        self.lanes.apply(layer, group, x[self._index], part)
        if not isinstance(self._index, slice):  # then `part` is a copy
            y[self._index] = part


class _Lora:
    """The adapters of one step: one pair of products per layout and group, then the other rows on pages."""

    def __init__(self, config: ModelConfig, arena: Tensor, plan: _Plan, laned: list[_Laned]) -> None:
        self._laned = laned
        self._paged = _PagedRows.find(config, arena, plan, {row for on in laned for row in on.rows})

    def __call__(self, layer: int, group: str, x: Tensor, y: Tensor) -> Tensor:
        for on in self._laned:
            on.apply(layer, group, x, y)
        return y if self._paged is None else self._paged.apply(layer, group, x, y)


@dataclass(frozen=True, slots=True)
class _PagedRows:
    """The rows whose adapter is read from its pages."""

    arena: Tensor
    segments: list[tuple[int, int, int]]  # (index into the tables, first row, end)
    tiles_a: Tensor  # [N, L, 7, P]
    tiles_b: Tensor
    scales: Tensor  # [N, L, 7]
    columns: dict[str, tuple[slice, list[int]]]  # of each group: its modules in MODULES, their widths

    @classmethod
    def find(
        cls, config: ModelConfig, arena: Tensor, plan: _Plan, laned_rows: set[int]
    ) -> "_PagedRows | None":
        batch = plan.batch
        needed: dict[int, int] = {}  # adapter of the batch -> index into the tables
        segments: list[tuple[int, int, int]] = []
        for place, sequence in enumerate([*plan.sequences, *range(batch.num_single, len(batch.blocks))]):
            adapter = batch.adapter_of_seq[sequence]
            if adapter >= 0 and place not in laned_rows:
                index = needed.setdefault(adapter, len(needed))
                segments.append((index, batch.query_start[place], batch.query_start[place + 1]))
        if not needed:
            return None
        tables = [batch.adapters[index].table(config.num_layers) for index in needed]
        most = max(table.tiles_a.shape[-1] for table in tables)

        def stack(tiles: list[Tensor]) -> Tensor:
            pad = torch.nn.functional.pad
            return torch.stack([pad(t, (0, most - t.shape[-1]), value=-1) for t in tiles])

        columns = {}
        for group in GROUPS:
            modules = GROUP_MODULES[group]
            first = MODULES.index(modules[0])
            widths = [module_shape(config, module)[0] for module in modules]
            columns[group] = (slice(first, first + len(modules)), widths)
        return cls(
            arena.view(-1),
            segments,
            stack([table.tiles_a for table in tables]),
            stack([table.tiles_b for table in tables]),
            torch.stack([table.scales for table in tables]),
            columns,
        )

    def apply(self, layer: int, group: str, x: Tensor, y: Tensor) -> Tensor:
        modules, widths = self.columns[group]
        return kernels.lora_pages(
            x,
            y,
            self.arena,
            self.segments,
            self.tiles_a[:, layer, modules],
            self.tiles_b[:, layer, modules],
            self.scales[:, layer, modules],
            widths,
        )
