"""The decoder against transformers, for a tiny random model of each family."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import kernels
from engine.model import GROUPS, Decoder, group_shape
from engine.weights import load_model
from tests.tiny_models import FAMILIES, VOCAB, save_random


class Whole:
    """Attends over one sequence that is given at once."""

    def __init__(self, decoder: Decoder) -> None:
        self.config = decoder.config

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return kernels.attend_one(q, k, v, self.config.head_dim**-0.5, self.config.window(layer))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers_for_each_family(family: str, tmp_path: Path) -> None:
    theirs = save_random(tmp_path, FAMILIES[family]())
    ours = load_model(tmp_path)
    ids = torch.randint(0, VOCAB, (60,))
    with torch.inference_mode():
        hidden = ours.decoder(ids, torch.arange(60), Whole(ours.decoder))
        difference = (ours.decoder.logits(hidden) - theirs(ids[None]).logits[0]).abs().max()
    assert difference < 1e-4


class Dense:
    """LoRA of one adapter for all rows, as training has it: out of place, differentiable."""

    def __init__(self, decoder: Decoder) -> None:
        torch.manual_seed(1)
        self.a, self.b = {}, {}
        for layer in range(decoder.config.num_layers):
            for group in GROUPS:
                out_features, in_features = group_shape(decoder.config, group)
                self.a[layer, group] = (torch.randn(4, in_features) * 0.1).requires_grad_()
                self.b[layer, group] = (torch.randn(out_features, 4) * 0.1).requires_grad_()

    def __call__(self, layer: int, group: str, x: Tensor, y: Tensor) -> Tensor:
        a, b = self.a[layer, group], self.b[layer, group]
        return y + ((x @ a.t().to(x.dtype)) @ b.t().to(x.dtype))


@pytest.mark.parametrize("family", ["llama3", "mistral", "qwen2", "qwen3"])
def test_gradients_reach_every_adapter_matrix_and_no_base_weight(family: str, tmp_path: Path) -> None:
    save_random(tmp_path, FAMILIES[family]())
    decoder = load_model(tmp_path).decoder
    lora, ids = Dense(decoder), torch.randint(0, VOCAB, (11,))

    def loss() -> Tensor:
        hidden = decoder(ids, torch.arange(11), Whole(decoder), lora)
        return torch.nn.functional.cross_entropy(decoder.logits(hidden)[:-1], ids[1:])

    loss().backward()
    assert all(parameter.grad is None for parameter in decoder.parameters())
    for matrices in (lora.a, lora.b):
        for key, matrix in matrices.items():
            assert matrix.grad is not None, key
            assert matrix.grad.abs().max() > 0, key
    key = (0, "gate_up")  # one matrix against finite differences
    matrix, step = lora.a[key], 1e-2
    with torch.no_grad():
        matrix[1, 2] += step
        above = loss()
        matrix[1, 2] -= 2 * step
        below = loss()
    assert matrix.grad is not None
    assert ((above - below) / (2 * step)).item() == pytest.approx(
        matrix.grad[1, 2].item(), rel=0.05, abs=1e-4
    )


def test_inference_and_training_compute_the_same(tmp_path: Path) -> None:
    save_random(tmp_path, FAMILIES["qwen3"]())
    decoder = load_model(tmp_path).decoder
    ids = torch.randint(0, VOCAB, (11,))
    with_grad = decoder(ids, torch.arange(11), Whole(decoder), Dense(decoder)).detach()
    with torch.inference_mode():
        without = decoder(ids, torch.arange(11), Whole(decoder), Dense(decoder))
    assert (with_grad - without).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["llama3", "qwen3"])
def test_bfloat16_stays_near_float32(family: str, tmp_path: Path) -> None:
    save_random(tmp_path, FAMILIES[family]())
    ids, positions = torch.randint(0, VOCAB, (60,)), torch.arange(1000, 1060)
    answers = []
    for dtype in (torch.float32, torch.bfloat16):
        decoder = load_model(tmp_path, dtype=dtype).decoder
        with torch.inference_mode():
            logits = decoder.logits(decoder(ids, positions, Whole(decoder), Dense(decoder)))
        assert logits.dtype == torch.float32
        answers.append(logits)
    relative = (answers[0] - answers[1]).norm() / answers[0].norm()
    assert relative < 0.08
