"""Compiles every kernel of serving and of learning for a GPU that need not be there.

    python -m tests.kernel_compiler 9.0

Steps of all kinds run on tensors without memory. Where a kernel would be launched it is compiled, as for a
device of that compute capability, and what it takes goes out as a line of JSON: shared memory in bytes,
registers a thread, bytes of them that were spilled to memory, and loads of two bytes each, which take as long
as those of sixteen.
"""

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from benchmarks.random_model import LLAMA_3_1_8B
from engine.gpu_decoder import GpuDecoder, StepShape
from engine.model import GROUPS, Decoder, ModelConfig
from engine.step_inputs import Limits, StepInputs
from kernels import attention, fused, linear, lora, sampling, training
from kernels.attention import DecodePlan

PROCESSORS = 132
BLOCK_SIZE = 16
META = torch.device("meta")
QWEN_3 = replace(LLAMA_3_1_8B, qk_norm=True, num_kv_heads=32)
WIDE_HEADS = replace(LLAMA_3_1_8B, head_dim=256, num_heads=16, qkv_bias=True, sliding_window=4096)


class AbsentDevice:
    """What Triton asks of a device in order to compile for it."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def serve(config: ModelConfig, dtype: torch.dtype) -> None:
    """Steps with and without adapters, of one row and of many, with prompts and without."""
    config = replace(config, num_layers=1)
    limits = Limits(tokens=1024, rows=256, blocks=4096, query_rows=attention.QUERY_ROWS)
    with torch.device("meta"):
        decoder = Decoder(config).to(dtype)
    shape = (1, 2, BLOCK_SIZE, config.num_kv_heads, config.head_dim)
    arena = torch.empty(64, torch.Size(shape).numel(), dtype=dtype, device="meta")
    steps = GpuDecoder(decoder, arena, arena.view(-1, *shape), StepInputs(limits, META, 1))
    for rows in (1, 32, 256):
        for longest in (200, 20_000):
            plan = DecodePlan.make(rows, config.num_kv_heads, config.head_dim, dtype, longest, META)
            steps.step(StepShape(rows, rows, False, (), plan, rows))
            steps.step(StepShape(rows, rows, False, GROUPS, plan, rows))
    steps.step(StepShape(1024, 256, True, GROUPS, plan, 256))


def learn(config: ModelConfig, dtype: torch.dtype) -> None:
    """What training has kernels for, forward and backward."""

    def tensor(*sizes: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(sizes, dtype=kind, device=META)

    def stack(size: int, kind: torch.dtype = torch.float32) -> Tensor:
        return tensor(8, size, kind=kind)

    rows, heads = 100, config.num_heads + 2 * config.num_kv_heads
    angles = [tensor(rows, config.head_dim // 2, kind=torch.float32) for _ in range(2)]
    x = tensor(rows, config.hidden_size).requires_grad_()
    training.rms_norm(x, tensor(config.hidden_size), config.rms_norm_eps).sum().backward()
    qkv = tensor(rows, heads * config.head_dim).requires_grad_()
    parts = training.split_rotary(qkv, config.num_heads, config.num_kv_heads, *angles)
    torch.autograd.backward([part.sum() for part in parts])
    gate_up = tensor(rows, 2 * config.intermediate_size).requires_grad_()
    training.gated_activation(gate_up).sum().backward()
    targets = tensor(rows, kind=torch.int64)
    training.cross_entropy(tensor(rows, config.vocab_size), targets, tensor(rows, kind=torch.float32))
    size = 10_000
    one_each = [tensor(8, kind=torch.float32) for _ in range(3)]
    for starts in (None, stack(size)):
        training.adam(
            stack(size), stack(size, dtype), stack(size), stack(size), stack(size, dtype), starts, *one_each,
            tensor(8, kind=torch.bool), 3, (0.9, 0.999), 1e-8,
        )  # fmt: skip


def taken(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, bytes on the stack a thread)."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", told.stdout)
    assert found is not None, told.stdout
    return int(found[1]), int(found[2])


def main() -> None:
    capability = int(sys.argv[1].replace(".", ""))
    launch, told = JITFunction.run, set[str]()

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in told:
            told.add(kernel.hash)
            registers, spilled = taken(kernel.asm["cubin"])
            line = {"kernel": self.fn.__name__, "shared": kernel.metadata.shared}
            line |= {"registers": registers, "spilled": spilled}
            narrow = len(re.findall(r"ld\.global\S*\.b16 ", kernel.asm["ptx"]))
            print(json.dumps(line | {"narrow": narrow}), flush=True)

    driver.set_active(AbsentDevice(capability))  # type: ignore[arg-type]
    JITFunction.run = compile_only
    for module in (attention, fused, linear, lora, sampling):
        module.can_overlap = lambda device: capability >= 90  # type: ignore[attr-defined]
        module.num_processors = lambda device: PROCESSORS  # type: ignore[attr-defined]
    with torch.inference_mode():
        for config in (LLAMA_3_1_8B, QWEN_3, WIDE_HEADS):
            serve(config, torch.bfloat16)
        serve(WIDE_HEADS, torch.float32)
    learn(LLAMA_3_1_8B, torch.bfloat16)


if __name__ == "__main__":
    main()
