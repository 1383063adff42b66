"""Other servers' LoRA kernels, run from files that lie elsewhere, for bench_kernels to compare with.

Nothing of theirs is here: `--vllm` and `--sglang` name folders that hold the packages `vllm` and `sglang` as
their wheels have them, of which only the LoRA files need be there. What these import from the rest of their
projects is replaced by stand-ins of a line or two.

Each peer gets its best case: as many adapter slots as there are adapters in the step, all of the rank
measured, and launches for exactly the adapters there are.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Protocol
from unittest.mock import patch

import torch
import triton
import triton.language as tl
from torch import Tensor


class _Phase(StrEnum):
    DECODE = "decode"
    PREFILL = "prefill"


@dataclass(frozen=True)
class Stack:
    """Memory for one group's A and B of all slots in one layer; each peer reads it in its own order."""

    a: Tensor  # flat, slots * modules * rank * in
    b: Tensor  # flat, slots * sum(widths) * rank
    slots: int
    rank: int
    in_features: int
    widths: tuple[int, ...]  # out features of each module


class Peer(Protocol):
    """LoRA on top of a product, as one other server computes it."""

    def prepare(self, slots: list[int], most: int, rank: int) -> None:
        """The metadata of a step: the adapter slot of each row, of `most` there are. Timed by itself."""

    def run(self, x: Tensor, stack: Stack, product: Callable[[], Tensor]) -> Tensor:
        """product() with x A B of each row's adapter added. x [T, in] -> [T, sum(widths)]."""

    def matrices(self, stack: Stack, slot: int, module: int) -> tuple[Tensor, Tensor]:
        """A [rank, in] and B transposed [rank, width] of a slot, as this peer reads the stack."""


class VllmTriton:
    """vLLM's shrink and expand, which sort the rows by adapter and launch a grid per adapter."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        capability = torch.cuda.get_device_capability() if device.type == "cuda" else (0, 0)
        package = "vllm.lora.ops.triton_ops"
        _packages(folder, package)
        _module("vllm.envs", VLLM_LORA_ENABLE_DUAL_STREAM=False, VLLM_LORA_DISABLE_PDL=False,
                VLLM_BATCH_INVARIANT=False, VLLM_TUNED_CONFIG_FOLDER=None)  # fmt: skip
        quiet = SimpleNamespace(info_once=_nothing, warning_once=_nothing)
        _module("vllm.logger", init_logger=lambda name: quiet)
        _module("vllm.triton_utils", tl=tl, triton=triton)
        platform = SimpleNamespace(
            is_cuda=lambda: device.type == "cuda",
            has_device_capability=lambda least: capability >= divmod(least, 10),
            is_device_capability=lambda wanted: capability == divmod(wanted, 10),
        )
        _module("vllm.platforms", current_platform=platform)
        _module("vllm.utils")
        _module("vllm.utils.math_utils", next_power_of_2=triton.next_power_of_2)
        _module("vllm.utils.torch_utils", direct_register_custom_op=_refuse, async_tensor_h2d=torch.tensor)
        self._shrink = importlib.import_module(f"{package}.lora_shrink_op").lora_shrink
        self._expand = importlib.import_module(f"{package}.lora_expand_op").lora_expand
        self._meta_type = importlib.import_module(f"{package}.lora_kernel_metadata").LoRAKernelMeta
        self._utils = importlib.import_module(f"{package}.utils")
        self._meta: Any = None
        self._made_for = (0, 0, 0)
        self._device = device

    def prepare(self, slots: list[int], most: int, rank: int) -> None:
        made_for = (len(slots), most, rank)
        if self._made_for != made_for:  # once in the life of a server
            self._made_for = made_for
            self._meta = self._meta_type.make(most, len(slots), self._device)
            self._utils._LORA_A_PTR_DICT.clear()  # known by address, where other stacks lay before
            self._utils._LORA_B_PTR_DICT.clear()
        self._meta.prepare_tensors(torch.tensor(slots, device=self._device))

    def run(self, x: Tensor, stack: Stack, product: Callable[[], Tensor]) -> Tensor:
        y, modules = product(), len(stack.widths)
        meta = self._meta.meta_args(x.shape[0], True)
        between = torch.empty(modules, x.shape[0], stack.rank, dtype=torch.float32, device=x.device)
        self._shrink(x, [self._a(stack, m) for m in range(modules)], between, *meta, 1.0)
        bs = [self._b(stack, m) for m in range(modules)]
        self._expand(between, bs, y, *meta, offset_start=0, add_inputs=True)
        return y

    def matrices(self, stack: Stack, slot: int, module: int) -> tuple[Tensor, Tensor]:
        return self._a(stack, module)[slot], self._b(stack, module)[slot].t()

    def _a(self, stack: Stack, module: int) -> Tensor:
        size = stack.slots * stack.rank * stack.in_features
        return stack.a[module * size : (module + 1) * size].view(stack.slots, stack.rank, stack.in_features)

    def _b(self, stack: Stack, module: int) -> Tensor:
        begin = stack.slots * stack.rank * sum(stack.widths[:module])
        width = stack.widths[module]
        return stack.b[begin : begin + stack.slots * width * stack.rank].view(stack.slots, width, stack.rank)


class _Sglang:
    """What SGLang's two ways have in common: how A and B are stacked, and what they import."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        for package in (
            "sglang.kernels.ops.lora.dense",
            "sglang.kernels.ops.lora.common",
            "sglang.srt.lora.dense",
            "sglang.srt.lora.backend",
        ):
            _packages(folder, package)
        off = SimpleNamespace(get=lambda: None)
        names = ("SGLANG_ENABLE_LORA_CSGMV_SPLIT_K", "SGLANG_ENABLE_DETERMINISTIC_INFERENCE")
        flags = dict.fromkeys((*names, "SGLANG_LORA_DENSE_CONFIG_DIR"), off)
        _module("sglang.srt.environ", envs=SimpleNamespace(**flags))
        _module(
            "sglang.srt.utils",
            cached_triton_kernel=lambda key: lambda kernel: kernel,
            get_device_name=lambda: torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        )
        _module(
            "sglang.srt.lora.utils",
            LoRABatchInfo=SimpleNamespace,
            Phase=_Phase,
            architecture_for_capability=lambda major: {9: "sm90"}.get(
                major, "sm100" if major > 9 else "default"
            ),
            generate_sequence_lengths=lambda batch, device=None: torch.ones(
                batch.batch_size, dtype=torch.int32
            ),
            get_batch_token_counts=lambda batch: (batch.batch_size, 1),
            get_lm_head_pruned_lens=_nothing,
            merge_and_chunk_segments=_nothing,
        )
        self._device = device

    def matrices(self, stack: Stack, slot: int, module: int) -> tuple[Tensor, Tensor]:
        a, b = self._weights(stack)
        begin = sum(stack.widths[:module])
        ranks = slice(module * stack.rank, (module + 1) * stack.rank)
        return a[slot, ranks], b[slot, begin : begin + stack.widths[module]].t()

    @staticmethod
    def _weights(stack: Stack) -> tuple[Tensor, Tensor]:
        a = stack.a.view(stack.slots, len(stack.widths) * stack.rank, stack.in_features)
        return a, stack.b.view(stack.slots, sum(stack.widths), stack.rank)


class SglangChunked(_Sglang):
    """SGLang's default, chunks of at most 16 rows of one adapter ("csgmv")."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        super().__init__(folder, device)
        backend = type(
            "BaseLoRABackend",
            (),
            {"__init__": _set_backend, "_add_moe_lora_info": lambda self, batch, info: info},
        )
        _module("sglang.srt.lora.backend.base_backend", BaseLoRABackend=backend)
        _module("sglang.srt.model_executor")
        _module("sglang.srt.model_executor.forward_batch_info", ForwardBatch=object)
        _module("sglang.srt.runtime_context", get_lora=lambda: SimpleNamespace(max_lora_chunk_size=16))
        _module("sglang.srt.server_args", ServerArgs=object)
        dense = "sglang.kernels.ops.lora.dense"
        _module(f"{dense}.chunked_embedding_lora_a", chunked_embedding_lora_a_forward=_nothing)
        self._shrink = importlib.import_module(
            f"{dense}.chunked_sgmv_shrink"
        ).chunked_sgmv_lora_shrink_forward
        self._expand = importlib.import_module(
            f"{dense}.chunked_sgmv_expand"
        ).chunked_sgmv_lora_expand_forward
        module = importlib.import_module("sglang.srt.lora.backend.chunked_backend")
        self._backend_type = module.ChunkedSgmvLoRABackend
        self._backend: Any = None
        self._made_for = (0, 0)  # rows, slots
        self._offsets: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def prepare(self, slots: list[int], most: int, rank: int) -> None:
        with _unpinned(self._device):
            if self._made_for != (len(slots), most):
                self._made_for = (len(slots), most)
                self._backend = self._backend_type(most, self._device, None)
                self._backend.init_decode_cuda_graph_batch_info(len(slots), 1)
            decode = SimpleNamespace(is_decode=lambda: True)
            batch = SimpleNamespace(batch_size=len(slots), forward_mode=decode)
            self._backend.prepare_lora_batch(batch, slots, [rank] * most, [1.0] * most, True)

    def run(self, x: Tensor, stack: Stack, product: Callable[[], Tensor]) -> Tensor:
        y, info = product(), self._backend.batch_info
        a, b = self._weights(stack)
        if stack.widths not in self._offsets:
            ends = [sum(stack.widths[:m]) for m in range(len(stack.widths) + 1)]
            host = torch.tensor(ends, dtype=torch.int32)
            self._offsets[stack.widths] = (host.to(self._device), host)
        offsets, host = self._offsets[stack.widths]
        between = self._shrink(x, a, info, len(stack.widths))
        widest = max(stack.widths)
        result: Tensor = self._expand(between, b, info, offsets, widest, y, slice_offsets_cpu=host)
        return result


class SglangPlanned(_Sglang):
    """SGLang's newest ("triton_v2"), which picks kernels, tiles and overlap with the product from a table.

    What it sorts once a step on the device is not in its kernels' time.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        super().__init__(folder, device)
        _module("sglang.kernels.ops.lora.moe")
        _module("sglang.kernels.ops.lora.moe.virtual_experts", _align_block_size_jit=_refuse)
        _module("sglang.kernels.jit")
        overlaps = device.type == "cuda" and torch.cuda.get_device_capability() >= (9, 0)
        _module("sglang.kernels.jit.utils", is_arch_support_pdl=lambda: overlaps)
        workspace = importlib.import_module("sglang.srt.lora.workspace")
        self._runner_type = importlib.import_module("sglang.srt.lora.dense.runner").DenseLoraRunner
        self._linear = importlib.import_module("sglang.srt.lora.dense.plan").DenseLoraKind.LINEAR
        self._workspace = workspace.LoraWorkspace()
        self._runner: Any = None
        self._most = 0
        self._rank = 0

    def prepare(self, slots: list[int], most: int, rank: int) -> None:
        if (self._most, self._rank) != (most, rank):
            self._most, self._rank = most, rank
            self._runner = self._runner_type(self._workspace, max_loras=most, device=self._device)
        columns = [[rank] * most, slots]
        ranks, rows = (torch.tensor(column, dtype=torch.int32).to(self._device) for column in columns)
        scales = torch.tensor([1.0] * most).to(self._device)
        self._runner.begin_batch(
            token_slots=rows, lora_ranks=ranks, scalings=scales, num_tokens=len(slots),
            phase=_Phase.DECODE, graph_mode=self._device.type == "cuda",
        )  # fmt: skip

    def run(self, x: Tensor, stack: Stack, product: Callable[[], Tensor]) -> Tensor:
        a, b = self._weights(stack)
        offsets = tuple(sum(stack.widths[:m]) for m in range(len(stack.widths) + 1))
        plan = self._runner.plan_for(
            self._linear, stack.rank, stack.in_features, offsets[-1], num_tokens=x.shape[0]
        )
        result: Tensor = self._runner.apply(x, product, plan, a=a, b=b, offsets=offsets)
        return result


def load_peers(
    vllm: Path | None, sglang: Path | None, device: torch.device
) -> tuple[dict[str, Peer], dict[str, str]]:
    """The peers that can be loaded, by name, and what went wrong with the others."""
    wanted: list[tuple[str, Path | None, Callable[[Path, torch.device], Peer]]] = [
        ("vllm", vllm, VllmTriton),
        ("sglang csgmv", sglang, SglangChunked),
        ("sglang v2", sglang, SglangPlanned),
    ]
    peers: dict[str, Peer] = {}
    errors: dict[str, str] = {}
    for name, folder, kind in wanted:
        if folder is None:
            continue
        try:
            peers[name] = kind(folder.resolve(), device)
        except Exception as error:  # their files may be of any version
            errors[name] = f"{type(error).__name__}: {error}"
    return peers, errors


def make_stacks(
    memory: Tensor, slots: int, rank: int, layers: int, shapes: list[tuple[int, tuple[int, ...]]]
) -> list[list[Stack]]:
    """Stacks [layer][group] cut from flat memory, wrapping around if it is too small for all.

    shapes: (in features, widths) of each group.
    """
    at = 0
    stacks: list[list[Stack]] = []
    for _ in range(layers):
        stacks.append([])
        for side, widths in shapes:
            sizes = (slots * len(widths) * rank * side, slots * sum(widths) * rank)
            parts = []
            for size in sizes:
                if at + size > memory.numel():
                    at = 0
                parts.append(memory[at : at + size])
                at += math.ceil(size / 128) * 128
            stacks[-1].append(Stack(parts[0], parts[1], slots, rank, side, widths))
    return stacks


def _packages(folder: Path, name: str) -> None:
    """A package and those around it, found in the folder, without running what they do when imported."""
    parts = name.split(".")
    if not folder.joinpath(*parts).is_dir():
        raise FileNotFoundError(f"expected {'/'.join(parts)} in {folder}, got none")
    for count in range(1, len(parts) + 1):
        full = ".".join(parts[:count])
        if full not in sys.modules:
            package = _module(full)
            package.__path__ = [str(folder.joinpath(*parts[:count]))]


def _module(name: str, **content: object) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(content)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], child, module)
    return module


def _nothing(*args: object, **options: object) -> None:
    return None


def _refuse(*args: object, **options: object) -> None:
    raise AttributeError("not here")  # which makes vLLM's operators plain functions


def _set_backend(self: Any, most: int, device: torch.device) -> None:
    self.max_loras_per_batch, self.device = most, device


@contextmanager
def _unpinned(device: torch.device) -> Iterator[None]:
    """Without a GPU there is no memory to pin: what asks for it gets plain memory."""
    if device.type == "cuda":
        yield
        return

    def plain(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, pin_memory=False, **options: make(*args, **options)

    names = ("tensor", "empty", "arange", "zeros")
    with patch.multiple(torch, **{name: plain(getattr(torch, name)) for name in names}):
        yield
