"""A person's turns → rows to train on and rows to judge by. Pure: the same turns give the same rows.

The cut is by time: the newest part of what can be learned is the gate's, and no candidate is trained on it.
A row is a window of whole turns in the order they were said, rendered as serving would; the windows are in
order too, the newest last. Turns of others stay in a row as context, unlearned.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import groupby

from personalization.history import Turn, effective, learned, served_turns
from personalization.prompt import Example, Renderer


def training_rows(
    turns: Sequence[Turn],
    renderer: Renderer,
    window_tokens: int,
    learn: Callable[[Turn], bool] = learned,
) -> list[Example]:
    """`windows` of the turns as they should have been and as serving shows them, oldest first."""
    return windows(_shown(sorted(turns, key=lambda turn: turn.at)), renderer, window_tokens, learn)


def windows(
    said: Sequence[Turn],
    renderer: Renderer,
    window_tokens: int,
    learn: Callable[[Turn], bool] = learned,
) -> list[Example]:
    """Windows of whole turns, at most `window_tokens` tokens each, the model's context at most, in the
    order given. A window ends with its last turn to learn, and one without any is no row. A turn longer than
    a window is a row of its own, cut at its end.

    `said` is shown as it is, in its order. What serving would not show can only be told of a whole history:
    with the question between two replies taken out, the first would count as asked for again."""
    costs = [renderer.cost(turn) for turn in said]
    window_tokens = min(window_tokens, renderer.context_length)
    room = window_tokens - renderer.frame_cost
    rows: list[Example] = []
    first = 0
    while first < len(said):
        used = costs[first]
        past = first + 1
        while past < len(said) and used + costs[past] <= room:
            used += costs[past]
            past += 1
        lessons = [place for place in range(first, past) if learn(said[place])]
        if lessons:
            example = renderer.example(said[first : lessons[-1] + 1], learn)
            row = Example(example.token_ids[:window_tokens], example.learn_mask[:window_tokens])
            if any(row.learn_mask):
                rows.append(row)
        first = past
    return rows


@dataclass(frozen=True, slots=True)
class HeldOut:
    """`said`: the turns as they should have been, oldest first; the first that is held out is at `cut`. By
    their ids: `newest`, the turns held out, `gate`, those of them that judge, and `train`, all others that
    are learned."""

    said: list[Turn]
    cut: int
    train: tuple[str, ...]
    newest: tuple[str, ...]
    gate: tuple[str, ...]


def hold_out(
    turns: Sequence[Turn], gate_fraction: float, known: Collection[str] = (), *, most: int | None = None
) -> HeldOut:
    """What is held out: the newest `gate_fraction` of the learned turns (one at least, if there are two; at
    most `most`). Those that repeat the words of another turn judge nobody.

    `known`: the ids that the version to be judged against has learned; nobody can be judged by these, so the
    newest of the others are held out then, and at most half of them. They may be older than known ones."""
    if not 0.0 <= gate_fraction < 1.0:
        raise ValueError(f"gate_fraction: expected 0 to below 1, got {gate_fraction}")
    said = _shown(sorted(turns, key=lambda turn: turn.at))
    lessons = [place for place, turn in enumerate(said) if learned(turn)]
    fresh = [place for place in lessons if said[place].id not in known]
    room = len(fresh) // 2 if len(fresh) < len(lessons) else len(lessons) - 1
    if most is not None:
        room = min(room, most)
    held_out = min(math.ceil(len(lessons) * gate_fraction), room) if lessons else 0
    cut = fresh[len(fresh) - held_out] if held_out else len(said)
    newest = [said[place] for place in fresh if place >= cut]
    ids = {turn.id for turn in newest}
    train = [said[place] for place in lessons if said[place].id not in ids]
    words_known = {words(turn) for turn in train}
    gate = [turn for turn in newest if words(turn) not in words_known]
    return HeldOut(said, cut, *(tuple(turn.id for turn in part) for part in (train, newest, gate)))


@dataclass(frozen=True, slots=True)
class Parts:
    """A person's turns cut by time. Each part but the last ends right before the next one's first learned
    turn, so what was said between belongs to the older part; `history` + `gate` is what a service has seen
    before `test` was said."""

    history: list[Turn]
    gate: list[Turn]
    test: list[Turn]


def cut_by_time(turns: Sequence[Turn]) -> Parts:
    """Cut so that of the learned turns the oldest 70 % are history, 10 % the gate's and the newest 20 % for
    the test; rounded, but each part has at least one as long as there are three. Pure."""
    said = sorted(turns, key=lambda turn: turn.at)
    lessons = [place for place, turn in enumerate(said) if learned(turn)]
    if len(lessons) < 3:
        return Parts(said, [], [])
    test = max(1, round(len(lessons) * 0.2))
    gate = max(1, round(len(lessons) * 0.1))
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
    said = _shown([*before, *judged])
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


def _shown(turns: Sequence[Turn]) -> list[Turn]:
    """The turns as they should have been and as serving shows them: without replies that were asked for
    again, except one to learn from, as it was rated up. That is asked first, as serving does: a reply whose
    successor was put right was asked for again all the same."""
    served = {turn.id for turn in served_turns(turns)}
    return effective([turn for turn in turns if turn.id in served or learned(turn)])


def _among(ids: set[str]) -> Callable[[Turn], bool]:
    return lambda turn: turn.id in ids


def words(turn: Turn) -> str:
    """What was said, without case and spacing: two turns that agree in it repeat each other."""
    return " ".join(turn.text.casefold().split())
