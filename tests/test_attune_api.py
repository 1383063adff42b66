"""Our own endpoints: coming in, the adapter, history in and out, what was learned; health, metrics, the
page."""

import asyncio
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from personalization.history import MAX_TEXT_CHARS, Turn, dump
from personalization.jobs import QueueStats, cancel_jobs, open_queue, queue_stats, request_refresh
from personalization.store import Standing, Store, StoreUnavailable, connect
from personalization.when import When
from service.engine_metrics import STEP_PARTS
from service.errors import NotFound
from service.input import said_in_response
from service.limits import Limits
from service.page import NOT_BUILT, page_app
from service.protocol import CreateResponse
from service.session import SessionOptions
from tests.redis_fixture import SECRET, RedisServer
from tests.tiny_service import Running, TinyService

pytest_plugins = ("tests.service_fixtures",)


def web(gateway: Running, user: str | None = "ann", **headers: str) -> httpx2.AsyncClient:
    credential = {} if user is None else gateway.headers(user)
    return httpx2.AsyncClient(base_url=gateway.url, headers=credential | headers)


def turn(number: int, **changes: Any) -> Turn:
    at = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=number)
    said = {"role": "user", "text": f"turn {number}", "author": "person"} | changes
    return Turn(id=f"t{number}", conversation="c", at=at, **said)


async def test_everything_of_ours_wants_a_credential(service: TinyService) -> None:
    versions = ("versions", "versions/1/turns")
    paths = {
        "GET": ("me", "conversations", "conversations/c", "export", "turns/learned", *versions),
        "POST": ("tickets", "rollback", "refresh", "import", "feedback"),
        "DELETE": ("me", "turns/t/learning"),
    }
    async with service.gateway() as gateway, web(gateway, None) as client:
        for method, names in paths.items():
            for name in names:
                answer = await client.request(method, f"/attune/{name}")
                assert answer.status_code == 401, name
                assert answer.json()["error"]["code"] == "invalid_api_key"
                assert answer.headers["www-authenticate"] == "Bearer"


async def test_me_says_who_which_adapter_and_what_there_is_to_learn(service: TinyService) -> None:
    async with service.gateway() as gateway, web(gateway) as client:
        await service.store.append("ann", [turn(0), turn(1, role="assistant", author="model")])
        version = await service.give_adapter("ann", 1)
        me = (await client.get("/attune/me")).json()
        assert me["user"] == "ann"
        assert (me["adapter"]["version"], me["adapter"]["base"]) == (version, "tiny")
        assert datetime.fromisoformat(me["adapter"]["updated_at"]).tzinfo is not None
        assert (me["learned_turns"], me["learned_since_refresh"]) == (1, 1)
        assert me["samples"] == [{"name": "sam", "title": "Sam", "blurb": "a sample"}]
        assert me["limits"]["context_tokens"] == 1024


async def test_conversations_are_listed_and_read_by_their_owner_only(service: TinyService) -> None:
    async with service.gateway() as gateway, web(gateway) as ann, web(gateway, "ben") as ben:
        await service.store.append("ann", [turn(0), turn(1, role="assistant", author="model", version=2)])
        (summary,) = (await ann.get("/attune/conversations")).json()["conversations"]
        assert (summary["id"], summary["title"], summary["turns"]) == ("c", "turn 0", 2)
        turns = (await ann.get("/attune/conversations/c")).json()["turns"]
        assert [(t["role"], t["text"], t["version"]) for t in turns] == [
            ("user", "turn 0", None),
            ("assistant", "turn 1", 2),
        ]
        assert {"id", "at", "author", "rating"} <= set(turns[0])
        assert (await ben.get("/attune/conversations")).json()["conversations"] == []
        assert (await ben.get("/attune/conversations/c")).status_code == 404


async def test_an_export_imports_into_the_same_history(service: TinyService) -> None:
    async with service.gateway() as gateway, web(gateway) as client:
        await service.store.append("ann", [turn(0), turn(1, role="assistant", author="model", rating="up")])
        exported = await client.get("/attune/export")
        assert exported.headers["content-type"].startswith("application/x-ndjson")
        again = (await client.post("/attune/import", content=exported.content)).json()
        assert again == {"imported": 0, "known": 2, "errors": []}
        await service.store.forget("ann")
        assert (await client.post("/attune/import", content=exported.content)).json()["imported"] == 2
        assert (await client.get("/attune/export")).content == exported.content


async def test_an_import_of_who_is_forgotten_meanwhile_leaves_nothing(
    service: TinyService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("personalization.store.APPEND_BATCH", 1)
    body = "\n".join(dump("ann", [turn(number) for number in range(500)]))
    async with service.gateway() as gateway, web(gateway) as client, asyncio.timeout(20):
        importing = asyncio.create_task(client.post("/attune/import", content=body))
        while not await service.store.recent("ann", 1):  # noqa: ASYNC110  (of Redis: nothing to wait on)
            await asyncio.sleep(0)
        await service.store.forget("ann")
        answer = await importing
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "conflict")
        assert await service.store.turns("ann") == []


async def test_an_import_reports_bad_lines_and_leaves_other_peoples_out(service: TinyService) -> None:
    line = {"user": "ann", "conversation": "c", "at": "2026-01-01T00:00:00Z", "role": "user", "text": "hi"}
    lines = [line, {**line, "user": "ben"}, "nonsense", {**line, "at": "2099-01-01T00:00:00Z"}]
    body = "\n".join(each if isinstance(each, str) else json.dumps(each) for each in lines)
    async with service.gateway() as gateway, web(gateway) as client:
        told = (await client.post("/attune/import", content=body)).json()
        assert told["imported"] == 1
        assert sorted(error["line"] for error in told["errors"]) == [0, 3, 4]
        assert await service.store.turns("ben") == []


async def test_a_learned_turn_can_be_taken_out_of_learning(service: TinyService) -> None:
    async with service.gateway() as gateway, web(gateway) as client, web(gateway, "ben") as ben:
        await service.store.append("ann", [turn(0), turn(1)])
        assert len((await client.get("/attune/turns/learned")).json()["turns"]) == 2
        assert (await ben.delete("/attune/turns/t0/learning")).status_code == 404
        assert (await client.delete("/attune/turns/t0/learning")).status_code == 200
        (left,) = (await client.get("/attune/turns/learned")).json()["turns"]
        assert left["id"] == "t1"
        assert len((await client.get("/attune/conversations/c")).json()["turns"]) == 2


async def test_versions_are_shown_and_one_can_be_gone_back_to(service: TinyService) -> None:
    async with service.gateway() as gateway, web(gateway) as client, web(gateway, "ben") as ben:
        await service.give_adapter("ann", 1)
        await service.give_adapter("ann", 2)
        told = (await client.get("/attune/versions")).json()
        assert told["serving"] == 2
        assert [(v["version"], v["parent"], v["serving"]) for v in told["versions"]] == [
            (2, 1, True),
            (1, 0, False),
        ]
        assert (await client.post("/attune/rollback", json={"version": 1})).status_code == 200
        assert (await client.post("/attune/rollback", json={"version": 9})).status_code == 404
        assert (await ben.post("/attune/rollback", json={"version": 1})).status_code == 404
        assert (await client.post("/attune/rollback", json={"version": "x"})).status_code == 400
        assert gateway.calls.rollbacks == [("ann", 1)]


async def test_what_a_version_learned_from_is_shown_and_taking_one_out_marks_it(service: TinyService) -> None:
    async with service.gateway() as gateway, web(gateway) as client, web(gateway, "ben") as ben:
        await service.store.append("ann", [turn(0), turn(1), turn(2)])
        await service.give_adapter("ann", 1, turn_ids=["t0"])
        await service.give_adapter("ann", 2, turn_ids=["t1", "t2"])
        told = (await client.get("/attune/versions/2/turns")).json()
        assert [(each["id"], each["text"], each["learned"]) for each in told["turns"]] == [
            ("t1", "turn 1", True),
            ("t2", "turn 2", True),
        ]
        assert (await ben.get("/attune/versions/2/turns")).status_code == 404
        assert (await client.get("/attune/versions/9/turns")).status_code == 404
        assert await marked(client) == {2: 0, 1: 0}
        await client.delete("/attune/turns/t1/learning")
        assert await marked(client) == {2: 1, 1: 0}
        await client.delete("/attune/turns/t0/learning")
        assert await marked(client) == {2: 2, 1: 1}
        told = (await client.get("/attune/versions/2/turns")).json()
        assert [each["learned"] for each in told["turns"]] == [False, True]


async def marked(client: httpx2.AsyncClient) -> dict[int, int]:
    shown = (await client.get("/attune/versions")).json()["versions"]
    return {each["version"]: each["marked"] for each in shown}


async def test_a_refresh_is_asked_for_by_its_person(service: TinyService) -> None:
    async with service.gateway() as gateway, web(gateway) as client:
        answer = await client.post("/attune/refresh")
        assert (answer.status_code, answer.json()) == (202, {"job_id": "job-1", "state": "queued"})
        assert gateway.calls.refreshes == [("ann", "asked")]


async def test_forgetting_stops_what_is_written_and_leaves_nothing_behind(service: TinyService) -> None:
    async with service.gateway() as gateway, web(gateway) as client:
        sdk = gateway.client("ann")
        begun = await sdk.responses.create(model="me", input="hello", background=True, max_output_tokens=500)
        forgotten = await client.delete("/attune/me")
        assert forgotten.status_code == 200
        assert forgotten.json()["forgotten"]["turns"] >= 1
        assert gateway.calls.forgotten == ["ann"]
        assert await service.store.turns("ann") == []
        assert (await client.get(f"/v1/responses/{begun.id}")).status_code == 404
        again = await sdk.responses.create(model="me", input="hello again", max_output_tokens=2)
        assert again.metadata is not None
        assert again.metadata["history_saved"] == "true"
        assert len(await service.store.turns("ann")) == 2


async def test_whoever_waits_for_a_reply_that_was_forgotten_before_its_first_word_is_told(
    service: TinyService,
) -> None:
    async with service.gateway() as gateway:
        asked = CreateResponse(input="hello")
        reply = await gateway.gateway.session.answer("ann", asked, said_in_response(asked), None)
        await gateway.gateway.replies.stop_all("ann")
        with pytest.raises(NotFound):
            await asyncio.wait_for(reply.finished(), 60)


async def test_nothing_is_asked_for_a_forgotten_person_by_a_reply_that_was_just_ending(
    service: TinyService, monkeypatch: pytest.MonkeyPatch
) -> None:
    standing = service.store.standing

    async def slow(user: str) -> Standing:
        found = await standing(user)
        await asyncio.sleep(0.3)
        return found

    monkeypatch.setattr(service.store, "standing", slow)
    eager = When(minimum_turns=1, after_turns=1, worth_at_once=0.001)
    session = SessionOptions(max_output_tokens=2, when=eager)
    async with service.gateway(session=session) as gateway, web(gateway) as client:
        await gateway.client("ann").responses.create(model="me", input="hello")
        await client.delete("/attune/me")
        asked = list(gateway.calls.refreshes)
        await asyncio.sleep(0.5)
        assert gateway.calls.refreshes == asked


@pytest.mark.parametrize(("model", "refused"), [("me", openai.ConflictError), ("me@9", openai.NotFoundError)])
async def test_a_message_that_a_forget_overtakes_leaves_nothing_in_memory(
    service: TinyService, monkeypatch: pytest.MonkeyPatch, model: str, refused: type[Exception]
) -> None:
    recent, read, forgotten = service.store.recent, asyncio.Event(), asyncio.Event()

    async def slow(user: str, limit: int) -> list[Turn]:
        turns = await recent(user, limit)
        read.set()
        await forgotten.wait()
        return turns

    async with service.gateway() as gateway, web(gateway) as client:
        sdk = gateway.client("ann")
        await sdk.responses.create(model="me", input="my secret", max_output_tokens=2)
        monkeypatch.setattr(service.store, "recent", slow)
        asking = asyncio.ensure_future(sdk.responses.create(model=model, input="hello"))
        await asyncio.wait_for(read.wait(), 60)
        await client.delete("/attune/me")
        await asyncio.sleep(0.1)  # the news of it
        forgotten.set()
        with pytest.raises(refused):
            await asking
        assert "ann" not in gateway.gateway.session._remembered


async def test_a_demo_person_gets_a_token_only_where_that_is_enabled(service: TinyService) -> None:
    async with service.gateway(demo_hours=1) as gateway, web(gateway, None) as client:
        given = (await client.post("/attune/demo/session", json={"user": "sam"})).json()
        assert given["user"] == "sam"
        headers = {"authorization": f"Bearer {given['token']}"}
        assert (await client.get("/attune/me", headers=headers)).json()["user"] == "sam"
        assert (await client.post("/attune/demo/session", json={"user": ""})).status_code == 400
        foreign = {"origin": "http://evil.example"}
        refused = await client.post("/attune/demo/session", json={"user": "sam"}, headers=foreign)
        assert refused.status_code == 403
    async with service.gateway() as gateway, web(gateway, None) as client:
        assert (await client.post("/attune/demo/session", json={"user": "sam"})).status_code == 404


async def test_a_foreign_page_can_do_nothing_even_with_a_token(service: TinyService) -> None:
    async with service.gateway() as gateway, web(gateway, origin="http://evil.example") as client:
        for path in ("/attune/me", "/v1/models"):
            answer = await client.get(path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "wrong_origin")


async def test_a_body_beyond_the_limit_is_refused(service: TinyService) -> None:
    async with service.gateway() as gateway, web(gateway) as client:
        answer = await client.post("/v1/responses", content=b"x" * ((1 << 20) + 1))
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")


async def test_guessing_tokens_shuts_the_address_out(service: TinyService) -> None:
    async with service.gateway(limits=Limits(address_failures="3/day")) as gateway:
        async with web(gateway, None) as stranger:
            codes = [(await stranger.get("/attune/me")).status_code for _ in range(4)]
        assert codes == [401, 401, 401, 429]


async def test_unknown_addresses_and_methods_are_errors_in_the_same_form(service: TinyService) -> None:
    async with service.gateway() as gateway, web(gateway) as client:
        for method, path, status in (
            ("GET", "/v1/nothing", 404),
            ("GET", "/v1/responses", 404),
            ("PUT", "/v1/responses", 405),
            ("POST", "/v1/embeddings", 405),
        ):
            answer = await client.request(method, path)
            assert answer.status_code == status
            assert answer.json()["error"]["message"] == f"nothing answers {method} {path}"


async def test_health_and_readiness(service: TinyService) -> None:
    async with service.gateway() as gateway, web(gateway, None) as client:
        assert (await client.get("/health")).json() == {"status": "ok"}
        ready = await client.get("/ready")
        assert ready.json() == {"ready": True, "checks": {"store": True, "engine": True, "adapters": True}}
        service.adapter_root.rmdir()
        assert (await client.get("/ready")).status_code == 503
        service.adapter_root.mkdir()


async def test_metrics_count_and_name_nobody(service: TinyService) -> None:
    async with service.gateway() as gateway, web(gateway, "ann-the-secret") as client:
        await gateway.client("ann-the-secret").responses.create(
            model="me", input="a private word", conversation="private", max_output_tokens=3
        )
        await client.get("/attune/conversations/private")
        page = (await client.get("/metrics")).text
        assert "attune_output_tokens_total 3.0" in page
        assert 'attune_replies_total{outcome="max_output_tokens"} 1.0' in page
        assert 'route="conversation",status="200"' in page
        for secret in ("secret", "private", service.store.adapter_id("ann-the-secret")):
            assert secret not in page


async def test_metrics_tell_of_the_engine_and_of_the_refreshes(service: TinyService) -> None:
    def values(page: str) -> dict[str, float]:
        lines = [line for line in page.splitlines() if line and not line.startswith("#")]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    async with service.gateway() as gateway, web(gateway, None) as client:
        before = values((await client.get("/metrics")).text)
        await service.give_adapter("ann", 1)
        reply = await gateway.client("ann").responses.create(model="me", input="hello", max_output_tokens=3)
        queue = open_queue(service.store._redis)
        await request_refresh(queue, service.store, "ann", "asked")
        after = values((await client.get("/metrics")).text)
        grown = {name: after[name] - before.get(name, 0.0) for name in after}
        assert reply.usage is not None
        assert grown["attune_engine_step_output_tokens_total"] == 3
        assert grown["attune_engine_tokens_total"] == reply.usage.input_tokens + 2
        assert grown['attune_engine_finished_total{reason="length"}'] == 1
        assert grown["attune_engine_adapter_loads_total"] == 1
        assert sum(grown[name] for name in grown if name.startswith("attune_engine_adapters_found")) == 1
        assert after["attune_engine_adapters_resident"] >= 1
        assert after["attune_engine_adapters_loading"] == after["attune_engine_adapters_copying"] == 0
        assert grown["attune_engine_steps_total"] >= 3
        parts = [f'attune_engine_step_seconds_total{{part="{part}"}}' for part in STEP_PARTS]
        assert sum(grown[part] for part in parts) > 0
        stats = (await gateway.gateway.deps.engine.stats())["pages"]
        held = [value for name, value in after.items() if name.startswith("attune_engine_pages{")]
        assert (len(held), sum(held)) == (5, stats["total"])
        assert after['attune_refresh_jobs{state="queued"}'] == 1
        assert after["attune_refresh_dead"] == 0
        await cancel_jobs(queue, service.store, "ann")


async def test_metrics_leave_out_who_does_not_answer(service: TinyService, redis_server: RedisServer) -> None:
    own = Store(connect(redis_server.url), SECRET)

    async def away() -> QueueStats:
        await own.ping()
        return await queue_stats(open_queue(own._redis))

    async with service.gateway(refreshes=away) as gateway, web(gateway, None) as client:
        redis_server.kill()
        page = (await client.get("/metrics")).text
        assert "attune_engine_steps_total" in page
        assert "attune_refresh_jobs" not in page
        await gateway.gateway.deps.engine.close()
        page = (await client.get("/metrics")).text
        assert "attune_engine_up 0.0" in page
        assert "attune_engine_steps_total" not in page
    await own.close()


async def test_the_page_comes_with_headers_that_let_nothing_foreign_in(service: TinyService) -> None:
    async with service.gateway() as gateway, web(gateway, None) as client:
        page = await client.get("/")
        assert "Attune" in page.text
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert page.headers["x-content-type-options"] == "nosniff"
        assert page.headers["cache-control"] == "no-cache"
        asset = await client.get("/assets/app-1a2b.js")
        assert "immutable" in asset.headers["cache-control"]
        assert (await client.get("/%2e%2e/adapters")).status_code == 404
        assert (await client.get("/nothing")).status_code == 404
        assert "content-security-policy" in (await client.get("/v1/models")).headers


@pytest.mark.parametrize(("path", "status"), [("/", 503), ("/assets/x.js", 404)])
async def test_a_page_that_is_not_built_says_how_to_build_it(tmp_path: Path, path: str, status: int) -> None:
    transport = httpx2.ASGITransport(app=page_app(tmp_path))
    async with httpx2.AsyncClient(transport=transport, base_url="http://x") as client:
        answer = await client.get(path)
        assert answer.status_code == status
        assert (answer.text == NOT_BUILT.format(folder=tmp_path)) is (status == 503)


async def test_feedback_over_http_is_what_it_is_on_a_socket(service: TinyService) -> None:
    async with service.gateway() as gateway, web(gateway) as ann, web(gateway, "ben") as ben:
        reply = await gateway.client("ann").responses.create(model="me", input="hello")
        item = reply.output[0].id
        assert item is not None
        answer = await ann.post(
            "/attune/feedback", json={"item_id": item, "rating": "down", "correction": "hi"}
        )
        saved = answer.json()
        assert answer.status_code == 200
        assert (saved["type"], saved["item_id"], saved["rating"]) == ("feedback.created", item, "down")
        correction = await service.store.turn("ann", saved["correction_id"])
        assert (correction.text, correction.author, correction.corrects) == ("hi", "person", item)
        assert (await service.store.turn("ann", item)).rating == "down"
        taken_back = await ann.post("/attune/feedback", json={"item_id": item, "rating": None})
        assert taken_back.json()["rating"] is None
        too_long = {"item_id": item, "rating": "down", "correction": "x" * (MAX_TEXT_CHARS + 1)}
        assert (await ann.post("/attune/feedback", json=too_long)).status_code == 400
        assert (await service.store.turn("ann", item)).rating is None
        for body, code in (({"item_id": item}, 400), ({"item_id": item, "rating": "great"}, 400), ({}, 400)):
            assert (await ann.post("/attune/feedback", json=body)).status_code == code
        foreign = await ben.post("/attune/feedback", json={"item_id": item, "rating": "up"})
        assert (foreign.status_code, foreign.json()["error"]["code"]) == (404, "turn_not_found")


async def test_an_absence_of_the_store_is_an_answer_like_any_other(
    service: TinyService, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Counted, under the same headers, over a connection that stays, and without a traceback for each."""

    async def away(*_: object) -> None:
        raise StoreUnavailable("it is away")

    async with service.gateway() as gateway, web(gateway) as client:
        with monkeypatch.context() as patched:
            patched.setattr(service.store, "pointer", away)
            answer = await client.get("/attune/me")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_unavailable")
        assert answer.headers["x-content-type-options"] == "nosniff"
        counted = 'attune_http_requests_total{method="GET",route="me",status="503"} 1.0'
        assert counted in (await client.get("/metrics")).text
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_fault_of_ours(
    service: TinyService, caplog: pytest.LogCaptureFixture
) -> None:
    async with service.gateway() as gateway:
        refused = gateway.gateway.metrics.refused.labels(code="incomplete_body")
        _, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        credential = gateway.headers("ann")["authorization"]
        head = f"POST /attune/import HTTP/1.1\r\nhost: x\r\nauthorization: {credential}\r\n"
        writer.write(f"{head}content-length: 1000\r\n\r\nthe beginning".encode())
        await writer.drain()
        writer.close()
        async with asyncio.timeout(60):
            while True:
                if refused._value.get() or caplog.records:
                    break
                await asyncio.sleep(0.01)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_a_version_number_of_any_length_is_only_unknown(service: TinyService) -> None:
    async with service.gateway() as gateway, web(gateway) as client:
        for number in ("1" * 5000, "-1", "x", "\u0663"):
            answer = await client.get(f"/attune/versions/{number}/turns")
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "version_not_found")


async def test_a_turn_whose_imported_id_has_a_slash_can_be_taken_out(service: TinyService) -> None:
    async with service.gateway() as gateway, web(gateway) as client:
        await service.store.append("ann", [replace(turn(0), id="thread/7")])
        answer = await client.delete("/attune/turns/thread%2F7/learning")
        assert answer.json() == {"id": "thread/7", "learning": False}
        assert (await service.store.turn("ann", "thread/7")).removed
