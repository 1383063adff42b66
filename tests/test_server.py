"""The engine behind its socket: one process in most tests, a real one that is killed in the last."""

import asyncio
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from engine import wire
from engine.adapter_files import LoraModule, LoraWeights, version_folder, write_adapter
from engine.client import CallFailed, EngineClient, EngineLost, EngineRefused, Stream
from engine.config import EngineConfig
from engine.engine import Engine
from engine.model import module_shape
from engine.request import AdapterRef, FinishedEvent, Request, SamplingParams, TokensEvent
from engine.server import EngineServer, serve
from engine.weights import LoadedModel, load_model
from tests.tiny_models import VOCAB, save_random
from tests.waiting import until

ADA = AdapterRef("ada0", 1)
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@dataclass(frozen=True)
class World:
    model_folder: Path
    adapters: Path
    model: LoadedModel


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("engine")
    shape = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        eos_token_id=5,
    )
    save_random(root / "model", shape)
    model = load_model(root / "model")
    generator = torch.Generator().manual_seed(1)
    outputs, inputs = module_shape(model.config, "q_proj")
    a = torch.randn(4, inputs, generator=generator)
    b = torch.randn(outputs, 4, generator=generator)
    weights = LoraWeights(tuple(LoraModule(layer, "q_proj", a.clone(), b.clone(), 1.0) for layer in range(2)))
    write_adapter(version_folder(root / "adapters", ADA.id, 1), weights, model.config, base_model="tiny")
    return World(root / "model", root / "adapters", model)


Start = Callable[..., Awaitable["Running"]]


@dataclass
class Running:
    path: Path
    engine: Engine
    task: asyncio.Task[None]

    async def connect(self, **options: Any) -> EngineClient:
        return await EngineClient.connect(self.path, **{"timeout": 60, **options})

    async def end_cleanly(self) -> None:
        await until(lambda: not self.engine.has_work)
        self.engine.check_integrity()
        await self.stop()

    async def stop(self) -> None:
        self.task.cancel()
        with suppress(asyncio.CancelledError):
            await self.task


@pytest.fixture
async def start(world: World, tmp_path: Path) -> AsyncIterator[Start]:
    """Engines serving in this process; at the end each must be idle with clean books, or
    have been stopped.
    """
    started: list[Running] = []

    async def begin(**config: Any) -> Running:
        settings = {"arena_bytes": 4 << 20, "max_tokens_per_step": 64, "disconnect_grace_s": 0.05, **config}
        engine = Engine(EngineConfig.from_mapping(settings), world.model, world.adapters)
        path = tmp_path / "engine.sock"
        ready = asyncio.Event()
        task = asyncio.create_task(serve(engine, path, model_name="tiny", on_ready=ready.set))
        started.append(Running(path, engine, task))
        await ready.wait()
        return started[-1]

    yield begin
    for running in started:
        if not running.task.done():
            await running.end_cleanly()


def ask(id: str, length: int = 20, **changes: Any) -> Request:
    prompt = tuple((7 * index + len(id)) % VOCAB for index in range(length))
    return replace(Request(id, prompt, GREEDY, user_key=id), **changes)


async def read(stream: Stream) -> tuple[list[int], FinishedEvent]:
    tokens = list(stream.request.generated)
    finished = None
    async with asyncio.timeout(120):
        async for event in stream:
            assert finished is None
            assert event.request_id == stream.request.id
            if isinstance(event, TokensEvent):
                assert event.first_index == len(tokens)
                tokens += event.token_ids
            else:
                finished = event
    assert finished is not None
    return tokens, finished


def said(world: World, request: Request) -> list[int]:
    """The reference: the same request on an engine without a server."""
    engine = Engine(EngineConfig(arena_bytes=4 << 20), world.model, world.adapters)
    engine.submit(request)
    tokens = list(request.generated)
    for event in engine.drain():
        if isinstance(event, TokensEvent):
            tokens += event.token_ids
    engine.close()
    return tokens


# Requests over the wire


async def test_a_reply_arrives_token_by_token_and_ends(world: World, start: Start) -> None:
    async with await (await start()).connect() as client:
        tokens, finished = await read(await client.submit(ask("a")))
    assert tokens == said(world, ask("a"))
    assert finished.reason == "length"
    assert (finished.usage.prompt_tokens, finished.usage.completion_tokens) == (20, 12)


async def test_while_nobody_asks_steps_are_prepared_and_a_request_gets_in_between(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = await start()
    threads: list[str] = []
    answered, rests = threading.Event(), threading.Event()

    def prepare() -> bool:
        threads.append(threading.current_thread().name)
        time.sleep(0.01)
        if answered.is_set():
            rests.set()
        return not answered.is_set()

    monkeypatch.setattr(running.engine, "prepare", prepare)
    client = await running.connect()
    for number in range(2):  # both are answered though there is always more to prepare
        _, finished = await read(await client.submit(Request(str(number), (1, 2, 3), GREEDY)))
        assert finished.reason == "length"
    answered.set()
    await until(rests.is_set)
    prepared = len(threads)
    await asyncio.sleep(0.05)
    assert len(threads) == prepared  # and then it rests
    assert all(name.startswith("step") for name in threads)
    await client.close()
    await running.end_cleanly()


async def test_the_client_knows_what_engine_it_talks_to(world: World, start: Start) -> None:
    async with await (await start()).connect() as client:
        assert client.connected
        assert client.info == wire.EngineInfo("tiny", world.model.base_hash, 1024, VOCAB, (5,), os.getpid())


async def test_many_replies_run_at_once_each_with_its_own_tokens(world: World, start: Start) -> None:
    requests = [ask("x" * n, 10 + n, adapter=ADA if n % 2 else None) for n in range(1, 30)]
    async with await (await start()).connect() as client:
        streams = [await client.submit(request) for request in requests]
        replies = await asyncio.gather(*map(read, streams))
        stats = await client.stats()
    assert stats["step"]["rows"] > 2 * stats["step"]["steps"]
    for request, (tokens, _) in zip(requests, replies, strict=True):
        assert tokens == said(world, request)


async def test_two_gateways_may_use_the_same_ids(world: World, start: Start) -> None:
    running = await start()
    async with await running.connect() as one, await running.connect() as two:
        first = await one.submit(ask("same"))
        second = await two.submit(ask("same", 33))
        assert (await read(first))[0] == said(world, ask("same"))
        assert (await read(second))[0] == said(world, ask("same", 33))


async def test_a_request_the_engine_refuses_ends_with_its_error(start: Start) -> None:
    async with await (await start()).connect() as client:
        tokens, finished = await read(await client.submit(ask("long", 1020)))
        assert (tokens, finished.reason, finished.error_code) == ([], "error", "context_length_exceeded")
        assert "expected at most 1024" in (finished.message or "")
        _, finished = await read(await client.submit(ask("odd", prompt=(1, 4000))))
        assert finished.error_code == "invalid_token"
        assert (await read(await client.submit(ask("next"))))[1].reason == "length"


async def test_a_missing_adapter_ends_its_own_reply_only(world: World, start: Start) -> None:
    async with await (await start()).connect() as client:
        bad = await client.submit(ask("bad", adapter=AdapterRef("ada0", 7)))
        good = await client.submit(ask("good", adapter=ADA))
        assert (await read(bad))[1].error_code == "adapter_unavailable"
        assert (await read(good))[0] == said(world, ask("good", adapter=ADA))


async def test_what_an_adapters_file_says_is_told_as_it_can_be_sent(world: World, start: Start) -> None:
    folder = version_folder(world.adapters, ADA.id, 3)
    shutil.copytree(version_folder(world.adapters, ADA.id, ADA.version), folder)
    (folder / "adapter_config.json").write_text('{"\\ud800' + "x" * 9000 + '": 1}')  # half a character
    async with await (await start()).connect() as client:
        bad = await client.submit(ask("bad", adapter=AdapterRef(ADA.id, 3)))
        message = (await read(bad))[1].message or ""
        assert "adapter_config.json: \\ud800xxx" in message
        assert len(message) < 2000
        assert (await read(await client.submit(ask("good"))))[1].reason == "length"


async def test_cancel_ends_the_stream(start: Start) -> None:
    async with await (await start()).connect() as client:
        stream = await client.submit(ask("a", sampling=replace(GREEDY, max_tokens=900)))
        await anext(stream)
        await stream.cancel()
        tokens, finished = [], None
        async for event in stream:
            if isinstance(event, FinishedEvent):
                finished = event
            else:
                tokens.append(event)
        assert finished is not None
        assert finished.reason == "cancelled"
        assert len(tokens) < 890
        await stream.cancel()  # too late is no error
        with pytest.raises(StopAsyncIteration):
            await anext(stream)


async def test_a_request_given_up_while_it_is_sent_is_cancelled(start: Start) -> None:
    running = await start()
    async with await running.connect() as client:
        long = ask("x" * 1_000_000, sampling=replace(GREEDY, max_tokens=900))  # more than a socket takes in
        sending = asyncio.create_task(client.submit(long))
        await asyncio.sleep(0)
        assert sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        finished = running.engine.stats().step["finished"]
        while not any(finished.values()):
            finished = (await client.stats())["step"]["finished"]
        assert finished == {"stop": 0, "length": 0, "cancelled": 1, "error": 0}


async def test_the_socket_answers_while_the_engine_steps(start: Start) -> None:
    running = await start()
    step = running.engine.step
    inside, proceed = threading.Event(), threading.Event()

    def slow_step() -> Any:
        inside.set()
        assert proceed.wait(60)
        return step()

    running.engine.step = slow_step  # type: ignore[method-assign]
    async with await running.connect() as client:
        stream = await client.submit(ask("a"))
        await until(inside.is_set)
        async with await running.connect() as second:  # a whole handshake, inside one step
            assert second.connected
        proceed.set()
        assert (await read(stream))[1].reason == "length"


# Questions


async def test_prefetch_brings_the_adapter_near(start: Start) -> None:
    running = await start()
    async with await running.connect() as client:
        await client.prefetch(ADA)
        while not (await client.stats())["adapters"]["resident"]:
            pass  # each question is a round trip
        _, finished = await read(await client.submit(ask("a", adapter=ADA)))
    assert finished.timings.adapter_tier == "device"


async def test_forget_says_what_it_dropped(start: Start) -> None:
    async with await (await start()).connect() as client:
        await read(await client.submit(ask("a", 40, adapter=ADA)))
        running = await client.submit(ask("b", adapter=ADA, sampling=replace(GREEDY, max_tokens=900)))
        await anext(running)
        forgotten = await client.forget(ADA.id)
        assert forgotten.device_slabs > 0
        assert forgotten.host_bytes > 0
        assert forgotten.kv_blocks >= 3
        assert forgotten.cancelled_requests == 1
        assert (await read_to_end(running)).reason == "cancelled"


async def read_to_end(stream: Stream) -> FinishedEvent:
    async for event in stream:
        if isinstance(event, FinishedEvent):
            return event
    raise AssertionError("the stream ended without an end")


async def test_a_failed_integrity_check_is_told(start: Start) -> None:
    running = await start()
    async with await running.connect() as client:
        await client.check_integrity()
        slab = running.engine._pool._free.pop()
        with pytest.raises(CallFailed, match="not on the free list") as caught:
            await client.check_integrity()
        assert caught.value.code == "broken_books"
        running.engine._pool._free.append(slab)


# Bad peers


async def raw(path: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_unix_connection(str(path))


async def last_words(reader: asyncio.StreamReader) -> wire.FromEngine:
    """The last message before the engine closes the connection."""
    async with asyncio.timeout(60):
        bodies = list(wire.FrameReader(1 << 20).feed(await reader.read(-1)))
    return wire.decode_from_engine(bodies[-1])


HELLO = wire.encode(wire.Hello(wire.PROTOCOL, "raw"))
NESTED = b"\x81\xa1x" + 10_000 * b"\x91" + b"\xc0"  # {"x": [[[ … ]]]}


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (wire.encode(wire.Hello(99, "raw")), "protocol_mismatch"),
        (wire.encode(wire.Hello(wire.PROTOCOL, "")), "malformed_frame"),
        (wire.encode(wire.GetStats(1)), "malformed_frame"),
        (HELLO + HELLO, "malformed_frame"),
        (HELLO + struct.pack(">I", 5) + b"junk!", "malformed_frame"),
        (struct.pack(">I", len(NESTED)) + NESTED, "malformed_frame"),
        (HELLO + struct.pack(">I", 1 << 30), "frame_too_large"),
    ],
    ids=["version", "nameless", "no hello", "two hellos", "junk", "nested", "oversize"],
)
async def test_a_bad_frame_closes_its_connection_and_no_other(
    world: World, start: Start, sent: bytes, code: str
) -> None:
    running = await start()
    async with await running.connect() as client:
        stream = await client.submit(ask("a"))
        reader, writer = await raw(running.path)
        writer.write(sent)
        refusal = await last_words(reader)
        assert isinstance(refusal, wire.Refused)
        assert refusal.code == code
        writer.close()
        assert (await read(stream))[0] == said(world, ask("a"))
        assert client.connected


async def test_a_gateway_that_uses_a_number_twice_is_refused_and_others_go_on(
    world: World, start: Start
) -> None:
    running = await start()
    over = ask("a", generated=(7,) * GREEDY.max_tokens)  # its end comes with the next step
    async with await running.connect() as client:
        reader, writer = await raw(running.path)
        writer.write(HELLO + 2 * wire.encode(wire.Submit(1, over)))
        frames, items = wire.FrameReader(1 << 20), list[wire.Tokens | wire.Finished]()
        async with asyncio.timeout(60):
            while len(items) < 2 and (data := await reader.read(1 << 16)):
                for body in frames.feed(data):
                    message = wire.decode_from_engine(body)
                    items += message.items if isinstance(message, wire.Events) else []
        assert [(i.reason, i.error_code) for i in items if isinstance(i, wire.Finished)] == [
            ("error", "duplicate_request"),
            ("length", None),
        ]
        writer.close()
        assert (await read(await client.submit(ask("a"))))[0] == said(world, ask("a"))


async def test_a_client_of_another_protocol_version_is_told_and_does_not_retry(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = await start()
    greet = EngineServer._greet

    def older(self: EngineServer, connection: Any, hello: wire.Hello) -> None:
        greet(self, connection, wire.Hello(hello.protocol - 1, hello.client))

    monkeypatch.setattr(EngineServer, "_greet", older)
    with pytest.raises(EngineRefused, match="expected 1, got 0") as caught:
        await running.connect()
    assert caught.value.code == "protocol_mismatch"


async def test_a_gateway_that_does_not_read_is_cut_off_and_others_go_on(world: World, start: Start) -> None:
    running = await start(max_unsent_bytes=2000)
    question = wire.encode(wire.GetStats(1))

    def is_cut_off() -> bool:
        try:
            deaf.send(question)
        except BlockingIOError:
            return False
        except ConnectionError:
            return True
        return False

    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.setblocking(False)
        deaf.connect(str(running.path))
        deaf.send(HELLO)
        await until(is_cut_off)
    async with await running.connect() as client:
        assert (await read(await client.submit(ask("a"))))[0] == said(world, ask("a"))


async def test_a_gateway_cut_off_for_a_bad_frame_that_does_not_read_is_lost_all_the_same(
    start: Start,
) -> None:
    running = await start(disconnect_grace_s=0.0)
    _reader, writer = await raw(running.path)
    long = ask("a", sampling=replace(GREEDY, max_tokens=1000))
    questions = b"".join(wire.encode(wire.GetStats(call)) for call in range(2000))  # more than a socket holds
    writer.write(HELLO + wire.encode(wire.Submit(1, long)) + questions + b"\xff" * 8)
    async with await running.connect() as client:
        finished = (await client.stats())["step"]["finished"]
        while not any(finished.values()):
            finished = (await client.stats())["step"]["finished"]
        assert finished["cancelled"] == 1
    writer.close()


async def test_only_the_own_user_may_connect(start: Start) -> None:
    assert (await start()).path.stat().st_mode & 0o777 == 0o600


async def test_an_engine_that_was_replaced_leaves_the_socket_to_its_successor(
    world: World, start: Start
) -> None:
    old, new = await start(), await start()
    await old.stop()
    async with await new.connect() as client:
        assert (await read(await client.submit(ask("a"))))[0] == said(world, ask("a"))


# Lost connections


@pytest.mark.parametrize("turns", range(6))
async def test_a_connection_that_comes_in_as_the_engine_ends_is_closed(start: Start, turns: int) -> None:
    running = await start()
    with socket.socket(socket.AF_UNIX) as late:
        late.setblocking(False)
        late.connect(str(running.path))
        late.send(HELLO)
        for _ in range(turns):  # of the loop: accepted, made, greeted
            await asyncio.sleep(0)
        await running.stop()
        with suppress(ConnectionError):
            async with asyncio.timeout(60):
                while await asyncio.get_running_loop().sock_recv(late, 1 << 16):
                    pass


async def test_replies_of_a_lost_gateway_are_cancelled_after_the_grace(start: Start) -> None:
    running = await start(disconnect_grace_s=0.02)
    client = await running.connect()
    stream = await client.submit(ask("a", sampling=replace(GREEDY, max_tokens=1000)))
    await anext(stream)
    await client.close()
    with pytest.raises(EngineLost):
        await read(stream)
    async with await running.connect() as other:
        while (await other.stats())["step"]["finished"]["cancelled"] != 1:
            pass  # each question is a round trip
        assert (await other.stats())["queue"]["running"] == 0


async def test_a_gateway_that_returns_replaces_what_it_had_asked_for(start: Start) -> None:
    running = await start(disconnect_grace_s=600.0)
    client = await running.connect()
    stream = await client.submit(ask("a", sampling=replace(GREEDY, max_tokens=1000)))
    await anext(stream)
    assert client._writer is not None
    client._writer.transport.abort()
    with pytest.raises(EngineLost):
        await read(stream)
    again = await client.submit(ask("a", 40))
    assert (await read(again))[1].reason == "length"
    stats = await client.stats()
    assert stats["step"]["finished"]["cancelled"] == 1
    await client.close()


async def test_a_client_that_may_not_reconnect_says_so(start: Start) -> None:
    running = await start()
    client = await running.connect(reconnect=False)
    await running.stop()
    await until(lambda: not client.connected)
    with pytest.raises(EngineLost):
        await client.submit(ask("a"))
    await client.close()


async def test_connecting_to_nothing_ends_after_the_timeout(tmp_path: Path) -> None:
    with pytest.raises(EngineLost, match=r"no engine answers at .* after 0\.1 s"):
        await EngineClient.connect(tmp_path / "nobody.sock", timeout=0.1)


async def test_an_error_of_the_engine_itself_ends_the_server(start: Start) -> None:
    running = await start()

    def broken() -> Any:
        raise RuntimeError("a bug")

    running.engine.step = broken  # type: ignore[method-assign]
    client = await running.connect(reconnect=False)
    stream = await client.submit(ask("a"))
    with pytest.raises(RuntimeError, match="a bug"):
        await running.task
    with pytest.raises(EngineLost):
        await read(stream)
    assert not running.path.exists()
    await client.close()


# The process

ENGINE = """
import sys
import time
from pathlib import Path
from engine.config import EngineConfig
from engine.engine import Engine
from engine.server import run_engine

model, adapters, path = map(Path, sys.argv[1:4])
steps, step = int(sys.argv[4]), Engine.step

def a_few(engine):
    global steps
    steps -= 1
    if steps < 0:
        time.sleep(3600)
    return step(engine)

Engine.step = a_few
config = EngineConfig(arena_bytes=4 << 20, threads=1)
run_engine(config, model, "tiny", adapters, path, lambda: print("ready", flush=True))
print("bye", flush=True)
"""


@asynccontextmanager
async def process(
    world: World, path: Path, *, steps: int = 1_000_000
) -> AsyncIterator[subprocess.Popen[str]]:
    """An engine that takes so many steps and then hangs."""
    folders = str(world.model_folder), str(world.adapters)
    arguments = [sys.executable, "-c", ENGINE, *folders, str(path), str(steps)]
    running = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)  # noqa: ASYNC220
    try:
        yield running
    finally:
        running.kill()
        running.wait(20)
        assert running.stdout is not None
        running.stdout.close()


async def test_a_killed_engine_is_survived_by_resubmitting_what_was_generated(
    world: World, tmp_path: Path
) -> None:
    path = tmp_path / "engine.sock"
    request = ask("a", 30, adapter=ADA, sampling=SamplingParams(seed=3, max_tokens=400, ignore_eos=True))
    async with process(world, path, steps=20) as first:  # else the reply may be over before the kill
        client = await EngineClient.connect(path, timeout=120)
        old_pid = client.info.pid
        assert old_pid == first.pid
        stream = await client.submit(request)
        tokens: list[int] = []
        with pytest.raises(EngineLost):  # noqa: PT012
            async for event in stream:
                assert isinstance(event, TokensEvent)
                tokens += event.token_ids
                if len(tokens) == 5:
                    first.kill()
        assert not client.connected
    async with process(world, path):
        stream = await client.submit(replace(request, generated=tuple(tokens)))
        whole, finished = await read(stream)
        assert client.info.pid != old_pid
        await client.close()
    assert 5 <= len(tokens) <= 20
    assert whole == said(world, request)
    assert finished.usage.completion_tokens == 400


async def test_the_engine_process_says_when_it_is_ready_and_ends_cleanly_on_sigterm(
    world: World, tmp_path: Path
) -> None:
    path = tmp_path / "engine.sock"
    async with process(world, path) as running:
        assert running.stdout is not None
        assert await asyncio.to_thread(running.stdout.readline) == "ready\n"
        async with await EngineClient.connect(path, reconnect=False) as client:
            await client.submit(ask("a", sampling=replace(GREEDY, max_tokens=1000)))
            running.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(running.wait, 60) == 0
        assert running.stdout.read() == "bye\n"
    assert not path.exists()
