"""Settings: where they come from, what they refuse, and the files they stand for."""

import asyncio
import gc
import os
import stat
from pathlib import Path

import pytest
import transformers
from redis.asyncio import BlockingConnectionPool

from service.processes import engine_config, out_of_collections, run_engine
from service.settings import (
    LONGEST_SOCKET_PATH,
    Settings,
    SettingsError,
    private_folder,
    read_or_create_secret,
    token_key,
)
from tests.tiny_models import save_random


def test_a_flag_is_stronger_than_the_environment_and_that_than_the_default() -> None:
    settings = Settings.read({"ATTUNE_PORT": "9000", "ATTUNE_HOST": "0.0.0.0", "HOME": "/root"}, port=9100)
    assert (settings.port, settings.host, settings.model) == (9100, "0.0.0.0", "demo")


def test_a_flag_that_was_not_given_does_not_hide_the_environment() -> None:
    assert Settings.read({"ATTUNE_PORT": "9000"}, port=None).port == 9000


@pytest.mark.parametrize(
    ("environment", "flags", "named"),
    [
        ({"ATTUNE_PORT": "many"}, {}, "ATTUNE_PORT"),
        ({"ATTUNE_PROT": "8080"}, {}, "ATTUNE_PROT"),
        ({}, {"port": 70000}, "--port"),
        ({}, {"redis_url": "localhost:6379"}, "--redis-url"),
        ({}, {"redis_url": "redis://name:password:6379"}, "--redis-url"),
        ({"ATTUNE_REDIS_URL": "redis://[::1"}, {}, "ATTUNE_REDIS_URL"),
        ({"ATTUNE_DATA": "~nobody.here/data"}, {}, "ATTUNE_DATA"),
        ({}, {"auto_refresh_after": -1}, "--auto-refresh-after"),
        ({"ATTUNE_TOKEN_HOURS": "inf"}, {}, "ATTUNE_TOKEN_HOURS"),
        ({}, {"token_hours": 1e300}, "--token-hours"),
    ],
)
def test_a_bad_value_is_an_error_that_names_its_key(
    environment: dict[str, str], flags: dict[str, int], named: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.read(environment, **flags)
    assert caught.value.key == named
    assert "\n" not in str(caught.value)


def test_a_child_reads_back_the_settings_of_its_parent() -> None:
    settings = Settings.read(
        {}, data=Path("/srv/a"), redis_url="redis://h:1/0", origins="https://a.example, https://b.example",
        nightly_hour=None, token_hours=1.5, web_root=Path("/srv/page"),
    )  # fmt: skip
    assert Settings.read(settings.environment()) == settings
    assert settings.origins == ("https://a.example", "https://b.example")


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", "http://127.0.0.1:8080"),
        ("0.0.0.0", "http://127.0.0.1:8080"),
        ("::", "http://[::1]:8080"),
        ("fd00::7", "http://[fd00::7]:8080"),
    ],
)
def test_the_pages_address_is_one_that_a_browser_can_open(host: str, address: str) -> None:
    assert Settings.read({}, host=host).page_address == address


def test_no_nightly_refresh_can_be_asked_for() -> None:
    assert Settings.read({"ATTUNE_NIGHTLY_HOUR": "none"}).nightly_hour is None
    assert Settings.read({}).nightly_hour == 3


def test_a_relative_data_folder_becomes_absolute_so_that_children_agree() -> None:
    assert Settings.read({}, data=Path("data")).data == Path.cwd() / "data"


def test_sockets_move_to_a_short_folder_when_the_data_path_is_too_long(tmp_path: Path) -> None:
    near = Settings.read({}, data=Path("/srv/attune"))
    far = Settings.read({}, data=tmp_path / ("long" * 30))
    assert near.run_folder == Path("/srv/attune/run")
    assert len(os.fsencode(far.engine_socket)) <= LONGEST_SOCKET_PATH
    assert far.run_folder != Settings.read({}, data=tmp_path / ("longer" * 30)).run_folder


@pytest.mark.parametrize("folder", ["C#", "100%", "a%20b", "what?", "an ä b"])
def test_the_address_of_the_private_redis_leads_to_its_socket_whatever_the_folder_is_called(
    folder: str,
) -> None:
    settings = Settings.read({}, data=Path("/srv") / folder)
    read = BlockingConnectionPool.from_url(settings.redis_address)
    assert read.connection_kwargs["path"] == str(settings.redis_socket)


def test_names_are_handed_out_on_loopback_only_unless_asked() -> None:
    assert Settings.read({}).demo_sessions
    assert not Settings.read({}, host="0.0.0.0").demo_sessions
    assert Settings.read({}, host="0.0.0.0", demo_users="on").demo_sessions
    assert not Settings.read({}, demo_users="off").demo_sessions


def test_the_secret_is_made_once_and_only_its_owner_may_read_it(tmp_path: Path) -> None:
    path = tmp_path / "data" / "secret"
    first = read_or_create_secret(path)
    assert len(first) == 32
    assert read_or_create_secret(path) == first
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("damaged", [b"half a secr", b"\xff" * 32])
def test_a_damaged_secret_is_an_error_and_is_left_as_it_is(tmp_path: Path, damaged: bytes) -> None:
    path = tmp_path / "secret"
    path.write_bytes(damaged)
    with pytest.raises(SettingsError):
        read_or_create_secret(path)
    assert path.read_bytes() == damaged


def test_tokens_are_not_signed_with_the_key_of_adapter_ids(tmp_path: Path) -> None:
    secret = read_or_create_secret(tmp_path / "secret")
    assert token_key(secret) != secret
    assert token_key(secret) == token_key(secret)


def test_a_folder_for_sockets_is_private_and_a_link_is_refused(tmp_path: Path) -> None:
    open_folder = tmp_path / "open"
    open_folder.mkdir(mode=0o755)
    assert stat.S_IMODE(private_folder(open_folder).stat().st_mode) == 0o700
    (tmp_path / "link").symlink_to(open_folder)
    with pytest.raises(SettingsError):
        private_folder(tmp_path / "link")


def test_sizes_follow_the_device_unless_they_are_set() -> None:
    on_cpu = engine_config(Settings(), "cpu", "float32", None)
    sizes = (on_cpu.arena_bytes, on_cpu.host_cache_bytes, on_cpu.max_tokens_per_step)
    assert sizes == (1 << 30, 1 << 29, 512)
    memory = 100 << 30, 120 << 30  # free and all
    on_gpu = engine_config(Settings(), "cuda", "bfloat16", memory)
    assert 75 << 30 < on_gpu.arena_bytes < 88 << 30  # learning has a tenth of it all
    assert on_gpu.max_tokens_per_step == 2048
    less = engine_config(Settings(training_mb=40 << 10), "cuda", "bfloat16", memory)
    assert 50 << 30 < less.arena_bytes < 60 << 30
    chosen = Settings(arena_mb=64, host_cache_mb=0, max_step_tokens=16)
    for given in (None, memory):
        config = engine_config(chosen, "cpu", "float32", given)
        assert (config.arena_bytes, config.host_cache_bytes, config.max_tokens_per_step) == (64 << 20, 0, 16)


def test_collections_do_not_look_at_what_a_process_has_loaded_until_it_ends() -> None:
    with out_of_collections():
        assert gc.get_freeze_count() > 10_000
    assert gc.get_freeze_count() == 0


async def test_an_arena_too_small_for_the_model_is_told_by_its_setting(tmp_path: Path) -> None:
    shape = transformers.LlamaConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=16,
        head_dim=4100,
    )
    save_random(tmp_path / "model", shape)
    settings = Settings(data=tmp_path / "data", model=str(tmp_path / "model"), device="cpu", arena_mb=16)
    with pytest.raises(SettingsError, match="ATTUNE_ARENA_MB: arena_bytes: expected at least two slabs"):
        await run_engine(settings, asyncio.Event())
