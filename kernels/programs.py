"""What the Triton kernels share: whether they are interpreted, and how one kernel begins before the last has
ended.

Kernels of a step run back to back. With programmatic dependent launch (CUDA, from compute capability 9.0) a
kernel's programs may start while the kernel before it drains: they compute addresses and fetch what no kernel
writes (weights, adapters), then `wait` for everything before them. Each kernel calls `allow_next` first of
all, so the same holds for the one behind it.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def wait(PDL: tl.constexpr):
    """Everything launched before this kernel has ended and its writes are visible."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def allow_next(PDL: tl.constexpr):
    """The next kernel's programs may start as soon as there is room for them."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on tensors in host memory."""
    return bool(triton.knobs.runtime.interpret)


def can_overlap(device: torch.device) -> bool:
    """Whether kernels on this device may be launched as dependents of each other."""
    return (
        device.type == "cuda"
        and not is_interpreted()
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (9, 0)
    )


def num_processors(device: torch.device) -> int:
    """Multiprocessors of the device; a handful where kernels are interpreted."""
    if device.type != "cuda":
        return 2
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def launch_options(overlaps: bool) -> dict[str, bool]:
    """How to launch a kernel whose PDL flag is `overlaps`."""
    return {"launch_pdl": True} if overlaps else {}
