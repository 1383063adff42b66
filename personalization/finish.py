"""What was held out to judge a candidate is learned once the candidate was accepted.

The gate needs turns that the candidate has not seen, and those are the person's newest: the ones that a
version should know best. So an accepted candidate goes on for a little while, over the turns that judged it
and as many tokens of the older ones. It is looked at once more for what can be told without turns held out
(numbers, size, drift); if that fails, the candidate is published as it was judged.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from engine.adapter_files import LoraWeights
from engine.weights import LoadedModel
from personalization.gate import Gate, GatePolicy
from personalization.prompt import Example
from personalization.train import PEOPLE_AT_ONCE, Person, Recipe, train


@dataclass(frozen=True, slots=True)
class Accepted:
    """A candidate as it was judged, the rows it was trained on, and those of the turns that judged it."""

    weights: LoraWeights
    train: Sequence[Example]
    newest: Sequence[Example]
    seed: int


def finish(
    model: LoadedModel,
    gate: Gate,
    accepted: Sequence[Accepted | None],
    recipe: Recipe,
    policy: GatePolicy,
    *,
    people_at_once: int = PEOPLE_AT_ONCE,
) -> list[LoraWeights | None]:
    """Each candidate with its newest turns learned; None where there is none, or that cannot be published."""
    people = [Person(_rows(each), each.seed, each.weights) for each in accepted if each is not None]
    trained = train(model, people, recipe, people_at_once=people_at_once)
    faults = gate.faults([each.weights for each in trained], policy)
    done = (
        each.weights if fault is None and each.error is None and each.steps else None
        for each, fault in zip(trained, faults, strict=True)
    )
    return [None if each is None else next(done) for each in accepted]


def _rows(accepted: Accepted) -> list[Example]:
    """The newest rows, and as many tokens of the others, drawn at random."""
    rows = list(accepted.newest)
    room = sum(len(row.token_ids) for row in rows)
    older = list(accepted.train)
    random.Random(accepted.seed).shuffle(older)
    for row in older:
        if room <= 0:
            break
        room -= len(row.token_ids)
        rows.append(row)
    return rows
