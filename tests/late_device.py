"""The CPU's runner as a device that works beside the host, for tests of what the engine does meanwhile."""

from collections.abc import Sequence as Many
from dataclasses import dataclass

from torch import Tensor

from engine.batch import Batch
from engine.config import EngineConfig
from engine.request import UNKNOWN
from engine.runner import Runner
from engine.sampler import LogitsNotFinite, sample
from engine.weights import LoadedModel

COPY_STEPS = 3  # a copy is done when so many more steps were launched


@dataclass
class Late:
    """The tokens of a launched step. They can be had in the order of the steps, each once."""

    device: "BesideHost"
    number: int
    drawn: list[int]

    def tokens(self) -> list[int]:
        assert self.number == self.device.collected
        self.device.collected += 1
        return self.drawn

    def device_s(self) -> float:
        return 0.001


@dataclass
class LateCopy:
    device: "BesideHost"
    done_at: int

    def done(self) -> bool:
        return self.device.launched >= self.done_at


class BesideHost:
    """Computes at once, which is the order in which a device would, and lets the host know late.

    A token that the host did not know comes from the draws of the step before, and no other step may have
    been launched between.
    """

    ahead = 1

    def __init__(self, config: EngineConfig, model: LoadedModel, arena: Tensor, block_size: int) -> None:
        self.launched = 0
        self.collected = 0
        self.waited_for_copies = 0  # steps with an adapter that was still on its way
        self._runner = Runner(model, arena, block_size)
        self._kv = self._runner._kv
        self._drawn: list[int] = []
        self._copies: dict[int, LateCopy] = {}  # by slab

    def launch(self, batch: Batch) -> Late:
        assert self.launched - self.collected <= self.ahead
        for row, source in enumerate(batch.token_source.tolist()):
            assert (source >= 0) == (batch.token_ids[row] == UNKNOWN)
            if source >= 0:
                assert self.launched == self.collected + 1
                batch.token_ids[row] = self._drawn[source]
        used = [self._copies[slab] for adapter in batch.adapters for slab in adapter.slabs]
        self.waited_for_copies += not all(copy.done() for copy in used)
        try:
            self._drawn = self._runner.launch(batch).tokens()
        except LogitsNotFinite as error:  # of these rows only, and the host hears of it with the tokens
            logits = self._runner.logits(batch).clone()
            logits[error.rows] = 0
            self._drawn = [
                UNKNOWN if row in error.rows else token
                for row, token in enumerate(sample(logits, batch.sampling).tolist())
            ]
        self.launched += 1
        return Late(self, self.launched - 1, self._drawn)

    def copy_in(self, image: Tensor, slabs: Many[int]) -> LateCopy:
        self._runner.copy_in(image, slabs)
        copy = LateCopy(self, self.launched + COPY_STEPS)
        self._copies.update(dict.fromkeys(slabs, copy))
        return copy

    def prepare(self) -> bool:
        return False

    def drop_copies(self) -> None:
        self._runner.drop_copies()
