"""The kernels of a training step against plain torch, in buffers that held NaN, at odd sizes."""

import pytest
import torch
from torch import Tensor

from kernels import gradients, reference, training

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
    ),
]
KINDS = [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)]


@pytest.fixture(params=DEVICES)
def device(request) -> torch.device:
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("interpreted where there is no GPU")
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """What a kernel does not write is NaN."""
    for name in ("empty", "empty_like"):
        real = getattr(torch, name)

        def poisoned(*args, real=real, **options):
            made = real(*args, **options)
            return made.fill_(torch.nan) if made.is_floating_point() else made

        monkeypatch.setattr(torch, name, poisoned)
    new = Tensor.new_empty

    def new_poisoned(self, *size, **options):
        made = new(self, *size, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(Tensor, "new_empty", new_poisoned)


def sample(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


def compare(op, plain, x: Tensor, error: float) -> None:
    """Values, and the gradients that a random upstream gives; `plain` in float64."""
    results = []
    for way, given in ((op, x), (plain, x.double())):
        leaf = given.clone().requires_grad_()
        out = way(leaf)
        parts = out if isinstance(out, tuple) else (out,)
        upstream = [
            sample(tuple(part.shape), x.dtype, x.device, 7 + i).to(part.dtype) for i, part in enumerate(parts)
        ]
        torch.autograd.backward(parts, upstream)
        results.append(([part.detach().double() for part in parts], leaf.grad.double()))
    (got, gradient), (expected, expected_gradient) = results
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=error, atol=error)
    torch.testing.assert_close(gradient, expected_gradient, rtol=error, atol=2 * error)


@pytest.mark.parametrize(("first", "end"), [(0, 4), (4, 5)])
def test_norm_of_heads_cut_out_of_wider_rows(device, first, end):
    weight = sample((12,), torch.float32, device, 1)
    compare(
        lambda x: training.rms_norm(x[:, first:end], weight, 1e-5),
        lambda x: reference.rms_norm(x[:, first:end], weight.double(), 1e-5),
        sample((7, 6, 12), torch.float32, device, 2),
        1e-5,
    )


@pytest.mark.parametrize(("dtype", "error"), KINDS)
@pytest.mark.parametrize("shape", [(1, 8), (13, 384), (5, 3, 24), (2, 5000)])
def test_norm(device, dtype, error, shape):
    weight = sample((shape[-1],), dtype, device, 1)
    compare(
        lambda x: training.rms_norm(x, weight, 1e-5),
        lambda x: reference.rms_norm(x, weight.double(), 1e-5),
        sample(shape, dtype, device, 2),
        error,
    )


@pytest.mark.parametrize(("dtype", "error"), KINDS)
@pytest.mark.parametrize(("tokens", "num_q", "num_kv", "half"), [(1, 1, 1, 2), (37, 6, 2, 32), (3, 5, 5, 16)])
def test_rotary(device, dtype, error, tokens, num_q, num_kv, half):
    frequencies = 10.0 ** -torch.linspace(0, 3, half)
    signed = torch.cat((-frequencies, frequencies)).to(device)
    cos, sin = reference.rope_angles(torch.arange(5, 5 + tokens, device=device), signed, dtype)
    compare(
        lambda x: training.split_rotary(x, num_q, num_kv, cos, sin),
        lambda x: _split(x, num_q, num_kv, cos.double(), sin.double()),
        sample((tokens, (num_q + 2 * num_kv) * 2 * half), dtype, device, 3),
        error,
    )


def _split(x: Tensor, num_q: int, num_kv: int, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    heads = x.view(len(x), num_q + 2 * num_kv, -1)
    turned = reference.rotary(heads[:, : num_q + num_kv], cos, sin)
    return turned[:, :num_q], turned[:, num_q:], heads[:, num_q + num_kv :]


@pytest.mark.parametrize(("dtype", "error"), KINDS)
@pytest.mark.parametrize("shape", [(1, 4), (33, 2048), (7, 6000)])
def test_gate(device, dtype, error, shape):
    compare(
        training.gated_activation, reference.gated_activation, sample(shape, dtype, device, 4), error
    )  # fmt: skip


@pytest.mark.parametrize(("dtype", "error"), KINDS)
@pytest.mark.parametrize("words", [5, 8192, 9001])
def test_loss_and_its_gradient(device, dtype, error, words):
    logits = (4 * sample((6, words), torch.float32, device, 5)).to(dtype)
    logits[3, 2] = 200.0  # far from the others, as is what must not overflow
    targets = torch.tensor([0, words - 1, 3, 2, 1, 4], device=device)
    weights = torch.tensor([1.0, 0.5, 2.0, 1.0, 0.25, 3.0], device=device)
    leaf = logits.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(leaf, targets, reduction="none")
    (expected * weights).sum().backward()
    losses = training.cross_entropy(logits, targets, weights)
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-4, atol=1e-4)
    assert leaf.grad is not None
    torch.testing.assert_close(logits.double(), leaf.grad, rtol=error, atol=error / 10)


def test_a_logit_that_is_no_number_makes_the_loss_none(device):
    logits = torch.zeros(2, 40, device=device)
    logits[1, 7] = torch.nan
    losses = training.cross_entropy(logits, torch.tensor([0, 0], device=device), torch.ones(2, device=device))
    assert losses[0].isfinite()
    assert losses[1].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_pulled", [False, True])
def test_update(device, dtype, is_pulled):
    """Three steps beside torch's own AdamW, person by person; one of four is not sound, one has no rate."""
    size, betas = 1500, (0.9, 0.99)
    rows, starts = (sample((4, size), torch.float32, device, seed) for seed in (1, 2))
    before = rows.clone()
    first, second = torch.zeros_like(rows), torch.zeros_like(rows)
    working = rows if dtype == torch.float32 else rows.to(dtype)
    rates = torch.tensor([1e-2, 1e-2, 3e-3, 0.0], device=device)
    pulls = torch.tensor([5.0, 5.0, 1.0, 1.0], device=device)
    divide_by = torch.tensor([1.0, 1.0, 4.0, 1.0], device=device)
    sound = torch.tensor([True, False, True, True], device=device)
    plain = {person: before[person].clone().requires_grad_() for person in (0, 2)}
    optimizers = {
        person: torch.optim.AdamW([leaf], lr=rates[person].item(), betas=betas, weight_decay=0.0)
        for person, leaf in plain.items()
    }
    for step in (1, 2, 3):
        gradient = sample((4, size), dtype, device, 10 + step)
        training.adam(
            rows, gradient, first, second, working, starts if is_pulled else None, rates, pulls, divide_by,
            sound, step, betas, 1e-8,
        )  # fmt: skip
        for person, leaf in plain.items():
            if is_pulled:
                leaf.data.lerp_(starts[person], (rates * pulls)[person].item())
            leaf.grad = gradient[person].float() / divide_by[person]
            optimizers[person].step()
    for person, leaf in plain.items():
        torch.testing.assert_close(rows[person], leaf.detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(rows[1], before[1])
    assert torch.equal(rows[3], before[3])
    moved = [0, 2]
    # The interpreter cuts bits off where a GPU rounds.
    torch.testing.assert_close(working[moved].float(), rows[moved], rtol=8e-3, atol=1e-6)


def test_the_processors_way_says_the_same(device):
    """`gradients`, which a processor trains with, and these are two forms of one thing."""
    x = sample((9, 64), torch.float32, device, 1)
    weight = sample((64,), torch.float32, device, 2)
    compare(
        lambda e: training.rms_norm(e, weight, 1e-6),
        lambda e: gradients.rms_norm(e, weight.double(), 1e-6),
        x,
        1e-5,
    )
    compare(training.gated_activation, gradients.gated_activation, x, 1e-5)
