"""Training many people's adapters in one stack against one person after another.

Same rows, steps, recipe and seeds for all: our stack at several sizes, our own code with one person at a
time, and PEFT + transformers with one person after another. Rows are random tokens; their number is what
matters. Times are of the whole process' processor (CPU seconds) and of the clock, the best of a few rounds.

    python -m benchmarks.bench_train [--people 1,8,32,64] [--tokens 64] [--threads 1] [--keep]
    python -m benchmarks.bench_train --device cuda --people 1,8,64,256 --steps 15
    python -m benchmarks.bench_train --device cuda --shape 8b --people 1,8,16 --steps 15 --rounds 1

`--shape 8b` is Llama-3.1-8B's shape with random weights, `tiny` a small one to try the script with. On a GPU
the products are in bfloat16. `--profile` also prints where a stack's time goes, by kernel.

Beside the times: what a person alone and the same person in the largest stack predict of rows they have not
seen, and whether the same stack trained twice holds the same bytes.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import report
from benchmarks.random_model import LLAMA_3_1_8B, TINY, random_model
from engine.adapter_files import LoraWeights
from engine.model import ModelConfig
from engine.weights import LoadedModel, load_model, read_config
from personalization.prompt import Example
from personalization.score import token_losses
from personalization.train import Person, Recipe, Trained, plan, train
from service import demo_model

SHAPES = {"8b": LLAMA_3_1_8B, "tiny": TINY}
HELD_OUT_ROWS = 8


def people_of(count: int, tokens: int, vocab: int, steps: int) -> list[Person]:
    """People whose plan is `steps` full steps, of two rows each."""
    chooser = random.Random(0)
    row = tokens // 2
    return [
        Person(
            [
                Example(tuple(chooser.randrange(vocab) for _ in range(row)), (False,) + (True,) * (row - 1))
                for _ in range(2 * steps)
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

    def __init__(self, base: Any, recipe: Recipe) -> None:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=recipe.rank, lora_alpha=recipe.alpha, target_modules=list(recipe.modules), lora_dropout=0.0
        )
        self._model = get_peft_model(base, config)
        self._parameters = [p for p in self._model.parameters() if p.requires_grad]
        self._recipe = recipe

    def train(self, people: list[Person]) -> None:
        device = self._parameters[0].device
        for person in people:
            optimizer = torch.optim.AdamW(
                self._parameters,
                lr=self._recipe.learning_rate,
                betas=self._recipe.betas,
                weight_decay=0.0,
                fused=True,
            )
            for step in plan(person.examples, self._recipe, person.seed):
                ids = torch.tensor([example.token_ids for example in step.examples], device=device)
                learn = torch.tensor([example.learn_mask for example in step.examples], device=device)
                self._model(input_ids=ids, labels=ids.masked_fill(~learn, -100)).loss.backward()
                torch.nn.utils.clip_grad_norm_(self._parameters, self._recipe.clip)
                optimizer.step()
                optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()


def theirs(folder: Path, shape: ModelConfig | None, device: str, dtype: torch.dtype) -> Any:
    """The model of transformers: from `folder`, or of a shape with random weights."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    if shape is None:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.max_position_embeddings,
        tie_word_embeddings=shape.tie_word_embeddings,
    )
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def same(model: LoadedModel, people: list[Person], recipe: Recipe, stacked: list[Trained]) -> dict[str, Any]:
    """Is the first of the stack what they are alone, and does the stack come out the same again?"""
    tokens = len(people[0].examples[0].token_ids)
    unseen = people_of(1, 2 * tokens, model.config.vocab_size - 1, HELD_OUT_ROWS // 2)[0].examples

    def loss(weights: LoraWeights) -> float:
        return float(torch.cat(token_losses(model, unseen, weights)).mean())

    (alone,) = train(model, people[:1], recipe)
    again = train(model, people, recipe, people_at_once=len(people))
    return {
        "held_out_alone": round(loss(alone.weights), 5),
        "held_out_stacked": round(loss(stacked[0].weights), 5),
        "same_bytes": all(
            torch.equal(m.a, n.a) and torch.equal(m.b, n.b)
            for one, other in zip(stacked, again, strict=True)
            for m, n in zip(one.weights.modules, other.weights.modules, strict=True)
        ),
    }


def profile(work: Callable[[], object]) -> str:
    """The kernels that take the most time."""
    from torch.profiler import ProfilerActivity

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as seen:
        work()
    order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    return str(seen.key_averages().table(sort_by=order, row_limit=30, max_name_column_width=60))


Row = Callable[[str, int, Callable[[], object], int], None]


def measure_ours(
    options: argparse.Namespace, folder: Path, dtype: torch.dtype, recipe: Recipe, row: Row
) -> dict[str, Any]:
    """Rows of our stacks; the model is gone from the device when this returns. -> what `same` says."""
    if options.shape is None:
        model = load_model(folder, device=options.device, dtype=dtype)
    else:
        model = random_model(SHAPES[options.shape], device=options.device, dtype=dtype)
    vocab, tokens, steps = model.config.vocab_size, recipe.tokens_per_step, options.steps
    train(model, people_of(2, tokens, vocab, 2), recipe)  # warm
    trained: list[Trained] = []
    people: list[Person] = []
    for size in (int(size) for size in options.people.split(",")):
        people = people_of(size, tokens, vocab, steps)

        def ours(chosen: list[Person] = people) -> None:
            trained[:] = train(model, chosen, recipe, people_at_once=len(chosen))

        row("ours", size, ours, options.rounds)
    if options.profile:
        short = people_of(len(people), tokens, vocab, 2)
        print(profile(lambda: train(model, short, recipe, people_at_once=len(short))), flush=True)
    return same(model, people, recipe, trained)


def measure(options: argparse.Namespace, dtype: torch.dtype, recipe: Recipe) -> dict[str, Any]:
    """A row of numbers for each way to train, in ms of one person's step, and people an hour."""
    steps, folder = options.steps, options.model or demo_model.path()
    rows: list[dict[str, Any]] = []

    def row(way: str, people: int, work: Callable[[], object], repeats: int) -> None:
        cpu, clock = best(work, repeats)
        each, hourly = 1000 / people / steps, round(3600 * people / clock)
        rows.append(
            {
                "way": way,
                "people": people,
                "cpu_ms": round(cpu * each, 3),
                "ms": round(clock * each, 3),
                "people_an_hour": hourly,
            }
        )
        print(
            f"{dtype!s:>15} {way:>6} {people:3d} people: {cpu * each:7.2f} CPU ms, {clock * each:7.2f} ms a "
            f"step, {hourly} people an hour",
            flush=True,
        )

    equal = measure_ours(options, folder, dtype, recipe, row)
    print(json.dumps(equal), flush=True)
    if options.device == "cuda":
        torch.cuda.empty_cache()
    shape = SHAPES.get(options.shape)
    vocab = read_config(folder).vocab_size if shape is None else shape.vocab_size
    peft = Peft(theirs(folder, shape, options.device, dtype), recipe)
    few = people_of(2, recipe.tokens_per_step, vocab, steps)
    peft.train(people_of(1, recipe.tokens_per_step, vocab, 2))
    row("PEFT", 2, lambda: peft.train(few), options.rounds)
    largest = min(each["ms"] for each in rows if each["way"] == "ours")
    return {
        "rows": rows,
        "same": equal,
        "stacked_against_solo": round(rows[0]["ms"] / largest, 2),
        "stacked_against_peft": round(rows[-1]["ms"] / largest, 2),
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--model", type=Path, default=None, help="a model folder; default: the demo model")
    arguments.add_argument("--shape", choices=sorted(SHAPES), help="random weights of this shape instead")
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--people", default="1,8,32,64", help="sizes of the stack")
    arguments.add_argument("--steps", type=int, default=8, help="of each person")
    arguments.add_argument("--tokens", type=int, default=Recipe().tokens_per_step, help="tokens of a step")
    arguments.add_argument("--dtypes", default=None, help="default: both; on a GPU bfloat16")
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--profile", action="store_true", help="print where the time goes")
    arguments.add_argument("--keep", action="store_true", help="write the JSON into benchmarks/results/")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    recipe = Recipe(epochs=1, tokens_per_step=options.tokens)
    numbers: dict[str, Any] = {
        "tokens_per_step": options.tokens,
        "steps": options.steps,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "shape": options.shape or "model",
    }
    for name in (options.dtypes or ("bfloat16" if options.device == "cuda" else "float32,bfloat16")).split(
        ","
    ):
        numbers[name] = measure(options, getattr(torch, name), recipe)
        print(json.dumps({name: {k: v for k, v in numbers[name].items() if k != "rows"}}), flush=True)
    report(f"bench_train_{options.shape or 'demo'}_{options.device}", numbers, keep=options.keep)


if __name__ == "__main__":
    main()
