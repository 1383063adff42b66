"""Drives a Runner as the engine would, on an arena full of NaN with slabs in shuffled order, for tests."""

import random
from collections.abc import Sequence as Many
from pathlib import Path

import torch
from torch import Tensor

from engine.adapter_files import read_adapter
from engine.batch import build_batch
from engine.gpu_runner import GpuRunner
from engine.packing import ResidentAdapter, min_slab_elems, pack_adapter
from engine.request import AdapterRef, Chunk, Request, SamplingParams, Sequence
from engine.runner import Runner
from engine.weights import LoadedModel

BLOCK = 4


class Driver:
    """Sequences and adapters on one runner. Slabs not in use hold NaN: whoever reads one shows it."""

    def __init__(
        self,
        model: LoadedModel,
        *,
        num_slabs: int = 600,
        seed: int = 0,
        lane_bytes: int = 1 << 30,
        on_gpu: bool = False,
    ) -> None:
        """`on_gpu`: the GPU's runner, on whatever device the model is (its kernels may be interpreted)."""
        config = model.config
        kv_elems = config.num_layers * 2 * BLOCK * config.num_kv_heads * config.head_dim
        self.slab_elems = max(kv_elems, min_slab_elems(config))
        dtype = model.decoder.embed.dtype
        device = model.decoder.embed.device
        self.arena = torch.full((num_slabs, self.slab_elems), float("nan"), dtype=dtype, device=device)
        self.model = model
        self.runner: Runner | GpuRunner
        if on_gpu:
            self.runner = GpuRunner(model, self.arena, BLOCK, max_tokens=64, max_rows=16)
        else:
            self.runner = Runner(model, self.arena, BLOCK, lane_bytes=lane_bytes)
        self.free = list(range(num_slabs))
        random.Random(seed).shuffle(self.free)
        self.numbers = iter(range(1_000_000))

    def adapter(self, folder: Path, *, name: str = "a", version: int = 1) -> ResidentAdapter:
        """Read, pack and copy an adapter into shuffled slabs."""
        weights = read_adapter(folder, self.model.config)
        packed = pack_adapter(weights, self.model.config, self.slab_elems, self.arena.dtype)
        slabs = tuple(self.free.pop() for _ in range(packed.layout.slabs_needed))
        self.runner.copy_in(packed.image, slabs)
        return ResidentAdapter(AdapterRef(name, version), packed.layout, slabs)

    def sequence(
        self,
        tokens: Many[int],
        adapter: ResidentAdapter | None = None,
        sampling: SamplingParams | None = None,
    ) -> Sequence:
        name = f"request-{next(self.numbers)}"
        request = Request(name, tuple(tokens), sampling or SamplingParams(temperature=0))
        sequence = Sequence(request)
        sequence.resident = adapter
        return sequence

    def chunk(self, sequence: Sequence, length: int) -> Chunk:
        start = sequence.num_computed
        while len(sequence.blocks) * BLOCK < start + length:
            sequence.blocks += (self.free.pop(),)
        return Chunk(sequence, start, length, wants_token=True)

    def logits(self, *parts: tuple[Sequence, int]) -> Tensor:
        """Run (sequence, number of tokens) parts as one batch -> [parts, vocab]."""
        batch = build_batch([self.chunk(sequence, length) for sequence, length in parts], BLOCK)
        logits = self.runner.logits(batch)
        for sequence, length in parts:
            sequence.num_computed += length
        return logits

    def release(self, sequence: Sequence) -> None:
        """Free a sequence's blocks and poison them, as if others had written there."""
        self.arena[list(sequence.blocks)] = float("nan")
        self.free = [*sequence.blocks, *self.free]  # used last
        sequence.blocks = ()
        sequence.num_computed = 0
