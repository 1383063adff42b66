"""How well a model with one adapter predicts examples: the loss of each learned token, forward only."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from engine.adapter_files import LoraWeights
from engine.model import GROUP_MODULES, GROUPS, MODULES, ModelConfig, group_shape, module_shape
from engine.weights import LoadedModel
from personalization.prompt import Example
from personalization.stack import AdapterShape, FixedStack

_HEAD_ROWS = 128
# Tokens of one batch of `losses_of_many`: enough for full speed, and the logits of 512 MB at 8k words.
_BATCH_TOKENS = 2048
_DEVICE_BATCH_TOKENS = 32_768
# What one layer may cost at a time where someone may wait for the device: about a millisecond of a large GPU.
LAYER_OPERATIONS = 5e11
_DEVICE_HEAD_BYTES = 512 << 20
_LAID_OUT_BYTES = 1 << 30  # of adapters side by side, so that one of a high rank costs others no memory


class FixedAdapter:
    """One adapter of any rank and any modules on all tokens; a `Lora` for the model, forward only."""

    def __init__(
        self, weights: LoraWeights, config: ModelConfig, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._deltas: dict[tuple[int, str], list[tuple[slice, Tensor, Tensor]]] = {}
        columns: dict[str, tuple[str, slice]] = {}
        for group, modules in GROUP_MODULES.items():
            begin = 0
            for module in modules:
                end = begin + module_shape(config, module)[0]
                columns[module] = (group, slice(begin, end))
                begin = end
        for m in weights.modules:
            group, place = columns[m.module]
            a, b = m.a.to(device, dtype), (m.b * m.scale).to(device, dtype)
            self._deltas.setdefault((m.layer, group), []).append((place, a.t(), b.t()))

    def __call__(self, layer: int, group: str, x: Tensor, y: Tensor) -> Tensor:
        """x [T, in], y [T, out] -> y + scale * (x A^T) B^T, in place."""
        for place, a, b in self._deltas.get((layer, group), ()):
            y[:, place].addmm_(x @ a, b)
        return y


@torch.inference_mode()
def token_losses(
    model: LoadedModel, examples: Sequence[Example], adapter: LoraWeights | None
) -> list[Tensor]:
    """For each example the losses (nats, float32) of its learned tokens, in order. None: the bare base.

    Each example is one sequence from position 0; its first token cannot be learned.
    """
    decoder = model.decoder
    device, dtype = decoder.embed.device, decoder.embed.dtype
    lora = None if adapter is None else FixedAdapter(adapter, model.config, dtype, device)
    found = []
    for example in examples:
        ids = torch.tensor(example.token_ids, device=device)
        learned = torch.tensor(example.learn_mask, device=device)[1:].nonzero()[:, 0]
        hidden = decoder(
            ids, torch.arange(len(ids), device=device), _CausalRows(model.config, 1, len(ids), device), lora
        )[learned]
        targets = ids[1:][learned]
        losses = [
            torch.nn.functional.cross_entropy(
                decoder.logits(hidden[begin : begin + _HEAD_ROWS]),
                targets[begin : begin + _HEAD_ROWS],
                reduction="none",
            )
            for begin in range(0, len(targets), _HEAD_ROWS)
        ]
        found.append(torch.cat(losses).cpu() if losses else torch.empty(0))
    return found


@torch.inference_mode()
def next_token(model: LoadedModel, token_ids: Sequence[int], adapter: LoraWeights | None) -> int:
    """The likeliest token behind `token_ids`."""
    decoder = model.decoder
    device, dtype = decoder.embed.device, decoder.embed.dtype
    lora = None if adapter is None else FixedAdapter(adapter, model.config, dtype, device)
    ids = torch.tensor(token_ids, device=device)
    attend = _CausalRows(model.config, 1, len(ids), device)
    hidden = decoder(ids, torch.arange(len(ids), device=device), attend, lora)[-1:]
    return int(decoder.logits(hidden).argmax())


@torch.inference_mode()
def losses_of_many(
    model: LoadedModel,
    asked: Sequence[tuple[LoraWeights | None, Sequence[Example]]],
) -> list[list[Tensor]]:
    """`token_losses` of many adapters at once, each on its own examples: rows of different adapters share a
    batch. An adapter given several times is laid out once. What it gives for a row does not depend on the
    company, up to rounding."""
    found: list[list[Tensor]] = [[] for _ in asked]
    for part in _parts(model, asked):
        for place, losses in zip(part, _losses_of_part(model, [asked[place] for place in part]), strict=True):
            found[place] = losses
    return found


def layer_weights(config: ModelConfig) -> int:
    """How many a layer multiplies each token with."""
    return sum(out * size for out, size in (group_shape(config, group) for group in GROUPS))


_Asked = Sequence[tuple[LoraWeights | None, Sequence[Example]]]


def _parts(model: LoadedModel, asked: _Asked) -> Iterator[list[int]]:
    """The places of `asked`, those of like rank together, in parts whose adapters may lie side by side."""
    ranks = [max((m.rank for m in weights.modules), default=1) if weights else 1 for weights, _ in asked]
    full = AdapterShape(model.config, MODULES, 1, 1.0).size * model.decoder.embed.element_size()
    part: list[int] = []
    for place in sorted(range(len(asked)), key=lambda place: ranks[place]):
        if part and (len(part) + 1) * ranks[place] * full > _LAID_OUT_BYTES:
            yield part
            part = []
        part.append(place)
    if part:
        yield part


def _losses_of_part(model: LoadedModel, asked: _Asked) -> list[list[Tensor]]:
    decoder, config = model.decoder, model.config
    device, dtype = decoder.embed.device, decoder.embed.dtype
    adapters = {id(adapter): adapter for adapter, _ in asked}
    modules = sorted({m.module for each in adapters.values() if each is not None for m in each.modules})
    rank = max((m.rank for each in adapters.values() if each is not None for m in each.modules), default=1)
    shape = AdapterShape(config, modules, rank, float(rank))
    places = {key: place for place, key in enumerate(adapters)}
    rows = torch.empty(len(adapters), shape.size, dtype=dtype, device=device)
    for key, place in places.items():
        rows[place] = shape.row(adapters[key]).to(device, dtype)
    most_rows = max(1, _LAID_OUT_BYTES // max(1, shape.size * rows.element_size()))

    found: list[list[Tensor]] = [[torch.empty(0)] * len(examples) for _, examples in asked]
    todo = [
        (person, number, example)
        for person, (_, examples) in enumerate(asked)
        for number, example in enumerate(examples)
    ]
    todo.sort(key=lambda each: -len(each[2].token_ids))
    limit = _DEVICE_BATCH_TOKENS if decoder.embed.is_cuda else _BATCH_TOKENS
    if decoder.before_layer is not None:  # who shares a device keeps it briefly
        limit = min(limit, max(_BATCH_TOKENS, int(LAYER_OPERATIONS / (2 * layer_weights(config)))))
    while todo:
        length = len(todo[0][2].token_ids)
        count = min(most_rows, max(1, limit // length))
        batch, todo = todo[:count], todo[count:]
        chosen = torch.tensor([places[id(asked[person][0])] for person, _, _ in batch], device=device)
        losses = _batch_losses(model, FixedStack(shape, rows[chosen]), [row for _, _, row in batch], length)
        for (person, number, _), each in zip(batch, losses, strict=True):
            found[person][number] = each
    return found


def _batch_losses(
    model: LoadedModel, lora: FixedStack, examples: Sequence[Example], length: int
) -> list[Tensor]:
    """Each example in a row of `length`, filled up at its end, where nothing is asked."""
    decoder = model.decoder
    device = decoder.embed.device
    ids = torch.zeros(len(examples), length, dtype=torch.int64)
    learned = torch.zeros(len(examples), length, dtype=torch.bool)
    for place, example in enumerate(examples):
        ids[place, : len(example.token_ids)] = torch.tensor(example.token_ids)
        learned[place, : len(example.token_ids)] = torch.tensor(example.learn_mask)
    learned[:, 0] = False
    at = learned.flatten().nonzero()[:, 0]
    targets = ids.flatten()[at].to(device)
    positions = torch.arange(length, device=device).repeat(len(examples))
    attend = _CausalRows(model.config, len(examples), length, device)
    hidden = decoder(ids.flatten().to(device), positions, attend, lora)[(at - 1).to(device)]
    size = _HEAD_ROWS if not hidden.is_cuda else _DEVICE_HEAD_BYTES // (4 * model.config.vocab_size)
    losses = [
        torch.nn.functional.cross_entropy(
            decoder.logits(hidden[begin : begin + size]), targets[begin : begin + size], reduction="none"
        )
        for begin in range(0, len(targets), size)
    ]
    flat = torch.cat(losses).cpu() if losses else torch.empty(0)
    return list(torch.split(flat, learned.sum(1).tolist()))


class _CausalRows:
    """Attention of B sequences of one length, each in itself; an `Attend`."""

    def __init__(self, config: ModelConfig, rows: int, length: int, device: torch.device) -> None:
        at = torch.arange(length, device=device)
        self._ages = at[:, None] - at
        self._config, self._rows = config, rows

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        window = self._config.window(layer)
        mask = None
        if window is not None and window < len(self._ages):
            mask = (self._ages >= 0) & (self._ages < window)
        q, k, v = (x.view(self._rows, -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        mixed = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        return mixed.transpose(1, 2).flatten(0, 1)
