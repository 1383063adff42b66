"""Channel logs as histories: one history for each person with enough messages in one channel.

Rows are `{"channel", "ts", "nick", "text"}`, as JSON Lines, plain or `.zst`. What the person wrote is the
user's turn; the newest `HEARD` messages of others since their last one, none older than `HEARD_WITHIN`, are
the assistant's, and nobody learns those. Silence of `PAUSE` begins a new conversation. Robots that report
commits and bugs are not people and are left out, by name. Nicks do not come along: a person is called by a
hash.

    python -m benchmarks.irc LOGS > history.jsonl
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from benchmarks.self_dialogue import read_rows

LEAST_MESSAGES = 30
HEARD = 2
HEARD_WITHIN = timedelta(minutes=10)
PAUSE = timedelta(hours=1)
ROBOTS = {"wikibugs", "gerrit-wm", "CIA-6"}
# Colours and other marks that a client shows but nobody wrote.
_MARKS = re.compile(r"\x03(\d{1,2}(,\d{1,2})?)?|[\x00-\x08\x0b-\x1f\x7f]")


def history_lines(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Interchange lines of everyone with at least `LEAST_MESSAGES`, one person after another."""
    channels: dict[str, list[tuple[datetime, str, str]]] = {}
    for row in rows:
        text = _MARKS.sub("", row["text"]).strip()
        if text and row["nick"] not in ROBOTS:
            at = datetime.fromisoformat(row["ts"]).replace(tzinfo=UTC)
            channels.setdefault(row["channel"], []).append((at, row["nick"], text))
    for channel, messages in channels.items():
        messages.sort(key=lambda message: message[0])
        for nick, count in Counter(nick for _, nick, _ in messages).items():
            if count >= LEAST_MESSAGES:
                yield from _history(channel, nick, messages)


def _history(channel: str, nick: str, messages: list[tuple[datetime, str, str]]) -> Iterator[dict[str, Any]]:
    user = f"{channel}-" + hashlib.sha256(f"{channel} {nick}".encode()).hexdigest()[:10]
    heard: list[tuple[datetime, str]] = []
    last, talk = None, 0
    for at, who, text in messages:
        if who != nick:
            heard = [*heard, (at, text)][-HEARD:]
            continue
        talk += last is None or at - last > PAUSE
        recent = [(then, words) for then, words in heard if at - then <= HEARD_WITHIN]
        for then, role, words in [*((t, "assistant", w) for t, w in recent), (at, "user", text)]:
            yield {
                "user": user,
                "conversation": f"{channel}-{talk}",
                "at": then.isoformat(),
                "role": role,
                "text": words,
            }
        last, heard = at, []


if __name__ == "__main__":
    for line in history_lines(read_rows(Path(sys.argv[1]))):
        print(json.dumps(line, ensure_ascii=False))
