"""The attention kernels against `reference.paged_attention`; what is not theirs to read is NaN.

On the CPU in Triton's interpreter; on a GPU, marked so, the compiled kernels.
"""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.reference import paged_attention, write_kv

attention = pytest.importorskip("kernels.attention", reason="needs triton")

NAN = float("nan")
DEVICES = [
    pytest.param(
        "cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")
    ),
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
    ),
]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def dtypes(device: str) -> list[torch.dtype]:
    """The interpreter cannot multiply bfloat16."""
    return [torch.float32, torch.float16] + ([torch.bfloat16] if device == "cuda" else [])


@dataclass(frozen=True)
class Case:
    """Queries for the newest positions of sequences of given lengths; only what is theirs is not NaN."""

    q: Tensor
    slabs: Tensor
    layer: int
    tables: Tensor
    block_list: Tensor
    block_start: Tensor
    lengths: list[int]
    query_start: list[int]

    def expected(self, window: int | None) -> Tensor:
        """In float32, from the values as rounded to the case's type."""
        clean, q = self.slabs.float(), self.q.float()
        scale = q.shape[-1] ** -0.5
        live = [s for s, length in enumerate(self.lengths) if length]
        starts = [self.query_start[s] for s in live] + [self.query_start[-1]]
        assert len(live) == len(self.lengths) or starts == sorted(starts)
        tables, lengths = self.tables[live], [self.lengths[s] for s in live]
        if len(live) == len(self.lengths):
            return paged_attention(q, clean, self.layer, tables, lengths, self.query_start, scale, window)
        out = torch.zeros_like(q)  # decode rows with padding among them
        rows = torch.tensor(live, device=q.device)
        ends = list(range(len(live) + 1))
        out[rows] = paged_attention(q[rows], clean, self.layer, tables, lengths, ends, scale, window)
        return out

    def column(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.q.device)


def make(
    lengths: list[int], new: list[int], heads: tuple[int, int], dim: int, block_size: int, dtype: torch.dtype,
    device: str,
) -> Case:  # fmt: skip
    generator = torch.Generator().manual_seed(sum(lengths) + dim)
    num_q, num_kv = heads
    blocks = [-(-length // block_size) for length in lengths]
    num_slabs, layers, layer = sum(blocks) + 3, 2, 1
    # Slabs of an arena are longer than their K/V.
    shape = (layers, 2, block_size, num_kv, dim)
    arena = torch.full((num_slabs, torch.Size(shape).numel() + 32), NAN)
    slabs = arena[:, : torch.Size(shape).numel()].view(-1, *shape)
    order = torch.randperm(num_slabs, generator=generator).tolist()
    tables = torch.zeros(len(lengths), max([*blocks, 1]), dtype=torch.int64)
    block_list, block_start = [], []
    for s, length in enumerate(lengths):
        block_start.append(len(block_list))
        owned = [order.pop() for _ in range(blocks[s])]
        block_list += owned
        tables[s, : len(owned)] = torch.tensor(owned, dtype=torch.int64)
        at = torch.arange(length)
        k, v = (torch.randn(length, num_kv, dim, generator=generator) for _ in range(2))
        write_kv(k, v, slabs, layer, tables[s, at // block_size], at % block_size)
    q = torch.randn(sum(new), num_q, dim, generator=generator)
    query_start = np.cumsum([0, *new]).tolist()
    arena = arena.to(device, dtype)
    return Case(
        q.to(device, dtype),
        arena[:, : torch.Size(shape).numel()].view(-1, *shape),
        layer,
        tables.to(device),
        torch.tensor([*block_list, 10**6], dtype=torch.int32, device=device),  # nothing lies behind the end
        torch.tensor(block_start, dtype=torch.int32, device=device),
        lengths,
        query_start,
    )


def assert_close(got: Tensor, expected: Tensor) -> None:
    assert got.isfinite().all()
    assert (got.float() - expected).abs().max().item() < TOLERANCE[got.dtype]


def decode(case: Case, window: int | None, splits: int, config: object = None) -> Tensor:
    num_heads, dim = case.q.shape[1:]
    out = torch.full_like(case.q, NAN)
    space = torch.full((len(case.q) * splits * num_heads * (dim + 1),), NAN, device=case.q.device)
    attention.decode_attention(
        case.q, case.slabs, case.layer, case.block_list, case.block_start, case.column(case.lengths),
        dim**-0.5, window, splits=splits, workspace=space, out=out, config=config,
    )  # fmt: skip
    return out


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window", [None, 1, 7, 100])
@pytest.mark.parametrize("splits", [1, 4])
def test_decode_is_attention_over_each_sequences_own_positions(
    device: str, splits: int, window: int | None
) -> None:
    lengths = [1, 0, 4, 0, 129, 150]
    for dtype in dtypes(device):
        case = make(lengths, [1] * len(lengths), (4, 2), 20, 4, dtype, device)
        got = decode(case, window, splits)
        assert_close(got, case.expected(window))
        assert (got[[1, 3]] == 0).all()
        beside_prompts = decode(replace(case, lengths=[1, -1, 4, -1, 129, 150]), window, splits)
        assert beside_prompts[[1, 3]].isnan().all()
        got[[1, 3]] = NAN
        assert torch.equal(beside_prompts.nan_to_num(7.0), got.nan_to_num(7.0))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("heads", "dim", "block_size"),
    [
        ((1, 1), 12, 1),
        ((6, 2), 24, 16),
        ((8, 1), 64, 32),
        ((3, 3), 80, 8),
        ((20, 1), 16, 16),
        ((2, 1), 256, 4),
    ],
)
def test_decode_takes_any_heads_head_size_and_block_size(
    device: str, heads: tuple[int, int], dim: int, block_size: int
) -> None:
    for dtype in dtypes(device):
        case = make([5, 140], [1, 1], heads, dim, block_size, dtype, device)
        for splits in (1, 2):
            assert_close(decode(case, None, splits), case.expected(None))


@pytest.mark.parametrize("device", DEVICES)
def test_splits_change_no_more_than_rounding_and_are_repeatable(device: str) -> None:
    case = make([400, 90, 1], [1, 1, 1], (2, 1), 64, 16, torch.float32, device)
    for splits in (1, 2, 3, 8):
        got = decode(case, None, splits)
        assert_close(got, case.expected(None))
        assert torch.equal(got, decode(case, None, splits))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("length", [1, 31, 33, 128, 256, 257])
def test_every_plan_gives_the_same_attention(device: str, length: int) -> None:
    for dtype in dtypes(device):
        case = make([length, 3], [1, 1], (4, 2), 64, 16, dtype, device)
        for rows in (1, 2, 200):
            plan = attention.DecodePlan.make(rows, 2, 64, dtype, length, torch.device(device))
            assert_close(decode(case, None, plan.splits, plan.config), case.expected(None))


def test_short_contexts_are_cut_by_how_many_programs_there_are() -> None:
    def plan(rows: int, longest: int, dim: int = 128) -> object:
        return attention.DecodePlan.make(rows, 8, dim, torch.bfloat16, longest, torch.device("cpu")).config

    few, many, any_length = plan(0, 256), plan(64, 256), plan(64, 257)
    assert len({few, many, any_length}) == 3
    assert any_length == plan(0, 257) == attention.decode_config(128, torch.bfloat16)
    assert plan(64, 256, dim=256) == plan(64, 257, dim=256)


@pytest.mark.parametrize("device", DEVICES)
def test_company_in_the_batch_changes_no_bit_of_a_row(device: str) -> None:
    lengths = [70, 260, 9]
    case = make(lengths, [1] * 3, (4, 2), 32, 16, torch.float32, device)
    together = decode(case, None, 2)
    for s, length in enumerate(lengths):
        alone = Case(
            case.q[s : s + 1], case.slabs, case.layer, case.tables, case.block_list,
            case.block_start[s : s + 1], [length], [0, 1],
        )  # fmt: skip
        assert torch.equal(decode(alone, None, 2)[0], together[s])


def prefill(
    case: Case, window: int | None, query_rows: int = 16, spare: int = 2, only: set[int] | None = None
) -> Tensor:
    capacity = len(case.q) + spare
    sequence, first = attention.query_tiles(case.query_start, query_rows, capacity)
    if only is not None:
        kept = np.isin(sequence, list(only))
        sequence[~kept] = -1
    out = torch.full_like(case.q, NAN)
    attention.prefill_attention(
        case.q, case.slabs, case.layer, case.block_list, case.block_start, case.column(case.lengths),
        case.column(case.query_start), case.column(sequence.tolist()), case.column(first.tolist()),
        case.q.shape[-1] ** -0.5, window, out=out, query_rows=query_rows,
    )  # fmt: skip
    return out


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window", [None, 1, 7, 100])
def test_prefill_is_causal_attention_of_chunks_that_start_anywhere(device: str, window: int | None) -> None:
    for dtype in dtypes(device):
        case = make([33, 5, 100, 40, 20], [33, 2, 18, 1, 20], (2, 1), 20, 4, dtype, device)
        for query_rows in (16, 32):
            assert_close(prefill(case, window, query_rows), case.expected(window))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("heads", "dim", "block_size"),
    [
        ((1, 1), 12, 1),
        ((6, 2), 24, 16),
        ((8, 1), 64, 32),
        ((3, 3), 80, 8),
        ((24, 2), 16, 16),
        ((2, 1), 256, 4),
    ],
)
def test_prefill_takes_any_heads_head_size_and_block_size(
    device: str, heads: tuple[int, int], dim: int, block_size: int
) -> None:
    for dtype in dtypes(device):
        case = make([20, 90], [20, 19], heads, dim, block_size, dtype, device)
        assert_close(prefill(case, None, 16), case.expected(None))


@pytest.mark.parametrize("device", DEVICES)
def test_rows_in_no_tile_are_left_alone(device: str) -> None:
    case = make([9, 40, 3], [1, 20, 3], (4, 2), 16, 4, torch.float32, device)
    got = prefill(case, None, only={1})
    assert_close(got[1:21], case.expected(None)[1:21])
    assert got[:1].isnan().all()
    assert got[21:].isnan().all()


def test_query_tiles_cover_each_new_row_once() -> None:
    sequence, first = attention.query_tiles([0, 1, 1, 34, 50], 16, 8)
    assert sequence.tolist() == [0, 2, 2, 2, 3, -1, -1, -1]
    assert first.tolist() == [0, 0, 16, 32, 0, -1, -1, -1]
    assert sequence.dtype == first.dtype == np.int32
    with pytest.raises(ValueError, match="at most 4 query tiles, got 5"):
        attention.query_tiles([0, 1, 1, 34, 50], 16, 4)


def test_the_workspace_holds_every_split_that_is_chosen() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for rows in (1, 2, 24, 100, 256):
        room = attention.workspace(rows, 4, 20, device).numel()
        for singles in {1, rows // 2, rows} - {0}:
            for heads in (1, 2, 8):
                for longest in (0, 1, 127, 500, 5000, 10**6):
                    splits = attention.num_splits(singles, heads, longest, device)
                    assert splits >= 1
                    assert splits & (splits - 1) == 0
                    assert singles * splits * 4 * 21 <= room


def test_tensors_that_do_not_fit_are_refused() -> None:
    case = make([5], [1], (4, 2), 20, 4, torch.float32, "cpu")
    with pytest.raises(ValueError, match="heads a multiple"):
        attention._check(case.q[:, :3], case.slabs, case.q[:, :3])
    wide = torch.zeros(1, 4, 40)
    with pytest.raises(ValueError, match="side by side"):
        attention._check(wide[..., ::2], case.slabs, case.q)
