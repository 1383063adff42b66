"""The decoder of model.py for serving on a GPU: the same layers as kernels over buffers that never move.

A decode step runs few rows through all weights, so it costs what reading them costs, plus whatever lies
between the kernels. Hence few kernels: every sum, norm, rotation and write to the pages rides on the kernel
behind a product. LoRA runs beside the product, on a stream of its own: both only read x. There, too, prompts
attend while decode rows do. Nothing here depends on values on the host but the padded sizes of the step
(`StepShape`), so the launches of one shape can be recorded as a CUDA graph.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from engine.model import (
    GROUP_MODULES,
    GROUPS,
    MODULES,
    Decoder,
    Layer,
    group_shape,
    module_shape,
)
from engine.step_inputs import StepInputs
from kernels import attention, fused, linear, lora, sampling
from kernels.attention import DecodePlan
from kernels.fused import Adapters, Product
from kernels.lora import ItemPlaces

SKINNY_ROWS = 32  # up to so many rows our product beats the library's
_MOST_RANK: int = lora.MAX_RANK.value
_TIMED_LAYERS = 4  # the first only loads the library's kernels


@dataclass(frozen=True, slots=True)
class StepShape:
    """What is fixed of a step: padded rows of tokens, padded decode rows among them, and what the step
    needs."""

    tokens: int
    singles: int
    has_prompts: bool
    lora_groups: tuple[str, ...]  # of modules that some adapter of the step changes
    attention: DecodePlan  # of decode rows
    sampled: int  # padded rows to draw a token for


class GpuDecoder:
    """Weights, buffers and launches for one model and one arena on one device.

    `layers` computes hidden states for the rows that `inputs` describes; `draw` takes logits and tokens from
    them.
    """

    def __init__(self, decoder: Decoder, arena: Tensor, slabs: Tensor, inputs: StepInputs) -> None:
        config = decoder.config
        self.config = config
        self._decoder = decoder
        self._arena = arena.view(-1)
        self._slabs = slabs
        self._inputs = inputs
        device, dtype = arena.device, arena.dtype
        limits = inputs.limits
        tokens = max(limits.tokens, SKINNY_ROWS)
        self._freq = decoder.inverse_frequencies.to(device)
        widths = {group: group_shape(config, group) for group in GROUPS}  # (out, in)
        self._shapes = widths
        blocks = fused.num_blocks(config.hidden_size)

        def buffer(*shape: int, kind: torch.dtype = dtype) -> Tensor:
            return torch.zeros(shape, dtype=kind, device=device)

        self._x = buffer(tokens, config.hidden_size, kind=torch.float32)
        self._xw = buffer(tokens, config.hidden_size)
        self._ssq = buffer(tokens, blocks, kind=torch.float32)
        self._cos = buffer(tokens, config.head_dim // 2, kind=torch.float32)
        self._sin = buffer(tokens, config.head_dim // 2, kind=torch.float32)
        self._q = buffer(tokens, config.num_heads, config.head_dim)
        self._mixed = buffer(tokens, config.num_heads, config.head_dim)
        self._gated = buffer(tokens, config.intermediate_size)
        self._whole = buffer(tokens * max(out for out, _ in widths.values()))
        self._plans = {
            (rows, group): linear.default_plan(rows, *widths[group], dtype, device)
            for rows in _skinny_buckets()
            for group in GROUPS
        }
        slots = max(plan.slots * rows * widths[group][0] for (rows, group), plan in self._plans.items())
        self._slots = buffer(slots, kind=torch.float32)
        v = max(
            lora.num_splits(side) * tokens * len(GROUP_MODULES[group]) * _MOST_RANK
            for group, (_, side) in widths.items()
        )
        self._v = buffer(v, kind=torch.float32)
        self._delta = buffer(tokens * max(out for out, _ in widths.values()))
        # Before the programs of the main stream, which leave room for few others.
        self._beside = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self._normed = buffer(limits.rows, config.hidden_size)
        self._logits = buffer(limits.rows, config.vocab_size)
        items = max(column.shape[0] for column in inputs.lora.items)
        self._places = ItemPlaces(
            buffer(4, config.num_layers, items, 2, kind=torch.int64),
            buffer(4, config.num_layers, items, kind=torch.float32),
        )
        self._attention_space = attention.workspace(limits.rows, config.num_heads, config.head_dim, device)
        self.tokens = torch.full((limits.rows,), -1, dtype=torch.int32, device=device)  # of the last draw

    def step(self, shape: StepShape) -> None:
        """All of a step: hidden states, K/V, and one token for each row of `logits_rows` into `tokens`."""
        self.layers(shape)
        if shape.sampled:
            self.draw(shape.sampled)

    def layers(self, shape: StepShape) -> None:
        """Hidden states of all rows of the step, and their K/V in the pages."""
        column, decoder = self._inputs.column, self._decoder
        first = decoder.layers[0]
        assert isinstance(first, Layer)
        if shape.lora_groups:  # LoRA's first half looks there before it waits: a plain kernel lies between
            lora.resolve(self._inputs.lora, self._places, self.config.num_layers)
        fused.embed(
            column["token_ids"], column["token_source"], self.tokens, decoder.embed, first.input_norm.weight,
            column["positions"], self._freq, self._x, self._xw, self._ssq, self._cos, self._sin, shape.tokens,
        )  # fmt: skip
        layers = [layer for layer in decoder.layers if isinstance(layer, Layer)]
        norms = [*(layer.input_norm for layer in layers[1:]), decoder.norm]  # each behind its layer
        for layer, norm in zip(layers, norms, strict=True):
            self._layer(shape, layer, norm.weight)

    def _layer(self, shape: StepShape, layer: Layer, following: Tensor) -> None:
        index, rows = layer.index, shape.tokens
        hidden, eps = self.config.hidden_size, self.config.rms_norm_eps
        product, adapters = self._product(shape, index, "qkv", self._xw, layer.qkv.weight)
        fused.rotary_write(
            product, self._ssq, hidden, eps, self._cos, self._sin, self._q, self._slabs,
            self._inputs.column["slots"], index, rows, bias=layer.qkv.bias,
            q_norm=None if layer.q_norm is None else layer.q_norm.weight,
            k_norm=None if layer.k_norm is None else layer.k_norm.weight, adapters=adapters,
        )  # fmt: skip
        self._attend(shape, index)
        mixed = self._mixed.view(self._mixed.shape[0], -1)
        product, adapters = self._product(shape, index, "o", mixed, layer.o.weight)
        module = MODULES.index("o_proj")
        fused.residual(product, self._x, layer.post_norm.weight, self._xw, self._ssq, module, rows, adapters)
        product, adapters = self._product(shape, index, "gate_up", self._xw, layer.gate_up.weight)
        fused.gate(product, self._ssq, hidden, eps, self._gated, rows, adapters)
        product, adapters = self._product(shape, index, "down", self._gated, layer.down.weight)
        module = MODULES.index("down_proj")
        fused.residual(product, self._x, following, self._xw, self._ssq, module, rows, adapters)

    def _product(
        self, shape: StepShape, layer: int, group: str, x: Tensor, weight: Tensor
    ) -> tuple[Product, Adapters | None]:
        """x @ W.T, and beside it what LoRA adds to it."""
        out, _ = self._shapes[group]
        adapters = None
        if group in shape.lora_groups:
            adapters = Adapters(self._delta[: shape.tokens * out].view(shape.tokens, out), self._inputs.lora)
            with self._aside():
                self._lora(shape, layer, group, x, adapters.delta)
        product = self._base(shape, group, x, weight)
        if adapters is not None:
            self._await_aside()
        return product, adapters

    def _base(self, shape: StepShape, group: str, x: Tensor, weight: Tensor) -> Product:
        out, _ = self._shapes[group]
        if not shape.has_prompts and shape.tokens <= SKINNY_ROWS:
            plan = self._plans[shape.tokens, group]
            slots = self._slots[: plan.slots * shape.tokens * out].view(plan.slots, shape.tokens, out)
            linear.linear(x, weight, slots, plan, shape.tokens)
            return Product(slots, plan)
        y = self._whole[: shape.tokens * out].view(shape.tokens, out)
        torch.mm(x[: shape.tokens], weight.t(), out=y)
        return Product(y, None)

    def _lora(self, shape: StepShape, layer: int, group: str, x: Tensor, delta: Tensor) -> None:
        """delta = x @ A.T @ B.T of every row whose adapter changes a module of the group."""
        rows, limits = self._inputs.lora, self._inputs.limits
        modules, splits = GROUP_MODULES[group], lora.num_splits(self._shapes[group][1])
        first = MODULES.index(modules[0])
        widths = tuple(module_shape(self.config, module)[0] for module in modules)
        tokens = self._x.shape[0]
        v = self._v[: splits * tokens * len(modules) * _MOST_RANK].view(splits, tokens, -1)
        lora.shrink(x, v, self._arena, rows, self._places, layer, GROUPS.index(group))
        most = limits.segments(shape.tokens)
        lora.expand(delta, v, self._arena, rows, most, layer, first, widths, splits)

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """What is launched inside runs behind what was launched before, and beside what is launched next, up
        to `_await_aside`."""
        if self._beside is None:
            yield
            return
        self._beside.wait_stream(torch.cuda.current_stream(self._beside.device))
        with torch.cuda.stream(self._beside):
            yield

    def _await_aside(self) -> None:
        if self._beside is not None:
            torch.cuda.current_stream(self._beside.device).wait_stream(self._beside)

    def _attend(self, shape: StepShape, layer: int) -> None:
        """Prompts aside: they are few programs that take long, decode rows many that take all bandwidth."""
        column = self._inputs.column
        scale, window = self.config.head_dim**-0.5, self.config.window(layer)
        if shape.has_prompts:
            tiles = self._inputs.limits.query_tiles(shape.tokens)
            with self._aside():
                attention.prefill_attention(
                    self._q[: shape.tokens], self._slabs, layer, column["block_list"], column["block_start"],
                    column["context_lens"], column["query_start"], column["tile_sequence"][:tiles],
                    column["tile_first"][:tiles], scale, window, out=self._mixed[: shape.tokens],
                )  # fmt: skip
        if shape.singles:
            attention.decode_attention(
                self._q[: shape.singles], self._slabs, layer, column["block_list"], column["block_start"],
                column["single_lens"], scale, window,
                splits=shape.attention.splits, config=shape.attention.config,
                workspace=self._attention_space, out=self._mixed[: shape.singles],
            )  # fmt: skip
        if shape.has_prompts:
            self._await_aside()

    def products_s(self, rows: int) -> float:
        """Seconds of the library's products of a layer over so many rows: the least of a few layers."""
        mixed = self._mixed.view(self._mixed.shape[0], -1)
        inputs = dict(zip(GROUPS, (self._xw, mixed, self._xw, self._gated), strict=True))
        least = math.inf
        for layer in self._decoder.layers[:_TIMED_LAYERS]:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for group, x in inputs.items():
                out, _ = self._shapes[group]
                y = self._whole[: rows * out].view(rows, out)
                torch.mm(x[:rows], getattr(layer, group).weight.t(), out=y)
            end.record()
            end.synchronize()
            least = min(least, begin.elapsed_time(end) / 1e3)
        return least

    def logits(self, count: int) -> Tensor:
        """[count, vocab], of the rows that `logits_rows` names."""
        column, config = self._inputs.column, self.config
        fused.gather_normed(
            self._xw, self._ssq, column["logits_rows"], self._normed, config.rms_norm_eps, count
        )
        logits = self._logits[:count]
        torch.mm(self._normed[:count], self._decoder.head.weight.t(), out=logits)
        return logits

    def draw(self, count: int) -> None:
        """One token for each of the first `count` rows of `logits_rows`, into `tokens`; -1 where it cannot
        be.
        """
        column = self._inputs.column
        sampling.sample_rows(
            self.logits(count), column["temperature"], column["top_p"], column["top_k"], column["min_p"],
            column["seed"], column["index"], self.tokens,
        )  # fmt: skip


def _skinny_buckets() -> list[int]:
    return [rows for rows in row_buckets(SKINNY_ROWS) if rows <= SKINNY_ROWS]


def row_buckets(most: int) -> list[int]:
    """Padded numbers of decode rows: close together where a step is cheap, and up to the first that holds
    `most`.
    """
    buckets = [1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 224, 256]
    while buckets[-1] < most:
        buckets.append(buckets[-1] + 128)
    return [rows for rows, before in zip(buckets, [0, *buckets], strict=False) if before < most]


def token_buckets(most: int) -> list[int]:
    """Padded numbers of tokens of steps with prompts: in steps of 64 while padding is a part worth saving."""
    buckets = [16, 32, *range(64, 1024, 64)]
    while buckets[-1] < most:
        buckets.append(buckets[-1] + (64 if buckets[-1] < 1024 else 128))
    return [tokens for tokens, before in zip(buckets, [0, *buckets], strict=False) if before < most]


def worth_keeping(buckets: list[int], seconds: Callable[[int], float]) -> list[int]:
    """The buckets without those that the next one beats by a sixth or more: there are numbers of rows that a
    library of products is slow with, others on every device. Neighbours only, as a small model's products
    all take about as long, which is chance.
    """
    took = [seconds(bucket) for bucket in buckets]
    beaten = [after < 5 / 6 * before for before, after in pairwise(took)]
    return [bucket for bucket, is_beaten in zip(buckets, [*beaten, False], strict=True) if not is_beaten]
