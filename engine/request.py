"""What is asked of the engine and what it answers: requests, sequences and events.

Everything here is a value apart from `Sequence`, which the engine owns and changes as a reply grows. Of
chunks and token events there is one per row and step: named tuples, which are made in half the time.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

FinishReason = Literal["stop", "length", "cancelled", "error"]
AdapterTier = Literal["device", "host", "disk", "none"]

UNKNOWN = -1  # the token being drawn by a step that has been launched

# Samplers hold top_p as float32. What that rounds to 0 would keep no token; this keeps the likeliest alone.
_LEAST_TOP_P = 1e-37
_INT32_MAX = 2**31 - 1
_INT64_MIN, _INT64_MAX = -(2**63), 2**63 - 1


class InvalidRequest(ValueError):
    """A field of a request is out of its range: `field`, `expected`, `got`."""

    code = "invalid_request"

    def __init__(self, field: str, expected: str, got: object) -> None:
        super().__init__(f"{field}: expected {expected}, got {got!r}")
        self.field = field
        self.expected = expected
        self.got = got


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """One immutable version of one adapter. Version 0, the bare base, is written as no adapter at all."""

    id: str
    version: int

    def __post_init__(self) -> None:
        if not self.id:
            raise InvalidRequest("adapter.id", "a non-empty string", self.id)
        if self.version < 1:
            raise InvalidRequest("adapter.version", "an integer from 1", self.version)

    def __str__(self) -> str:
        return f"{self.id}@{self.version}"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn. Temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 filter nothing.

    The draw for the token at output index i depends on (seed, i) and the logits alone. Generation stops
    before `stop_token_ids` and, unless `ignore_eos`, before the model's own end tokens: the stopping token
    is not output.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    max_tokens: int = 256
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature <= 100.0:  # a NaN fails this comparison too
            raise InvalidRequest("temperature", "0 to 100", self.temperature)
        if not 0.0 < self.top_p <= 1.0:
            raise InvalidRequest("top_p", "above 0, at most 1", self.top_p)
        if not 0 <= self.top_k <= _INT32_MAX:
            raise InvalidRequest("top_k", f"0 (off) to {_INT32_MAX}", self.top_k)
        if not 0.0 <= self.min_p <= 1.0:
            raise InvalidRequest("min_p", "0 to 1", self.min_p)
        if not _INT64_MIN <= self.seed <= _INT64_MAX:
            raise InvalidRequest("seed", "a 64-bit signed integer", self.seed)
        if self.max_tokens < 1:
            raise InvalidRequest("max_tokens", "1 or more", self.max_tokens)


@dataclass(frozen=True, slots=True)
class Request:
    """One reply to write: a prompt, how to sample, whose adapter, and whose turn it is in the queue.

    `generated` holds output tokens that an earlier engine already wrote: they count as output, and the
    continuation is the one the earlier engine would have written. `user_key` is what fairness is counted by;
    `priority` orders a user's own requests among each other (higher first).
    """

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    adapter: AdapterRef | None = None
    user_key: str = ""
    priority: int = 0
    generated: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.id:
            raise InvalidRequest("id", "a non-empty string", self.id)
        if not self.prompt:
            raise InvalidRequest("prompt", "at least one token", self.prompt)
        if len(self.generated) > self.sampling.max_tokens:
            raise InvalidRequest(
                "generated", f"at most max_tokens = {self.sampling.max_tokens} tokens", len(self.generated)
            )


@dataclass(eq=False, slots=True)
class Sequence:
    """A request on its way through the engine. Only the engine changes it.

    Positions 0 … num_computed - 1 have their K/V in `blocks`, or get it from a step that has been launched;
    the rest of `tokens` is still to be run. Tokens from num_known on are UNKNOWN: being drawn right now.
    """

    request: Request
    tokens: list[int] = field(init=False)  # prompt, then output
    num_prompt: int = field(init=False)
    num_known: int = field(init=False)
    most_tokens: int = field(init=False)  # prompt and max_tokens together
    drawn_by: tuple[float, float, int, float, int] = field(init=False)  # the columns of its draws
    num_computed: int = 0
    blocks: tuple[int, ...] = ()  # slab of each block of positions, in order
    block_keys: list[bytes] = field(default_factory=list)  # prefix keys of whole blocks, as far as known
    # A packing.ResidentAdapter while its pages are on the device and pinned for this sequence, else None.
    # `packing` imports this file for AdapterRef, so the type cannot be named here without a circle.
    resident: Any = None
    result_index: int = -1  # of an UNKNOWN last token: which draw of its step gives it
    is_over: bool = False  # finished, failed or cancelled; what a step still brings for it is dropped
    # The scheduler's notes
    number: int = 0  # order of arrival
    num_registered: int = 0  # leading blocks that the prefix cache knows, or knows others for
    is_arriving: bool = False  # its adapter is being copied to the device
    preemptions: int = 0
    cached_tokens: int = 0  # found in the prefix cache when first admitted
    arrived_at: float = 0.0
    adapter_tier: AdapterTier = "none"  # where the adapter was on arrival
    adapter_ready_at: float | None = None
    admitted_at: float | None = None  # first time
    first_token_at: float | None = None

    def __post_init__(self) -> None:
        self.tokens = [*self.request.prompt, *self.request.generated]
        self.num_prompt = len(self.request.prompt)
        self.num_known = len(self.tokens)
        sampling = self.request.sampling
        self.most_tokens = self.num_prompt + sampling.max_tokens
        top_p = max(sampling.top_p, _LEAST_TOP_P)
        self.drawn_by = (sampling.temperature, top_p, sampling.top_k, sampling.min_p, sampling.seed)

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_output(self) -> int:
        """Output tokens so far; also the output index of the next token, which the sampler draws by."""
        return len(self.tokens) - self.num_prompt

    @property
    def labels(self) -> frozenset[str]:
        """Whose K/V this is; `forget` finds cached blocks by any of these."""
        adapter = self.request.adapter
        return frozenset(filter(None, (adapter.id if adapter else "", self.request.user_key)))

    def drop_unknown(self) -> None:
        del self.tokens[self.num_known :]

    @property
    def num_pending(self) -> int:
        """Tokens whose K/V is not computed yet; 1 while decoding."""
        return len(self.tokens) - self.num_computed


class Chunk(NamedTuple):
    """The part of one sequence that runs in a step: positions start … start + length - 1.

    `wants_token`: these are the last tokens known, so their end is sampled from.
    """

    sequence: Sequence
    start: int
    length: int
    wants_token: bool


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a finished reply. The K/V of `cached_tokens` of its prompt came from the prefix cache."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Where a reply waited, in seconds, and where its adapter was found when it was asked for."""

    queued_s: float = 0.0
    adapter_load_s: float = 0.0
    adapter_tier: AdapterTier = "none"
    first_token_s: float | None = None  # from submit to the first new token


class TokensEvent(NamedTuple):
    """New output of one request; `first_index` is the output index of `token_ids[0]`."""

    request_id: str
    token_ids: tuple[int, ...]
    first_index: int


@dataclass(frozen=True, slots=True)
class FinishedEvent:
    """The last event of a request. `error_code` and `message` are set exactly when the reason is "error"."""

    request_id: str
    reason: FinishReason
    usage: Usage
    timings: Timings = field(default_factory=Timings)
    error_code: str | None = None
    message: str | None = None


Event = TokensEvent | FinishedEvent


@dataclass(frozen=True, slots=True)
class Forgotten:
    """What `Engine.forget` removed of one adapter, all its versions together."""

    device_slabs: int = 0
    host_bytes: int = 0
    kv_blocks: int = 0
    cancelled_requests: int = 0
