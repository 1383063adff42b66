"""The WebSocket: the official SDK on it, our subprotocols, what closes it and what does not."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import msgpack
import msgspec
import pytest
import websockets
from msgspec import structs
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import InvalidStatus

from personalization.store import StoreUnavailable
from service.limits import Limits
from service.reply import Reply
from service.sockets import SocketOptions
from service.writing import Ending, Writing
from tests.tiny_service import FAST, Running, TinyService, engine_held

pytest_plugins = ("tests.service_fixtures",)

LONG_S = 60.0  # for what comes at once, on a machine that pauses
JSON = "attune.v1.json"
MSGPACK = "attune.v1.msgpack"


@asynccontextmanager
async def socket(
    gateway: Running, user: str = "ann", protocol: str | None = JSON, **options: Any
) -> AsyncIterator[ClientConnection]:
    subprotocols = None if protocol is None else [protocol]
    settings = {"additional_headers": gateway.headers(user), "compression": None} | options
    async with websockets.connect(gateway.socket_url, subprotocols=subprotocols, **settings) as connection:
        yield connection


async def send(connection: ClientConnection, **message: Any) -> None:
    await connection.send(json.dumps(message))


async def receive(connection: ClientConnection) -> Any:
    return json.loads(await asyncio.wait_for(connection.recv(), LONG_S))


async def until(connection: ClientConnection, *kinds: str) -> list[Any]:
    """Everything received up to the first event of one of these types."""
    seen = [await receive(connection)]
    while seen[-1]["type"] not in kinds:
        seen.append(await receive(connection))
    return seen


ENDS = ("response.completed", "response.incomplete", "response.failed")


async def read_to_its_end(connection: ClientConnection) -> str:
    """Read the reply that was asked for and acknowledge all of it; its id, once the service has heard so."""
    last = (await until(connection, *ENDS))[-1]
    about = {"response_id": last["response_id"], "sequence_number": last["sequence_number"]}
    await send(connection, type="response.ack", **about)
    await send(connection, type="ping", id="read")
    await until(connection, "pong")
    return str(last["response_id"])


def text(events: list[Any]) -> str:
    return "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")


# ---------------------------------------------------------------- the SDK


async def test_the_official_sdk_talks_over_a_websocket_unchanged(service: TinyService) -> None:
    async with service.gateway() as gateway:
        async with gateway.client("ann").responses.connect() as connection:
            await connection.response.create(model="me", input="hello")
            events = []
            async for event in connection:
                events.append(event)
                if event.type == "response.incomplete":
                    break
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert events[0].type == "response.created"  # and nothing of ours before it
        assert events[-1].response.output_text == "".join(
            event.delta for event in events if event.type == "response.output_text.delta"
        )


async def test_the_sdk_sees_an_error_as_an_event_and_goes_on(service: TinyService) -> None:
    async with service.gateway() as gateway, gateway.client("ann").responses.connect() as connection:
        await connection.response.create(model="ann@1", input="hello")
        error = await connection.recv()
        assert error.type == "error"
        assert error.error.code == "model_not_found"
        assert error.status == 404
        await connection.response.create(model="me", input="hello", max_output_tokens=1)
        assert (await connection.recv()).type == "response.created"


# ---------------------------------------------------------------- our subprotocols


async def test_a_session_begins_with_who_and_which_adapter(service: TinyService) -> None:
    async with service.gateway() as gateway:
        version = await service.give_adapter("ann", 1)
        async with socket(gateway) as connection:
            assert connection.subprotocol == JSON
            hello = await receive(connection)
        assert hello["type"] == "session.created"
        assert hello["user"] == "ann"
        assert (hello["adapter"]["version"], hello["adapter"]["base"]) == (version, "tiny")
        assert hello["expires_at"] > 0


async def test_msgpack_frames_carry_the_same_conversation(service: TinyService) -> None:
    async with service.gateway() as gateway, socket(gateway, protocol=MSGPACK) as connection:
        assert msgpack.unpackb(await connection.recv())["type"] == "session.created"
        await connection.send(msgpack.packb({"type": "response.create", "input": "hello", "seed": 1}))
        events = [msgpack.unpackb(await connection.recv())]
        while events[-1]["type"] not in ENDS:
            events.append(msgpack.unpackb(await connection.recv()))
        assert len(text(events)) == 24


async def test_a_plain_socket_hears_nothing_it_did_not_ask_for(service: TinyService) -> None:
    async with service.gateway() as gateway, socket(gateway, protocol=None) as connection:
        await service.give_adapter("ann", 1)
        await send(connection, type="ping", id=1)
        assert await receive(connection) == {"type": "pong", "id": 1}


async def test_every_socket_of_a_person_hears_of_a_new_adapter_and_nobody_elses(service: TinyService) -> None:
    async with (
        service.gateway() as gateway,
        socket(gateway) as one,
        socket(gateway) as two,
        socket(gateway, "ben") as other,
    ):
        for connection in (one, two, other):
            await until(connection, "session.created")
        await service.give_adapter("ann", 1)
        for connection in (one, two):
            assert await receive(connection) == {"type": "adapter.updated", "from": 0, "to": 1}
        training = {"job_id": "j", "state": "training", "progress": 0.5}
        await service.store.publish_progress("ann", training)
        assert await receive(two) == {"type": "adapter.refresh.progress", **training}
        await send(other, type="ping", id=2)
        assert (await receive(other))["type"] == "pong"


async def test_a_refresh_can_be_asked_for(service: TinyService) -> None:
    async with service.gateway() as gateway, socket(gateway) as connection:
        await until(connection, "session.created")
        await send(connection, type="adapter.refresh.create", event_id="e1")
        told = await receive(connection)
        assert (told["type"], told["event_id"], told["job_id"]) == ("adapter.refresh.queued", "e1", "job-1")
        assert gateway.calls.refreshes == [("ann", "asked")]


async def test_feedback_is_saved_and_a_correction_is_a_turn(service: TinyService) -> None:
    async with service.gateway() as gateway, socket(gateway) as connection:
        await send(connection, type="response.create", input="hello")
        last = (await until(connection, *ENDS))[-1]
        item = last["response"]["output"][0]["id"]
        await send(connection, type="feedback.create", item_id=item, rating="up", event_id="f1")
        assert await receive(connection) == {
            "type": "feedback.created", "item_id": item, "rating": "up", "correction_id": None,
            "event_id": "f1",
        }  # fmt: skip
        assert (await service.store.turn("ann", item)).rating == "up"
        await send(connection, type="feedback.create", item_id=item, correction="say this")
        correction = await service.store.turn("ann", (await receive(connection))["correction_id"])
        assert (correction.text, correction.author, correction.corrects) == ("say this", "person", item)


async def test_the_next_reply_reads_a_correction_where_the_reply_was(service: TinyService) -> None:
    async with service.gateway() as gateway, socket(gateway) as connection:
        await send(connection, type="response.create", input="hello")
        first = (await until(connection, *ENDS))[-1]["response"]["output"][0]
        await send(connection, type="feedback.create", item_id=first["id"], correction="say this")
        await until(connection, "feedback.created")
        await send(connection, type="response.create", input="and now?", max_output_tokens=2)
        last = (await until(connection, *ENDS))[-1]["response"]
        reply = await gateway.gateway.replies.find("ann", last["id"])
        read = service.model.renderer().decode(reply.plan.prompt)
        assert read == "hellosay thisand now?"
        assert await service.store.learned_count("ann") == 3


async def test_feedback_on_anothers_turn_is_an_unknown_turn(service: TinyService) -> None:
    async with service.gateway() as gateway:
        reply = await gateway.client("ann").responses.create(model="me", input="hello")
        async with socket(gateway, "ben") as connection:
            await until(connection, "session.created")
            for item in (reply.output[0].id, "nothing"):
                await send(connection, type="feedback.create", item_id=item, rating="down")
                assert (await receive(connection))["code"] == "turn_not_found"
        assert reply.output[0].id is not None
        assert (await service.store.turn("ann", reply.output[0].id)).rating is None


async def test_typing_fetches_the_adapter_before_the_message(service: TinyService) -> None:
    options = SocketOptions(prefetch_every=0.0)
    async with service.gateway(sockets=options) as gateway, socket(gateway) as connection:
        await until(connection, "session.created")
        await service.give_adapter("ann", 1)
        await send(connection, type="typing")
        async with asyncio.timeout(LONG_S):
            while not (await gateway.gateway.deps.engine.stats())["adapters"]["resident"]:
                pass  # each question is a round trip
        await send(connection, type="response.create", input="hello", max_output_tokens=1)
        metadata = (await until(connection, *ENDS))[-1]["response"]["metadata"]
        assert metadata["adapter_version"] == "1"
        assert metadata["adapter_tier"] in ("device", "host")


# ---------------------------------------------------------------- asking, stopping, taking up again


async def test_messages_of_one_socket_go_on_in_its_conversation(service: TinyService) -> None:
    async with service.gateway() as gateway, socket(gateway) as connection:
        conversations = []
        for said in ("one", "two"):
            await send(connection, type="response.create", input=said, max_output_tokens=2)
            last = (await until(connection, *ENDS))[-1]
            conversations.append(last["response"]["conversation"]["id"])
        assert len(set(conversations)) == 1
        assert len(await service.store.conversation("ann", conversations[0])) == 4


async def test_several_replies_share_a_socket_and_keep_apart(service: TinyService) -> None:
    async with service.gateway() as gateway, socket(gateway) as connection:
        await until(connection, "session.created")
        for lane in ("a", "b", "c"):
            await send(
                connection, type="response.create", input=lane, conversation=lane, stream_id=lane, seed=1,
                store=False, model="base",
            )  # fmt: skip
        lanes: dict[str, list[Any]] = {"a": [], "b": [], "c": []}
        while any(not lane or lane[-1]["type"] not in ENDS for lane in lanes.values()):
            event = await receive(connection)
            lanes[event["stream_id"]].append(event)
        for lane in lanes.values():
            assert len({event["response_id"] for event in lane}) == 1
            assert [event["sequence_number"] for event in lane] == list(range(len(lane)))
            assert text(lane) == lane[-1]["response"]["output"][0]["content"][0]["text"]
        assert len({text(lane) for lane in lanes.values()}) == 3


async def test_one_reply_too_many_is_refused_and_the_socket_stays(service: TinyService) -> None:
    limits = Limits(replies_per_socket=1)
    async with service.gateway(limits=limits) as gateway, socket(gateway) as connection:
        await send(connection, type="response.create", input="x", max_output_tokens=300)
        await until(connection, "response.created")
        await send(connection, type="response.create", input="y", event_id="e2", stream_id="s")
        error = (await until(connection, "error"))[-1]
        assert (error["code"], error["event_id"], error["stream_id"]) == ("rate_limit_exceeded", "e2", "s")
        assert error["retryable"] is True
        await until(connection, *ENDS)


async def test_a_full_socket_may_hear_one_of_its_replies_anew(service: TinyService) -> None:
    limits = Limits(replies_per_socket=1)
    async with service.gateway(limits=limits) as gateway, socket(gateway) as connection:
        await send(connection, type="response.create", input="x", max_output_tokens=300)
        reply = (await until(connection, "response.output_text.delta"))[-1]["response_id"]
        await send(connection, type="response.resume", response_id=reply)
        await until(connection, "response.created")
        assert len(text(await until(connection, *ENDS))) == 300


async def test_a_cancelled_reply_says_so_and_keeps_what_was_written(service: TinyService) -> None:
    async with service.gateway() as gateway, socket(gateway) as connection:
        await send(connection, type="response.create", input="x", max_output_tokens=500)
        seen = await until(connection, "response.output_text.delta")
        await send(connection, type="response.cancel", response_id=seen[-1]["response_id"])
        seen += await until(connection, *ENDS)
        response = seen[-1]["response"]
        assert response["status"] == "cancelled"
        shown = text(seen)
        assert 0 < len(shown) < 500
        assert (await service.store.turns("ann"))[-1].text == shown


async def test_nobody_can_cancel_or_resume_anothers_reply(service: TinyService) -> None:
    async with service.gateway() as gateway, socket(gateway) as ann, socket(gateway, "ben") as ben:
        await send(ann, type="response.create", input="x", max_output_tokens=60)
        reply = (await until(ann, "response.created"))[-1]["response_id"]
        await until(ben, "session.created")
        for kind, more in (
            ("response.cancel", {}),
            ("response.resume", {}),
            ("response.ack", {"sequence_number": 0}),
        ):
            await send(ben, type=kind, response_id=reply, event_id="e", **more)
            theirs = await receive(ben)
            await send(ben, type=kind, response_id="resp_none", event_id="e", **more)
            nobodys = await receive(ben)
            assert theirs["code"] == nobodys["code"] == "response_not_found"
            assert theirs["message"].replace(reply, "R") == nobodys["message"].replace("resp_none", "R")
        assert (await until(ann, *ENDS))[-1]["response"]["status"] == "incomplete"


async def test_a_reply_outlives_its_socket_and_is_resumed_exactly(service: TinyService) -> None:
    async with service.gateway() as gateway:
        async with socket(gateway) as connection:
            await send(connection, type="response.create", input="x", seed=4, max_output_tokens=200)
            seen = await until(connection, "response.output_text.delta")
        reply, last = seen[-1]["response_id"], seen[-1]["sequence_number"]
        async with socket(gateway) as connection:
            await until(connection, "session.created")
            await send(connection, type="response.resume", response_id=reply, starting_after=last)
            seen += await until(connection, *ENDS)
        numbers = [event["sequence_number"] for event in seen if "sequence_number" in event]
        assert numbers == sorted(set(numbers))
        assert text(seen) == seen[-1]["response"]["output"][0]["content"][0]["text"]
        assert len(text(seen)) == 200


async def test_who_has_seen_more_of_a_reply_than_will_ever_be_written_hears_of_its_end(
    service: TinyService,
) -> None:
    """As after the death of a gateway that showed events while Redis was away: what is written again may come
    in fewer of them."""
    with engine_held() as let_go:
        async with service.gateway() as gateway, socket(gateway) as connection:
            await send(connection, type="response.create", input="x", model="base")
            reply = (await until(connection, "response.output_text.delta"))[-1]["response_id"]
            await send(connection, type="response.resume", response_id=reply, starting_after=500)
            await send(connection, type="ping")
            await until(connection, "pong")
            let_go()
            error = (await until(connection, "error"))[-1]
            assert (error["response_id"], error["param"]) == (reply, "starting_after")


async def test_what_was_said_right_before_the_socket_closed_is_answered(service: TinyService) -> None:
    async with service.gateway() as gateway:
        async with socket(gateway) as connection:
            await until(connection, "session.created")
            await send(connection, type="response.create", input="one", conversation="c")
            await send(connection, type="response.create", input="two", conversation="c")
        async with asyncio.timeout(LONG_S):
            while len(turns := await service.store.turns("ann")) < 4:  # noqa: ASYNC110  (of Redis)
                await asyncio.sleep(0.1)
        assert [turn.text for turn in turns if turn.role == "user"] == ["one", "two"]
        assert [turn.role for turn in turns].count("assistant") == 2


async def test_a_message_is_answered_though_the_socket_is_closed_as_it_is_looked_at(
    service: TinyService, monkeypatch: pytest.MonkeyPatch
) -> None:
    append, saved = service.store.append, asyncio.Event()

    async def slow(*about: Any, **more: Any) -> int:
        added = await append(*about, **more)
        saved.set()
        await asyncio.sleep(0.2)
        return added

    async with service.gateway() as gateway, socket(gateway) as connection:
        monkeypatch.setattr(service.store, "append", slow)
        await send(connection, type="response.create", input="one")
        await asyncio.wait_for(saved.wait(), LONG_S)
        await connection.send("no message")
        with pytest.raises(websockets.ConnectionClosed) as caught:
            await until(connection, *ENDS)
        assert caught.value.rcvd is not None
        assert caught.value.rcvd.code == 4400
        async with asyncio.timeout(LONG_S):
            while len(await service.store.turns("ann")) < 2:  # noqa: ASYNC110  (of Redis)
                await asyncio.sleep(0.1)


async def test_a_finished_reply_is_replayed_from_any_number(service: TinyService) -> None:
    async with service.gateway() as gateway, socket(gateway) as connection:
        await send(connection, type="response.create", input="x")
        whole = (await until(connection, *ENDS))[1:]
        for after in (-1, 3, len(whole) - 2):
            await send(
                connection, type="response.resume", response_id=whole[0]["response_id"], starting_after=after
            )
            assert await until(connection, *ENDS) == whole[after + 1 :]


async def test_the_same_event_id_attaches_to_the_reply_it_began(service: TinyService) -> None:
    async with service.gateway() as gateway:
        async with socket(gateway) as connection:
            await send(connection, type="response.create", input="x", event_id="once")
            await until(connection, "response.created")
        async with socket(gateway) as connection:
            await until(connection, "session.created")
            await send(connection, type="response.create", input="x", event_id="once")
            assert len(text(await until(connection, *ENDS))) == 24
            await send(connection, type="response.create", input="y", event_id="once")
            assert (await receive(connection))["code"] == "idempotency_conflict"
        assert len(await service.store.turns("ann")) == 2


async def test_a_message_sent_again_may_be_sent_another_way(service: TinyService) -> None:
    """Its stream_id names a lane of one socket, and a client without a socket asks over HTTP."""
    async with service.gateway() as gateway:
        async with socket(gateway) as connection:
            await send(connection, type="response.create", input="x", event_id="once", stream_id="lane 1")
            reply = (await until(connection, "response.created"))[-1]["response_id"]
        async with socket(gateway) as connection:
            await until(connection, "session.created")
            await send(connection, type="response.create", input="x", event_id="once", stream_id="lane 2")
            created = await receive(connection)
            assert (created["response_id"], created["stream_id"]) == (reply, "lane 2")
        again = await gateway.client("ann").responses.create(
            model="me", input="x", extra_headers={"idempotency-key": "once"}
        )
        assert again.id == reply
        stream = await gateway.client("ann").responses.create(
            model="me", input="x", extra_headers={"idempotency-key": "once"}, stream=True
        )
        assert {event.to_dict()["response_id"] async for event in stream} == {reply}
        assert len(await service.store.turns("ann")) == 2


async def test_a_reply_that_nobody_listens_to_ends_and_is_kept(service: TinyService) -> None:
    patience = replace(FAST, orphan=0.1)
    async with service.gateway(patience=patience) as gateway:
        with engine_held():
            async with socket(gateway) as connection:
                await send(connection, type="response.create", input="x", max_output_tokens=500)
                reply = (await until(connection, "response.output_text.delta"))[-1]["response_id"]
            await asyncio.wait_for(gateway.gateway.replies._replies[reply].cancelled.wait(), LONG_S)
        await gateway.done_with(reply)
        ended = await gateway.client("ann").responses.retrieve(reply)
        assert ended.incomplete_details is not None
        assert (ended.status, ended.incomplete_details.reason) == ("incomplete", "disconnected")
        assert (await service.store.turns("ann"))[-1].text == ended.output_text


async def test_a_reply_of_much_text_reaches_a_client_that_reads(service: TinyService) -> None:
    async with service.gateway() as gateway, socket(gateway) as connection:
        await send(connection, type="response.create", input="x", max_output_tokens=2)
        short = (await until(connection, *ENDS))[-1]["response_id"]
        plan = (await gateway.gateway.replies.find("ann", short)).plan
        reply = Reply(structs.replace(plan, id="resp_long"))
        record: Any = {"holder": "another gateway", "ttl_s": 60.0}
        body = msgspec.msgpack.encode(reply.plan)
        await service.store.create_response("ann", reply.id, body, lease_s=60.0, **record)

        async def write(events: list[Any]) -> None:
            entries, first = reply.number(events, ()), len(reply.entries)
            reply.feed(entries)
            stored = [entry.stored() for entry in entries]
            await service.store.append_response_events(reply.id, first, stored, **record)

        writing = Writing(reply, service.model.renderer().stream_decoder())
        await write(writing.opening())
        await send(connection, type="response.resume", response_id=reply.id)
        await until(connection, "response.content_part.added")
        writing.text = "é" * 60_000
        await write(writing.closing(Ending("completed"), None, {}, 1.0))
        assert (await until(connection, *ENDS))[-1]["type"] == "response.completed"
        await send(connection, type="response.resume", response_id=reply.id)
        assert len(await until(connection, *ENDS)) == len(reply.entries)


async def test_an_acknowledged_reply_leaves_memory_and_can_still_be_read(service: TinyService) -> None:
    async with service.gateway() as gateway, socket(gateway) as connection:
        await send(connection, type="response.create", input="x")
        last = (await until(connection, *ENDS))[-1]
        await send(
            connection, type="response.ack", response_id=last["response_id"],
            sequence_number=last["sequence_number"],
        )  # fmt: skip
        await send(connection, type="ping")
        await until(connection, "pong")
        assert last["response_id"] not in gateway.gateway.replies._replies
        assert (await gateway.client("ann").responses.retrieve(last["response_id"])).status == "incomplete"


# ---------------------------------------------------------------- what closes it and what does not


async def test_an_unknown_message_is_an_error_and_never_a_close(service: TinyService) -> None:
    async with service.gateway() as gateway, socket(gateway) as connection:
        await until(connection, "session.created")
        for message in (
            {"type": "x", "event_id": "e"},
            {},
            {"type": 5},
            {"type": "response.create", "seed": {}},
        ):
            await connection.send(json.dumps(message))
            assert (await receive(connection))["type"] == "error"
        await send(connection, type="ping", id="still here")
        assert (await receive(connection))["id"] == "still here"


@pytest.mark.parametrize(
    ("protocol", "frame", "code"),
    [
        (JSON, "{", 4400),
        (JSON, "[]", 4400),
        (JSON, "[" * 100_000, 4400),
        (JSON, b"{}", 1003),
        (MSGPACK, "{}", 1003),
        (MSGPACK, b"\xc1", 4400),
        (MSGPACK, b"\x91" * 200_000, 4400),
        (None, '"x"', 4400),
        (JSON, '{"a":"' + "x" * (1 << 20) + '"}', 1009),
        (MSGPACK, b"\xff" * ((1 << 20) + 1), 1009),
    ],
)
async def test_a_frame_that_is_no_message_closes_the_socket(
    service: TinyService, protocol: str | None, frame: str | bytes, code: int
) -> None:
    async with service.gateway() as gateway, socket(gateway, protocol=protocol) as connection:
        await connection.send(frame)
        await asyncio.wait_for(connection.wait_closed(), LONG_S)
        assert connection.close_code == code


async def test_text_that_is_not_utf8_closes_with_1007(service: TinyService) -> None:
    async with service.gateway() as gateway, socket(gateway) as connection:
        await connection.send(b"\xff\xfe", text=True)
        await asyncio.wait_for(connection.wait_closed(), LONG_S)
        assert connection.close_code == 1007


async def closed_with(gateway: Running, **options: Any) -> int:
    async with websockets.connect(gateway.socket_url, **options) as connection:
        await asyncio.wait_for(connection.wait_closed(), LONG_S)
        assert connection.close_code is not None
        return connection.close_code


async def test_a_socket_without_a_good_credential_is_closed_with_4401(service: TinyService) -> None:
    async with service.gateway() as gateway:
        assert await closed_with(gateway) == 4401
        assert await closed_with(gateway, additional_headers={"authorization": "Bearer x"}) == 4401
        assert await closed_with(gateway, subprotocols=[JSON, "ticket.nonsense"]) == 4401
        old = {"authorization": f"Bearer {gateway.token('ann', -1)}"}
        assert await closed_with(gateway, additional_headers=old) == 4401


async def test_who_cannot_be_let_in_while_the_store_is_away_hears_nothing_of_where_it_is(
    service: TinyService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even when its path is so long that it fits no close frame."""

    async def away(_: str) -> None:
        raise StoreUnavailable("Error 2 connecting to unix:///data/" + "資料" * 50)

    async with service.gateway() as gateway:
        monkeypatch.setattr(service.store, "take_ticket", away)
        async with websockets.connect(gateway.socket_url, subprotocols=[JSON, "ticket.x"]) as connection:
            with pytest.raises(websockets.ConnectionClosed) as caught:
                await asyncio.wait_for(connection.recv(), LONG_S)
        assert caught.value.rcvd is not None
        assert (caught.value.rcvd.code, caught.value.rcvd.reason) == (1013, "the history cannot be reached")


async def test_forgetting_waits_for_what_follows_a_reply_that_was_read_to_its_end(
    service: TinyService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a refresh that it still asks for would name the person after they were forgotten."""
    finish, held, following = service.store.finish_response, asyncio.Event(), asyncio.Event()

    async def finish_later(*about: Any, **more: Any) -> None:
        following.set()
        await held.wait()
        await finish(*about, **more)

    async with service.gateway() as gateway, socket(gateway) as connection:
        monkeypatch.setattr(service.store, "finish_response", finish_later)
        await send(connection, type="response.create", input="x", max_output_tokens=2)
        await read_to_its_end(connection)
        await asyncio.wait_for(following.wait(), LONG_S)
        stopping = asyncio.create_task(gateway.gateway.replies.stop_all("ann"))
        await asyncio.sleep(0.05)
        assert not stopping.done()
        held.set()
        await asyncio.wait_for(stopping, LONG_S)


async def test_a_reply_that_was_read_to_its_end_is_let_go(service: TinyService) -> None:
    async with service.gateway() as gateway, socket(gateway) as connection:
        await send(connection, type="response.create", input="x", max_output_tokens=2)
        reply = await read_to_its_end(connection)
        await gateway.done_with(reply)
        assert reply not in gateway.gateway.replies._replies


async def test_a_reply_taken_up_while_its_last_task_ends_keeps_the_new_one(service: TinyService) -> None:
    async with service.gateway() as gateway:
        done = await gateway.client("ann").responses.create(model="me", input="x", max_output_tokens=2)
        replies = gateway.gateway.replies
        plan = (await replies.find("ann", done.id)).plan
        plan = structs.replace(plan, id="resp_elsewhere")
        record: Any = {"holder": "another gateway", "lease_s": 60.0, "ttl_s": 60.0}
        await service.store.create_response("ann", plan.id, msgspec.msgpack.encode(plan), **record)
        first = await replies.find("ann", plan.id)  # followed, not written
        before = replies._tasks[plan.id]
        replies._abandon(first)
        second = replies._own(Reply(plan))
        await asyncio.wait({before})
        await asyncio.sleep(0)
        assert not replies._tasks[plan.id].done()
        replies._abandon(second)


async def test_a_ticket_opens_one_socket_from_its_page_only(service: TinyService) -> None:
    async with service.gateway() as gateway:
        client = gateway.client("ann", default_headers={"origin": gateway.url})
        bought: Any = await client.post("/../attune/tickets", cast_to=object)
        offer = [JSON, f"ticket.{bought['ticket']}"]
        async with websockets.connect(
            gateway.socket_url, subprotocols=offer, origin=gateway.url
        ) as connection:
            assert connection.subprotocol == JSON
            assert (await receive(connection))["user"] == "ann"
        assert await closed_with(gateway, subprotocols=offer, origin=gateway.url) == 4401


async def test_a_foreign_page_is_refused_before_the_handshake(service: TinyService) -> None:
    async with service.gateway() as gateway:
        for origin in ("http://evil.example", "null"):
            with pytest.raises(InvalidStatus) as caught:
                async with socket(gateway, origin=origin):
                    pass
            assert caught.value.response.status_code == 403


async def test_a_socket_ends_when_its_credential_does(service: TinyService) -> None:
    async with service.gateway() as gateway:
        headers = {"authorization": f"Bearer {gateway.token('ann', 5)}"}
        async with websockets.connect(
            gateway.socket_url, subprotocols=[JSON], additional_headers=headers
        ) as connection:
            warned = (await until(connection, "session.expiring"))[-1]
            assert warned["reason"] == "credential"
            await asyncio.wait_for(connection.wait_closed(), LONG_S)
            assert connection.close_code == 4401


async def test_no_message_is_acted_on_after_its_credential_ended_as_the_machine_slept(
    service: TinyService,
) -> None:
    slept = 0.0
    async with service.gateway(clock=lambda: time.time() + slept) as gateway, socket(gateway) as connection:
        await until(connection, "session.created")
        slept = 2 * 3600.0
        await send(connection, type="response.create", input="x")
        await asyncio.wait_for(connection.wait_closed(), LONG_S)
        assert connection.close_code == 4401
        assert await service.store.turns("ann") == []


async def test_a_socket_ends_at_its_age_and_says_so_before(service: TinyService) -> None:
    options = SocketOptions(max_age=0.3, warn_before=0.2)
    async with service.gateway(sockets=options) as gateway, socket(gateway) as connection:
        warned = (await until(connection, "session.expiring"))[-1]
        assert (warned["reason"], warned["seconds"]) == ("max_age", 0.2)
        await asyncio.wait_for(connection.wait_closed(), LONG_S)
        assert connection.close_code == 1001


async def test_a_person_has_so_many_sockets_and_no_more(service: TinyService) -> None:
    async with service.gateway(limits=Limits(sockets_per_user=1)) as gateway:
        async with socket(gateway) as connection:
            await until(connection, "session.created")
            assert await closed_with(gateway, additional_headers=gateway.headers("ann")) == 4429
            async with socket(gateway, "ben") as other:
                await until(other, "session.created")
        async with socket(gateway) as connection:
            await until(connection, "session.created")


async def test_more_messages_than_a_person_may_send_are_errors(service: TinyService) -> None:
    limits = Limits(messages="3/day")  # whose end seldom comes between two of them
    async with service.gateway(limits=limits) as gateway, socket(gateway) as connection:
        await until(connection, "session.created")
        for _ in range(4):
            await send(connection, type="ping")
        kinds = [(await receive(connection))["type"] for _ in range(4)]
        assert kinds == ["pong", "pong", "pong", "error"]


async def test_a_gateway_that_stops_says_so_and_closes_with_1012(service: TinyService) -> None:
    async with service.gateway() as gateway, socket(gateway) as connection:
        await until(connection, "session.created")
        await gateway.gateway.announce_shutdown()
        gateway.server.should_exit = True
        assert (await receive(connection))["reason"] == "shutdown"
        await asyncio.wait_for(connection.wait_closed(), LONG_S)
        assert connection.close_code == 1012
