"""Training many people's adapters in one stack against one person after another, on the demo model.

Same rows, steps, recipe and seeds for all: our stack at several sizes, our own code with one person at a
time, and PEFT + transformers with one person after another. Rows are random tokens; their number is what
matters. Times are of the whole process' processor (CPU seconds) and of the clock, the best of a few rounds.

    python -m benchmarks.bench_train [--people 1,8,32,64] [--tokens 64] [--threads 1] [--keep]
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import report
from engine.weights import load_model
from personalization.prompt import Example
from personalization.train import Person, Recipe, plan, train
from service import demo_model

STEPS = 8  # of each person; times are given per step


def people_of(count: int, tokens: int, vocab: int) -> list[Person]:
    """People whose plan is `STEPS` full steps, of two rows each."""
    chooser = random.Random(0)
    row = tokens // 2
    return [
        Person(
            [
                Example(tuple(chooser.randrange(vocab) for _ in range(row)), (False,) + (True,) * (row - 1))
                for _ in range(2 * STEPS)
            ],
            seed,
        )
        for seed in range(count)
    ]


def best(work: Callable[[], object], rounds: int) -> tuple[float, float]:
    """(CPU seconds, seconds) of the best round."""
    cpu, clock = [], []
    for _ in range(rounds):
        started = time.process_time(), time.perf_counter()
        work()
        cpu.append(time.process_time() - started[0])
        clock.append(time.perf_counter() - started[1])
    return min(cpu), min(clock)


class Peft:
    """One LoRA of PEFT on the model of transformers, trained one person after another.

    Its weights are used again for everyone: wrapping the model anew for each person would add seconds.
    """

    def __init__(self, folder: Path, recipe: Recipe, dtype: torch.dtype) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        config = LoraConfig(
            r=recipe.rank, lora_alpha=recipe.alpha, target_modules=list(recipe.modules), lora_dropout=0.0
        )
        self._model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), config)
        self._parameters = [p for p in self._model.parameters() if p.requires_grad]
        self._recipe = recipe

    def train(self, people: list[Person]) -> None:
        for person in people:
            optimizer = torch.optim.AdamW(
                self._parameters,
                lr=self._recipe.learning_rate,
                betas=self._recipe.betas,
                weight_decay=0.0,
                fused=True,
            )
            for step in plan(person.examples, self._recipe, person.seed):
                ids = torch.tensor([example.token_ids for example in step.examples])
                learn = torch.tensor([example.learn_mask for example in step.examples])
                self._model(input_ids=ids, labels=ids.masked_fill(~learn, -100)).loss.backward()
                torch.nn.utils.clip_grad_norm_(self._parameters, self._recipe.clip)
                optimizer.step()
                optimizer.zero_grad()


def measure(
    folder: Path, dtype: torch.dtype, sizes: list[int], recipe: Recipe, rounds: int
) -> list[dict[str, Any]]:
    """One row of numbers for each way to train, in ms of one person's step."""
    model = load_model(folder, dtype=dtype)
    rows: list[dict[str, Any]] = []

    def row(way: str, people: int, work: Callable[[], object], repeats: int) -> None:
        cpu, clock = (1000 * seconds / people / STEPS for seconds in best(work, repeats))
        rows.append({"way": way, "people": people, "cpu_ms": round(cpu, 2), "ms": round(clock, 2)})
        print(f"{dtype!s:>15} {way:>6} {people:3d} people: {cpu:7.2f} CPU ms, {clock:7.2f} ms", flush=True)

    for size in sizes:
        people = people_of(size, recipe.tokens_per_step, model.config.vocab_size)
        train(model, people[:2], recipe)  # warm
        ours = functools.partial(train, model, people, recipe, people_at_once=size)
        row("ours", size, ours, rounds)
    peft = Peft(folder, recipe, dtype)
    people = people_of(2, recipe.tokens_per_step, model.config.vocab_size)
    peft.train(people[:1])
    row("PEFT", 2, lambda: peft.train(people), rounds)
    return rows


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--model", type=Path, default=None, help="a model folder; default: the demo model")
    arguments.add_argument("--people", default="1,8,32,64", help="sizes of the stack")
    arguments.add_argument("--tokens", type=int, default=Recipe().tokens_per_step, help="tokens of a step")
    arguments.add_argument("--dtypes", default="float32,bfloat16")
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--keep", action="store_true", help="write the JSON into benchmarks/results/")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    recipe = Recipe(epochs=1, tokens_per_step=options.tokens)
    folder = options.model or demo_model.path()
    sizes = [int(size) for size in options.people.split(",")]
    numbers: dict[str, Any] = {"tokens_per_step": options.tokens}
    for name in options.dtypes.split(","):
        rows = measure(folder, getattr(torch, name), sizes, recipe, options.rounds)
        largest = min(row["ms"] for row in rows if row["way"] == "ours")
        numbers[name] = {
            "rows": rows,
            "stacked_against_solo": round(rows[0]["ms"] / largest, 2),
            "stacked_against_peft": round(rows[-1]["ms"] / largest, 2),
        }
        print(json.dumps({name: {k: v for k, v in numbers[name].items() if k != "rows"}}), flush=True)
    report("bench_train", numbers, keep=options.keep)


if __name__ == "__main__":
    main()
