"""The journeys of a person on the whole service: real processes, real Redis, demo model, official SDK.

One service for all of them, in file order where the order costs nothing; each journey has people of its own.
"""

import asyncio
import json
import random
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import OpenAI

from engine.adapter_files import LoraModule, LoraWeights, write_adapter
from engine.model import module_shape
from engine.weights import read_config
from personalization.history import parse
from service import demo_model
from service.chat import TERMINAL, ChatClient
from tests.running_service import PROCESSES, RunningService, running_service

pytestmark = pytest.mark.timeout(600)  # only a hang takes so long, on whatever machine
ONLY_WHAT_IS_ASKED = {"auto_refresh_after": "0", "nightly_hour": "none", "demo_users": "off"}
AS_FAST_AS_IT_CAN = {"replies_per_minute": "100000"}  # who asks again at once reaches what a person may ask
WORDS = (
    ["crimson", "amber", "teal", "ivory", "violet", "russet", "ochre", "jade"],
    ["otter", "heron", "badger", "lynx", "marten", "osprey", "weasel", "stoat"],
    ["polishes", "mends", "borrows", "paints", "juggles", "buries", "weighs", "hums"],
    ["anchors", "kettles", "lanterns", "compasses", "barrels", "whistles", "ledgers", "ropes"],
)
LONG = 160  # tokens of a reply that is still streaming while something happens


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    folder = tmp_path_factory.mktemp("journeys") / "data"
    with running_service(folder, **ONLY_WHAT_IS_ASKED, **AS_FAST_AS_IT_CAN) as running:
        yield running


def history(user: str, pairs: int = 28, hail: str = "Ahoy") -> str:
    """Someone with a way of talking that context alone does not give: few words, always in another order."""
    chance = random.Random(user)

    def sentence() -> str:
        told = " and ".join(" ".join(chance.choice(words) for words in WORDS) for _ in range(2))
        return f"{hail}! The {told}, captain."

    lines = []
    for number in range(pairs):
        day, minute = 1 + number // 10, number % 10
        for second, role in ((0, "user"), (30, "assistant")):
            lines.append(
                {
                    "user": user,
                    "conversation": f"old-{number // 10}",
                    "at": f"2026-03-{day:02}T10:{minute:02}:{second:02}Z",
                    "role": role,
                    "text": sentence(),
                    "author": "person",
                }
            )
    return "\n".join(json.dumps(line) for line in lines) + "\n"


def text_of(events: list[dict[str, Any]]) -> str:
    return "".join(e["delta"] for e in events if e["type"] == "response.output_text.delta")


def version_of(event: dict[str, Any]) -> int:
    return int(event["response"]["metadata"]["adapter_version"])


async def reply(client: ChatClient, text: str, **options: Any) -> list[dict[str, Any]]:
    """The reply's own events, and a refusal."""
    await client.ask(text, **options)
    return [event async for event in client.reply() if event["type"].startswith(("response.", "error"))]


def sdk(service: RunningService) -> OpenAI:
    """A client to be closed, or the sockets it keeps are found open when it is gone."""
    return OpenAI(base_url=f"{service.address}/v1", api_key=service.token("sdk"))


def test_the_official_sdk_talks_to_base_and_to_me_over_its_websocket(service: RunningService) -> None:
    with sdk(service) as client, client.responses.connect() as connection:
        for model in ("me", "base"):
            connection.response.create(model=model, input="Hello, how are you today?", max_output_tokens=24)
            types, text = [], ""
            for event in connection:
                types.append(event.type)
                if event.type == "response.output_text.delta":
                    text += event.delta
                if event.type in TERMINAL:
                    break
            assert types[0] == "response.created"
            assert types[-1] in ("response.completed", "response.incomplete")
            assert text.strip()


def test_the_official_sdk_talks_over_http(service: RunningService) -> None:
    with sdk(service) as client:
        whole = client.responses.create(model="me", input="Hello!", max_output_tokens=16, temperature=0)
        parts = client.chat.completions.create(
            model="base", messages=[{"role": "user", "content": "Hello!"}], max_tokens=16, stream=True
        )
        assert whole.output_text.strip()
        assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices).strip()
        assert {"base", "me"} <= {model.id for model in client.models.list()}


def test_after_a_refresh_the_next_reply_says_its_version_and_one_that_streams_ends_on_the_old(
    service: RunningService,
) -> None:
    imported = service.json("import", "-", text=history("pirate"))
    assert (imported["users"], imported["new"], imported["errors"]) == (1, 56, [])
    assert service.json("import", "-", text=history("pirate"))["new"] == 0
    token = service.token("pirate")
    spans: list[
        tuple[float, float, int, int]
    ] = []  # of each reply: begun, ended, first and last version named

    async def keep_talking(until: asyncio.Event) -> None:
        async with ChatClient(service.address, token) as client:
            while not until.is_set():
                began = time.monotonic()
                events = await reply(client, "Tell me a long story.", max_output_tokens=LONG, store=False)
                assert events[-1]["type"] in ("response.completed", "response.incomplete"), events[-1]
                spans.append((began, time.monotonic(), version_of(events[0]), version_of(events[-1])))

    async def swap(watcher: ChatClient) -> tuple[float, dict[str, Any]]:
        while (event := await watcher.next_event())["type"] != "adapter.updated":
            pass
        return time.monotonic(), event

    async def refresh_while_talking() -> tuple[float, dict[str, Any]]:
        over = asyncio.Event()
        async with ChatClient(service.address, token) as watcher:
            swapping = asyncio.create_task(swap(watcher))
            talking = [asyncio.create_task(keep_talking(over)) for _ in range(2)]
            await asyncio.sleep(0.5)
            try:
                done = await asyncio.to_thread(service.json, "refresh", "pirate", "--wait")
                assert done["refreshed"][0]["published"] is True, done
                async with asyncio.timeout(60):
                    return await swapping
            finally:
                over.set()
                await asyncio.gather(*talking)

    moment, event = asyncio.run(refresh_while_talking())
    assert (event["from"], event["to"]) == (0, 1)
    crossing = [span for span in spans if span[0] < moment < span[1]]
    assert crossing, "no reply was streaming during the swap"
    assert all(first == last for _, _, first, last in spans)

    async def once() -> list[dict[str, Any]]:
        async with ChatClient(service.address, token) as client:
            return await reply(client, "Ahoy?", max_output_tokens=24, temperature=0)

    events = asyncio.run(once())
    assert version_of(events[0]) == version_of(events[-1]) == 1
    listed = service.json("adapters", "pirate")
    assert (listed["serving"], [v["version"] for v in listed["versions"]]) == (1, [1])
    assert service.json("rollback", "pirate", "0") == {"user": "pirate", "from": 1, "to": 0}
    assert version_of(asyncio.run(once())[0]) == 0


@pytest.mark.parametrize("victim", PROCESSES)
def test_killing_a_process_during_a_chat_loses_no_acknowledged_turn_and_the_client_resumes(
    service: RunningService, victim: str
) -> None:
    user = f"survivor-of-{victim}"

    async def talk() -> tuple[str, int]:
        async with ChatClient(service.address, service.token(user)) as client:
            first = await reply(client, "Remember the word heliotrope.", max_output_tokens=8)
            assert first[-1]["type"] in ("response.completed", "response.incomplete")
            await client.ask("Tell me a long story.", max_output_tokens=LONG)
            events, killed = [], 0
            async for event in client.reply():
                events.append(event)
                if not killed and text_of(events):
                    killed = service.kill(victim)
            assert killed, "the reply was over before anything was killed"
            assert events[-1]["type"] in ("response.completed", "response.incomplete"), events[-1]
            numbers = [e["sequence_number"] for e in events if "sequence_number" in e]
            assert numbers == sorted(set(numbers))
            last = await reply(client, "And then?", max_output_tokens=8)
            assert last[-1]["type"] in ("response.completed", "response.incomplete"), last[-1]
            return text_of(events), killed

    said, killed = asyncio.run(talk())
    service.wait_restarted(victim, killed)
    kept = [json.loads(line) for line in service.attune("export", user).splitlines()]
    assert [turn["text"] for turn in kept if turn["role"] == "user"] == [
        "Remember the word heliotrope.",
        "Tell me a long story.",
        "And then?",
    ]
    assert said.strip() in [turn["text"].strip() for turn in kept if turn["role"] == "assistant"]


def write_random_adapter(folder: Path) -> None:
    """A small PEFT folder that fits the demo model."""
    config, chance = read_config(demo_model.path()), torch.Generator().manual_seed(3)
    modules = []
    for layer in range(config.num_layers):
        wide, narrow = module_shape(config, "q_proj")
        a, b = torch.randn(4, narrow, generator=chance), torch.randn(wide, 4, generator=chance)
        modules.append(LoraModule(layer, "q_proj", a * 0.01, b * 0.01, 1.0))
    write_adapter(folder, LoraWeights(tuple(modules)), config, base_model="demo")


def test_forgetting_a_person_leaves_nothing_of_them(service: RunningService, tmp_path: Path) -> None:
    user, word = "passing-guest", "Xylophonic"
    service.attune("import", "-", text=history(user, hail=word))
    write_random_adapter(tmp_path / "adapter")
    assert service.json("import-adapter", user, str(tmp_path / "adapter"))["version"] == 1

    async def talk() -> list[dict[str, Any]]:
        async with ChatClient(service.address, service.token(user)) as client:
            return await reply(client, f"{word}!", max_output_tokens=16)

    assert version_of(asyncio.run(talk())[-1]) == 1
    before = {path.name for path in (service.data / "adapters").iterdir()}
    gone = service.json("forget", user, "--yes")
    assert gone["turns"] == 58
    assert gone["folders"] == 1
    assert gone["disk_bytes"] > 0
    assert gone["host_bytes"] + gone["device_slabs"] > 0
    assert gone["log_rewritten"] is True
    assert len(before - {path.name for path in (service.data / "adapters").iterdir()}) == 1

    deadline = time.monotonic() + 60  # Redis unlinks its old file a moment after the rewrite
    while left := grep(service.data, user, word, word.lower()):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)
    assert service.attune("export", user) == ""
    assert service.json("adapters", user)["versions"] == []
    assert service.json("forget", user, "--yes")["turns"] == 0


def grep(folder: Path, *words: str) -> list[str]:
    """Files under `folder` whose bytes or name hold one of the words."""
    left = [str(path) for path in folder.rglob("*") if any(word in path.name for word in words)]
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # unlinked this moment
            if path.is_file():
                content = path.read_bytes()
                left += [f"{path}: {word}" for word in words if word.encode() in content]
    return left


def test_commands_answer_mistakes_in_one_line(service: RunningService, tmp_path: Path) -> None:
    assert "expected a person's name or --all" in service.attune("refresh", code=2)
    told = service.attune("import", "-", text="not json\n", code=2)
    assert told.startswith("line 1: ")
    example = told.splitlines()[-1].partition(" like ")[2]
    assert parse([example.encode()]).errors == []
    service.attune("import", "-", text=history("newcomer", pairs=1))
    service.attune("refresh", "newcomer", "--wait", code=2)  # nothing failed: there is too little to learn
    for arguments in (("rollback", "nobody", "7"), ("import-adapter", "nobody", str(tmp_path / "none"))):
        told = service.attune(*arguments, code=2)
        assert told.startswith("attune: ")
        assert told.count("\n") == 1
    # A second service on the same folder.
    told = service.attune("serve", "--port", str(service.port + 1), code=2)
    assert f"is in use by process {service.supervisor.pid}" in told


def test_the_terminal_chat_answers_as_json_lines(service: RunningService) -> None:
    events = [
        json.loads(line)
        for line in service.attune("chat", "--user", "typist", "--json", text="Hello!\n").splitlines()
    ]
    assert events[-1]["type"] in ("response.completed", "response.incomplete")
    assert text_of(events).strip()


def test_the_service_stops_cleanly_and_starts_again_with_everything(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with running_service(data, **ONLY_WHAT_IS_ASKED) as first:
        first.attune("import", "-", text=history("keeper", pairs=3))
        token = first.token("keeper")
        assert first.stop() == 0
    assert "Attune does not run on" in first.attune("export", "keeper", code=2)
    with running_service(data, **ONLY_WHAT_IS_ASKED) as second:
        assert len(second.attune("export", "keeper").splitlines()) == 6
        with OpenAI(base_url=f"{second.address}/v1", api_key=token) as client:  # signed before
            client.models.list()
        # A supervisor that is killed takes its children along and can be followed at once.
        pids = second.pids()
        second.supervisor.kill()
        second.supervisor.wait()
        deadline = time.monotonic() + 60
        while any(Path(f"/proc/{pid}").exists() and not zombie(pid) for pid in pids.values()):
            assert time.monotonic() < deadline, "children outlived their supervisor"
            time.sleep(0.05)


def zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True
