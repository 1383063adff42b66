"""EngineConfig says no to what it does not know and to what cannot be."""

import os
import subprocess
import sys
from typing import Any

import pytest

from engine.config import PINNING, ConfigError, EngineConfig


def test_defaults_are_valid() -> None:
    assert EngineConfig().max_running == 256


def test_settings_come_from_a_mapping() -> None:
    assert EngineConfig.from_mapping({"arena_bytes": 5, "prefix_cache": False}).arena_bytes == 5


def test_an_unknown_key_is_an_error_that_names_it() -> None:
    with pytest.raises(ConfigError, match="arena_byte: expected one of arena_bytes"):
        EngineConfig.from_mapping({"arena_byte": 5})


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("arena_bytes", 0, "an integer, 1 or more"),
        ("max_running", True, "an integer, 1 or more"),
        ("max_tokens_per_step", 8.0, "an integer, 1 or more"),
        ("block_size", 0, "an integer, 1 or more"),
        ("load_threads", 0, "an integer, 1 or more"),
        ("host_cache_bytes", -1, "an integer, 0 or more"),
        ("disconnect_grace_s", float("nan"), "a number, 0 or more"),
        ("ageing_tokens_per_s", "fast", "a number, 0 or more"),
        ("prefix_cache", 1, "true or false"),
        ("dtype", "int8", "one of float32, bfloat16, float16"),
        ("device", "", "a torch device"),
    ],
)
def test_a_bad_value_is_an_error_that_names_its_key(key: str, value: Any, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig.from_mapping({key: value})
    assert caught.value.key == key
    assert caught.value.expected.startswith(expected)
    assert caught.value.got is value


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_what_the_environment_says_of_memory_is_what_torch_reads(name: str) -> None:
    told = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch._C._accelerator_getAllocatorSettings())"],
        env={**PINNING, **os.environ, name: "max_split_size_mb:64"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.strip() == "max_split_size_mb:64"
