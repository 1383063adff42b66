"""Learning on the GPU that serves: a layer at a time, and rests while replies are being computed.

Kernels of two processes never run on one GPU at the same moment, so what learning has given to the device
must be short, and there must be time behind it. Before each layer, forward and backward, the host waits until
the device has done the layer before. While the engine is busy it then rests, so long that learning takes no
more than `share` of the time; as soon as nobody waits for a reply it goes on.
"""

import time
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from engine.model import Decoder, ModelConfig
from personalization.score import LAYER_OPERATIONS, layer_weights
from personalization.train import Recipe

SHARE = 0.13  # what is left to those who wait makes their words come 15 % later at most
_NAP_S = 0.0005
_LAUNCH_S = 0.01  # the most that the host takes to launch a layer
_MOST_TOKENS = 16_384


class Mark(Protocol):
    """A place in the device's work; a `torch.cuda.Event`."""

    def synchronize(self) -> None: ...


def cuda_mark() -> Mark:
    """The place where the current stream's work has come to."""
    event = torch.cuda.Event()
    event.record()
    return event


class Pacer:
    """Holds up a decoder's forward and backward passes. `busy`: whether the engine computes replies."""

    def __init__(
        self,
        busy: Callable[[], bool],
        share: float,
        *,
        mark: Callable[[], Mark] = cuda_mark,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"share: expected above 0 and at most 1, got {share}")
        self._busy, self._share = busy, share
        self._mark, self._clock, self._sleep = mark, clock, sleep
        self._last: Mark | None = None
        self._resumed = clock()
        self.rested_s = 0.0

    def pace(self, decoder: Decoder) -> None:
        """From now on all passes of `decoder` are held up."""
        decoder.before_layer = self._before_layer

    def pause(self) -> None:
        """Wait for the device; while the engine is busy also rest."""
        called, last, self._last = self._clock(), self._last, self._mark()
        if not self._busy():
            # One layer ahead of the device, so that it never waits for the host.
            if last is not None:
                last.synchronize()
            self._resumed = self._clock()
            return
        self._last.synchronize()
        now = self._clock()
        # What the host did between two layers for itself, or between two refreshes, cost the device nothing.
        worked = now - max(self._resumed, called - _LAUNCH_S)
        until = now + worked * (1 / self._share - 1)
        while (left := until - self._clock()) > 0 and self._busy():
            self._sleep(min(left, _NAP_S))
        self._resumed = self._clock()
        self.rested_s += self._resumed - now

    def _before_layer(self, x: Tensor) -> Tensor:
        self.pause()
        if x.requires_grad:
            x.register_hook(self._behind_layer)  # type: ignore[no-untyped-call]
        return x

    def _behind_layer(self, gradient: Tensor) -> None:
        self.pause()


def people_at_once(config: ModelConfig, recipe: Recipe, most: int) -> int:
    """How many may share a step, so that no layer's backward pass takes long: from one to `most`."""
    tokens = min(_MOST_TOKENS, LAYER_OPERATIONS / (4 * layer_weights(config)))
    return max(1, min(most, int(tokens / recipe.tokens_per_step)))
