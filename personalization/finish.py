"""What was held out to judge a candidate is learned once the candidate was accepted.

The gate needs turns that the candidate has not seen, and those are the person's newest: the ones that a
version should know best. So who was accepted is trained once more, from where the candidate began, by the
same recipe and for as many epochs, on the candidate's rows and those that judged it. What comes of it counts
at the strength at which the candidate passed. It is looked at once more for what can be told without turns
held out (numbers, size, drift); if that fails, the candidate is published as it was judged.

That takes as long as the candidate did. Steps from the candidate on, over the newest rows and a few others,
take a fifth of it at most, but throw away what the candidate gained, or hardly learn:
`benchmarks/results/README.md` has both.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from engine.adapter_files import LoraWeights
from engine.weights import LoadedModel
from personalization.gate import Gate, GatePolicy, scaled
from personalization.prompt import Example
from personalization.train import PEOPLE_AT_ONCE, Person, Recipe, plan, train


@dataclass(frozen=True, slots=True)
class Accepted:
    """Whom an accepted candidate was trained as, the rows of the turns held out, and the strength at
    which it passed."""

    person: Person
    newest: Sequence[Example]
    strength: float = 1.0


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
    chosen = [each for each in accepted if each is not None]
    trained = train(model, [_anew(each, recipe) for each in chosen], recipe, people_at_once=people_at_once)
    learned = [scaled(each.weights, one.strength) for each, one in zip(trained, chosen, strict=True)]
    faults = gate.faults(learned, policy)
    done = (
        weights if fault is None and each.error is None and each.steps else None
        for weights, each, fault in zip(learned, trained, faults, strict=True)
    )
    return [None if each is None else next(done) for each in accepted]


def _anew(accepted: Accepted, recipe: Recipe) -> Person:
    """Whom to train: on all rows, for the candidate's number of epochs. By itself, the recipe might have
    fewer for more rows."""
    person = accepted.person
    epochs = 1 + max((step.epoch for step in plan(person.examples, recipe, person.seed)), default=0)
    own = replace(recipe, epochs=epochs, most_steps=None)
    return replace(person, examples=[*person.examples, *accepted.newest], recipe=own)
