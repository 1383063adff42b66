"""EngineConfig: every number the engine is tuned by. Frozen, validated once, unknown keys are errors."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
DTYPES = ("float32", "bfloat16", "float16")
# What an engine's process is started with, unless its environment says otherwise: torch touches the pages of
# host memory with several threads before they are pinned, 4.5 GB/s where cudaHostAlloc gave 1.8. Where the
# older name PYTORCH_CUDA_ALLOC_CONF is set too, torch reads that alone: ours must not hide someone's own.
PINNING = {"PYTORCH_ALLOC_CONF": "pinned_use_cuda_host_register:True,pinned_num_register_threads:8"}


class ConfigError(ValueError):
    """A setting is unknown or out of its range: `key`, `expected`, `got`."""

    def __init__(self, key: str, expected: str, got: object) -> None:
        super().__init__(f"{key}: expected {expected}, got {got!r}")
        self.key = key
        self.expected = expected
        self.got = got


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Settings of one engine process. Sizes in bytes, times in seconds."""

    # Memory
    arena_bytes: int = GIB  # K/V and adapters together, on the device
    block_size: int | None = None  # tokens per K/V block; None: 16, or what an adapter's widest tile needs
    host_cache_bytes: int = GIB  # packed adapters kept in host memory
    prefix_cache: bool = True
    # A step
    max_tokens_per_step: int = 512  # prefill chunks and decodes together
    max_running: int = 256  # replies in one step; never more than max_tokens_per_step
    max_adapter_bytes_per_step: int | None = None  # of distinct adapters in a step; None: no bound
    # The same while at least half of `max_running` decode: as many as a GPU multiplies at its best pace.
    # Prompts get as many as there are replies even so, and more if it would take them more than a few steps.
    max_tokens_per_busy_step: int = 512
    max_waiting: int = 4096  # requests in the queue, beyond which submit refuses
    # Fairness: the user who has had the fewest tokens goes first; a second of waiting outweighs this many
    # tokens
    ageing_tokens_per_s: float = 50.0
    # Adapters
    load_threads: int | None = None  # readers of adapter files, beside the step; None: 2, for a GPU 8
    failed_load_retry_s: float = 1.0  # a load that failed is answered with the same error for this long
    # Device
    device: str = "cpu"
    dtype: str = "float32"
    threads: int | None = None  # torch threads on the CPU; None: torch's own choice
    # Socket
    disconnect_grace_s: float = 5.0  # replies of a lost gateway run on for this long, then are cancelled
    max_frame_bytes: int = 16 * MIB
    max_unsent_bytes: int = 16 * MIB  # a connection that lets more than this pile up is closed

    def __post_init__(self) -> None:
        for key in (
            "arena_bytes",
            "max_tokens_per_step",
            "max_tokens_per_busy_step",
            "max_running",
            "max_waiting",
            "max_frame_bytes",
            "max_unsent_bytes",
        ):
            self._require(key, 1)
        self._require("host_cache_bytes", 0)
        for key in ("block_size", "threads", "load_threads", "max_adapter_bytes_per_step"):
            if getattr(self, key) is not None:
                self._require(key, 1)
        for key in ("ageing_tokens_per_s", "failed_load_retry_s", "disconnect_grace_s"):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
                raise ConfigError(key, "a number, 0 or more", value)
        if not isinstance(self.prefix_cache, bool):
            raise ConfigError("prefix_cache", "true or false", self.prefix_cache)
        if self.dtype not in DTYPES:
            raise ConfigError("dtype", f"one of {', '.join(DTYPES)}", self.dtype)
        if not isinstance(self.device, str) or not self.device:
            raise ConfigError("device", "a torch device such as cpu or cuda:0", self.device)

    def _require(self, key: str, least: int) -> None:
        value = getattr(self, key)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(key, f"an integer, {least} or more", value)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Build from parsed settings; raises ConfigError for a key that does not exist."""
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                raise ConfigError(key, f"one of {', '.join(known)}", values[key])
        return cls(**values)
