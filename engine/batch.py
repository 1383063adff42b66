"""The chunks of one step as one Batch: flat token rows, and where each sequence's pages and adapter are.

Rows of single tokens (decoding) come first, those of one adapter side by side, then the prompts.
Everything the runner returns is in the order of the chunks that want a token.
"""

from collections import defaultdict
from collections.abc import Sequence as Many
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.packing import ResidentAdapter
from engine.request import UNKNOWN, Chunk

Ints = npt.NDArray[np.int64]


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

    token_ids: Ints  # [T]
    token_source: Ints  # [T]: which draw of the step before gives the token, -1 where token_ids has it
    positions: Ints  # [T]
    slots: Ints  # [T]: slab * block_size + offset, where the token's K/V goes
    block_size: int
    query_start: tuple[int, ...]  # S + 1
    context_lens: tuple[int, ...]  # S, new tokens included
    sequence_ids: tuple[str, ...]  # S
    blocks: tuple[tuple[int, ...], ...]  # S: the slabs of each sequence's K/V, in order of position
    adapters: tuple[ResidentAdapter, ...]  # distinct
    adapter_of_seq: tuple[int, ...]  # S: index into adapters, -1 for the base model
    logits_rows: tuple[int, ...]  # R: token row of each wanted token, in the order of the chunks
    sampling: SamplingColumns  # R
    num_single: int

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @cached_property
    def block_tables(self) -> Tensor:
        """[S, most blocks] int64; entries past a sequence's own blocks are 0 and mean nothing."""
        width = max(map(len, self.blocks))
        return torch.tensor([[*blocks, *[0] * (width - len(blocks))] for blocks in self.blocks])


def build_batch(chunks: Many[Chunk], block_size: int) -> Batch:
    """Lay out the chunks of one step; every sequence has blocks for all the positions of its chunk."""
    adapters: dict[int, ResidentAdapter] = {}  # by identity, in the order of their rows
    place_of: dict[int, int] = {}
    singles: defaultdict[int, list[int]] = defaultdict(list)  # chunks of one token by their adapter
    prompts: list[int] = []
    for index, (sequence, _, length, _) in enumerate(chunks):
        if length > 1:
            prompts.append(index)
        else:
            singles[id(sequence.resident)].append(index)
    order = [*chain.from_iterable(singles.values()), *prompts]
    ordered = [chunks[index] for index in order]
    num_single = len(order) - len(prompts)
    adapter_of_seq: list[int] = []
    for chunk in ordered:
        resident = chunk.sequence.resident
        if resident is None:
            adapter_of_seq.append(-1)
            continue
        place = place_of.setdefault(id(resident), len(adapters))
        adapters.setdefault(place, resident)
        adapter_of_seq.append(place)
    single = ordered[:num_single]
    token_ids = [sequence.tokens[start] for sequence, start, _, _ in single]
    token_source = [
        chunk.sequence.result_index if token == UNKNOWN else -1
        for chunk, token in zip(single, token_ids, strict=True)
    ]
    positions = [chunk.start for chunk in single]
    slots = [
        sequence.blocks[start // block_size] * block_size + start % block_size
        for sequence, start, _, _ in single
    ]
    query_start = [*range(num_single + 1)]
    for chunk in ordered[num_single:]:
        sequence, end = chunk.sequence, chunk.start + chunk.length
        token_ids += sequence.tokens[chunk.start : end]
        token_source += [-1] * chunk.length
        at = np.arange(chunk.start, end)
        positions += at.tolist()
        slots += (np.array(sequence.blocks)[at // block_size] * block_size + at % block_size).tolist()
        query_start.append(len(token_ids))
        if token_ids[-1] == UNKNOWN:  # a reply that runs anew up to the token being drawn
            token_source[-1] = sequence.result_index
    row_of_chunk = {index: end - 1 for index, end in zip(order, query_start[1:], strict=True)}
    wanting = [index for index, chunk in enumerate(chunks) if chunk.wants_token]
    return Batch(
        token_ids=np.array(token_ids),
        token_source=np.array(token_source),
        positions=np.array(positions),
        slots=np.array(slots),
        block_size=block_size,
        query_start=tuple(query_start),
        context_lens=tuple([start + length for _, start, length, _ in ordered]),
        sequence_ids=tuple([chunk.sequence.request.id for chunk in ordered]),
        blocks=tuple([chunk.sequence.blocks for chunk in ordered]),
        adapters=tuple(adapters.values()),
        adapter_of_seq=tuple(adapter_of_seq),
        logits_rows=tuple([row_of_chunk[index] for index in wanting]),
        sampling=_columns([chunks[index] for index in wanting]),
        num_single=num_single,
    )


def _columns(chunks: Many[Chunk]) -> SamplingColumns:
    if not chunks:
        return SamplingColumns((), (), (), (), (), ())
    sequences = [chunk.sequence for chunk in chunks]
    index = tuple([len(sequence.tokens) - sequence.num_prompt for sequence in sequences])
    temperature, top_p, top_k, min_p, seed = zip(*[s.drawn_by for s in sequences], strict=True)
    return SamplingColumns(temperature, top_p, top_k, min_p, seed, index)
