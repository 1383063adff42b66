"""Logits → token ids, on the device the logits are on: the draws of `kernels.reference.sample_rows`.

Stateless: the draw for a token depends on its seed, its output index and its logits. A reply that is
preempted, resumed after a crash or batched with other company draws the same tokens, as far as its logits are
the same.
"""

import torch
from torch import Tensor

from engine.batch import SamplingColumns
from kernels.reference import sample_rows


class LogitsNotFinite(ArithmeticError):
    """Rows of the logits from which no token can be drawn, as they hold NaN or infinity: `rows`."""

    def __init__(self, rows: list[int]) -> None:
        super().__init__(f"expected finite logits, got NaN or infinity in rows {rows}")
        self.rows = rows


def sample(logits: Tensor, columns: SamplingColumns) -> Tensor:
    """One token id per row. logits [R, V] float32, finite or -inf -> [R] int64. Raises LogitsNotFinite."""
    token_ids = sample_rows(logits, *column_tensors(columns, logits.device))
    if (token_ids < 0).any():
        raise LogitsNotFinite((token_ids < 0).nonzero()[:, 0].tolist())
    return token_ids


def column_tensors(columns: SamplingColumns, device: torch.device | str) -> list[Tensor]:
    """temperature, top_p, top_k, min_p, seed and index as `sample_rows` takes them."""
    kinds = dict.fromkeys(("temperature", "top_p", "min_p"), torch.float32)
    return [
        torch.tensor(getattr(columns, name), dtype=kinds.get(name, torch.int64), device=device)
        for name in ("temperature", "top_p", "top_k", "min_p", "seed", "index")
    ]
