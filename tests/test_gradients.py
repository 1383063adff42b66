import pytest
import torch
from torch import Tensor

import kernels
from kernels import reference
from kernels.reference import rope_angles

FREQUENCIES = 10.0 ** -torch.linspace(0, 3, 4)
COS, SIN = rope_angles(torch.arange(7), torch.cat((-FREQUENCIES, FREQUENCIES)), torch.float64)
WEIGHT = torch.linspace(0.5, 1.5, 16, dtype=torch.float64)
OPS = {
    "rms_norm": (lambda room, x: room.rms_norm(x, WEIGHT.to(x.dtype), 1e-5), (7, 16)),
    "rotary": (lambda room, x: room.rotary(x, COS.to(x.dtype), SIN.to(x.dtype)), (7, 3, 8)),
    "gated_activation": (lambda room, x: room.gated_activation(x), (7, 24)),
}


def sample(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]
)
def test_values_and_gradients_are_those_of_the_reference(name: str, dtype: torch.dtype, error: float):
    op, shape = OPS[name]
    upstream = sample(op(reference, sample(shape, dtype, 1)).shape, dtype, 2)
    results = []
    for room in (kernels, reference):
        x = sample(shape, dtype, 1).requires_grad_()
        y = op(room, x)
        y.backward(upstream)
        results.append((y.detach(), x.grad))
    (y, grad), (expected_y, expected_grad) = results
    torch.testing.assert_close(y, expected_y, rtol=error, atol=error)
    torch.testing.assert_close(grad, expected_grad, rtol=error, atol=error)


@pytest.mark.parametrize("name", OPS)
def test_slices_of_a_wider_tensor_give_the_same(name: str):
    op, shape = OPS[name]
    wide = sample((shape[0], 2, *shape[1:]), torch.float32, 3).requires_grad_()
    op(kernels, wide[:, 1]).sum().backward()
    whole = wide.detach()[:, 1].clone().requires_grad_()
    op(reference, whole).sum().backward()
    assert wide.grad is not None
    torch.testing.assert_close(wide.grad[:, 1], whole.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", OPS)
def test_without_a_gradient_to_take_the_reference_runs(name: str):
    op, shape = OPS[name]
    x = sample(shape, torch.bfloat16, 4)
    assert op(kernels, x).equal(op(reference, x))
