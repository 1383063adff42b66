"""A batch lays chunks out so that every row finds its pages and its adapter, and answers in their order."""

import pytest
import torch

from engine.adapter_files import LoraModule, LoraWeights
from engine.batch import build_batch
from engine.packing import ResidentAdapter, pack_adapter
from engine.request import AdapterRef, Chunk, Request, SamplingParams, Sequence
from tests.test_packing import TINY


def resident(name: str) -> ResidentAdapter:
    module = LoraModule(0, "q_proj", torch.ones(8, 48), torch.ones(80, 8), 1.0)
    packed = pack_adapter(LoraWeights((module,)), TINY, 4000)
    return ResidentAdapter(AdapterRef(name, 1), packed.layout, (0,))


def sequence(
    name: str, prompt: list[int], blocks: list[int], adapter: ResidentAdapter | None = None, **sampling: float
) -> Sequence:
    made = Sequence(Request(name, tuple(prompt), SamplingParams(**sampling)))  # type: ignore[arg-type]
    made.blocks = tuple(blocks)
    made.resident = adapter
    return made


def test_single_tokens_come_first_and_answers_keep_the_order_of_the_chunks() -> None:
    a = sequence("a", [1, 2, 3, 4, 5], [7, 3])
    b = sequence("b", [6, 7, 8], [5])
    batch = build_batch([Chunk(a, 1, 4, True), Chunk(b, 2, 1, True)], 4)
    assert batch.sequence_ids == ("b", "a")
    assert batch.token_ids.tolist() == [8, 2, 3, 4, 5]
    assert batch.positions.tolist() == [2, 1, 2, 3, 4]
    assert batch.query_start == (0, 1, 5)
    assert batch.context_lens == (3, 5)
    assert batch.num_single == 1
    assert batch.logits_rows == (4, 0)


def test_every_token_has_the_slab_and_offset_of_its_position() -> None:
    a = sequence("a", list(range(9)), [7, 3, 9])
    batch = build_batch([Chunk(a, 2, 7, True)], 4)
    assert batch.slots.tolist() == [30, 31, 12, 13, 14, 15, 36]


def test_a_chunk_that_wants_no_token_has_no_row_to_sample_from() -> None:
    a, b = sequence("a", [1, 2, 3], [0]), sequence("b", [4, 5], [1])
    batch = build_batch([Chunk(a, 0, 2, False), Chunk(b, 0, 2, True)], 4)
    assert batch.logits_rows == (3,)
    assert len(batch.sampling) == 1


def test_block_tables_are_as_wide_as_the_longest_sequence() -> None:
    a, b = sequence("a", list(range(9)), [7, 3, 9]), sequence("b", [1, 2], [5])
    batch = build_batch([Chunk(a, 0, 9, True), Chunk(b, 0, 2, True)], 4)
    assert batch.block_tables.tolist() == [[7, 3, 9], [5, 0, 0]]


def test_sequences_of_one_adapter_share_its_entry_and_base_rows_have_none() -> None:
    one, two = resident("one"), resident("two")
    chunks = [
        Chunk(sequence(str(i), [1, 2], [i], adapter), 0, length, True)
        for i, (adapter, length) in enumerate([(two, 2), (None, 1), (one, 1), (two, 1), (None, 2)])
    ]
    batch = build_batch(chunks, 4)
    assert [batch.adapters[i].ref.id if i >= 0 else None for i in batch.adapter_of_seq] == [
        None, "one", "two", "two", None
    ]  # fmt: skip
    assert len(batch.adapters) == 2


def test_sampling_columns_carry_the_output_index_of_the_token_to_come() -> None:
    a = sequence("a", [1, 2], [0], temperature=0.5, seed=9, top_k=3)
    a.tokens += [5, 6, 7]
    resumed = Sequence(Request("b", (1, 2), SamplingParams(), generated=(4, 4)))
    resumed.blocks = (1,)
    batch = build_batch([Chunk(a, 4, 1, True), Chunk(resumed, 0, 4, True)], 8)
    assert batch.sampling.index == (3, 2)
    assert batch.sampling.temperature == (0.5, 1.0)
    assert batch.sampling.seed == (9, 0)
    assert batch.sampling.top_k == (3, 0)


def test_a_chunk_without_blocks_for_its_positions_is_a_bug_of_the_caller() -> None:
    with pytest.raises(IndexError):
        build_batch([Chunk(sequence("a", list(range(9)), [7]), 0, 9, True)], 4)
