"""The GPU engine's rows: decode steps, whole runs, first tokens, with up to 10,000 adapters.

Random weights of Llama-3.1-8B's (and Llama-2-7B's) shape, random adapters, greedy, random prompts. Outputs
are checked first; if they are wrong, no row counts as reached. The floor of a row is the time that its bytes
(weights, adapters, K/V) take at the copy bandwidth measured in the same run. Targets are those of an H200; on
another card those in time are scaled by copy bandwidth.

    python -m benchmarks.bench_gpu [--rows decode32,punica] [--list] [--budget 300] [--out FILE]
    python -m benchmarks.bench_gpu --tiny      every row on a tiny model, on the CPU
    python -m benchmarks.bench_gpu --files FOLDER --only-write      what files-cold reads, ahead of time

Rows run in child processes, a few in each, so that a kernel that hangs or crashes costs its own row only.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import commit, gpu, machine
from benchmarks.gpu_rows import ROWS, Bench, Row, write_cold_files
from benchmarks.random_model import LLAMA_3_1_8B, TINY, RandomAdapters
from engine.config import PINNING

START_S = 180.0  # that a child may take until its first row begins
GRACE_S = 60.0  # beyond its budget, before a row that does not come back is ended
CHECKS = ("outputs", "logits")

Record = dict[str, Any]
_began = time.monotonic()


def say(text: str) -> None:
    print(f"[{time.monotonic() - _began:7.1f} s] {text}", flush=True)


# In the child


def run_rows(bench: Bench, rows: Iterable[Row]) -> Iterator[Record]:
    """{"began": name} and then the record of each row; one that raises has an `error` instead of a figure.

    Ends early when the device is no longer usable.
    """
    for row in rows:
        bench.say(f"{row.name}: {row.title}")
        yield {"began": row.name}
        bench.start_row()
        started = time.perf_counter()
        record: Record = {"row": row.name, "title": row.title, "peer": row.peer}
        try:
            measured = row.run(bench)
            record |= asdict(measured) | {"ratio": measured.ratio}
            if row.name in CHECKS or not bench.tiny:  # a tiny model's speed is nothing to be held to a target
                record["reached"] = measured.reached
        except Exception as error:
            bench.say("  " + traceback.format_exc().replace("\n", "\n  "))
            record["error"] = f"{type(error).__name__}: {error}"
            bench.drop_engine()
        record["seconds"] = round(time.perf_counter() - started, 1)
        record["copy_bytes_per_s"] = bench.copy_bytes_per_s  # rows of other groups have another process
        if bench.is_cuda:
            record["gpu_bytes_peak"] = torch.cuda.max_memory_allocated(bench.device)
        yield record
        if not bench.is_usable():
            bench.say("  the device no longer answers; the remaining rows need a new process")
            return


def child(names: Sequence[str], options: argparse.Namespace, lines: Path) -> None:
    """Run rows and append each record to `lines` as soon as it is known."""
    with lines.open("a", encoding="utf-8") as file:

        def tell(record: Record) -> None:
            file.write(json.dumps(record) + "\n")
            file.flush()

        bench = Bench(
            options.device, tiny=options.tiny, budget_s=options.budget, step_tokens=options.step_tokens,
            say=say, files=options.files,
        )  # fmt: skip
        tell(
            {
                "copy_bytes_per_s": bench.copy_bytes_per_s,
                "product_flop_per_s": bench.product_flop_per_s,
                "target_scale": bench.scale,
            }
        )
        by_name = {row.name: row for row in ROWS}
        for record in run_rows(bench, [by_name[name] for name in names]):
            tell(record)


# In the parent


def supervise(
    names: Sequence[str], command: Callable[[Sequence[str], Path], list[str]], *, start_s: float, row_s: float
) -> Iterator[Record]:
    """Run these rows in child processes, a new one whenever one dies, and hand on their records.

    A child that has not begun a row after `start_s` seconds, or is silent for `row_s` in one, is killed. The
    row it was in gets an error; so do all rows of a child that died before its first.
    """
    left = list(names)
    while left:
        with tempfile.TemporaryDirectory(prefix="rows-") as folder:
            lines = Path(folder) / "lines"
            lines.touch()
            environment = {**PINNING, **os.environ}  # as the service starts an engine
            process = subprocess.Popen(command(left, lines), env=environment, start_new_session=True)
            current: str | None = None
            why = ""
            heard = time.monotonic()
            with lines.open(encoding="utf-8") as file:
                while True:
                    ended = process.poll() is not None  # before reading, or the last lines could be missed
                    for line in iter(file.readline, ""):
                        record = json.loads(line)
                        heard = time.monotonic()
                        if "began" in record:
                            current = record["began"]
                            continue
                        if "row" in record:
                            left.remove(record["row"])
                            current = None
                        yield record
                    if ended:
                        break
                    if time.monotonic() - heard > (start_s if current is None else row_s):
                        why = "did not come back and was ended"
                        os.killpg(process.pid, signal.SIGKILL)
                        process.wait()
                    time.sleep(0.05)
            if process.returncode == 0:
                continue
            why = why or f"its process ended with {process.returncode}"
            guilty = left[:] if current is None else [current]
            for name in guilty:
                yield {"row": name, "error": why}
                left.remove(name)


def table(records: Sequence[Record], outputs_hold: bool) -> str:
    """Row, figure, floor, ratio, target, best peer, reached."""
    lines = [("row", "figure", "floor", "ratio", "target", "best peer", "reached")]
    for record in records:
        if "error" in record:
            lines.append((record["row"], "error", "", "", "", record.get("peer", ""), "no"))
            continue
        reached = record.get("reached")
        if record["row"] not in CHECKS and not outputs_hold:
            reached = False
        sign = "≤" if record["lower_is_better"] else "≥"
        floor = "" if record["floor"] is None else _number(record["floor"])
        ratio = "" if record["ratio"] is None else f"{record['ratio']:.2f}"
        lines.append(
            (
                record["row"],
                f"{_number(record['figure'])} {record['unit']}",
                floor,
                ratio,
                f"{sign} {_number(record['target'])}",
                record["peer"],
                {None: "–", True: "yes", False: "no"}[reached],
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    errors = [f"{record['row']}: {record['error']}" for record in records if "error" in record]
    return "\n".join(line.rstrip() for line in [text[0], "-" * len(text[0]), *text[1:], *errors])


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="The rows of the GPU engine.")
    parser.add_argument("--rows", help="names with commas between; all of them if not given")
    parser.add_argument("--list", action="store_true", help="name the rows and end")
    parser.add_argument("--budget", type=float, default=300.0, help="seconds that one row may take")
    parser.add_argument("--step-tokens", type=int, default=2048, help="most tokens computed in one step")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and few requests, on the CPU")
    parser.add_argument("--device", help="a torch device; cuda, or cpu with --tiny")
    parser.add_argument("--commit", help="the commit measured, where there is no git")
    parser.add_argument("--out", type=Path, help="write the JSON here too, after every row")
    parser.add_argument("--files", type=Path, help="where files-cold finds or leaves its 15 GB of adapters")
    parser.add_argument("--only-write", action="store_true", help="write those files and end; needs no GPU")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    options = parser.parse_args(arguments)
    options.device = options.device or ("cpu" if options.tiny else "cuda")
    names = [row.name for row in ROWS]
    if options.list:
        print("\n".join(f"{row.name:20} {row.title}" for row in ROWS))
        return
    if options.rows:
        chosen = options.rows.split(",")
        if unknown := [name for name in chosen if name not in names]:
            parser.error(f"--rows: expected some of {', '.join(names)}; got {', '.join(unknown)}")
        names = [name for name in names if name in chosen]
    if options.only_write:
        if options.files is None:
            parser.error("--only-write: expected --files, which says where to")
        shape, dtype, count = (
            (TINY, torch.float32, 12) if options.tiny else (LLAMA_3_1_8B, torch.bfloat16, 512)
        )
        write_cold_files(RandomAdapters(shape, dtype), options.files, count)
        return
    if options.child:
        child(names, options, options.child)
        return

    def command(rows: Sequence[str], lines: Path) -> list[str]:
        flags = [
            "--rows", ",".join(rows), "--child", str(lines), "--budget", str(options.budget),
            "--step-tokens", str(options.step_tokens), "--device", options.device,
        ]  # fmt: skip
        flags += ["--files", str(options.files)] if options.files else []
        return [sys.executable, "-m", "benchmarks.bench_gpu", *flags, *["--tiny"] * options.tiny]

    result: Record = {
        "benchmark": "bench_gpu",
        "date": time.strftime("%Y-%m-%d"),
        "commit": options.commit or commit(),
        **machine(),
        **gpu(),
        "tiny": options.tiny,
    }
    records: list[Record] = []
    by_name = {row.name: row for row in ROWS}
    for _, group in groupby((by_name[name] for name in names), key=lambda row: row.group):
        rows = [row.name for row in group]
        for record in supervise(rows, command, start_s=START_S, row_s=options.budget + GRACE_S):
            if "row" not in record:
                result |= record
                continue
            record = {"title": by_name[record["row"]].title, "peer": by_name[record["row"]].peer} | record
            records.append(record)
            checks = [each for each in records if each["row"] in CHECKS]
            result["outputs_hold"] = all(each.get("reached", False) for each in checks) if checks else None
            result["rows"] = {each["row"]: each for each in records}
            if options.out:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    _print(result, records)


def _print(result: Record, records: Sequence[Record]) -> None:
    """The table, what is to be known about it, and the line of JSON."""
    holds = result.get("outputs_hold")
    print()
    print(table(records, outputs_hold=holds is not False))
    if holds is False:
        print("outputs are wrong or could not be compared: no row counts as reached")
    bandwidth, scale = result.get("copy_bytes_per_s"), result.get("target_scale")
    if bandwidth and scale:
        copy = f"copy bandwidth {bandwidth / 1e12:.3g} TB/s"
        print(f"{copy}; targets in time are those of an H200 times {scale:.3g}")
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
