"""The chunks of one step as one Batch: flat token rows, and where each sequence's pages and adapter are.

Rows of single tokens (decoding) come first, then the prompts; the order of the chunks is kept within both.
Everything the runner returns is in the order of the chunks that want a token.
"""

from collections.abc import Sequence as Many
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from engine.packing import ResidentAdapter
from engine.request import UNKNOWN, Chunk


@dataclass(frozen=True, slots=True)
class SamplingColumns:
    """One entry per row to sample from: the sampling parameters, and the output index of the token drawn."""

    temperature: tuple[float, ...]
    top_p: tuple[float, ...]
    top_k: tuple[int, ...]
    min_p: tuple[float, ...]
    seed: tuple[int, ...]
    index: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.temperature)


@dataclass(frozen=True)
class Batch:
    """S sequences with T new tokens, R of which are sampled from.

    Tokens query_start[s] .. query_start[s+1] belong to sequence s and are the last of its context_lens[s]
    positions. The first `num_single` sequences have one token each.
    """

    token_ids: Tensor  # [T] int64
    token_source: Tensor  # [T] int64: which draw of the step before gives the token; -1: token_ids has it
    positions: Tensor  # [T] int64
    slot_block: Tensor  # [T] int64: slab that takes the token's K/V
    slot_offset: Tensor  # [T] int64: position inside that block
    query_start: tuple[int, ...]  # S + 1
    context_lens: tuple[int, ...]  # S, new tokens included
    sequence_ids: tuple[str, ...]  # S
    blocks: tuple[tuple[int, ...], ...]  # S: the slabs of each sequence's K/V, in order of position
    adapters: tuple[ResidentAdapter, ...]  # distinct
    adapter_of_seq: tuple[int, ...]  # S: index into adapters, -1 for the base model
    logits_rows: tuple[int, ...]  # R: token row of each wanted token, in the order of the chunks
    sampling: SamplingColumns  # R
    num_single: int

    @cached_property
    def block_tables(self) -> Tensor:
        """[S, most blocks] int64; entries past a sequence's own blocks are 0 and mean nothing."""
        width = max(map(len, self.blocks))
        return torch.tensor([[*blocks, *[0] * (width - len(blocks))] for blocks in self.blocks])


def build_batch(chunks: Many[Chunk], block_size: int) -> Batch:
    """Lay out the chunks of one step; every sequence has blocks for all the positions of its chunk."""
    order = sorted(range(len(chunks)), key=lambda index: chunks[index].length > 1)
    token_ids: list[int] = []
    token_source: list[int] = []
    positions: list[int] = []
    slot_block: list[int] = []
    slot_offset: list[int] = []
    query_start = [0]
    adapters: dict[int, ResidentAdapter] = {}
    adapter_of_seq: list[int] = []
    row_of_chunk: dict[int, int] = {}
    ordered = [chunks[index] for index in order]
    for index, chunk in zip(order, ordered, strict=True):
        sequence, end = chunk.sequence, chunk.start + chunk.length
        token_ids += sequence.tokens[chunk.start : end]
        token_source += [-1] * chunk.length
        if token_ids[-1] == UNKNOWN:
            token_source[-1] = sequence.result_index
        for position in range(chunk.start, end):
            positions.append(position)
            slot_block.append(sequence.blocks[position // block_size])
            slot_offset.append(position % block_size)
        query_start.append(len(token_ids))
        row_of_chunk[index] = len(token_ids) - 1
        resident = sequence.resident
        if resident is None:
            adapter_of_seq.append(-1)
        else:
            adapters.setdefault(id(resident), resident)
            adapter_of_seq.append(list(adapters).index(id(resident)))
    wanting = [index for index, chunk in enumerate(chunks) if chunk.wants_token]
    return Batch(
        token_ids=torch.tensor(token_ids),
        token_source=torch.tensor(token_source),
        positions=torch.tensor(positions),
        slot_block=torch.tensor(slot_block),
        slot_offset=torch.tensor(slot_offset),
        query_start=tuple(query_start),
        context_lens=tuple(chunk.start + chunk.length for chunk in ordered),
        sequence_ids=tuple(chunk.sequence.id for chunk in ordered),
        blocks=tuple(tuple(chunk.sequence.blocks) for chunk in ordered),
        adapters=tuple(adapters.values()),
        adapter_of_seq=tuple(adapter_of_seq),
        logits_rows=tuple(row_of_chunk[index] for index in wanting),
        sampling=_columns([chunks[index] for index in wanting]),
        num_single=sum(chunk.length == 1 for chunk in chunks),
    )


def _columns(chunks: Many[Chunk]) -> SamplingColumns:
    asked = [chunk.sequence.request.sampling for chunk in chunks]
    return SamplingColumns(
        temperature=tuple(s.temperature for s in asked),
        top_p=tuple(s.top_p for s in asked),
        top_k=tuple(s.top_k for s in asked),
        min_p=tuple(s.min_p for s in asked),
        seed=tuple(s.seed for s in asked),
        index=tuple(chunk.sequence.num_output for chunk in chunks),
    )
