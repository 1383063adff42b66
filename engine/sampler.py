"""Logits → token ids. Stateless: the draw for a token depends on its seed, its output index and its logits.

A reply that is preempted, resumed after a crash or batched with other company draws the same tokens, as far
as its logits are the same.
"""

import torch
from torch import Tensor

from engine.batch import SamplingColumns

_FIRST_WIDTH = 64  # sorted tokens looked at first; nearly all filters keep fewer


class LogitsNotFinite(ArithmeticError):
    """Rows of the logits from which no token can be drawn, as they hold NaN or infinity: `rows`."""

    def __init__(self, rows: list[int]) -> None:
        super().__init__(f"expected finite logits, got NaN or infinity in rows {rows}")
        self.rows = rows


def sample(logits: Tensor, columns: SamplingColumns) -> Tensor:
    """One token id per row. logits [R, V] float32, finite or -inf -> [R] int64. Raises LogitsNotFinite.

    temperature 0 takes the largest logit. Otherwise p = softmax(logits / temperature) is filtered (see
    `filtered`), and the token is where the kept p, added up, first exceeds u times their sum, with
    u = uniform(seed, index). They are added up in falling order if anything filters, else in order of id.
    """
    drawn = [row for row, temperature in enumerate(columns.temperature) if temperature > 0]
    token_ids = logits.argmax(-1)
    finite = logits.gather(1, token_ids[:, None]).isfinite()[:, 0]  # a NaN counts as the largest
    if not finite.all():
        raise LogitsNotFinite((~finite).nonzero()[:, 0].tolist())
    if not drawn:
        return token_ids
    filtering = [row for row in drawn if _filters(columns, row)]
    plain = [row for row in drawn if not _filters(columns, row)]
    if plain:
        p = _probabilities(logits, columns, plain)
        token_ids[plain] = _invert(p, columns, plain)
    if filtering:
        p, ids = filtered(logits, columns, filtering)
        token_ids[filtering] = ids.gather(1, _invert(p, columns, filtering)[:, None])[:, 0]
    return token_ids


def filtered(logits: Tensor, columns: SamplingColumns, rows: list[int]) -> tuple[Tensor, Tensor]:
    """(p [n, W] in falling order, 0 where filtered out; token ids [n, W]) of these n rows of logits [R, V].

    Of the tokens in falling order of p are kept: the first top_k; of those, renormalised, the ones that have
    less than top_p before them; of those the ones whose p is at least min_p times the largest. All three
    keep a beginning, so W sorted tokens are enough once something is cut off before the last of them.
    """
    all_p = _probabilities(logits, columns, rows)
    vocab, device = all_p.shape[1], all_p.device
    top_k = torch.tensor([columns.top_k[row] or vocab for row in rows], device=device)[:, None]
    top_p = torch.tensor([columns.top_p[row] for row in rows], device=device)[:, None]
    min_p = torch.tensor([columns.min_p[row] for row in rows], device=device)[:, None]
    # top_p is a share of the mass of the first top_k, so those must be in view.
    width = min(max(_FIRST_WIDTH, *(columns.top_k[row] for row in rows)), vocab)
    while True:
        p, ids = _largest(all_p, width)
        places = torch.arange(width, device=device)
        within = p.double() * (places < top_k)
        total = torch.where(top_k < vocab, within.sum(-1, keepdim=True), 1.0)
        before = within.cumsum(-1) - within
        # top_p = 1 keeps all: rounding could let `before` reach 1 too early
        keep = (places < top_k) & ((before < top_p * total) | (top_p == 1)) & (p >= p[:, :1] * min_p)
        if width == vocab or not keep[:, -1].any():
            return p * keep, ids
        width = min(width * 8, vocab) if width == _FIRST_WIDTH else vocab


def uniform(seed: Tensor, index: Tensor) -> Tensor:
    """u in [0, 1), float64: the top 53 bits of splitmix64 at state mix(seed) + index * golden. Both int64.

    splitmix64 (Steele, Lea & Flood, 2014) is made for consecutive states; mixing the seed first keeps the
    streams of nearby seeds apart.
    """
    return _shift_right(_mix(_mix(seed) + index * _signed(0x9E3779B97F4A7C15)), 11).double() * 2.0**-53


def _filters(columns: SamplingColumns, row: int) -> bool:
    return columns.top_k[row] > 0 or columns.top_p[row] < 1 or columns.min_p[row] > 0


def _probabilities(logits: Tensor, columns: SamplingColumns, rows: list[int]) -> Tensor:
    if len(rows) < len(columns):
        logits = logits[rows]
    temperature = torch.tensor([columns.temperature[row] for row in rows], device=logits.device)[:, None]
    # Subtract first: logits / 1e-6 would overflow where the difference to the largest does not matter.
    return ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)


def _largest(p: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The `width` largest of each row, falling; equal ones in order of id, whatever the company."""
    if width == p.shape[1]:
        values, ids = p.sort(stable=True, dim=-1, descending=True)
        return values, ids
    ids = p.topk(width, dim=-1).indices.sort(-1).values
    values, order = p.gather(1, ids).sort(stable=True, dim=-1, descending=True)
    return values, ids.gather(1, order)


def _invert(p: Tensor, columns: SamplingColumns, rows: list[int]) -> Tensor:
    """Per row of p [n, W] the place where the running sum first exceeds u times the sum -> [n]."""
    seeds, indexes = [columns.seed[row] for row in rows], [columns.index[row] for row in rows]
    u = uniform(torch.tensor(seeds), torch.tensor(indexes)).to(p.device)
    sums = p.double().cumsum(-1)
    total = sums[:, -1]
    # u * total may round up to total, which no running sum exceeds.
    target = torch.minimum(u * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(sums, target[:, None], right=True)[:, 0]


def _mix(state: Tensor) -> Tensor:
    """The output function of splitmix64. Products of int64 wrap around, as the algorithm wants."""
    z = state + _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shift_right(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift_right(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift_right(z, 31)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Shift as unsigned: int64 would draw in copies of the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >> 63 else constant
