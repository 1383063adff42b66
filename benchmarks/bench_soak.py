"""Hours of everything at once: random arrivals, cancels, new versions, forgetting, presence, evictions.

    python -m benchmarks.bench_soak --minutes 5                      # a tiny model on the CPU
    python -m benchmarks.bench_soak --minutes 9 --device cuda        # Llama-3.1-8B's shape on a GPU

The arena holds a fraction of the adapters and the host tier another, so both evict all the time. The time is
cut into rounds. Each ends with an empty engine: its books are proven, every request must have ended exactly
once with all of its tokens, and the memory of host and device is noted. The first half of the rounds fills
what may fill; after that neither may grow by more than `--drift-mb`, or the run fails. The last line is JSON.
"""

import argparse
import gc
import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import gpu, report
from benchmarks.random_model import (
    ATTENTION_8_TO_64,
    ATTENTION_16,
    LLAMA_3_1_8B,
    QV_8,
    TINY,
    RandomAdapters,
    random_model,
)
from engine.adapter_files import LoraWeights
from engine.config import EngineConfig
from engine.engine import Engine
from engine.request import AdapterRef, FinishedEvent, Request, SamplingParams, TokensEvent

KINDS = (ATTENTION_16, QV_8, ATTENTION_8_TO_64)


class Drift(AssertionError):
    """Memory grew from the middle of the run to its end: `where`, `limit` and `got` in MB."""

    def __init__(self, where: str, limit: float, got: float) -> None:
        super().__init__(f"{where} memory: expected to grow by at most {limit:.0f} MB, grew by {got:.0f} MB")


class Soak:
    """One engine, `people` with adapters of mixed shapes, and a generator that decides all they do."""

    def __init__(self, device: str, people: int, seed: int, *, shared_device: bool = False) -> None:
        is_cpu = device == "cpu"
        self.config = TINY if is_cpu else LLAMA_3_1_8B
        dtype = torch.float32 if is_cpu else torch.bfloat16
        self.random = random.Random(seed)
        self.device = device
        self.shared_device = shared_device
        self.adapters = RandomAdapters(self.config, dtype)
        self.versions = dict.fromkeys(range(people), 1)
        self.longest = 200 if is_cpu else 1000
        self.most_alive = 40 if is_cpu else 400
        self.engine = Engine(
            EngineConfig(
                arena_bytes=(5 << 20) if is_cpu else (40 << 30),
                host_cache_bytes=(2 << 20) if is_cpu else (8 << 30),
                device=device,
                dtype=str(dtype).removeprefix("torch."),
            ),
            random_model(self.config, device=device, dtype=dtype),
            Path("unused"),
            read=self.read,
        )
        self.alive: dict[str, Request] = {}
        self.written: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.number = 0

    def read(self, ref: AdapterRef) -> LoraWeights:
        if ref.version % 8 == 7:
            raise OSError("a version that cannot be read")
        return self.adapters.read(ref)

    def ref(self, person: int) -> AdapterRef:
        named = self.adapters.ref(KINDS[person % len(KINDS)], person)
        return AdapterRef(named.id, self.versions[person])

    def act(self) -> None:
        """What people do between two steps."""
        chance = self.random.random
        person = min(int(self.random.paretovariate(0.5)) - 1, len(self.versions) - 1)
        if len(self.alive) < self.most_alive and chance() < 0.5:
            self.ask(person)
        if chance() < 0.05:
            self.engine.prefetch(self.ref(self.random.choice(list(self.versions))))
        if self.alive and chance() < 0.02:
            self.engine.cancel(self.random.choice(list(self.alive)))
        if chance() < 0.02:
            self.versions[person] += 1
            self.engine.prefetch(self.ref(person))
        if chance() < 0.002:
            self.engine.forget(self.ref(person).id)

    def ask(self, person: int) -> None:
        self.number += 1
        length = self.random.randint(1, self.longest)
        head = random.Random(person)  # a person's prompts begin alike
        prompt = [head.randrange(1, self.config.vocab_size) for _ in range(length)]
        sampling = SamplingParams(
            temperature=self.random.choice((0.0, 1.0)),
            seed=self.number,
            max_tokens=self.random.randint(1, self.longest),
            ignore_eos=True,
        )
        adapter = None if self.random.random() < 0.1 else self.ref(person)
        request = Request(f"r{self.number}", tuple(prompt), sampling, adapter, user_key=f"p{person}")
        self.engine.submit(request)
        self.alive[request.id] = request

    def step(self) -> None:
        for event in self.engine.step():
            self.take(event)

    def take(self, event: TokensEvent | FinishedEvent) -> None:
        if isinstance(event, TokensEvent):
            assert event.first_index == self.written[event.request_id]
            self.written[event.request_id] += len(event.token_ids)
            return
        request = self.alive.pop(event.request_id)  # a second end would find nothing here
        written = self.written.pop(event.request_id, 0)
        assert written == event.usage.completion_tokens
        assert event.reason != "length" or written == request.sampling.max_tokens
        self.outcomes[event.error_code or event.reason] += 1

    def round(self, seconds: float) -> dict[str, float]:
        """Work for so long, let everything end, prove the books; memory in MB afterwards."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.act()
            self.step()
            if self.number % 16 == 0:
                self.engine.check_integrity()
        for event in self.engine.drain():
            self.take(event)
        self.engine.check_integrity()
        assert not self.alive
        gc.collect()
        memory = {"host": _resident_mb()}
        if self.device != "cpu":
            memory["device"] = _device_mb(self.shared_device)
        return memory


def _device_mb(shared: bool) -> float:
    """What is in use on the device, or, if it is shared, what this process's torch has reserved of it."""
    if shared:
        return round(torch.cuda.memory_reserved() / 1e6, 1)
    free, total = torch.cuda.mem_get_info()
    return round((total - free) / 1e6, 1)


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * 4096 / 1e6, 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--shared-device",
        action="store_true",
        help="others use the GPU too: judge its memory by what torch has reserved in this process, which "
        "misses what the driver and libraries take beside it, and not by all that is in use on the device",
    )
    parser.add_argument("--people", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--drift-mb", type=float, default=64.0)
    parser.add_argument("--keep", action="store_true", help="keep the numbers in benchmarks/results")
    options = parser.parse_args()
    soak = Soak(options.device, options.people, options.seed, shared_device=options.shared_device)
    memory: list[dict[str, float]] = []
    for number in range(options.rounds):
        memory.append(soak.round(60 * options.minutes / options.rounds))
        print(f"round {number + 1}: {json.dumps({**memory[-1], **soak.outcomes})}", flush=True)
    numbers: dict[str, Any] = {
        **gpu(),
        "device": options.device,
        "shared_device": options.shared_device,
        "minutes": options.minutes,
        "people": options.people,
        "requests": soak.number,
        "outcomes": dict(soak.outcomes),
        "memory_mb": memory,
        "stats": soak.engine.stats().as_dict(),
    }
    soak.engine.close()
    for where, after in memory[-1].items():
        before = max(one[where] for one in memory[: max(1, options.rounds // 2)])
        if after - before > options.drift_mb:
            print(json.dumps(numbers, default=str))
            raise Drift(where, options.drift_mb, after - before)
    report("soak", numbers, keep=options.keep)


if __name__ == "__main__":
    main()
