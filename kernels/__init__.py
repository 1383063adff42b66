"""The public ops. Every device runs the reference so far; faster kernels come in behind these names."""

from kernels.reference import (
    RANK_TILE,
    PackedLinear,
    PackedNorm,
    attend_one,
    gated_activation,
    lane_attention,
    lora_pages,
    paged_attention,
    rms_norm,
    rope_angles,
    rotary,
    write_kv,
    write_kv_all_layers,
)

# Another package on the public index is called `kernels`; transformers asks for its version
# when it finds the name on the path, and fails on a missing one. Zero makes it look elsewhere.
__version__ = "0.0.0"

__all__ = [
    "RANK_TILE",
    "PackedLinear",
    "PackedNorm",
    "attend_one",
    "gated_activation",
    "lane_attention",
    "lora_pages",
    "paged_attention",
    "rms_norm",
    "rope_angles",
    "rotary",
    "write_kv",
    "write_kv_all_layers",
]
