"""Logits → token ids. Stateless: the draw for a token depends on its seed, its output index and its logits.

A reply that is preempted, resumed after a crash or batched with other company draws the same tokens, as far
as its logits are the same.
"""

import torch
from torch import Tensor

from engine.batch import SamplingColumns

_MASK = (1 << 64) - 1


def sample(logits: Tensor, columns: SamplingColumns) -> Tensor:
    """One token id per row. logits [R, V] float32, finite or -inf -> [R] int64.

    temperature 0 takes the largest logit. Otherwise p = softmax(logits / temperature), and of the tokens in
    falling order of p those are kept that are among the first top_k, that have less than top_p before them,
    and whose p is at least min_p times the largest; the token is where the kept p, added up in that order,
    first exceeds u times their sum, with u = uniform(seed, index).
    """
    if not any(columns.temperature):
        return logits.argmax(-1)
    rows = [row for row, temperature in enumerate(columns.temperature) if temperature > 0]
    token_ids = logits.argmax(-1)
    token_ids[rows] = _draw(logits[rows], _select(columns, rows))
    return token_ids


def filtered(logits: Tensor, columns: SamplingColumns) -> tuple[Tensor, Tensor]:
    """(probabilities kept, falling, zero where filtered out [R, V]; their token ids [R, V])."""
    device = logits.device
    temperature = torch.tensor(columns.temperature, device=device, dtype=torch.float32)[:, None]
    top_k = torch.tensor(columns.top_k, device=device)[:, None]
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature
    # stable: equal logits keep the order of their ids whatever the batch around them
    scaled, ids = scaled.sort(dim=-1, descending=True, stable=True)
    p = scaled.softmax(-1)
    keep = p >= p[:, :1] * torch.tensor(columns.min_p, device=device, dtype=torch.float32)[:, None]
    if any(k > 0 for k in columns.top_k):
        keep &= (torch.arange(p.shape[1], device=device) < top_k) | (top_k == 0)
    if any(top_p < 1 for top_p in columns.top_p):
        top_p = torch.tensor(columns.top_p, device=device, dtype=torch.float64)[:, None]
        before = p.double().cumsum(-1) - p
        keep &= (before < top_p) | (top_p == 1)
    return p * keep, ids


def uniform(seed: Tensor, index: Tensor) -> Tensor:
    """u in [0, 1), float64: the top 53 bits of splitmix64 at state hash(seed) + index. Both int64, any value.

    splitmix64 (Steele, Lea & Flood 2014) passes the usual batteries on consecutive states.
    """
    state = _mix(seed) + index * _signed(0x9E3779B97F4A7C15)
    return _shift_right(_mix(state), 11).double() * 2.0**-53


def _draw(logits: Tensor, columns: SamplingColumns) -> Tensor:
    p, ids = filtered(logits, columns)
    u = uniform(torch.tensor(columns.seed), torch.tensor(columns.index)).to(logits.device)
    cumulated = p.double().cumsum(-1)
    # searchsorted "right" skips entries that add nothing; rounding must not lead past the last kept one
    at = torch.searchsorted(cumulated, (u * cumulated[:, -1])[:, None], right=True)
    last = (p > 0).sum(-1, keepdim=True) - 1
    return ids.gather(1, torch.minimum(at, last))[:, 0]


def _select(columns: SamplingColumns, rows: list[int]) -> SamplingColumns:
    return SamplingColumns(
        *(
            tuple(column[row] for row in rows)
            for column in (
                columns.temperature,
                columns.top_p,
                columns.top_k,
                columns.min_p,
                columns.seed,
                columns.index,
            )
        )
    )


def _mix(state: Tensor) -> Tensor:
    """The output function of splitmix64. Products of int64 wrap around, as the algorithm wants."""
    z = state + _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shift_right(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift_right(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift_right(z, 31)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Shift as unsigned: int64 would draw in copies of the sign."""
    return (z >> bits) & (_MASK >> bits)


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >> 63 else constant
