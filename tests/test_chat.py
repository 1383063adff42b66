"""The terminal chat and its client, against a small server that loses its sockets on purpose."""

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.server import Server, ServerConnection, serve

from service.chat import ChatClient, ChatRefused, Terminal, notice_of, who
from tests.waiting import until

Handler = Callable[[ServerConnection, dict[str, Any]], Awaitable[None]]


@asynccontextmanager
async def answering(handle: Handler) -> AsyncIterator[str]:
    """A server that gives each message to `handle`; yields its address."""

    async def talk(socket: ServerConnection) -> None:
        async for message in socket:
            await handle(socket, json.loads(message))

    server: Server
    async with serve(talk, "127.0.0.1", 0, subprotocols=["attune.v1.json"]) as server:  # type: ignore[list-item]
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def reply_events(text: str, version: int = 3) -> list[dict[str, Any]]:
    response = {"id": "resp_1", "metadata": {"adapter_version": str(version)}}
    events: list[dict[str, Any]] = [{"type": "response.created", "response": response}]
    events += [{"type": "response.output_text.delta", "delta": word} for word in text.split(" ")]
    events += [{"type": "response.completed", "response": response}]
    return [e | {"sequence_number": n, "response_id": "resp_1"} for n, e in enumerate(events)]


async def test_a_reply_goes_on_where_it_stopped_when_the_socket_is_lost() -> None:
    events = reply_events("one two three four")
    asked: list[dict[str, Any]] = []

    async def handle(socket: ServerConnection, message: dict[str, Any]) -> None:
        asked.append(message)
        if message["type"] == "response.create":
            for event in events[:3]:
                await socket.send(json.dumps(event))
            await socket.close(1012)
        else:
            for event in events[2:]:  # one the client has seen already, then the rest
                await socket.send(json.dumps(event))

    async with answering(handle) as address, ChatClient(address, "token") as client:
        await client.ask("count")
        said = [e["delta"] async for e in client.reply() if e["type"] == "response.output_text.delta"]
    assert said == ["one", "two", "three", "four"]
    assert asked[1] == {"type": "response.resume", "response_id": "resp_1", "starting_after": 2}


async def test_a_message_that_got_no_answer_is_sent_again_under_its_own_id() -> None:
    asked: list[dict[str, Any]] = []

    async def handle(socket: ServerConnection, message: dict[str, Any]) -> None:
        asked.append(message)
        if len(asked) == 1:
            await socket.close(1011)
            return
        for event in reply_events("done"):
            await socket.send(json.dumps(event))

    async with answering(handle) as address, ChatClient(address, "token") as client:
        await client.ask("hello", model="base")
        assert [e["type"] async for e in client.reply()][-1] == "response.completed"
    assert asked[0] == asked[1]
    assert asked[0]["model"] == "base"


async def test_what_is_said_goes_through_no_proxy_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.setenv("no_proxy", "")

    async def handle(socket: ServerConnection, message: dict[str, Any]) -> None:
        for event in reply_events("one two"):
            await socket.send(json.dumps(event))

    async with answering(handle) as address, ChatClient(address, "token") as client:
        await client.ask("count")
        assert [event async for event in client.reply()] == reply_events("one two")


async def test_a_socket_closed_for_a_bad_credential_is_not_tried_again() -> None:
    async def handle(socket: ServerConnection, message: dict[str, Any]) -> None:
        await socket.close(4401, "the token has expired")

    async with answering(handle) as address, ChatClient(address, "token") as client:
        await client.ask("hello")
        with pytest.raises(ChatRefused, match="4401: the token has expired"):
            await client.next_event()


async def test_an_error_ends_the_wait_for_a_reply() -> None:
    async def handle(socket: ServerConnection, message: dict[str, Any]) -> None:
        error = {"type": "error", "code": "context_length_exceeded", "event_id": message["event_id"]}
        await socket.send(json.dumps(error))

    async with answering(handle) as address, ChatClient(address, "token") as client:
        await client.ask("long")
        assert [e["code"] async for e in client.reply()] == ["context_length_exceeded"]
        assert not client.replying


async def test_an_error_about_something_else_does_not_end_the_wait_for_a_reply() -> None:
    async def handle(socket: ServerConnection, message: dict[str, Any]) -> None:
        if message["type"] == "response.create":
            error = {"type": "error", "code": "store_unavailable", "event_id": "of a refresh"}
            for event in (error, *reply_events("done")):
                await socket.send(json.dumps(event))

    async with answering(handle) as address, ChatClient(address, "token") as client:
        await client.ask("hello")
        kinds = [event["type"] async for event in client.reply()]
    assert kinds == ["error", "response.created", "response.output_text.delta", "response.completed"]


@pytest.mark.parametrize("taken_up", [False, True])
async def test_a_reply_that_is_lost_after_its_first_word_ends_the_wait(taken_up: bool) -> None:
    lost = {"type": "error", "code": "resume_expired", "event_id": None, "response_id": "resp_1"}

    async def handle(socket: ServerConnection, message: dict[str, Any]) -> None:
        if message["type"] == "response.create":
            for event in reply_events("one two")[:2]:
                await socket.send(json.dumps(event))
            if taken_up:
                await socket.close(1012)
                return
        await socket.send(json.dumps(lost))

    async with answering(handle) as address, ChatClient(address, "token") as client:
        await client.ask("count")
        async with asyncio.timeout(60):
            assert [e["type"] async for e in client.reply()][-1] == "error"
        assert not client.replying


async def test_a_stop_that_is_refused_leaves_the_reply_going_on() -> None:
    events = reply_events("one two")

    async def handle(socket: ServerConnection, message: dict[str, Any]) -> None:
        if message["type"] == "response.create":
            for event in events[:2]:
                await socket.send(json.dumps(event))
            return
        about = {name: message.get(name) for name in ("event_id", "response_id")}
        await socket.send(json.dumps({"type": "error", "code": "written_elsewhere", **about}))
        for event in events[2:]:
            await socket.send(json.dumps(event))

    async with answering(handle) as address, ChatClient(address, "token") as client:
        await client.ask("count")
        kinds = []
        async for event in client.reply():
            kinds.append(event["type"])
            if kinds == ["response.created", "response.output_text.delta"]:
                await client.cancel()
        assert kinds[2:] == ["error", "response.output_text.delta", "response.completed"]


async def test_the_terminal_names_the_version_that_answers_and_takes_commands() -> None:
    asked: list[dict[str, Any]] = []

    async def handle(socket: ServerConnection, message: dict[str, Any]) -> None:
        asked.append(message)
        if message["type"] == "response.create":
            for event in reply_events("hi", version=3 if message["model"] == "me" else 0):
                await socket.send(json.dumps(event))
        else:
            await socket.send(json.dumps({"type": "adapter.updated", "from": 3, "to": 4}))

    async def lines() -> AsyncIterator[str]:
        for line in ("hello\n", "/base hello\n", "/refresh\n"):
            yield line
        await until(lambda: "is now version 4" in "".join(written))
        yield "/quit\n"

    written: list[str] = []
    async with answering(handle) as address, ChatClient(address, "token") as client:
        await Terminal(client, lines(), written.append).run()
    shown = "".join(written)
    assert "me v3> hi\n" in shown
    assert "base> hi\n" in shown
    assert "[your adapter is now version 4]" in shown
    assert [m["type"] for m in asked] == ["response.create", "response.create", "adapter.refresh.create"]


async def test_the_terminal_says_once_that_a_refresh_began() -> None:
    async def handle(socket: ServerConnection, message: dict[str, Any]) -> None:
        queued = {"type": "adapter.refresh.queued", "job_id": "j", "state": "queued"}
        await socket.send(json.dumps(queued | {"asked_by": "asked", "progress": 0.0}))  # to all sockets
        await socket.send(json.dumps(queued | {"event_id": message["event_id"]}))  # the answer

    async def lines() -> AsyncIterator[str]:
        yield "/refresh\n"
        await until(lambda: "learning from" in "".join(written))
        await asyncio.sleep(0.2)  # it would be said again about now
        yield "/quit\n"

    written: list[str] = []
    async with answering(handle) as address, ChatClient(address, "token") as client:
        await Terminal(client, lines(), written.append).run()
    assert "".join(written).count("learning from what you wrote") == 1


def test_only_what_a_person_wants_to_know_becomes_a_notice() -> None:
    assert notice_of({"type": "adapter.refresh.progress", "progress": 0.5}) is None
    assert "boom" in str(notice_of({"type": "adapter.refresh.failed", "message": "boom"}))
    few = {"type": "adapter.refresh.failed", "code": "not_enough_turns", "message": "3 of 50"}
    assert notice_of(few) == "nothing learned: 3 of 50"  # which is no failure
    assert who({"metadata": {"adapter_version": "0"}}) == "base"


CHAT = """
import asyncio, sys
from service.chat import chat
asyncio.run(chat(sys.argv[1], "token", as_json={}))
"""


@asynccontextmanager
async def chat_program(*, as_json: bool) -> AsyncIterator[asyncio.subprocess.Process]:
    """The chat as a process of its own, between pipes, against a server that answers with two words."""

    async def handle(socket: ServerConnection, message: dict[str, Any]) -> None:
        for event in reply_events("one two"):
            await socket.send(json.dumps(event))

    pipe = asyncio.subprocess.PIPE
    async with answering(handle) as address:
        program = await asyncio.create_subprocess_exec(
            sys.executable, "-c", CHAT.format(as_json), address,
            stdin=pipe, stdout=pipe, stderr=pipe, cwd=Path(__file__).parent.parent,
        )  # fmt: skip
        try:
            yield program
        finally:
            if program.returncode is None:
                program.kill()
            await program.wait()


@pytest.mark.parametrize("as_json", [False, True])
async def test_an_interrupt_ends_a_chat_whose_input_is_a_pipe_that_stays_open(as_json: bool) -> None:
    async with chat_program(as_json=as_json) as program:
        assert program.stdin is not None
        assert program.stdout is not None
        program.stdin.write(b"how are you?\n")
        await program.stdin.drain()
        async with asyncio.timeout(60):
            await program.stdout.readuntil(b"response.completed" if as_json else b"two\nyou> ")
            program.send_signal(signal.SIGINT)
            await program.wait()


async def test_all_lines_of_a_pipe_are_answered_the_last_one_without_its_end_too() -> None:
    async with chat_program(as_json=False) as program, asyncio.timeout(60):
        said, complaint = await program.communicate("one\nzwölf\n\xff".encode("latin-1"))
    assert said.decode().count("me v3> ") == 3
    assert complaint == b""
    assert program.returncode == 0
