"""The device, when it is a GPU: takes a Batch, records and replays CUDA graphs, hands out token ids a step
later.

A step is a copy of its inputs, one graph, and a copy of the tokens back;
the host waits for none of them. The next step may be launched at once: it finds the tokens of this one on
the device.
"""

import logging
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from engine.batch import Batch
from engine.config import ConfigError
from engine.gpu_decoder import GpuDecoder, StepShape, row_buckets, token_buckets, worth_keeping
from engine.model import GROUPS
from engine.step_inputs import Limits, StepInputs
from engine.weights import LoadedModel
from kernels import RANK_TILE, attention
from kernels.attention import DecodePlan

log = logging.getLogger(__name__)

Graph = torch.cuda.CUDAGraph
_LIKELY_CONTEXT = 4096
_MOST_GROUPS = 4  # sets of module groups for which steps are recorded


class Copy:
    """Adapters on their way into the arena."""

    def __init__(self, event: torch.cuda.Event | None, image: Tensor) -> None:
        self.event = event
        self._image = image  # kept until it has been read

    def done(self) -> bool:
        return self.event is None or bool(self.event.query())


@dataclass(frozen=True, slots=True)
class Launched:
    """A step on its way. `tokens` waits for it."""

    count: int
    _host: Tensor  # [rows] int32, pinned
    _begun: torch.cuda.Event | None
    _done: torch.cuda.Event | None

    def tokens(self) -> list[int]:
        """One token id per row that wanted one, in the order of the chunks; -1 where logits were not
        finite.
        """
        if self._done is not None:
            self._done.synchronize()
        return cast(list[int], self._host[: self.count].tolist())

    def device_s(self) -> float:
        """Seconds from the copy of its inputs to that of its tokens, by the device's clock; waits for it."""
        if self._begun is None or self._done is None:
            return 0.0
        self._done.synchronize()
        return float(self._begun.elapsed_time(self._done)) / 1e3


class GpuRunner:
    """Runs batches on one model and one arena [num_slabs, slab_elems] on a CUDA device.

    On the CPU it serves tests: the same kernels interpreted, without graphs and streams.
    """

    ahead = 1  # steps that may be launched before their predecessor's tokens are taken

    def __init__(
        self, model: LoadedModel, arena: Tensor, block_size: int, *, max_tokens: int, max_rows: int,
    ) -> None:  # fmt: skip
        config, device = model.config, arena.device
        if arena.dtype == torch.float16:
            # Products run before the norm divides; their range is that of the residual stream.
            raise ConfigError("dtype", "bfloat16 or float32 on a GPU", "float16")
        if arena.shape[1] % RANK_TILE:
            # Adapters are read several numbers at a time, which have to lie where such reads may begin.
            expected = f"one with which a slab holds a multiple of {RANK_TILE} numbers"
            raise ConfigError("block_size", expected, block_size)
        kv_shape = (config.num_layers, 2, block_size, config.num_kv_heads, config.head_dim)
        self._arena = arena
        self._slabs = arena[:, : torch.Size(kv_shape).numel()].view(-1, *kv_shape)
        self._row_buckets = row_buckets(max_rows)
        rows = self._row_buckets[-1]
        self._token_buckets = token_buckets(max(max_tokens, rows))  # decode rows are padded to all there are
        self._block_size = block_size
        longest = min(-(-config.max_position_embeddings // block_size), arena.shape[0])
        limits = Limits(
            tokens=self._token_buckets[-1],
            rows=rows,
            blocks=rows * longest,  # all rows may share nearly all of theirs
            query_rows=attention.QUERY_ROWS,
        )
        self._is_cuda = self._records = device.type == "cuda"
        self._inputs = StepInputs(limits, device, config.num_layers)
        with torch.inference_mode():
            self._decoder = GpuDecoder(model.decoder, arena, self._slabs, self._inputs)
            if self._is_cuda:
                self._token_buckets = worth_keeping(self._token_buckets, self._decoder.products_s)
        self._graphs: dict[StepShape, Graph | None] = {}  # None: launched kernel by kernel, as on a CPU
        self._groups: dict[tuple[str, ...], None] = dict.fromkeys([(), GROUPS])  # of all adapters seen
        self._to_prepare: deque[StepShape] | None = None  # None: to be listed, as `_groups` has changed
        self._results = [torch.zeros(rows, dtype=torch.int32, pin_memory=self._is_cuda) for _ in range(2)]
        self._side = 0
        self._no_logits = torch.zeros(0, config.vocab_size, device=device)
        self._arriving: dict[int, torch.cuda.Event] = {}  # slab -> copy that has not been seen to end
        if self._is_cuda:
            self._stream = torch.cuda.Stream(device)
            self._copies = torch.cuda.Stream(device)
            self._launched = torch.cuda.Event()
            self._pool: Any = None
            self._stream.wait_stream(torch.cuda.current_stream(device))

    def launch(self, batch: Batch) -> Launched:
        """Start a step behind those already started; returns at once."""
        if not self._is_cuda:
            with torch.inference_mode():
                return self._launch(batch)
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            self._await_copies(batch)
            launched = self._launch(batch)
            self._launched = torch.cuda.Event()
            self._launched.record()
            return launched

    def logits(self, batch: Batch) -> Tensor:
        """[R, vocab] float32, in the order of the chunks; waits for them. For tests and comparisons."""
        with torch.inference_mode():
            if self._is_cuda:
                self._stream.synchronize()
                self._copies.synchronize()
            shape = self._shape(batch)
            self._inputs.fill(batch, shape.tokens, shape.singles, shape.sampled)
            self._decoder.layers(shape)
            count = len(batch.logits_rows)
            logits = self._decoder.logits(shape.sampled)[:count].float() if count else self._no_logits
            if self._is_cuda:
                torch.cuda.synchronize()
            return logits.clone()

    def prepare(self) -> bool:
        """Compile and record one of the shapes that steps are likely to come in; False if none is left.

        For when nothing is in flight: what the last step drew is gone afterwards.
        """
        if self._to_prepare is None:
            self._to_prepare = deque(self._likely_shapes())
        left = self._to_prepare
        while left and left[0] in self._graphs:
            left.popleft()
        if not left:
            return False
        with torch.inference_mode(), torch.cuda.stream(self._stream) if self._is_cuda else nullcontext():
            self._inputs.fill_nothing()
            self._run(left[0])
        return True

    def _likely_shapes(self) -> Iterator[StepShape]:
        """Steps without adapters, and with those of any kind that was seen or that learning makes: first the
        decode steps, then those with prompts. Longer contexts come in more splits."""
        most = self._row_buckets[-1]
        longest = min(_LIKELY_CONTEXT, self._decoder.config.max_position_embeddings)
        lengths = [(1 << power) + more for power in range(longest.bit_length()) for more in (0, 1)]

        def plans(rows: int) -> list[DecodePlan]:
            return list(dict.fromkeys(self._attention(rows, length) for length in lengths))

        for rows in self._row_buckets:
            for plan in plans(rows):
                for groups in self._groups:
                    yield StepShape(rows, rows, False, groups, plan, rows)
        for tokens in self._token_buckets:
            for singles in (0, most):
                for plan in plans(singles) if singles else [self._attention(0, 0)]:
                    for groups in self._groups:
                        if tokens >= singles:
                            yield StepShape(tokens, singles, True, groups, plan, most)

    def _attention(self, rows: int, longest: int) -> DecodePlan:
        config = self._decoder.config
        return DecodePlan.make(
            rows, config.num_kv_heads, config.head_dim, self._arena.dtype, longest, self._arena.device
        )

    def copy_in(self, image: Tensor, slabs: Many[int]) -> Copy:
        """Start to copy the image [n, slab_elems] of a packed adapter into these n slabs.

        The copy follows the newest launched step, which may still read what the slabs held before.
        """
        if not self._is_cuda:
            self._arena[list(slabs)] = image.to(self._arena.dtype)
            return Copy(None, image)
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(self._launched)
            for begin, end in _runs(slabs):
                target = self._arena[slabs[begin] : slabs[begin] + end - begin]
                target.copy_(image[begin:end], non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._arriving.update(dict.fromkeys(slabs, event))
        return Copy(event, image)

    def drop_copies(self) -> None:
        """Nothing is copied out of the pages here."""

    def _launch(self, batch: Batch) -> Launched:
        shape, count = self._shape(batch), len(batch.logits_rows)
        begun = done = None
        if self._is_cuda:
            begun, done = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begun.record()
        self._inputs.fill(batch, shape.tokens, shape.singles, shape.sampled)
        self._run(shape)
        host = self._results[self._side]
        self._side = 1 - self._side
        if count:
            host[:count].copy_(self._decoder.tokens[:count], non_blocking=True)
        if done is not None:
            done.record()
        return Launched(count, host, begun, done)

    def _shape(self, batch: Batch) -> StepShape:
        """The shape that this batch is padded to.

        Each new one is recorded when it first comes, if `prepare` has not been there before, which takes as
        long as a dozen steps, so steps with prompts differ in few ways.
        """
        tokens, single, sampled = batch.num_tokens, batch.num_single, len(batch.logits_rows)
        most = self._row_buckets[-1]
        has_prompts = single < len(batch.blocks)
        if has_prompts:
            singles, drawn = most if single else 0, most
            padded = self._bucket(self._token_buckets, max(tokens, singles))
        else:
            singles = padded = self._bucket(self._row_buckets, tokens)
            drawn = self._bucket(self._row_buckets, sampled) if sampled else 0
        longest = max(batch.context_lens[:single], default=0)
        groups = self._inputs.lora_groups(batch)
        if groups not in self._groups:
            if len(self._groups) < _MOST_GROUPS:
                self._groups[groups] = None
                self._to_prepare = None
            else:
                groups = GROUPS  # which all are part of: graphs must not be as many as mixtures of adapters
        return StepShape(
            padded,
            singles,
            has_prompts,
            groups,
            self._attention(singles, longest),
            drawn if sampled else 0,
        )

    def _run(self, shape: StepShape) -> None:
        if shape not in self._graphs:
            self._decoder.step(shape)  # compiles what is new; this step is done with it
            try:
                self._graphs[shape] = self._record(lambda: self._decoder.step(shape))
            except torch.OutOfMemoryError:
                log.exception(
                    "no memory to record a step: from now on new ones are launched kernel by kernel"
                )
                self._records, self._graphs[shape] = False, None
        elif (graph := self._graphs[shape]) is not None:
            graph.replay()
        else:
            self._decoder.step(shape)

    def _record(self, launches: Callable[[], None]) -> Graph | None:
        if not self._records:
            return None
        graph = Graph()
        self._stream.synchronize()
        # Other threads may go on to allocate pinned memory while we record.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            launches()
        self._pool = graph.pool()
        return graph

    def _await_copies(self, batch: Batch) -> None:
        """Order this step behind copies into any slab it uses: of its adapters, or of one evicted on its
        way.
        """
        if not self._arriving:
            return
        for slab, event in list(self._arriving.items()):
            if event.query():
                del self._arriving[slab]
        used = [slab for resident in batch.adapters for slab in resident.slabs]
        used += [slot // self._block_size for slot in batch.slots]
        for event in {id(e): e for slab in used if (e := self._arriving.get(slab)) is not None}.values():
            self._stream.wait_event(event)

    @staticmethod
    def _bucket(buckets: list[int], count: int) -> int:
        return buckets[bisect_left(buckets, count)]


def _runs(slabs: Many[int]) -> Iterator[tuple[int, int]]:
    """(begin, end) of each run of adjacent slabs, which one copy can fill."""
    begin = 0
    for index in range(1, len(slabs) + 1):
        if index == len(slabs) or slabs[index] != slabs[index - 1] + 1:
            yield begin, index
            begin = index
