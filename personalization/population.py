"""The population adapter: where everyone's versions start, instead of at zero. It is trained on a file
that the operator chose and on nothing else: no store is opened here, so no user's turn can get in.

    <root>/<number>/      adapter_config.json, adapter_model.safetensors, attune.json

Numbers go up from 1; the newest is used. It answers nobody itself.
"""

import asyncio
import hashlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

from engine.model import ModelConfig
from personalization.examples import hold_out, serving_rows, windows
from personalization.gate import GatePolicy
from personalization.history import Turn, parse
from personalization.prompt import Example, Renderer
from personalization.publish import place
from personalization.train import Recipe
from personalization.trainer import Judged, Progress, Task, Trainer

GATE_ROWS = 64  # as many held-out rows as judge it
HELD_OUT = 0.1  # of each conversation partner's turns, the newest


class NothingToLearn(ValueError):
    """The file holds no turn to learn: `turns` were read, `errors` lines were not."""

    def __init__(self, turns: int, errors: int) -> None:
        super().__init__(
            f"expected turns that a person wrote, got {turns} turns without any and {errors} bad lines"
        )
        self.turns, self.errors = turns, errors


@dataclass(frozen=True, slots=True)
class Workshop:
    """What it is made with; `root` is where it is kept."""

    root: Path
    config: ModelConfig
    renderer: Renderer
    trainer: Trainer
    model_name: str
    recipe: Recipe = field(default_factory=Recipe)
    gate: GatePolicy = field(default_factory=GatePolicy)
    row_tokens: int = 512


@dataclass(frozen=True, slots=True)
class Made:
    """`number` is 0 when the gate refused it: then everything stays as it was."""

    number: int
    reason: str
    numbers: dict[str, float]
    turns: int
    errors: int


def newest(root: Path | None) -> tuple[int, Path | None]:
    """The number and the folder of the newest one; (0, None) if there is none."""
    if root is None or not root.is_dir():
        return 0, None
    numbers = [int(path.name) for path in root.iterdir() if path.name.isdecimal()]
    return (max(numbers), root / str(max(numbers))) if numbers else (0, None)


async def make(
    lines: Iterable[bytes],
    workshop: Workshop,
    *,
    epochs: int = 1,
    now: datetime,
    on_progress: Callable[[float], None] = lambda share: None,
) -> Made:
    """Train on histories in the interchange format and keep the result if it is better than the bare base on
    turns that were held out. Raises NothingToLearn, TrainerDied, OSError."""
    text = list(lines)
    parsed = await asyncio.to_thread(parse, text)
    train: list[Example] = []
    gate: list[Example] = []
    learned = 0
    for turns in parsed.turns.values():
        rows, judged_by, count = await asyncio.to_thread(_rows, turns, workshop)
        train += rows
        gate += judged_by
        learned += count
    if not train:
        raise NothingToLearn(sum(map(len, parsed.turns.values())), len(parsed.errors))
    digest = hashlib.sha256(b"\n".join(text))
    seed = int.from_bytes(digest.digest()[:7], "big")
    step = max(1, len(gate) // GATE_ROWS)
    task = Task("population", train, gate[::step][:GATE_ROWS], None, seed)
    recipe = replace(workshop.recipe, epochs=epochs)
    judged: Judged | None = None
    async with aclosing(workshop.trainer.run([task], recipe, workshop.gate)) as events:
        async for event in events:
            if isinstance(event, Progress):
                on_progress(event.share)
            elif isinstance(event, Judged):
                judged = event
    assert judged is not None
    numbers = judged.numbers | judged.verdict.numbers
    made = Made(0, judged.verdict.reason, numbers, learned, len(parsed.errors))
    if not judged.verdict.accepted:
        return made
    number = newest(workshop.root)[0] + 1
    meta = {
        "base_model": workshop.model_name,
        "base_hash": judged.base_hash,
        "created_at": now.isoformat(),
        "reason": judged.verdict.reason,
        "numbers": numbers,
        "turns": learned,
        "text_sha256": digest.hexdigest(),
        "seed": seed,
    }
    await asyncio.to_thread(place, workshop.root / str(number), judged.weights, meta, workshop.config)
    return replace(made, number=number)


def _rows(turns: Sequence[Turn], workshop: Workshop) -> tuple[list[Example], list[Example], int]:
    """One history's rows to train on and to judge by, and how many turns are learned in the first."""
    held = hold_out(turns, HELD_OUT)
    older, newer = held.said[: held.cut], held.said[held.cut :]
    judged = set(held.gate)
    gate = serving_rows(
        older,
        newer,
        workshop.renderer,
        most_tokens=workshop.row_tokens,
        learn=lambda turn: turn.id in judged,
    )
    return windows(older, workshop.renderer, workshop.row_tokens), gate, len(held.train)
