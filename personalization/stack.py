"""The adapters of U people as stacked tensors, and what one optimizer step does with them.

    y[u] += scale * (x[u] @ A[u].T) @ B[u]        x [U, S, in], A [U, kr, in], B [U, kr, out]

One group of fused projections (k modules, rank r) costs two batched products forward and four backward.
B of a group with several modules is block diagonal: module m reads rows m*r .. (m+1)*r only. The weights that
are learned hold nothing but the blocks; the product uses a dense copy, whose zeros are never learned.

Person u's rows meet no other person's in any product, so every gradient is exactly that person's own.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.adapter_files import LoraModule, LoraWeights
from engine.model import GROUP_MODULES, GROUPS, ModelConfig, module_shape

_EPS = 1e-8
_QUERY_BLOCK = 256  # rows of scores that are computed together

Context = Any  # torch's own type of a Function's context lacks what a Function may do with it


@dataclass(frozen=True, slots=True)
class _Block:
    """Where one module's A [r, in] and B [r, out] lie in a person's row, and B's place in its group."""

    module: str
    a_start: int
    b_start: int
    in_features: int
    out_features: int
    first_rank_row: int
    first_column: int


@dataclass(frozen=True, slots=True)
class _Slot:
    """One group of one layer. `whole`: it has a single module that fills it, so B needs no dense copy."""

    layer: int
    group: str
    blocks: tuple[_Block, ...]
    rank_rows: int
    in_features: int
    out_features: int

    @property
    def whole(self) -> bool:
        return len(self.blocks) == 1 and self.blocks[0].out_features == self.out_features


class AdapterShape:
    """How one adapter of rank r on `modules` lies in a flat row of `size` numbers."""

    def __init__(self, config: ModelConfig, modules: Sequence[str], rank: int, alpha: float) -> None:
        self.config = config
        self.rank = rank
        self.scale = alpha / rank
        self.size = 0
        self.slots: list[_Slot] = []
        for layer in range(config.num_layers):
            for group in GROUPS:
                slot = self._slot(layer, group, modules)
                if slot is not None:
                    self.slots.append(slot)

    def _slot(self, layer: int, group: str, modules: Sequence[str]) -> _Slot | None:
        chosen = [module for module in GROUP_MODULES[group] if module in modules]
        if not chosen:
            return None
        in_features = module_shape(self.config, chosen[0])[1]
        b_start = self.size + len(chosen) * self.rank * in_features
        blocks: list[_Block] = []
        column = 0
        for module in GROUP_MODULES[group]:
            out_features = module_shape(self.config, module)[0]
            if module in chosen:
                place = len(blocks) * self.rank
                a_start = self.size + place * in_features
                blocks.append(_Block(module, a_start, b_start, in_features, out_features, place, column))
                b_start += self.rank * out_features
            column += out_features
        self.size = b_start
        return _Slot(layer, group, tuple(blocks), len(chosen) * self.rank, in_features, column)

    def rows(
        self, starts: Sequence[LoraWeights | None], seeds: Sequence[int], device: torch.device
    ) -> Tensor:
        """Everyone's starting rows [U, size]: A uniform within 1/sqrt(in), by each one's own seed, B zero;
        or what `starts` has of both. A seed's numbers differ from one kind of device to another."""
        rows = torch.empty(len(starts), self.size, device=device)
        bounds = torch.zeros(self.size, device=device)
        for slot in self.slots:
            first = slot.blocks[0].a_start
            bounds[first : first + slot.rank_rows * slot.in_features] = slot.in_features**-0.5
        for row, seed in zip(rows, seeds, strict=True):
            row.uniform_(-1, 1, generator=torch.Generator(device).manual_seed(seed))
        rows.mul_(bounds)
        for row, start in zip(rows, starts, strict=True):
            if start is not None:
                given, known = torch.zeros(self.size), torch.zeros(self.size, dtype=torch.bool)
                self._fill(given, start, known)
                torch.where(known.to(device), given.to(device), row, out=row)
        return rows

    def row(self, start: LoraWeights | None) -> Tensor:
        """A row [size] to predict with: what `start` has, the rest zero."""
        row = torch.zeros(self.size)
        if start is not None:
            self._fill(row, start)
        return row

    def _fill(self, row: Tensor, start: LoraWeights, known: Tensor | None = None) -> None:
        """Put what `start` has into a row, and mark where. A module of another rank is cut to its closest
        adapter of this rank, or takes a part of the room."""
        given = {(m.layer, m.module): m for m in start.modules}
        for slot in self.slots:
            for block in slot.blocks:
                module = given.get((slot.layer, block.module))
                if module is not None:
                    for whole, part in zip(
                        self._views(row, block), _fitted(module, self.rank, self.scale), strict=True
                    ):
                        whole[: len(part)] = part
                    if known is not None:
                        for whole in self._views(known, block):
                            whole[: module.rank] = True

    def weights(self, rows: Tensor) -> list[LoraWeights]:
        """The adapters that lie in `rows` [U, size], as their own copies in host memory."""
        turned = torch.empty_like(rows)  # as `rows`, but each B as [out, r]: all of it in one piece, and once
        for slot in self.slots:
            first = slot.blocks[0]
            flat = slice(first.a_start, first.b_start)
            turned[:, flat] = rows[:, flat]
            for block in slot.blocks:
                size = self.rank * block.out_features
                place = turned[:, block.b_start : block.b_start + size]
                place.view(len(rows), block.out_features, self.rank).copy_(self._views(rows, block)[1].mT)
        if not rows.is_cuda:
            return [self._unpacked(row.clone()) for row in turned]
        passed = torch.empty(self.size, pin_memory=True)  # through one row, as pinning memory takes long
        return [self._unpacked(passed.copy_(row).clone()) for row in turned]

    def _unpacked(self, row: Tensor) -> LoraWeights:
        """The adapter whose modules are views of `row`, each B in it as [out, r]."""
        rank, modules = self.rank, []
        for slot in self.slots:
            for block in slot.blocks:
                sides = block.in_features, block.out_features
                a = row.as_strided((rank, sides[0]), (sides[0], 1), block.a_start)
                b = row.as_strided((sides[1], rank), (rank, 1), block.b_start)
                modules.append(LoraModule(slot.layer, block.module, a, b, self.scale))
        return LoraWeights(tuple(modules))

    def _views(self, row: Tensor, block: _Block) -> tuple[Tensor, Tensor]:
        """A [.., r, in] and B transposed [.., r, out] inside a row or a stack of rows."""
        a = row[..., block.a_start : block.a_start + self.rank * block.in_features]
        b = row[..., block.b_start : block.b_start + self.rank * block.out_features]
        return _split_last(a, self.rank), _split_last(b, self.rank)


def _split_last(x: Tensor, first: int) -> Tensor:
    """[.., first * n] -> [.., first, n], without a copy."""
    return x.view(*x.shape[:-1], first, -1)


def _fitted(module: LoraModule, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A [<=rank, in] and B transposed [<=rank, out]; scale * B A is as near to the module's as it can be."""
    a, b = module.a.float(), module.b.float() * (module.scale / scale)
    if module.rank > rank:
        # The nearest of a lower rank is the truncated SVD of B A; with QR first, no [out, in] matrix is made.
        q_b, r_b = torch.linalg.qr(b)
        q_a, r_a = torch.linalg.qr(a.t())
        left, values, right = torch.linalg.svd(r_b @ r_a.t())
        root = values[:rank].sqrt()
        b = q_b @ (left[:, :rank] * root)
        a = (q_a @ (right[:rank].t() * root)).t()
    return a, b.t()


class FixedStack:
    """U adapters that do not change; a `Lora` that predicts. rows [U, P], in the type of the products."""

    def __init__(self, shape: AdapterShape, rows: Tensor) -> None:
        self._scale = shape.scale
        self._views = {}
        for slot in shape.slots:
            first = slot.blocks[0]
            flat = rows[:, first.a_start : first.a_start + slot.rank_rows * slot.in_features]
            b = shape._views(rows, first)[1]
            if not slot.whole:
                b = rows.new_zeros(len(rows), slot.rank_rows, slot.out_features)
                for block in slot.blocks:
                    place = slice(block.first_rank_row, block.first_rank_row + shape.rank)
                    columns = slice(block.first_column, block.first_column + block.out_features)
                    b[:, place, columns] = shape._views(rows, block)[1]
            self._views[slot.layer, slot.group] = _split_last(flat, slot.rank_rows), b

    def __call__(self, layer: int, group: str, x: Tensor, y: Tensor) -> Tensor:
        """x [U*S, in], y [U*S, out], both grouped by person -> y + delta, in place."""
        if (layer, group) not in self._views:
            return y
        return _add_delta(x, y, *self._views[layer, group], self._scale)[0]


class AdapterStack:
    """U rows of weights, their gradients and their Adam moments; the `Lora` that training gives the model.

    Weights and moments are float32. The products run in `dtype`: where it is another, from copies that each
    update renews. `use(n)` narrows the stack to its first n people, so that those who are done cost nothing.
    """

    def __init__(
        self,
        shape: AdapterShape,
        rows: Tensor,
        dtype: torch.dtype,
        *,
        pulled: bool = False,
    ) -> None:
        device = rows.device
        self.shape = shape
        self.rows = rows  # [U, P], changed from now on
        self._starts = self.rows.clone() if pulled else None
        self._first_moment = torch.zeros_like(self.rows)
        self._second_moment = torch.zeros_like(self.rows)
        self._steps = 0
        self._working = self.rows.to(dtype)  # the rows themselves, if they are of that type
        self._working_gradient = torch.zeros_like(self.rows, dtype=dtype)
        # What reads it in a processor's update takes float32 only.
        same = dtype == self.rows.dtype or device.type == "cuda"
        self._gradient = self._working_gradient if same else torch.zeros_like(self.rows)
        self._dense = {
            (slot.layer, slot.group): torch.zeros(
                len(rows), slot.rank_rows, slot.out_features, dtype=dtype, device=device
            )
            for slot in shape.slots
            if not slot.whole
        }
        # The base is frozen and the weights are no autograd leaves (their gradients are written in place), so
        # one leaf has to stand for them: without it nothing would require a gradient.
        self._anchor = torch.zeros((), device=device, requires_grad=True)
        self.use(len(rows))

    def use(self, people: int) -> None:
        """Work on the first `people` of the stack from now on."""
        self.people = people
        self._views: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
        self._gradients: dict[tuple[int, str], tuple[Tensor, list[tuple[slice, slice, Tensor]]]] = {}
        for slot in self.shape.slots:
            key = (slot.layer, slot.group)
            dense = self._dense.get(key)
            a = self._group_a(self._working, slot)
            b = dense[:people] if dense is not None else self._parts(self._working, slot)[0][2]
            self._views[key] = (a, b)
            self._gradients[key] = (
                self._group_a(self._working_gradient, slot),
                self._parts(self._working_gradient, slot),
            )
        self._fill_dense()

    def _group_a(self, stack: Tensor, slot: _Slot) -> Tensor:
        """[U, kr, in]: the A of a group's modules lie one after another."""
        start = slot.blocks[0].a_start
        flat = stack[: self.people, start : start + slot.rank_rows * slot.in_features]
        return _split_last(flat, slot.rank_rows)

    def _parts(self, stack: Tensor, slot: _Slot) -> list[tuple[slice, slice, Tensor]]:
        """For each module: its rank rows and columns in the group's dense B, and its own B [U, r, out]."""
        return [
            (
                slice(block.first_rank_row, block.first_rank_row + self.shape.rank),
                slice(block.first_column, block.first_column + block.out_features),
                self.shape._views(stack[: self.people], block)[1],
            )
            for block in slot.blocks
        ]

    def _fill_dense(self) -> None:
        for slot in self.shape.slots:
            dense = self._dense.get((slot.layer, slot.group))
            if dense is not None:
                for rank_rows, columns, b in self._parts(self._working, slot):
                    dense[: self.people, rank_rows, columns] = b

    def __call__(self, layer: int, group: str, x: Tensor, y: Tensor) -> Tensor:
        """x [U*S, in], y [U*S, out], both grouped by person -> y + delta."""
        key = (layer, group)
        if key not in self._views:
            return y
        a, b = self._views[key]
        if not torch.is_grad_enabled():
            return _add_delta(x, y, a, b, self.shape.scale)[0]
        grad_a, grad_b = self._gradients[key]
        out: Tensor = _Delta.apply(x, y, self._anchor, a, b, grad_a, grad_b, self.shape.scale)  # type: ignore[no-untyped-call]
        return out

    def gradient_norms(self) -> Tensor:
        """[U]: each person's gradient norm. Call once after backward, before `update`."""
        if self._working_gradient is not self._gradient:
            self._gradient[: self.people].copy_(self._working_gradient[: self.people])
        norms: Tensor = torch.linalg.vector_norm(self._gradient[: self.people], dim=1, dtype=torch.float32)
        return norms

    def update(
        self,
        rates: Sequence[float],
        divide_by: Tensor,
        sound: Tensor,
        betas: tuple[float, float],
        pulls: Sequence[float] | None = None,
    ) -> None:
        """One AdamW step for each person u with rates[u] > 0 and sound[u], on gradient[u] / divide_by[u].

        With g the gradient so divided and t the number of this step, elementwise:
        m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g², w -= rate (pull (w - start) + (m / (1 - b1^t)) /
        (sqrt(v / (1 - b2^t)) + 1e-8)) (Loshchilov and Hutter, 2019, with `start` in the place of zero).
        divide_by [U] float32, sound [U] bool, both on the stack's device. Whoever takes no step here may not
        take one later: the count of steps is the stack's.
        """
        self._steps += 1
        if self.rows.is_cuda:
            self._update_all(rates, divide_by, sound, betas, pulls or [0.0] * self.people)
        else:
            if self._starts is not None and pulls is not None:
                drawn = torch.tensor([rate * pull for rate, pull in zip(rates, pulls, strict=True)]) * sound
                self.rows[: self.people].lerp_(self._starts[: self.people], drawn[:, None])
            self._update_each(rates, divide_by, sound, betas)
            if self._working is not self.rows:
                self._working[: self.people].copy_(self.rows[: self.people])
        self._fill_dense()

    def _update_each(
        self, rates: Sequence[float], divide_by: Tensor, sound: Tensor, betas: tuple[float, float]
    ) -> None:
        """No fused kernel takes a column of rates; one call per person works on a piece of memory that fits
        the cache, and is as fast."""
        for person, (rate, fit) in enumerate(zip(rates, sound.tolist(), strict=True)):
            if rate <= 0 or not fit:
                continue
            torch._fused_adamw_(
                [self.rows[person]],
                [self._gradient[person]],
                [self._first_moment[person]],
                [self._second_moment[person]],
                [],
                [torch.tensor(float(self._steps))],
                lr=rate,
                beta1=betas[0],
                beta2=betas[1],
                weight_decay=0.0,
                eps=_EPS,
                amsgrad=False,
                maximize=False,
                grad_scale=divide_by[person],
            )

    def _update_all(
        self,
        rates: Sequence[float],
        divide_by: Tensor,
        sound: Tensor,
        betas: tuple[float, float],
        pulls: Sequence[float],
    ) -> None:
        """Everyone in one pass over memory. Nothing is read back from the device."""
        from kernels import training

        everything = (self.rows, self._gradient, self._first_moment, self._second_moment, self._working)
        rows, gradient, first, second, working = (stack[: self.people] for stack in everything)
        starts = None if self._starts is None else self._starts[: self.people]
        given = torch.tensor([rates, pulls]).pin_memory().to(rows.device, non_blocking=True)
        training.adam(
            rows, gradient, first, second, working, starts, given[0], given[1], divide_by, sound,
            self._steps, betas, _EPS,
        )  # fmt: skip


def _add_delta(x: Tensor, y: Tensor, a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """y += scale * (x A^T) B, in place. -> y, x by person, scale * x A^T."""
    by_person = x.view(a.shape[0], -1, x.shape[-1])
    shrunk = torch.bmm(by_person, a.mT).mul_(scale)
    y.view(b.shape[0], -1, y.shape[-1]).baddbmm_(shrunk, b)
    return y, by_person, shrunk


class _Delta(torch.autograd.Function):
    """`_add_delta` with the gradients of A and B written where the optimizer reads them."""

    @staticmethod
    def forward(
        ctx: Context,
        x: Tensor,
        y: Tensor,
        anchor: Tensor,
        a: Tensor,
        b: Tensor,
        grad_a: Tensor,
        grad_b: list[tuple[slice, slice, Tensor]],
        scale: float,
    ) -> Tensor:
        y, by_person, shrunk = _add_delta(x, y, a, b, scale)
        ctx.mark_dirty(y)
        ctx.save_for_backward(by_person, shrunk, a, b)
        ctx.grads = (grad_a, grad_b)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        by_person, shrunk, a, b = ctx.saved_tensors
        grad_a, grad_b = ctx.grads
        (grad_y,) = grads
        grad_out = grad_y.view(b.shape[0], -1, b.shape[2])
        if len(grad_b) == 1 and grad_b[0][2].shape == b.shape:
            torch.bmm(shrunk.mT, grad_out, out=grad_b[0][2])
        else:
            dense = torch.bmm(shrunk.mT, grad_out)
            for rank_rows, columns, grad in grad_b:
                grad.copy_(dense[:, rank_rows, columns])
        grad_shrunk = torch.bmm(grad_out, b.mT).mul_(ctx.scale)
        torch.bmm(grad_shrunk.mT, by_person, out=grad_a)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.bmm(grad_shrunk, a).view(-1, a.shape[2])
        return grad_x, grad_y, None, None, None, None, None, None


class RowAttention:
    """Causal attention inside the examples of each row; the `Attend` that training gives the model.

    segments [U, S]: the number of the example a token belongs to, -1 for padding. bounds [B + 1] int32: where
    each example, and the padding of each row, begins among the flat tokens; the longest has `longest`. On a
    processor the plain products over a whole row beat the tiled attention kernels by far.
    """

    def __init__(
        self,
        segments: Tensor,
        positions: Tensor,
        bounds: Tensor,
        longest: int,
        config: ModelConfig,
        dtype: torch.dtype,
    ) -> None:
        self._segments, self._positions, self._config = segments, positions, config
        self._bounds, self._longest = bounds, longest
        self._dtype = dtype
        self._masks: dict[int | None, Tensor] = {}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        window = self._config.window(layer)
        if window is not None and window >= self._segments.shape[1]:
            window = None
        if q.is_cuda and self._dtype != torch.float32:
            behind = -1 if window is None else window - 1
            mixed: Tensor = _AttendExamples.apply(q, k, v, self._bounds, self._longest, behind)  # type: ignore[no-untyped-call]
            return mixed
        if window not in self._masks:
            self._masks[window] = self._mask(window)
        mask = self._masks[window]
        if q.is_cuda:
            return _attend_tiles(q, k, v, mask)
        if not torch.is_grad_enabled():
            return _attend_rows(q, k, v, mask)[0]
        out: Tensor = _Attend.apply(q, k, v, mask)  # type: ignore[no-untyped-call]
        return out

    def _mask(self, window: int | None) -> Tensor:
        """[U, 1, 1, S, S]: 0 where a token sees another, -inf elsewhere; every token sees itself."""
        length = self._segments.shape[1]
        at = torch.arange(length, device=self._segments.device)
        seen = (self._segments[:, :, None] == self._segments[:, None, :]) & (at[:, None] >= at)
        if window is not None:
            seen &= self._positions[:, :, None] - self._positions[:, None, :] < window
        seen |= at[:, None] == at
        mask = torch.zeros(seen.shape, dtype=self._dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
        return mask[:, None, None]


class _AttendExamples(torch.autograd.Function):
    """What `_attend_rows` gives, by torch's flash kernels for examples of any length side by side
    (FlashAttention-2, Dao, 2023): no score that the mask would hide is computed, none is written to memory.
    bounds [B + 1] int32: where each begins; a token sees `behind` tokens before it, -1: all of its example.
    """

    @staticmethod
    def forward(
        ctx: Context, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, behind: int
    ) -> Tensor:
        out, total, state, unused, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, bounds, bounds, longest, longest, 0.0, False, False,
            window_size_left=behind, window_size_right=0,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, total, bounds, state, unused)
        ctx.sizes = longest, behind
        kept: Tensor = out
        return kept

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, total, bounds, state, unused = ctx.saved_tensors
        longest, behind = ctx.sizes
        with _deterministic():  # the same bytes from the same seed
            grad_q, grad_k, grad_v = torch.ops.aten._flash_attention_backward(
                grads[0].contiguous(), q, k, v, out, total, bounds, bounds, longest, longest, 0.0, False,
                state, unused, window_size_left=behind, window_size_right=0,
            )  # fmt: skip
        return grad_q, grad_k, grad_v, None, None, None


@contextmanager
def _deterministic() -> Iterator[None]:
    """Kernels that have an order-keeping form take it."""
    settings: Any = torch.utils.deterministic
    mode, fills = torch.get_deterministic_debug_mode(), settings.fill_uninitialized_memory
    settings.fill_uninitialized_memory = False
    torch.set_deterministic_debug_mode("error")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        settings.fill_uninitialized_memory = fills


def _attend_tiles(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """What `_attend_rows` gives, by torch's own kernel: on a GPU the scores of long rows had better never be
    written to memory. That kernel takes a mask only where every query head has a K/V head of its own."""
    people, length = mask.shape[0], mask.shape[-1]
    heads, groups = q.shape[1], q.shape[1] // k.shape[1]
    q, k, v = (x.view(people, length, -1, x.shape[-1]).transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    mixed = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask[:, 0].expand(-1, heads, -1, -1)
    )
    return mixed.transpose(1, 2).reshape(people * length, heads, -1)


def _attend_rows(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, list[Tensor]]]:
    """softmax(q k^T / sqrt(D) + mask) v. q [U*S, Hq, D], k and v [U*S, Hkv, D], mask [U, 1, 1, S, S].

    The query heads that share a K/V head are folded into one tall product. Queries go in blocks of rows, each
    with the keys up to its end: nothing later is seen, and computing it to hide it would be half of the work.
    -> [U*S, Hq, D], and what backward needs.
    """
    people, length = mask.shape[0], mask.shape[-1]
    kv_heads, dim = k.shape[1], k.shape[2]
    folded_q, folded_k, folded_v = (_fold(x, people, kv_heads) for x in (q, k, v))
    out, all_weights = torch.empty_like(folded_q), []
    for begin, end in _blocks(length):
        scores = torch.bmm(_rows_of(folded_q, length, begin, end), folded_k[:, :end].mT)  # [U*Hkv, G*n, end]
        shown = scores.view(people, kv_heads, -1, end - begin, end)
        shown.mul_(dim**-0.5).add_(mask[..., begin:end, :end])
        weights = torch.softmax(scores, -1)
        _put_rows(out, length, begin, end, torch.bmm(weights, folded_v[:, :end]))
        all_weights.append(weights)
    return _unfold(out, people, length), (folded_q, folded_k, folded_v, all_weights)


def _blocks(length: int) -> list[tuple[int, int]]:
    return [(begin, min(begin + _QUERY_BLOCK, length)) for begin in range(0, length, _QUERY_BLOCK)]


def _rows_of(folded: Tensor, length: int, begin: int, end: int) -> Tensor:
    """Of [B, G*S, D] the rows begin .. end of each of the G heads: [B, G*n, D]."""
    return folded.view(folded.shape[0], -1, length, folded.shape[-1])[:, :, begin:end].flatten(1, 2)


def _put_rows(folded: Tensor, length: int, begin: int, end: int, rows: Tensor) -> None:
    """The reverse of `_rows_of`."""
    heads = folded.view(folded.shape[0], -1, length, folded.shape[-1])
    heads[:, :, begin:end] = rows.view(folded.shape[0], -1, end - begin, folded.shape[-1])


def _fold(x: Tensor, people: int, kv_heads: int) -> Tensor:
    """[U*S, H, D] -> [U*Hkv, (H/Hkv)*S, D]."""
    groups = x.shape[1] // kv_heads
    heads = x.view(people, -1, kv_heads, groups, x.shape[-1])
    return heads.permute(0, 2, 3, 1, 4).reshape(people * kv_heads, -1, x.shape[-1])


def _unfold(x: Tensor, people: int, length: int) -> Tensor:
    """[U*Hkv, G*S, D] -> [U*S, Hkv*G, D]."""
    heads = x.view(people, -1, length, x.shape[-1])  # [U, Hkv*G, S, D]
    return heads.transpose(1, 2).reshape(people * length, -1, x.shape[-1])


class _Attend(torch.autograd.Function):
    """`_attend_rows` with its gradients."""

    @staticmethod
    def forward(ctx: Context, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        out, (folded_q, folded_k, folded_v, weights) = _attend_rows(q, k, v, mask)
        ctx.save_for_backward(folded_q, folded_k, folded_v, *weights)
        ctx.rows = (mask.shape[0], mask.shape[-1])
        return out

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *all_weights = ctx.saved_tensors
        people, length = ctx.rows
        kv_heads, scale = k.shape[0] // people, k.shape[-1] ** -0.5
        grad_out = _fold(grads[0], people, kv_heads)
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (begin, end), weights in zip(_blocks(length), all_weights, strict=True):
            out_rows = _rows_of(grad_out, length, begin, end)
            grad_v[:, :end].baddbmm_(weights.mT, out_rows)
            grad_weights = torch.bmm(out_rows, v[:, :end].mT)
            # dS = P * (dP - sum(dP * P)); the row sums equal the rows' sum(dO * O), but P is at hand.
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype).mul_(scale)
            _put_rows(grad_q, length, begin, end, torch.bmm(grad_scores, k[:, :end]))
            grad_k[:, :end].baddbmm_(grad_scores.mT, _rows_of(q, length, begin, end))
        return (
            _unfold(grad_q, people, length),
            _unfold(grad_k, people, length),
            _unfold(grad_v, people, length),
            None,
        )
