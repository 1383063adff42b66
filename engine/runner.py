"""The device: holds model and arena, runs a Batch, returns token ids."""

from collections.abc import Sequence as Many

import torch
from torch import Tensor

import kernels
from engine.batch import Batch
from engine.model import GROUP_MODULES, GROUPS, MODULES, module_shape
from engine.packing import ResidentAdapter
from engine.sampler import sample
from engine.weights import LoadedModel


class Runner:
    """Runs batches on one model and one arena [num_slabs, slab_elems], both on the same device."""

    def __init__(self, model: LoadedModel, arena: Tensor, block_size: int) -> None:
        config = model.config
        self._decoder = model.decoder
        self._config = config
        self._arena = arena
        kv_shape = (config.num_layers, 2, block_size, config.num_kv_heads, config.head_dim)
        kv_elems = torch.Size(kv_shape).numel()
        self._slabs = arena[:, :kv_elems].view(-1, *kv_shape)

    def run(self, batch: Batch) -> list[int]:
        """One token id per row that wants one, in the order of the chunks."""
        token_ids: list[int] = sample(self.logits(batch), batch.sampling).tolist()
        return token_ids

    @torch.inference_mode()
    def logits(self, batch: Batch) -> Tensor:
        """[R, vocab] float32, in the order of the chunks."""
        attend = PagedAttend(self, batch)
        lora = PagedLora(self, batch) if batch.adapters else None
        hidden = self._decoder(batch.token_ids, batch.positions, attend, lora)
        return self._decoder.logits(hidden[list(batch.logits_rows)])

    def copy_in(self, image: Tensor, slabs: Many[int]) -> None:
        """Copy the image [n, slab_elems] of a packed adapter into these n slabs."""
        self._arena.index_copy_(0, torch.tensor(slabs), image.to(self._arena.dtype))


class PagedAttend:
    """Writes K/V into pages and attends over them."""

    def __init__(self, runner: Runner, batch: Batch) -> None:
        self._config = runner._config
        self._slabs = runner._slabs
        self._batch = batch

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch = self._batch
        kernels.write_kv(k, v, self._slabs, layer, batch.slot_block, batch.slot_offset)
        return kernels.paged_attention(
            q,
            self._slabs,
            layer,
            batch.block_tables,
            batch.context_lens,
            batch.query_start,
            self._config.head_dim**-0.5,
            self._config.window(layer),
        )


class PagedLora:
    def __init__(self, runner: Runner, batch: Batch) -> None:
        config = runner._config
        self._arena = runner._arena.view(-1)
        self._rows = batch.adapter_of_row
        tables = [adapter.table(config.num_layers) for adapter in batch.adapters]
        most = max(table.tiles_a.shape[-1] for table in tables)
        pad = lambda t: torch.nn.functional.pad(t, (0, most - t.shape[-1]), value=-1)
        self._a = torch.stack([pad(table.tiles_a) for table in tables])
        self._b = torch.stack([pad(table.tiles_b) for table in tables])
        self._scales = torch.stack([table.scales for table in tables])
        self._columns = {
            group: (
                MODULES.index(GROUP_MODULES[group][0]),
                MODULES.index(GROUP_MODULES[group][-1]) + 1,
                [module_shape(config, module)[0] for module in GROUP_MODULES[group]],
            )
            for group in GROUPS
        }

    def __call__(self, layer: int, group: str, x: Tensor, y: Tensor) -> Tensor:
        lo, hi, widths = self._columns[group]
        return kernels.lora_pages(
            x,
            y,
            self._arena,
            self._rows,
            self._a[:, layer, lo:hi],
            self._b[:, layer, lo:hi],
            self._scales[:, layer, lo:hi],
            widths,
        )
