"""A person's turns → rows to train on and rows to judge by. Pure: the same turns give the same rows.

The split is by time: the newest part of what can be learned is the gate's and is never trained on. A row is a
window of whole turns in the order they were said, rendered as serving would; the windows are in order too,
the newest last. Turns of others stay in a row as context, unlearned.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import groupby

from personalization.history import Turn, effective, learned
from personalization.prompt import Example, Renderer


@dataclass(frozen=True, slots=True)
class Split:
    """`train` and `gate` are rows, oldest first; the ids name the turns that are learned in them."""

    train: list[Example]
    gate: list[Example]
    train_turns: tuple[str, ...]
    gate_turns: tuple[str, ...]


def split(
    turns: Sequence[Turn],
    renderer: Renderer,
    *,
    window_tokens: int = 512,
    train_context_tokens: int = 0,
    gate_context_tokens: int = 256,
    gate_fraction: float = 0.1,
) -> Split:
    """Rows of at most `window_tokens` tokens. Each begins with up to so many tokens of the turns before it as
    context. The gate has the newest `gate_fraction` of the learned turns (one at least, if there are two),
    without those that repeat the words of a trained turn: they would measure memory. A turn longer than a
    window is a row of its own, cut at its end."""
    for name, tokens in (("train", train_context_tokens), ("gate", gate_context_tokens)):
        if not 0 <= tokens < window_tokens:
            raise ValueError(f"{name}_context_tokens: expected 0 to below {window_tokens}, got {tokens}")
    held = hold_out(turns, gate_fraction)
    said, cut, whole = held.said, held.cut, len(held.said)
    return Split(
        _rows(said, 0, cut, renderer, set(held.train), window_tokens, train_context_tokens),
        _rows(said, cut, whole, renderer, set(held.gate), window_tokens, gate_context_tokens),
        held.train,
        held.gate,
    )


@dataclass(frozen=True, slots=True)
class HeldOut:
    """`said`: the turns as they should have been, oldest first; the gate's part begins at `cut`. `train` and
    `gate` are the ids of the turns that are learned in each part."""

    said: list[Turn]
    cut: int
    train: tuple[str, ...]
    gate: tuple[str, ...]


def hold_out(turns: Sequence[Turn], gate_fraction: float, known: Collection[str] = ()) -> HeldOut:
    """Where the gate's part begins: it has the newest `gate_fraction` of the learned turns (one at least, if
    there are two), without those that repeat the words of a trained turn.

    `known`: the ids that the version to go on from has learned; nobody can be judged by these, so the newest
    of the others are held out then, and at most half of them."""
    if not 0.0 <= gate_fraction < 1.0:
        raise ValueError(f"gate_fraction: expected 0 to below 1, got {gate_fraction}")
    said = effective(sorted(turns, key=lambda turn: turn.at))
    lessons = [place for place, turn in enumerate(said) if learned(turn)]
    fresh = [place for place in lessons if said[place].id not in known]
    most = len(fresh) // 2 if len(fresh) < len(lessons) else len(lessons) - 1
    held_out = min(math.ceil(len(lessons) * gate_fraction), most) if lessons else 0
    cut = fresh[len(fresh) - held_out] if held_out else len(said)
    train = [said[place] for place in lessons if place < cut]
    words_known = {words(turn) for turn in train}
    gate = [said[place] for place in fresh if place >= cut and words(said[place]) not in words_known]
    return HeldOut(said, cut, tuple(turn.id for turn in train), tuple(turn.id for turn in gate))


@dataclass(frozen=True, slots=True)
class Parts:
    """A person's turns cut by time. Each part but the last ends right before the next one's first learned
    turn, so what was said between belongs to the older part; `history` + `gate` is what a service has seen
    before `test` was said."""

    history: list[Turn]
    gate: list[Turn]
    test: list[Turn]


def cut_by_time(turns: Sequence[Turn], shares: tuple[float, float, float] = (0.7, 0.1, 0.2)) -> Parts:
    """Cut so that the learned turns are shared out as `shares`, oldest first; rounded, but a part with a
    share has at least one learned turn as long as there are three. Pure."""
    said = sorted(turns, key=lambda turn: turn.at)
    lessons = [place for place, turn in enumerate(said) if learned(turn)]
    if len(lessons) < 3:
        return Parts(said, [], [])
    test = max(1, round(len(lessons) * shares[2]))
    gate = max(1, round(len(lessons) * shares[1]))
    first_test = lessons[-test]
    first_gate = lessons[max(1, len(lessons) - test - gate)]
    return Parts(said[:first_gate], said[first_gate:first_test], said[first_test:])


def serving_rows(
    before: Sequence[Turn],
    judged: Sequence[Turn],
    renderer: Renderer,
    *,
    reply_tokens: int = 256,
    most_tokens: int | None = None,
    learn: Callable[[Turn], bool] = learned,
) -> list[Example]:
    """The turns of `judged` to learn, each behind the very window of earlier turns that serving would show
    before it, leaving `reply_tokens` for the reply, a quarter of the context at most. The window's start
    stays where it is between two jumps, so the turns between them share one row: at most `most_tokens` (None:
    context_length), cut at its end."""
    context = min(most_tokens or renderer.context_length, renderer.context_length)
    said = effective([*before, *judged])
    wanted = {turn.id for turn in effective(list(judged)) if learn(turn)}
    budget = max(1, context - min(reply_tokens, context // 4) - renderer.frame_cost)
    starts = [0, *renderer.window_starts(said, budget)]  # starts[n]: of the window over said[:n]
    rows: list[Example] = []
    lessons = [place for place, turn in enumerate(said) if turn.id in wanted]
    for start, group in groupby(lessons, key=lambda place: min(starts[place], place)):
        here = list(group)
        example = renderer.example(said[start : here[-1] + 1], _among({said[place].id for place in here}))
        row = Example(example.token_ids[:context], example.learn_mask[:context])
        if any(row.learn_mask[1:]):
            rows.append(row)
    return rows


def _rows(
    said: Sequence[Turn],
    first: int,
    past: int,
    renderer: Renderer,
    lessons: set[str],
    window_tokens: int,
    context_tokens: int,
) -> list[Example]:
    """The turns from `first` to before `past`, cut into windows; a window ends with its last turn to learn,
    and one without any is no row."""
    costs = [renderer.cost(turn) for turn in said[:past]]
    room = window_tokens - renderer.frame_cost
    rows = []
    while first < past:
        context = first
        spare = min(context_tokens, room - costs[first])
        while context > 0 and costs[context - 1] <= spare:
            context -= 1
            spare -= costs[context]
        used = sum(costs[context : first + 1])
        end = first + 1
        while end < past and used + costs[end] <= room:
            used += costs[end]
            end += 1
        here = [place for place in range(first, end) if said[place].id in lessons]
        if here:
            example = renderer.example(
                said[context : here[-1] + 1], _among({said[place].id for place in here})
            )
            if any(example.learn_mask[:window_tokens]):
                rows.append(Example(example.token_ids[:window_tokens], example.learn_mask[:window_tokens]))
        first = end
    return rows


def _among(ids: set[str]) -> Callable[[Turn], bool]:
    return lambda turn: turn.id in ids


def words(turn: Turn) -> str:
    """What was said, without case and spacing: two turns that agree in it repeat each other."""
    return " ".join(turn.text.casefold().split())
