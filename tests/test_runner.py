"""The runner against transformers and PEFT: pages, chunks, decoding, mixed adapters."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels
from engine.batch import build_batch
from engine.request import Chunk
from engine.weights import load_model
from tests.engine_driver import BLOCK, Driver
from tests.peft_world import ADAPTERS, World, make_world, tokens_of, worst
from tests.tiny_models import FAMILIES, save_random

# PEFT asks transformers for a property that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), FAMILIES["llama3"]())


@pytest.mark.parametrize("family", FAMILIES)
def test_chunked_prefill_and_decode_through_shuffled_pages_equal_transformers(
    family: str, tmp_path: Path
) -> None:
    theirs = save_random(tmp_path, FAMILIES[family]())
    driver = Driver(load_model(tmp_path))
    long, short = tokens_of(1, 40), tokens_of(2, 23)
    with torch.inference_mode():
        expected = [theirs(torch.tensor([tokens])).logits[0] for tokens in (long, short)]
    a, b = driver.sequence(long), driver.sequence(short)
    for size in (9, 1, 14, 6):  # chunks that begin and end inside blocks, one of a single token
        assert worst(driver.logits((a, size))[0], expected[0][a.num_computed - 1]) < 1e-4
    for size in (5, 8):  # the second prompt while the first decodes
        got = driver.logits((b, size), (a, 1))
        assert worst(got[0], expected[1][b.num_computed - 1]) < 1e-4
        assert worst(got[1], expected[0][a.num_computed - 1]) < 1e-4
    for _ in range(8):
        got = driver.logits((a, 1), (b, 1))
        assert worst(got[0], expected[0][a.num_computed - 1]) < 1e-4
        assert worst(got[1], expected[1][b.num_computed - 1]) < 1e-4


@pytest.mark.parametrize("adapter", [None, *ADAPTERS])
def test_each_adapter_alone_equals_peft(world: World, adapter: str | None) -> None:
    driver = Driver(world.loaded)
    tokens = tokens_of(3, 20)
    expected = world.reference(adapter, tokens)
    sequence = driver.sequence(tokens, world.place(driver)[adapter])
    for size in (7, 9, 1, 1, 1, 1):
        assert worst(driver.logits((sequence, size))[0], expected[sequence.num_computed - 1]) < 1e-4


def test_a_mixed_batch_of_all_adapters_and_base_rows_equals_peft(world: World) -> None:
    driver = Driver(world.loaded)
    residents = world.place(driver)
    names: list[str | None] = [None, *ADAPTERS, None, "r8-alpha-32"]  # one adapter twice, base first and last
    sequences, expected = [], []
    for number, name in enumerate(names):
        tokens = tokens_of(10 + number, 26 + number % 5)
        sequences.append(driver.sequence(tokens, residents[name]))
        expected.append(world.reference(name, tokens))

    def step(sizes: Callable[[int], int]) -> None:
        got = driver.logits(*((s, sizes(i)) for i, s in enumerate(sequences)))
        for i, sequence in enumerate(sequences):
            assert worst(got[i], expected[i][sequence.num_computed - 1]) < 1e-4, names[i]

    step(lambda i: 8 + i)  # all prefill, of different lengths
    step(lambda i: 1 if i % 2 else 3)  # half decodes, half is still prefilling
    for _ in range(4):
        step(lambda i: 1)


def test_the_decode_batch_may_change_between_steps(world: World) -> None:
    driver = Driver(world.loaded)
    residents = world.place(driver)
    names: list[str | None] = ["r4", "r8-alpha-32", None, "r8-again", "r16-q-v", "patterns"]
    tokens = {i: tokens_of(30 + i, 40) for i in range(len(names))}
    expected = {i: world.reference(name, tokens[i]) for i, name in enumerate(names)}
    sequences = {i: driver.sequence(tokens[i], residents[name]) for i, name in enumerate(names)}
    for i, sequence in sequences.items():
        driver.logits((sequence, 5 + i))
    orders = [
        (0, 1, 2), (0, 1, 2), (2, 0, 1), (3, 1, 2, 0), (1, 3), (1, 3), (5, 4, 3, 2, 1, 0), (5, 4, 3, 2, 1, 0),
        (4,), (1, 5), (0, 1, 2, 3, 4, 5), (0, 1, 2, 3, 4, 5),
    ]  # fmt: skip
    for order in orders:
        got = driver.logits(*((sequences[i], 1) for i in order))
        for row, i in enumerate(order):
            assert worst(got[row], expected[i][sequences[i].num_computed - 1]) < 1e-4, (order, names[i])


def test_a_preempted_sequence_that_comes_back_on_other_pages_reads_nothing_stale(world: World) -> None:
    driver = Driver(world.loaded)
    residents = world.place(driver)
    a, b = (
        driver.sequence(tokens_of(50, 30), residents["r4"]),
        driver.sequence(tokens_of(51, 30), residents["r8-again"]),
    )
    expected = (
        world.reference("r4", list(a.request.prompt)),
        world.reference("r8-again", list(b.request.prompt)),
    )
    driver.logits((a, 10), (b, 12))
    for _ in range(3):
        driver.logits((a, 1), (b, 1))
    blocks = list(a.blocks)
    driver.release(a)
    driver.free += blocks  # the very same slabs, in another order, and with other contents
    c = driver.sequence(tokens_of(52, 30), residents["patterns"])
    driver.logits((c, 13), (b, 1))
    driver.logits((a, 13), (b, 1))
    for _ in range(3):
        got = driver.logits((a, 1), (b, 1), (c, 1))
        assert worst(got[0], expected[0][a.num_computed - 1]) < 1e-4
        assert worst(got[1], expected[1][b.num_computed - 1]) < 1e-4
        assert worst(got[2], world.reference("patterns", list(c.request.prompt))[c.num_computed - 1]) < 1e-4


def test_another_adapter_in_the_same_slabs_is_the_one_that_counts(world: World) -> None:
    driver = Driver(world.loaded)
    tokens = tokens_of(60, 20)
    first = driver.adapter(world.folders["r8-alpha-32"])
    a = driver.sequence(tokens, first)
    driver.logits((a, 10))
    driver.logits((a, 1))
    driver.free += first.slabs[::-1]
    second = driver.adapter(
        world.folders["r8-again"]
    )  # same name, version and slabs: forgotten, then learned anew
    assert second.slabs == first.slabs
    b = driver.sequence(tokens, second)
    driver.logits((b, 10))
    expected = world.reference("r8-again", tokens)
    for _ in range(3):
        assert worst(driver.logits((b, 1))[0], expected[b.num_computed - 1]) < 1e-4


def test_a_step_that_fails_half_way_leaves_nothing_stale(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(world.loaded)
    residents = world.place(driver)
    tokens = {name: tokens_of(70 + i, 20) for i, name in enumerate(("r4", "r8-again"))}
    sequences = [driver.sequence(tokens[name], residents[name]) for name in tokens]
    driver.logits(*((sequence, 8) for sequence in sequences))
    driver.logits(*((sequence, 1) for sequence in sequences))
    calls = iter(range(100))
    real = kernels.lane_attention

    def fail_in_the_second_layer(*arguments: Any) -> Tensor:
        if next(calls) == 1:
            raise RuntimeError("out of luck")
        return real(*arguments)

    monkeypatch.setattr(kernels, "lane_attention", fail_in_the_second_layer)
    with pytest.raises(RuntimeError, match="luck"):
        driver.logits(*((sequence, 1) for sequence in sequences))
    for _ in range(2):
        got = driver.logits(*((sequence, 1) for sequence in sequences))
        for row, (name, sequence) in enumerate(zip(tokens, sequences, strict=True)):
            expected = world.reference(name, tokens[name])[sequence.num_computed - 1]
            assert worst(got[row], expected) < 1e-4


@pytest.mark.parametrize("lane_bytes", [0, 40_000, 1 << 30])
def test_rows_without_room_for_lanes_compute_the_same(world: World, lane_bytes: int) -> None:
    driver = Driver(world.loaded, lane_bytes=lane_bytes)
    residents = world.place(driver)
    names: list[str | None] = ["r4", None, "patterns", "r16-q-v", "r4"]
    tokens = [tokens_of(80 + i, 24) for i in range(len(names))]
    sequences = [driver.sequence(t, residents[name]) for t, name in zip(tokens, names, strict=True)]
    driver.logits(*((sequence, 6 + 3 * i) for i, sequence in enumerate(sequences)))
    for _ in range(3):
        got = driver.logits(*((sequence, 1) for sequence in sequences))
        for i, sequence in enumerate(sequences):
            expected = world.reference(names[i], tokens[i])[sequence.num_computed - 1]
            assert worst(got[i], expected) < 1e-4


def test_the_same_batches_in_bfloat16_stay_near_float32(world: World, tmp_path: Path) -> None:
    save_random(tmp_path, FAMILIES["llama3"]())
    driver = Driver(load_model(tmp_path, dtype=torch.bfloat16))
    residents = world.place(driver)
    names: list[str | None] = ["r8-alpha-32", None, "r16-q-v"]
    tokens = [tokens_of(90 + i, 12) for i in range(len(names))]
    sequences = [driver.sequence(t, residents[name]) for t, name in zip(tokens, names, strict=True)]
    driver.logits(*((sequence, 9) for sequence in sequences))
    driver.logits(*((sequence, 1) for sequence in sequences))
    got = driver.logits(*((sequence, 1) for sequence in sequences))
    for i, name in enumerate(names):
        expected = world.reference(name, tokens[i])[10]
        assert (got[i] - expected).norm() / expected.norm() < 0.1


def test_tokens_come_back_in_the_order_of_the_chunks_that_want_one(world: World) -> None:
    driver = Driver(world.loaded)
    prompts = [tokens_of(95 + i, 9) for i in range(4)]
    sequences = [driver.sequence(prompt) for prompt in prompts]
    driver.logits((sequences[1], 8), (sequences[3], 8))
    sizes = [9, 1, 5, 1]
    chunks = [driver.chunk(sequence, size) for sequence, size in zip(sequences, sizes, strict=True)]
    chunks[2] = Chunk(sequences[2], 0, 5, wants_token=False)
    got = driver.runner.run(build_batch(chunks, BLOCK))
    expected = [world.reference(None, prompts[i])[8].argmax().item() for i in (0, 1, 3)]
    assert got == expected


def test_a_step_of_which_nobody_wants_a_token_runs(world: World) -> None:
    driver = Driver(world.loaded)
    sequence = driver.sequence(tokens_of(99, 9))
    driver.chunk(sequence, 9)
    assert driver.runner.run(build_batch([Chunk(sequence, 0, 5, wants_token=False)], BLOCK)) == []
