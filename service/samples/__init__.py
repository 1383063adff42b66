"""Three invented people to try the service with, each a history in the interchange format.

They exist so that a first visitor sees a difference within two minutes: each has a voice of their own, and
the replies in their history were put right by them, or rated up, until they sounded as they like to be
answered. Nobody real wrote any of it. A sample person is imported, refreshed, exported and forgotten like
anyone else.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from personalization.history import parse
from personalization.store import Store

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Sample:
    """`title` and `blurb` are what the page says about the person called `name`."""

    name: str
    title: str
    blurb: str
    file: str

    def shown(self) -> dict[str, str]:
        """What a client is told."""
        return {"name": self.name, "title": self.title, "blurb": self.blurb}


SAMPLES: tuple[Sample, ...] = (
    Sample(
        name="Bram",
        title="boat mechanic",
        blurb="Fixes outboards on a windy quay. Few words, and he wants few back.",
        file="bram.jsonl",
    ),
    Sample(
        name="Odile",
        title="gardener",
        blurb="Writes in long, warm sentences, and likes to be answered with as much delight.",
        file="odile.jsonl",
    ),
    Sample(
        name="Wen",
        title="night-shift astronomer",
        blurb="Lower case, no hurry, no exclamation marks. The sky is usually closed.",
        file="wen.jsonl",
    ),
)


class UnknownSample(LookupError):
    def __init__(self, name: str) -> None:
        super().__init__(f"expected one of {', '.join(each.name for each in SAMPLES)}, got {name!r}")
        self.name = name


def load(name: str) -> list[bytes]:
    """The lines of a sample person's history, as an import takes them. Raises UnknownSample."""
    for sample in SAMPLES:
        if sample.name == name:
            return (_FOLDER / sample.file).read_bytes().splitlines()
    raise UnknownSample(name)


async def ensure_samples(store: Store, enqueue: Callable[[str, str], Awaitable[object]]) -> list[str]:
    """Bring in every sample person and ask for the first refresh of those who never had one.

    `enqueue` takes a user and a reason. Can be called at every start: known turns are not added again, and
    who has a version already, whatever became of it, is left alone. Returns whom a refresh was asked for.
    """
    asked = []
    for sample in SAMPLES:
        await store.append(sample.name, parse(load(sample.name)).turns[sample.name])
        if not await store.versions(sample.name):
            await enqueue(sample.name, "sample")
            asked.append(sample.name)
    return asked
