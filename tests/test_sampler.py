"""The sampler: each filter keeps what it says, draws follow the distribution, company changes nothing."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batch import SamplingColumns
from engine.sampler import LogitsNotFinite, column_tensors, sample
from kernels.reference import filtered, uniform


def columns(*rows: dict[str, float], index: int = 0) -> SamplingColumns:
    defaults = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": 0, "index": index}
    filled = [defaults | row for row in rows]
    return SamplingColumns(**{name: tuple(row[name] for row in filled) for name in defaults})


def kept_tokens(logits: torch.Tensor, row: SamplingColumns) -> tuple[torch.Tensor, torch.Tensor]:
    return filtered(logits, *column_tensors(row, "cpu")[:4])


def splitmix64(state: int) -> int:
    """The published algorithm on Python's integers."""
    mask = (1 << 64) - 1
    z = (state + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


@settings(deadline=None)
@given(seed=st.integers(-(2**63), 2**63 - 1), index=st.integers(0, 2**40))
def test_uniform_is_splitmix64(seed: int, index: int) -> None:
    state = splitmix64(seed & (2**64 - 1)) + index * 0x9E3779B97F4A7C15
    expected = (splitmix64(state & (2**64 - 1)) >> 11) / 2**53
    assert uniform(torch.tensor([seed]), torch.tensor([index])).item() == expected


def test_uniform_has_the_known_first_output_of_splitmix64() -> None:
    assert splitmix64(0) == 0xE220A8397B1DCDAF  # as published with the algorithm
    assert splitmix64(0x9E3779B97F4A7C15) == 0x6E789E6AA1B965F4


def test_temperature_zero_takes_the_largest_logit() -> None:
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(1))
    assert sample(logits, columns(*[{"temperature": 0}] * 5)).tolist() == logits.argmax(-1).tolist()


def test_a_tiny_temperature_takes_the_largest_logit_and_does_not_overflow() -> None:
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(2)) * 1e4
    for index in range(20):
        row = columns({"temperature": 1e-30}, index=index)
        assert sample(logits, row).item() == logits.argmax().item()


def kept_by_definition(p: list[float], top_k: int, top_p: float, min_p: float) -> set[int]:
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))[: top_k or None]
    total, before, kept = math.fsum(p[i] for i in order), 0.0, set()
    for i in order:
        if (top_p < 1 and before >= top_p * total) or p[i] < min_p * p[order[0]]:
            break
        kept.add(i)
        before += p[i]
    return kept


@settings(deadline=None)
@given(
    seed=st.integers(0, 10_000),
    vocab=st.sampled_from([1, 2, 63, 64, 65, 700]),
    spread=st.sampled_from([0.01, 1.0, 8.0]),
    temperature=st.sampled_from([0.3, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 5, 64, 100, 10_000]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 1e-6]),
    min_p=st.sampled_from([0.0, 0.05, 0.9, 1.0]),
)
def test_filters_keep_what_their_definition_says(
    seed: int, vocab: int, spread: float, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(seed)) * spread
    row = columns({"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p})
    p, ids = kept_tokens(logits, row)
    whole = (logits / temperature).softmax(-1)[0]
    kept = {int(i) for i, value in zip(ids[0], p[0], strict=True) if value > 0}
    expected = kept_by_definition(whole.tolist(), top_k, top_p, min_p)
    expected = {i for i in expected if whole[i] > 0}  # p of 0 is never drawn, kept or not
    # a token on the very edge may fall on either side by rounding
    assert len(kept ^ expected) <= 1, (kept, expected)
    for i, value in zip(ids[0].tolist(), p[0].tolist(), strict=True):
        assert value in (0.0, pytest.approx(whole[i].item(), rel=1e-4))


def test_equal_logits_are_kept_in_order_of_id() -> None:
    p, ids = kept_tokens(torch.zeros(1, 300), columns({"top_k": 3}))
    assert ids[0][p[0] > 0].tolist() == [0, 1, 2]


def test_kept_tokens_are_added_up_in_order_of_id(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.tensor([[0.1, 3.0, 0.0, 1.0, 2.0]])
    p = torch.tensor([math.exp(3.0), math.exp(1.0), math.exp(2.0)], dtype=torch.float64)
    ends = (p / p.sum()).cumsum(0)  # of tokens 1, 3 and 4
    for u, token in ((ends[0] - 1e-3, 1), (ends[0] + 1e-3, 3), (ends[1] - 1e-3, 3), (ends[1] + 1e-3, 4)):
        monkeypatch.setattr("kernels.reference.uniform", lambda seed, index, u=u: u.expand(seed.shape))
        assert sample(logits, columns({"top_k": 3})).item() == token


@pytest.mark.parametrize(
    "settings_of_row",
    [{}, {"temperature": 0.7}, {"top_k": 4}, {"top_p": 0.8}, {"min_p": 0.2}, {"top_k": 6, "top_p": 0.9}],
    ids=str,
)
def test_draws_follow_the_filtered_distribution(settings_of_row: dict[str, float]) -> None:
    count, vocab = 20_000, 12
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(4)) * 1.5
    rows = [settings_of_row | {"seed": 7, "index": index} for index in range(count)]
    drawn = sample(logits.expand(count, vocab), columns(*rows))
    seen = torch.bincount(drawn, minlength=vocab).double()
    p, ids = kept_tokens(logits, columns(settings_of_row))
    expected = torch.zeros(vocab, dtype=torch.float64)
    expected[ids[0]] = p[0].double() / p[0].double().sum() * count
    assert (seen[expected == 0] == 0).all()
    live = expected > 0
    chi2 = ((seen - expected)[live] ** 2 / expected[live]).sum().item()
    assert chi2 < 45  # at most 11 degrees of freedom: P(chi2 > 45) < 1e-5; the seed is fixed


def test_draws_of_different_seeds_are_independent() -> None:
    seeds, indexes = torch.arange(200).repeat_interleave(50), torch.arange(50).repeat(200)
    u = uniform(seeds, indexes).view(200, 50)
    assert abs(u.mean().item() - 0.5) < 0.01
    correlation = torch.corrcoef(u[:2].repeat(1, 1))[0, 1].abs().item()
    assert correlation < 0.5
    assert len(set(u.flatten().tolist())) == 10_000


@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_company_in_the_batch_changes_no_draw(data: st.DataObject) -> None:
    row = st.fixed_dictionaries(
        {
            "temperature": st.sampled_from([0.0, 0.5, 1.0, 2.0]),
            "top_k": st.sampled_from([0, 1, 3, 80]),
            "top_p": st.sampled_from([1.0, 0.95, 0.3]),
            "min_p": st.sampled_from([0.0, 0.1]),
            "seed": st.integers(-5, 5),
            "index": st.integers(0, 5),
        }
    )
    rows = data.draw(st.lists(row, min_size=1, max_size=6))
    logits = torch.randn(
        len(rows), 150, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    )
    together = sample(logits, columns(*rows)).tolist()
    alone = [sample(logits[i : i + 1], columns(one)).item() for i, one in enumerate(rows)]
    assert together == alone


def test_a_filtered_token_is_never_drawn_at_the_ends_of_the_unit_interval(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, float("-inf"), float("-inf")]])
    for u in (0.0, 1 - 2.0**-53):
        monkeypatch.setattr(
            "kernels.reference.uniform", lambda seed, index, u=u: torch.full(seed.shape, u).double()
        )
        assert sample(logits, columns({})).item() == (0 if u == 0 else 2)
        assert sample(logits, columns({"top_k": 2})).item() == (0 if u == 0 else 1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("settings_of_row", [{"temperature": 0}, {}, {"top_p": 0.9}], ids=str)
def test_a_row_without_finite_logits_is_refused_by_number(
    bad: float, settings_of_row: dict[str, float]
) -> None:
    logits = torch.randn(3, 100, generator=torch.Generator().manual_seed(5))
    logits[1, 40] = bad
    with pytest.raises(LogitsNotFinite) as caught:
        sample(logits, columns(*[settings_of_row] * 3))
    assert caught.value.rows == [1]


def test_a_forbidden_token_may_have_a_logit_of_minus_infinity() -> None:
    logits = torch.full((1, 100), float("-inf"))
    logits[0, 7] = 0.5
    assert [sample(logits, columns(row)).item() for row in ({"temperature": 0}, {}, {"top_p": 0.5})] == [
        7
    ] * 3
