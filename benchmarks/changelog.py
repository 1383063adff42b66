"""Podcast transcripts as histories: one for each target speaker, who is the person that is learned.

Rows are `{"show", "episode", "added", "target_users": [speaker], "turns": [{"speaker", "text"}]}`, one
episode each, as JSON Lines, plain or `.zst`. What the target says is the user's turn; what was said by others
since their last turn, at most the newest `HEARD` speeches of it, are the assistant's, and nobody learns
those. Names of speakers do not come along: a person is called by a hash.

    python -m benchmarks.changelog TRANSCRIPTS > history.jsonl
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from benchmarks.self_dialogue import read_rows

HEARD = 1


def speeches(turns: Iterable[dict[str, Any]]) -> list[tuple[str, str]]:
    """(speaker, text) with the turns in a row of one speaker joined, blank ones left out."""
    said: list[tuple[str, str]] = []
    for turn in turns:
        text = turn["text"].strip()
        if not text:
            continue
        if said and said[-1][0] == turn["speaker"]:
            said[-1] = (turn["speaker"], f"{said[-1][1]}\n{text}")
        else:
            said.append((turn["speaker"], text))
    return said


def history_lines(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Interchange lines of every target speaker, their episodes by date and, on one date, by number."""

    def order(row: dict[str, Any]) -> tuple[datetime, list[int], str]:
        return (
            datetime.fromisoformat(row["added"]),
            [int(digits) for digits in re.findall(r"\d+", row["episode"])],
            row["episode"],
        )

    latest: dict[str, datetime] = {}
    for row in sorted(rows, key=order):
        for target in row["target_users"]:
            user = "speaker-" + hashlib.sha256(target.encode()).hexdigest()[:10]
            start = datetime.fromisoformat(row["added"])
            start = max(start, latest.get(user, start))
            heard: list[str] = []
            place = 0
            for speaker, text in speeches(row["turns"]):
                if speaker != target:
                    heard = [*heard, text][-HEARD:]
                    continue
                for role, words in [*(("assistant", other) for other in heard), ("user", text)]:
                    latest[user] = start + timedelta(seconds=10 * place)
                    place += 1
                    yield {
                        "user": user,
                        "conversation": f"{row['show']}-{row['episode']}",
                        "at": latest[user].isoformat(),
                        "role": role,
                        "text": words,
                    }
                heard = []
            if place:
                latest[user] += timedelta(minutes=10)


if __name__ == "__main__":
    for line in history_lines(read_rows(Path(sys.argv[1]))):
        print(json.dumps(line, ensure_ascii=False))
