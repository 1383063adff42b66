"""The decoder against transformers, for a tiny random model of each family."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import kernels
from engine.model import Decoder
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
