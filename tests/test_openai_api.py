"""The official SDK against the whole gateway over HTTP: responses, chat completions, models."""

import asyncio
import itertools
import time
from datetime import UTC, datetime
from typing import Any

import openai
import pytest

from personalization.history import Turn
from personalization.store import Standing
from service.limits import Limits
from service.session import NOT_SAVED
from tests.tiny_service import FAST, TinyService, engine_held

pytest_plugins = ("tests.service_fixtures",)


async def test_a_response_is_written_saved_and_can_be_fetched(service: TinyService) -> None:
    async with service.gateway() as gateway:
        client = gateway.client("ann")
        response = await client.responses.create(model="me", input="hello", max_output_tokens=9)
        assert response.status == "incomplete"
        assert response.incomplete_details is not None
        assert response.incomplete_details.reason == "max_output_tokens"
        assert len(response.output_text) == 9
        assert response.usage is not None
        assert response.usage.output_tokens == 9
        assert response.metadata is not None
        assert response.metadata["adapter_version"] == "0"
        assert response.metadata["history_saved"] == "true"
        assert {"queue_s", "adapter_tier", "first_token_s", "tokens_per_s", "seed"} <= set(response.metadata)
        fetched = await client.responses.retrieve(response.id)
        assert fetched.output_text == response.output_text
        said, replied = await service.store.turns("ann")
        assert (said.role, said.text, said.author) == ("user", "hello", "person")
        assert (replied.role, replied.text, replied.version) == ("assistant", response.output_text, 0)
        assert replied.id == response.output[0].id
        assert said.id == response.metadata["user_turn_id"]


async def test_a_streamed_response_numbers_its_events_without_gaps(service: TinyService) -> None:
    async with service.gateway() as gateway:
        stream = await gateway.client("ann").responses.create(model="me", input="hello", stream=True)
        events = [event async for event in stream]
        assert [event.sequence_number for event in events] == list(range(len(events)))
        kinds = [event.type for event in events if event.type != "response.output_text.delta"]
        assert kinds == [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.incomplete",
        ]
        text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
        last: Any = events[-1]
        assert text == last.response.output_text
        assert len(text) == 24


async def test_the_same_seed_writes_the_same_text_and_a_random_one_is_told(service: TinyService) -> None:
    async with service.gateway() as gateway:
        client = gateway.client("ann")

        async def ask(**extra: Any) -> Any:
            return await client.responses.create(model="base", input="hello", store=False, extra_body=extra)

        first, again, other = await ask(seed=7), await ask(seed=7), await ask(seed=8)
        assert first.output_text == again.output_text != other.output_text
        drawn = await ask()
        told = int(drawn.metadata["seed"])
        assert (await ask(seed=told)).output_text == drawn.output_text


async def test_what_is_not_to_be_stored_is_neither_saved_nor_learned(service: TinyService) -> None:
    async with service.gateway() as gateway:
        await gateway.client("ann").responses.create(model="me", input="hello", store=False)
        assert await service.store.turns("ann") == []


async def test_me_base_and_a_version_are_different_models(service: TinyService) -> None:
    async with service.gateway() as gateway:
        first = await service.give_adapter("ann", 1)
        second = await service.give_adapter("ann", 2)
        client = gateway.client("ann")

        async def ask(model: str) -> Any:
            return await client.responses.create(
                model=model, input="hello", store=False, temperature=0, max_output_tokens=40
            )

        base, me, old = await ask("base"), await ask("me"), await ask(f"me@{first}")
        assert len({base.output_text, me.output_text, old.output_text}) == 3
        assert [reply.metadata["adapter_version"] for reply in (base, me, old)] == [
            "0",
            str(second),
            str(first),
        ]
        assert (await ask(f"me@{second}")).output_text == me.output_text


async def test_another_persons_version_is_as_unknown_as_none(service: TinyService) -> None:
    async with service.gateway() as gateway:
        await service.give_adapter("ann", 1)
        client = gateway.client("ben")
        bodies = []
        for model in ("me@1", "me@99", "ann", "ann@1", service.store.adapter_id("ann"), "gpt-4"):
            with pytest.raises(openai.NotFoundError) as caught:
                await client.responses.create(model=model, input="hello")
            bodies.append(str(caught.value.body).replace(model, "M"))
            assert caught.value.code == "model_not_found"
            with pytest.raises(openai.NotFoundError):
                await client.models.retrieve(model)
        assert len(set(bodies)) == 1
        assert await service.store.turns("ben") == []


async def test_a_persons_models_are_the_base_and_their_own(service: TinyService) -> None:
    async with service.gateway() as gateway:
        await service.give_adapter("ann", 1)
        assert [model.id async for model in gateway.client("ann").models.list()] == ["base", "me", "me@1"]
        assert [model.id async for model in gateway.client("ben").models.list()] == ["base", "me"]
        assert (await gateway.client("ann").models.retrieve("me@1")).id == "me@1"


async def test_a_conversation_goes_on_by_id_and_by_previous_response(service: TinyService) -> None:
    async with service.gateway() as gateway:
        client = gateway.client("ann")
        first = await client.responses.create(model="me", input="one")
        assert first.conversation is not None
        second = await client.responses.create(model="me", input="two", conversation=first.conversation.id)
        third = await client.responses.create(model="me", input="three", previous_response_id=second.id)
        turns = await service.store.conversation("ann", first.conversation.id)
        assert [turn.text for turn in turns if turn.role == "user"] == ["one", "two", "three"]
        inputs = [reply.usage.input_tokens for reply in (first, second, third) if reply.usage is not None]
        assert inputs == sorted(set(inputs))


async def test_earlier_conversations_are_history_in_the_prompt(service: TinyService) -> None:
    async with service.gateway() as gateway:
        client = gateway.client("ann")
        await client.responses.create(model="me", input="one")
        reply = await client.responses.create(model="me", input="two")
        assert reply.metadata is not None
        assert reply.metadata["history_turns"] == "2"


async def test_asking_again_replaces_the_reply_in_what_follows(service: TinyService) -> None:
    async with service.gateway() as gateway:
        client = gateway.client("ann")
        first = await client.responses.create(model="me", input="one", conversation="c")
        again = await client.responses.create(
            model="me", conversation="c", max_output_tokens=3, extra_body={"seed": 5}
        )
        assert first.usage is not None
        assert again.usage is not None
        assert again.usage.input_tokens == first.usage.input_tokens
        assert again.metadata is not None
        assert "user_turn_id" not in again.metadata
        third = await client.responses.create(model="me", input="two", conversation="c")
        assert third.usage is not None
        # the prompt holds the second reply of three characters and not the first of 24
        assert third.usage.input_tokens < first.usage.input_tokens + 24


async def test_a_conversation_keeps_its_order_though_the_clock_is_set_back(service: TinyService) -> None:
    clock = iter(time.time() - 60 * n for n in itertools.count())  # by a minute, whenever it is asked
    async with service.gateway(clock=lambda: next(clock)) as gateway:
        client = gateway.client("ann")
        said = []
        for text in ("one", "two"):
            reply = await client.responses.create(model="me", input=text, conversation="c")
            said += [text, reply.output_text]
        again = await client.responses.create(model="me", conversation="c")
        assert [turn.text for turn in await service.store.conversation("ann", "c")] == [
            *said,
            again.output_text,
        ]


async def test_asking_again_needs_something_to_reply_to(service: TinyService) -> None:
    async with service.gateway() as gateway:
        with pytest.raises(openai.BadRequestError):
            await gateway.client("ann").responses.create(model="me", conversation="new")


async def test_a_stop_string_cuts_the_text_and_completes(service: TinyService) -> None:
    async with service.gateway() as gateway:
        client = gateway.client("ann")
        whole = await client.responses.create(model="base", input="hi", store=False, extra_body={"seed": 3})
        stop = whole.output_text[10:13]
        cut = await client.responses.create(
            model="base", input="hi", store=False, extra_body={"seed": 3, "stop": stop}
        )
        assert cut.status == "completed"
        assert cut.output_text == whole.output_text[: whole.output_text.index(stop)]


async def test_a_reply_that_a_stop_string_cut_tells_the_numbers_of_the_engine(service: TinyService) -> None:
    async with service.gateway() as gateway:
        await service.give_adapter("ann", 1)
        client = gateway.client("ann")
        said = "a message of more than one block of tokens"
        ask: Any = {"model": "me", "input": said, "store": False}
        whole = await client.responses.create(**ask, extra_body={"seed": 3})
        stop = whole.output_text[10:13]
        cut = await client.responses.create(**ask, extra_body={"seed": 3, "stop": stop})
        assert cut.output_text == whole.output_text[: whole.output_text.index(stop)]
        assert cut.metadata is not None
        assert cut.metadata["adapter_tier"] == "device"
        assert cut.usage is not None
        assert cut.usage.input_tokens_details.cached_tokens > 0
        assert len(cut.output_text) < cut.usage.output_tokens <= 24


async def test_a_reply_longer_than_a_turn_is_shown_whole_and_told_not_to_be_saved(
    service: TinyService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("personalization.history.MAX_TEXT_CHARS", 10)
    async with service.gateway() as gateway:
        reply = await gateway.client("ann").responses.create(model="me", input="hello")
        assert (reply.status, len(reply.output_text)) == ("incomplete", 24)
        assert reply.metadata is not None
        assert (reply.metadata["history_saved"], reply.metadata["notice"]) == ("false", NOT_SAVED)
        assert [turn.text for turn in await service.store.turns("ann")] == ["hello"]


async def test_a_chat_completion_has_openais_shape(service: TinyService) -> None:
    async with service.gateway() as gateway:
        completion = await gateway.client("ann").chat.completions.create(
            model="me",
            messages=[
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": "hello"},
            ],
            max_completion_tokens=7,
            seed=1,
        )
        (choice,) = completion.choices
        assert choice.finish_reason == "length"
        assert choice.message.content is not None
        assert len(choice.message.content) == 7
        assert completion.usage is not None
        assert completion.usage.completion_tokens == 7
        assert [turn.text for turn in await service.store.turns("ann")] == ["hello", choice.message.content]


async def test_a_streamed_chat_completion_ends_with_usage(service: TinyService) -> None:
    async with service.gateway() as gateway:
        stream = await gateway.client("ann").chat.completions.create(
            model="me",
            messages=[{"role": "user", "content": "hello"}],
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
        assert chunks[0].choices[0].delta.role == "assistant"
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert len(text) == 24
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
        assert chunks[-1].choices == []
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 24


async def test_a_chat_that_the_client_holds_is_saved_once(service: TinyService) -> None:
    async with service.gateway() as gateway:
        client = gateway.client("ann")
        messages: list[Any] = [{"role": "user", "content": "one"}]
        for text in ("two", "three"):
            reply = await client.chat.completions.create(model="me", messages=messages)
            messages += [
                {"role": "assistant", "content": reply.choices[0].message.content},
                {"role": "user", "content": text},
            ]
        await client.chat.completions.create(model="me", messages=messages)
        turns = await service.store.turns("ann")
        assert [turn.text for turn in turns if turn.role == "user"] == ["one", "two", "three"]
        assert len({turn.conversation for turn in turns}) == 1


async def test_a_chat_may_bring_a_reply_without_words(service: TinyService) -> None:
    """OpenAI's clients write its content as null, of which theirs alone may be."""
    async with service.gateway() as gateway:
        chat = gateway.client("ann").chat.completions
        user: Any = {"role": "user", "content": "hello"}
        wordless: Any = {"role": "assistant", "content": None, "refusal": None}
        asked: dict[str, Any] = {"model": "base", "seed": 1, "max_tokens": 8}
        reply = await chat.create(messages=[user, wordless, user], **asked)
        same = await chat.create(messages=[user, {"role": "assistant", "content": ""}, user], **asked)
        assert reply.choices[0].message.content == same.choices[0].message.content
        with pytest.raises(openai.BadRequestError, match=r"messages\[0\].content: expected a string"):
            await chat.create(messages=[{"role": "user", "content": None}, user], **asked)  # type: ignore[list-item]


async def test_a_response_can_be_stopped_over_http(service: TinyService) -> None:
    async with service.gateway() as gateway:
        client = gateway.client("ann")
        begun = await client.responses.create(
            model="me", input="hello", background=True, max_output_tokens=500
        )
        assert begun.status == "in_progress"
        stopped = await client.responses.cancel(begun.id)
        assert stopped.status == "cancelled"
        assert (await client.responses.cancel(begun.id)).status == "cancelled"
        assert len(stopped.output_text) < 500


async def test_a_stream_is_taken_up_again_where_it_stopped(service: TinyService) -> None:
    async with service.gateway() as gateway:
        client = gateway.client("ann")
        stream = await client.responses.create(model="me", input="hello", stream=True, max_output_tokens=120)
        seen: list[Any] = []
        async for event in stream:
            seen.append(event)
            if len(seen) == 12:
                break
        await stream.close()
        rest = await client.responses.retrieve(
            seen[0].response.id, stream=True, starting_after=seen[-1].sequence_number
        )
        seen += [event async for event in rest]
        assert [event.sequence_number for event in seen] == list(range(len(seen)))
        text = "".join(event.delta for event in seen if event.type == "response.output_text.delta")
        assert text == seen[-1].response.output_text
        assert len(text) == 120


async def test_a_deleted_response_is_gone_and_its_turns_are_not(service: TinyService) -> None:
    async with service.gateway() as gateway:
        client = gateway.client("ann")
        response = await client.responses.create(model="me", input="hello")
        await client.responses.delete(response.id)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(response.id)
        assert len(await service.store.turns("ann")) == 2


async def test_a_response_is_deleted_after_everything_its_writing_still_does(
    service: TinyService, monkeypatch: pytest.MonkeyPatch
) -> None:
    standing, finish, kept = service.store.standing, service.store.finish_response, []

    async def slow(user: str) -> Standing:
        await asyncio.sleep(0.2)
        return await standing(user)

    async def noted(*about: Any, ttl_s: float, **more: Any) -> None:
        kept.append(ttl_s)
        await finish(*about, ttl_s=ttl_s, **more)

    monkeypatch.setattr(service.store, "standing", slow)
    monkeypatch.setattr(service.store, "finish_response", noted)
    async with service.gateway() as gateway:
        client = gateway.client("ann")
        response = await client.responses.create(model="me", input="hello")
        await client.responses.delete(response.id)
        await asyncio.sleep(0.4)
        assert kept == [FAST.ttl, min(kept)]


async def test_another_persons_response_is_not_found(service: TinyService) -> None:
    async with service.gateway() as gateway:
        response = await gateway.client("ann").responses.create(model="me", input="hello")
        ben = gateway.client("ben")
        for attempt in (ben.responses.retrieve, ben.responses.cancel, ben.responses.delete):
            with pytest.raises(openai.NotFoundError):
                await attempt(response.id)
        with pytest.raises(openai.NotFoundError):
            await ben.responses.create(model="me", input="x", previous_response_id=response.id)


@pytest.mark.parametrize("part", ["events", "lease"])
async def test_a_part_of_a_response_is_no_response(service: TinyService, part: str) -> None:
    async with service.gateway() as gateway:
        ann = await gateway.client("ann").responses.create(model="me", input="hello")
        for user in ("ann", "ben"):
            with pytest.raises(openai.NotFoundError):
                await gateway.client(user).responses.retrieve(f"{ann.id}:{part}")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": "x", "temperature": -1}, "temperature"),
        ({"input": "x", "top_p": 0}, "top_p"),
        ({"input": "x", "max_output_tokens": 0}, "max_output_tokens"),
        ({"input": "x", "seed": 2**63}, "seed"),
        ({"input": [{"role": "wizard", "content": "x"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content"),
        ({"input": [{"role": "assistant", "content": "x"}]}, "input"),
        ({"input": "x", "tools": [{"type": "function"}]}, "tools"),
        ({"input": "x", "text": {"format": {"type": "json_object"}}}, "text.format"),
        ({"input": "x", "conversation": "a\nb"}, "conversation"),
        ({"input": "x", "metadata": {"k": "v" * 600}}, "metadata"),
        ({"input": "x", "stop": [""]}, "stop"),
        ({"input": 5}, "input"),
    ],
)
async def test_a_bad_field_is_a_400_that_names_it(
    service: TinyService, body: dict[str, Any], param: str
) -> None:
    async with service.gateway() as gateway:
        with pytest.raises(openai.BadRequestError) as caught:
            await gateway.client("ann").responses.create(model="me", extra_body=body)
        assert caught.value.param == param
        assert await service.store.turns("ann") == []


async def test_a_chat_completion_in_another_format_than_text_is_refused(service: TinyService) -> None:
    async with service.gateway() as gateway:
        chat = gateway.client("ann").chat.completions
        said: Any = {"model": "me", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
        with pytest.raises(openai.BadRequestError, match="expected text, got 'json_object'"):
            await chat.create(**said, response_format={"type": "json_object"})
        assert await service.store.turns("ann") == []
        await chat.create(**said, response_format={"type": "text"})


@pytest.mark.parametrize("field", ["max_completion_tokens", "max_tokens"])
async def test_a_chat_completion_of_no_tokens_is_refused(service: TinyService, field: str) -> None:
    async with service.gateway() as gateway:
        with pytest.raises(openai.BadRequestError) as caught:
            await gateway.client("ann").chat.completions.create(
                model="me", messages=[{"role": "user", "content": "x"}], extra_body={field: 0}
            )
        assert caught.value.param == field


async def test_a_message_longer_than_the_context_is_refused_before_anything_is_saved(
    service: TinyService,
) -> None:
    async with service.gateway() as gateway:
        client = gateway.client("ann")
        with pytest.raises(openai.BadRequestError) as caught:
            await client.responses.create(model="me", input="x" * 2_000)
        assert caught.value.code == "context_length_exceeded"
        with pytest.raises(openai.BadRequestError):
            await client.chat.completions.create(
                model="me", messages=[{"role": "user", "content": "x" * 2_000}]
            )
        assert await service.store.turns("ann") == []


async def test_credentials_and_limits_raise_the_sdks_own_errors(service: TinyService) -> None:
    # A day's end comes between the two less often than a minute's.
    async with service.gateway(limits=Limits(replies="1/day")) as gateway:
        stranger = gateway.client("ann")
        stranger.api_key = "nonsense"
        with pytest.raises(openai.AuthenticationError):
            await stranger.responses.create(model="me", input="x")
        client = gateway.client("ann")
        await client.responses.create(model="me", input="x", max_output_tokens=1)
        with pytest.raises(openai.RateLimitError) as caught:
            await client.responses.create(model="me", input="x")
        assert int(caught.value.response.headers["retry-after"]) >= 1


async def test_the_same_idempotency_key_gives_the_same_reply(service: TinyService) -> None:
    async with service.gateway() as gateway:
        client = gateway.client("ann")
        headers = {"idempotency-key": "once"}
        first = await client.responses.create(model="me", input="hello", extra_headers=headers)
        again = await client.responses.create(model="me", input="hello", extra_headers=headers)
        assert (first.id, first.output_text) == (again.id, again.output_text)
        assert len(await service.store.turns("ann")) == 2
        with pytest.raises(openai.ConflictError):
            await client.responses.create(model="me", input="other", extra_headers=headers)
        other = await gateway.client("ben").responses.create(model="me", input="hello", extra_headers=headers)
        assert other.id != first.id


@pytest.mark.parametrize("conversation", [None, "c"])
async def test_a_request_sent_again_after_a_crash_finds_its_own_turn(
    service: TinyService, conversation: str | None
) -> None:
    async with service.gateway() as gateway:
        name = gateway.gateway.session._reply_name("ann", "once")
        saved = Turn(
            id=f"turn_{name}",
            conversation=conversation or f"conv_{name}",
            at=datetime.now(UTC),
            role="user",
            text="hello",
            author="person",
        )
        await service.store.append("ann", [saved])  # and then the gateway died
        headers = {"idempotency-key": "once"}
        reply = await gateway.client("ann").responses.create(
            model="me", input="hello", conversation=conversation, extra_headers=headers
        )
        fresh = await gateway.client("ben").responses.create(model="me", input="hello")
        assert reply.usage is not None
        assert fresh.usage is not None
        assert reply.usage.input_tokens == fresh.usage.input_tokens
        assert [turn.text for turn in await service.store.turns("ann")] == ["hello", reply.output_text]


async def test_a_person_has_so_many_replies_at_once_and_no_more(service: TinyService) -> None:
    async with service.gateway(limits=Limits(replies_per_user=2)) as gateway:
        client = gateway.client("ann")
        asked = [
            client.responses.create(model="me", input="x", background=True, max_output_tokens=300)
            for _ in range(5)
        ]
        with engine_held():
            answers = await asyncio.gather(*asked, return_exceptions=True)
        assert sum(isinstance(each, openai.RateLimitError) for each in answers) == 3
        await gateway.client("ben").responses.create(model="me", input="x", max_output_tokens=1)


async def test_a_reply_that_was_lost_takes_nobodys_place(service: TinyService) -> None:
    async with service.gateway(limits=Limits(replies_per_user=1)) as gateway:
        client = gateway.client("ann")
        stream = await client.responses.create(model="me", input="hello", stream=True, max_output_tokens=500)
        assert (await anext(stream)).type == "response.created"
        await service.store.forget("ann")
        with pytest.raises(openai.APIError, match="no longer kept"):
            [event async for event in stream]
        again = await client.responses.create(model="me", input="hello", max_output_tokens=2)
        assert len(again.output_text) == 2
