"""The commands without a running service: help, tokens, and mistakes told in one line."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import jwt
import pytest
import torch
from redis.asyncio import Redis
from typer.main import get_command

from personalization.history import dump
from personalization.jobs import job_key, open_queue
from personalization.store import Store
from service.auth import ALGORITHM, AUDIENCE
from service.cli import announce, app
from service.settings import Settings, read_or_create_secret, token_key
from tests.running_service import free_port
from tests.small_model import save_small_model, talk


def attune(*arguments: str, code: int = 0, **environment: str) -> str:
    """Run a command; its standard output, or standard error when it is to fail."""
    done = subprocess.run(
        [sys.executable, "-m", "service.cli", *arguments],
        capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", **environment},
        cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def test_a_token_is_signed_for_a_person_and_a_time(tmp_path: Path) -> None:
    told = json.loads(attune("token", "ada", "--hours", "2", "--json", "--data", str(tmp_path)))
    key = token_key(read_or_create_secret(tmp_path / "secret"))
    claims = jwt.decode(told["token"], key, algorithms=[ALGORITHM], audience=AUDIENCE)
    assert claims["sub"] == "ada"
    assert claims["exp"] - claims["iat"] == 7200
    assert told["expires_at"] == claims["exp"]
    assert attune("token", "ada", "--data", str(tmp_path)).count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("export", "ada"), "does not run on"),
        (("forget", "ada", "--yes"), "does not run on"),
        (("token", ""), "user"),
        (("serve", "--model", "dmeo"), "expected demo, a folder, or a hub id"),
        (("serve", "--data", "/dev/null"), "/dev/null: expected a folder, or room for one"),
        (("token", "ada", "--data", "/dev/null/x"), "/dev/null/x: expected a folder, or room for one"),
        (("export", "ada", "--data", "/dev/null"), "does not run on"),
        # a file system that takes no files, for whoever asks
        (("token", "ada", "--data", "/proc"), "/proc: expected a folder to write in"),
        (("serve", "--port", str(free_port()), "--data", "/proc"), "/proc: expected a folder to write in"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_two(
    arguments: tuple[str, ...], told: str, tmp_path: Path
) -> None:
    error = attune(arguments[0], "--data", str(tmp_path), *arguments[1:], code=2)
    assert told in error
    assert error.startswith("attune: ")
    assert error.count("\n") == 1


def test_hours_that_are_too_many_are_refused_by_the_name_they_were_given(tmp_path: Path) -> None:
    error = attune("token", "ada", "--hours", "1e9", "--data", str(tmp_path), code=2)
    assert "'--hours'" in error
    assert "token-hours" not in error  # which no command takes


@pytest.mark.parametrize("at_once", ["", "1"], ids=["at the end", "at once"])
def test_an_output_that_takes_no_more_is_one_line_and_exit_code_one(tmp_path: Path, at_once: str) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "service.cli", "token", "ada", "--data", str(tmp_path)],
            stdout=full, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent,
            env={"PATH": "/usr/bin:/bin", "PYTHONUNBUFFERED": at_once},
        )  # fmt: skip
    assert done.stderr == "attune: [Errno 28] No space left on device\n"
    assert done.returncode == 1


def test_a_setting_that_does_not_exist_is_named(tmp_path: Path) -> None:
    error = attune("token", "ada", "--data", str(tmp_path), code=2, ATTUNE_PROT="80")
    assert error == "attune: ATTUNE_PROT: there is no such setting\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_one_line_and_exit_code_two(tmp_path: Path) -> None:
    error = attune("engine", "--data", str(tmp_path), code=2, ATTUNE_DEVICE="cuda")
    assert error == "attune: ATTUNE_DEVICE: expected a GPU that PyTorch can use for cuda, found none\n"


def test_every_command_has_help_and_json() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert set(commands) == {
        "serve", "engine", "gateway", "worker", "token", "chat", "import", "export", "refresh", "adapters",
        "rollback", "import-adapter", "population", "evaluate", "forget",
    }  # fmt: skip
    for name, command in commands.items():
        assert command.help, name
        options = {option for parameter in command.params for option in parameter.opts}
        assert {"--data", "--json"} <= options, name


def test_the_help_tells_the_defaults() -> None:
    told = " ".join(attune("serve", "--help", COLUMNS="200").split())
    for default in ("./data", "demo", "8080", "127.0.0.1, this machine only", "a private one is started"):
        assert f"[default: {default}]" in told


def test_what_is_told_at_the_start_can_be_typed_as_it_stands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "my data"
    announce(Settings.read({}, data=data), as_json=False)
    (chat,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  chat")]
    assert shlex.split(chat)[-2:] == ["--data", str(data)]


def test_a_population_adapter_is_made_of_a_file_without_a_running_service(tmp_path: Path) -> None:
    model, data = save_small_model(tmp_path / "model"), tmp_path / "data"
    file = tmp_path / "text.jsonl"
    file.write_text("\n".join(dump("book", talk("book", 60))))
    arguments = ("population", str(file), "--epochs", "20", "--model", str(model), "--data", str(data))
    made = json.loads(attune(*arguments, "--json"))
    assert made["turns"] == 54
    assert made["numbers"]["gain"] > 0
    # A model this small may drift too far for the gate; then nothing is kept, and that is said.
    assert (data / "population" / "1" / "attune.json").exists() is (made["number"] == 1)
    assert ("drift" in made["reason"]) is (made["number"] == 0)
    file.write_text("nothing")
    assert "expected turns that a person wrote" in attune(*arguments, code=2)


@pytest.mark.parametrize("command", ["population", "evaluate"])
def test_a_model_that_cannot_be_learned_with_is_one_line_and_exit_code_two(
    command: str, tmp_path: Path
) -> None:
    file, model = tmp_path / "text.jsonl", tmp_path / "model"
    file.write_text("\n".join(dump("book", talk("book", 60))))
    arguments = (command, str(file), "--model", str(model), "--data", str(tmp_path / "data"))
    model.mkdir()
    (model / "config.json").write_text('{"architectures": ["FooForCausalLM"], "model_type": "foo"}')
    assert attune(*arguments, code=2).splitlines()[-1].startswith("attune: expected one of")
    save_small_model(model)
    (model / "tokenizer.json").unlink()
    assert attune(*arguments, code=2).splitlines()[-1].startswith("attune: ")


def test_a_training_process_that_ends_is_told_and_exit_code_one(tmp_path: Path) -> None:
    file, model = tmp_path / "text.jsonl", save_small_model(tmp_path / "model")
    file.write_text("\n".join(dump("book", talk("book", 60))))
    (model / "model.safetensors").unlink()
    arguments = ("population", str(file), "--model", str(model), "--data", str(tmp_path / "data"))
    error = attune(*arguments, code=1)
    assert error.splitlines()[-1].startswith("attune: the training process ended")
    assert "TrainerDied" not in error  # the process may have told where it ended, the command does not


def test_a_page_of_plots_that_has_no_place_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    file = tmp_path / "text.jsonl"
    file.write_text("\n".join(dump("book", talk("book", 60))))
    error = attune("evaluate", str(file), "--page", str(tmp_path), code=2)
    assert error == f"attune: --page: expected a file in a folder that exists, got {tmp_path}\n"


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_worker_does_not_begin_again_on_a_tokenizer_that_cannot_be_read(
    file: str, tmp_path: Path, redis_url: str
) -> None:
    model = save_small_model(tmp_path / "model")
    (model / file).write_text("{{")
    arguments = ("worker", "--model", str(model), "--data", str(tmp_path / "data"))
    error = attune(*arguments, code=2, ATTUNE_REDIS_URL=redis_url)
    assert error.splitlines()[-1].startswith("attune: ")
    assert "Traceback" not in error


async def test_who_asks_for_a_person_asks_and_who_asks_for_all_does_not(
    tmp_path: Path, redis: Redis, redis_url: str
) -> None:
    store = Store(redis, read_or_create_secret(tmp_path / "secret"))
    queue = open_queue(redis)
    for user in ("ada", "bob"):
        await store.append(user, talk(user, 5))
    arguments = ("--data", str(tmp_path))
    attune("refresh", "ada", *arguments, ATTUNE_REDIS_URL=redis_url)
    attune("refresh", "--all", *arguments, ATTUNE_REDIS_URL=redis_url)
    jobs = [await queue.job(job_key(store, user)) for user in ("ada", "bob")]
    assert [job and job.kwargs and job.kwargs["reason"] for job in jobs] == ["asked", "all"]


def test_a_model_that_cannot_be_served_ends_the_service_with_the_reason(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"architectures": ["FooForCausalLM"], "model_type": "foo"}')
    error = attune(
        "serve", "--model", str(model), "--port", str(free_port()), "--data", str(tmp_path / "data"), code=2
    )
    assert "got FooForCausalLM" in error
    assert "Traceback" not in error
    assert "cannot start (see its message above)" in error


async def test_a_person_is_rolled_back_on_a_redis_of_ones_own_without_a_service_in_the_folder(
    tmp_path: Path, redis: Redis, redis_url: str
) -> None:
    arguments = ("rollback", "ada", "0", "--data", str(tmp_path))
    assert attune(*arguments, ATTUNE_REDIS_URL=redis_url) == "ada: version 0 -> 0\n"
