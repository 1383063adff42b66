"""Train the adapters of many people at once, over one frozen base.

Each person has their own examples, seed, learning rate, steps and end; the stack only shares the work. A run
of one person alone and of the same person in a stack of others compute the same thing, up to rounding.

A row is a stretch of whole conversations, not a single message: the adapter has to add to the context that
serving puts in the prompt, so it must learn with one. Trained on rows of 64 tokens it gains less than half of
what it gains on rows of 512, judged behind that context.
"""

import math
import random
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.adapter_files import LoraWeights
from engine.model import MODULES, Decoder
from engine.weights import LoadedModel
from personalization.prompt import Example
from personalization.score import token_losses
from personalization.stack import AdapterShape, AdapterStack, RowAttention

# Logits of this many tokens (float32, 8k words: 4 MB) stay in the second-level cache of a processor. A GPU
# has none that would hold them; there it is the memory that they may take: this much, or so small a part of
# what the process is granted.
_HEAD_ROWS = 128
_DEVICE_HEAD_BYTES, _DEVICE_HEAD_PART = 512 << 20, 64
_HEAD_COPIES = 8  # of these bytes at the worst moment: logits, probabilities, gradients, in both types
_DEVICE_SHARE = 0.7  # of the memory that is free when training begins
_OPEN_BINS = 32
_STEPS_AHEAD = 8  # are laid out at a time
_ALIGNED = 8  # rows are of so many tokens or a multiple: a GPU's attention wants it
# Enough rows for the products to run at full speed on every core; more would only take more memory.
PEOPLE_AT_ONCE = 64
_LEAST_IN_A_LANE = 4
# Tokens of one step of all who train at a time, on a processor: the backward pass keeps about half a
# megabyte for each token of the demo model, and this many already fill every core.
_HOST_TOKENS_AT_ONCE = 4096


class InvalidRecipe(ValueError):
    """A recipe's value is out of range: `field`, `expected`, `got`."""

    def __init__(self, field: str, expected: str, got: object) -> None:
        super().__init__(f"{field}: expected {expected}, got {got!r}")
        self.field = field
        self.expected = expected
        self.got = got


@dataclass(frozen=True, slots=True)
class Recipe:
    """How an adapter is trained. `tokens_per_step` counts the tokens of one person in one optimizer step;
    the rate climbs over the first `warmup` share of a person's steps and falls to zero at their last.
    `pull`: each step also draws the weights towards where they began, w -= rate * pull * (w - start), as
    decoupled weight decay draws them towards zero. `most_steps`: no further epoch is begun that would end
    after so many; the first one is always whole."""

    rank: int = 8
    alpha: float = 16.0
    modules: tuple[str, ...] = MODULES
    learning_rate: float = 1e-3
    epochs: int = 3
    tokens_per_step: int = 512
    warmup: float = 0.1
    clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.99)
    pull: float = 0.0
    most_steps: int | None = None

    def __post_init__(self) -> None:
        checks: list[tuple[str, bool, str]] = [
            ("rank", 1 <= self.rank <= 256, "1 to 256"),
            ("alpha", 0 < self.alpha < math.inf, "a positive number"),
            ("modules", bool(self.modules) and set(self.modules) <= set(MODULES), f"some of {MODULES}"),
            ("learning_rate", 0 < self.learning_rate < 1, "between 0 and 1"),
            ("epochs", self.epochs >= 1, "at least 1"),
            ("tokens_per_step", self.tokens_per_step >= 2, "at least 2"),
            ("warmup", 0 <= self.warmup < 1, "0 to 1"),
            ("clip", self.clip > 0, "a positive number"),
            ("betas", all(0 <= beta < 1 for beta in self.betas), "0 to 1"),
            ("most_steps", self.most_steps is None or self.most_steps >= 1, "at least 1, or None"),
            ("pull", 0 <= self.pull * self.learning_rate < 1, "0 or more, times the rate below 1"),
        ]
        for name, valid, expected in checks:
            if not valid:
                raise InvalidRecipe(name, expected, getattr(self, name))


@dataclass(frozen=True, slots=True)
class Person:
    """Whose adapter to train: what to learn from, where to start (None: from nothing), the seed of it all.

    With `watch`, the loss on these examples is taken after each epoch; training stops when it got worse, and
    the best epoch's weights are kept. `emphasis`: how much a learned token of each example counts; empty: all
    alike. `recipe`: their own, None for the stack's; rank, alpha, modules, tokens_per_step and betas are the
    stack's in any case.
    """

    examples: Sequence[Example]
    seed: int
    start: LoraWeights | None = None
    watch: Sequence[Example] = ()
    emphasis: Sequence[float] = ()
    recipe: Recipe | None = None


@dataclass(frozen=True, slots=True)
class Trained:
    """What came of it. Losses are nats per learned token, means over the first and the last epoch, NaN
    without steps. `error`: why training broke off; the weights are those before that step."""

    weights: LoraWeights
    steps: int
    tokens: int
    first_loss: float
    last_loss: float
    error: str | None = None


def best_dtype(device: torch.device, cpuinfo: Path = Path("/proc/cpuinfo")) -> torch.dtype:
    """bfloat16 where the device multiplies it in hardware, float32 elsewhere."""
    if device.type != "cpu":
        return torch.bfloat16
    try:
        text = cpuinfo.read_text(encoding="utf-8")
    except OSError:
        return torch.float32
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "").split()
    return torch.bfloat16 if {"amx_bf16", "avx512_bf16"} & set(flags) else torch.float32


def train(
    model: LoadedModel,
    people: Sequence[Person],
    recipe: Recipe,
    *,
    people_at_once: int = PEOPLE_AT_ONCE,
    on_progress: Callable[[float], None] = lambda share: None,
) -> list[Trained]:
    """Train everyone's adapter; results in the order of `people`. See `train_stacks`."""
    results: dict[int, Trained] = {}
    for stack in train_stacks(model, people, recipe, people_at_once=people_at_once, on_progress=on_progress):
        results.update(stack)
    return [results[index] for index in range(len(people))]


def train_stacks(
    model: LoadedModel,
    people: Sequence[Person],
    recipe: Recipe,
    *,
    people_at_once: int = PEOPLE_AT_ONCE,
    on_progress: Callable[[float], None] = lambda share: None,
) -> Iterator[dict[int, Trained]]:
    """Train stack after stack; each gives its people's results by their place in `people`, as they come.

    At most `people_at_once` are trained at a time. On a processor of several cores each core works on a stack
    of its own: that needs no word between them, while cores that share one product wait for each other. One
    person alone has all cores. `on_progress` gets the share of all steps done, 0 to 1, from any thread.
    """
    runs = [_Run.of(person, recipe) for person in people]
    shape = AdapterShape(model.config, recipe.modules, recipe.rank, recipe.alpha)
    total = sum(len(run.steps) for run in runs) or 1
    done, counting = 0, threading.Lock()

    def count(steps: int) -> None:
        nonlocal done
        with counting:
            done += steps
            on_progress(min(1.0, done / total))

    def work(chosen: Sequence[int]) -> dict[int, Trained]:
        trained = _train_stack(model, shape, [runs[index] for index in chosen], recipe.betas, count)
        return dict(zip(chosen, trained, strict=True))

    if model.decoder.embed.is_cuda:
        people_at_once = min(people_at_once, _people_that_fit(model, shape, recipe))
    else:
        room = _HOST_TOKENS_AT_ONCE // recipe.tokens_per_step
        people_at_once = min(people_at_once, max(_LEAST_IN_A_LANE, room))
    threads = torch.get_num_threads()
    lanes = 1 if model.decoder.embed.is_cuda else min(threads, people_at_once // _LEAST_IN_A_LANE)
    stacks, lanes = _stacks([len(run.steps) for run in runs], people_at_once, max(1, lanes))
    if lanes == 1:
        yield from map(work, stacks)
        return
    each = max(1, threads // lanes)
    with ThreadPoolExecutor(lanes, initializer=torch.set_num_threads, initargs=(each,)) as pool:
        for future in as_completed([pool.submit(work, stack) for stack in stacks]):
            yield future.result()


def _people_that_fit(model: LoadedModel, shape: AdapterShape, recipe: Recipe) -> int:
    """How many may share a stack on a GPU, by the memory that is free now and that the process is granted.

    What the backward pass keeps of a token, per layer: the residual stream and what the norms gave of it, q,
    k and v as projected, rotated and attended over, and four times the feed-forward's width. A person has
    weights, where they began and moments in float32, and weights and gradient in the products' type."""
    config = model.config
    dtype_bytes = model.decoder.embed.element_size()
    heads = config.num_heads * config.head_dim
    kept = 8 * config.hidden_size + 6 * heads + 4 * config.intermediate_size
    token_bytes = dtype_bytes * (config.num_layers * kept + 2 * recipe.tokens_per_step)
    person_bytes = shape.size * (4 * 4 + 4 * dtype_bytes)
    device = model.decoder.embed.device
    free, total = torch.cuda.mem_get_info(device)
    granted = total * torch.cuda.get_per_process_memory_fraction(device) - torch.cuda.memory_allocated(device)
    room = min(free, granted) * _DEVICE_SHARE - _HEAD_COPIES * _head_bytes(device)
    return max(1, int(room / (token_bytes * recipe.tokens_per_step + person_bytes)))


def _head_bytes(device: torch.device) -> int:
    """Of one block of logits on a GPU."""
    granted = torch.cuda.get_device_properties(device).total_memory
    granted = int(granted * torch.cuda.get_per_process_memory_fraction(device))
    return min(_DEVICE_HEAD_BYTES, granted // _DEVICE_HEAD_PART)


def _stacks(steps: Sequence[int], people_at_once: int, lanes: int) -> tuple[list[list[int]], int]:
    """Who shares a stack, and how many stacks are worked on at a time. Neighbours in length go together, so
    that a stack stays full to its end, and all stacks have about the same number of steps in all."""
    order = sorted(range(len(steps)), key=lambda index: -steps[index])
    lanes = max(1, min(lanes, len(order) // _LEAST_IN_A_LANE))
    count = lanes * math.ceil(len(order) / people_at_once)
    share = sum(steps) / max(1, count)
    stacks: list[list[int]] = []
    taken = 0.0
    for index in order:
        if not stacks or len(stacks[-1]) == people_at_once or taken >= share * len(stacks):
            stacks.append([])
        stacks[-1].append(index)
        taken += steps[index]
    return stacks, lanes


@dataclass(frozen=True, slots=True)
class Step:
    """One person's share of one optimizer step: whole examples, together at most `tokens_per_step` tokens."""

    examples: tuple[Example, ...]
    epoch: int
    emphasis: tuple[float, ...] = ()  # of each example; empty: all alike

    @property
    def tokens(self) -> int:
        return sum(len(example.token_ids) for example in self.examples)

    @property
    def learned(self) -> int:
        """Tokens that are learned; the first of an example cannot be."""
        return sum(bytes(example.learn_mask).count(1, 1) for example in self.examples)


def plan(
    examples: Sequence[Example], recipe: Recipe, seed: int, emphasis: Sequence[float] = ()
) -> list[Step]:
    """Every step of a person's run. Each epoch sees every example once, in a new order; an example longer
    than a step is cut. Depends on nothing but its arguments, so company changes nothing."""
    if emphasis and len(emphasis) != len(examples):
        raise ValueError(f"emphasis: expected one for each of {len(examples)} examples, got {len(emphasis)}")
    if not all(0 < weight < math.inf for weight in emphasis):
        raise ValueError(f"emphasis: expected positive numbers, got {min(emphasis)} to {max(emphasis)}")
    pieces = [
        (piece, weight)
        for example, weight in zip(examples, emphasis or [1.0] * len(examples), strict=True)
        for piece in _cut(example, recipe.tokens_per_step)
    ]
    shuffle = random.Random(seed)
    steps: list[Step] = []
    for epoch in range(recipe.epochs):
        shuffle.shuffle(pieces)
        packed = _pack([len(piece.token_ids) for piece, _ in pieces], recipe.tokens_per_step)
        if epoch and recipe.most_steps is not None and len(steps) + len(packed) > recipe.most_steps:
            break
        for chosen in packed:
            weights = tuple(pieces[place][1] for place in chosen) if emphasis else ()
            steps.append(Step(tuple(pieces[place][0] for place in chosen), epoch, weights))
    return steps


def _cut(example: Example, length: int) -> list[Example]:
    """Pieces of at most `length` tokens that have something to learn (the first token of a piece has no
    token before it, so it cannot be learned)."""
    pieces = []
    for begin in range(0, len(example.token_ids), length):
        end = begin + length
        if any(example.learn_mask[begin + 1 : end]):
            pieces.append(Example(example.token_ids[begin:end], example.learn_mask[begin:end]))
    return pieces


def _pack(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """The places of pieces of these sizes in bins: first fit among the newest bins, which keeps most of the
    order and fills nearly all of each bin."""
    bins: list[list[int]] = []
    rooms: list[int] = []
    for place, size in enumerate(sizes):
        oldest_open = max(0, len(bins) - _OPEN_BINS)
        index = next((at for at in range(oldest_open, len(bins)) if size <= rooms[at]), len(bins))
        if index == len(bins):
            bins.append([])
            rooms.append(capacity)
        bins[index].append(place)
        rooms[index] -= size
    return bins


@dataclass(slots=True)
class _Run:
    """One person's way through their steps."""

    person: Person
    recipe: Recipe
    steps: list[Step]
    taken: int = 0
    tokens: int = 0
    losses: dict[int, list[tuple[float, int]]] = field(default_factory=dict)  # epoch -> (sum, learned tokens)
    stopped: bool = False
    error: str | None = None
    best_watched: float = math.inf
    best_row: Tensor | None = None

    @classmethod
    def of(cls, person: Person, recipe: Recipe) -> "_Run":
        own = person.recipe or recipe
        for name in ("rank", "alpha", "modules", "tokens_per_step", "betas"):
            if getattr(own, name) != getattr(recipe, name):
                raise InvalidRecipe(name, f"the stack's {getattr(recipe, name)}", getattr(own, name))
        return cls(person, own, plan(person.examples, own, person.seed, person.emphasis))

    def epoch_ended(self) -> bool:
        return (
            self.taken == len(self.steps) or self.steps[self.taken].epoch > self.steps[self.taken - 1].epoch
        )

    def rate(self) -> float:
        return self.recipe.learning_rate * _schedule(self.taken, len(self.steps), self.recipe.warmup)

    def account(self, losses: Sequence[float], norms: Sequence[float]) -> None:
        """What became of the steps taken. A loss or norm that is not finite ended the run."""
        taken, self.taken = self.taken, 0
        for step, loss, norm in zip(self.steps[:taken], losses, norms, strict=False):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self.error = (
                    f"step {self.taken + 1}: expected finite numbers, got loss {loss}, gradient norm {norm}"
                )
                break
            self.losses.setdefault(step.epoch, []).append((loss * step.learned, step.learned))
            self.taken += 1
            self.tokens += step.tokens

    def result(self, weights: LoraWeights) -> Trained:
        means = [
            sum(total for total, _ in losses) / sum(count for _, count in losses)
            for _, losses in sorted(self.losses.items())
        ] or [math.nan]
        return Trained(weights, self.taken, self.tokens, means[0], means[-1], self.error)


def _train_stack(
    model: LoadedModel,
    shape: AdapterShape,
    runs: Sequence[_Run],
    betas: tuple[float, float],
    count: Callable[[int], None],
) -> list[Trained]:
    """Train `runs`, longest first, in one stack. On a GPU nothing is read back from it before the end, so
    that it never waits for the next step's operations."""
    decoder = model.decoder
    device, dtype = decoder.embed.device, decoder.embed.dtype
    people = [run.person for run in runs]
    rows = shape.rows([person.start for person in people], [person.seed for person in people], device)
    stack = AdapterStack(shape, rows, dtype, pulled=any(run.recipe.pull for run in runs))
    clip = torch.tensor([run.recipe.clip for run in runs], device=device)
    sound = torch.ones(len(runs), dtype=torch.bool, device=device)  # all numbers were finite so far
    notes: list[Tensor] = []  # of each step [2, U]: losses and gradient norms
    arrays: dict[int, _Arrays] = {}
    batches: list[_Batch] = []
    most_ahead = 1 if any(run.person.watch for run in runs) else _STEPS_AHEAD  # who is watched may stop
    step = 0
    while True:
        # Longest first: whoever has steps left stands before everyone who has none.
        active = sum(len(run.steps) > step for run in runs)
        working = [run for run in runs[:active] if not run.stopped]
        if not working:
            break
        if active < stack.people:
            stack.use(active)
        if not batches:
            ahead = min(step + 1, most_ahead)  # the device is not to wait long for its first step
            batches = _batches(_next_steps(runs, step, ahead), arrays, device)[::-1]
        losses = _forward_backward(decoder, stack, batches.pop(), dtype)
        norms = stack.gradient_norms()
        sound = sound[:active] & losses.isfinite() & norms.isfinite()
        notes.append(torch.stack((losses, norms)))
        stack.update(
            [0.0 if run.stopped else run.rate() for run in runs[:active]],
            (norms / clip[:active]).clamp_(min=1.0),
            sound,
            betas,
            [run.recipe.pull for run in runs[:active]],
        )
        for index, run in enumerate(runs[:active]):
            if run.stopped:
                continue
            run.taken += 1
            if run.person.watch and run.epoch_ended():
                _watch(model, shape, run, stack.rows[index])
        step += 1
        count(len(working))
    written = [note.tolist() for note in notes]
    for index, run in enumerate(runs):
        if run.best_row is not None:
            stack.rows[index] = run.best_row
        mine = [(losses[index], norms[index]) for losses, norms in written[: run.taken]]
        run.account([loss for loss, _ in mine], [norm for _, norm in mine])
    return [run.result(weights) for run, weights in zip(runs, shape.weights(stack.rows), strict=True)]


def _next_steps(runs: Sequence[_Run], first: int, count: int) -> list[list[Step | None]]:
    """The steps of everyone who has one left, from the first on, as many as `count`. Longest runs first."""
    found: list[list[Step | None]] = []
    for step in range(first, first + count):
        active = sum(len(run.steps) > step for run in runs)
        row = [None if run.stopped else run.steps[step] for run in runs[:active]]
        if not any(row):
            break
        found.append(row)
    return found


def _schedule(step: int, steps: int, warmup: float) -> float:
    """Linear up over the first `warmup` share of the steps, then linear to zero after the last."""
    rising = max(1, round(warmup * steps))
    return min((step + 1) / rising, (steps - step) / max(1, steps - rising + 1))


def _watch(model: LoadedModel, shape: AdapterShape, run: _Run, row: Tensor) -> None:
    losses = token_losses(model, run.person.watch, shape.weights(row[None])[0])
    watched = torch.cat(losses).mean().item()
    if watched < run.best_watched:
        run.best_watched, run.best_row = watched, row.clone()
    else:
        run.stopped = True


_Arrays = tuple[NDArray[np.int64], NDArray[np.intp]]  # an example's ids, and the places that are learned


@dataclass(frozen=True, slots=True)
class _Batch:
    """One step of the whole stack: rows of S tokens by person, and where the loss is taken."""

    token_ids: Tensor  # [U*S]
    positions: Tensor  # [U, S]
    segments: Tensor  # [U, S], -1 on padding
    bounds: Tensor  # [B + 1] int32: where each example, or the padding of a row, begins in the flat tokens
    longest: int  # of those
    loss_at: Tensor  # [N] flat places whose next token is learned
    targets: Tensor  # [N]
    people: Tensor  # [N] whose place it is
    weights: Tensor  # [N] float32; each person's sum to 1


def _batches(
    steps: Sequence[Sequence[Step | None]], arrays: dict[int, _Arrays], device: torch.device
) -> list[_Batch]:
    """The batches of these steps, laid out together and moved to the device together: one at a time, person
    by person, this would take the host longer than the device takes to train. steps [K][U], U may fall; None
    fills a row with padding. `arrays` keeps what was made of the examples, by their ids, from call to call.
    """
    owners: list[tuple[int, int]] = []  # (step, person) of each example
    examples: list[_Arrays] = []
    emphasis: list[float] = []
    for number, row in enumerate(steps):
        for person, step in enumerate(row):
            if step is None:
                continue
            for example in step.examples:
                if id(example) not in arrays:
                    arrays[id(example)] = _arrays_of(example)
                examples.append(arrays[id(example)])
                owners.append((number, person))
            emphasis.extend(step.emphasis or (1.0,) * len(step.examples))
    people = np.array([len(row) for row in steps])
    widest = int(people.max())
    step_of, person_of = np.array(owners).T
    row_of = step_of * widest + person_of
    sizes = np.array([len(ids) for ids, _ in examples])

    # Where each example begins in its row, and each row and step in the tokens of all.
    before = np.cumsum(sizes) - sizes
    is_first = np.append(True, row_of[1:] != row_of[:-1])
    first_of_row = np.flatnonzero(is_first)[np.cumsum(is_first) - 1]
    used = np.bincount(row_of, sizes, len(steps) * widest).astype(np.int64).reshape(-1, widest)
    lengths = -(-used.max(1) // _ALIGNED) * _ALIGNED
    step_begins = np.append(0, np.cumsum(people * lengths))
    begins = step_begins[step_of] + person_of * lengths[step_of] + before - before[first_of_row]

    within = np.arange(sizes.sum()) - np.repeat(before, sizes)
    places = np.repeat(begins, sizes) + within
    token_ids, positions = (np.zeros(step_begins[-1], np.int64) for _ in range(2))
    segments = np.full(step_begins[-1], -1, np.int64)
    token_ids[places] = np.concatenate([ids for ids, _ in examples])
    positions[places] = within
    segments[places] = np.repeat(np.arange(len(sizes)) - first_of_row, sizes)

    learned = np.array([len(at) for _, at in examples])
    loss_at = np.repeat(begins, learned) + np.concatenate([at for _, at in examples])
    weights = np.repeat(np.array(emphasis), learned)
    learned_row = np.repeat(row_of, learned)
    weights /= np.bincount(learned_row, weights, len(steps) * widest)[learned_row]
    loss_begins = np.append(0, np.cumsum(np.bincount(step_of, learned, len(steps)).astype(np.int64)))
    loss_step = np.repeat(step_of, learned)

    padded = [
        (number, person)
        for number, row in enumerate(steps)
        for person in range(len(row))
        if used[number, person] < lengths[number]
    ]
    paddings = np.array(
        [step_begins[number] + person * lengths[number] + used[number, person] for number, person in padded],
        np.int64,
    )
    all_bounds = np.sort(np.concatenate((begins, paddings)))
    cuts = np.searchsorted(all_bounds, step_begins)
    bounds = [
        np.append(all_bounds[first:last], step_begins[number + 1]) - step_begins[number]
        for number, (first, last) in enumerate(pairwise(cuts))
    ]
    bound_begins = np.append(0, np.cumsum([len(part) for part in bounds]))

    moved = {
        "token_ids": _moved(token_ids, device),
        "positions": _moved(positions, device),
        "segments": _moved(segments, device),
        "bounds": _moved(np.concatenate(bounds).astype(np.int32), device),
        "loss_at": _moved(loss_at - step_begins[loss_step], device),
        "targets": _moved(token_ids[loss_at + 1], device),
        "people": _moved(np.repeat(person_of, learned), device),
        "weights": _moved(weights.astype(np.float32), device),
    }
    batches = []
    for number in range(len(steps)):
        tokens = slice(step_begins[number], step_begins[number + 1])
        losses = slice(loss_begins[number], loss_begins[number + 1])
        shape = (int(people[number]), int(lengths[number]))
        batches.append(
            _Batch(
                moved["token_ids"][tokens],
                moved["positions"][tokens].view(shape),
                moved["segments"][tokens].view(shape),
                moved["bounds"][bound_begins[number] : bound_begins[number + 1]],
                int(np.diff(bounds[number]).max()),
                moved["loss_at"][losses],
                moved["targets"][losses],
                moved["people"][losses],
                moved["weights"][losses],
            )
        )
    return batches


def _arrays_of(example: Example) -> _Arrays:
    """By way of bytes, several times as fast as number by number."""
    learned = np.frombuffer(bytes(example.learn_mask), np.bool_)
    return np.frombuffer(array("q", example.token_ids), np.int64), np.flatnonzero(learned[1:])


def _moved(numbers: NDArray[Any], device: torch.device) -> Tensor:
    tensor = torch.from_numpy(numbers)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _forward_backward(decoder: Decoder, stack: AdapterStack, batch: _Batch, dtype: torch.dtype) -> Tensor:
    """[U] mean loss of each person; the gradients of each person's own mean are left in the stack."""
    attend = RowAttention(batch.segments, batch.positions, batch.bounds, batch.longest, decoder.config, dtype)
    hidden = decoder(batch.token_ids, batch.positions.flatten(), attend, stack)
    losses, gradient = _head(decoder, hidden.detach()[batch.loss_at], batch.targets, batch.weights)
    upstream = torch.zeros_like(hidden)
    upstream[batch.loss_at] = gradient
    hidden.backward(upstream)
    means = torch.zeros(stack.people, device=hidden.device)
    return means.index_add_(0, batch.people, losses * batch.weights)


def _head(decoder: Decoder, hidden: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """-log softmax(logits)[target] of each row [N], and the gradient of weights . losses in `hidden` [N, H].

    In blocks, so that no more logits exist at a time than fit the cache, or the memory they may take.
    """
    if hidden.is_cuda:
        return _device_head(decoder, hidden, targets, weights)
    losses, gradients = [], []
    for begin in range(0, len(hidden), _HEAD_ROWS):
        rows = slice(begin, begin + _HEAD_ROWS)
        block = hidden[rows].requires_grad_()
        logits = decoder.logits(block)
        probabilities = torch.softmax(logits.detach(), -1)
        target = targets[rows, None]
        losses.append(-probabilities.gather(1, target)[:, 0].clamp_(min=1e-38).log_())
        probabilities.scatter_add_(1, target, torch.full_like(target, -1, dtype=torch.float32))
        (gradient,) = torch.autograd.grad(logits, block, probabilities)
        gradients.append(gradient * weights[rows, None].to(gradient.dtype))
    return torch.cat(losses), torch.cat(gradients)


def _device_head(decoder: Decoder, hidden: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """`_head`, the logits turned into their gradient where they are."""
    from kernels import training

    head = decoder.head
    assert head.bias is None
    size = max(_HEAD_ROWS, _head_bytes(hidden.device) // (4 * decoder.config.vocab_size))
    losses, gradients = [], []
    for begin in range(0, len(hidden), size):
        rows = slice(begin, begin + size)
        logits = head(hidden[rows])
        losses.append(training.cross_entropy(logits, targets[rows], weights[rows]))
        gradients.append(logits @ head.weight)
    return torch.cat(losses), torch.cat(gradients)
