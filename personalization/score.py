"""How well a model with one adapter predicts examples: the loss of each learned token, forward only."""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.adapter_files import LoraWeights
from engine.model import GROUP_MODULES, ModelConfig, module_shape
from engine.weights import LoadedModel
from personalization.prompt import Example

_HEAD_ROWS = 128


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


class _Causal:
    """Attention of one whole sequence; an `Attend`."""

    def __init__(self, config: ModelConfig, length: int, device: torch.device) -> None:
        at = torch.arange(length, device=device)
        self._ages = at[:, None] - at
        self._config = config

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        window = self._config.window(layer)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        mask = None
        if window is not None and window < len(self._ages):
            mask = (self._ages >= 0) & (self._ages < window)
        mixed = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        return mixed[0].transpose(0, 1)


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
            ids, torch.arange(len(ids), device=device), _Causal(model.config, len(ids), device), lora
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
