"""The Triton kernels of a decoder layer against the reference: LoRA's halves, skinny products, what is fused.

Without a GPU they are interpreted, in float32; on one they also run in bfloat16. Sizes are odd, memory that
nobody may read holds NaN, and chunks and blocks are cut so small that everything has several.
"""

import random
from collections.abc import Sequence as Many

import pytest
import torch
from torch import Tensor

from engine.adapter_files import LoraModule, LoraWeights
from engine.batch import Batch, build_batch
from engine.model import GROUP_MODULES, GROUPS, MODULES, ModelConfig, RopeConfig, group_shape, module_shape
from engine.packing import ResidentAdapter, min_slab_elems, pack_adapter
from engine.request import AdapterRef, Chunk, Request, SamplingParams, Sequence
from engine.step_inputs import Limits, StepInputs
from kernels import fused, linear, lora, reference
from kernels.fused import Adapters, Product
from kernels.linear import LinearPlan
from kernels.lora import ItemPlaces

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
BOTH = pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        pytest.param(
            torch.bfloat16,
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not HAS_GPU, reason="the interpreter has no bfloat16"),
            ],
        ),
    ],
    ids=["float32", "bfloat16"],
)
NAN, EPS = float("nan"), 1e-5
LAYERS, BLOCK = 2, 4
CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=31,
    hidden_size=40,
    num_layers=LAYERS,
    num_heads=3,
    num_kv_heads=1,
    head_dim=12,
    intermediate_size=40,
    rms_norm_eps=EPS,
    rope=RopeConfig(),
    qkv_bias=False,
    qk_norm=False,
    sliding_window=None,
    tie_word_embeddings=False,
    max_position_embeddings=128,
    bos_token_id=None,
    eos_token_ids=(0,),
)
RANKS: list[dict[tuple[int, str], int]] = [
    {(layer, module): 8 for layer in range(LAYERS) for module in MODULES},
    {(0, "q_proj"): 1, (0, "v_proj"): 2, (1, "v_proj"): 3},  # few modules, in layer 1 fewer
    {(1, "q_proj"): 33, (1, "o_proj"): 256, (1, "up_proj"): 129},  # one layer, the largest rank
    {(layer, module): 9 + 7 * layer + n for layer in range(LAYERS) for n, module in enumerate(MODULES)},
    {(1, "k_proj"): 1, (1, "o_proj"): 17, (0, "gate_proj"): 5, (1, "gate_proj"): 24},
]
POPULARITIES: dict[str, list[int | None]] = {
    "distinct": [0, 1, 2, 3, 4, None],
    "uniform": [4, 2, 4, None, 2, 4],
    "skewed": [3, 3, 2, 3, 3, 0, None],
    "identical": [3] * 9,  # more than share one read
}
SOME = POPULARITIES if HAS_GPU else ("distinct", "identical")  # the interpreter takes its time


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "CHUNK", 16)
    monkeypatch.setattr(lora, "COLUMNS", 32)
    monkeypatch.setattr(lora, "PART", 16)
    monkeypatch.setattr(lora, "THREADS", 32)
    monkeypatch.setattr(fused, "COLUMNS", 32)
    monkeypatch.setattr(fused, "MANY_PROGRAMS", 12)  # some of the cases have more


class World:
    """Adapters of all shapes in an arena of NaN, and one step's rows."""

    def __init__(
        self, dtype: torch.dtype, of_rows: Many[int | None], lengths: Many[int] | None = None
    ) -> None:
        self.dtype = dtype
        self.random = torch.Generator().manual_seed(5)
        slab_elems = min_slab_elems(CONFIG) + 24  # a multiple of 8, as a GPU needs it
        packed = [pack_adapter(self._weights(ranks), CONFIG, slab_elems, dtype) for ranks in RANKS]
        free = list(range(sum(p.layout.slabs_needed for p in packed) + 3))
        self.arena = torch.full((len(free), slab_elems), NAN, dtype=dtype)
        random.Random(1).shuffle(free)
        self.residents = []
        for number, adapter in enumerate(packed):
            slabs = tuple(free.pop() for _ in range(adapter.layout.slabs_needed))
            self.arena[list(slabs)] = adapter.image
            self.residents.append(ResidentAdapter(AdapterRef(f"a{number}", 1), adapter.layout, slabs))
        self.arena = self.arena.to(DEVICE)
        self.batch = self._batch(of_rows, lengths or [1] * len(of_rows))
        self.tokens = self.batch.num_tokens
        limits = Limits(tokens=self.tokens + 3, rows=self.tokens + 2, blocks=99, query_rows=16)
        self.inputs = StepInputs(limits, DEVICE, LAYERS)
        self.inputs.fill(self.batch, self.tokens, self.batch.num_single, 0)
        self.rows = self.inputs.lora
        self.rows.tables[int(self.rows.num_segments[0]) :] = 1  # of adapters that are no longer there
        items = self.rows.items[0].shape[0]
        self.places = ItemPlaces(
            torch.full((4, LAYERS, items, 2), 1 << 40, dtype=torch.int64, device=DEVICE),
            torch.full((4, LAYERS, items), NAN, device=DEVICE),
        )
        lora.resolve(self.rows, self.places, LAYERS)

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self.random).to(DEVICE, dtype or self.dtype)

    def shrink(self, group: str, layer: int, x: Tensor) -> Tensor:
        """v of the step's rows, NaN where nothing has been written."""
        modules, splits = GROUP_MODULES[group], lora.num_splits(x.shape[1])
        v = torch.full((splits, self.tokens + 2, len(modules) * 256), NAN, device=DEVICE)
        lora.shrink(x, v, self.arena.view(-1), self.rows, self.places, layer, GROUPS.index(group))
        return v

    def adapters(self, group: str, layer: int, x: Tensor) -> Adapters:
        """What LoRA adds to the step's rows, NaN where nothing has been written."""
        v, modules = self.shrink(group, layer, x), GROUP_MODULES[group]
        widths = tuple(module_shape(CONFIG, module)[0] for module in modules)
        delta = torch.full((self.tokens, sum(widths)), NAN, dtype=self.dtype, device=DEVICE)
        most = self.inputs.limits.segments(self.tokens)
        first = MODULES.index(modules[0])
        lora.expand(delta, v, self.arena.view(-1), self.rows, most, layer, first, widths, v.shape[0])
        return Adapters(delta, self.rows)

    def expected(self, group: str, layer: int, x: Tensor, y: Tensor) -> Tensor:
        """The reference, in float32."""
        x, y = x.float(), y.float().clone()
        first, modules = MODULES.index(GROUP_MODULES[group][0]), GROUP_MODULES[group]
        here = (layer, slice(first, first + len(modules)))
        widths = [module_shape(CONFIG, module)[0] for module in modules]
        start = self.batch.query_start
        for sequence, adapter in enumerate(self.batch.adapter_of_seq):
            if adapter < 0:
                continue
            table = self.batch.adapters[adapter].table(LAYERS)
            reference.lora_pages(
                x, y, self.arena.view(-1).float(), [(0, start[sequence], start[sequence + 1])],
                table.tiles_a[here][None], table.tiles_b[here][None], table.scales[here][None], widths,
            )  # fmt: skip
        return y

    def product(self, x: Tensor, weight: Tensor, processors: int) -> Product:
        """x W in slots that held NaN, of a plan for so many processors."""
        rows = x.shape[0]
        n, k = weight.shape
        plan = LinearPlan.make(rows, n, k, processors, block_n=16, block_k=16, per_processor=1)
        padded = torch.full((plan.rows, k), NAN, dtype=self.dtype, device=DEVICE)
        padded[:rows] = x
        out = torch.full((plan.slots, rows, n), NAN, device=DEVICE)
        linear.linear(padded, weight, out, plan, rows)
        return Product(out, plan)

    def _weights(self, ranks: dict[tuple[int, str], int]) -> LoraWeights:
        modules = []
        for number, ((layer, module), rank) in enumerate(sorted(ranks.items(), key=_in_order)):
            width, side = module_shape(CONFIG, module)
            a = torch.randn(rank, side, generator=self.random) * side**-0.5
            b = torch.randn(width, rank, generator=self.random) * rank**-0.5
            modules.append(LoraModule(layer, module, a, b, 0.5 + 0.1 * number))
        return LoraWeights(tuple(modules))

    def _batch(self, of_rows: Many[int | None], lengths: Many[int]) -> Batch:
        chunks = []
        for number, (adapter, length) in enumerate(zip(of_rows, lengths, strict=True)):
            request = Request(f"r{number}", tuple(range(length)), SamplingParams(temperature=0))
            sequence = Sequence(request)
            sequence.resident = None if adapter is None else self.residents[adapter]
            sequence.blocks = list(range(-(-length // BLOCK)))
            chunks.append(Chunk(sequence, 0, length, wants_token=False))
        return build_batch(chunks, BLOCK)


def _in_order(item: tuple[tuple[int, str], int]) -> tuple[int, int]:
    (layer, module), _ = item
    return layer, MODULES.index(module)


def assert_close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert torch.isfinite(got).all()
    error = (got.float() - expected).abs().max() / expected.abs().max()
    assert error.item() < (1e-5 if dtype == torch.float32 else 2e-2)


@BOTH
@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("popularity", POPULARITIES)
def test_the_first_half_is_the_product_with_each_rows_own_a(
    popularity: str, layer: int, dtype: torch.dtype
) -> None:
    world = World(dtype, POPULARITIES[popularity])
    x = world.randn(world.tokens, CONFIG.hidden_size)
    v = world.shrink("qkv", layer, x).sum(0)
    written = torch.zeros_like(v, dtype=torch.bool)
    for row, adapter in enumerate(world.batch.adapter_of_seq):
        modules = world.batch.adapters[adapter].layout.modules if adapter >= 0 else ()
        for tiles in modules:
            if tiles.layer != layer or tiles.module not in GROUP_MODULES["qkv"]:
                continue
            table = world.batch.adapters[adapter].table(LAYERS)
            offsets = table.tiles_a[layer, MODULES.index(tiles.module)][: len(tiles.a_offsets)].tolist()
            a = torch.cat([world.arena.view(-1)[o : o + 8 * 40].view(8, 40) for o in offsets]).float()
            begin = 256 * GROUP_MODULES["qkv"].index(tiles.module)
            got = v[row, begin : begin + len(a)]
            written[row, begin : begin + len(a)] = True
            assert_close(got, tiles.scale * (a @ x[row].float()), dtype)
    assert v[~written].isnan().all()


@BOTH
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 16, 16), (3, 40, 37), (5, 16, 200), (17, 72, 48)])
@pytest.mark.parametrize("processors", [1, 2, 5, 100])
def test_a_product_is_the_sum_of_its_slots(
    processors: int, rows: int, n: int, k: int, dtype: torch.dtype
) -> None:
    world = World(dtype, [None])
    x, weight = world.randn(rows, k), world.randn(n, k)
    product = world.product(x, weight, processors)
    plan = product.plan
    assert plan is not None
    got = torch.zeros(rows, n, device=DEVICE)
    for column in range(n):
        tile = column // plan.block_n
        first, last = tile * plan.blocks_k // plan.units, ((tile + 1) * plan.blocks_k - 1) // plan.units
        assert last - first < plan.slots
        got[:, column] = product.y[: last - first + 1, :, column].sum(0)
        assert product.y[last - first + 1 :, :, column].isnan().all()
    assert_close(got, x.float() @ weight.float().t(), dtype)


@BOTH
@pytest.mark.parametrize("popularity", POPULARITIES)
def test_the_residual_takes_product_and_lora(popularity: str, dtype: torch.dtype) -> None:
    world, layer = World(dtype, POPULARITIES[popularity]), 1
    rows, (hidden, side) = world.tokens, group_shape(CONFIG, "o")
    mixed, weight = world.randn(rows, side), world.randn(hidden, side)
    x, norm = world.randn(rows, hidden, dtype=torch.float32), world.randn(hidden)
    expected = x + world.expected("o", layer, mixed, mixed.float() @ weight.float().t())
    blocks = fused.num_blocks(hidden)
    assert blocks > 1
    product = world.product(
        mixed, weight, {"distinct": 2, "uniform": 5, "skewed": 9, "identical": 1}[popularity]
    )
    xw = torch.full((rows, hidden), NAN, dtype=dtype, device=DEVICE)
    ssq = torch.full((rows, blocks), NAN, device=DEVICE)
    adapters = world.adapters("o", layer, mixed)
    fused.residual(product, x, norm, xw, ssq, MODULES.index("o_proj"), rows, adapters)
    assert_close(x, expected, dtype)
    assert_close(xw, expected * norm.float(), dtype)
    assert_close(ssq.sum(1), expected.square().sum(1), dtype)


@BOTH
@pytest.mark.parametrize("popularity", SOME)
def test_the_gate_takes_products_and_lora_of_both_sides(popularity: str, dtype: torch.dtype) -> None:
    world, layer = World(dtype, POPULARITIES[popularity]), 1
    rows, (out, hidden) = world.tokens, group_shape(CONFIG, "gate_up")
    xw, weight = world.randn(rows, hidden), world.randn(out, hidden) * hidden**-0.5
    ssq, scale = _sums_of_squares(world, rows, hidden)
    normed = xw.float() * scale
    expected = reference.gated_activation(
        world.expected("gate_up", layer, normed, normed @ weight.float().t())
    )
    got = torch.full((rows, CONFIG.intermediate_size), NAN, dtype=dtype, device=DEVICE)
    product = world.product(
        xw, weight, {"distinct": 3, "uniform": 1, "skewed": 4, "identical": 8}[popularity]
    )
    fused.gate(product, ssq, hidden, EPS, got, rows, world.adapters("gate_up", layer, xw))
    assert_close(got, expected, dtype)


@BOTH
@pytest.mark.parametrize(
    ("extras", "popularity"),
    [
        (extras, popularity)
        for extras in ("plain", "bias", "norms")
        for popularity in (POPULARITIES if HAS_GPU else ["uniform" if extras == "plain" else "distinct"])
    ],
)
def test_rotary_takes_products_and_lora_and_writes_k_and_v(
    extras: str, popularity: str, dtype: torch.dtype
) -> None:
    world, layer = World(dtype, POPULARITIES[popularity]), 1
    rows, (out, hidden) = world.tokens, group_shape(CONFIG, "qkv")
    heads, dim = CONFIG.num_heads, CONFIG.head_dim
    xw, weight = world.randn(rows, hidden), world.randn(out, hidden) * hidden**-0.5
    ssq, scale = _sums_of_squares(world, rows, hidden)
    bias = world.randn(out) if extras == "bias" else None
    norms = [world.randn(dim) for _ in range(2)] if extras == "norms" else None
    angles = torch.rand(rows, dim // 2, generator=world.random).to(DEVICE) * 6
    slabs = torch.full((4, LAYERS, 2, BLOCK, 1, dim), NAN, dtype=dtype, device=DEVICE)
    slots = torch.randperm(4 * BLOCK, generator=world.random)[:rows].int()
    slots[-1] = -1
    q = torch.full((rows, heads, dim), NAN, dtype=dtype, device=DEVICE)
    fused.rotary_write(
        world.product(xw, weight, 3), ssq, hidden, EPS, angles.cos(), angles.sin(), q, slabs,
        slots.to(DEVICE), layer, rows, bias=bias, q_norm=norms and norms[0], k_norm=norms and norms[1],
        adapters=world.adapters("qkv", layer, xw),
    )  # fmt: skip

    normed = xw.float() * scale
    y = world.expected("qkv", layer, normed, normed @ weight.float().t())
    y = y if bias is None else y + bias.float()
    parts = y.view(rows, heads + 2, dim).split((heads, 1, 1), dim=1)
    cos, sin = torch.cat((angles, angles), 1).cos()[:, None], torch.cat((-angles, angles), 1).sin()[:, None]
    for index, got in enumerate((q, slabs[:, layer, 0].flatten(0, 1), slabs[:, layer, 1].flatten(0, 1))):
        part = parts[index]
        if norms is not None and index < 2:
            part = reference.rms_norm(part, norms[index].float(), EPS)
        expected = reference.rotary(part, cos, sin) if index < 2 else part
        if index == 0:
            assert_close(got, expected, dtype)
            continue
        assert_close(got[slots[:-1].long().to(DEVICE)], expected[:-1], dtype)
        assert (~got.isnan()).any(-1).sum() == rows - 1
    assert slabs[:, 0].isnan().all()


@BOTH
@pytest.mark.parametrize("group", ["qkv", "gate_up", "o"])
def test_every_row_gets_what_its_own_adapter_adds_and_no_other_row_anything(
    group: str, dtype: torch.dtype
) -> None:
    """Prompts beside decode rows, one of them with the adapter of the prompt behind it; a prompt of several
    segments; even and odd numbers of tiles."""
    world, layer = World(dtype, [1, 0, None, 3, 3, None, 2, 4], [1, 1, 1, 1, 67, 4, 3, 2]), 1
    out, side = group_shape(CONFIG, group)
    x = world.randn(world.tokens, side)
    expected = world.expected(group, layer, x, torch.zeros(world.tokens, out, device=DEVICE))
    delta = world.adapters(group, layer, x).delta
    written, tiles = torch.zeros_like(delta, dtype=torch.bool), world.rows.row_tiles
    modules = GROUP_MODULES[group]
    widths = [module_shape(CONFIG, module)[0] for module in modules]
    for module, columns in zip(modules, written.split(widths, dim=1), strict=True):
        columns[:] = (tiles[: world.tokens, MODULES.index(module)] != 0)[:, None]
    assert written.any()
    assert not written.all()
    assert_close(delta[written], expected[written], dtype)
    assert delta[~written].isnan().all()
    assert (expected[~written] == 0).all()


@BOTH
def test_rows_without_adapters_are_the_product_alone(dtype: torch.dtype) -> None:
    world, layer = World(dtype, [0, 3, None, 3], [1, 1, 3, 2]), 0
    rows, (hidden, side) = world.tokens, group_shape(CONFIG, "down")
    gated, y = world.randn(rows, side), world.randn(rows, hidden)
    x = torch.zeros(rows, hidden, device=DEVICE)
    xw, ssq = torch.empty_like(y), torch.full((rows, fused.num_blocks(hidden)), NAN, device=DEVICE)
    adapters, norm = world.adapters("down", layer, gated), world.randn(hidden)
    fused.residual(Product(y, None), x, norm, xw, ssq, MODULES.index("down_proj"), rows, adapters)
    assert_close(x, world.expected("down", layer, gated, y), dtype)
    assert torch.equal(x[2:5], y[2:5].float())


@BOTH
def test_a_token_comes_from_the_step_before_or_from_the_batch(dtype: torch.dtype) -> None:
    world, hidden, half = World(dtype, [None]), CONFIG.hidden_size, CONFIG.head_dim // 2
    table, weight = world.randn(CONFIG.vocab_size, hidden), world.randn(hidden)

    def column(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=DEVICE)

    positions, freq = column(0, 3, 700, 5), torch.rand(half, generator=world.random).to(DEVICE)
    x, xw = (torch.full((4, hidden), NAN, dtype=kind, device=DEVICE) for kind in (torch.float32, dtype))
    ssq = torch.full((4, fused.num_blocks(hidden)), NAN, device=DEVICE)
    cos, sin = (torch.full((4, half), NAN, device=DEVICE) for _ in range(2))
    fused.embed(
        column(7, 0, 30, -1), column(-1, 2, -1, 0), column(11, -1, 23), table, weight, positions, freq,
        x, xw, ssq, cos, sin, 4,
    )  # fmt: skip
    expected = table[[7, 23, 30, 11]].float()
    assert torch.equal(x, expected)
    assert_close(xw, expected * weight.float(), dtype)
    assert_close(ssq.sum(1), expected.square().sum(1), torch.float32)
    angles = positions[:, None].float() * freq
    assert (cos - angles.cos()).abs().max() < 1e-4
    assert (sin - angles.sin()).abs().max() < 1e-4


@BOTH
def test_the_last_norm_is_of_the_rows_asked_for(dtype: torch.dtype) -> None:
    world, hidden = World(dtype, [None]), CONFIG.hidden_size
    xw = world.randn(5, hidden)
    ssq, scale = _sums_of_squares(world, 5, hidden)
    rows = torch.tensor([4, 0, 4], dtype=torch.int32, device=DEVICE)
    out = torch.full((3, hidden), NAN, dtype=dtype, device=DEVICE)
    fused.gather_normed(xw, ssq, rows, out, EPS, 3)
    assert_close(out, (xw.float() * scale)[[4, 0, 4]], dtype)


def _sums_of_squares(world: World, rows: int, hidden: int) -> tuple[Tensor, Tensor]:
    """Sums of squares by block as an earlier kernel leaves them, and 1 / rms of each row [rows, 1]."""
    ssq = torch.rand(rows, fused.num_blocks(hidden), generator=world.random).to(DEVICE) * hidden
    return ssq, (ssq.sum(1, keepdim=True) / hidden + EPS).rsqrt()
