"""Decoding for many people on a CPU, beside transformers + PEFT on the same weights and threads.

Two claims. Eight people with eight distinct rank-8 adapters (all linear modules) generate at least four
times the tokens per second of PEFT's mixed batch. A returning person whose 1,000 tokens of history are in
the prefix cache gets the first token at least five times sooner than without the cache. Replies are compared
before any speed is printed, legs alternate within one run, and the medians are reported.

    python -m benchmarks.bench_cpu [--threads 1 2] [--rounds 5] [--keep]
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import report
from engine.adapter_files import LoraModule, LoraWeights, version_folder, write_adapter
from engine.config import EngineConfig
from engine.engine import Engine
from engine.model import MODULES, ModelConfig, module_shape
from engine.request import AdapterRef, Request, SamplingParams, TokensEvent
from engine.weights import load_model
from service import demo_model

PEOPLE = 8
RANK = 8
PROMPT_TOKENS = 96
NEW_TOKENS = 128
HISTORY_TOKENS = 1000
MESSAGE_TOKENS = 24


def random_adapter(config: ModelConfig, seed: int) -> LoraWeights:
    """Rank 8 on every linear module: small enough that text stays text, large enough to change it."""
    generator = torch.Generator().manual_seed(seed)
    modules = []
    for layer in range(config.num_layers):
        for module in MODULES:
            out_features, in_features = module_shape(config, module)
            a = torch.randn(RANK, in_features, generator=generator) * in_features**-0.5
            b = torch.randn(out_features, RANK, generator=generator) * 0.05
            modules.append(LoraModule(layer=layer, module=module, a=a, b=b, scale=2.0))
    return LoraWeights(modules=tuple(modules))


def adapter_name(person: int) -> str:
    return f"{person + 1:064x}"


def prompts(vocab_size: int, length: int, count: int, seed: int) -> list[list[int]]:
    """Random ordinary tokens: nothing shared between people, so no prefix helps anyone."""
    chooser = random.Random(seed)
    return [[chooser.randrange(300, vocab_size) for _ in range(length)] for _ in range(count)]


def engine_on(root: Path, folder: Path, *, prefix_cache: bool) -> Engine:
    model = load_model(folder)
    config = EngineConfig(arena_bytes=512 << 20, prefix_cache=prefix_cache)
    return Engine(config, model, root)


def finish(engine: Engine, requests: list[Request]) -> tuple[list[list[int]], float]:
    """Run `requests` to their ends; their token ids, and the seconds until the first token of them all."""
    tokens: dict[str, list[int]] = {request.id: [] for request in requests}
    started = time.perf_counter()
    first = 0.0
    for request in requests:
        engine.submit(request)
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, TokensEvent):
                first = first or time.perf_counter() - started
                tokens[event.request_id].extend(event.token_ids)
    engine.check_integrity()
    return [tokens[request.id] for request in requests], first


def mixed_requests(all_prompts: list[list[int]], label: str) -> list[Request]:
    sampling = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    return [
        Request(
            id=f"{label}-{i}",
            prompt=tuple(p),
            sampling=sampling,
            adapter=AdapterRef(adapter_name(i), 1),
            user_key=str(i),
        )
        for i, p in enumerate(all_prompts)
    ]


def peft_model(folder: Path, root: Path) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    base.generation_config.eos_token_id = None
    model: Any = None
    for person in range(PEOPLE):
        where = str(version_folder(root, adapter_name(person), 1))
        if model is None:
            model = PeftModel.from_pretrained(base, where, adapter_name=f"p{person}")
        else:
            model.load_adapter(where, adapter_name=f"p{person}")
    return model.eval()


def peft_generate(model: Any, all_prompts: list[list[int]]) -> list[list[int]]:
    ids = torch.tensor(all_prompts)
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            adapter_names=[f"p{person}" for person in range(PEOPLE)],
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
    return [row[ids.shape[1] :] for row in out.tolist()]


def timed(work: Callable[[], list[list[int]]]) -> tuple[list[list[int]], float]:
    started = time.perf_counter()
    replies = work()
    return replies, sum(map(len, replies)) / (time.perf_counter() - started)


def mixed_batch(root: Path, folder: Path, rounds: int) -> dict[str, Any]:
    engine = engine_on(root, folder, prefix_cache=False)
    model = peft_model(folder, root)
    vocab = load_model(folder).config.vocab_size
    ours, theirs, equal, compared = [], [], 0, 0
    for turn in range(rounds + 1):  # the first round warms both sides and is not counted
        batch = prompts(vocab, PROMPT_TOKENS, PEOPLE, seed=turn)
        replies, speed = timed(lambda b=batch, t=turn: finish(engine, mixed_requests(b, str(t)))[0])  # type: ignore[misc]
        reference, peft_speed = timed(lambda b=batch: peft_generate(model, b))  # type: ignore[misc]
        if turn:
            ours.append(speed)
            theirs.append(peft_speed)
            equal += sum(mine == other for mine, other in zip(replies, reference, strict=True))
            compared += PEOPLE
    distinct = len({tuple(reply) for reply in replies})
    if equal < 0.9 * compared:
        raise SystemExit(f"the two sides disagree: {equal} of {compared} replies equal; no speed is reported")
    a, b = statistics.median(ours), statistics.median(theirs)
    return {
        "ours_tokens_per_s": round(a, 1),
        "peft_tokens_per_s": round(b, 1),
        "times_peft": round(a / b, 2),
        "replies_equal": f"{equal}/{compared}",
        "distinct_replies_last_round": distinct,
    }


def first_token(root: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds to the first token of a returning person's next message, with and without the prefix cache."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    replies: dict[bool, list[list[int]]] = {True: [], False: []}
    engines = {cached: engine_on(root, folder, prefix_cache=cached) for cached in (True, False)}
    vocab = load_model(folder).config.vocab_size
    sampling = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    for turn in range(rounds + 1):
        history = prompts(vocab, HISTORY_TOKENS, 1, seed=100 + turn)[0]
        message = prompts(vocab, MESSAGE_TOKENS, 1, seed=200 + turn)[0]
        ref = AdapterRef(adapter_name(turn % PEOPLE), 1)
        for cached, engine in engines.items():
            before = Request(
                id=f"before-{turn}", prompt=tuple(history), sampling=sampling, adapter=ref, user_key="p"
            )
            finish(engine, [before])
            again = Request(
                id=f"again-{turn}",
                prompt=tuple(history + message),
                sampling=sampling,
                adapter=ref,
                user_key="p",
            )
            reply, first = finish(engine, [again])
            if turn:
                seconds[cached].append(first)
                replies[cached].extend(reply)
    if replies[True] != replies[False]:
        raise SystemExit("the prefix cache changed a reply; no speed is reported")
    hit, miss = statistics.median(seconds[True]), statistics.median(seconds[False])
    return {
        "cached_ms": round(1e3 * hit, 1),
        "uncached_ms": round(1e3 * miss, 1),
        "times_sooner": round(miss / hit, 1),
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--model", type=Path, default=demo_model.path())
    arguments.add_argument("--keep", action="store_true", help="write the JSON into benchmarks/results/")
    options = arguments.parse_args()
    numbers: dict[str, Any] = {
        "people": PEOPLE,
        "rank": RANK,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
    }
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        config = load_model(options.model).config
        for person in range(PEOPLE):
            where = version_folder(root, adapter_name(person), 1)
            where.mkdir(parents=True, exist_ok=True)
            write_adapter(where, random_adapter(config, person), config, base_model="demo")
        for threads in options.threads:
            torch.set_num_threads(threads)
            row = mixed_batch(root, options.model, options.rounds)
            print(
                f"{threads} threads: ours {row['ours_tokens_per_s']} tok/s, PEFT {row['peft_tokens_per_s']},"
                f" {row['times_peft']} times; equal replies: {row['replies_equal']}",
                flush=True,
            )
            numbers[f"mixed_batch_{threads}_threads"] = row
        row = first_token(root, options.model, options.rounds)
        print(
            f"first token with {HISTORY_TOKENS} tokens of history: {row['cached_ms']} ms cached, "
            f"{row['uncached_ms']} ms not, {row['times_sooner']} times sooner",
            flush=True,
        )
        numbers["first_token"] = row
    report("bench_cpu", numbers, keep=options.keep)


if __name__ == "__main__":
    main()
