"""A Hugging Face model folder → ModelConfig and Decoder, or an error that says what is wrong with it."""

import hashlib
import json
import math
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.model import GROUP_MODULES, GROUPS, Decoder, Layer, ModelConfig, RopeConfig, module_shape
from engine.tensor_files import (
    DTYPE_BYTES,
    ModelError,
    NotSafetensors,
    TensorSpec,
    WrongShape,
    data_start,
    read_header,
    read_whole,
)

__all__ = [
    "LoadedModel", "MissingFile", "MissingShard", "MissingTensor", "ModelError", "NotSafetensors",
    "UnexpectedTensor", "UnknownArchitecture", "UnsupportedModel", "WrongShape", "load_model",
    "loaded_config", "read_config",
]  # fmt: skip

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_FLOAT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# What transformers takes where a config names none. Llama: as many K/V heads as there are heads.
_KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}
_POSITIONS = {"llama": 2048, "mistral": 131_072, "qwen2": 32_768, "qwen3": 32_768}
_STAGE_BYTES = 32 << 20
_LOAD_THREADS = min(16, os.cpu_count() or 1)
# Derived values that old exporters stored; the model computes them.
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)
_EMBED, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


class UnknownArchitecture(ModelError):
    """The folder's model is none of the served families: `architecture`."""

    def __init__(self, architecture: str) -> None:
        known = ", ".join(ARCHITECTURES)
        super().__init__(f"expected one of {known}, got {architecture}")
        self.architecture = architecture


class UnsupportedModel(ModelError):
    """A served family with a feature that is not: `field`, `expected`, `got`."""

    def __init__(self, field: str, expected: object, got: object) -> None:
        super().__init__(f"config.json: {field}: expected {expected}, got {got!r}")
        self.field = field
        self.expected = expected
        self.got = got


class MissingFile(ModelError):
    """The folder lacks a file every model has: `path`."""

    def __init__(self, path: Path, reason: str = "no such file") -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path


class MissingShard(ModelError):
    """The index names a shard that is not in the folder: `path`."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"expected the shard {path.name} beside its index, found no such file in {path.parent}"
        )
        self.path = path


class MissingTensor(ModelError):
    """No file holds this tensor: `name`."""

    def __init__(self, name: str) -> None:
        super().__init__(f"expected a tensor {name}, found none of that name")
        self.name = name


class UnexpectedTensor(ModelError):
    """A tensor this family does not have; leaving it out would compute something else: `name`."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name}: this architecture has no such tensor")
        self.name = name


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run. `base_hash` names config and weights, however they are sharded or loaded."""

    config: ModelConfig
    decoder: Decoder
    base_hash: str


def load_model(
    folder: Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> LoadedModel:
    """Load `folder` (config.json and safetensors, sharded or not). Raises ModelError subclasses."""
    config = read_config(folder)
    files = _tensor_files(folder)
    config = _tied_as_stored(config, files)
    with torch.device("meta"):
        decoder = Decoder(config).to(dtype)
    decoder.to_empty(device=device)
    if config.tie_word_embeddings:
        decoder.head.weight = decoder.embed  # to_empty gave each its own memory
    targets = _targets(config, decoder)
    names = list(_checked_names(targets, files))
    digests = _load_tensors([(*files[name], targets[name]) for name in names])
    digest = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode())
    for name, of_tensor in zip(names, digests, strict=True):
        spec = files[name][1]
        digest.update(f"{name} {spec.dtype} {spec.shape}".encode() + of_tensor)
    return LoadedModel(config, decoder.eval(), digest.hexdigest())


def loaded_config(folder: Path) -> ModelConfig:
    """The config that `load_model` gives: `read_config`'s, and tied only if what is stored is."""
    return _tied_as_stored(read_config(folder), _tensor_files(folder))


def _tied_as_stored(config: ModelConfig, files: dict[str, tuple[Path, TensorSpec]]) -> ModelConfig:
    """The config of a model said to be tied, as transformers takes it: whoever stores a shared tensor once
    may do so under the head's name, and a head that is another than the embedding was trained apart from it.
    """
    if not config.tie_word_embeddings or _HEAD not in files:
        return config
    embed = files.setdefault(_EMBED, files[_HEAD])
    is_one = embed == files[_HEAD] or torch.equal(_stored(*embed), _stored(*files[_HEAD]))
    return replace(config, tie_word_embeddings=is_one)


def _stored(path: Path, spec: TensorSpec) -> Tensor:
    """The bytes of a tensor, in the file itself, mapped into memory."""
    with path.open("rb", buffering=0) as file:
        begin = data_start(file) + spec.begin
    content = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    return content[begin : begin + spec.end - spec.begin]


def _load_tensors(wanted: list[tuple[Path, TensorSpec, Tensor]]) -> list[bytes]:
    """Read each tensor of a file into its target and return the SHA-256 of its bytes, many at once.

    Each thread needs no more than one stage: a part is read, hashed, and copied on from there.
    """
    stages = threading.local()

    def load(one: tuple[Path, TensorSpec, Tensor]) -> bytes:
        path, spec, target = one
        is_cuda = target.device.type == "cuda"
        if not hasattr(stages, "stage"):
            stages.stage = torch.empty(_STAGE_BYTES, dtype=torch.uint8, pin_memory=is_cuda)
            stages.stream = torch.cuda.Stream(target.device) if is_cuda else None
        digest, place, size = hashlib.sha256(), target.view(-1), DTYPE_BYTES[spec.dtype]
        with path.open("rb", buffering=0) as file, torch.cuda.stream(stages.stream):
            file.seek(data_start(file) + spec.begin)
            for begin in range(0, spec.end - spec.begin, _STAGE_BYTES):
                part = stages.stage[: min(_STAGE_BYTES, spec.end - spec.begin - begin)]
                content = memoryview(part.numpy())
                read_whole(path, file, content)
                digest.update(content)
                numbers = part.view(_FLOAT_DTYPES[spec.dtype])
                place[begin // size : (begin + len(part)) // size].copy_(numbers, non_blocking=True)
                if is_cuda:
                    stages.stream.synchronize()
        return digest.digest()

    # The largest first, or a thread would begin with one when the others are done.
    order = sorted(range(len(wanted)), key=lambda index: wanted[index][1].begin - wanted[index][1].end)
    with ThreadPoolExecutor(_LOAD_THREADS, thread_name_prefix="weights") as pool:
        found = dict(zip(order, pool.map(load, [wanted[index] for index in order]), strict=True))
    return [found[index] for index in range(len(wanted))]


def read_config(folder: Path) -> ModelConfig:
    """ModelConfig from config.json and generation_config.json. Raises ModelError subclasses."""
    raw = _read_json(folder / "config.json")
    architecture = _architecture(raw)
    family = ARCHITECTURES.get(architecture)
    if family is None:
        raise UnknownArchitecture(architecture)
    _refuse_unsupported(raw, family)
    hidden, heads = _size(raw, "hidden_size"), _size(raw, "num_attention_heads")
    layers = _size(raw, "num_hidden_layers")
    default_head_dim = 128 if family == "qwen3" else hidden // heads
    default_kv_heads = heads if "num_key_value_heads" in raw else _KV_HEADS.get(family, heads)
    window, sliding_layers = _sliding(raw, family, layers)
    config = ModelConfig(
        architecture=architecture,
        vocab_size=_size(raw, "vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=_size(raw, "num_key_value_heads", default_kv_heads),
        head_dim=_size(raw, "head_dim", default_head_dim),
        intermediate_size=_size(raw, "intermediate_size"),
        rms_norm_eps=_number(raw, "rms_norm_eps", 1e-6),
        rope=_rope(raw, family),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        sliding_window=window,
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        max_position_embeddings=_size(raw, "max_position_embeddings", _POSITIONS[family]),
        bos_token_id=next(iter(_token_ids(folder / "config.json", raw, "bos_token_id")), None),
        eos_token_ids=_eos_token_ids(folder, raw),
        sliding_layers=sliding_layers,
    )
    if config.num_heads % config.num_kv_heads:
        raise UnsupportedModel("num_key_value_heads", f"a divisor of {config.num_heads}", config.num_kv_heads)
    if config.head_dim % 2:
        raise UnsupportedModel("head_dim", "an even number", config.head_dim)
    return config


def _architecture(raw: dict[str, Any]) -> str:
    """The one that is named, else that of the family, by which transformers goes."""
    if named := raw.get("architectures"):
        return str(named[0])
    kind = raw.get("model_type", "none named")
    return next((name for name, family in ARCHITECTURES.items() if family == kind), str(kind))


def _refuse_unsupported(raw: dict[str, Any], family: str) -> None:
    expected = {"hidden_act": "silu", "mlp_bias": False, "quantization_config": None}
    if raw.get("hidden_act") == "swish":  # another name of silu
        del expected["hidden_act"]
    if family != "qwen2":  # its bias on q, k and v needs no flag
        expected["attention_bias"] = False
    for field, value in expected.items():
        if raw.get(field, value) != value:
            raise UnsupportedModel(field, value, raw[field])


def _rope(raw: dict[str, Any], family: str) -> RopeConfig:
    # transformers 5 writes rope_parameters; before, rope_theta stood beside rope_scaling. Where someone has
    # added the old one to a new file, as model cards say to, transformers takes that alone.
    parameters = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(parameters, dict):
        raise UnsupportedModel("rope_parameters", "an object", parameters)
    theta = _number(parameters, "rope_theta", _number(raw, "rope_theta", 10_000.0))
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    rotated = parameters.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    if rotated != 1.0:
        raise UnsupportedModel("partial_rotary_factor", 1.0, rotated)
    if kind == "default":
        return RopeConfig(theta)
    if kind == "linear":
        return RopeConfig(theta, "linear", _number(parameters, "factor"))
    if kind == "llama3":
        return RopeConfig(
            theta,
            "llama3",
            _number(parameters, "factor"),
            _number(parameters, "low_freq_factor"),
            _number(parameters, "high_freq_factor"),
            # transformers reads it beside the others, too, and takes that first.
            _size(
                parameters | raw,
                "original_max_position_embeddings",
                _size(raw, "max_position_embeddings", _POSITIONS[family]),
            ),
        )
    raise UnsupportedModel("rope_type", "default, linear or llama3", kind)


def _sliding(raw: dict[str, Any], family: str, layers: int) -> tuple[int | None, tuple[int, ...]]:
    """(window, layers it applies to): those named, else all of Mistral, of Qwen from max_window_layers on.

    A Mistral that names its layers is what transformers calls Ministral, from this very file.
    """
    used = family == "mistral" or (family.startswith("qwen") and raw.get("use_sliding_window", False))
    if not used or raw.get("sliding_window", 4096) is None:
        return None, ()
    window = _size(raw, "sliding_window", 4096)  # which transformers takes, too, where none is named
    types = raw.get("layer_types")
    if types is None and family == "mistral":
        return window, tuple(range(layers))
    if types is None:
        first = raw.get("max_window_layers", 28)
        if type(first) is not int or first < 0:
            raise UnsupportedModel("max_window_layers", "an integer, 0 or more", first)
        return window, tuple(range(min(first, layers), layers))
    if len(types) != layers or not set(types) <= {"sliding_attention", "full_attention"}:
        raise UnsupportedModel("layer_types", f"{layers} of sliding_attention, full_attention", types)
    return window, tuple(index for index, kind in enumerate(types) if kind == "sliding_attention")


def _size(raw: dict[str, Any], field: str, default: int | None = None) -> int:
    value = raw.get(field)
    if value is None and default is not None:
        return default
    if type(value) is not int or value < 1:
        raise UnsupportedModel(field, "a positive integer", value)
    return value


def _number(raw: dict[str, Any], field: str, default: float | None = None) -> float:
    value: Any = raw.get(field)
    if value is None and default is not None:
        return default
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise UnsupportedModel(field, "a finite number above 0", value)
    return float(value)


def _token_ids(path: Path, raw: dict[str, Any], field: str) -> list[int]:
    value = raw.get(field)
    if value is None:
        return []
    ids = value if isinstance(value, list) else [value]
    if not all(type(token_id) is int for token_id in ids):
        raise MissingFile(path, f"{field}: expected a token's id or a list of them, got {value!r}")
    return ids


def _eos_token_ids(folder: Path, raw: dict[str, Any]) -> tuple[int, ...]:
    """The end tokens of both files: chat models add their end of turn in generation_config.json."""
    found = _token_ids(folder / "config.json", raw, "eos_token_id")
    generation = folder / "generation_config.json"
    if generation.exists():
        found = found + _token_ids(generation, _read_json(generation), "eos_token_id")
    return tuple(dict.fromkeys(found))


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise MissingFile(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise MissingFile(path, f"expected a JSON object ({error})") from error
    if not isinstance(value, dict):
        raise MissingFile(path, f"expected a JSON object, got a {type(value).__name__}")
    return value


def _tensor_files(folder: Path) -> dict[str, tuple[Path, TensorSpec]]:
    """Each tensor's file and header entry, from the single file or from the index and its shards.

    The file counts where both are: transformers leaves an old index behind when it saves to a folder again.
    """
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file():
        return {name: (single, spec) for name, spec in read_header(single).items()}
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise MissingFile(index, "expected an object weight_map")
        shards: dict[str, dict[str, TensorSpec]] = {}
        files: dict[str, tuple[Path, TensorSpec]] = {}
        for name, shard in weight_map.items():
            path = folder / Path(str(shard)).name  # a shard lies beside its index, whatever the index says
            if shard not in shards:
                if not path.is_file():
                    raise MissingShard(path)
                shards[shard] = read_header(path)
            if name not in shards[shard]:
                raise MissingTensor(f"{name} in {shard}")
            files[name] = (path, shards[shard][name])
        return files
    for pattern in ("*.bin", "*.pt", "*.pth"):
        for path in sorted(folder.glob(pattern)):
            raise NotSafetensors(path, "a Python pickle")
    raise MissingFile(single)


def _checked_names(targets: dict[str, Tensor], files: dict[str, tuple[Path, TensorSpec]]) -> Iterator[str]:
    """The names to load, sorted, after comparing what is there with what the model has."""
    for name, (path, spec) in files.items():
        if name.endswith(_IGNORED_SUFFIXES):
            continue
        if name not in targets:
            if name == _HEAD:  # a tied model may store its embedding twice
                continue
            raise UnexpectedTensor(name)
        if spec.dtype not in _FLOAT_DTYPES:
            raise UnsupportedModel(name, " or ".join(_FLOAT_DTYPES), spec.dtype)
        expected = tuple(targets[name].shape)
        if spec.shape != expected:
            raise WrongShape(path.name, name, expected, spec.shape)
    for name in targets:
        if name not in files:
            raise MissingTensor(name)
    return iter(sorted(targets))


def _targets(config: ModelConfig, decoder: Decoder) -> dict[str, Tensor]:
    """Views into the decoder's fused parameters by Hugging Face tensor name."""
    targets: dict[str, Tensor] = {
        _EMBED: decoder.embed,
        "model.norm.weight": decoder.norm.weight,
    }
    if not config.tie_word_embeddings:
        targets[_HEAD] = decoder.head.weight
    for index, layer in enumerate(decoder.layers):
        assert isinstance(layer, Layer)
        prefix = f"model.layers.{index}."
        targets[prefix + "input_layernorm.weight"] = layer.input_norm.weight
        targets[prefix + "post_attention_layernorm.weight"] = layer.post_norm.weight
        if layer.q_norm is not None and layer.k_norm is not None:
            targets[prefix + "self_attn.q_norm.weight"] = layer.q_norm.weight
            targets[prefix + "self_attn.k_norm.weight"] = layer.k_norm.weight
        for group in GROUPS:
            projection = getattr(layer, group)
            begin = 0
            for module in GROUP_MODULES[group]:
                end = begin + module_shape(config, module)[0]
                path = prefix + module_path(module)
                targets[path + ".weight"] = projection.weight[begin:end]
                if projection.bias is not None:
                    targets[path + ".bias"] = projection.bias[begin:end]
                begin = end
    return {name: tensor.detach() for name, tensor in targets.items()}


def module_path(module: str) -> str:
    """Where a linear module sits in its layer: self_attn.q_proj, mlp.up_proj, …"""
    return ("self_attn." if module in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp.") + module
