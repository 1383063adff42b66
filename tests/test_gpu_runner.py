"""The GPU's runner against transformers and PEFT.

Where there is no GPU its kernels are interpreted, which takes seconds a layer: then one layer of a few
families, and a smaller mix, stand for all.
"""

from itertools import groupby
from pathlib import Path

import pytest
import torch

from engine.batch import build_batch
from engine.config import ConfigError
from engine.gpu_decoder import StepShape, token_buckets, worth_keeping
from engine.gpu_runner import GpuRunner
from engine.model import GROUPS
from engine.weights import load_model
from kernels import fused, lora
from tests.engine_driver import BLOCK, Driver
from tests.peft_world import ADAPTERS, World, make_world, tokens_of, worst
from tests.tiny_models import FAMILIES, save_random

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), FAMILIES["llama3"](), DEVICE)


@pytest.mark.parametrize("family", FAMILIES if HAS_GPU else ("llama3", "mistral", "qwen2", "qwen3"))
def test_chunked_prefill_and_decode_equal_transformers(family: str, tmp_path: Path) -> None:
    config = FAMILIES[family]()
    if not HAS_GPU:
        config.num_hidden_layers = 1
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:1]
    theirs = save_random(tmp_path, config)
    driver = Driver(load_model(tmp_path, device=DEVICE), on_gpu=True)
    tokens = tokens_of(1, 13)
    expected = theirs(torch.tensor([tokens])).logits[0]
    sequence = driver.sequence(tokens)
    at = 0
    for length in (5, 3, 1, 1, 2, 1) if HAS_GPU else (5, 4, 1):
        at += length
        got = driver.logits((sequence, length))
        assert worst(got[0], expected[at - 1]) < 1e-4


def test_a_mixed_batch_of_all_adapters_and_base_rows_equals_peft(world: World) -> None:
    driver = Driver(world.loaded, on_gpu=True, num_slabs=900)
    residents = world.place(driver)
    names: list[str | None] = [None, "r16-q-v", "patterns"]
    if HAS_GPU:
        names = [None, *ADAPTERS, None, "r8-alpha-32"]
    prompts = {index: tokens_of(40 + index, 6 + index % 3) for index in range(len(names))}
    expected = {index: world.reference(name, prompts[index]) for index, name in enumerate(names)}
    sequences = {i: driver.sequence(prompts[i], residents[name]) for i, name in enumerate(names)}
    got = driver.logits(*[(sequences[i], 4) for i in sequences])
    for i in sequences:
        assert worst(got[i], expected[i][3]) < 1e-4, names[i]
    if not HAS_GPU:
        got = driver.logits(*[(sequences[i], 1) for i in sequences])
        for i in sequences:
            assert worst(got[i], expected[i][4]) < 1e-4, names[i]
        return
    got = driver.logits(*[(sequences[i], 1 if i % 2 else 2) for i in sequences])
    for i in sequences:
        assert worst(got[i], expected[i][4 if i % 2 else 5]) < 1e-4, names[i]
    odd = [i for i in sequences if i % 2]
    got = driver.logits(*[(sequences[i], 1) for i in odd])
    for place, i in enumerate(odd):
        assert worst(got[place], expected[i][5]) < 1e-4, names[i]


def test_preparing_steps_touches_no_page_and_changes_no_reply(world: World) -> None:
    driver = Driver(world.loaded, on_gpu=True, num_slabs=900)
    assert isinstance(driver.runner, GpuRunner)
    name = "r16-q-v"
    resident = world.place(driver)[name]
    tokens = tokens_of(50, 6)
    sequence = driver.sequence(tokens, resident)
    driver.logits((sequence, 4))
    before = driver.arena.clone()
    likely = list(driver.runner._likely_shapes())
    if not HAS_GPU:  # three of them stand for all: a decode step, prompts alone, prompts beside decode rows
        chosen = {(s.has_prompts, s.singles > 0): s for s in reversed(likely) if s.lora_groups}
        driver.runner._graphs.update(dict.fromkeys(set(likely) - set(chosen.values())))
    shapes = 0
    while driver.runner.prepare():
        shapes += 1
    assert shapes == (len(set(likely)) if HAS_GPU else 3)
    assert torch.equal(before.nan_to_num(7.0), driver.arena.nan_to_num(7.0))
    got = driver.logits((sequence, 1))
    assert worst(got[0], world.reference(name, tokens)[4]) < 1e-4


def test_a_step_that_cannot_be_recorded_is_done_all_the_same(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    driver = Driver(world.loaded, on_gpu=True)
    runner = driver.runner
    assert isinstance(runner, GpuRunner)

    def no_memory(launches: object) -> None:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patched:
        patched.setattr(runner, "_record", no_memory)
        sequence = driver.sequence(tokens_of(53, 6))
        batch = build_batch([driver.chunk(sequence, 6)], BLOCK)
        first = runner.launch(batch).tokens()
    assert "no memory to record a step" in caplog.text
    assert not runner._records
    assert runner.launch(batch).tokens() == first
    assert runner._graphs == {runner._shape(batch): None}


def test_no_inputs_are_written_before_the_last_copy_of_their_side_was_waited_for(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(world.loaded, on_gpu=True)
    assert isinstance(driver.runner, GpuRunner)
    inputs = driver.runner._inputs
    log: list[tuple[str, int]] = []

    class Event:
        def __init__(self, side: int) -> None:
            self.side = side

        def record(self) -> None:
            log.append(("recorded", self.side))

        def synchronize(self) -> None:
            log.append(("waited for", self.side))

    monkeypatch.setattr(inputs, "_events", [Event(0), Event(1)])
    monkeypatch.setattr(inputs, "_copy", lambda side, begin, end: log.append(("copied", side)))
    batch = build_batch([driver.chunk(driver.sequence(tokens_of(58, 4)), 1)], BLOCK)
    inputs.fill_nothing()
    for _ in range(3):
        inputs.fill(batch, 1, 1, 1)
    inputs.fill_nothing()
    for side in (0, 1):
        steps = [what for what, _ in groupby(what for what, of in log if of == side)]
        assert all(steps[i + 1 : i + 2] == ["recorded"] for i, what in enumerate(steps) if what == "copied")


def test_the_likely_shapes_are_those_that_batches_come_in(world: World) -> None:
    driver = Driver(world.loaded, on_gpu=True, num_slabs=900)
    runner = driver.runner
    assert isinstance(runner, GpuRunner)
    likely = set(runner._likely_shapes())
    base, prompt = driver.sequence(tokens_of(51, 12)), driver.sequence(tokens_of(52, 12))
    for parts in ([(base, 1)], [(base, 1), (prompt, 4)], [(prompt, 5)], [(base, 1), (prompt, 1)]):
        batch = build_batch([driver.chunk(sequence, length) for sequence, length in parts], BLOCK)
        assert runner._shape(batch) in likely
        for sequence, length in parts:
            sequence.num_computed += length


def test_a_step_of_few_tokens_may_hold_prompts_beside_decode_rows(world: World) -> None:
    driver = Driver(world.loaded, on_gpu=True)
    runner = GpuRunner(world.loaded, driver.arena, BLOCK, max_tokens=16, max_rows=64)
    chunks = [driver.chunk(driver.sequence(tokens_of(55, 12)), length) for length in (1, 4)]
    shape = runner._shape(build_batch(chunks, BLOCK))
    assert (shape.tokens, shape.singles) == (64, 64)
    assert shape in set(runner._likely_shapes())


def test_all_rows_of_a_step_may_share_nearly_all_their_blocks(world: World) -> None:
    rows, shared = 16, 8
    driver = Driver(world.loaded, on_gpu=True, num_slabs=shared + rows)
    runner = driver.runner
    assert isinstance(runner, GpuRunner)
    common = tuple(driver.free.pop() for _ in range(shared))
    chunks = []
    for seed in range(rows):
        sequence = driver.sequence(tokens_of(seed, shared * BLOCK + 1))
        sequence.blocks, sequence.num_computed = common, shared * BLOCK
        chunks.append(driver.chunk(sequence, 1))
    batch = build_batch(chunks, BLOCK)
    runner._inputs.fill(batch, rows, rows, rows)
    listed = runner._inputs.column["block_list"][: rows * (shared + 1)].tolist()
    assert listed == [slab for blocks in batch.blocks for slab in blocks]


def test_beyond_a_few_kinds_of_adapters_all_others_run_as_one(world: World) -> None:
    driver = Driver(world.loaded, on_gpu=True)
    runner = driver.runner
    assert isinstance(runner, GpuRunner)
    kinds = [("qkv",), ("o",), ("gate_up",), ("down",), ("qkv", "down")]
    batch = build_batch([driver.chunk(driver.sequence(tokens_of(57, 4)), 1)], BLOCK)
    seen = []
    for kind in (*kinds, *kinds):
        runner._inputs.lora_groups = lambda _, kind=kind: kind  # type: ignore[method-assign,misc]
        seen.append(runner._shape(batch).lora_groups)
    assert seen == [*kinds[:2], GROUPS, GROUPS, GROUPS] * 2
    assert {shape.lora_groups for shape in runner._likely_shapes()} == {(), GROUPS, *kinds[:2]}


def test_slabs_in_which_tiles_could_not_be_read_several_numbers_at_a_time_are_refused(world: World) -> None:
    arena = torch.zeros(4, Driver(world.loaded).slab_elems + 4, device=DEVICE)
    with pytest.raises(ConfigError, match=r"block_size: expected .* multiple of 8 numbers, got 16"):
        GpuRunner(world.loaded, arena, 16, max_tokens=64, max_rows=16)


def test_where_adapters_lie_is_known_before_the_last_kernel_that_layers_may_overlap(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(world.loaded, on_gpu=True)
    runner = driver.runner
    assert isinstance(runner, GpuRunner)
    launched: list[str] = []
    monkeypatch.setattr(lora, "resolve", lambda *_: launched.append("resolve"))
    monkeypatch.setattr(fused, "embed", lambda *_: launched.append("embed"))
    monkeypatch.setattr(runner._decoder, "_layer", lambda *_: launched.append("layer"))
    runner._decoder.layers(StepShape(1, 1, False, GROUPS, runner._attention(1, 1), 1))
    assert launched[:3] == ["resolve", "embed", "layer"]


def test_likely_shapes_are_listed_once_and_again_when_another_kind_of_adapter_was_seen(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(world.loaded, on_gpu=True, num_slabs=900)
    runner = driver.runner
    assert isinstance(runner, GpuRunner)
    lists: list[list[StepShape]] = []
    likely = runner._likely_shapes

    def listed() -> list[StepShape]:
        lists.append(list(likely()))
        return lists[-1]

    monkeypatch.setattr(runner, "_likely_shapes", listed)
    runner._graphs.update(dict.fromkeys(likely()))
    assert not runner.prepare()
    assert not runner.prepare()
    assert len(lists) == 1

    resident = world.place(driver)["r16-q-v"]
    for seed in (53, 54):  # the second is of a kind that is known by now
        batch = build_batch([driver.chunk(driver.sequence(tokens_of(seed, 4), resident), 1)], BLOCK)
        groups = runner._shape(batch).lora_groups
    new = [shape for shape in likely() if shape not in runner._graphs]
    assert {shape.lora_groups for shape in new} == {groups}
    runner._graphs.update(dict.fromkeys(new[1:]))
    assert runner.prepare()
    assert new[0] in runner._graphs
    assert not runner.prepare()
    assert len(lists) == 2


def test_numbers_of_tokens_that_products_are_slow_with_are_padded_to_faster_ones() -> None:
    buckets = token_buckets(1100)
    assert buckets[-1] == 1152

    def seconds(tokens: int) -> float:
        return {128: 220.0, 448: 620.0}.get(tokens, float(tokens))  # 192 and 512 are the next

    assert worth_keeping(buckets, seconds) == [tokens for tokens in buckets if tokens != 448]
    assert worth_keeping(buckets, lambda tokens: 1.0) == buckets
    assert worth_keeping(buckets, lambda tokens: float(tokens == 1024)) == [
        tokens for tokens in buckets if tokens != 1024
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="no GPU")
def test_products_are_timed_on_the_device(world: World) -> None:
    runner = Driver(world.loaded, on_gpu=True, num_slabs=900).runner
    assert isinstance(runner, GpuRunner)
    with torch.inference_mode():
        few, many = (runner._decoder.products_s(runner._token_buckets[at]) for at in (0, -1))
    assert 0 < few < 1
    assert 0 < many < 1
