"""A model's name and the folder it stands for."""

from pathlib import Path

import pytest

from service.model_folder import ModelNotFound, resolve_model


def test_a_folder_with_a_config_is_a_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)) == tmp_path


def test_a_folder_without_a_config_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"without a config\.json"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize(
    "name", ["dmeo", "no/such/folder", "../elsewhere/else/model", "~nobody.here/a/model", ""]
)
def test_a_name_that_can_be_nothing_is_refused(name: str) -> None:
    with pytest.raises(ModelNotFound, match="expected demo, a folder, or a hub id"):
        resolve_model(name)


def test_a_hub_that_cannot_be_reached_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fail(*_: object, **__: object) -> str:
        raise ConnectionError("no route to host\nmany\nmore\nlines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelNotFound) as caught:
        resolve_model("someone/some-model")
    assert str(caught.value).endswith("could not be fetched from the hub: no route to host")
