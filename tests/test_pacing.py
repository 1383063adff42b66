"""Learning beside serving: what is held up, for how long, and that nothing else changes."""

import dataclasses

import pytest
import torch

from engine.model import ModelConfig
from personalization.pacing import Pacer, people_at_once
from personalization.score import token_losses
from personalization.train import Person, Recipe, train
from tests.small_model import CONFIG, habits, small_model


class World:
    """A device that works for a second a mark, a clock, and an engine that is busy for a while."""

    def __init__(self, busy_until: float = 0.0) -> None:
        self.now = 0.0
        self.busy_until = busy_until
        self.marks = 0
        self.waited: list[int] = []  # marks waited for, in order
        self.slept = 0.0

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept += seconds

    def busy(self) -> bool:
        return self.now < self.busy_until

    def mark(self) -> "World.Mark":
        self.marks += 1
        return World.Mark(self, self.marks)

    def pacer(self, share: float = 0.25) -> Pacer:
        return Pacer(self.busy, share, mark=self.mark, clock=self.clock, sleep=self.sleep)

    class Mark:
        def __init__(self, world: "World", number: int) -> None:
            self._world, self._number = world, number

        def synchronize(self) -> None:
            if self._number not in self._world.waited:
                self._world.waited.append(self._number)
                self._world.now += 1.0


def test_while_nobody_waits_the_device_is_one_layer_ahead_and_nothing_rests() -> None:
    world = World()
    pacer = world.pacer()
    for _ in range(3):
        pacer.pause()
    assert world.waited == [1, 2]
    assert world.slept == pacer.rested_s == 0.0


def test_while_replies_are_computed_learning_keeps_to_its_share() -> None:
    world = World(busy_until=1000.0)
    pacer = world.pacer(share=0.25)
    for _ in range(10):
        pacer.pause()
    assert world.waited == list(range(1, 11))  # nothing of ours is left on the device during a rest
    assert world.slept == pytest.approx(30.0, abs=0.1)
    assert pacer.rested_s == pytest.approx(world.slept)


def test_a_rest_ends_when_nobody_waits_any_more() -> None:
    world = World(busy_until=1.5)
    pacer = world.pacer(share=0.01)
    pacer.pause()
    assert world.now == pytest.approx(1.5, abs=0.01)


def test_what_the_host_does_between_two_layers_is_not_rested_for() -> None:
    world = World(busy_until=10_000.0)
    pacer = world.pacer(share=0.25)
    pacer.pause()
    world.slept = 0.0
    world.now += 1000.0  # nothing was being learned
    pacer.pause()
    assert world.slept == pytest.approx(3.0, abs=0.1)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="share: expected above 0 and at most 1"):
        World().pacer(share)


def test_every_layer_is_held_up_both_ways_and_what_is_learned_is_the_same() -> None:
    rows = habits(3, 8)
    recipe = Recipe(rank=2, epochs=1, tokens_per_step=32, learning_rate=1e-2)
    (alone,) = train(small_model(), [Person(rows, 0)], recipe)
    model, world = small_model(), World(busy_until=1e9)
    world.pacer(share=0.5).pace(model.decoder)
    (paced,) = train(model, [Person(rows, 0)], recipe)
    for ours, theirs in zip(paced.weights.modules, alone.weights.modules, strict=True):
        assert torch.equal(ours.a, theirs.a)
        assert torch.equal(ours.b, theirs.b)
    # Each of three steps: two layers forward; backward between them, as nothing needs the embedding's.
    assert world.marks == 3 * (CONFIG.num_layers + CONFIG.num_layers - 1)
    before = world.marks
    token_losses(model, rows[:1], None)
    assert world.marks == before + CONFIG.num_layers


DEMO = dataclasses.replace(
    CONFIG, hidden_size=512, intermediate_size=1376, num_heads=8, num_kv_heads=4, head_dim=64
)
LARGE = dataclasses.replace(
    CONFIG, hidden_size=4096, intermediate_size=14336, num_heads=32, num_kv_heads=8, head_dim=128
)


@pytest.mark.parametrize(("config", "expected"), [(DEMO, 16), (LARGE, 1)], ids=["demo", "large"])
def test_the_larger_the_model_the_fewer_share_a_step(config: ModelConfig, expected: int) -> None:
    recipe = Recipe(tokens_per_step=1024)
    assert people_at_once(config, recipe, 64) == expected
    assert people_at_once(config, recipe, 1) == 1
