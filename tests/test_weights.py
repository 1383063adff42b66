"""Loading model folders: what is served loads right, and what is not is refused by name."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from engine.tensor_files import DuplicateTensor, ModelError, NotSafetensors, WrongShape
from engine.weights import (
    MissingFile,
    MissingShard,
    MissingTensor,
    UnexpectedTensor,
    UnknownArchitecture,
    UnsupportedModel,
    load_model,
    loaded_config,
    read_config,
)
from tests.test_model import Whole
from tests.tiny_models import FAMILIES, save_random


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_random(tmp_path, FAMILIES["llama3"]())
    return tmp_path


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path) | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def test_shards_and_a_single_file_load_the_same_model(tmp_path: Path) -> None:
    save_random(tmp_path / "one", FAMILIES["qwen3"]())
    save_random(tmp_path / "many", FAMILIES["qwen3"](), max_shard_size="40KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = load_model(tmp_path / "one"), load_model(tmp_path / "many")
    assert one.base_hash == many.base_hash
    for (name, a), (_, b) in zip(
        one.decoder.named_parameters(), many.decoder.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name


def test_a_single_file_counts_where_an_older_save_left_its_index(tmp_path: Path) -> None:
    save_random(tmp_path, FAMILIES["qwen3"](), seed=4, max_shard_size="40KB")
    save_random(tmp_path, FAMILIES["qwen3"]())
    assert (tmp_path / "model.safetensors.index.json").exists()
    save_random(tmp_path / "alone", FAMILIES["qwen3"]())
    assert load_model(tmp_path).base_hash == load_model(tmp_path / "alone").base_hash


def test_tensors_read_in_many_parts_load_the_same_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load_model(folder, dtype=torch.bfloat16)
    monkeypatch.setattr("engine.weights._STAGE_BYTES", 200)
    parts = load_model(folder, dtype=torch.bfloat16)
    assert parts.base_hash == whole.base_hash
    for name, tensor in whole.decoder.state_dict().items():
        assert torch.equal(parts.decoder.state_dict()[name], tensor), name


def test_the_base_hash_changes_with_one_weight_and_with_the_config(folder: Path) -> None:
    before = load_model(folder).base_hash
    tensor = load_file(folder / "model.safetensors")["model.norm.weight"].clone()
    tensor[3] += 1e-3
    edit_tensors(folder, model__norm__weight=tensor)
    changed = load_model(folder).base_hash
    edit_config(folder, rms_norm_eps=1e-4)
    assert len({before, changed, load_model(folder).base_hash}) == 3


def test_a_model_loads_in_bfloat16(folder: Path) -> None:
    decoder = load_model(folder, dtype=torch.bfloat16).decoder
    assert {parameter.dtype for parameter in decoder.parameters()} == {torch.bfloat16}


def test_no_parameter_of_a_loaded_model_wants_gradients(folder: Path) -> None:
    assert not any(parameter.requires_grad for parameter in load_model(folder).decoder.parameters())


def test_end_tokens_of_both_config_files_count(folder: Path) -> None:
    edit_config(folder, eos_token_id=7, bos_token_id=1)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 7]}))
    config = read_config(folder)
    assert config.eos_token_ids == (7, 9)
    assert config.bos_token_id == 1


def test_rope_settings_of_older_transformers_are_read(folder: Path) -> None:
    new = read_config(folder).rope
    raw = json.loads((folder / "config.json").read_text())
    parameters = raw.pop("rope_parameters")
    raw["rope_theta"] = parameters.pop("rope_theta")
    raw["rope_scaling"] = parameters
    (folder / "config.json").write_text(json.dumps(raw))
    assert read_config(folder).rope == new
    assert new.kind == "llama3"


@pytest.mark.parametrize("beside", [None, 64])
def test_the_length_that_llama3_was_trained_for_is_the_one_that_transformers_takes(
    folder: Path, beside: int | None
) -> None:
    raw = json.loads((folder / "config.json").read_text())
    parameters = raw["rope_parameters"]
    edit_config(folder, max_position_embeddings=128)
    if beside is None:
        del parameters["original_max_position_embeddings"]
        edit_config(folder, rope_parameters=parameters)
    else:
        edit_config(folder, original_max_position_embeddings=beside)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(load_model(folder).decoder.inverse_frequencies, theirs.model.rotary_emb.inv_freq)


def test_rope_scaling_added_to_a_newer_config_counts_as_in_transformers(folder: Path) -> None:
    edit_config(folder, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    edit_config(folder, rope_scaling={"rope_type": "linear", "factor": 4.0}, rope_theta=1e5)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(load_model(folder).decoder.inverse_frequencies, theirs.model.rotary_emb.inv_freq)
    edit_config(folder, rope_scaling={"rope_type": "yarn", "factor": 4.0})
    with pytest.raises(UnsupportedModel, match="yarn"):
        load_model(folder)


@pytest.mark.parametrize("family", ["mistral", "qwen2-window"])
def test_the_window_is_the_one_that_transformers_takes_where_none_is_named(
    tmp_path: Path, family: str
) -> None:
    FAMILIES[family]().save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["architectures"] = [raw["model_type"].capitalize() + "ForCausalLM"]
    del raw["sliding_window"]
    raw.pop("layer_types", None)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    types = getattr(theirs, "layer_types", None) or ["sliding_attention"] * theirs.num_hidden_layers
    ours = read_config(tmp_path)
    assert ours.sliding_window == theirs.sliding_window == 4096
    assert ours.sliding_layers == tuple(i for i, kind in enumerate(types) if kind == "sliding_attention")


@pytest.mark.parametrize("family", ["llama2", "mistral", "qwen2", "qwen3"])
def test_sizes_that_a_config_leaves_out_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    config = FAMILIES[family]()
    config.architectures = [type(config).__name__.replace("Config", "ForCausalLM")]
    config.hidden_size, config.num_attention_heads = 256, 64
    config.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw["num_key_value_heads"], raw["max_position_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    theirs, ours = transformers.AutoConfig.from_pretrained(tmp_path), read_config(tmp_path)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.max_position_embeddings == theirs.max_position_embeddings


@pytest.mark.parametrize("full", [(0, 2), (0, 1, 2)])
def test_a_mistral_slides_in_the_layers_it_names(tmp_path: Path, full: tuple[int, ...]) -> None:
    save_random(tmp_path, FAMILIES["mistral"]())
    kinds = ["full_attention" if layer in full else "sliding_attention" for layer in range(3)]
    edit_config(tmp_path, layer_types=kinds)
    theirs, ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path), load_model(tmp_path)
    ids = torch.arange(30)
    with torch.inference_mode():
        hidden = ours.decoder(ids, ids, Whole(ours.decoder))
        assert (ours.decoder.logits(hidden) - theirs(ids[None]).logits[0]).abs().max() < 1e-4


def test_an_activation_may_have_its_other_name(folder: Path) -> None:
    before = load_model(folder).base_hash
    edit_config(folder, hidden_act="swish")
    same = transformers.AutoModelForCausalLM.from_pretrained(folder).model.layers[0].mlp.act_fn
    assert torch.equal(same(torch.arange(-9.0, 9.0)), torch.nn.functional.silu(torch.arange(-9.0, 9.0)))
    assert load_model(folder).base_hash == before


@pytest.mark.parametrize("family", ["llama3", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("named", [None, []])
def test_a_config_that_names_no_architecture_has_that_of_its_family(
    tmp_path: Path, family: str, named: list[str] | None
) -> None:
    save_random(tmp_path, FAMILIES[family]())
    before = load_model(tmp_path).base_hash
    edit_config(tmp_path, architectures=named)
    assert load_model(tmp_path).base_hash == before
    edit_config(tmp_path, model_type="gpt2")
    with pytest.raises(UnknownArchitecture, match="got gpt2"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "architecture", ["GPT2LMHeadModel", "Qwen3MoeForCausalLM", "LlamaForSequenceClassification"]
)
def test_an_unknown_architecture_is_refused_by_name(folder: Path, architecture: str) -> None:
    edit_config(folder, architectures=[architecture])
    with pytest.raises(UnknownArchitecture, match=architecture) as caught:
        load_model(folder)
    assert caught.value.architecture == architecture


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "gelu"},
        {"mlp_bias": True},
        {"attention_bias": True},
        {"quantization_config": {"bits": 4}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": "8"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 0}},
        {"rms_norm_eps": "small"},
        {"num_key_value_heads": 3},
        {"hidden_size": -1},
        {"head_dim": 13},
        {"architectures": ["MistralForCausalLM"], "sliding_window": 0},
        {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "max_window_layers": None},
    ],
    ids=str,
)
def test_a_feature_that_is_not_served_is_refused_by_name(folder: Path, change: dict[str, Any]) -> None:
    edit_config(folder, **change)
    with pytest.raises(UnsupportedModel) as caught:
        load_model(folder)
    assert caught.value.field in {*change, "rope_type", "partial_rotary_factor", "factor", "rope_theta"}


def test_a_part_that_is_rotated_is_told_wherever_the_config_has_it(folder: Path) -> None:
    edit_config(folder, partial_rotary_factor=0.5)
    with pytest.raises(UnsupportedModel, match=r"partial_rotary_factor: expected 1\.0, got 0\.5"):
        load_model(folder)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    save_random(tmp_path, FAMILIES["llama2"](), max_shard_size="40KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(MissingShard, match=shard.name):
        load_model(tmp_path)


def test_a_shard_outside_the_folder_is_not_opened(tmp_path: Path) -> None:
    save_random(tmp_path / "model", FAMILIES["llama2"](), max_shard_size="40KB")
    index = tmp_path / "model" / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    raw["weight_map"]["model.norm.weight"] = "../outside.safetensors"
    index.write_text(json.dumps(raw))
    save_file({"model.norm.weight": torch.ones(48)}, tmp_path / "outside.safetensors")
    with pytest.raises(MissingShard, match="outside"):
        load_model(tmp_path / "model")


def test_a_missing_tensor_is_named(folder: Path) -> None:
    edit_tensors(folder, model__layers__1__mlp__up_proj__weight=None)
    with pytest.raises(MissingTensor, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(folder)


def test_a_tensor_the_family_does_not_have_is_refused(folder: Path) -> None:
    edit_tensors(folder, model__layers__0__self_attn__q_proj__bias=torch.zeros(48))
    with pytest.raises(UnexpectedTensor, match=r"q_proj\.bias"):
        load_model(folder)


def test_a_tensor_of_another_shape_is_refused_with_both_shapes(folder: Path) -> None:
    edit_tensors(folder, model__norm__weight=torch.ones(47))
    with pytest.raises(WrongShape, match=r"\(48,\).*\(47,\)"):
        load_model(folder)


def test_a_tensor_of_integers_is_refused(folder: Path) -> None:
    edit_tensors(folder, model__norm__weight=torch.ones(48, dtype=torch.int32))
    with pytest.raises(UnsupportedModel, match="I32"):
        load_model(folder)


@pytest.mark.parametrize("value", ["</s>", [2, "</s>"], {"id": 2}, 2.0, True])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_an_end_token_that_is_no_id_is_refused_with_its_file(folder: Path, file: str, value: object) -> None:
    edit_config(folder, **({"eos_token_id": value} if file == "config.json" else {}))
    if file != "config.json":
        (folder / file).write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(MissingFile, match=rf"{file}: eos_token_id: expected a token's id"):
        load_model(folder)


@pytest.mark.parametrize("text", ["{", "[]", 100_000 * "["])
def test_a_config_that_is_no_object_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(MissingFile, match="expected a JSON object"):
        load_model(folder)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match=r"config\.json"):
        load_model(tmp_path)


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(MissingFile, match=r"model\.safetensors"):
        load_model(folder)


def test_pickled_weights_are_refused_unopened(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"x": torch.ones(1)}, folder / "pytorch_model.bin")
    with pytest.raises(NotSafetensors, match="pickle"):
        load_model(folder)


@pytest.mark.parametrize("protocol", [2, 4, 5, "torch"])
def test_a_pickle_renamed_to_safetensors_is_refused(folder: Path, protocol: int | str) -> None:
    path = folder / "model.safetensors"
    if protocol == "torch":
        torch.save({"x": torch.ones(1)}, path)
    else:
        path.write_bytes(pickle.dumps({"x": [1.0] * 100}, protocol=int(protocol)))
    with pytest.raises(NotSafetensors, match="pickle"):
        load_model(folder)


@pytest.mark.parametrize("start", [b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"])
def test_a_header_whose_length_reads_like_the_start_of_a_pickle_is_none(folder: Path, start: bytes) -> None:
    before = load_model(folder).base_hash
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    # The format lets spaces stand behind a header.
    wanted = int.from_bytes(start, "little") + (1 << 16)
    header = content[8 : 8 + length].rstrip().ljust(wanted)
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    assert len(load_file(path)) > 1
    assert load_model(folder).base_hash == before


@pytest.mark.parametrize(
    "broken",
    ["", "{", "[]", '{"x": 3}', '{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
     '{"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
     '{"x": {"dtype": "Q4", "shape": [1], "data_offsets": [0, 4]}}',
     '{"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', "{" + '"a":{' * 5000],
)  # fmt: skip
def test_a_broken_header_is_refused(folder: Path, broken: str) -> None:
    header = broken.encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    with pytest.raises(NotSafetensors):
        load_model(folder)


def test_a_tensor_named_twice_in_the_header_is_refused(folder: Path) -> None:
    entry = '"x": {"dtype": "F32", "shape": [1], "data_offsets": [%d, %d]}'
    header = ("{" + entry % (0, 4) + "," + entry % (4, 8) + "}").encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)
    with pytest.raises(DuplicateTensor, match="x"):
        load_model(folder)


def test_every_refusal_is_a_model_error(folder: Path) -> None:
    edit_config(folder, architectures=None, model_type="mamba")
    with pytest.raises(ModelError, match="mamba"):
        load_model(folder)


def test_a_tied_model_may_store_its_embedding_twice_or_as_its_head(folder: Path) -> None:
    before = load_model(folder).base_hash
    embed = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    edit_tensors(folder, lm_head__weight=embed.clone())
    assert load_model(folder).base_hash == before
    edit_tensors(folder, model__embed_tokens__weight=None)  # so does safetensors.torch.save_model
    assert load_model(folder).base_hash == before


def test_a_head_that_is_not_the_embedding_counts_as_in_transformers(folder: Path) -> None:
    before = load_model(folder).base_hash
    embed = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    edit_tensors(folder, lm_head__weight=embed + 1)
    loaded = load_model(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(loaded.decoder.head.weight, theirs.lm_head.weight)
    assert torch.equal(loaded.decoder.embed, theirs.model.embed_tokens.weight)
    assert loaded.config == loaded_config(folder) != read_config(folder)
    assert loaded.base_hash != before
