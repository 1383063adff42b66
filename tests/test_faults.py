"""What a chat survives: a gateway, an engine or a Redis that dies, a bad adapter, a client that sleeps."""

import asyncio
import json
import random
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

import openai
import pytest
import websockets
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from engine.engine import Engine
from personalization.history import Turn
from personalization.store import Store, StoreUnavailable, connect
from personalization.when import When
from service.metrics import Metrics
from service.session import NOT_READ, NOT_SAVED, SessionOptions
from service.store_health import CALLS_AT_ONCE, StoreHealth
from tests.redis_fixture import SECRET, RedisServer
from tests.tiny_service import FAST, TOKEN_KEY, Running, TinyService, engine_held
from tests.waiting import until

pytest_plugins = ("tests.service_fixtures",)

LONG = 250


async def alone(service: TinyService, message: str, *, seed: int = 1, tokens: int = LONG, **more: Any) -> str:
    """What the base writes to this message when nothing goes wrong."""
    async with service.gateway() as gateway:
        reply = await gateway.client("control").responses.create(
            model="base",
            input=message,
            store=False,
            max_output_tokens=tokens,
            extra_body={"seed": seed, **more},
        )
        return reply.output_text


@asynccontextmanager
async def gateway_process(service: TinyService, redis_url: str) -> AsyncIterator[tuple[Any, int]]:
    """A gateway of its own process, and its port."""
    given = {
        "redis": redis_url,
        "secret": SECRET.decode(),
        "engine": str(service.engine.socket),
        "token_key": TOKEN_KEY.decode(),
        "adapters": str(service.adapter_root),
        "model": str(service.model.folder),
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.gateway_program", json.dumps(given), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        yield process, int(await asyncio.wait_for(process.stdout.readline(), 60))
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        process._transport.close()  # type: ignore[attr-defined]


async def saved(service: TinyService, count: int) -> list[Turn]:
    """Ann's turns, once there are that many."""
    async with asyncio.timeout(120):
        while True:
            turns = await service.store.turns("ann")
            if len(turns) >= count:
                return turns
            await asyncio.sleep(0.1)


# ---------------------------------------------------------------- the gateway


async def test_a_reply_goes_on_on_another_gateway_after_kill_9(service: TinyService, redis_url: str) -> None:
    expected = await alone(service, "hello")
    async with service.gateway() as other:
        headers = other.headers("ann")
        with engine_held():
            async with gateway_process(service, redis_url) as (process, port):
                url = f"ws://127.0.0.1:{port}/v1/responses"
                async with websockets.connect(url, additional_headers=headers) as connection:
                    create = {
                        "type": "response.create", "input": "hello", "model": "base", "seed": 1,
                        "max_output_tokens": LONG,
                    }  # fmt: skip
                    await connection.send(json.dumps(create))
                    seen = [json.loads(await connection.recv())]
                    while seen[-1]["type"] != "response.output_text.delta":
                        seen.append(json.loads(await connection.recv()))
                    process.send_signal(signal.SIGKILL)
                    with suppress(websockets.ConnectionClosed):
                        while True:
                            seen.append(json.loads(await connection.recv()))
        reply, last = seen[0]["response_id"], seen[-1]["sequence_number"]
        assert seen[-1]["type"] == "response.output_text.delta"
        rest = await other.client("ann").responses.retrieve(reply, stream=True, starting_after=last)
        events = [event.to_dict() async for event in rest]
        numbers = [event["sequence_number"] for event in (*seen, *events)]
        assert numbers == list(range(len(numbers)))
        said = [e["delta"] for e in (*seen, *events) if e["type"] == "response.output_text.delta"]
        assert "".join(said) == expected
        assert events[-1]["response"]["output"][0]["content"][0]["text"] == expected
        turns = await service.store.turns("ann")
        assert [turn.text for turn in turns] == ["hello", expected]


async def test_two_gateways_that_are_asked_for_an_orphan_write_it_once(
    service: TinyService, redis_url: str
) -> None:
    expected = await alone(service, "hello")
    async with service.gateway() as one, service.gateway() as two:
        async with gateway_process(service, redis_url) as (_, port):
            client = openai.AsyncOpenAI(
                base_url=f"http://127.0.0.1:{port}/v1", api_key=one.token("ann"), max_retries=0
            )
            async with client:
                begun = await client.responses.create(
                    model="base",
                    input="hello",
                    background=True,
                    max_output_tokens=LONG,
                    extra_body={"seed": 1},
                )

        async def rest(gateway: Running) -> list[Any]:
            stream = await gateway.client("ann").responses.retrieve(begun.id, stream=True)
            return [event.to_dict() async for event in stream]

        first, second = await asyncio.gather(rest(one), rest(two))
        assert first == second
        assert first[-1]["response"]["output"][0]["content"][0]["text"] == expected


async def test_an_orphan_is_written_and_saved_though_nobody_asks_for_it(
    service: TinyService, redis_url: str
) -> None:
    expected = await alone(service, "hello")
    async with service.gateway() as other:
        async with gateway_process(service, redis_url) as (process, port):
            url = f"ws://127.0.0.1:{port}/v1/responses"
            async with websockets.connect(url, additional_headers=other.headers("ann")) as connection:
                create = {
                    "type": "response.create", "input": "hello", "model": "base", "seed": 1,
                    "max_output_tokens": LONG,
                }  # fmt: skip
                await connection.send(json.dumps(create))
                await connection.recv()
                process.send_signal(signal.SIGKILL)
        assert [turn.text for turn in await saved(service, 2)] == ["hello", expected]


async def test_a_gateway_follows_what_another_writes(service: TinyService) -> None:
    async with service.gateway() as one, service.gateway() as two:
        begun = await one.client("ann").responses.create(
            model="me", input="hello", background=True, max_output_tokens=LONG
        )
        stream = await two.client("ann").responses.retrieve(begun.id, stream=True)
        events = [event async for event in stream]
        assert [event.sequence_number for event in events] == list(range(len(events)))
        with pytest.raises(openai.NotFoundError):
            await two.client("ben").responses.retrieve(begun.id)


async def test_a_gateway_that_stops_cleanly_hands_its_reply_over(service: TinyService) -> None:
    expected = await alone(service, "hello")
    async with service.gateway() as one:
        begun = await one.client("ann").responses.create(
            model="base", input="hello", background=True, max_output_tokens=LONG, extra_body={"seed": 1}
        )
    async with service.gateway() as two:
        stream = await two.client("ann").responses.retrieve(begun.id, stream=True)
        last: Any = [event async for event in stream][-1]
        assert last.response.output_text == expected


async def test_a_background_reply_that_was_taken_over_is_written_to_its_end(service: TinyService) -> None:
    expected = await alone(service, "hello")
    with engine_held() as let_go:
        async with service.gateway() as one:
            await one.client("ann").responses.create(
                model="base", input="hello", background=True, max_output_tokens=LONG, extra_body={"seed": 1}
            )
        # A lease so long that it does not look for orphans by itself meanwhile.
        async with service.gateway(patience=replace(FAST, lease=60.0)) as two:
            await asyncio.sleep(0.1)  # the lease that was let go runs out
            assert await two.gateway.replies.adopt_orphans() == 1
            (reply,) = two.gateway.replies._replies.values()
            await until(lambda: reply.running)
            two.gateway.replies._abandon(reply)  # as when nobody has listened for long
            let_go()
            assert [turn.text for turn in await saved(service, 2)] == ["hello", expected]


async def test_an_orphan_that_cannot_be_read_does_not_keep_the_others_waiting(service: TinyService) -> None:
    """Such as one that another release wrote."""
    record: Any = {"holder": "dead", "lease_s": 0.001, "ttl_s": 60.0}
    await service.store.create_response("ann", "a first one", b"not a plan", **record)
    with engine_held() as let_go:
        async with service.gateway() as one:
            await one.client("ann").responses.create(
                model="base", input="hello", background=True, max_output_tokens=LONG
            )
        async with service.gateway(patience=replace(FAST, lease=60.0)) as two:
            await asyncio.sleep(0.1)  # the lease that was let go runs out
            assert await two.gateway.replies.adopt_orphans() == 1
            let_go()
            assert len(await saved(service, 2)) == 2


async def test_a_reply_whose_gateway_died_after_its_last_word_is_taken_over_once(
    service: TinyService, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(*about: Any, **more: Any) -> None:
        await asyncio.Event().wait()

    async with service.gateway() as one:
        with monkeypatch.context() as patched:
            patched.setattr(service.store, "finish_response", never)
            reply = await one.client("ann").responses.create(model="base", input="hello", max_output_tokens=2)
            one.gateway.replies._tasks[reply.id].cancel()
            await asyncio.sleep(1.2)  # its lease
    async with service.gateway(patience=replace(FAST, keep=0.1)) as two:
        assert await two.gateway.replies.adopt_orphans() == 1
        await asyncio.sleep(1.5)
        assert await service.store.orphans() == []
        assert (await service.store.response("ann", reply.id)).state == "incomplete"


# ---------------------------------------------------------------- the engine


async def test_a_reply_goes_on_when_the_engine_died_in_the_middle(service: TinyService) -> None:
    expected = await alone(service, "hello")
    async with service.gateway() as gateway:
        with engine_held() as let_go:
            stream = await gateway.client("ann").responses.create(
                model="base", input="hello", stream=True, max_output_tokens=LONG, extra_body={"seed": 1}
            )
            seen: list[Any] = []
            died = False
            async for event in stream:
                seen.append(event)
                if event.type == "response.output_text.delta" and not died:
                    died = True
                    let_go()
                    await service.engine.stop()
                    await service.engine.start()
        assert seen[-1].response.output_text == expected
        assert [event.sequence_number for event in seen] == list(range(len(seen)))
        assert gateway.gateway.metrics.resubmitted._value.get() == 1


async def test_a_reply_that_ends_every_engine_is_given_up(
    service: TinyService, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Engine.step

    def breaks(engine: Engine) -> Any:
        if engine.has_work:
            raise MemoryError
        return step(engine)

    async def restart() -> None:
        while True:
            with suppress(MemoryError, ExceptionGroup):
                await service.engine.ended()
            await service.engine.start()

    async with service.gateway() as gateway:
        with monkeypatch.context() as patched:
            patched.setattr(Engine, "step", breaks)
            restarting = asyncio.create_task(restart())
            asking = gateway.client("ann").responses.create(model="me", input="x")
            failed = await asyncio.wait_for(asking, 120)
            restarting.cancel()
        assert failed.status == "failed"
        assert failed.error is not None
        assert str(failed.error.code) == "engine_unavailable"
        assert failed.error.message == "the engine was lost 5 times without a word of this reply"
        await service.engine.stop()
        await service.engine.start()
        assert (await gateway.client("ann").responses.create(model="me", input="y")).output_text


async def test_a_reply_waits_for_an_engine_and_gives_up_in_the_end(service: TinyService) -> None:
    session = SessionOptions(engine_patience=0.3)
    async with service.gateway(session=session) as gateway:
        await service.engine.stop()
        await asyncio.sleep(0.05)
        client = gateway.client("ann")
        failed = await client.responses.create(model="me", input="hello")
        assert failed.status == "failed"
        assert failed.error is not None
        assert str(failed.error.code) == "engine_unavailable"
        with pytest.raises(openai.InternalServerError) as caught:
            await client.chat.completions.create(model="me", messages=[{"role": "user", "content": "x"}])
        assert (caught.value.status_code, caught.value.code) == (503, "engine_unavailable")
        ready = await client.with_options(max_retries=0)._client.get(f"{gateway.url}/ready")
        assert ready.status_code == 503
        await service.engine.start()
        assert [turn.text for turn in await service.store.turns("ann")] == ["hello", "x"]


async def test_a_clock_that_is_set_meanwhile_ends_no_wait_for_an_engine(service: TinyService) -> None:
    ahead = 0.0
    async with service.gateway(clock=lambda: time.time() + ahead) as gateway:
        await service.engine.stop()
        await asyncio.sleep(0.05)
        client, replies = gateway.client("ann"), gateway.gateway.replies
        begun = await client.responses.create(model="me", input="hello", background=True)
        ahead = 1800.0
        await asyncio.sleep(0.5)
        await service.engine.start()
        whole = await asyncio.wait_for(replies._replies[begun.id].finished(), 60)
        assert (whole.status, whole.error) == ("incomplete", None)


async def test_a_reply_can_be_stopped_while_the_engine_is_away(service: TinyService) -> None:
    async with service.gateway() as gateway:
        await service.engine.stop()
        await asyncio.sleep(0.05)
        client = gateway.client("ann")
        begun = await client.responses.create(model="me", input="hello", background=True)
        stopped = await asyncio.wait_for(client.responses.cancel(begun.id), 60)
        assert stopped.status == "cancelled"
        await service.engine.start()


# ---------------------------------------------------------------- Redis


@pytest.fixture
def own_store(redis_server: RedisServer) -> Store:
    # Long enough for a Redis that is there, on a machine that pauses.
    return Store(connect(redis_server.url), SECRET, deadline_s=4.0)


async def test_a_chat_goes_on_without_redis_and_says_that_nothing_is_saved(
    service: TinyService, own_store: Store, redis_server: RedisServer
) -> None:
    async with service.gateway(store=own_store, store_patience_s=0.2) as gateway:
        client = gateway.client("ann")
        before = await client.responses.create(model="me", input="one", conversation="c")
        assert before.usage is not None
        redis_server.kill()
        during = await client.responses.create(model="me", input="two", conversation="c")
        assert during.metadata is not None
        assert during.metadata["history_saved"] == "false"
        assert during.metadata["notice"] == f"{NOT_READ}; {NOT_SAVED}"
        assert during.usage is not None
        assert during.usage.input_tokens > before.usage.input_tokens  # it still knew what was said
        assert len(during.output_text) == 24
        assert (await client._client.get(f"{gateway.url}/ready")).status_code == 503
        assert (await client._client.get(f"{gateway.url}/health")).status_code == 200
        with pytest.raises(openai.InternalServerError) as caught:
            await client.models.list()
        assert caught.value.code == "store_unavailable"
        redis_server.start()
        assert await gateway.gateway.health.back(60)
        after = await client.responses.create(model="me", input="three", conversation="c")
        assert after.metadata is not None
        assert after.metadata["history_saved"] == "true"
        assert (await client._client.get(f"{gateway.url}/ready")).status_code == 200
        saved = [turn.text for turn in await own_store.turns("ann") if turn.role == "user"]
        assert saved == ["one", "three"]
    await own_store.close()


async def test_what_redis_was_away_for_is_saved_with_the_reply_once_it_is_back(
    service: TinyService, own_store: Store, redis_server: RedisServer
) -> None:
    with engine_held() as let_go:
        async with service.gateway(store=own_store, store_patience_s=0.2) as gateway:
            client, replies = gateway.client("ann"), gateway.gateway.replies._replies
            await client.responses.create(model="me", input="one", max_output_tokens=1)
            redis_server.kill()
            stream = await client.responses.create(
                model="me", input="two", stream=True, max_output_tokens=LONG
            )
            await until(lambda: len(replies) == 2)
            redis_server.start()
            assert await gateway.gateway.health.back(60)
            let_go()
            events: list[Any] = [event async for event in stream]
            first, last = events[0].response, events[-1].response
            assert (first.metadata["history_saved"], last.metadata["history_saved"]) == ("false", "true")
            assert first.metadata["notice"] == f"{NOT_READ}; {NOT_SAVED}"
            assert last.metadata["notice"] == NOT_READ
            turns = await own_store.turns("ann")
            assert [turn.text for turn in turns if turn.role == "user"] == ["one", "two"]
            assert [turn.id for turn in turns[2:]] == [last.metadata["user_turn_id"], last.output[0].id]
    await own_store.close()


async def test_a_short_absence_of_redis_in_a_reply_loses_nothing(
    service: TinyService, own_store: Store, redis_server: RedisServer
) -> None:
    async with service.gateway(store=own_store, store_patience_s=10.0) as gateway:
        stream = await gateway.client("ann").responses.create(
            model="me", input="hello", stream=True, max_output_tokens=LONG
        )
        seen: list[Any] = []
        async for event in stream:
            seen.append(event)
            if len(seen) == 20:
                redis_server.kill()
                redis_server.start()
        text = seen[-1].response.output_text
        assert len(text) == LONG
        assert seen[-1].response.metadata["history_saved"] == "true"
        assert [turn.text for turn in await own_store.turns("ann")] == ["hello", text]
        stored = await own_store.read_response_events(seen[0].response.id)
        assert [number for number, _ in stored] == list(range(len(seen)))
    await own_store.close()


async def test_sockets_hear_how_a_refresh_stands_though_redis_fails_again_as_they_are_told(
    service: TinyService, own_store: Store, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress, failures = own_store.progress, 0

    async def stalled_once(user: str) -> dict[str, Any] | None:
        nonlocal failures
        if failures:
            return await progress(user)
        redis_server.stall()
        try:
            return await progress(user)
        finally:
            failures += 1
            redis_server.resume()

    monkeypatch.setattr(own_store, "progress", stalled_once)
    await own_store.publish_progress("ann", {"job_id": "j", "state": "completed"})
    async with service.gateway(store=own_store) as gateway:
        headers = gateway.headers("ann")
        async with websockets.connect(
            gateway.socket_url, subprotocols=["attune.v1.json"], additional_headers=headers
        ) as connection:
            assert json.loads(await connection.recv())["type"] == "session.created"
            redis_server.kill()
            redis_server.start()
            told = json.loads(await asyncio.wait_for(connection.recv(), 60))
            assert (told["type"], told["job_id"], failures) == ("adapter.refresh.completed", "j", 1)
    await own_store.close()


async def test_a_forget_that_a_gateway_did_not_hear_of_leaves_nothing_in_its_memory(
    service: TinyService, own_store: Store, redis_server: RedisServer
) -> None:
    async def forget() -> None:
        store = Store(connect(redis_server.url), SECRET)
        async with Redis.from_url(redis_server.url) as redis:
            await redis.client_kill_filter(_type="pubsub")
        await store.forget("ann")
        await store.close()

    async with service.gateway(store=own_store) as gateway:
        remembered = gateway.gateway.session._remembered
        for user in ("ann", "ben"):
            await gateway.client(user).responses.create(model="me", input="hello", max_output_tokens=1)
        with ThreadPoolExecutor(1) as elsewhere:
            elsewhere.submit(asyncio.run, forget()).result()  # the gateway does nothing meanwhile
        await until(lambda: "ann" not in remembered)
        assert list(remembered) == ["ben"]
    await own_store.close()


async def test_a_forget_elsewhere_leaves_no_reply_in_a_gateways_memory(service: TinyService) -> None:
    with engine_held() as let_go:
        async with service.gateway() as gateway:
            client, replies = gateway.client("ann"), gateway.gateway.replies._replies
            ended = await client.responses.create(model="me", input="hello", max_output_tokens=1)
            await client.responses.create(model="me", input="hello", background=True, max_output_tokens=LONG)
            await service.store.forget("ann")
            await until(lambda: ended.id not in replies, seconds=FAST.keep / 2)
            with pytest.raises(openai.NotFoundError):
                await client.responses.retrieve(ended.id)
            let_go()
            await until(lambda: not replies, seconds=FAST.keep / 2)


async def test_a_reply_begun_without_redis_is_not_saved_for_someone_who_was_forgotten_meanwhile(
    service: TinyService, own_store: Store, redis_server: RedisServer
) -> None:
    with engine_held() as let_go:
        async with service.gateway(store=own_store, store_patience_s=0.2) as gateway:
            client, replies = gateway.client("ann"), gateway.gateway.replies
            await client.responses.create(model="me", input="before", max_output_tokens=1)
            redis_server.kill()
            stream = await client.responses.create(
                model="me", input="hello", stream=True, max_output_tokens=LONG
            )
            (reply,) = (reply for reply in replies._replies.values() if reply.plan.epoch is None)
            redis_server.start()
            assert await gateway.gateway.health.back(60)
            await own_store.forget("ann")
            let_go()
            with suppress(openai.APIError):  # what was said is gone, too
                async for _ in stream:
                    pass
            await until(lambda: not reply.running)
            assert await own_store.turns("ann") == []
            async with Redis.from_url(redis_server.url) as redis:
                assert await redis.keys("*") == [f"attune:life:{own_store.adapter_id('ann')}".encode()]
    await own_store.close()


async def test_a_reply_whose_last_words_redis_missed_is_kept_whole_once_it_is_back(
    service: TinyService, own_store: Store, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = own_store.append_response_events

    async def killed_at_the_end(reply_id: str, first: int, events: list[bytes], **more: Any) -> None:
        if b"response.incomplete" not in events[-1]:
            return await append(reply_id, first, events, **more)
        monkeypatch.undo()
        redis_server.kill()
        try:
            await append(reply_id, first, events, **more)
        finally:
            redis_server.start()

    monkeypatch.setattr(own_store, "append_response_events", killed_at_the_end)
    async with service.gateway(store=own_store, store_patience_s=60.0) as gateway:
        reply = await gateway.client("ann").responses.create(model="me", input="hello")
        await gateway.gateway.replies._ended(gateway.gateway.replies._replies[reply.id])
        assert (await own_store.response("ann", reply.id)).state == "incomplete"
    async with service.gateway(store=own_store) as gateway:
        kept = await asyncio.wait_for(gateway.client("ann").responses.retrieve(reply.id), 60)
        assert kept.output_text == reply.output_text
    await own_store.close()


@pytest.mark.parametrize("keep", [3.0, 0.1])
async def test_a_reply_that_was_stopped_without_redis_is_not_written_further_once_it_is_back(
    service: TinyService, own_store: Store, redis_server: RedisServer, keep: float
) -> None:
    """However long it was away: for longer than a reply is kept, in the second case. And though its client
    has read it to its end."""
    patience = replace(FAST, lease=0.2, keep=keep)
    with engine_held() as let_go:
        async with service.gateway(store=own_store, store_patience_s=0.1, patience=patience) as gateway:
            client, replies = gateway.client("ann"), gateway.gateway.replies
            begun = await client.responses.create(
                model="me", input="hello", background=True, max_output_tokens=LONG
            )
            reply = replies._replies[begun.id]
            await until(lambda: reply.text)
            redis_server.kill()
            reply.cancel("cancelled")
            let_go()
            await until(lambda: reply.done and not reply.running)
            replies.acknowledge(reply, len(reply.entries) - 1)
            await asyncio.sleep(min(1.0, 5 * keep))
            redis_server.start()
            assert await gateway.gateway.health.back(60)
            await until(lambda: begun.id not in replies._replies)
            await asyncio.sleep(3 * patience.lease)
            kept = await client.responses.retrieve(begun.id)
            assert (kept.status, kept.output_text) == ("cancelled", reply.text)
            assert [turn.text for turn in await own_store.turns("ann")] == ["hello"]
    await own_store.close()


@pytest.mark.parametrize("read", [False, True])
async def test_a_stopped_reply_whose_beginning_redis_took_without_saying_so_is_not_written_again(
    service: TinyService, own_store: Store, monkeypatch: pytest.MonkeyPatch, read: bool
) -> None:
    """Nor when its client has read it to its end at once."""
    create = own_store.create_response

    async def unanswered(*about: Any, **more: Any) -> bool:
        await create(*about, **more)
        raise StoreUnavailable("no answer within 4 s")

    monkeypatch.setattr(own_store, "create_response", unanswered)
    patience = replace(FAST, lease=0.2, keep=3.0)
    with engine_held() as let_go:
        async with service.gateway(store=own_store, patience=patience) as gateway:
            client, replies = gateway.client("ann"), gateway.gateway.replies
            begun = await client.responses.create(
                model="me", input="hello", background=True, max_output_tokens=LONG
            )
            reply = replies._replies[begun.id]
            await until(lambda: reply.text)
            reply.cancel("cancelled")
            let_go()
            await until(lambda: reply.done and not reply.running)
            if read:
                replies.acknowledge(reply, len(reply.entries) - 1)
            await until(lambda: begun.id not in replies._replies)
            await asyncio.sleep(3 * patience.lease)
            kept = await client.responses.retrieve(begun.id)
            assert (kept.status, kept.output_text) == ("cancelled", reply.text)
            assert gateway.gateway.metrics.adopted._value.get() == 0
    await own_store.close()


async def test_a_message_sent_twice_at_once_without_redis_gets_one_reply(
    service: TinyService, own_store: Store, redis_server: RedisServer
) -> None:
    async with service.gateway(store=own_store, store_patience_s=0.1) as gateway:
        redis_server.kill()
        client, key = gateway.client("ann"), {"idempotency-key": "once"}
        asked = [client.responses.create(model="me", input="hello", extra_headers=key) for _ in range(2)]
        one, other = await asyncio.gather(*asked)
        assert (one.id, one.output_text) == (other.id, other.output_text)
        assert gateway.gateway.metrics.replies.labels(outcome="max_output_tokens")._value.get() == 1
        redis_server.start()
    await own_store.close()


async def test_a_response_is_not_said_to_be_deleted_while_redis_is_away(
    service: TinyService, own_store: Store, redis_server: RedisServer
) -> None:
    async with service.gateway(store=own_store, store_patience_s=0.2) as gateway:
        client = gateway.client("ann")
        reply = await client.responses.create(model="me", input="hello", max_output_tokens=2)
        redis_server.kill()
        with pytest.raises(openai.InternalServerError) as caught:
            await client.responses.delete(reply.id)
        assert caught.value.code == "store_unavailable"
        redis_server.start()
        assert await gateway.gateway.health.back(60)
        await client.responses.delete(reply.id)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(reply.id)
    await own_store.close()


async def test_a_redis_that_a_script_kept_busy_is_found_again(
    own_store: Store, redis_server: RedisServer
) -> None:
    health = StoreHealth(own_store, Metrics(), every_s=0.05)
    async with Redis.from_url(redis_server.url) as one, Redis.from_url(redis_server.url) as two:
        await one.config_set("lua-time-limit", 100)
        endless = asyncio.ensure_future(one.eval("while true do end", 0))
        with pytest.raises(ResponseError, match="busy"):  # noqa: PT012  (not at once: once it has begun)
            while True:
                await two.ping()
        health.failed()
        await asyncio.sleep(0.3)  # meanwhile it answers that it is busy
        assert health.away
        await two.script_kill()
        assert await health.back(60)
        with pytest.raises(ResponseError):
            await endless
    await health.close()
    await own_store.close()


async def test_who_stood_in_line_as_redis_went_does_not_wait_for_it_too(
    own_store: Store, redis_server: RedisServer
) -> None:
    health, asked = StoreHealth(own_store, Metrics(), patience_s=0.0), 0

    async def ping() -> None:
        nonlocal asked
        asked += 1
        await own_store.ping()

    redis_server.stall()
    outcomes = await asyncio.gather(
        *(health.ask(ping) for _ in range(3 * CALLS_AT_ONCE)), return_exceptions=True
    )
    assert all(isinstance(outcome, StoreUnavailable) for outcome in outcomes)
    assert asked == CALLS_AT_ONCE
    redis_server.resume()
    assert await health.back(60)
    await health.ask(ping)
    await health.close()
    await own_store.close()


# ---------------------------------------------------------------- adapters


async def test_a_bad_adapter_is_replaced_by_the_version_before_it(service: TinyService) -> None:
    async with service.gateway() as gateway:
        good = await service.give_adapter("ann", 1)
        bad = await service.give_adapter("ann", 2, good=False)
        client = gateway.client("ann")
        expected = await client.responses.create(model=f"me@{good}", input="hi", store=False, temperature=0)
        served = await client.responses.create(model="me", input="hi", store=False, temperature=0)
        assert served.output_text == expected.output_text
        assert served.metadata is not None
        assert served.metadata["adapter_version"] == str(good)
        assert f"version {bad} could not be loaded" in served.metadata["notice"]
        saved = await client.responses.create(model="me", input="hi")
        assert saved.output[0].id is not None
        assert (await service.store.turn("ann", saved.output[0].id)).version == good


async def test_a_bad_adapter_is_not_replaced_by_one_that_saw_what_was_taken_out(service: TinyService) -> None:
    async with service.gateway() as gateway:
        good = await service.give_adapter("ann", 1)
        await service.give_adapter("ann", 2, turn_ids=["taken out"])
        bad = await service.give_adapter("ann", 3, good=False)
        served = await gateway.client("ann").responses.create(model="me", input="hi", store=False)
        assert served.metadata is not None
        assert f"version {bad} could not be loaded, version {good} answered" in served.metadata["notice"]


async def test_a_bad_adapter_is_not_replaced_by_one_that_the_person_went_back_from(
    service: TinyService,
) -> None:
    async with service.gateway() as gateway:
        good = await service.give_adapter("ann", 1)
        left = await service.give_adapter("ann", 2)
        assert await service.store.compare_and_set("ann", left, good)
        bad = await service.give_adapter("ann", 3, good=False)
        served = await gateway.client("ann").responses.create(model="me", input="hi", store=False)
        assert served.metadata is not None
        assert f"version {bad} could not be loaded, version {good} answered" in served.metadata["notice"]


async def test_without_any_good_version_the_base_answers(service: TinyService) -> None:
    async with service.gateway() as gateway:
        await service.give_adapter("ann", 2, good=False)
        client = gateway.client("ann")
        stream = await client.responses.create(
            model="me", input="hi", store=False, stream=True, extra_body={"seed": 1}
        )
        events: list[Any] = [event async for event in stream]
        told = [event for event in events if event.type == "response.in_progress"]
        assert [event.response.metadata["adapter_version"] for event in told] == ["1", "0"]
        base = await client.responses.create(model="base", input="hi", store=False, extra_body={"seed": 1})
        assert events[-1].response.output_text == base.output_text


async def test_a_reply_keeps_its_version_while_a_new_one_is_published(service: TinyService) -> None:
    async with service.gateway() as gateway:
        await service.give_adapter("ann", 1)
        client = gateway.client("ann")

        async def ask(model: str) -> Any:
            return await client.responses.create(
                model=model, input="hi", store=False, temperature=0, max_output_tokens=LONG, stream=True
            )

        undisturbed = [event async for event in await ask("me")][-1].response.output_text
        seen = []
        async for event in await ask("me"):
            seen.append(event)
            if len(seen) == 20:
                assert await service.give_adapter("ann", 2) == 2
        assert seen[-1].response.metadata["adapter_version"] == "1"
        assert seen[-1].response.output_text == undisturbed
        after = [event async for event in await ask("me")][-1].response
        assert after.metadata["adapter_version"] == "2"
        assert after.output_text != undisturbed


async def test_enough_new_turns_ask_for_a_refresh(service: TinyService) -> None:
    eager = When(minimum_turns=2, after_turns=2, worth_at_once=0.001)
    session = SessionOptions(max_output_tokens=2, when=eager)
    async with service.gateway(session=session) as gateway:
        client = gateway.client("ann")
        for expected in ([], [("ann", "turns")]):
            await gateway.done_with((await client.responses.create(model="me", input="hello")).id)
            assert gateway.calls.refreshes == expected
        never = SessionOptions(max_output_tokens=2, when=replace(eager, after_turns=0))
        async with service.gateway(session=never) as other:
            reply = await other.client("ann").responses.create(model="me", input="hello")
            await other.done_with(reply.id)
            assert other.calls.refreshes == []


async def test_a_version_that_cannot_be_loaded_is_learned_again_once(service: TinyService) -> None:
    session = SessionOptions(max_output_tokens=2, when=When(minimum_turns=2, after_turns=50))
    async with service.gateway(session=session) as gateway:
        await service.give_adapter("ann", 1)
        await service.give_adapter("ann", 2, good=False)
        client = gateway.client("ann")
        for expected in ([], [("ann", "turns")], [("ann", "turns")]):  # one turn is too few to learn from
            await gateway.done_with((await client.responses.create(model="me", input="hello")).id)
            assert gateway.calls.refreshes == expected
        await gateway.done_with((await client.responses.create(model="me@1", input="hello")).id)
        assert gateway.calls.refreshes == expected


async def test_a_version_that_cannot_be_loaded_is_asked_for_until_its_refresh_may_begin(
    service: TinyService,
) -> None:
    """One that failed for good is not begun again at once by what its person says."""
    states, asked = ["failed", "failed", "queued", "queued"], 0

    async def refresh(user: str, reason: str) -> dict[str, Any]:
        nonlocal asked
        asked += 1
        return {"job_id": "job-1", "state": states[asked - 1]}

    session = SessionOptions(max_output_tokens=2, when=When(minimum_turns=1, after_turns=50))
    async with service.gateway(session=session) as gateway:
        gateway.gateway.session.refresh = refresh
        await service.give_adapter("ann", 1)
        await service.give_adapter("ann", 2, good=False)
        for expected in (1, 2, 3, 3):
            reply = await gateway.client("ann").responses.create(model="me", input="hello")
            await gateway.done_with(reply.id)
            assert asked == expected


# ---------------------------------------------------------------- clients


@asynccontextmanager
async def sleeper(gateway: Running) -> AsyncIterator[None]:
    """A client of ann's that opens a socket, asks for a long reply and reads nothing of it."""
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.connect(("127.0.0.1", gateway.port))
    connection = await websockets.connect(
        gateway.socket_url,
        sock=raw,
        subprotocols=["attune.v1.json"],
        additional_headers=gateway.headers("ann"),
        max_queue=1,
        ping_interval=None,
    )
    create = {"type": "response.create", "input": "x", "max_output_tokens": LONG}
    await connection.send(json.dumps(create))
    try:
        yield
    finally:
        connection.transport.abort()


def pad(gateway: Running) -> None:
    """Something large for ann's sockets."""
    gateway.gateway.sockets.tell("ann", {"type": "adapter.updated", "padding": "x" * 100_000})


async def gone(gateway: Running) -> None:
    """Returns when no socket is left."""
    async with asyncio.timeout(60):
        while gateway.gateway.metrics.sockets._value.get():
            await asyncio.sleep(0.05)
            assert not gateway.server.should_exit


async def test_a_client_that_stops_reading_is_dropped_and_its_reply_is_not(service: TinyService) -> None:
    async with service.gateway() as gateway, sleeper(gateway):
        await until(lambda: gateway.gateway.replies._replies)
        for _ in range(200):
            pad(gateway)
            await asyncio.sleep(0.01)
        await gone(gateway)
        assert gateway.gateway.metrics.sockets_closed.labels(code="1013")._value.get() == 1
        assert len((await saved(service, 2))[-1].text) == LONG


async def test_a_client_that_neither_reads_nor_answers_pings_is_let_go(service: TinyService) -> None:
    # The first ping comes late enough for the writer to be stuck before it goes unanswered.
    pings = {"ws_ping_interval": 4.0, "ws_ping_timeout": 0.5}
    async with service.gateway(server=pings) as gateway, sleeper(gateway):
        await until(lambda: "ann" in gateway.gateway.sockets._open)
        (open_socket,) = gateway.gateway.sockets._open["ann"]
        while not open_socket._outbox:  # until the kernel takes no more and the writer is stuck
            pad(gateway)
            await asyncio.sleep(0.002)
            assert gateway.gateway.sockets._open
        await gone(gateway)
        assert "1013" not in str(list(gateway.gateway.metrics.sockets_closed.collect()))


# ---------------------------------------------------------------- company


async def test_no_token_of_one_persons_reply_is_in_anothers(service: TinyService) -> None:
    """Eight people with their own adapters talk at once, stop, leave and come back at random. Whatever each
    saw is the beginning of what they see when they are alone."""
    people = [f"person{number}" for number in range(8)]
    async with service.gateway() as gateway:
        for seed, user in enumerate(people):
            await service.give_adapter(user, seed)
        clients = {user: gateway.client(user) for user in people}

        def ask(user: str, seed: int) -> dict[str, Any]:
            return {
                "model": "me", "input": f"I am {user}", "store": False, "max_output_tokens": 60,
                "extra_body": {"seed": seed},
            }  # fmt: skip

        solo = {
            (user, seed): (await clients[user].responses.create(**ask(user, seed))).output_text
            for user in people
            for seed in range(2)
        }
        assert len(set(solo.values())) == len(solo)

        async def chat(user: str, seed: int) -> None:
            dice = random.Random(f"{user} {seed}")
            async with asyncio.timeout(200):
                stream = await clients[user].responses.create(**ask(user, seed), stream=True)
                seen, text, leave = [], "", dice.randint(5, 70)
                async for event in stream:
                    seen.append(event)
                    if event.type == "response.output_text.delta":
                        text += event.delta
                    if len(seen) == leave:
                        break
                await stream.close()
                reply = seen[0].response.id
                if dice.random() < 0.5:
                    await clients[user].responses.cancel(reply)
                rest = await clients[user].responses.retrieve(
                    reply, stream=True, starting_after=seen[-1].sequence_number
                )
                async for event in rest:
                    if event.type == "response.output_text.delta":
                        text += event.delta
            assert solo[user, seed].startswith(text)
            assert len(text) > 0

        for _ in range(2):
            await asyncio.gather(*(chat(user, seed) for user in people for seed in range(2)))
    await service.engine.check()
