"""The demo model's corpora as documents of user and assistant turns; pure reading, no tokens.

Every corpus becomes a stream of `Document`. Two-party chats alternate between user and assistant, podcasts
are read as one long conversation whose speaker changes alternate the roles, and books are plain text.
About one document in 40 is held out by a hash of its identity, so every run holds out the same ones.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HELD_OUT_ONE_IN = 40
BOOK_CHUNK_CHARACTERS = 12_000

# What a person would have typed where the synthetic chats left a placeholder.
_NAMES = ("Alex", "Sam", "Maria", "Ben", "Nina", "Tom", "Priya", "Leo", "Emma", "Omar", "Julia", "Dan")
_PLACES = ("Austin", "Portland", "Chicago", "Denver", "Boston", "Seattle")
_PLACEHOLDER = re.compile(r"\[([^\]]{1,40})\]")


@dataclass(frozen=True)
class Turn:
    """One turn; `role` is system, user or assistant, or "text" for a document without turns."""

    role: str
    text: str


@dataclass(frozen=True)
class Document:
    """One conversation or text. Documents of one `person` follow each other in time order."""

    key: str
    turns: tuple[Turn, ...]
    person: str | None = None

    @property
    def text_bytes(self) -> int:
        return sum(len(turn.text.encode()) for turn in self.turns)


def held_out(corpus: str, document: Document) -> bool:
    """Whether a document is kept from training; decided for all of a person's documents together."""
    identity = f"{corpus}:{document.person or document.key}"
    return int.from_bytes(hashlib.sha256(identity.encode()).digest()[:8], "big") % HELD_OUT_ONE_IN == 0


def _pick(identity: str, choices: tuple[str, ...]) -> str:
    return choices[hashlib.sha256(identity.encode()).digest()[0] % len(choices)]


def _read_text(path: Path) -> str:
    """A .zst file's text, through the `zstd` command."""
    return subprocess.run(["zstd", "-dc", str(path)], capture_output=True, check=True).stdout.decode()


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    for line in _read_text(path).split("\n"):
        if line.strip():
            yield json.loads(line)


def _alternate(texts: Iterable[str]) -> tuple[Turn, ...]:
    """Texts as turns, user first."""
    return tuple(Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts))


def _merge_speakers(turns: Iterable[dict[str, Any]]) -> list[str]:
    """The texts of a many-party talk, consecutive turns of one speaker joined."""
    texts: list[str] = []
    last: object = None
    for turn in turns:
        text = turn["text"].strip()
        if not text:
            continue
        if texts and turn["speaker"] == last:
            texts[-1] += "\n" + text
        else:
            texts.append(text)
        last = turn["speaker"]
    return texts


def _podcast(path: Path) -> Iterator[Document]:
    for row in _rows(path):
        key = f"{row.get('show', '')}/{row['episode']}"
        yield Document(key, _alternate(_merge_speakers(row["turns"])))


def _by_role(path: Path) -> Iterator[Document]:
    for row in _rows(path):
        turns = tuple(Turn(turn["role"], turn["text"].strip()) for turn in row["turns"])
        yield Document(row["id"], turns)


def self_dialogue(path: Path) -> Iterator[Document]:
    """A file of the Self-dialogue Corpus: each person's conversations in time order, one person at a time."""
    rows = sorted(_rows(path), key=lambda row: (row["user"], row["ts"]))
    for row in rows:
        turns = _alternate(text.strip() for text in row["turns"] if text.strip())
        yield Document(f"{row['user']}/{row['ts']}", turns, person=row["user"])


def _topical_chat(path: Path) -> Iterator[Document]:
    for row in _rows(path):
        yield Document(row["id"], _alternate(_merge_speakers(row["turns"])))


def _persona_chat(path: Path) -> Iterator[Document]:
    """A third of the chats open with the assistant's persona as system text, a third with the user's."""
    for number, row in enumerate(_rows(path)):
        key = f"{row['split']}/{number}"

        def fill(match: re.Match[str], key: str = key) -> str:
            inside = match.group(1).lower()
            if "city" in inside or "town" in inside or "location" in inside:
                return _pick(f"{key}/{inside}", _PLACES)
            return _pick(f"{key}/{'1' in inside}", _NAMES)

        texts = [_PLACEHOLDER.sub(fill, text) for text in _merge_speakers(row["turns"])]
        turns = _alternate(texts)
        choice = number % 3
        if choice == 0:
            turns = (Turn("system", "About you: " + " ".join(row["persona2"].split("\n"))), *turns)
        elif choice == 1:
            turns = (Turn("system", "About the user: " + " ".join(row["persona1"].split("\n"))), *turns)
        yield Document(key, turns)


def _books(path: Path) -> Iterator[Document]:
    for row in _rows(path):
        chunk: list[str] = []
        size = number = 0
        for line in [*row["text"].split("\n"), None]:
            if line is None or size > BOOK_CHUNK_CHARACTERS:
                yield Document(f"{row['repo']}#{number}", (Turn("text", "\n".join(chunk)),))
                chunk, size, number = [], 0, number + 1
            if line is not None:
                chunk.append(line)
                size += len(line) + 1


def _instruct(folder: Path) -> Iterator[Document]:
    for number, row in enumerate(json.loads(_read_text(folder / "gpteacher-roleplay.json.zst"))):
        yield _task(f"gpteacher/{number}", row["instruction"], row["input"], row["response"])
    for name in ("self-instruct-seed_tasks", "self-instruct-user_oriented"):
        for row in _rows(folder / f"{name}.jsonl.zst"):
            for number, instance in enumerate(row["instances"]):
                yield _task(
                    f"{row['id']}/{number}", row["instruction"], instance["input"], instance["output"]
                )
    for row in _rows(folder / "oasst-en_100_tree.jsonl.zst"):
        for number, path in enumerate(_oasst_paths(row["prompt"], ())):
            if number < 3:
                yield Document(f"{row['message_tree_id']}/{number}", path, person=row["message_tree_id"])


def _task(key: str, instruction: str, given: str, answer: str) -> Document:
    ask = instruction.strip() + ("\n\n" + given.strip() if given.strip() else "")
    return Document(key, (Turn("user", ask), Turn("assistant", answer.strip())))


def _oasst_paths(message: dict[str, Any], before: tuple[Turn, ...]) -> Iterator[tuple[Turn, ...]]:
    """Conversations of a message tree from its root to each last assistant message, best ranked first."""
    if message.get("deleted") or message.get("lang", "en") != "en":
        return
    role = "user" if message["role"] == "prompter" else "assistant"
    turns = (*before, Turn(role, message["text"].strip()))
    replies = sorted(message["replies"], key=lambda reply: reply.get("rank") or 0)
    longer = [path for reply in replies for path in _oasst_paths(reply, turns)]
    if longer:
        yield from longer
    elif role == "assistant":
        yield turns


_READERS: dict[str, tuple[str, Callable[[Path], Iterator[Document]]]] = {
    "self-dialogue": ("self-dialogue-base.jsonl.zst", self_dialogue),
    "topical-chat": ("topical-chat-valid-test.jsonl.zst", _topical_chat),
    "persona-chat": ("synthetic-persona-chat-valid-test.jsonl.zst", _persona_chat),
    "sgd": ("sgd-dialogues.jsonl.zst", _by_role),
    "taskmaster": ("taskmaster4-coffee.jsonl.zst", _by_role),
    "instruct": ("instruct-small", _instruct),
    "changelog": ("changelog-base.jsonl.zst", _podcast),
    "optech": ("bitcoin-optech-podcast.jsonl.zst", _podcast),
    "books": ("standard-ebooks.jsonl.zst", _books),
}

CORPORA = tuple(_READERS)


def read(corpus: str, data: Path) -> Iterator[Document]:
    """Every document of a corpus with at least one token of text."""
    name, reader = _READERS[corpus]
    for document in reader(data / name):
        turns = tuple(Turn(turn.role, turn.text.strip()) for turn in document.turns if turn.text.strip())
        if turns:
            yield Document(document.key, turns, document.person)
