"""Is the candidate better than what serves now? Judged on the person's newest turns, none of them trained on,
each behind the context that serving would put before it. Only what wins there is published.

Per held-out turn i: n_i tokens and d_i = loss before - loss after, summed over its tokens. The gain is
G = sum d / sum n, in nats per token. Turns of a person differ widely and there are few of them, so G comes
with the standard error of a ratio over turns, s = sqrt(m / (m - 1) * sum (d_i - G n_i)²) / sum n for m turns,
and is held against Student's t: few turns need a larger gain.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

import torch
from torch import Tensor

from engine.adapter_files import LoraWeights
from engine.model import GROUP_MODULES, ModelConfig, module_shape
from engine.weights import LoadedModel
from personalization.prompt import Example
from personalization.score import token_losses


@dataclass(frozen=True, slots=True)
class GatePolicy:
    """`confidence`: the gain must be above zero with this certainty, one-sided. `min_gain` (nats per token)
    is what is worth a new version at all. `max_norm` bounds |scale B A| / |W| of every module."""

    confidence: float = 0.8
    min_gain: float = 0.0
    min_turns: int = 4
    max_norm: float = 2.0

    def __post_init__(self) -> None:
        if not 0.5 <= self.confidence < 1:
            raise ValueError(f"confidence: expected 0.5 to below 1, got {self.confidence}")
        if self.min_turns < 2:
            raise ValueError(f"min_turns: expected at least 2, got {self.min_turns}")


@dataclass(frozen=True, slots=True)
class Verdict:
    """`reason` is a sentence for the person; `numbers` are finite, and only those that could be taken."""

    accepted: bool
    reason: str
    numbers: dict[str, float] = field(default_factory=dict)


def judge(
    model: LoadedModel,
    candidate: LoraWeights,
    serving: LoraWeights | None,
    held_out: Sequence[Example],
    policy: GatePolicy,
) -> Verdict:
    """Compare `candidate` with `serving` (None: the bare base) on `held_out`."""
    fault = _fault(model, candidate, policy)
    if fault is not None:
        return Verdict(False, fault)
    before, after = (token_losses(model, held_out, each) for each in (serving, candidate))
    return weigh(held_out, before, after, policy)


def weigh(
    held_out: Sequence[Example], before: Sequence[Tensor], after: Sequence[Tensor], policy: GatePolicy
) -> Verdict:
    """The verdict on known losses: `before` and `after`, of each row, as `token_losses` gives them."""
    lengths = [_turn_lengths(example) for example in held_out]
    turns = sum(map(len, lengths))
    counted = {"turns": float(turns), "tokens": float(sum(map(sum, lengths)))}
    if turns < policy.min_turns:
        return Verdict(
            False, f"too little to judge by: {turns} held-out turns of {policy.min_turns} needed", counted
        )
    if not all(losses.isfinite().all() for losses in after):
        return Verdict(False, "refused: its loss on held-out turns is not a finite number", counted)
    sizes = torch.tensor([size for row in lengths for size in row], dtype=torch.float64)
    return _weigh(_per_turn(before, lengths), _per_turn(after, lengths), sizes, policy)


def _weigh(before: Tensor, after: Tensor, sizes: Tensor, policy: GatePolicy) -> Verdict:
    """`before` and `after`: summed loss of each turn; `sizes`: its tokens. All float64."""
    turns, tokens = len(sizes), float(sizes.sum())
    better = before - after
    gain = float(better.sum()) / tokens
    spread = float((better - gain * sizes).square().sum())
    error = math.sqrt(turns / (turns - 1) * spread) / tokens
    reach = student_quantile(policy.confidence, turns - 1) * error
    numbers = {
        "turns": float(turns),
        "tokens": tokens,
        "loss_before": float(before.sum()) / tokens,
        "loss_after": float(after.sum()) / tokens,
        "gain": gain,
        "gain_low": gain - reach,
        "gain_high": gain + reach,
        "confidence": 2 * policy.confidence - 1,  # of the interval, which leaves out as much on both sides
    }
    measured = (
        f"on {turns} held-out turns the loss per token went from {numbers['loss_before']:.3f} to "
        f"{numbers['loss_after']:.3f} (gain {gain:+.3f}, {numbers['confidence']:.0%} interval "
        f"{numbers['gain_low']:+.3f} to {numbers['gain_high']:+.3f})"
    )
    if gain - reach > 0 and gain >= policy.min_gain:
        return Verdict(True, f"better: {measured}", numbers)
    if gain + reach < 0:
        return Verdict(False, f"worse: {measured}", numbers)
    return Verdict(False, f"no measurable change yet: {measured}", numbers)


def student_quantile(probability: float, freedom: int) -> float:
    """The value that Student's t with `freedom` degrees stays below with `probability`.

    Cornish-Fisher: z + (z³+z)/4v + (5z⁵+16z³+3z)/96v²; within 4 % from 3 degrees on at up to 0.975.
    """
    z = NormalDist().inv_cdf(probability)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def _turn_lengths(example: Example) -> list[int]:
    """How many tokens each learned turn of the row has. Between two turns there are always tokens of the
    frame, which are not learned, so a turn is an unbroken stretch of the mask."""
    lengths: list[int] = []
    inside = False
    for learn in example.learn_mask[1:]:
        if learn and not inside:
            lengths.append(0)
        if learn:
            lengths[-1] += 1
        inside = learn
    return lengths


def _per_turn(losses: Sequence[Tensor], lengths: Sequence[Sequence[int]]) -> Tensor:
    return torch.stack(
        [
            turn.sum()
            for row, sizes in zip(losses, lengths, strict=True)
            for turn in torch.split(row.to(torch.float64), list(sizes))
        ]
    )


def _fault(model: LoadedModel, candidate: LoraWeights, policy: GatePolicy) -> str | None:
    """Why the weights themselves are refused, if they are."""
    for m in candidate.modules:
        if not (torch.isfinite(m.a).all() and torch.isfinite(m.b).all()):
            return f"refused: {m.module} of layer {m.layer} holds numbers that are not finite"
        a, b = m.a.double(), m.b.double()
        # |B A|² = tr(A^T B^T B A) = sum of (B^T B) * (A A^T), without the [out, in] product.
        change = abs(m.scale) * math.sqrt(max(0.0, float(((b.t() @ b) * (a @ a.t())).sum())))
        base = float(_base_weight(model, m.layer, m.module).float().norm())
        if change > policy.max_norm * base:
            return (
                f"refused: {m.module} of layer {m.layer} grew to {change / base:.1f} times the base's norm, "
                f"at most {policy.max_norm:g} is allowed"
            )
    return None


def _base_weight(model: LoadedModel, layer: int, module: str) -> Tensor:
    for group, modules in GROUP_MODULES.items():
        if module in modules:
            begin = _first_row(model.config, modules, module)
            weight: Tensor = getattr(model.decoder.layers[layer], group).weight
            return weight[begin : begin + module_shape(model.config, module)[0]]
    raise KeyError(module)


def _first_row(config: ModelConfig, modules: Sequence[str], module: str) -> int:
    return sum(module_shape(config, each)[0] for each in modules[: modules.index(module)])
