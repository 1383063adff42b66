"""Corpora -> tokenizer and compressed token shards, ready to carry to the machine that trains.

    python -m service.demo_model.prepare --data CORPORA --out FOLDER [--tokenizer FOLDER]

`--out` gets `model/` (tokenizer and configuration), `data.json` and `*.xz` shards: for training, each corpus
as one stream of 16-bit token ids with the length of every document; for evaluation, the held-out documents
with the bytes of text they hold. Reading needs the `zstd` command.
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from service.demo_model import tokenizer as demo_tokenizer
from service.demo_model.corpora import CORPORA, Document, held_out, read

SHARD_TOKENS = 3_000_000
# Characters of each corpus that the tokenizer learns from: the chats count for more than their size.
TOKENIZER_CHARACTERS = {"changelog": 24_000_000, "optech": 2_500_000, "books": 3_500_000, "sgd": 6_000_000}


@dataclass
class Tokens:
    """Token ids of a sequence of documents."""

    ids: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    text_bytes: list[int] = field(default_factory=list)


def _sample_for_tokenizer(data: Path) -> Iterator[str]:
    for corpus in CORPORA:
        documents = [document for document in read(corpus, data) if not held_out(corpus, document)]
        random.Random(0).shuffle(documents)
        left = TOKENIZER_CHARACTERS.get(corpus, 1 << 40)
        for document in documents:
            for turn in document.turns:
                yield turn.text
                left -= len(turn.text)
            if left < 0:
                break


def encode(tokenizer: Tokenizer, documents: list[Document]) -> list[list[int]]:
    """Each document as the chat template renders it."""
    specials = {role: demo_tokenizer.SPECIALS.index(token) for role, token in demo_tokenizer.ROLES.items()}
    begin, end = (
        demo_tokenizer.SPECIALS.index(token) for token in (demo_tokenizer.BEGIN, demo_tokenizer.END)
    )
    texts = [turn.text for document in documents for turn in document.turns]
    encoded = iter(tokenizer.encode_batch_fast(texts, add_special_tokens=False))
    out: list[list[int]] = []
    for document in documents:
        ids = [begin]
        for turn in document.turns:
            if turn.role == "text":
                ids += next(encoded).ids
            else:
                ids += [specials[turn.role], *next(encoded).ids, end]
        out.append(ids)
    return out


def _tokenize(corpus: str, data: Path, tokenizer: Tokenizer) -> tuple[Tokens, Tokens]:
    """Training and held-out tokens. A person's training conversations form one document."""
    train, test = Tokens(), Tokens()
    documents = list(read(corpus, data))
    person: str | None = None
    for start in range(0, len(documents), 512):
        batch = documents[start : start + 512]
        for document, ids in zip(batch, encode(tokenizer, batch), strict=True):
            if held_out(corpus, document):
                test.ids += ids
                test.lengths.append(len(ids))
                test.text_bytes.append(document.text_bytes)
                continue
            train.ids += ids
            if document.person is not None and document.person == person and corpus == "self-dialogue":
                train.lengths[-1] += len(ids)
                train.text_bytes[-1] += document.text_bytes
            else:
                train.lengths.append(len(ids))
                train.text_bytes.append(document.text_bytes)
            person = document.person
    return train, test


def _write_shard(path: Path, ids: list[int]) -> None:
    """Low bytes, then high bytes: that packs tighter than pairs."""
    pairs = np.array(ids, dtype="<u2").view(np.uint8).reshape(-1, 2)
    path.write_bytes(lzma.compress(pairs.T.tobytes(), preset=6))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the corpora")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--tokenizer", type=Path, help="a folder whose tokenizer.json is used unchanged")
    parser.add_argument("--only-tokenizer", action="store_true", help="stop after the tokenizer")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.tokenizer:
        tokenizer = Tokenizer.from_file(str(options.tokenizer / "tokenizer.json"))
    else:
        tokenizer = demo_tokenizer.train(_sample_for_tokenizer(options.data))
    demo_tokenizer.save(tokenizer, options.out / "model")
    if options.only_tokenizer:
        return
    index: dict[str, object] = {}
    with ThreadPoolExecutor(2) as pool:
        for corpus in CORPORA:
            train, test = _tokenize(corpus, options.data, tokenizer)
            shards = []
            for part, tokens in (("train", train), ("test", test)):
                for start in range(0, len(tokens.ids), SHARD_TOKENS):
                    name = f"{corpus}-{part}-{start // SHARD_TOKENS:02d}.xz"
                    pool.submit(_write_shard, options.out / name, tokens.ids[start : start + SHARD_TOKENS])
                    shards.append(name)
            index[corpus] = {
                "shards": shards,
                "train_lengths": train.lengths,
                "test_lengths": test.lengths,
                "test_bytes": test.text_bytes,
            }
            size = sum(train.text_bytes)
            print(
                f"{corpus}: {len(train.ids):,} training tokens in {len(train.lengths):,} documents, "
                f"{len(test.ids):,} held out in {len(test.lengths):,}; "
                f"{size / max(1, len(train.ids)):.2f} bytes per token",
                flush=True,
            )
    (options.out / "data.json").write_text(json.dumps(index))


if __name__ == "__main__":
    main()
