"""PEFT folders: what PEFT writes is read, what we write PEFT opens, everything else is refused by name."""

import itertools
import json
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine import adapter_files
from engine.adapter_files import (
    AdapterError,
    DuplicateTensor,
    LoraModule,
    LoraWeights,
    MissingAdapterFile,
    MissingTensor,
    NotFinite,
    NotSafetensors,
    RankOutOfRange,
    TooLarge,
    TooManyTensors,
    UnknownTensor,
    UnsafePath,
    UnsupportedAdapter,
    WrongShape,
    read_adapter,
    read_stored,
    version_folder,
    write_adapter,
)
from engine.host_memory import Scratch
from engine.model import MODULES, ModelConfig, module_shape
from engine.tensor_files import take_header
from engine.weights import module_path, read_config
from tests.tiny_models import FAMILIES, VOCAB, save_random

# PEFT asks transformers for a property that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

PREFIX = "base_model.model.model.layers."


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_random(folder, FAMILIES["llama3"]())
    return folder


@pytest.fixture(scope="module")
def config(base: Path) -> ModelConfig:
    return read_config(base)


def random_weights(config: ModelConfig, ranks: dict[tuple[int, str], int], scale: float = 2.0) -> LoraWeights:
    generator = torch.Generator().manual_seed(5)
    modules = []
    for (layer, module), rank in sorted(
        ranks.items(), key=lambda item: (item[0][0], MODULES.index(item[0][1]))
    ):
        out_features, in_features = module_shape(config, module)
        a = torch.randn(rank, in_features, generator=generator)
        b = torch.randn(out_features, rank, generator=generator)
        modules.append(LoraModule(layer, module, a, b, scale))
    return LoraWeights(tuple(modules))


def all_modules(config: ModelConfig, rank: int = 4) -> dict[tuple[int, str], int]:
    return {(layer, module): rank for layer in range(config.num_layers) for module in MODULES}


@pytest.fixture
def folder(tmp_path: Path, config: ModelConfig) -> Path:
    """A good adapter of rank 4 on all modules, for a test to spoil."""
    write_adapter(tmp_path / "a", random_weights(config, all_modules(config)), config, base_model="tiny")
    return tmp_path / "a"


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def assert_equal(a: LoraWeights, b: LoraWeights) -> None:
    assert len(a.modules) == len(b.modules)
    for x, y in zip(a.modules, b.modules, strict=True):
        assert (x.layer, x.module, x.rank) == (y.layer, y.module, y.rank)
        assert torch.equal(x.a, y.a)
        assert torch.equal(x.b, y.b)
        assert x.scale == pytest.approx(y.scale, rel=1e-12)


@pytest.mark.parametrize("uniform", [True, False])
def test_what_is_written_reads_back_equal(tmp_path: Path, config: ModelConfig, uniform: bool) -> None:
    ranks = all_modules(config) if uniform else {(0, "q_proj"): 3, (1, "q_proj"): 8, (2, "down_proj"): 256}
    weights = random_weights(config, ranks, scale=0.3)
    write_adapter(tmp_path, weights, config, base_model="tiny")
    assert_equal(read_adapter(tmp_path, config), weights)


@pytest.mark.parametrize("uniform", [True, False])
def test_what_is_written_computes_the_same_in_peft(
    tmp_path: Path, base: Path, config: ModelConfig, uniform: bool
) -> None:
    ranks = all_modules(config) if uniform else {(0, "q_proj"): 3, (1, "q_proj"): 8, (2, "down_proj"): 16}
    weights = random_weights(config, ranks, scale=0.4)
    write_adapter(tmp_path / "a", weights, config, base_model=str(base))
    ids = torch.randint(0, VOCAB, (1, 12))
    by_hand = save_random(tmp_path / "copy", FAMILIES["llama3"]())
    with torch.no_grad():
        for m in weights.modules:
            layer = by_hand.model.layers[m.layer]
            linear = getattr(layer.self_attn if hasattr(layer.self_attn, m.module) else layer.mlp, m.module)
            linear.weight += m.scale * (m.b @ m.a)
        peft = PeftModel.from_pretrained(
            save_random(tmp_path / "again", FAMILIES["llama3"]()), tmp_path / "a"
        )
        assert (peft(ids).logits - by_hand(ids).logits).abs().max() < 1e-3


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 8, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]},
        {"r": 8, "lora_alpha": 32, "target_modules": "all-linear", "use_rslora": True},
        {"r": 1, "target_modules": r".*\.(up|down)_proj"},
        {"r": 6, "target_modules": ["mlp.up_proj"], "layers_to_transform": [0, 2]},
        {
            "r": 6,
            "target_modules": ["o_proj", "k_proj"],
            "layers_to_transform": 1,
            "layers_pattern": "layers",
        },
        {"r": 6, "target_modules": list(MODULES), "exclude_modules": ["k_proj"]},
        {
            "r": 4,
            "lora_alpha": 12,
            "target_modules": list(MODULES),
            "rank_pattern": {"layers.1.self_attn.q_proj": 9, "k_proj": 2, r".*\.2\.mlp\.up_proj": 5},
            "alpha_pattern": {"q_proj": 1, "up_proj": 40},
        },
    ],
    ids=lambda settings: ",".join(f"{key}={value}" for key, value in settings.items())[:60],
)
def test_what_peft_writes_is_read_with_its_scales(
    tmp_path: Path, base: Path, config: ModelConfig, settings: dict[str, Any]
) -> None:
    model = get_peft_model(
        save_random(tmp_path / "base", FAMILIES["llama3"]()),
        LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings),
    )
    model.save_pretrained(tmp_path / "a")
    read = {(m.layer, m.module): m for m in read_adapter(tmp_path / "a", config).modules}
    seen = 0
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            parts = name.split(".")
            m = read[int(parts[4]), parts[-1]]
            assert torch.equal(m.a, module.lora_A["default"].weight)
            assert torch.equal(m.b, module.lora_B["default"].weight)
            assert m.scale == pytest.approx(module.scaling["default"], rel=1e-12)
            seen += 1
    assert seen == len(read) > 0


@pytest.mark.parametrize(("flag", "scale"), [(1, 2.0), (True, 2.0), (0, 1.0), (None, 1.0)])
def test_a_flag_counts_as_it_does_in_peft(
    folder: Path, config: ModelConfig, flag: object, scale: float
) -> None:
    edit_config(folder, lora_alpha=4, use_rslora=flag)
    assert {m.scale for m in read_adapter(folder, config).modules} == {scale}


def test_modules_come_in_the_order_of_layers_and_of_their_computation(
    folder: Path, config: ModelConfig
) -> None:
    order = [(m.layer, MODULES.index(m.module)) for m in read_adapter(folder, config).modules]
    assert order == sorted(order)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_are_read_as_float32(
    tmp_path: Path, config: ModelConfig, dtype: torch.dtype
) -> None:
    write_adapter(tmp_path, random_weights(config, {(0, "q_proj"): 4}), config, base_model="x", dtype=dtype)
    assert read_adapter(tmp_path, config).modules[0].a.dtype == torch.float32


@pytest.mark.parametrize(
    "change",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"modules_to_save": ["lm_head"]},
        {"peft_type": "IA3"},
        {"trainable_token_indices": [1, 2]},
        {"target_parameters": ["x"]},
        {"layer_replication": [[0, 2]]},
        {"alora_invocation_tokens": [5]},
        {"use_qalora": True},
        {"init_lora_weights": "pissa_niter_16"},
        {"some_feature_of_tomorrow": {"on": 1}},
        {"lora_alpha": "16"},
        {"lora_alpha": float("nan")},
        {"lora_alpha": 10**309},
        {"alpha_pattern": {"q_proj": 1e39}},
        {"target_modules": [3]},
        {"layers_to_transform": ["one"]},
        {"alpha_pattern": {"q_proj": None}},
    ],
    ids=str,
)
def test_a_feature_that_is_not_served_is_refused_by_name(
    folder: Path, config: ModelConfig, change: dict[str, Any]
) -> None:
    edit_config(folder, **change)
    with pytest.raises(UnsupportedAdapter) as caught:
        read_adapter(folder, config)
    assert caught.value.field in {*change, "lora_alpha"}


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+$", "(a|a)*b", "((a{1,9}){1,9}){1,9}", ".*.*.*x", "a" * 400, "(", r"(.)\1", "(?=a)q_proj"],
)
def test_a_pattern_that_could_run_for_ever_is_refused(
    folder: Path, config: ModelConfig, pattern: str
) -> None:
    edit_config(folder, rank_pattern={pattern: 4})
    with pytest.raises(UnsupportedAdapter, match="rank_pattern"):
        read_adapter(folder, config)


@pytest.mark.parametrize("rank", [0, -1, 257, 4.0, "4", True, None])
def test_a_rank_out_of_range_is_refused(folder: Path, config: ModelConfig, rank: object) -> None:
    edit_config(folder, r=rank)
    with pytest.raises(RankOutOfRange):
        read_adapter(folder, config)
    edit_config(folder, r=4, rank_pattern={"q_proj": rank})
    with pytest.raises(RankOutOfRange):
        read_adapter(folder, config)


def test_a_rank_that_differs_from_the_config_is_refused_with_both_shapes(
    folder: Path, config: ModelConfig
) -> None:
    edit_config(folder, r=5)
    with pytest.raises(WrongShape, match=r"\(5, 48\).*\(4, 48\)"):
        read_adapter(folder, config)


def test_an_adapter_for_a_wider_model_is_refused(folder: Path, config: ModelConfig) -> None:
    name = PREFIX + "0.mlp.down_proj.lora_A.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(4, 81)}))
    with pytest.raises(WrongShape, match=r"\(4, 80\).*\(4, 81\)"):
        read_adapter(folder, config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("odd", [False, True])
def test_numbers_may_stay_as_they_are_stored(
    tmp_path: Path, config: ModelConfig, dtype: torch.dtype, odd: bool
) -> None:
    """Whatever the length of the header, by which the numbers may begin at any byte."""
    weights = random_weights(config, all_modules(config))
    write_adapter(tmp_path, weights, config, base_model="base", dtype=dtype)
    if odd:
        path = tmp_path / "adapter_model.safetensors"
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        path.write_bytes((length + 1).to_bytes(8, "little") + raw[8 : 8 + length] + b" " + raw[8 + length :])
    stored, converted = read_stored(tmp_path, config).matrices(config), read_adapter(tmp_path, config)
    for s, c, w in zip(stored.modules, converted.modules, weights.modules, strict=True):
        assert s.a.dtype == s.b.dtype == dtype
        assert torch.equal(s.a, w.a.to(dtype))
        assert torch.equal(s.b, w.b.to(dtype))
        assert torch.equal(c.a, s.a.float())
        assert torch.equal(c.b, s.b.float())


def test_a_file_of_several_dtypes_is_read_as_float32(folder: Path, config: ModelConfig) -> None:
    path = folder / "adapter_model.safetensors"
    kept = load_file(path)
    kinds = itertools.cycle((torch.bfloat16, torch.float32, torch.float16))
    tensors = {name: tensor.to(next(kinds), copy=True) for name, tensor in kept.items()}
    header, parts, end = {}, [], 0
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    for name, tensor in tensors.items():
        parts.append(tensor.view(torch.uint8).numpy().tobytes())
        offsets = [end, end := end + len(parts[-1])]
        header[name] = {"dtype": names[tensor.dtype], "shape": [*tensor.shape], "data_offsets": offsets}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))
    assert read_stored(folder, config).numbers.dtype == torch.float32
    for module in read_adapter(folder, config).modules:
        for half, got in (("A", module.a), ("B", module.b)):
            name = f"{PREFIX}{module.layer}.{module_path(module.module)}.lora_{half}.weight"
            assert torch.equal(got, tensors[name].float())


def test_files_of_one_shape_share_its_description_and_a_thread_reads_them_into_one_memory(
    tmp_path: Path, config: ModelConfig
) -> None:
    first, second = random_weights(config, all_modules(config)), random_weights(config, all_modules(config))
    for module in second.modules:
        module.a.neg_()
    for name, weights in (("1", first), ("2", second)):
        write_adapter(tmp_path / name, weights, config, base_model="base")
    write_adapter(tmp_path / "3", random_weights(config, all_modules(config), 5.0), config, base_model="base")
    take = Scratch().take
    one = read_stored(tmp_path / "1", config, take)
    assert_equal(one.matrices(config), first)
    two = read_stored(tmp_path / "2", config, take)
    assert_equal(two.matrices(config), second)
    assert two.modules is one.modules
    assert two.numbers.data_ptr() == one.numbers.data_ptr()
    assert {module.scale for module in read_stored(tmp_path / "3", config, take).modules} == {5.0}
    with ThreadPoolExecutor(1) as other:
        apart = other.submit(read_stored, tmp_path / "1", config, take).result()
    assert apart.numbers.data_ptr() != one.numbers.data_ptr()
    assert_equal(apart.matrices(config), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), float("-inf")])
def test_one_number_that_is_not_finite_is_refused_in_any_dtype(
    tmp_path: Path, config: ModelConfig, dtype: torch.dtype, value: float
) -> None:
    weights = random_weights(config, {(1, "q_proj"): 3})
    weights.modules[0].b.view(-1)[5] = value
    write_adapter(tmp_path, weights, config, base_model="base", dtype=dtype)
    with pytest.raises(NotFinite, match=r"1\.self_attn\.q_proj\.lora_B"):
        read_stored(tmp_path, config)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("half", ["A", "B"])
def test_one_number_that_is_not_finite_is_refused(
    folder: Path, config: ModelConfig, value: float, half: str
) -> None:
    name = f"{PREFIX}2.self_attn.v_proj.lora_{half}.weight"
    edit_tensors(folder, lambda tensors: tensors[name].view(-1)[-1].fill_(value))
    with pytest.raises(NotFinite, match=r"2\.self_attn\.v_proj"):
        read_adapter(folder, config)


@pytest.mark.parametrize(
    "name",
    [
        PREFIX + "3.self_attn.q_proj.lora_A.weight",  # the model has layers 0 to 2
        PREFIX + "00.self_attn.q_proj.lora_A.weight",
        PREFIX + "0.mlp.q_proj.lora_A.weight",
        PREFIX + "0.self_attn.qkv_proj.lora_A.weight",
        PREFIX + "0.self_attn.q_proj.lora_C.weight",
        PREFIX + "0.self_attn.q_proj.lora_A.bias",
        PREFIX + "0.self_attn.q_proj.lora_magnitude_vector",
        PREFIX + "0.self_attn.q_proj.base_layer.weight",
        PREFIX + "0.self_attn.q_proj.lora_A.weight\n",
        "base_model.model.lm_head.lora_A.weight",
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "x",
    ],
)
def test_an_unknown_tensor_is_refused_by_name(folder: Path, config: ModelConfig, name: str) -> None:
    def replace_one(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors.pop(PREFIX + "0.self_attn.q_proj.lora_A.weight")

    edit_tensors(folder, replace_one)
    with pytest.raises(UnknownTensor) as caught:
        read_adapter(folder, config)
    assert caught.value.name == name


def test_a_tensor_more_than_the_model_can_use_is_refused(folder: Path, config: ModelConfig) -> None:
    edit_tensors(folder, lambda tensors: tensors.update(x=torch.zeros(1)))
    with pytest.raises(TooManyTensors, match="42"):
        read_adapter(folder, config)


@pytest.mark.parametrize("half", ["A", "B"])
def test_half_a_pair_is_refused(folder: Path, config: ModelConfig, half: str) -> None:
    name = f"{PREFIX}1.mlp.up_proj.lora_{half}.weight"
    edit_tensors(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(MissingTensor) as caught:
        read_adapter(folder, config)
    assert caught.value.name == name


def test_a_module_the_config_lists_but_the_file_lacks_is_refused(folder: Path, config: ModelConfig) -> None:
    def drop_module(tensors: dict[str, Tensor]) -> None:
        for half in "AB":
            del tensors[f"{PREFIX}1.mlp.up_proj.lora_{half}.weight"]

    edit_tensors(folder, drop_module)
    with pytest.raises(MissingTensor, match=r"1\.mlp\.up_proj"):
        read_adapter(folder, config)


def test_an_adapter_without_tensors_is_refused(folder: Path, config: ModelConfig) -> None:
    edit_tensors(folder, lambda tensors: tensors.clear())
    with pytest.raises(MissingTensor):
        read_adapter(folder, config)


def test_a_tensor_named_twice_is_refused(folder: Path, config: ModelConfig) -> None:
    path = folder / "adapter_model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length].decode().rstrip()
    name, value = next((k, v) for k, v in json.loads(header).items() if k != "__metadata__")
    doubled = (header[:-1] + "," + json.dumps({name: value})[1:]).encode()
    path.write_bytes(len(doubled).to_bytes(8, "little") + doubled + raw[8 + length :])
    with pytest.raises(DuplicateTensor) as caught:
        read_adapter(folder, config)
    assert caught.value.name == name


def test_integers_are_refused(folder: Path, config: ModelConfig) -> None:
    name = PREFIX + "0.self_attn.q_proj.lora_A.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(4, 48, dtype=torch.int8)}))
    with pytest.raises(UnsupportedAdapter, match="I8"):
        read_adapter(folder, config)


def test_a_pickle_renamed_to_safetensors_is_refused(folder: Path, config: ModelConfig) -> None:
    (folder / "adapter_model.safetensors").write_bytes(pickle.dumps({"x": [1.0] * 50}))
    with pytest.raises(NotSafetensors, match="pickle"):
        read_adapter(folder, config)


def test_a_pickled_adapter_is_refused_unopened(folder: Path, config: ModelConfig) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(NotSafetensors, match="pickle"):
        read_adapter(folder, config)


def test_a_huge_header_is_refused_before_it_is_read(folder: Path, config: ModelConfig) -> None:
    path = folder / "adapter_model.safetensors"
    with path.open("wb") as file:
        file.write((1 << 20).to_bytes(8, "little"))
        file.truncate(2 << 20)
    with pytest.raises(TooLarge, match="header"):
        read_adapter(folder, config)


def test_a_file_that_loses_its_end_once_its_header_was_checked_is_refused(
    folder: Path, config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def take_then_cut(path: Path, file: FileIO, **limits: int) -> tuple[bytes, int]:
        taken = take_header(path, file, **limits)
        with path.open("ab") as other:
            other.truncate(path.stat().st_size - 1)
        return taken

    monkeypatch.setattr(adapter_files, "take_header", take_then_cut)
    with pytest.raises(NotSafetensors, match="shorter"):
        read_adapter(folder, config)


def test_a_file_larger_than_any_adapter_of_the_model_is_refused(folder: Path, config: ModelConfig) -> None:
    with (folder / "adapter_model.safetensors").open("ab") as file:
        file.truncate(1 << 30)
    with pytest.raises(TooLarge):
        read_adapter(folder, config)


@pytest.mark.parametrize("text", ["", "[]", "{", '"x"', "[" * 100_000])
def test_a_config_that_is_no_object_is_refused(folder: Path, config: ModelConfig, text: str) -> None:
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(MissingAdapterFile):
        read_adapter(folder, config)


def test_an_enormous_config_is_refused_before_it_is_read(folder: Path, config: ModelConfig) -> None:
    (folder / "adapter_config.json").write_text(" " * (2 << 20))
    with pytest.raises(TooLarge):
        read_adapter(folder, config)


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(folder: Path, config: ModelConfig, missing: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(MissingAdapterFile, match=missing):
        read_adapter(folder, config)


def test_every_refusal_is_an_adapter_error() -> None:
    for error in (
        DuplicateTensor,
        NotSafetensors,
        TooLarge,
        TooManyTensors,
        WrongShape,
        UnknownTensor,
        NotFinite,
    ):
        assert issubclass(error, AdapterError)


def test_an_adapter_lies_under_its_id_and_version(tmp_path: Path) -> None:
    assert version_folder(tmp_path, "ab" * 32, 12) == tmp_path / ("ab" * 32) / "12"


@pytest.mark.parametrize(
    ("adapter_id", "version"),
    [
        ("..", 1),
        ("", 1),
        ("AB", 1),
        ("ab/..", 1),
        ("ab\n", 1),
        ("ab" * 33, 1),
        ("ab", 0),
        ("ab", -1),
        ("ab", True),
    ],
)
def test_an_id_or_version_that_could_lead_elsewhere_is_refused(
    tmp_path: Path, adapter_id: str, version: int
) -> None:
    with pytest.raises(UnsafePath):
        version_folder(tmp_path, adapter_id, version)


@pytest.mark.parametrize("linked", ["ab", "ab/1"])
def test_a_link_in_place_of_a_folder_is_refused(tmp_path: Path, linked: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / linked).parent.mkdir(exist_ok=True)
    (tmp_path / linked).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafePath, match="link"):
        version_folder(tmp_path, "ab", 1)
