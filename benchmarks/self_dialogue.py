"""The self-dialogue corpus as histories: one worker wrote both sides, so both sides are the person's.

Rows are `{"user", "ts", "topic", "turns": [text]}`, one dialogue each, as JSON Lines, plain or `.zst`.
Turns alternate user and assistant; an assistant turn a person wrote counts as written by the person.

    python -m benchmarks.self_dialogue CORPUS > history.jsonl
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any


def read_rows(corpus: Path) -> Iterator[dict[str, Any]]:
    """The rows of `corpus`; a `.zst` file is decompressed by the `zstd` command."""
    if corpus.suffix == ".zst":
        text = subprocess.run(["zstd", "-dcq", str(corpus)], check=True, capture_output=True).stdout
    else:
        text = corpus.read_bytes()
    for line in text.splitlines():
        yield json.loads(line)


def history_lines(rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Interchange lines of every dialogue; turns of one dialogue follow each other by ten seconds."""
    for number, row in enumerate(rows):
        start = datetime.fromisoformat(row["ts"]).replace(tzinfo=UTC)
        for place, text in enumerate(row["turns"]):
            yield {
                "user": row["user"],
                "conversation": f"{row['topic']}-{number}",
                "at": (start + timedelta(seconds=10 * place)).isoformat(),
                "role": "assistant" if place % 2 else "user",
                "text": text,
                "author": "person",
            }


if __name__ == "__main__":
    for line in history_lines(read_rows(Path(sys.argv[1]))):
        print(json.dumps(line, ensure_ascii=False))
