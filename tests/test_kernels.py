"""The reference ops against their formulas, written out token by token."""

import math

import pytest
import torch
from torch import Tensor

import kernels

torch.manual_seed(0)


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    return bool(torch.isfinite(got).all()) and (got - expected).abs().max().item() < tolerance


def test_version_lets_transformers_pass_by() -> None:
    assert kernels.__version__ == "0.0.0"


@pytest.mark.parametrize("magnitude", [0.0, 1e-4, 1.0, 1e6])
@pytest.mark.parametrize("shape", [(1, 5), (7, 48), (3, 4, 20)])
def test_both_forms_of_rms_norm_are_its_formula(shape: tuple[int, ...], magnitude: float) -> None:
    x, weight = torch.randn(shape) * magnitude, torch.rand(shape[-1])
    before = x.clone()
    expected = x / (x.double() ** 2).mean(-1, keepdim=True).add(1e-3).sqrt().float() * weight
    assert close(kernels.rms_norm(x, weight, 1e-3), expected)
    assert close(kernels.PackedNorm(weight, 1e-3)(x), expected)
    assert torch.equal(x, before)


def test_rotary_turns_each_pair_by_its_angle() -> None:
    dim, inv_freq = 6, torch.tensor([1.0, 0.3, 0.01])
    signed_freq = torch.cat((-inv_freq, inv_freq))
    x, positions = torch.randn(4, 2, dim), torch.tensor([0, 1, 5, 700])
    cos, sin = kernels.rope_angles(positions, signed_freq, torch.float32)
    got = kernels.rotary(x, cos, sin)
    for t, position in enumerate(positions.tolist()):
        for i, frequency in enumerate(inv_freq.tolist()):
            c, s = math.cos(position * frequency), math.sin(position * frequency)
            a, b = x[t, :, i], x[t, :, i + 3]
            assert close(got[t, :, i], a * c - b * s, 1e-4)
            assert close(got[t, :, i + 3], b * c + a * s, 1e-4)


def test_gated_activation_is_its_formula() -> None:
    x = torch.randn(5, 14)
    gate, up = x[:, :7], x[:, 7:]
    assert close(kernels.gated_activation(x), gate / (1 + (-gate).exp()) * up)


def naive_attention(q: Tensor, k: Tensor, v: Tensor, position: int, window: int | None) -> Tensor:
    """One token. q [Hq, D], k and v [len, Hkv, D]."""
    first = 0 if window is None else max(0, position + 1 - window)
    out = []
    for head in range(q.shape[0]):
        kv = head // (q.shape[0] // k.shape[1])
        weights = (k[first : position + 1, kv] @ q[head] / math.sqrt(q.shape[1])).softmax(0)
        out.append(weights @ v[first : position + 1, kv])
    return torch.stack(out)


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
def test_paged_attention_reads_only_its_own_pages(heads: tuple[int, int], window: int | None) -> None:
    num_q, num_kv = heads
    dim, block_size, layers = 8, 4, 2
    lengths, new = [1, 4, 11, 9], [1, 1, 5, 9]
    slabs = torch.full((20, layers, 2, block_size, num_kv, dim), float("nan"))
    order = torch.randperm(20).tolist()
    tables = torch.zeros(len(lengths), 3, dtype=torch.int64)
    ks, vs, q = [], [], torch.randn(sum(new), num_q, dim)
    for s, length in enumerate(lengths):
        for j in range(-(-length // block_size)):
            tables[s, j] = order.pop()
        k, v = torch.randn(length, num_kv, dim), torch.randn(length, num_kv, dim)
        at = torch.arange(length)
        kernels.write_kv(k, v, slabs, 1, tables[s, at // block_size], at % block_size)
        ks.append(k)
        vs.append(v)
    starts = [0, 1, 2, 7, 16]
    got = kernels.paged_attention(q, slabs, 1, tables, lengths, starts, dim**-0.5, window)
    for s, length in enumerate(lengths):
        for i in range(new[s]):
            row = starts[s] + i
            expected = naive_attention(q[row], ks[s], vs[s], length - new[s] + i, window)
            assert close(got[row], expected)


def test_writing_all_layers_at_once_writes_what_writing_each_does() -> None:
    layers, block_size, slabs = 3, 4, torch.zeros(9, 3 * 2 * 4 * 2 * 6 + 7)
    by_layer, at_once = (
        s[:, : 3 * 2 * 4 * 2 * 6].view(9, layers, 2, block_size, 2, 6) for s in (slabs, slabs + 0)
    )
    block, offset = torch.tensor([7, 0, 3, 8]), torch.tensor([3, 0, 3, 1])
    kv = torch.randn(2 * layers, 4, 2, 6)
    for layer in range(layers):
        kernels.write_kv(kv[2 * layer], kv[2 * layer + 1], by_layer, layer, block, offset)
    kernels.write_kv_all_layers(kv, at_once, block, offset)
    assert torch.equal(by_layer, at_once)
    assert by_layer.count_nonzero() == kv.numel()


def test_lane_attention_is_attention_of_one_token_per_lane() -> None:
    q, k, v = torch.randn(3, 2, 8), torch.randn(3, 7, 8), torch.randn(3, 7, 8)
    mask = torch.zeros(3, 1, 7)
    mask[1, 0, :4] = -math.inf
    got = kernels.lane_attention(q, k.transpose(1, 2), v, mask, 8**-0.5)
    for lane in range(3):
        first = 4 if lane == 1 else 0
        for head in range(2):
            weights = (k[lane, first:] @ q[lane, head] / math.sqrt(8)).softmax(0)
            assert close(got[lane, head], weights @ v[lane, first:])


def joined(segments: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Neighbours of the same adapter as one segment."""
    found: list[tuple[int, int, int]] = []
    for n, begin, end in segments:
        if found and found[-1][0] == n and found[-1][2] == begin:
            found[-1] = (n, found[-1][1], end)
        else:
            found.append((n, begin, end))
    return found


@pytest.mark.parametrize("popularity", ["distinct", "identical", "skewed", "all base", "some base"])
@pytest.mark.parametrize("ranks", [[8, 8, 8, 8], [1, 8, 9, 64]], ids=str)
@pytest.mark.parametrize("rows", [1, 5, 63])
def test_lora_pages_is_its_formula_for_every_popularity(popularity: str, ranks: list[int], rows: int) -> None:
    in_features, widths = 24, [16, 40]
    generator = torch.Generator().manual_seed(rows)
    adapter_of_row = {
        "distinct": torch.arange(rows) % 4,
        "identical": torch.full((rows,), 2),
        "skewed": torch.randint(0, 4, (rows,), generator=generator)
        * torch.randint(0, 2, (rows,), generator=generator),
        "all base": torch.full((rows,), -1),
        "some base": torch.randint(-1, 4, (rows,), generator=generator),
    }[popularity]
    arena = torch.full((4 * 2 * 8 * 8 * 80,), float("nan"))
    tiles_a, tiles_b = torch.full((4, 2, 8), -1), torch.full((4, 2, 8), -1)
    scales = torch.rand(4, 2, generator=generator)
    matrices, free = {}, 0
    for n, rank in enumerate(ranks):
        for m, width in enumerate(widths):
            if n == 1 and m == 0:  # an adapter without this module
                continue
            a = torch.randn(rank, in_features, generator=generator)
            b = torch.randn(rank, width, generator=generator)
            matrices[n, m] = (a, b)
            for rows_of, tiles in ((a, tiles_a), (b, tiles_b)):
                for p in range(-(-rank // 8)):
                    tile = torch.zeros(8, rows_of.shape[1])
                    part = rows_of[8 * p : 8 * p + 8]
                    tile[: len(part)] = part
                    arena[free : free + tile.numel()] = tile.flatten()
                    tiles[n, m, p] = free
                    free += tile.numel() + 5
    x, y = torch.randn(rows, in_features, generator=generator), torch.randn(rows, 56, generator=generator)
    expected = y.clone()
    for t, n in enumerate(adapter_of_row.tolist()):
        for m, columns in enumerate((slice(0, 16), slice(16, 56))):
            if (n, m) in matrices:
                a, b = matrices[n, m]
                expected[t, columns] += scales[n, m] * ((x[t] @ a.t()) @ b)
    segments = [(n, t, t + 1) for t, n in enumerate(adapter_of_row.tolist()) if n >= 0]
    got = kernels.lora_pages(x, y, arena, joined(segments), tiles_a, tiles_b, scales, widths)
    assert got is y
    assert close(got, expected, 1e-3)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("exact_in_half", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 24, 25, 64, 130])
def test_a_packed_product_is_the_plain_product(rows: int, exact_in_half: bool, with_bias: bool) -> None:
    weight, bias = torch.randn(70, 41), torch.randn(70) if with_bias else None
    weight[0] *= 2.0**-14  # subnormal in float16
    if exact_in_half:
        weight = weight.half().float()
    if not kernels.PackedLinear.supports(weight):
        pytest.skip("this build of torch has no packed product")
    x = torch.randn(rows, 41)
    expected = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    assert close(kernels.PackedLinear(weight, bias)(x), expected.float(), 3e-5)
    assert close(kernels.PackedLinear(weight, bias)(x)[:, 0], expected[:, 0].float(), 1e-6)


def test_a_weight_that_sixteen_bits_would_round_is_not_rounded() -> None:
    weight = torch.ones(8, 8)
    weight[0, 0] = 1 + 2.0**-20
    if not kernels.PackedLinear.supports(weight):
        pytest.skip("this build of torch has no packed product")
    x = torch.zeros(1, 8)
    x[0, 0] = 1
    assert kernels.PackedLinear(weight, None)(x)[0, 0] == weight[0, 0]
