import dataclasses
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import pytest_asyncio

from engine.weights import read_config
from personalization.gate import GatePolicy
from personalization.history import dump
from personalization.population import NothingToLearn, Workshop, make, newest
from personalization.prompt import Renderer
from personalization.publish import Shelf
from personalization.refresh import Kit, Outcome, RefreshPolicy, refresh
from personalization.store import Store, connect
from personalization.train import Recipe
from personalization.trainer import Trainer, TrainerSettings
from tests.redis_fixture import SECRET
from tests.small_model import save_small_model, talk

pytestmark = pytest.mark.asyncio(loop_scope="module")
RECIPE = Recipe(rank=4, alpha=8, learning_rate=5e-3, epochs=2, tokens_per_step=32)
NOW = datetime(2026, 6, 1, tzinfo=UTC)
GATE = GatePolicy(max_drift=100.0)  # a model this small is moved by anything
POLICY = RefreshPolicy(minimum_turns=20, gate_tokens=96, row_tokens=32, recipe=RECIPE, gate=GATE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("small"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def trainer(folder: Path) -> AsyncIterator[Trainer]:
    trainer = Trainer(TrainerSettings(folder, threads=1, device="cpu"))
    yield trainer
    await trainer.stop()


@pytest.fixture
def workshop(folder: Path, trainer: Trainer, tmp_path: Path) -> Workshop:
    renderer = Renderer(folder, 256)
    config = read_config(folder)
    return Workshop(tmp_path / "population", config, renderer, trainer, "small", RECIPE, GATE, row_tokens=32)


@pytest_asyncio.fixture(loop_scope="module")
async def store(redis_url: str) -> AsyncIterator[Store]:
    store = Store(connect(redis_url), SECRET)
    yield store
    await store.close()


def text(*users: str) -> list[bytes]:
    return [line.encode() for user in users for line in dump(user, talk(user, 60))]


async def test_it_is_kept_when_it_is_better_and_says_what_it_was_made_of(workshop: Workshop):
    lines = [*text("ann", "bob"), b"no line"]
    shares: list[float] = []
    made = await make(lines, workshop, epochs=2, now=NOW, on_progress=shares.append)
    assert (made.number, made.turns, made.errors) == (1, 108, 1)
    assert made.numbers["gain"] > 0
    assert shares[-1] == 1.0
    meta = json.loads((workshop.root / "1" / "attune.json").read_text())
    assert (meta["turns"], meta["created_at"]) == (108, NOW.isoformat())
    assert len(meta["text_sha256"]) == 64
    assert (await make(lines, workshop, epochs=2, now=NOW)).number == 2
    assert newest(workshop.root) == (2, workshop.root / "2")


async def test_a_refused_one_and_a_file_without_turns_leave_everything_as_it_was(workshop: Workshop):
    never = dataclasses.replace(workshop, gate=dataclasses.replace(workshop.gate, min_gain=50.0))
    made = await make(text("ann"), never, now=NOW)
    assert (made.number, newest(workshop.root)) == (0, (0, None))
    with pytest.raises(NothingToLearn, match="got 0 turns without any and 1 bad lines"):
        await make([b"no line"], workshop, now=NOW)


async def test_a_persons_versions_begin_with_it_the_first_and_the_later_ones(
    workshop: Workshop, store: Store, tmp_path: Path
):
    shelf = Shelf(tmp_path / "adapters", workshop.config, free_bytes_floor=0)
    kit = Kit(store, shelf, workshop.renderer, workshop.trainer, POLICY, "small", lambda: NOW, workshop.root)
    await make(text("ann"), workshop, epochs=2, now=NOW)
    losses = {}
    for population in (None, workshop.root):
        await store.append("ann", talk("ann", 40))
        ended = await one(dataclasses.replace(kit, population=population), "ann")
        losses[population] = ended.numbers["train_loss_first"]
        (record,) = await store.versions("ann")
        assert record.population == (0 if population is None else 1)
        if population is None:
            await store.forget("ann")
    assert losses[workshop.root] < losses[None] - 0.3
    await store.append("ann", talk("ann", 40, first=40))
    await one(kit, "ann")
    later = (await store.versions("ann"))[-1]
    assert (later.parent, later.population) == (2, 1)


async def test_one_made_for_another_base_is_left_alone(workshop: Workshop, store: Store, tmp_path: Path):
    shelf = Shelf(tmp_path / "adapters", workshop.config, free_bytes_floor=0)
    kit = Kit(store, shelf, workshop.renderer, workshop.trainer, POLICY, "small", lambda: NOW, workshop.root)
    await make(text("ann"), workshop, epochs=2, now=NOW)
    file = workshop.root / "1" / "attune.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_hash": "another"}))
    await store.append("ann", talk("ann", 40))
    ended = await one(kit, "ann")
    assert ended.published
    assert (await store.versions("ann"))[0].population == 0


async def one(kit: Kit, user: str) -> Outcome:
    ended: list[Outcome] = []

    async def say(user: str, message: object) -> None: ...

    async def end(outcome: Outcome) -> None:
        ended.append(outcome)

    await refresh([user], kit, say, end)
    assert ended[0].error is None
    return ended[0]
