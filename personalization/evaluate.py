"""What learning is worth on histories that nobody has seen: each person's turns are cut by time, 70 % to
learn from, 10 % for the gate, 20 % to test on, and go through the service's own choice of rows, training,
gate, adapter files and prompts. Knows no corpus: whatever `history.parse` reads can be measured.

Losses are nats per token of the person's own held-out turns, those left out that repeat an older one's words.
Means are over people, so that nobody counts more for having said more, each with the 95 % interval of a
bootstrap over people (Efron and Tibshirani, 1993). The population adapter of a person is trained on others of
the file only: what it gains is the subject's, not theirs.
"""

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from engine.adapter_files import LoraWeights, read_adapter, write_adapter
from engine.weights import LoadedModel
from personalization.examples import cut_by_time, serving_rows, training_rows, words
from personalization.finish import Accepted, finish
from personalization.gate import Case, Gate, Verdict, scaled
from personalization.history import Turn, effective, learned
from personalization.neutral import neutral_rows
from personalization.prompt import Example, Renderer
from personalization.refresh import Lesson, RefreshPolicy, choose
from personalization.score import losses_of_many, next_token
from personalization.train import PEOPLE_AT_ONCE, Person, Recipe, train

GATE_SHARE = 0.125  # of the turns before the test: 10 % of all
NOTEWORTHY = 0.01  # nats per token: who loses more is made worse
CANDIDATES = 10  # messages to pick the true one from, adapters to find the author among
SELECTION_TOKENS = 512  # of a row in which a message is picked
AUTHOR_ROWS = 16  # of a person, whose author is sought
POPULATION_ROWS = 8  # of each person, for the population adapter
HALVES = 2  # of the people; each half gets the population adapter of the other
QUESTIONS = 64  # people for whom an engine is asked
DRAWS = 2000

# The rows of the gate: an accepted adapter as it was judged, and as it is published.
JUDGED, PUBLISHED = "adapter + context, gated, as judged", "adapter + context, after the gate"

Adapters = Sequence[LoraWeights | None]


class NothingToMeasure(ValueError):
    """Nobody has enough turns: `people` were read, each needs `needed` learned turns before the test."""

    def __init__(self, people: int, needed: int) -> None:
        super().__init__(
            f"expected someone with {needed} turns to learn before the newest fifth, got {people} people "
            "without"
        )
        self.people, self.needed = people, needed


@dataclass(frozen=True, slots=True)
class Extent:
    """How much is measured; each part that is left empty is left out.

    people           at most so many, drawn from the file; None: all
    selection_turns  of each person, for which the true next message is picked among ten
    curve            learned turns to train on, newest first
    refreshes        in a row, against one from zero
    from_population  everyone once more, begun from the population adapter, against that adapter alone
    stacks           people trained together, against one after another
    solo             people trained one after another
    """

    people: int | None = None
    selection_turns: int = 4
    curve: tuple[int, ...] = (20, 50, 100, 200, 400)
    refreshes: int = 5
    from_population: bool = True
    stacks: tuple[int, ...] = (1, 8, 64, 256)
    solo: int = 4
    people_at_once: int = PEOPLE_AT_ONCE
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Bench:
    """What is measured with. `say` is told each phase as it begins; `clock` and `processor` give seconds."""

    model: LoadedModel
    renderer: Renderer
    policy: RefreshPolicy
    say: Callable[[str], None] = lambda text: None
    clock: Callable[[], float] = time.perf_counter
    processor: Callable[[], float] = time.process_time


@dataclass(frozen=True, slots=True)
class Subject:
    """One person. `later`: all turns of the test's part; `fresh`: those of them that are measured; `alone`:
    each of these as a chat of its own; `test`: behind what serving would show."""

    user: str
    turns: int
    history: list[Turn]
    before: list[Turn]
    later: list[Turn]
    fresh: list[Turn]
    lesson: Lesson
    alone: list[Example]
    test: list[Example]


@dataclass(frozen=True, slots=True)
class Question:
    """What serving has to answer as it was measured here: the start of a test turn behind its context, what
    would be published for its person, and the likeliest next token."""

    prompt: tuple[int, ...]
    adapter: LoraWeights | None
    token: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    """`numbers` as they are printed, `people` each one's own, `questions` to hold an engine against."""

    numbers: dict[str, Any]
    people: list[dict[str, Any]] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)


def evaluate(histories: Mapping[str, Sequence[Turn]], bench: Bench, extent: Extent) -> Evaluation:
    """Measure everything of `extent`. Raises NothingToMeasure."""
    policy = replace(bench.policy, gate_fraction=GATE_SHARE)
    bench = replace(bench, policy=policy)
    bench.say("reading and cutting")
    subjects, left_out = _subjects(histories, bench, extent)

    bench.say(f"training {len(subjects)} adapters")
    started = bench.clock(), bench.processor()
    learners = [_person(s.lesson, n) for n, s in enumerate(subjects)]
    candidates = _trained(bench, learners, extent)
    spent = {
        "seconds_per_user": round((bench.clock() - started[0]) / len(subjects), 3),
        "processor_seconds_per_user": round((bench.processor() - started[1]) / len(subjects), 3),
    }
    bench.say("judging them, and learning the turns that judged")
    gate = Gate(bench.model, neutral_rows(bench.renderer))
    lessons = [s.lesson for s in subjects]
    gated = _gated(bench, gate, candidates, learners, [None] * len(subjects), lessons, extent)
    population = _populations(bench, subjects, extent)

    bench.say("scoring held-out turns")
    swapped = [*candidates[1:], *candidates[:1]]
    losses = {
        "base": _means(bench, [None] * len(subjects), [s.alone for s in subjects]),
        "context": _means(bench, [None] * len(subjects), [s.test for s in subjects]),
        "adapter": _means(bench, candidates, [s.alone for s in subjects]),
        "adapter + context": _means(bench, candidates, [s.test for s in subjects]),
    }
    if len(subjects) > 1:
        losses |= {
            "population adapter": _means(bench, population, [s.alone for s in subjects]),
            "population adapter + context": _means(bench, population, [s.test for s in subjects]),
            "swapped adapter + context": _means(bench, swapped, [s.test for s in subjects]),
        }
    context, together = losses["context"], losses["adapter + context"]
    test = [subject.test for subject in subjects]
    losses[JUDGED] = _means_behind_gate(bench, gated.judged, test, context)
    losses[PUBLISHED] = _means_behind_gate(bench, gated.published, test, context)
    numbers: dict[str, Any] = {
        "people": len(subjects),
        "left_out": left_out,
        "loss": {name: _against(context, values) for name, values in losses.items()},
        "harm": _harm(subjects, gated.verdicts, context, together, losses[PUBLISHED]),
        "drift": _drift(gate, candidates, gated, policy),
        "training": spent,
    }
    if extent.selection_turns and len(subjects) > 1:
        bench.say("picking the next message among ten")
        numbers["selection"] = _selection(bench, subjects, candidates, extent)
    if len(subjects) > 1:
        bench.say("finding the author among ten adapters")
        numbers["authors"] = _authors(bench, subjects, candidates)
    if extent.curve:
        numbers["curve"] = _curve(bench, subjects, context, extent)
    if extent.from_population and len(subjects) >= 2 * HALVES:
        numbers["from_population"] = _from_population(
            bench, subjects, population, losses["population adapter + context"], context, gate, extent
        )
    if extent.refreshes:
        numbers["in_a_row"] = _in_a_row(bench, subjects, context, gate, gated.published, extent)
    if extent.stacks:
        numbers["stacked"] = _stacked(bench, subjects, extent)
    people = [
        {
            "user": subject.user,
            "turns": subject.turns,
            "gain": round(before - after, 5),
            "accepted": verdict.accepted,
            "strength": verdict.strength,
            "reason": verdict.reason,
        }
        for subject, before, after, verdict in zip(subjects, context, together, gated.verdicts, strict=True)
    ]
    asked = zip(subjects[:QUESTIONS], gated.published, strict=False)
    return Evaluation(numbers, people, [_question(bench, *each) for each in asked])


def _subjects(
    histories: Mapping[str, Sequence[Turn]], bench: Bench, extent: Extent
) -> tuple[list[Subject], int]:
    """Those who are measured, drawn at random, and how many others were looked at. Raises
    NothingToMeasure."""
    names = sorted(histories)
    random.Random(extent.seed).shuffle(names)
    subjects: list[Subject] = []
    left_out = 0
    for user in names:
        if extent.people is not None and len(subjects) == extent.people:
            break
        subject = subject_of(user, histories[user], bench)
        if subject is None:
            left_out += 1
        else:
            subjects.append(subject)
    if not subjects:
        raise NothingToMeasure(len(names), bench.policy.minimum_turns)
    return subjects, left_out


def subject_of(user: str, turns: Sequence[Turn], bench: Bench) -> Subject | None:
    """One person's rows; None if there is too little to learn from, to judge by or to test on. As for the
    store, a turn that is in the file twice, as in exports that overlap, counts once, and one that was put
    right is learned no more, whatever else the file says of it."""
    once: dict[str, Turn] = {}
    for turn in turns:
        once.setdefault(turn.id, turn)
    said = {turn.id for turn in effective(list(once.values()))}
    turns = [turn if turn.id in said else replace(turn, removed=True) for turn in once.values()]
    parts = cut_by_time(turns)
    before = [*parts.history, *parts.gate]
    if sum(map(learned, before)) < bench.policy.minimum_turns:
        return None
    lesson = choose(before, (), bench.renderer, bench.policy)
    known = {words(turn) for turn in before if learned(turn)}
    fresh = [turn for turn in parts.test if learned(turn) and words(turn) not in known]
    wanted = {turn.id for turn in fresh}
    test = serving_rows(
        before,
        parts.test,
        bench.renderer,
        most_tokens=bench.policy.gate_tokens,
        learn=lambda turn: turn.id in wanted,
    )
    alone = [row for turn in fresh for row in _rows([], turn, bench.renderer, bench.policy.gate_tokens)]
    if not (lesson.train and lesson.gate and test and alone):
        return None
    return Subject(
        user, sum(map(learned, turns)), parts.history, before, parts.test, fresh, lesson, alone, test
    )


def interval(values: Sequence[float], draws: int = DRAWS) -> list[float]:
    """The 95 % interval of the mean: percentiles of the means of `draws` resamples. The same values, the
    same interval."""
    chooser = random.Random(0)
    means = sorted(statistics.fmean(chooser.choices(values, k=len(values))) for _ in range(draws))
    return [round(means[int(draws * 0.025)], 4), round(means[int(draws * 0.975)], 4)]


# ---------------------------------------------------------------- parts


def _question(bench: Bench, subject: Subject, adapter: LoraWeights | None) -> Question:
    row = subject.test[0]
    prompt = row.token_ids[: row.learn_mask.index(True, 1)]  # never none: a template may open with the words
    return Question(prompt, adapter, next_token(bench.model, prompt, adapter))


def _rows(before: Sequence[Turn], turn: Turn, renderer: Renderer, most_tokens: int) -> list[Example]:
    return serving_rows(
        before, [turn], renderer, most_tokens=most_tokens, learn=lambda other: other.id == turn.id
    )


def _person(lesson: Lesson, seed: int, start: LoraWeights | None = None) -> Person:
    return Person(lesson.train, seed, start)


def _trained(bench: Bench, people: Sequence[Person], extent: Extent) -> list[LoraWeights]:
    """Their adapters as serving would read them: written to disk and read again."""
    last = [bench.clock()]

    def progress(share: float) -> None:
        if bench.clock() - last[0] > 10:
            last[0] = bench.clock()
            bench.say(f"  trained {share:.0%}")

    found = train(
        bench.model,
        people,
        bench.policy.recipe,
        people_at_once=extent.people_at_once,
        on_progress=progress,
    )
    with tempfile.TemporaryDirectory() as temporary:
        read = []
        for number, each in enumerate(found):
            folder = Path(temporary) / str(number)
            write_adapter(folder, each.weights, bench.model.config, base_model="evaluated")
            read.append(read_adapter(folder, bench.model.config))
        return read


@dataclass(frozen=True, slots=True)
class _Gated:
    """What the gate says of each candidate; what passed, as it was judged and as it is published: with the
    turns learned that judged it, where that goes."""

    verdicts: list[Verdict]
    judged: Adapters
    published: Adapters


def _gated(
    bench: Bench,
    gate: Gate,
    candidates: Sequence[LoraWeights],
    people: Sequence[Person],
    serving: Adapters,
    lessons: Sequence[Lesson],
    extent: Extent,
) -> _Gated:
    """`people`: whom the candidates were trained as."""
    cases = [
        Case(candidate, before, lesson.gate)
        for candidate, before, lesson in zip(candidates, serving, lessons, strict=True)
    ]
    verdicts = gate.judge(cases, bench.policy.gate)
    judged = [
        scaled(candidate, verdict.strength) if verdict.accepted else None
        for candidate, verdict in zip(candidates, verdicts, strict=True)
    ]
    accepted = [
        Accepted(person, lesson.newest, verdict.strength) if verdict.accepted else None
        for verdict, person, lesson in zip(verdicts, people, lessons, strict=True)
    ]
    done = finish(
        bench.model,
        gate,
        accepted,
        bench.policy.recipe,
        bench.policy.gate,
        people_at_once=extent.people_at_once,
    )
    published = [after or before for before, after in zip(judged, done, strict=True)]
    return _Gated(verdicts, judged, published)


def _means(bench: Bench, adapters: Adapters, rows: Sequence[Sequence[Example]]) -> list[float]:
    """Each one's loss per token."""
    found = losses_of_many(bench.model, list(zip(adapters, rows, strict=True)))
    return [_mean(losses) for losses in found]


def _means_behind_gate(
    bench: Bench, passed: Adapters, rows: Sequence[Sequence[Example]], context: Sequence[float]
) -> list[float]:
    """`_means` of what passed the gate. Who was refused has context alone, and that very number: computed
    again, in other company, it may be off by rounding, and they would count as made worse."""
    found = list(context)
    accepted = [at for at, weights in enumerate(passed) if weights is not None]
    means = _means(bench, [passed[at] for at in accepted], [rows[at] for at in accepted])
    for at, mean in zip(accepted, means, strict=True):
        found[at] = mean
    return found


def _mean(losses: Sequence[Tensor]) -> float:
    count = sum(len(row) for row in losses)
    return sum(float(row.double().sum()) for row in losses) / count


def _against(context: Sequence[float], values: Sequence[float]) -> dict[str, Any]:
    """The mean loss, and what it gains over context alone."""
    gains = [before - after for before, after in zip(context, values, strict=True)]
    shares = [gain / before for gain, before in zip(gains, context, strict=True)]
    return {
        "loss": round(statistics.fmean(values), 4),
        "interval": interval(values),
        "gain": round(statistics.fmean(gains), 4),
        "gain_interval": interval(gains),
        "gain_share": round(statistics.fmean(shares), 4),
    }


def _harm(
    subjects: Sequence[Subject],
    verdicts: Sequence[Verdict],
    context: Sequence[float],
    together: Sequence[float],
    published: Sequence[float],
) -> dict[str, Any]:
    """What it gains over context and who is made worse, before and after the gate: of everyone, and of those
    with many turns."""
    gains, gated = (
        [before - after for before, after in zip(context, each, strict=True)]
        for each in (together, published)
    )
    found = {}
    for least in (0, 100, 200):
        here = [at for at, subject in enumerate(subjects) if subject.turns >= least]
        if not here:
            continue
        rows = {}
        for name, values in (("before", gains), ("after", gated)):
            mine = [values[at] for at in here]
            shares = [value / context[at] for at, value in zip(here, mine, strict=True)]
            rows[name] = {
                "gain": round(statistics.fmean(mine), 4),
                "interval": interval(mine),
                "gain_share": round(statistics.fmean(shares), 4),
                "worse": _share([value < 0 for value in mine]),
                "worse_noteworthy": _share([value < -NOTEWORTHY for value in mine]),
                "worst_decile": round(sorted(mine)[len(mine) // 10], 4),
            }
        rows["people"] = {"count": len(here), "accepted": sum(verdicts[at].accepted for at in here)}
        found["everyone" if not least else f"from {least} turns"] = rows
    return found


def _share(cases: Sequence[bool]) -> float:
    return round(sum(cases) / len(cases), 4)


def _drift(
    gate: Gate, candidates: Sequence[LoraWeights], gated: _Gated, policy: RefreshPolicy
) -> dict[str, Any]:
    drifts = gate.drifts(candidates)
    published = gate.drifts([weights for weights in gated.published if weights])
    return {
        "mean": round(statistics.fmean(drifts), 4),
        "most": round(max(drifts), 4),
        "most_published": round(max(published), 4) if published else None,
        "over_limit": _share([drift > policy.gate.max_drift for drift in drifts]),
    }


def _populations(bench: Bench, subjects: Sequence[Subject], extent: Extent) -> list[LoraWeights | None]:
    """For each person the adapter of the other half of the people."""
    if len(subjects) < HALVES:
        return [None] * len(subjects)
    bench.say("training population adapters")
    halves: list[list[Example]] = [[] for _ in range(HALVES)]
    for place, subject in enumerate(subjects):
        rows = list(subject.lesson.train)
        random.Random(place).shuffle(rows)
        halves[place % HALVES].extend(rows[:POPULATION_ROWS])
    found = _trained(bench, [Person(rows, 0) for rows in halves], extent)
    return [found[(place + 1) % HALVES] for place in range(len(subjects))]


def _from_population(
    bench: Bench,
    subjects: Sequence[Subject],
    population: Adapters,
    alone: Sequence[float],
    context: Sequence[float],
    gate: Gate,
    extent: Extent,
) -> dict[str, Any]:
    """What one's own turns add to what all people of the file have in common: adapters begun from the
    population's, against that alone (with context all of them). A stranger's is one begun from the same.
    Against context alone they are both together, as a service with a population adapter has them."""
    bench.say(f"training {len(subjects)} adapters from the population's")
    people = [
        _person(s.lesson, n, start) for n, (s, start) in enumerate(zip(subjects, population, strict=True))
    ]
    own = _trained(bench, people, extent)
    strangers = [_stranger(at, len(subjects)) for at in range(len(subjects))]
    test = [subject.test for subject in subjects]
    together = _means(bench, own, test)
    lessons = [s.lesson for s in subjects]
    gated = _gated(bench, gate, own, people, [None] * len(subjects), lessons, extent)
    after = _means_behind_gate(bench, gated.published, test, context)
    return {
        "own": _against(alone, together),
        "swapped": _against(alone, _means(bench, [own[at] for at in strangers], test)),
        "over context": _against(context, together),
        "over context, after the gate": _against(context, after),
        "harm": _harm(subjects, gated.verdicts, context, together, after),
        "drift": _drift(gate, own, gated, bench.policy),
    }


def _stranger(place: int, people: int) -> int:
    """The next one of the same half, after the last the first."""
    return place + HALVES if place + HALVES < people else place % HALVES


def _selection(
    bench: Bench, subjects: Sequence[Subject], candidates: Adapters, extent: Extent
) -> dict[str, Any]:
    """hits@1: the true next message has the lowest loss per token among it and nine that others said; of each
    person's questions, then of people."""
    chooser = random.Random(extent.seed)
    groups: list[list[Example]] = []
    owners: list[int] = []
    for place, subject in enumerate(subjects):
        others = [turn for other in subjects if other is not subject for turn in other.fresh]
        asked = chooser.sample(subject.fresh, min(extent.selection_turns, len(subject.fresh)))
        for turn in asked:
            drawn = chooser.sample(others, min(4 * CANDIDATES, len(others)))
            texts = [turn.text]
            for other in drawn:
                if len(texts) < CANDIDATES and words(other) not in {
                    " ".join(t.casefold().split()) for t in texts
                }:
                    texts.append(other.text)
            earlier = _said_before(subject, turn)[-60:]
            rows = []
            for number, text in enumerate(texts):
                said = replace(turn, id=f"{turn.id}-{number}", text=text, corrects=None)
                rows += _rows(earlier, said, bench.renderer, SELECTION_TOKENS)
            if len(rows) == CANDIDATES:
                groups.append(rows)
                owners.append(place)
    if not groups:
        return {"asked": 0}
    found: dict[str, Any] = {"asked": len(groups), "among": CANDIDATES}
    nobody: Adapters = [None] * len(subjects)
    for name, adapters in (("context", nobody), ("adapter + context", candidates)):
        losses = losses_of_many(
            bench.model, [(adapters[at], rows) for at, rows in zip(owners, groups, strict=True)]
        )
        of_people: dict[int, list[bool]] = {}
        for at, group in zip(owners, losses, strict=True):
            of_people.setdefault(at, []).append(_first_is_lowest([float(row.mean()) for row in group]))
        shares = [statistics.fmean(hits) for hits in of_people.values()]
        found[name] = {"hits_at_1": round(statistics.fmean(shares), 4), "interval": interval(shares)}
    return found


def _said_before(subject: Subject, turn: Turn) -> list[Turn]:
    """All that was said before a turn of the test, by whomever; not what that turn corrects."""
    said = [*subject.before, *subject.later]
    place = next(at for at, other in enumerate(said) if other.id == turn.id)
    return [other for other in said[:place] if other.id != turn.corrects]


def _first_is_lowest(values: Sequence[float]) -> bool:
    """Whether the first is below all others: not if it is as low as another, or no number."""
    return all(values[0] < other for other in values[1:])


def _authors(bench: Bench, subjects: Sequence[Subject], candidates: Adapters) -> dict[str, Any]:
    """How often one's own adapter predicts one's messages best among ten adapters. Without context, which
    would tell."""
    size = min(CANDIDATES, len(subjects))
    asked: list[tuple[LoraWeights | None, Sequence[Example]]] = []
    for place, subject in enumerate(subjects):
        rivals = [candidates[(place + step) % len(subjects)] for step in range(size)]
        asked += [(rival, subject.alone[:AUTHOR_ROWS]) for rival in rivals]
    means = [_mean(losses) for losses in losses_of_many(bench.model, asked)]
    hits = [_first_is_lowest(means[at : at + size]) for at in range(0, len(means), size)]
    return {
        "among": size,
        "hits_at_1": _share(hits),
        "interval": interval([float(hit) for hit in hits]),
        "chance": round(1 / size, 4),
    }


def _curve(
    bench: Bench, subjects: Sequence[Subject], context: Sequence[float], extent: Extent
) -> list[dict[str, Any]]:
    """Gain over context alone by learned turns trained on, of those who have as many."""
    found = []
    for count in extent.curve:
        here = [at for at, s in enumerate(subjects) if sum(map(learned, s.history)) >= count]
        if not here:
            continue
        bench.say(f"learning from {count} turns: {len(here)} people")
        policy = replace(bench.policy, gate_fraction=0.0, most_turns=count)
        lessons = [choose(subjects[at].history, (), bench.renderer, policy) for at in here]
        people = [_person(lesson, at) for at, lesson in zip(here, lessons, strict=True)]
        after = _means(bench, _trained(bench, people, extent), [subjects[at].test for at in here])
        gains = [context[at] - loss for at, loss in zip(here, after, strict=True)]
        found.append(
            {
                "turns": count,
                "people": len(here),
                "gain": round(statistics.fmean(gains), 4),
                "interval": interval(gains),
                "worse_noteworthy": _share([gain < -NOTEWORTHY for gain in gains]),
            }
        )
    return found


def _in_a_row(
    bench: Bench,
    subjects: Sequence[Subject],
    context: Sequence[float],
    gate: Gate,
    once: Adapters,
    extent: Extent,
) -> dict[str, Any]:
    """Refreshes as the history grows, each trained anew over all of it so far and judged against the last one
    that was published, against the one that had all of it at once."""
    serving: list[LoraWeights | None] = [None] * len(subjects)
    seen: list[tuple[str, ...]] = [()] * len(subjects)
    accepted = 0
    for number in range(1, extent.refreshes + 1):
        bench.say(f"refresh {number} of {extent.refreshes} in a row")
        lessons: dict[int, Lesson] = {}
        for at, subject in enumerate(subjects):
            upto = subject.before[: len(subject.before) * number // extent.refreshes]
            if sum(map(learned, upto)) >= bench.policy.minimum_turns:
                lesson = choose(upto, seen[at], bench.renderer, bench.policy)
                if lesson.train and lesson.gate:
                    lessons[at] = lesson
        people = [_person(lesson, 31 * at + number) for at, lesson in lessons.items()]
        new, before = _trained(bench, people, extent), [serving[at] for at in lessons]
        gated = _gated(bench, gate, new, people, before, list(lessons.values()), extent)
        accepted += sum(verdict.accepted for verdict in gated.verdicts)
        for (at, lesson), judged, published in zip(
            lessons.items(), gated.judged, gated.published, strict=True
        ):
            if published is not None:
                learned_last = () if published is judged else lesson.newest_turns
                serving[at], seen[at] = published, (*lesson.trained_turns, *learned_last)
    test = [subject.test for subject in subjects]
    oldest = [
        training_rows(
            subject.history[: max(1, len(subject.history) // extent.refreshes)],
            bench.renderer,
            bench.policy.row_tokens,
        )
        for subject in subjects
    ]
    known = [at for at, rows in enumerate(oldest) if rows]
    found: dict[str, Any] = {"refreshes": extent.refreshes, "accepted": accepted}
    for name, adapters in (("in a row", serving), ("from zero", once)):
        gains = [b - a for b, a in zip(context, _means(bench, adapters, test), strict=True)]
        old = _means(bench, [adapters[at] for at in known], [oldest[at] for at in known])
        found[name] = {
            "gain": round(statistics.fmean(gains), 4),
            "interval": interval(gains),
            "loss_on_the_oldest": round(statistics.fmean(old), 4) if old else None,
        }
    return found


def _stacked(bench: Bench, subjects: Sequence[Subject], extent: Extent) -> dict[str, Any]:
    """Seconds to train people together and one after another. Where there are fewer people than the stack
    is to hold, they come again."""
    recipe: Recipe = bench.policy.recipe
    solo = [_person(s.lesson, n) for n, s in enumerate(subjects[: extent.solo])]
    bench.say(f"training {len(solo)} people one after another")
    train(bench.model, solo[:1], recipe)  # warm
    started = bench.clock()
    tokens = sum(each.tokens for each in train(bench.model, solo, recipe, people_at_once=1))
    alone = (bench.clock() - started) / tokens
    sizes = []
    for size in extent.stacks:
        bench.say(f"training {size} people together")
        people = [_person(subjects[n % len(subjects)].lesson, n) for n in range(size)]
        started = bench.clock()
        trained = train(bench.model, people, recipe, people_at_once=size)
        seconds = bench.clock() - started
        per_token = seconds / sum(each.tokens for each in trained)
        sizes.append(
            {
                "people": size,
                "seconds_per_user": round(seconds / size, 3),
                "users_per_hour": round(3600 * size / seconds, 1),
                "times_faster_than_solo": round(alone / per_token, 2),
            }
        )
    return {"solo_microseconds_per_token": round(1e6 * alone, 2), "sizes": sizes}
