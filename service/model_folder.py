"""Where a base model's files are: `demo`, a local Hugging Face folder, or a hub id that is fetched once."""

import os
import re
from pathlib import Path

from service import demo_model

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Weights as safetensors only: pickled weights are never even fetched.
WANTED = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


class ModelNotFound(ValueError):
    """`name` is none of the three things a model can be, or could not be fetched."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"model {name!r}: {message}")
        self.name = name


def resolve_model(name: str) -> Path:
    """The folder that holds the model called `name`; fetches it when it is a hub id. Raises ModelNotFound."""
    if name == "demo":
        folder = demo_model.path()
    elif name and (given := Path(os.path.expanduser(name))).is_dir():
        folder = given.absolute()
    elif HUB_ID.fullmatch(name):
        folder = _fetch(name)
    else:
        raise ModelNotFound(name, "expected demo, a folder, or a hub id like owner/name")
    if not (folder / "config.json").is_file():
        raise ModelNotFound(name, f"expected a Hugging Face folder, got {folder} without a config.json")
    return folder


def _fetch(name: str) -> Path:
    # Imported here: the library takes a second to load, and most starts need no hub.
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(WANTED)))
    except Exception as error:  # the library raises many types, over several HTTP clients
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelNotFound(name, f"could not be fetched from the hub: {reason}") from None
