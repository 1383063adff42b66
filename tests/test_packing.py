"""Adapters in slabs: every number is there once, tiles lie whole in slabs, waste is bounded."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.adapter_files import LoraModule, LoraWeights, StoredModule, StoredWeights
from engine.model import MODULES, ModelConfig, RopeConfig, module_shape
from engine.packing import (
    AdapterLayout,
    ResidentAdapter,
    SlabTooSmall,
    lay_out,
    min_slab_elems,
    pack_adapter,
    plan,
    unpack,
)
from engine.request import AdapterRef
from kernels import RANK_TILE


def config_of(hidden: int, ffn: int, heads: int, kv_heads: int, head_dim: int, layers: int) -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM", vocab_size=100, hidden_size=hidden, num_layers=layers,
        num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, intermediate_size=ffn, rms_norm_eps=1e-5,
        rope=RopeConfig(), qkv_bias=False, qk_norm=False, sliding_window=None, tie_word_embeddings=True,
        max_position_embeddings=2048, bos_token_id=None, eos_token_ids=(),
    )  # fmt: skip


TINY = config_of(48, 80, 4, 2, 20, 3)
REAL = {
    "demo": config_of(384, 1024, 6, 2, 64, 10),
    "llama-3.2-1b": config_of(2048, 8192, 32, 8, 64, 16),
    "llama-3.1-8b": config_of(4096, 14336, 32, 8, 128, 32),
    "qwen2.5-7b": config_of(3584, 18944, 28, 4, 128, 28),
}
SUBSETS = {
    "all": MODULES,
    "q-v": ("q_proj", "v_proj"),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}


def weights_of(config: ModelConfig, ranks: dict[tuple[int, str], int], seed: int = 0) -> LoraWeights:
    generator = torch.Generator().manual_seed(seed)
    modules = []
    for (layer, module), rank in ranks.items():
        out_features, in_features = module_shape(config, module)
        a = torch.randn(rank, in_features, generator=generator)
        b = torch.randn(out_features, rank, generator=generator)
        modules.append(LoraModule(layer, module, a, b, 1.0 + layer))
    return LoraWeights(tuple(modules))


def slab_elems_of(config: ModelConfig, block_size: int = 16) -> int:
    return config.num_layers * 2 * block_size * config.num_kv_heads * config.head_dim


def tiles_of(layout: AdapterLayout) -> list[tuple[int, int]]:
    """(offset, elements) of every tile."""
    tiles = []
    for m in layout.modules:
        tiles += [(offset, RANK_TILE * m.in_features) for offset in m.a_offsets]
        tiles += [(offset, RANK_TILE * m.out_features) for offset in m.b_offsets]
    return sorted(tiles)


ranks_strategy = st.dictionaries(
    st.tuples(st.integers(0, 2), st.sampled_from(MODULES)), st.integers(1, 40), min_size=1, max_size=21
).map(lambda ranks: dict(sorted(ranks.items(), key=lambda item: (item[0][0], MODULES.index(item[0][1])))))


@settings(deadline=None)
@given(ranks=ranks_strategy, spare=st.integers(0, 3000))
def test_tiles_lie_whole_in_slabs_without_overlap(ranks: dict[tuple[int, str], int], spare: int) -> None:
    slab_elems = min_slab_elems(TINY) + spare
    layout = pack_adapter(weights_of(TINY, ranks), TINY, slab_elems).layout
    end = 0
    for offset, size in tiles_of(layout):
        assert offset >= end
        assert offset // slab_elems == (offset + size - 1) // slab_elems
        end = offset + size
    assert end <= layout.slabs_needed * slab_elems


@settings(deadline=None)
@given(ranks=ranks_strategy, spare=st.integers(0, 3000))
def test_unpacking_gives_back_every_number(ranks: dict[tuple[int, str], int], spare: int) -> None:
    weights = weights_of(TINY, ranks)
    packed = pack_adapter(weights, TINY, min_slab_elems(TINY) + spare)
    for x, y in zip(weights.modules, unpack(packed.layout, packed.image).modules, strict=True):
        assert (x.layer, x.module, x.scale) == (y.layer, y.module, y.scale)
        assert torch.equal(x.a, y.a)
        assert torch.equal(x.b, y.b)


@settings(deadline=None)
@given(ranks=ranks_strategy, spare=st.integers(0, 3000), chooser=st.randoms(use_true_random=False))
def test_a_file_gives_the_same_image_in_whatever_order_it_holds_the_matrices(
    ranks: dict[tuple[int, str], int], spare: int, chooser: random.Random
) -> None:
    weights, slab_elems = weights_of(TINY, ranks), min_slab_elems(TINY) + spare
    parts = [(m.layer, m.module, half) for m in weights.modules for half in "ab"]
    chooser.shuffle(parts)
    begins, numbers = {}, torch.empty(0)
    by_place = {(m.layer, m.module): m for m in weights.modules}
    for layer, module, half in parts:
        begins[layer, module, half] = len(numbers)
        matrix: torch.Tensor = getattr(by_place[layer, module], half)
        numbers = torch.cat([numbers, matrix.reshape(-1)])
    modules = tuple(
        StoredModule(m.layer, m.module, m.rank, m.scale, *(begins[m.layer, m.module, half] for half in "ab"))
        for m in weights.modules
    )
    packed = pack_adapter(StoredWeights(modules, numbers), TINY, slab_elems)
    expected = pack_adapter(weights, TINY, slab_elems)
    assert packed.layout is expected.layout
    assert torch.equal(packed.image, expected.image)


@pytest.mark.parametrize("rank", [8, 16, 64])
def test_few_copies_make_the_image_of_a_file(rank: int) -> None:
    """Its matrices are in the order of their names there, in which layer 10 comes before layer 2."""
    config = REAL["llama-3.1-8b"]
    names = [(layer, module) for layer in range(config.num_layers) for module in SUBSETS["attention"]]
    begins, end = {}, 0
    for layer, module in sorted(names, key=lambda name: (str(name[0]), name[1])):
        out_features, in_features = module_shape(config, module)
        begins[layer, module] = (end, end + rank * in_features)
        end += rank * (in_features + out_features)
    modules = tuple(StoredModule(*name, rank, 2.0, *begins[name]) for name in names)
    layout, copies = plan(modules, config, slab_elems_of(config))
    assert sum(copy.count * copy.rows * copy.width for copy in copies) == end == layout.tile_elems
    assert len(copies) < 8 + 3 * layout.slabs_needed  # of 256 matrices


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("model", REAL)
@pytest.mark.parametrize("rank", [8, 16, 64])
def test_waste_is_below_five_percent_and_one_slab(model: str, subset: str, rank: int) -> None:
    config = REAL[model]
    slab_elems = max(slab_elems_of(config), min_slab_elems(config))
    shape = tuple(
        (layer, module, rank, 2.0) for layer in range(config.num_layers) for module in SUBSETS[subset]
    )
    layout = lay_out(shape, config, slab_elems)
    waste = layout.slabs_needed * slab_elems - layout.tile_elems
    assert waste <= 0.05 * layout.tile_elems + slab_elems


def test_an_adapter_takes_room_only_for_the_modules_it_has() -> None:
    few = pack_adapter(weights_of(TINY, {(0, "q_proj"): 8}), TINY, min_slab_elems(TINY)).layout
    assert few.tile_elems == 8 * (48 + 80)
    assert few.slabs_needed <= 3


def test_rank_is_padded_with_zeros_to_whole_tiles() -> None:
    packed = pack_adapter(weights_of(TINY, {(0, "q_proj"): 5}), TINY, min_slab_elems(TINY))
    (tiles,) = packed.layout.modules
    flat = packed.image.view(-1)
    assert (flat[tiles.a_offsets[0] + 5 * 48 : tiles.a_offsets[0] + 8 * 48] == 0).all()
    assert (flat[tiles.b_offsets[0] + 5 * 80 : tiles.b_offsets[0] + 8 * 80] == 0).all()


def test_adapters_of_one_shape_share_one_layout() -> None:
    ranks = {(0, "q_proj"): 8, (1, "up_proj"): 4}
    a = pack_adapter(weights_of(TINY, ranks, seed=1), TINY, 4000)
    b = pack_adapter(weights_of(TINY, ranks, seed=2), TINY, 4000)
    assert a.layout is b.layout
    assert not torch.equal(a.image, b.image)


def test_a_slab_smaller_than_a_tile_is_refused_with_both_sizes() -> None:
    with pytest.raises(SlabTooSmall, match=rf"{8 * 80}.*{8 * 80 - 1}"):
        pack_adapter(weights_of(TINY, {(0, "q_proj"): 1}), TINY, 8 * 80 - 1)


def test_the_table_points_at_every_tile_wherever_its_slab_lies() -> None:
    ranks = {(0, "q_proj"): 20, (0, "down_proj"): 3, (2, "k_proj"): 9}
    weights = weights_of(TINY, ranks)
    slab_elems = min_slab_elems(TINY) + 100
    packed = pack_adapter(weights, TINY, slab_elems)
    arena = torch.full((40, slab_elems), float("nan"))
    slabs = tuple(random.Random(1).sample(range(40), packed.layout.slabs_needed))
    arena[list(slabs)] = packed.image
    table = ResidentAdapter(AdapterRef("a", 1), packed.layout, slabs).table(TINY.num_layers)
    flat = arena.view(-1)
    for m in weights.modules:
        at = (m.layer, MODULES.index(m.module))
        assert table.scales[at] == m.scale
        for tiles, rows in ((table.tiles_a[at], m.a), (table.tiles_b[at], m.b.t())):
            width = rows.shape[1]
            offsets = [offset for offset in tiles.tolist() if offset >= 0]
            read = torch.cat([flat[o : o + 8 * width].view(8, width) for o in offsets])
            assert torch.equal(read[: m.rank], rows)
            assert (read[m.rank :] == 0).all()
    present = {(m.layer, MODULES.index(m.module)) for m in weights.modules}
    for layer in range(TINY.num_layers):
        for module in range(7):
            if (layer, module) not in present:
                assert (table.tiles_a[layer, module] == -1).all()
                assert table.scales[layer, module] == 0


def test_an_image_can_be_kept_in_sixteen_bits() -> None:
    packed = pack_adapter(weights_of(TINY, {(0, "q_proj"): 8}), TINY, 4000, dtype=torch.bfloat16)
    assert packed.image.dtype == torch.bfloat16
    assert packed.image.nbytes == packed.layout.slabs_needed * 4000 * 2


def test_the_numbers_in_another_dtype_are_put_where_they_are_told_to() -> None:
    weights, taken = weights_of(TINY, {(0, "q_proj"): 5, (1, "v_proj"): 9}), []

    def take(count: int) -> torch.Tensor:
        taken.append(torch.empty(count, dtype=torch.uint8))
        return taken[-1]

    packed = pack_adapter(weights, TINY, 4000, torch.bfloat16, take=take)
    assert [len(each) for each in taken] == [2 * sum(m.a.numel() + m.b.numel() for m in weights.modules)]
    assert torch.equal(packed.image, pack_adapter(weights, TINY, 4000).image.bfloat16())
    pack_adapter(weights, TINY, 4000, take=take)
    assert len(taken) == 1


@settings(deadline=None)
@given(ranks=ranks_strategy, spare=st.integers(0, 3000))
def test_every_number_of_an_image_is_written_whatever_was_there_before(
    ranks: dict[tuple[int, str], int], spare: int
) -> None:
    def used(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        return torch.full(shape, float("nan"), dtype=dtype)

    weights, slab_elems = weights_of(TINY, ranks), min_slab_elems(TINY) + spare
    packed = pack_adapter(weights, TINY, slab_elems, torch.bfloat16, used)
    assert packed.image.isfinite().all()
    for x, y in zip(weights.modules, unpack(packed.layout, packed.image).modules, strict=True):
        assert torch.equal(x.a.bfloat16().float(), y.a)
        assert torch.equal(x.b.bfloat16().float(), y.b)
    used_elems = sum(m.rank * (m.a.shape[1] + m.b.shape[0]) for m in weights.modules)
    assert (packed.image == 0).sum() >= packed.image.numel() - used_elems
