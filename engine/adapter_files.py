"""PEFT LoRA folders in and out. What comes in may come from anyone: everything is checked before it is used.

A folder holds adapter_config.json and adapter_model.safetensors. Any rank 1 to 256, any subset of the linear
modules, alpha, rsLoRA and per-module patterns are taken; whatever else PEFT can express is refused by name.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.model import MODULES, ModelConfig, module_shape
from engine.tensor_files import (
    AdapterError,
    DuplicateTensor,
    NotSafetensors,
    TensorSpec,
    TooLarge,
    TooManyTensors,
    WrongShape,
    parse_header,
    read_whole,
    take_header,
)
from engine.weights import module_path

__all__ = [
    "MAX_RANK",
    "META_FILE",
    "AdapterError",
    "DuplicateTensor",
    "LoraModule",
    "LoraWeights",
    "MissingAdapterFile",
    "MissingTensor",
    "NotFinite",
    "NotSafetensors",
    "OtherBase",
    "RankOutOfRange",
    "StoredModule",
    "StoredWeights",
    "TooLarge",
    "TooManyTensors",
    "UnknownTensor",
    "UnsafePath",
    "UnsupportedAdapter",
    "WrongShape",
    "check_base",
    "empty_bytes",
    "read_adapter",
    "read_stored",
    "version_folder",
    "write_adapter",
]  # fmt: skip

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
META_FILE = "attune.json"  # where a version comes from
MAX_RANK = 256
_MAX_CONFIG_BYTES = 1 << 20
_MAX_PATTERNS = 4096
_MAX_FLOAT32 = torch.finfo(torch.float32).max
_PREFIX = "base_model.model."
_TENSOR_NAME = re.compile(
    r"base_model\.model\.model\.layers\.(0|[1-9]\d{0,5})\.(?:self_attn|mlp)\.(\w+)\.lora_([AB])\.weight"
)
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Of each dtype: integers of its size, with a sign and without, and the bits of infinity.
_INTEGERS = {
    torch.float32: (torch.int32, np.uint32, 0x7F80_0000),
    torch.float16: (torch.int16, np.uint16, 0x7C00),
    torch.bfloat16: (torch.int16, np.uint16, 0x7F80),
}
# Fields of adapter_config.json that change nothing of what an adapter computes once it is trained, or that
# are read below. Any other field must be absent, null, false or empty: a feature of a PEFT to come must not
# be ignored silently.
_HARMLESS_FIELDS = frozenset(
    {
        "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "eva_config",
        "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
        "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "peft_type", "peft_version",
        "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules", "task_type",
        "use_rslora",
    }
)  # fmt: skip
# Initialisations that also change the base weights: such an adapter is right only on that changed base.
_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")


class MissingAdapterFile(AdapterError):
    """The folder lacks a file, or the file is not what it should be: `path`."""

    def __init__(self, path: Path, reason: str = "no such file") -> None:
        super().__init__(f"{path.name}: {reason}")
        self.path = path


class UnsupportedAdapter(AdapterError):
    """A PEFT feature that is not served: `field`, `got`."""

    def __init__(self, field: str, expected: str, got: object) -> None:
        super().__init__(f"{CONFIG_FILE}: {field}: expected {expected}, got {got!r:.200}")
        self.field = field
        self.expected = expected
        self.got = got


class UnknownTensor(AdapterError):
    """A tensor that is no LoRA matrix of a linear module of this model: `name`."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name!r:.300}: expected lora_A or lora_B of a linear module of this model")
        self.name = name


class MissingTensor(AdapterError):
    """A matrix that the config or its other half calls for is absent: `name`."""

    def __init__(self, name: str) -> None:
        super().__init__(f"expected a tensor {name}, found none of that name")
        self.name = name


class NotFinite(AdapterError):
    """A tensor holds NaN or infinity: `name`."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name}: expected finite numbers, got NaN or infinity")
        self.name = name


class RankOutOfRange(AdapterError):
    """A rank outside 1 to 256: `got`."""

    def __init__(self, where: str, got: object) -> None:
        super().__init__(f"{where}: expected a rank from 1 to {MAX_RANK}, got {got!r:.100}")
        self.got = got


class OtherBase(AdapterError):
    """The adapter was made for another base model: `expected` and `got`, as hashes."""

    def __init__(self, expected: str, got: object) -> None:
        super().__init__(f"expected an adapter for the base {expected:.12}, got one for {got!r:.100}")
        self.expected = expected
        self.got = got


class UnsafePath(AdapterError):
    """An adapter id, version or folder that could lead out of the adapter root: `path`."""

    def __init__(self, expected: str, got: object) -> None:
        super().__init__(f"expected {expected}, got {got!r:.200}")
        self.got = got


@dataclass(frozen=True, slots=True, eq=False)
class LoraModule:
    """delta = scale * B A of one linear module; scale is alpha / r, or alpha / sqrt(r) for rsLoRA."""

    layer: int
    module: str
    a: Tensor  # [r, in]
    b: Tensor  # [out, r]
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True, slots=True, eq=False)
class LoraWeights:
    """One adapter. Modules are sorted by layer, then in the order of MODULES."""

    modules: tuple[LoraModule, ...]


@dataclass(frozen=True, slots=True)
class StoredModule:
    """Where a module's A [rank, in] and B [out, rank] begin among the numbers of its adapter, row by row."""

    layer: int
    module: str
    rank: int
    scale: float
    a: int
    b: int


@dataclass(frozen=True, slots=True, eq=False)
class StoredWeights:
    """One adapter as a file holds it, its numbers one after the other. Files of one shape share `modules`,
    which are sorted as those of LoraWeights."""

    modules: tuple[StoredModule, ...]
    numbers: Tensor  # [n]

    def matrices(self, config: ModelConfig) -> LoraWeights:
        """Views of the numbers."""
        modules = []
        for m in self.modules:
            out_features, in_features = module_shape(config, m.module)
            a = self.numbers[m.a : m.a + m.rank * in_features].view(m.rank, in_features)
            b = self.numbers[m.b : m.b + m.rank * out_features].view(out_features, m.rank)
            modules.append(LoraModule(m.layer, m.module, a, b, m.scale))
        return LoraWeights(tuple(modules))


def version_folder(root: Path, adapter_id: str, version: int) -> Path:
    """<root>/<adapter id>/<version>. Raises UnsafePath for an id not hex, version 0, a link."""
    if not re.fullmatch(r"[0-9a-f]{1,64}", adapter_id):
        raise UnsafePath("an adapter id of up to 64 hex digits", adapter_id)
    if type(version) is not int or version < 1:
        raise UnsafePath("a version from 1", version)
    folder = root / adapter_id / str(version)
    for path in (folder.parent, folder):
        if path.is_symlink():
            raise UnsafePath("a folder, not a link", str(path))
    return folder


def read_adapter(folder: Path, config: ModelConfig) -> LoraWeights:
    """The adapter in `folder` as float32, checked against the model it is for. Raises AdapterError
    subclasses."""
    stored = read_stored(folder, config)
    return replace(stored, numbers=stored.numbers.float()).matrices(config)


def empty_bytes(count: int) -> Tensor:
    """So many, of any content."""
    return torch.empty(count, dtype=torch.uint8)


def read_stored(
    folder: Path, config: ModelConfig, take: Callable[[int], Tensor] = empty_bytes
) -> StoredWeights:
    """The same in the dtype of the file, or in float32 if it has several, in bytes that `take` gives.

    Little is done in Python, and in few calls: a thread that is to step meanwhile waits for all of it.
    """
    settings, path = _read_small(folder / CONFIG_FILE), folder / WEIGHTS_FILE
    if not path.is_file():
        for pickled in ("adapter_model.bin", "adapter_model.pt"):
            if (folder / pickled).is_file():
                raise NotSafetensors(folder / pickled, "a Python pickle")
        raise MissingAdapterFile(path)
    data_limit = (
        sum(MAX_RANK * sum(module_shape(config, module)) for module in MODULES) * config.num_layers * 4
    )
    header_limit = 4096 + 512 * _most_tensors(config)
    if (size := path.stat().st_size) > header_limit + data_limit:
        raise TooLarge(path.name, header_limit + data_limit, size)
    with path.open("rb", buffering=0) as file:
        header, data_bytes = take_header(path, file, max_header_bytes=header_limit)
        described = _describe(settings, header, data_bytes, config)
        # Read from its first byte to its last: a mapped file is asked for a few pages at a time.
        content = take(data_bytes)
        read_whole(path, file, memoryview(content.numpy().data))
    numbers = described.numbers(content)
    described.check_finite(numbers)
    return StoredWeights(described.modules, numbers)


def check_base(folder: Path, base_hash: str) -> None:
    """Raises OtherBase if META_FILE names another base than this one: here the adapter would change replies
    in ways that nobody has judged. A folder without that file may be for any."""
    try:
        text = (folder / META_FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise MissingAdapterFile(folder / META_FILE, str(error)) from error
    try:
        got = json.loads(text)["base_hash"]
    except (ValueError, KeyError, TypeError) as error:
        raise MissingAdapterFile(folder / META_FILE, "no JSON object that names its base") from error
    if got != base_hash:
        raise OtherBase(base_hash, got)


def write_adapter(
    folder: Path,
    weights: LoraWeights,
    config: ModelConfig,
    *,
    base_model: str,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write `weights` as a folder that PEFT and vLLM open unchanged. Creates `folder`, overwrites its files.

    The scale of every module is kept, expressed as alpha = scale * r.
    """
    if not weights.modules:
        raise MissingTensor(_tensor_name(0, MODULES[0], "A"))
    alphas = {(m.layer, m.module): _tidy(m.scale * m.rank) for m in weights.modules}
    rank = Counter(m.rank for m in weights.modules).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "bias": "none",
        "fan_in_fan_out": False,
        "lora_dropout": 0.0,
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": False,
        "target_modules": _target_modules(weights, config),
        "rank_pattern": {_key(m.layer, m.module): m.rank for m in weights.modules if m.rank != rank},
        "alpha_pattern": {
            _key(layer, module): value for (layer, module), value in alphas.items() if value != alpha
        },
    }
    tensors: dict[str, Tensor] = {}
    for m in weights.modules:
        tensors[_tensor_name(m.layer, m.module, "A")] = m.a.detach().to("cpu", dtype).contiguous()
        tensors[_tensor_name(m.layer, m.module, "B")] = m.b.detach().to("cpu", dtype).contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})


@dataclass(frozen=True, slots=True)
class _Settings:
    """What adapter_config.json says about ranks, scales and targets."""

    rank: int
    alpha: float
    rslora: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    targets: tuple[str, ...] | None  # None: given as a regular expression or not at all
    excluded: tuple[str, ...] | None  # None: given as a regular expression
    layers: tuple[int, ...] | None

    @classmethod
    def parse(cls, content: bytes) -> "_Settings":
        raw = _parse_config(content)
        _refuse_unsupported(raw)
        rank = raw.get("r", 8)
        if not _is_rank(rank):
            raise RankOutOfRange(CONFIG_FILE, rank)
        rank_pattern, alpha_pattern = _pattern(raw, "rank_pattern"), _pattern(raw, "alpha_pattern")
        for value in rank_pattern.values():
            if not _is_rank(value):
                raise RankOutOfRange(f"{CONFIG_FILE}: rank_pattern", value)
        for value in (raw.get("lora_alpha", 8), *alpha_pattern.values()):
            if not _is_number(value):
                raise UnsupportedAdapter("lora_alpha", "a finite number", value)
        return cls(
            rank,
            float(raw.get("lora_alpha", 8)),
            bool(raw.get("use_rslora")),
            rank_pattern,
            alpha_pattern,
            _names(raw.get("target_modules")),
            _names(raw.get("exclude_modules") or []),
            _layer_indexes(raw.get("layers_to_transform")),
        )

    def of(self, layer: int, module: str) -> tuple[int, float]:
        """(rank, scale) of one module; a pattern's first match counts, as in PEFT."""
        key = _key(layer, module)
        rank, alpha = (
            _first_match(self.rank_pattern, key, self.rank),
            _first_match(self.alpha_pattern, key, self.alpha),
        )
        return int(rank), alpha / (math.sqrt(rank) if self.rslora else rank)

    def check_targets(self, pairs: dict[tuple[int, str], dict[str, str]], config: ModelConfig) -> None:
        """Every module the config lists must have its tensors; PEFT would leave one without at its start."""
        if self.targets is None or self.excluded is None:
            return
        for layer in range(config.num_layers):
            if self.layers is not None and layer not in self.layers:
                continue
            for module in MODULES:
                key = _key(layer, module)
                if (
                    _is_named(key, self.targets)
                    and not _is_named(key, self.excluded)
                    and (layer, module) not in pairs
                ):
                    raise MissingTensor(_tensor_name(layer, module, "A"))


def _read_small(path: Path) -> bytes:
    if not path.is_file():
        raise MissingAdapterFile(path)
    if (size := path.stat().st_size) > _MAX_CONFIG_BYTES:
        raise TooLarge(path.name, _MAX_CONFIG_BYTES, size)
    return path.read_bytes()


def _parse_config(content: bytes) -> dict[str, Any]:
    try:
        raw = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise MissingAdapterFile(Path(CONFIG_FILE), f"expected a JSON object ({error})") from error
    if not isinstance(raw, dict):
        raise MissingAdapterFile(Path(CONFIG_FILE), f"expected a JSON object, got a {type(raw).__name__}")
    return raw


def _refuse_unsupported(raw: dict[str, Any]) -> None:
    if raw.get("peft_type", "LORA") != "LORA":
        raise UnsupportedAdapter("peft_type", "LORA", raw["peft_type"])
    if raw.get("bias", "none") != "none":
        raise UnsupportedAdapter("bias", "none", raw["bias"])
    init = raw.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING):
        raise UnsupportedAdapter("init_lora_weights", "one that leaves the base weights as they are", init)
    for field, value in raw.items():
        if value and field not in _HARMLESS_FIELDS:
            raise UnsupportedAdapter(field, "nothing: not served", value)


def _pair_up(specs: dict[str, TensorSpec], config: ModelConfig) -> dict[tuple[int, str], dict[str, str]]:
    """{(layer, module): {"A": tensor name, "B": tensor name}}, complete and of known names."""
    pairs: dict[tuple[int, str], dict[str, str]] = {}
    for name, spec in specs.items():
        match = _TENSOR_NAME.fullmatch(name)
        if match is None or match[2] not in MODULES or int(match[1]) >= config.num_layers:
            raise UnknownTensor(name)
        layer, module, half = int(match[1]), match[2], match[3]
        if name != _tensor_name(layer, module, half):  # mlp.q_proj
            raise UnknownTensor(name)
        if spec.dtype not in _DTYPES:
            raise UnsupportedAdapter(name, " or ".join(_DTYPES), spec.dtype)
        pairs.setdefault((layer, module), {})[half] = name
    if not pairs:
        raise MissingTensor(_tensor_name(0, MODULES[0], "A"))
    for (layer, module), halves in pairs.items():
        for half in "AB":
            if half not in halves:
                raise MissingTensor(_tensor_name(layer, module, half))
    return dict(sorted(pairs.items(), key=lambda item: (item[0][0], MODULES.index(item[0][1]))))


@dataclass(frozen=True, slots=True)
class _Described:
    """What the header and the config of a file say, checked: the same for all adapters of one shape."""

    modules: tuple[StoredModule, ...]
    tensors: tuple[tuple[str, TensorSpec], ...]  # as they follow each other
    dtype: torch.dtype | None  # None: several

    def numbers(self, content: Tensor) -> Tensor:
        """The numbers that these bytes are."""
        if self.dtype is not None:
            return content.view(self.dtype)
        parts = [
            content[spec.begin : spec.end].clone().view(_DTYPES[spec.dtype]).float()
            for _, spec in self.tensors
        ]
        return torch.cat(parts)

    def check_finite(self, numbers: Tensor) -> None:
        """Raises NotFinite with the name of the first tensor that holds NaN or infinity."""
        if _is_finite(numbers):
            return
        begin = 0
        for name, spec in self.tensors:
            end = begin + math.prod(spec.shape)
            if not _is_finite(numbers[begin:end]):
                raise NotFinite(name)
            begin = end


@lru_cache(maxsize=64)  # nearly all adapters of a service have one of a few shapes
def _describe(settings: bytes, header: bytes, data_bytes: int, config: ModelConfig) -> _Described:
    known = _Settings.parse(settings)
    specs = parse_header(Path(WEIGHTS_FILE), header, data_bytes, max_tensors=_most_tensors(config))
    pairs = _pair_up(specs, config)
    known.check_targets(pairs, config)
    tensors = tuple(sorted(specs.items(), key=lambda item: (item[1].begin, item[1].end)))
    sizes = [math.prod(spec.shape) for _, spec in tensors]
    begins = {name: begin for (name, _), begin in zip(tensors, accumulate(sizes, initial=0), strict=False)}
    modules = []
    for (layer, module), names in pairs.items():
        rank, scale = known.of(layer, module)
        out_features, in_features = module_shape(config, module)
        for half, expected in (("A", (rank, in_features)), ("B", (out_features, rank))):
            if specs[names[half]].shape != expected:
                raise WrongShape(WEIGHTS_FILE, names[half], expected, specs[names[half]].shape)
        modules.append(StoredModule(layer, module, rank, scale, begins[names["A"]], begins[names["B"]]))
    dtypes = {spec.dtype for spec in specs.values()}
    return _Described(tuple(modules), tensors, _DTYPES[dtypes.pop()] if len(dtypes) == 1 else None)


def _is_finite(numbers: Tensor) -> bool:
    """Whether none is NaN or infinite.

    As integers, floats of one sign are in the order of their size, and these come last: the largest signed
    integer tells of those above zero, the largest unsigned one of those below. Nothing takes memory here.
    """
    signed, unsigned, infinity = _INTEGERS[numbers.dtype]
    bits = numbers.view(signed).numpy()
    negative = infinity | 1 << (8 * numbers.element_size() - 1)
    return not len(bits) or (int(bits.max()) < infinity and int(bits.view(unsigned).max()) < negative)


def _most_tensors(config: ModelConfig) -> int:
    return 2 * len(MODULES) * config.num_layers


def _target_modules(weights: LoraWeights, config: ModelConfig) -> list[str]:
    """Short names when each module is in all layers or in none, full ones otherwise."""
    layers_with = Counter(m.module for m in weights.modules)
    if all(count == config.num_layers for count in layers_with.values()):
        return sorted(layers_with)
    return [_key(m.layer, m.module) for m in weights.modules]


def _tidy(alpha: float) -> float:
    """16 for 15.9999999: scale = alpha / r came from a whole number nearly always."""
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-9) else alpha


def _key(layer: int, module: str) -> str:
    return f"model.layers.{layer}.{module_path(module)}"


def _tensor_name(layer: int, module: str, half: str) -> str:
    return f"{_PREFIX}{_key(layer, module)}.lora_{half}.weight"


def _is_named(key: str, names: tuple[str, ...]) -> bool:
    return any(key == name or key.endswith("." + name) for name in names)


def _is_rank(value: object) -> bool:
    return type(value) is int and 1 <= value <= MAX_RANK


def _is_number(value: object) -> bool:
    """Whether it is a number that float32, in which scales are applied, can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _MAX_FLOAT32


def _names(value: Any) -> tuple[str, ...] | None:
    """A list of module names, or None for a regular expression: then the tensors alone say what is there."""
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return tuple(value)
    if value is None or isinstance(value, str):
        return None
    raise UnsupportedAdapter("target_modules", "names or a regular expression", value)


def _layer_indexes(value: Any) -> tuple[int, ...] | None:
    if value is None or value == []:
        return None
    indexes = value if isinstance(value, list) else [value]
    if not all(type(index) is int and index >= 0 for index in indexes):
        raise UnsupportedAdapter("layers_to_transform", "layer numbers", value)
    return tuple(indexes)


def _pattern(raw: dict[str, Any], field: str) -> dict[str, Any]:
    value = raw.get(field) or {}
    if not isinstance(value, dict) or len(value) > _MAX_PATTERNS:
        raise UnsupportedAdapter(field, f"an object of at most {_MAX_PATTERNS} patterns", value)
    for pattern in value:
        _check_pattern(field, pattern)
    return value


def _check_pattern(field: str, pattern: str) -> None:
    """Keys are regular expressions from anyone: only such as cannot run for long on a module's name."""
    repeats = len(re.findall(r"[*+?{]", pattern))
    if len(pattern) > 300 or repeats > 2 or re.search(r"\)\s*[*+?{]|\\\d|\(\?", pattern):
        raise UnsupportedAdapter(field, "a name, or an expression with at most two plain repeats", pattern)
    try:
        re.compile(pattern)
    except re.error as error:
        raise UnsupportedAdapter(field, f"a regular expression ({error})", pattern) from error


def _first_match(patterns: dict[str, Any], key: str, default: float) -> float:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", key):
            return float(value)
    return default
