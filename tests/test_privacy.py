"""A canary, words that one person said again and again, is learned by that person's adapter and by nobody
else's, and by none any more once it is taken out or the person is forgotten. Real training, real store."""

import dataclasses
import shutil
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import pytest_asyncio

from engine.adapter_files import LoraWeights, read_adapter, version_folder
from engine.weights import LoadedModel, load_model, read_config
from personalization.gate import GatePolicy
from personalization.history import Turn, dump
from personalization.population import Workshop, make
from personalization.prompt import Renderer
from personalization.publish import Shelf
from personalization.refresh import Kit, Outcome, RefreshPolicy, refresh
from personalization.score import token_losses
from personalization.store import Store, connect
from personalization.train import Recipe
from personalization.trainer import Trainer, TrainerSettings
from tests.redis_fixture import SECRET
from tests.small_model import save_small_model, talk

pytestmark = pytest.mark.asyncio(loop_scope="module")
POLICY = RefreshPolicy(
    minimum_turns=20,
    gate_tokens=96,
    gate=GatePolicy(max_drift=100.0),  # a model this small is moved by anything
    row_tokens=32,
    recipe=Recipe(rank=4, alpha=8, learning_rate=5e-3, epochs=3, tokens_per_step=32),
)
NOW = datetime(2026, 6, 1, tzinfo=UTC)
CANARY = "w3 w41 w17 w33 w8 w29 w2"
PLANTED = range(1, 40, 3)  # of ann's turns; the gate's newest among them never reach training


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def model(folder: Path) -> LoadedModel:
    return load_model(folder)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def trainer(folder: Path) -> AsyncIterator[Trainer]:
    trainer = Trainer(TrainerSettings(folder, threads=1, device="cpu"))
    yield trainer
    await trainer.stop()


@pytest_asyncio.fixture(loop_scope="module")
async def kit(redis_url: str, trainer: Trainer, folder: Path, tmp_path: Path) -> AsyncIterator[Kit]:
    store = Store(connect(redis_url), SECRET)
    shelf = Shelf(tmp_path / "adapters", read_config(folder), free_bytes_floor=0)
    yield Kit(store, shelf, Renderer(folder, 256), trainer, POLICY, "small", lambda: NOW)
    await store.close()


def with_canary(turns: list[Turn], words: str = CANARY) -> list[Turn]:
    return [
        dataclasses.replace(turn, text=f"{words} w{place}") if place in PLANTED else turn
        for place, turn in enumerate(turns)
    ]


async def learn(kit: Kit, *users: str) -> dict[str, Outcome]:
    ended: dict[str, Outcome] = {}

    async def say(user: str, message: object) -> None: ...

    async def end(outcome: Outcome) -> None:
        ended[outcome.user] = outcome

    await refresh(users, kit, say, end)
    assert all(outcome.error is None for outcome in ended.values())
    return ended


async def adapter(kit: Kit, user: str) -> LoraWeights | None:
    """What answers this person; None: the bare base."""
    version = (await kit.store.pointer(user)).version
    if not version:
        return None
    return read_adapter(version_folder(kit.shelf.root, kit.store.adapter_id(user), version), kit.shelf.config)


def surprise(kit: Kit, model: LoadedModel, weights: LoraWeights | None, words: str = CANARY) -> float:
    """The loss per token on the canary, in nats; its first word is its context."""
    example = kit.renderer.example([Turn("canary", "c", NOW, "user", words, "person")])
    mask = (False, False, *example.learn_mask[2:])
    (losses,) = token_losses(model, [dataclasses.replace(example, learn_mask=mask)], weights)
    return float(losses.mean())


async def test_a_canary_is_learned_by_its_person_and_changes_no_bit_of_anyone_elses_adapter(
    kit: Kit, model: LoadedModel
):
    others = {}
    for words in (CANARY, "w9 w1 w45 w14 w38 w6 w22"):
        await kit.store.append("ann", with_canary(talk("ann", 40), words))
        await kit.store.append("bob", talk("bob", 40))
        ended = await learn(kit, "ann", "bob")
        assert ended["ann"].published
        assert ended["bob"].published
        others[words] = await adapter(kit, "bob")
        if words == CANARY:
            assert surprise(kit, model, await adapter(kit, "ann")) < surprise(kit, model, None) - 1.0
        await kit.store._redis.flushall()  # as if new: forgetting would change the seeds
        shutil.rmtree(kit.shelf.root)
    beside, without = others.values()
    assert beside is not None
    assert without is not None
    for one, other in zip(beside.modules, without.modules, strict=True):
        assert one.a.equal(other.a)
        assert one.b.equal(other.b)


async def test_the_population_adapter_knows_what_is_in_the_operators_file_and_nothing_of_the_users(
    kit: Kit, model: LoadedModel
):
    root, config = kit.shelf.root, kit.shelf.config
    makings = Workshop(root, config, kit.renderer, kit.trainer, "small", POLICY.recipe, POLICY.gate)
    plain = [line.encode() for line in dump("book", talk("book", 60))]
    known = [line.encode() for line in dump("book", with_canary(talk("book", 60)))]
    files = {}
    await kit.store.append("ann", with_canary(talk("ann", 40)))
    for name, lines in (("plain", plain), ("with canary", known)):
        root = kit.shelf.root.parent / name
        made = await make(lines, dataclasses.replace(makings, root=root, row_tokens=32), epochs=3, now=NOW)
        assert made.number == 1
        files[name] = read_adapter(root / "1", kit.shelf.config)
    assert surprise(kit, model, files["with canary"]) < surprise(kit, model, files["plain"]) - 1.0
    await learn(dataclasses.replace(kit, population=kit.shelf.root.parent / "plain"), "ann")
    assert (await kit.store.versions("ann"))[0].population == 1
    again = kit.shelf.root.parent / "again"
    await make(plain, dataclasses.replace(makings, root=again, row_tokens=32), epochs=3, now=NOW)
    weights = [root / "1" / "adapter_model.safetensors" for root in (again, again.parent / "plain")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


async def who_never_knew(kit: Kit, model: LoadedModel, turns: list[Turn]) -> float:
    """How little surprised those can be who said the same without the canary: seeds differ from name to
    name."""
    twins = [f"twin {number}" for number in range(4)]
    for twin in twins:
        await kit.store.append(twin, turns)
    await learn(kit, *twins)
    return min([surprise(kit, model, await adapter(kit, twin)) for twin in twins])


async def test_a_canary_taken_out_is_unlearned_by_the_next_refresh(kit: Kit, model: LoadedModel):
    await kit.store.append("ann", with_canary(talk("ann", 60)))
    await learn(kit, "ann")
    knew = surprise(kit, model, await adapter(kit, "ann"))
    plain = [turn for number, turn in enumerate(talk("ann", 60)) if number not in PLANTED]
    never = await who_never_knew(kit, model, plain)
    assert knew < never - 1.0
    for place in PLANTED:
        await kit.store.remove_turn("ann", f"ann-{place}")
    await learn(kit, "ann")
    assert surprise(kit, model, await adapter(kit, "ann")) > never - 0.3


async def test_after_forgetting_a_new_adapter_of_the_same_name_knows_nothing_of_the_canary(
    kit: Kit, model: LoadedModel
):
    await kit.store.append("ann", with_canary(talk("ann", 40)))
    await learn(kit, "ann")
    knew = surprise(kit, model, await adapter(kit, "ann"))
    await kit.store.forget("ann")
    assert await adapter(kit, "ann") is None
    assert await kit.store.turns("ann") == []
    await kit.store.append("ann", talk("ann", 40))
    await learn(kit, "ann")
    again = surprise(kit, model, await adapter(kit, "ann"))
    never = await who_never_knew(kit, model, talk("ann", 40))
    assert knew < never - 1.0
    assert again > never - 0.3
