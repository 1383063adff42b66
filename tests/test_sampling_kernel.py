"""The sampling kernels draw what `reference.sample_rows` draws.

On the CPU in Triton's interpreter, cut into small blocks, so that few tokens make many; on a GPU, marked so,
the compiled kernels as they are served too.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from kernels import reference

sampling = pytest.importorskip("kernels.sampling", reason="needs triton")

DEVICES = [
    pytest.param(
        "cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")
    ),
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
    ),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAN, INF = float("nan"), float("inf")
SMALL = sampling.SamplingConfig(block=16, scan_blocks=8, scan_warps=1, pick_blocks=32, pick_warps=1)
UNTOUCHED = -7


@dataclass(frozen=True)
class Rows:
    """Columns of sampling parameters, a little longer than needed, as a step's are."""

    temperature: Tensor
    top_p: Tensor
    top_k: Tensor
    min_p: Tensor
    seed: Tensor
    index: Tensor

    @staticmethod
    def of(*rows: dict[str, float]) -> "Rows":
        defaults = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": 0, "index": 0}
        kinds = {"top_k": torch.int32, "seed": torch.int64, "index": torch.int32}
        filled = [*(defaults | row for row in rows), *[defaults | {"temperature": NAN, "top_k": -1}] * 3]
        return Rows(
            **{
                name: torch.tensor([row[name] for row in filled], dtype=kinds.get(name, torch.float32))
                for name in defaults
            }
        )

    def columns(self, device: str = "cpu") -> list[Tensor]:
        return [getattr(self, name).to(device) for name in vars(self)]


def drawn(logits: Tensor, rows: Rows, device: str, config: "sampling.SamplingConfig" = SMALL) -> list[int]:
    out = torch.full((len(logits) + 2,), UNTOUCHED, dtype=torch.int32, device=device)
    sampling.sample_rows(logits.to(device), *rows.columns(device), out, config)
    assert out[len(logits) :].tolist() == [UNTOUCHED] * 2
    return out[: len(logits)].tolist()


def expected(logits: Tensor, rows: Rows) -> list[int]:
    columns = [column[: len(logits)] for column in rows.columns()]
    columns[2], columns[5] = columns[2].long(), columns[5].long()
    return reference.sample_rows(logits, *columns).tolist()


def random_logits(count: int, vocab: int, spread: float, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, vocab, generator=generator) * spread).to(dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 97, 300])
def test_temperature_zero_takes_the_first_of_the_largest(device: str, dtype: torch.dtype, vocab: int) -> None:
    logits = random_logits(5, vocab, 1.0, dtype)
    logits[1] = 0.0
    logits[2, vocab // 2 :] = 9.0
    logits[3] = -INF
    logits[3, -1] = -4.0
    logits[4, : vocab // 3] = -0.0
    logits[4, vocab // 3 :] = 0.0
    got = drawn(logits, Rows.of(*[{"temperature": 0.0, "top_k": 3, "top_p": 0.5}] * 5), device)
    assert got == [int(logits[0].argmax()), 0, vocab // 2, vocab - 1, 0]


@pytest.mark.parametrize("device", DEVICES)
def test_draws_without_filters(device: str) -> None:
    for dtype in DTYPES:
        logits = random_logits(6, 300, 2.0, dtype)
        rows = Rows.of(*[{"temperature": 0.2 + i, "seed": i // 2 - 1, "index": i} for i in range(6)])
        assert drawn(logits, rows, device) == expected(logits, rows)


FILTERS: list[dict[str, float]] = [
    {"top_p": 0.9},
    {"top_k": 5},
    {"min_p": 0.05},
    {"top_k": 40, "top_p": 0.7, "min_p": 0.02, "temperature": 0.6},
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_filtered_draws(device: str, dtype: torch.dtype) -> None:
    wanted = [one | {"seed": 3, "index": index} for index, one in enumerate(FILTERS)]
    logits = random_logits(len(wanted), 300, 3.0, dtype)
    rows = Rows.of(*wanted)
    assert drawn(logits, rows, device) == expected(logits, rows)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "one",
    [
        {"top_k": 1},
        {"top_k": 10_000, "top_p": 0.5},
        {"top_p": 1e-6},
        {"top_p": 0.999, "temperature": 3.0},
        {"min_p": 1.0},
        {"top_k": 7, "temperature": 1e-30},
    ],
    ids=str,
)
def test_filters_at_their_ends(device: str, one: dict[str, float]) -> None:
    logits = random_logits(1, 97, 1.0, torch.bfloat16, seed=9)
    rows = Rows.of(one | {"seed": 5})
    assert drawn(logits, rows, device) == expected(logits, rows)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("one", [{"top_k": 4}, {"top_p": 0.3}, {"top_k": 9, "top_p": 0.5}], ids=str)
def test_of_equal_logits_those_of_the_lowest_ids_are_kept(device: str, one: dict[str, float]) -> None:
    logits = torch.full((2, 60), -2.0, dtype=torch.bfloat16)
    logits[:, 5::6] = 1.0
    rows = Rows.of(*[one | {"seed": seed} for seed in range(2)])
    assert drawn(logits, rows, device) == expected(logits, rows)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("temperature", [1e-9, 1e-30])
def test_top_p_is_a_share_of_what_there_is_however_much_top_k_would_keep(
    device: str, temperature: float
) -> None:
    logits = random_logits(1, 50, 1.0, torch.float32).expand(8, 50).clone()
    logits[:, [11, 30]] = 9.0  # at this temperature the only two, of half the mass each
    rows = Rows.of(*({"temperature": temperature, "top_k": 40, "top_p": 0.5, "seed": s} for s in range(8)))
    assert drawn(logits, rows, device) == expected(logits, rows) == [11] * 8


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_looked_at_in_several_parts(device: str) -> None:
    logits = random_logits(3, 300, 0.5, torch.bfloat16, seed=2)
    rows = Rows.of(*[{"top_p": 0.95, "seed": 1}, {"top_k": 200, "seed": 2}, {"min_p": 0.1, "seed": 4}])
    config = replace(SMALL, pick_blocks=8, scan_blocks=4)
    assert drawn(logits, rows, device, config) == expected(logits, rows)


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_without_a_finite_largest_logit_gets_minus_one_and_others_their_token(device: str) -> None:
    for one in ({"temperature": 0.0}, {}, {"top_p": 0.9}):
        logits = random_logits(6, 97, 1.0, torch.float16)
        logits[0, 90], logits[1, 3], logits[2], logits[3, 40] = NAN, INF, -INF, -NAN
        logits[3, 41], logits[4, 7] = INF, -INF
        rows = Rows.of(*[one] * 6)
        got = drawn(logits, rows, device)
        assert got[:4] == [-1] * 4
        assert got == expected(logits, rows)


@pytest.mark.parametrize("device", DEVICES)
def test_forbidden_tokens_are_never_drawn(device: str) -> None:
    logits = torch.full((3, 97), -INF)
    logits[:, [20, 70]] = torch.tensor([1.0, 1.5])
    rows = Rows.of(*[one | {"seed": 8} for one in ({}, {"top_k": 50}, {"top_p": 0.99})])
    assert drawn(logits, rows, device) == expected(logits, rows)


@pytest.mark.parametrize("device", DEVICES)
def test_seed_and_index_may_be_any_that_fit(device: str) -> None:
    ends = [(-(2**63), 0), (2**63 - 1, 2**31 - 1), (-1, 1), (0, 2**20)]
    logits = random_logits(len(ends), 300, 0.1, torch.float32)
    rows = Rows.of(*[{"seed": seed, "index": index} for seed, index in ends])
    assert drawn(logits, rows, device) == expected(logits, rows)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spread", [0.02, 1.0, 4.0])
@pytest.mark.parametrize("vocab", [32_000, 128_256, 151_936])
def test_vocabularies_of_models_as_served(vocab: int, spread: float, dtype: torch.dtype) -> None:
    choices = [{"temperature": 0.0}, {}, {"temperature": 0.7}, *FILTERS, {"top_k": 5000, "top_p": 0.99}]
    wanted = [one | {"seed": i, "index": 7 * i} for i, one in enumerate(choices * 4)]
    logits, rows = random_logits(len(wanted), vocab, spread, dtype), Rows.of(*wanted)
    together = drawn(logits, rows, "cuda", sampling.SamplingConfig())
    differing = sum(a != b for a, b in zip(together, expected(logits, rows), strict=True))
    assert differing <= 1  # a draw on the very edge of two tokens may fall on either by rounding
    for i in range(0, len(wanted), 5):
        alone = Rows.of(wanted[i])
        assert drawn(logits[i : i + 1], alone, "cuda", sampling.SamplingConfig()) == together[i : i + 1]


def test_tensors_that_do_not_fit_are_refused() -> None:
    logits, columns = torch.zeros(4, 10), Rows.of({}).columns()
    out = torch.zeros(4, dtype=torch.int32)
    with pytest.raises(ValueError, match="floating logits with contiguous rows"):
        sampling.sample_rows(logits.t(), *columns, out)
    with pytest.raises(ValueError, match="at least 4 rows and int32"):
        sampling.sample_rows(logits, *columns, out.long())
    with pytest.raises(ValueError, match="at least 4 rows and int32"):
        sampling.sample_rows(logits, *columns, out[:3])
