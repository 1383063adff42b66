"""Lanes: nobody moves without need, and no copy outlives what it copies."""

import random
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.adapter_files import LoraModule, LoraWeights
from engine.lanes import KvLanes, rearrange
from engine.lora_lanes import LoraLanes
from engine.model import GROUP_MODULES, GROUPS, MODULES, group_shape, module_shape
from engine.packing import ResidentAdapter, min_slab_elems, pack_adapter
from engine.request import AdapterRef
from tests.test_packing import TINY, weights_of

BLOCK = 4
SLABS = 60


@settings(deadline=None)
@given(before=st.lists(st.integers(0, 12), unique=True), wanted=st.lists(st.integers(0, 12), unique=True))
def test_rearranging_holds_just_those_wanted_and_moves_no_more_than_leave(
    before: list[int], wanted: list[int]
) -> None:
    lanes = list(before)
    contents = list(before)
    moves, joined = rearrange(lanes, wanted)
    assert sorted(lanes) == sorted(wanted)
    for source, target in moves:
        assert target < source
        contents[target] = contents[source]
    kept = len(lanes) - len(joined)
    assert contents[:kept] == lanes[:kept]
    assert set(lanes[kept:]) == set(wanted) - set(before)
    assert joined == list(range(kept, len(lanes)))
    assert len(moves) <= len(set(before) - set(wanted))


class Pages:
    """A K/V arena that also remembers what was written for whom."""

    def __init__(self, seed: int) -> None:
        shape = (SLABS, TINY.num_layers, 2, BLOCK, TINY.num_kv_heads, TINY.head_dim)
        self.slabs = torch.full(shape, float("nan"))
        self.free = list(range(SLABS))
        self.random = random.Random(seed)
        self.random.shuffle(self.free)
        self.blocks: dict[str, list[int]] = {}
        self.history: dict[str, list[torch.Tensor]] = {}
        self.numbers = 0.0

    def grow(self, name: str) -> tuple[int, int]:
        """Room for one more position: its slab and offset."""
        blocks, length = self.blocks.setdefault(name, []), len(self.history.setdefault(name, []))
        if length == len(blocks) * BLOCK:
            blocks.append(self.free.pop())
        return blocks[-1], length % BLOCK

    def write(self, name: str) -> int:
        slab, offset = self.grow(name)
        self.slabs[slab, :, :, offset] = self.new_position(name)
        return slab

    def new_position(self, name: str) -> torch.Tensor:
        self.numbers += 1
        value = torch.full(self.slabs.shape[1:3] + self.slabs.shape[4:], self.numbers)
        self.history[name].append(value)
        return value

    def release(self, name: str) -> None:
        blocks = self.blocks.pop(name)
        self.slabs[blocks] = float("nan")
        self.free += blocks
        del self.history[name]


@pytest.fixture
def uninitialised_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # with it, torch.empty fills with NaN
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("uninitialised_memory_is_nan")
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10_000), budget=st.sampled_from([1 << 40, 200_000]))
def test_kv_lanes_always_hold_what_the_pages_hold(seed: int, budget: int) -> None:
    pages, chance = Pages(seed), random.Random(seed)
    lanes = KvLanes(TINY, pages.slabs, budget)
    for step in range(25):
        if chance.random() < 0.4 and len(pages.blocks) < 5:  # a prompt comes, perhaps into slabs just freed
            name = f"s{step}"
            lanes.written({pages.write(name) for _ in range(chance.randint(1, 12))})
        if chance.random() < 0.2 and pages.blocks:
            pages.release(chance.choice(sorted(pages.blocks)))
        names = [name for name in sorted(pages.blocks) if chance.random() < 0.8]
        names = [name for name in names if pages.free or len(pages.history[name]) % BLOCK]
        chance.shuffle(names)
        slots = {}
        for name in names[: len(pages.free)]:
            slots[name] = pages.grow(name)
        names = list(slots)
        blocks = [tuple(pages.blocks[name]) for name in names]
        rows = lanes.hold(tuple(names), blocks, [len(pages.history[name]) + 1 for name in names])
        on_lanes = [names[row] for row in rows]
        for name in set(names) - set(on_lanes):
            slab, offset = slots[name]
            pages.slabs[slab, :, :, offset] = pages.new_position(name)
            lanes.written([slab])
        if not on_lanes:
            continue
        k_columns, v_columns = lanes.columns()
        for lane, name in enumerate(on_lanes):
            new = pages.new_position(name)
            for layer in range(TINY.num_layers):
                k_columns[layer][lane].copy_(new[layer, 0])
                v_columns[layer][lane].copy_(new[layer, 1])
        check(lanes, on_lanes, pages, window=None)
        check(lanes, on_lanes, pages, window=3)
        for name in on_lanes:
            slab, offset = slots[name]
            pages.slabs[slab, :, :, offset] = pages.history[name][-1]
        lanes.advance([tuple(pages.blocks[name]) for name in on_lanes])


def check(lanes: KvLanes, names: list[str], pages: Pages, window: int | None) -> None:
    keys, values, mask = lanes.views(window)
    heads = TINY.num_kv_heads
    assert len(lanes) == len(names)
    for lane, name in enumerate(names):
        expected = torch.stack(pages.history[name])[-(window or 10**9) :]  # [n, L, 2, Hkv, D]
        for layer in range(TINY.num_layers):
            for head in range(heads):
                at = lane * heads + head
                seen = mask[at, 0] == 0
                assert seen.sum() == len(expected)
                assert torch.equal(keys[layer][at][:, seen].t(), expected[:, layer, 0, head])
                assert torch.equal(values[layer][at][seen], expected[:, layer, 1, head])
                assert torch.isfinite(keys[layer][at]).all()
                assert torch.isfinite(values[layer][at]).all()


def test_one_very_long_sequence_does_not_pad_the_others_to_its_length() -> None:
    slabs = torch.zeros(4000, TINY.num_layers, 2, BLOCK, TINY.num_kv_heads, TINY.head_dim)
    lanes = KvLanes(TINY, slabs, 1 << 40)
    blocks = [tuple(range(3000)), *((3000 + 10 * i, 3001 + 10 * i) for i in range(30))]
    rows = lanes.hold(tuple(map(str, range(31))), blocks, [12_000] + [7] * 30)
    assert 0 not in rows
    assert len(rows) == 30


def test_a_sequence_that_outgrows_the_budget_goes_on_without_a_lane() -> None:
    slabs = torch.zeros(300, TINY.num_layers, 2, BLOCK, TINY.num_kv_heads, TINY.head_dim)
    lanes = KvLanes(TINY, slabs, budget_bytes=400 * slabs[0, :, :, 0].numel() * 4)
    blocks = [tuple(range(300))]
    length = 300
    while lanes.hold(("long",), blocks, [length]):
        lanes.advance(blocks)
        length += 1
        assert length < 800
    assert length > 400
    assert lanes.hold(("long", "short"), [*blocks, (0, 1)], [length, 7]) == (1,)


def make_resident(
    arena: torch.Tensor, name: str, weights: LoraWeights, slabs: tuple[int, ...]
) -> ResidentAdapter:
    packed = pack_adapter(weights, TINY, arena.shape[1])
    assert len(slabs) >= packed.layout.slabs_needed
    slabs = slabs[: packed.layout.slabs_needed]
    arena[list(slabs)] = packed.image
    return ResidentAdapter(AdapterRef(name, 1), packed.layout, slabs)


def delta(weights: LoraWeights, layer: int, group: str, x: torch.Tensor) -> torch.Tensor:
    found = {m.module: m for m in weights.modules if m.layer == layer}
    parts = []
    for module in GROUP_MODULES[group]:
        width = module_shape(TINY, module)[0]
        m: LoraModule | None = found.get(module)
        parts.append(torch.zeros(width) if m is None else m.scale * (m.b @ (m.a @ x)))
    return torch.cat(parts)


SHAPES = {
    "all of rank 8": {(layer, module): 8 for layer in range(3) for module in MODULES},
    "some modules": {(0, "q_proj"): 8, (0, "v_proj"): 8, (1, "up_proj"): 3, (2, "o_proj"): 20},
    "ranks differ": {
        (0, "q_proj"): 9,
        (0, "k_proj"): 8,
        (0, "v_proj"): 1,
        (2, "gate_proj"): 8,
        (2, "up_proj"): 17,
    },
}


def test_lora_lanes_add_each_rows_own_delta_as_rows_come_and_go() -> None:
    chance = random.Random(4)
    for ranks in SHAPES.values():
        arena = torch.full((300, min_slab_elems(TINY) + 40), float("nan"))
        free = chance.sample(range(300), 300)
        adapters = []
        for number in range(6):
            weights = weights_of(TINY, ranks, seed=number)
            made = make_resident(arena, f"a{number}", weights, tuple(free[50 * number : 50 * number + 50]))
            adapters.append((made, weights))
        lanes = LoraLanes(TINY, adapters[0][0].layout, arena)
        for _ in range(12):
            chosen = [chance.choice(adapters) for _ in range(chance.randint(1, 8))]  # one may come twice
            order = lanes.hold([made for made, _ in chosen])
            assert sorted(order) == list(range(len(chosen)))
            for layer in range(TINY.num_layers):
                for group in GROUPS:
                    out_features, in_features = group_shape(TINY, group)
                    x, y = torch.randn(len(chosen), in_features), torch.randn(len(chosen), out_features)
                    got = y.clone()
                    lanes.apply(layer, group, x, got)
                    for lane, row in enumerate(order):
                        expected = y[lane] + delta(chosen[row][1], layer, group, x[lane])
                        assert torch.allclose(got[lane], expected, atol=1e-3)


def test_a_lane_whose_slabs_were_written_is_read_anew() -> None:
    ranks = {(0, "q_proj"): 8}
    arena = torch.full((10, min_slab_elems(TINY)), float("nan"))
    before, after = weights_of(TINY, ranks, seed=1), weights_of(TINY, ranks, seed=2)
    made = make_resident(arena, "a", before, (3, 7, 5))
    lanes = LoraLanes(TINY, made.layout, arena)
    lanes.hold([made])
    arena[list(made.slabs)] = pack_adapter(after, TINY, arena.shape[1]).image
    lanes.written({made.slabs[-1]})
    lanes.hold([made])
    x, y = torch.randn(1, 48), torch.zeros(1, group_shape(TINY, "qkv")[0])
    lanes.apply(0, "qkv", x, y)
    assert torch.allclose(y[0], delta(after, 0, "qkv", x[0]), atol=1e-4)
