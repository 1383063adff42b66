"""`attune evaluate`: a history file measured by a model, as a table and as a page of plots.

The page is one file without scripts or anything from elsewhere, and holds no name and no word of anyone.
"""

import html
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from personalization.evaluate import Evaluation, Extent, Question

if TYPE_CHECKING:
    from engine.weights import LoadedModel

HOST_PEOPLE = 12  # measured on a processor, where nobody waits for hundreds
HOST_STACKS = (1, 8)
WIDTH, HEIGHT, EDGE = 640, 260, 44  # of a plot, in pixels


def measure(
    folder: Path,
    lines: Iterable[bytes],
    extent: Extent,
    *,
    device: str = "auto",
    threads: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> Evaluation:
    """Evaluate the histories in `lines` with the model in `folder`, as the service would learn from them.
    Raises NothingToMeasure, ModelError, and what a Renderer raises of the folder."""
    import torch

    from engine.weights import load_model
    from personalization.evaluate import Bench, evaluate
    from personalization.history import parse
    from personalization.prompt import Renderer
    from personalization.refresh import RefreshPolicy
    from personalization.train import best_dtype

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if threads:
        torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    parsed = parse(lines)
    left_out = f"; {len(parsed.errors)} bad lines left out" if parsed.errors else ""
    say(f"{len(parsed.turns)} people, {sum(map(len, parsed.turns.values()))} turns{left_out}")
    model = load_model(folder, device=device, dtype=best_dtype(torch.device(device)))
    renderer = Renderer(folder, model.config.max_position_embeddings)
    if device == "cpu":
        extent = replace(
            extent,
            people=extent.people or HOST_PEOPLE,
            stacks=tuple(size for size in extent.stacks if size in HOST_STACKS),
        )
    done = evaluate(parsed.turns, Bench(model, renderer, RefreshPolicy(), say), extent)
    about = {
        "people_in_file": len(parsed.turns),
        "bad_lines": len(parsed.errors),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "dtype": str(model.decoder.embed.dtype).removeprefix("torch."),
        "base_hash": model.base_hash,
    }
    say(f"asking an engine for {len(done.questions)} people")
    return replace(done, numbers=about | done.numbers | {"engine": served(model, done.questions)})


def served(model: "LoadedModel", questions: Sequence[Question]) -> dict[str, Any]:
    """What a serving engine says to the same questions, all in one batch, each adapter from its file."""
    from engine.adapter_files import version_folder, write_adapter
    from engine.config import EngineConfig
    from engine.engine import Engine
    from engine.request import AdapterRef, Request, SamplingParams, TokensEvent

    device, dtype = model.decoder.embed.device.type, model.decoder.embed.dtype
    config = EngineConfig(
        arena_bytes=(4096 if device == "cuda" else 512) << 20,
        device=device,
        dtype=str(dtype).removeprefix("torch."),
    )
    said: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        engine = Engine(config, model, root)
        try:
            for number, question in enumerate(questions):
                ref = None
                if question.adapter is not None:
                    ref = AdapterRef(f"{number:064x}", 1)
                    folder = version_folder(root, ref.id, ref.version)
                    write_adapter(folder, question.adapter, model.config, base_model="evaluated")
                sampling = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
                engine.submit(Request(str(number), question.prompt, sampling, ref))
            for event in engine.drain():
                if isinstance(event, TokensEvent):
                    said[event.request_id] = event.token_ids[0]
            engine.check_integrity()
        finally:
            engine.close()
    same = [said.get(str(number)) == question.token for number, question in enumerate(questions)]
    with_adapter = sum(question.adapter is not None for question in questions)
    return {"asked": len(same), "with_adapter": with_adapter, "same_first_token": sum(same) / len(same)}


def table(numbers: dict[str, Any]) -> str:
    """Everything measured, as lines for a terminal."""
    parts = (_people, _losses, _harm, _drift, _choices, _from_population, _engine, _growth, _stacked)
    return "\n".join(line for part in parts for line in part(numbers))


def _people(numbers: dict[str, Any]) -> list[str]:
    return [f"{numbers['people']} people measured, {numbers['left_out']} with too little to measure", ""]


def _losses(numbers: dict[str, Any]) -> list[str]:
    lines = [f"{'loss per held-out token':36} {'loss':>7}  {'95 % interval':17} {'gain over context':>17}"]
    for name, row in numbers["loss"].items():
        share = f"{row['gain']:+.4f} ({100 * row['gain_share']:+.2f} %)"
        lines.append(
            f"{name:36} {row['loss']:7.4f}  {_range(row['interval']):17} {share:>17}  "
            f"{_range(row['gain_interval'])}"
        )
    return [*lines, ""]


def _harm(numbers: dict[str, Any]) -> list[str]:
    lines = [f"{'made worse':24} {'people':>7} {'any':>15} {'by > 0.01 nat':>15} {'worst decile':>17}"]
    for name, rows in numbers["harm"].items():
        before, after = rows["before"], rows["after"]
        lines.append(
            f"{name:24} {rows['people']['count']:7} "
            + " ".join(f"{before[key]:7.1%} ->{after[key]:6.1%}" for key in ("worse", "worse_noteworthy"))
            + f" {before['worst_decile']:+8.3f} ->{after['worst_decile']:+6.3f}"
            + f"   {rows['people']['accepted']} accepted, "
            + f"gain {100 * before['gain_share']:+.2f} ->{100 * after['gain_share']:+.2f} %"
        )
    return [*lines, ""]


def _drift(numbers: dict[str, Any]) -> list[str]:
    drift = numbers["drift"]
    published = "none" if drift["most_published"] is None else format(drift["most_published"], "+.4f")
    return [
        f"drift on neutral text: mean {drift['mean']:+.4f}, most published {published}, "
        f"{drift['over_limit']:.1%} over the limit before the gate"
    ]


def _choices(numbers: dict[str, Any]) -> list[str]:
    """The true message among ten, and the true author."""
    lines = []
    chosen = numbers.get("selection", {})
    if "context" in chosen:
        lines.append(
            f"next message among {chosen['among']}, {chosen['asked']} asked: "
            + ", ".join(
                f"{name} {chosen[name]['hits_at_1']:.1%} ({_range(chosen[name]['interval'])})"
                for name in ("context", "adapter + context")
            )
        )
    if "authors" in numbers:
        found = numbers["authors"]
        lines.append(
            f"author among {found['among']} adapters: {found['hits_at_1']:.1%} "
            f"({_range(found['interval'])}), by chance {found['chance']:.1%}"
        )
    return lines


def _from_population(numbers: dict[str, Any]) -> list[str]:
    found = numbers.get("from_population")
    if found is None:
        return []
    rows = (
        ("one's own adapter begun from the population's", found["own"], "population adapter + context"),
        ("a stranger's adapter begun from the same", found["swapped"], "the same"),
        ("one's own begun from the population's", found["over context"], "context alone"),
        ("  after the gate", found["over context, after the gate"], "the same"),
    )
    return [
        f"{title}: gain {row['gain']:+.4f} ({100 * row['gain_share']:+.2f} %; "
        f"{_range(row['gain_interval'])}) over {what}"
        for title, row, what in rows
    ]


def _engine(numbers: dict[str, Any]) -> list[str]:
    found = numbers.get("engine")
    if found is None:
        return []
    return [
        f"an engine says the same first token to {found['same_first_token']:.1%} of {found['asked']} "
        f"people, {found['with_adapter']} with an adapter, all in one batch"
    ]


def _growth(numbers: dict[str, Any]) -> list[str]:
    """By turns learned, and refresh after refresh."""
    lines = [
        f"learned from {row['turns']:4} turns: gain {row['gain']:+.4f} ({_range(row['interval'])}), "
        f"{row['people']} people"
        for row in numbers.get("curve", [])
    ]
    found = numbers.get("in_a_row")
    if found is None:
        return lines
    rows = (
        (f"{found['refreshes']} refreshes in a row", found["in a row"]),
        ("one refresh from zero", found["from zero"]),
    )
    return lines + [
        f"{title}: gain {row['gain']:+.4f} ({_range(row['interval'])}), loss on the oldest turns "
        + ("none" if row["loss_on_the_oldest"] is None else format(row["loss_on_the_oldest"], ".4f"))
        for title, row in rows
    ]


def _stacked(numbers: dict[str, Any]) -> list[str]:
    return [
        f"{row['people']:4} people trained together: {row['seconds_per_user']:.3f} s each, "
        f"{row['users_per_hour']:,.0f} an hour, {row['times_faster_than_solo']:.1f} times as fast as alone"
        for row in numbers.get("stacked", {}).get("sizes", [])
    ]


def page(evaluation: Evaluation) -> str:
    """The same as one HTML file: the table, and plots of gain per person, learning curve and harm."""
    numbers = evaluation.numbers
    gains = sorted(((each["gain"], each["accepted"]) for each in evaluation.people), reverse=True)
    plots = [
        (
            "Gain of each person, adapter and context over context alone (nats per token); "
            "pale: refused by the gate",
            _bars([(gain, "#2a6fdb" if accepted else "#c3d3ee") for gain, accepted in gains]),
        )
    ]
    curve = numbers.get("curve", [])
    if curve:
        plots.append(
            (
                "Gain by learned turns, with 95 % interval over people",
                _curve([(str(r["turns"]), r["gain"], *r["interval"]) for r in curve]),
            )
        )
    harm = numbers["harm"]["everyone"]
    plots.append(
        (
            "Share of people made worse: by anything, and by more than 0.01 nat; dark: after the gate",
            _bars(
                [
                    (harm[when][key], colour)
                    for key in ("worse", "worse_noteworthy")
                    for when, colour in (("before", "#e7b9a7"), ("after", "#a63d16"))
                ]
            ),
        )
    )
    figures = "".join(f"<figure><figcaption>{title}</figcaption>{plot}</figure>" for title, plot in plots)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>What learning is worth</title>'
        "<style>body{font:15px system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
        "pre{overflow-x:auto;font-size:12px}figure{margin:2rem 0}figcaption{margin-bottom:.5rem}"
        "svg{max-width:100%;height:auto}</style><h1>What learning is worth</h1>"
        f"{figures}<pre>{html.escape(table(numbers))}</pre></html>\n"
    )


def _range(pair: Sequence[float]) -> str:
    return f"{pair[0]:.3f} to {pair[1]:.3f}"


def _bars(values: Sequence[tuple[float, str]]) -> str:
    """Bars from zero, in the order given: (height, colour)."""
    place = _scale([value for value, _ in values])
    room = (WIDTH - 2 * EDGE) / max(1, len(values))
    zero = place(0.0)
    bars = "".join(
        f'<rect x="{EDGE + at * room:.1f}" y="{min(zero, place(value)):.1f}" width="{0.9 * room:.1f}" '
        f'height="{abs(zero - place(value)):.1f}" fill="{colour}"><title>{value:+.4f}</title></rect>'
        for at, (value, colour) in enumerate(values)
    )
    return _frame(bars, [value for value, _ in values], place)


def _curve(points: Sequence[tuple[str, float, float, float]]) -> str:
    """(label, value, low, high), evenly spaced, joined by a line."""
    edges = [each for _, *numbers in points for each in numbers]
    place = _scale(edges)
    step = (WIDTH - 2 * EDGE) / len(points)
    spots = [(EDGE + (at + 0.5) * step, point) for at, point in enumerate(points)]
    path = " ".join(f"{x:.1f},{place(value):.1f}" for x, (_, value, _, _) in spots)
    marks = "".join(
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{place(low):.1f}" y2="{place(high):.1f}" stroke="#2a6fdb"/>'
        f'<circle cx="{x:.1f}" cy="{place(value):.1f}" r="3" fill="#2a6fdb"/>'
        f'<text x="{x:.1f}" y="{HEIGHT - 4}" text-anchor="middle" font-size="12">{label}</text>'
        for x, (label, value, low, high) in spots
    )
    line = f'<polyline points="{path}" fill="none" stroke="#2a6fdb"/>'
    return _frame(line + marks, edges, place)


def _scale(values: Sequence[float]) -> Callable[[float], float]:
    """Value -> height on the plot, zero always on it."""
    low, high = min(0.0, *values, 0.0), max(0.0, *values, 0.0)
    if low == high:  # all zero: on the ground
        high = 1.0
    return lambda value: EDGE / 2 + (high - value) / (high - low) * (HEIGHT - EDGE)


def _frame(inner: str, values: Sequence[float], place: Callable[[float], float]) -> str:
    shown = dict.fromkeys((min(0.0, *values, 0.0), 0.0, statistics.fmean(values), max(0.0, *values, 0.0)))
    labels = "".join(
        f'<text x="{EDGE - 4}" y="{place(value) + 4:.1f}" text-anchor="end" font-size="11">{value:.3f}</text>'
        for value in shown
    )
    axis = f'<line x1="{EDGE}" x2="{WIDTH - EDGE}" y1="{place(0):.1f}" y2="{place(0):.1f}" stroke="#888"/>'
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" fill="currentColor">{axis}{inner}{labels}</svg>'
