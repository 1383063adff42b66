"""Which training earns most: many recipes over the people of a folder of histories, stacked on one device.

Every person is cut by time, 70 % to learn from, 10 % for the gate, 20 % to test on. A recipe trains everyone,
and the test turns are predicted behind the context that serving would give them. All people of all recipes
that share a shape (rank, alpha, modules, tokens of a step) share stacks, so the device is full.

Per recipe and corpus: the mean over people of (loss with context alone - loss with adapter and context), nats
per token and as a share, with a bootstrap 95 % interval; who is made worse, before and after the gate; the
drift on neutral text; and what a stranger's adapter does. Refreshes in a row are compared with one from zero.

    python -m benchmarks.sweep_learning --data FOLDER [--device cuda] [--people 60] [--keep]

FOLDER holds histories, one `.jsonl` for each corpus, as `attune import` reads them. With `--keep` the table
is also written into `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import multiprocessing
import os
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import report
from engine.adapter_files import LoraWeights
from engine.weights import LoadedModel, load_model, read_config
from personalization.evaluate import interval
from personalization.examples import cut_by_time, serving_rows, training_rows, words
from personalization.gate import GatePolicy, settle, weigh
from personalization.history import Turn, learned, parse
from personalization.neutral import neutral_rows
from personalization.prompt import Example, Renderer
from personalization.refresh import RefreshPolicy
from personalization.score import losses_of_many
from personalization.train import Person, Recipe, best_dtype, train
from service import demo_model

DRAWS = 1000  # of the bootstrap
LEAST_TURNS = 100
ROW_TOKENS = (256, 512, 1024)
MOST_TURNS = 400
MOST_TOKENS = 32_768  # of the history that is trained on, so that nobody's run outlasts all others'
BASE = Recipe()


@dataclass(frozen=True)
class Subject:
    """One person's rows. `train`: by the most tokens of a row; with each row the age of its newest turn, in
    learned turns. `chunks`: a fifth of the history each, oldest first, as rows of 512."""

    corpus: str
    user: str
    turns: int
    train: dict[int, list[Example]]
    ages: dict[int, list[int]]
    chunks: list[list[Example]]
    gate: list[Example]
    test: list[Example]


@dataclass(frozen=True)
class Entry:
    """One recipe of the table. `half_life`: learned turns after which a row counts half; 0: all alike.
    `newest`: how many turns are trained on. `shrinks`: the scales that the adapter is judged at. `watch`: the
    epochs end when the gate's turns are predicted worse than after the last; the gate knows them then."""

    name: str
    recipe: Recipe = BASE
    row_tokens: int = 512
    half_life: float = 0.0
    newest: int = MOST_TURNS
    shrinks: tuple[float, ...] = (1.0,)
    watch: bool = False


def entries() -> list[Entry]:
    """In the order they are run: if the time ends, the last are missing."""
    made: list[Entry] = []

    def add(name: str, row_tokens: int = 512, **fields: Any) -> None:
        own = ("half_life", "newest", "shrinks", "watch")
        mine = {key: fields.pop(key) for key in own if key in fields}
        recipe = dataclasses.replace(BASE, **fields)
        if row_tokens > recipe.tokens_per_step:
            recipe = dataclasses.replace(recipe, tokens_per_step=row_tokens)
        made.append(Entry(name, recipe, row_tokens, **mine))

    # The service's own, at the strengths that its gate tries, and its neighbours.
    strengths = (1.0, 0.7, 0.45)
    for rate in (2e-3, 1e-3):
        add(f"rate {rate:g}, rows of 1024, at most 32 steps", 1024, learning_rate=rate, most_steps=32,
            shrinks=strengths)  # fmt: skip
    # Seen once: what Changelog's people, who have said the most, gain most by.
    for tokens, rates in ((1024, (1e-3, 2e-3, 4e-3)), (2048, (2e-3, 4e-3, 8e-3)), (4096, (4e-3, 8e-3))):
        for rate in rates:
            add(f"rate {rate:g}, rows of 1024, steps of {tokens}, 1 epoch", 1024, tokens_per_step=tokens,
                learning_rate=rate, epochs=1, shrinks=strengths)  # fmt: skip
    for rate in (5e-4, 2e-3):
        add(f"rate {rate:g}, rows of 1024, up to 6 epochs, ended by the gate's turns", 1024,
            learning_rate=rate, epochs=6, watch=True)  # fmt: skip
    attention, mlp = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
    for name, modules in (("attention", attention), ("feed-forward", mlp), ("v and o", ("v_proj", "o_proj"))):
        add(f"{name} only, rate 0.004, rows of 1024, 1 epoch", 1024, modules=modules, learning_rate=4e-3,
            epochs=1, shrinks=(1.0, 0.7))  # fmt: skip
    for rank in (2, 32):
        add(f"rank {rank}, rate 0.004, rows of 1024, 1 epoch", 1024, rank=rank, alpha=2.0 * rank,
            learning_rate=4e-3, epochs=1, shrinks=(1.0, 0.7))  # fmt: skip
    for rate in (5e-4, 1e-3, 2e-3, 4e-3, 8e-3):
        add(f"rate {rate:g}", learning_rate=rate, shrinks=(1.0, 0.7) if rate >= 2e-3 else (1.0,))
    for rate in (1e-3, 2e-3, 4e-3):
        add(f"rate {rate:g}, rows of 1024", 1024, learning_rate=rate)
    for epochs in (1, 2, 5, 8):
        add(f"rate 0.002, {epochs} epochs", learning_rate=2e-3, epochs=epochs)
    for half_life in (100.0, 200.0):
        add(f"rate 0.002, half-life {half_life:g}", learning_rate=2e-3, half_life=half_life)
    for pull in (1.0, 5.0, 20.0):
        add(f"rate 0.002, pull {pull:g}", learning_rate=2e-3, pull=pull)
    add("rate 0.004, 1 epoch", learning_rate=4e-3, epochs=1, shrinks=strengths)
    add("rate 0.004, pull 5", learning_rate=4e-3, pull=5.0)
    add("rate 0.002, newest 150", learning_rate=2e-3, newest=150)
    add("rank 16, rate 0.002", rank=16, alpha=32.0, learning_rate=2e-3)
    add("rank 16, rate 0.004", rank=16, alpha=32.0, learning_rate=4e-3)
    add("rank 4, rate 0.004", rank=4, alpha=8.0, learning_rate=4e-3)
    add("rank 32, rate 0.002", rank=32, alpha=64.0, learning_rate=2e-3)
    add("alpha 32, rate 0.002", alpha=32.0, learning_rate=2e-3)
    add("attention only, rate 0.004", modules=attention, learning_rate=4e-3)
    add("feed-forward only, rate 0.002", modules=mlp, learning_rate=2e-3)
    add("feed-forward only, rate 0.004", modules=mlp, learning_rate=4e-3)
    add("steps of 1024 tokens, rate 0.002", tokens_per_step=1024, learning_rate=2e-3)
    add("steps of 1024 tokens, rate 0.004", tokens_per_step=1024, learning_rate=4e-3)
    add("steps of 256 tokens, rate 0.001", 256, tokens_per_step=256, learning_rate=1e-3)
    add("steps of 256 tokens, rate 0.002", 256, tokens_per_step=256, learning_rate=2e-3)
    return made


# ---------------------------------------------------------------- people

_renderer: Renderer | None = None


def _subject(task: tuple[Path, str, str, list[Turn]]) -> Subject | None:
    """One person's rows, in a process of its own."""
    global _renderer
    folder, corpus, user, turns = task
    if _renderer is None:
        torch.set_num_threads(1)
        _renderer = Renderer(folder, read_config(folder).max_position_embeddings)
    parts = cut_by_time(turns)
    before = [*parts.history, *parts.gate]
    trained = [turn.id for turn in parts.history if learned(turn)][-MOST_TURNS:]
    age = {turn: len(trained) - place for place, turn in enumerate(trained)}
    first = next(place for place, turn in enumerate(parts.history) if turn.id == trained[0])
    recent = parts.history[first:]
    tokens = sum(map(_renderer.cost, recent))
    while tokens > MOST_TOKENS:
        tokens -= _renderer.cost(recent[0])
        recent = recent[1:]
    rows, ages = {}, {}
    for row_tokens in ROW_TOKENS:
        made = [(chunk, training_rows(chunk, _renderer, row_tokens)) for chunk in _pieces(recent, row_tokens)]
        rows[row_tokens] = [row for _, some in made for row in some]
        ages[row_tokens] = [
            min(age[turn.id] for turn in chunk if learned(turn)) for chunk, some in made for _ in some
        ]
    fifth = math.ceil(len(recent) / 5)
    chunks = [training_rows(recent[at : at + fifth], _renderer, 512) for at in range(0, len(recent), fifth)]
    known = {words(turn) for turn in before if learned(turn)}

    def fresh(turn: Turn) -> bool:
        return learned(turn) and words(turn) not in known

    gate = serving_rows(parts.history, parts.gate, _renderer)
    test = serving_rows(before, parts.test, _renderer, learn=fresh)
    lessons = sum(map(learned, turns))
    return Subject(corpus, user, lessons, rows, ages, chunks, gate, test) if gate and test else None


def _pieces(turns: Sequence[Turn], row_tokens: int) -> Iterator[Sequence[Turn]]:
    """Stretches of turns that make about four rows each, so that each row's age is known well enough."""
    assert _renderer is not None
    begin, used = 0, 0
    for place, turn in enumerate(turns):
        used += _renderer.cost(turn)
        if used >= 4 * row_tokens:
            yield turns[begin : place + 1]
            begin, used = place + 1, 0
    if any(learned(turn) for turn in turns[begin:]):
        yield turns[begin:]


def read_subjects(folder: Path, model: Path, most: int, processes: int) -> list[Subject]:
    """At most `most` people of each corpus with enough turns, spread over the file."""
    tasks = []
    for file in sorted(folder.glob("*.jsonl")):
        with file.open("rb") as lines:
            people = {
                user: turns
                for user, turns in parse(lines).turns.items()
                if sum(map(learned, turns)) >= LEAST_TURNS
            }
        names = sorted(people)
        for name in random.Random(0).sample(names, min(most, len(names))):
            tasks.append((model, file.stem, name, people[name]))
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        return [subject for subject in pool.map(_subject, tasks, chunksize=1) if subject is not None]


# ---------------------------------------------------------------- measuring


@dataclass
class Scores:
    """Summed losses by turn-less rows, per person: (nats, tokens) of each held-out row."""

    total: float
    tokens: int
    rows: list[tuple[float, int]] = field(default_factory=list)

    @property
    def mean(self) -> float:
        return self.total / self.tokens


def scores(model: LoadedModel, asked: Sequence[tuple[LoraWeights | None, Sequence[Example]]]) -> list[Scores]:
    found = []
    for losses in losses_of_many(model, asked):
        rows = [(float(each.double().sum()), len(each)) for each in losses]
        found.append(Scores(sum(total for total, _ in rows), sum(count for _, count in rows), rows))
    return found


@dataclass
class Board:
    """What context alone gives everyone; the same for every recipe."""

    model: LoadedModel
    subjects: list[Subject]
    neutral: list[Example]
    gate: list[list[torch.Tensor]]
    test: list[Scores]
    calm: float  # loss on neutral text without any adapter

    @classmethod
    def of(cls, model: LoadedModel, subjects: list[Subject], neutral: list[Example]) -> Board:
        gate = losses_of_many(model, [(None, each.gate) for each in subjects])
        test = scores(model, [(None, each.test) for each in subjects])
        (calm,) = scores(model, [(None, neutral)])
        return cls(model, subjects, neutral, gate, test, calm.mean)

    def judge(self, adapters: Sequence[LoraWeights | None]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """One row of the table, numbers of each corpus; and each person's own."""
        gate = losses_of_many(self.model, [(a, s.gate) for a, s in zip(adapters, self.subjects, strict=True)])
        test = scores(self.model, [(a, s.test) for a, s in zip(adapters, self.subjects, strict=True)])
        drift = [each.mean - self.calm for each in scores(self.model, [(a, self.neutral) for a in adapters])]
        verdicts = [
            settle(weigh(subject.gate, before, after, GatePolicy()), moved, GatePolicy())
            for before, after, moved, subject in zip(self.gate, gate, drift, self.subjects, strict=True)
        ]
        passed = [verdict.accepted for verdict in verdicts]
        people = [
            {
                "corpus": subject.corpus,
                "user": subject.user,
                "turns": subject.turns,
                "gain": round(before.mean - after.mean, 5),
                "context": round(before.mean, 5),
                "drift": round(moved, 5),
                "gate": {name: round(value, 5) for name, value in verdict.numbers.items()},
            }
            for subject, before, after, moved, verdict in zip(
                self.subjects, self.test, test, drift, verdicts, strict=True
            )
        ]
        corpora = sorted({subject.corpus for subject in self.subjects})
        return {corpus: self._row(corpus, test, drift, passed) for corpus in corpora}, people

    def _row(
        self, corpus: str, test: Sequence[Scores], drift: Sequence[float], passed: Sequence[bool]
    ) -> dict[str, Any]:
        here = [place for place, subject in enumerate(self.subjects) if subject.corpus == corpus]
        gains = [self.test[at].mean - test[at].mean for at in here]
        gated = [gain if passed[at] else 0.0 for at, gain in zip(here, gains, strict=True)]
        shares = [gain / self.test[at].mean for at, gain in zip(here, gains, strict=True)]
        published = [drift[at] for at in here if passed[at]]
        return {
            "people": len(here),
            "context": round(statistics.fmean(self.test[at].mean for at in here), 4),
            "gain": round(statistics.fmean(gains), 4),
            "interval": interval(gains, DRAWS),
            "share": round(statistics.fmean(shares), 4),
            "gated_gain": round(statistics.fmean(gated), 4),
            "gated_share": round(
                statistics.fmean(
                    gain / self.test[at].mean for at, gain in zip(here, gated, strict=True)
                ), 4
            ),
            "passed": sum(passed[at] for at in here),
            "worse": _share(gain < -0.01 for gain in gains),
            "worse_gated": _share(gain < -0.01 for gain in gated),
            "worst_decile": round(sorted(gains)[len(gains) // 10], 4),
            "drift": round(statistics.fmean(drift[at] for at in here), 4),
            "drift_most": round(max(published, default=0.0), 4),
            "drift_over": _share(drift[at] > 0.02 for at in here),
        }  # fmt: skip


def _share(cases: Any) -> float:
    values = [bool(case) for case in cases]
    return round(statistics.fmean(values), 4)


# ---------------------------------------------------------------- training


def shrunk(weights: LoraWeights, factor: float) -> LoraWeights:
    if factor == 1.0:
        return weights
    return LoraWeights(tuple(dataclasses.replace(m, scale=m.scale * factor) for m in weights.modules))


def populations(board: Board, recipe: Recipe, people_at_once: int) -> list[LoraWeights]:
    """For each person an adapter of those of their corpus who are in the other half: nobody's own words."""
    halves: dict[tuple[str, int], list[Example]] = {}
    for place, subject in enumerate(board.subjects):
        rows = list(subject.train[512])
        random.Random(place).shuffle(rows)
        halves.setdefault((subject.corpus, place % 2), []).extend(rows[:8])
    keys = list(halves)
    trained = train(
        board.model, [Person(halves[key], 0) for key in keys], recipe, people_at_once=people_at_once
    )
    of = {key: each.weights for key, each in zip(keys, trained, strict=True)}
    return [of[subject.corpus, 1 - place % 2] for place, subject in enumerate(board.subjects)]


def trainee(subject: Subject, entry: Entry, seed: int) -> Person:
    rows, ages = subject.train[entry.row_tokens], subject.ages[entry.row_tokens]
    chosen = [place for place, age in enumerate(ages) if age <= entry.newest] or [len(ages) - 1]
    emphasis = [0.5 ** (ages[at] / entry.half_life) for at in chosen] if entry.half_life else []
    watch = subject.gate if entry.watch else ()
    return Person([rows[at] for at in chosen], seed, watch=watch, emphasis=emphasis, recipe=entry.recipe)


def shape_of(entry: Entry) -> tuple[Any, ...]:
    recipe = entry.recipe
    return recipe.rank, recipe.alpha, recipe.modules, recipe.tokens_per_step


def groups(todo: Sequence[Entry], at_once: int) -> Iterator[list[Entry]]:
    """Recipes of one shape that are trained together."""
    left = list(todo)
    while left:
        mine = [entry for entry in left if shape_of(entry) == shape_of(left[0])][:at_once]
        left = [entry for entry in left if entry not in mine]
        yield mine


def in_a_row(
    board: Board, recipe: Recipe, replay: float, keep: float, people_at_once: int
) -> tuple[list[LoraWeights], list[float]]:
    """Five refreshes, each on a fifth of the history and `replay` times as many tokens of what came before,
    beginning where the last one ended; `keep` of the last version's weights stays in each new one. -> the
    last versions, and each person's loss on the first fifth by the last version."""
    serving: list[LoraWeights | None] = [None] * len(board.subjects)
    for number in range(5):
        people = []
        for seed, subject in enumerate(board.subjects):
            new = list(subject.chunks[min(number, len(subject.chunks) - 1)])
            old = [row for chunk in subject.chunks[:number] for row in chunk]
            random.Random(seed * 5 + number).shuffle(old)
            room = replay * sum(len(row.token_ids) for row in new)
            for row in old:
                if room <= 0:
                    break
                room -= len(row.token_ids)
                new.append(row)
            people.append(Person(new, seed, start=serving[seed]))
        trained = train(board.model, people, recipe, people_at_once=people_at_once)
        serving = [mixed(before, now.weights, keep) for before, now in zip(serving, trained, strict=True)]
    last = [each for each in serving if each is not None]
    oldest = scores(board.model, [(a, s.chunks[0]) for a, s in zip(last, board.subjects, strict=True)])
    return last, [each.mean for each in oldest]


def mixed(before: LoraWeights | None, now: LoraWeights, keep: float) -> LoraWeights:
    """The weights between two versions of which the second began at the first."""
    if before is None or not keep:
        return now
    return LoraWeights(
        tuple(
            dataclasses.replace(n, a=torch.lerp(n.a, b.a, keep), b=torch.lerp(n.b, b.b, keep))
            for b, n in zip(before.modules, now.modules, strict=True)
        )
    )


def _options() -> argparse.Namespace:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--data", type=Path, required=True, help="folder of histories, one file a corpus")
    arguments.add_argument("--model", type=Path, default=demo_model.path(), help="a model folder")
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--people", type=int, default=60, help="at most so many of each corpus")
    arguments.add_argument("--recipes", type=int, default=None, help="only the first so many")
    arguments.add_argument("--at-once", type=int, default=6, help="recipes that share a stack")
    arguments.add_argument("--people-at-once", type=int, default=1024)
    arguments.add_argument("--seconds", type=float, default=240.0, help="no recipe is begun after")
    arguments.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    arguments.add_argument("--details", type=Path, help="write everyone's numbers into this file")
    arguments.add_argument("--keep", action="store_true", help="write the JSON into benchmarks/results/")
    return arguments.parse_args()


def main() -> None:
    options = _options()
    started = time.perf_counter()

    def said(text: str) -> None:
        print(f"{time.perf_counter() - started:6.1f} s  {text}", flush=True)

    subjects = read_subjects(options.data, options.model, options.people, options.processes)
    said(f"{len(subjects)} people")
    device = torch.device(options.device)
    model = load_model(options.model, device=options.device, dtype=best_dtype(device))
    renderer = Renderer(options.model, model.config.max_position_embeddings)
    board = Board.of(model, subjects, neutral_rows(renderer))
    said("context alone is scored")
    table: list[dict[str, Any]] = []
    details: list[dict[str, Any]] = []

    def note(name: str, adapters: Sequence[LoraWeights | None], **more: Any) -> None:
        corpora, people = board.judge(adapters)
        row = {"name": name, **more, "corpora": corpora}
        table.append(row)
        details.append({"name": name, "people": people})
        shown = "; ".join(
            f"{corpus} {100 * each['share']:+.2f} % (gated {100 * each['gated_share']:+.2f}, worse "
            f"{100 * each['worse']:.0f}->{100 * each['worse_gated']:.0f} %, drift {each['drift']:+.3f})"
            for corpus, each in row["corpora"].items()
        )
        said(f"{name}: {shown}")

    steady = RefreshPolicy().recipe
    common = populations(
        board, dataclasses.replace(steady, epochs=2, most_steps=None), options.people_at_once
    )
    note("an adapter of others alone", common)
    begun_there = [
        Person(subject.train[512], seed, start=start)
        for seed, (subject, start) in enumerate(zip(subjects, common, strict=True))
    ]
    trained = train(model, begun_there, steady, people_at_once=options.people_at_once)
    note("the service's, from an adapter of others", [each.weights for each in trained])
    todo = entries()[: options.recipes]
    for mine in groups(todo, options.at_once):
        if time.perf_counter() - started > options.seconds:
            said("out of time: recipes are left")
            break
        people = [trainee(subject, entry, seed) for entry in mine for seed, subject in enumerate(subjects)]
        begun = time.perf_counter()
        trained = train(model, people, mine[0].recipe, people_at_once=options.people_at_once)
        took = time.perf_counter() - begun
        tokens = sum(each.tokens for each in trained)
        said(f"trained {len(people)} adapters, {tokens} tokens, {tokens / took:,.0f} a second")
        for number, entry in enumerate(mine):
            own = trained[number * len(subjects) : (number + 1) * len(subjects)]
            described = dataclasses.asdict(entry.recipe) | {
                "row_tokens": entry.row_tokens, "half_life": entry.half_life, "newest": entry.newest,
            }  # fmt: skip
            for shrink in entry.shrinks:
                adapters = [shrunk(each.weights, shrink) for each in own]
                name = entry.name if shrink == 1 else f"{entry.name}, shrunk to {shrink:g}"
                note(name, adapters, recipe=described, shrink=shrink)
            if number == 0:
                strangers = [each.weights for each in own]
                note(f"{entry.name}, a stranger's", strangers[1:] + strangers[:1], recipe=described)

    ways = ((1.0, 0.0, 0.0), (0.0, 0.0, 0.0), (2.0, 0.0, 0.0), (1.0, 0.3, 0.0), (1.0, 0.0, 5.0))
    for replay, keep, pull in ways if options.recipes is None else ways[:1]:
        if time.perf_counter() - started > options.seconds:
            said("out of time for refreshes in a row")
            break
        recipe = dataclasses.replace(steady, pull=pull)
        last, old = in_a_row(board, recipe, replay, keep, options.people_at_once)
        name = f"five refreshes, replay {replay:g}, keep {keep:g}, pull {pull:g}"
        note(name, last, old_slice=round(statistics.fmean(old), 4))
    if options.details:
        options.details.write_text(json.dumps(details))
    numbers = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "dtype": str(best_dtype(device)).removeprefix("torch."),
        "people": {
            corpus: sum(s.corpus == corpus for s in subjects) for corpus in {s.corpus for s in subjects}
        },
        "seconds": round(time.perf_counter() - started, 1),
        "table": table,
    }
    report("sweep_learning", numbers, keep=options.keep)


if __name__ == "__main__":
    main()
