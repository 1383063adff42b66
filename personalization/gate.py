"""Is the candidate better than what serves now? Judged on the person's newest turns, none of them trained on,
each behind the context that serving would put before it. Only what wins there is published.

Per held-out turn i: n_i tokens and d_i = loss before - loss after, summed over its tokens. The gain is
G = sum d / sum n, in nats per token. Turns of a person differ widely and there are few of them, so G comes
with the standard error of a ratio over turns, s = sqrt(m / (m - 1) * sum (d_i - G n_i)²) / sum n for m turns,
and is held against Student's t: few turns need a larger gain.

What wins there is refused all the same when its numbers are not finite, when it outgrew the base's weights,
or when it drifts: its loss on neutral text, less the base's, says what it costs elsewhere.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import NormalDist

import torch
from torch import Tensor

from engine.adapter_files import LoraWeights
from engine.model import GROUP_MODULES, ModelConfig, module_shape
from engine.weights import LoadedModel
from personalization.prompt import Example
from personalization.score import losses_of_many


@dataclass(frozen=True, slots=True)
class GatePolicy:
    """`confidence`: the gain must be above zero with this certainty, one-sided. `min_gain` (nats per token)
    is what is worth a new version at all. `max_norm` bounds |scale B A| / |W| of every module, `max_drift`
    what is lost on neutral text against the bare base, in nats per token. `strengths`: what does not pass is
    tried again with its delta scaled down, in this order; a candidate that learned too much of its own rows
    is often better, and drifts less, at part of its strength."""

    confidence: float = 0.8
    min_gain: float = 0.0
    min_turns: int = 4
    max_norm: float = 2.0
    max_drift: float = 0.02
    strengths: tuple[float, ...] = (1.0, 0.7, 0.45)

    def __post_init__(self) -> None:
        if not 0.5 <= self.confidence < 1:
            raise ValueError(f"confidence: expected 0.5 to below 1, got {self.confidence}")
        if self.min_turns < 2:
            raise ValueError(f"min_turns: expected at least 2, got {self.min_turns}")
        if not self.strengths or not all(0 < strength <= 1 for strength in self.strengths):
            raise ValueError(f"strengths: expected some above 0 and up to 1, got {self.strengths}")
        for name in ("max_norm", "max_drift"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class Verdict:
    """`reason` is a sentence for the person; `numbers` are finite, and only those that could be taken. What
    is accepted is the candidate at `strength`."""

    accepted: bool
    reason: str
    numbers: dict[str, float] = field(default_factory=dict)
    strength: float = 1.0


@dataclass(frozen=True, slots=True)
class Case:
    """Is `candidate` better than `serving` (None: the bare base) on the rows held out?"""

    candidate: LoraWeights
    serving: LoraWeights | None
    held_out: Sequence[Example]


class Gate:
    """The gate before one base model. `neutral`: rows that an adapter should leave as they were."""

    def __init__(self, model: LoadedModel, neutral: Sequence[Example]) -> None:
        self._model = model
        self._neutral = neutral
        self._norms: dict[tuple[int, str], float] = {}

    def judge(self, cases: Sequence[Case], policy: GatePolicy) -> list[Verdict]:
        """A verdict on each case; computed together, but none depends on the others. Of a candidate that
        passes at no strength, the verdict on the first is given."""
        found: dict[int, Verdict] = {}
        for strength in policy.strengths:
            left = [place for place in range(len(cases)) if place not in found or not found[place].accepted]
            tried = [
                replace(cases[place], candidate=scaled(cases[place].candidate, strength)) for place in left
            ]
            for place, verdict in zip(left, self._judge_once(tried, policy), strict=True):
                if verdict.accepted or place not in found:
                    found[place] = replace(verdict, strength=strength)
        return [found[place] for place in range(len(cases))]

    def faults(self, candidates: Sequence[LoraWeights], policy: GatePolicy) -> list[str | None]:
        """Why each would be refused whatever it gains: numbers, size, drift. None: it is sound."""
        found = [self._fault(candidate, policy) for candidate in candidates]
        sound = [place for place, fault in enumerate(found) if fault is None]
        drifts = self.drifts([candidates[place] for place in sound])
        for place, drift in zip(sound, drifts, strict=True):
            verdict = settle(Verdict(True, ""), drift, policy)
            found[place] = None if verdict.accepted else verdict.reason
        return found

    def _judge_once(self, cases: Sequence[Case], policy: GatePolicy) -> list[Verdict]:
        verdicts = {
            place: Verdict(False, fault)
            for place, case in enumerate(cases)
            if (fault := self._fault(case.candidate, policy)) is not None
        }
        sound = [place for place in range(len(cases)) if place not in verdicts]
        chosen = [cases[place] for place in sound]
        before = losses_of_many(self._model, [(case.serving, case.held_out) for case in chosen])
        after = losses_of_many(self._model, [(case.candidate, case.held_out) for case in chosen])
        drifts = self.drifts([case.candidate for case in chosen])
        for place, served, offered, drift in zip(sound, before, after, drifts, strict=True):
            verdicts[place] = settle(weigh(cases[place].held_out, served, offered, policy), drift, policy)
        return [verdicts[place] for place in range(len(cases))]

    def drifts(self, adapters: Sequence[LoraWeights]) -> list[float]:
        """What each loses on the neutral rows against the bare base, nats per token; NaN where its loss is
        none."""
        losses = losses_of_many(self._model, [(adapter, self._neutral) for adapter in adapters])
        return [float(torch.cat(rows).mean()) - self._calm for rows in losses]

    @cached_property
    def _calm(self) -> float:
        (rows,) = losses_of_many(self._model, [(None, self._neutral)])
        return float(torch.cat(rows).mean())

    def _fault(self, candidate: LoraWeights, policy: GatePolicy) -> str | None:
        """Why the weights themselves are refused, if they are."""
        for m in candidate.modules:
            if not (torch.isfinite(m.a).all() and torch.isfinite(m.b).all()):
                return f"refused: {m.module} of layer {m.layer} holds numbers that are not finite"
            a, b = m.a.double(), m.b.double()
            # |B A|² = tr(A^T B^T B A) = sum of (B^T B) * (A A^T), without the [out, in] product.
            change = abs(m.scale) * math.sqrt(max(0.0, float(((b.t() @ b) * (a @ a.t())).sum())))
            base = self._norm(m.layer, m.module)
            if change > policy.max_norm * base:
                return (
                    f"refused: {m.module} of layer {m.layer} grew to {change / base:.1f} times the base's "
                    f"norm, at most {policy.max_norm:g} is allowed"
                )
        return None

    def _norm(self, layer: int, module: str) -> float:
        if (layer, module) not in self._norms:
            self._norms[layer, module] = float(_base_weight(self._model, layer, module).float().norm())
        return self._norms[layer, module]


def scaled(weights: LoraWeights, strength: float) -> LoraWeights:
    """The adapter with its delta times `strength`."""
    return LoraWeights(tuple(replace(m, scale=m.scale * strength) for m in weights.modules))


def settle(verdict: Verdict, drift: float, policy: GatePolicy) -> Verdict:
    """The verdict with the drift among its numbers, and refused if that is too much."""
    if not math.isfinite(drift):
        return Verdict(False, "refused: its loss on neutral text is not a finite number", verdict.numbers)
    numbers = verdict.numbers | {"drift": drift}
    if drift > policy.max_drift:
        return Verdict(
            False,
            f"refused: on neutral text the loss per token rose by {drift:.3f}, at most "
            f"{policy.max_drift:g} is allowed",
            numbers,
        )
    return Verdict(verdict.accepted, verdict.reason, numbers)


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
    for whose, rows in (("its", after), ("the serving version's", before)):
        if not all(losses.isfinite().all() for losses in rows):
            return Verdict(False, f"refused: {whose} loss on held-out turns is not a finite number", counted)
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
    """How many tokens each learned turn of the row has: a turn is an unbroken stretch of the mask (see
    `Renderer.example`)."""
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


def _base_weight(model: LoadedModel, layer: int, module: str) -> Tensor:
    for group, modules in GROUP_MODULES.items():
        if module in modules:
            begin = _first_row(model.config, modules, module)
            weight: Tensor = getattr(model.decoder.layers[layer], group).weight
            return weight[begin : begin + module_shape(model.config, module)[0]]
    raise KeyError(module)


def _first_row(config: ModelConfig, modules: Sequence[str], module: str) -> int:
    return sum(module_shape(config, each)[0] for each in modules[: modules.index(module)])
