"""OpenAI's HTTP endpoints: responses, chat completions, models. A reply is the same reply on every
transport."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from personalization.store import StoreUnavailable
from service.auth import Person
from service.errors import ApiError, BadRequest, ModelNotFound, NotFound, ServerFault, Unavailable
from service.events import Completed, Created, Failed, Incomplete, TextDelta, json_bytes
from service.events import Response as ReplyObject
from service.http import Door, as_api_error, event_stream, json_response, read_json, sse
from service.input import chat_conversation, refuse_formats, refuse_tools, said_in_chat, said_in_response
from service.protocol import CreateChatCompletion, CreateResponse, conversation_of, parse_model
from service.replies import Replies
from service.reply import Reply
from service.session import Session

DONE = b"[DONE]"
MODELS_SINCE = 1_767_225_600  # the models have no birthday of their own: the project's


class OpenAIApi:
    def __init__(self, door: Door, session: Session, replies: Replies, *, base_model: str) -> None:
        self._door = door
        self._session = session
        self._replies = replies
        self._base_model = base_model

    def routes(self) -> list[Route]:
        one = "/v1/responses/{response_id}"
        return [
            Route("/v1/responses", self.create_response, methods=["POST"]),
            Route(one, self.retrieve_response, methods=["GET"]),
            Route(one, self.delete_response, methods=["DELETE"]),
            Route(f"{one}/cancel", self.cancel_response, methods=["POST"]),
            Route("/v1/chat/completions", self.create_chat_completion, methods=["POST"]),
            Route("/v1/models", self.list_models, methods=["GET"]),
            Route("/v1/models/{model:path}", self.retrieve_model, methods=["GET"]),
        ]

    # ------------------------------------------------------------ responses

    async def create_response(self, request: Request) -> Response:
        person = await self._door.person(request)
        asked = await read_json(request, CreateResponse)
        refuse_tools(asked.tools)
        refuse_formats(None if asked.text is None else asked.text.format, "text.format")
        conversation = conversation_of(asked.conversation)
        if asked.previous_response_id is not None:
            before = await self._replies.find(person.user, asked.previous_response_id)
            conversation = before.plan.conversation
        await self._door.limits.reply(person.user)
        reply = await self._session.answer(
            person.user, asked, said_in_response(asked), conversation, key=_key(request)
        )
        if asked.stream:
            return event_stream(_reply_stream(reply, -1))
        return json_response(await (_begun(reply) if asked.background else reply.finished()))

    async def retrieve_response(self, request: Request) -> Response:
        reply = await self._find(request)
        if request.query_params.get("stream") == "true":
            return event_stream(_reply_stream(reply, _starting_after(request)))
        return json_response(reply.response or await _begun(reply))

    async def cancel_response(self, request: Request) -> Response:
        person = await self._door.person(request)
        reply = await self._replies.cancel(person.user, request.path_params["response_id"])
        return json_response(await reply.finished())

    async def delete_response(self, request: Request) -> Response:
        person = await self._door.person(request)
        reply_id = request.path_params["response_id"]
        await self._replies.delete(person.user, reply_id)
        return json_response({"id": reply_id, "object": "response", "deleted": True})

    async def _find(self, request: Request) -> Reply:
        person = await self._door.person(request)
        return await self._replies.find(person.user, request.path_params["response_id"])

    # ------------------------------------------------------------ chat completions

    async def create_chat_completion(self, request: Request) -> Response:
        person = await self._door.person(request)
        asked = await read_json(request, CreateChatCompletion)
        refuse_tools(asked.tools)
        refuse_formats(asked.response_format, "response_format")
        if asked.n not in (None, 1):
            raise BadRequest(f"n: expected 1, got {asked.n}", param="n")
        said = said_in_chat(asked)
        conversation = conversation_of(asked.conversation)
        held_by_client = conversation is None
        await self._door.limits.reply(person.user)
        reply = await self._session.answer(
            person.user,
            asked,
            said,
            conversation or chat_conversation(person.user, said),
            key=_key(request),
            stored_turns=not held_by_client,
        )
        if asked.stream:
            usage = asked.stream_options is not None and asked.stream_options.include_usage
            return event_stream(_chat_stream(reply, include_usage=usage))
        whole = await reply.finished()
        if whole.error is not None:
            raise failure(whole)
        return json_response(chat_completion(whole))

    # ------------------------------------------------------------ models

    async def list_models(self, request: Request) -> Response:
        person = await self._door.person(request)
        return json_response({"object": "list", "data": await self._models(person)})

    async def retrieve_model(self, request: Request) -> Response:
        person = await self._door.person(request)
        asked = request.path_params["model"]
        name = parse_model(asked)
        if name is not None:
            wanted = asked if name.version is None else f"me@{name.version}"
            for model in await self._models(person):
                if model["id"] == wanted:
                    return json_response(model)
        raise ModelNotFound(asked)

    async def _models(self, person: Person) -> list[dict[str, Any]]:
        """The base, and the caller's own adapter with its versions; never a path, never another person's."""
        try:
            records = await self._session.store.versions(person.user)
        except StoreUnavailable:
            raise Unavailable("versions cannot be read", code="store_unavailable", retry_after=2) from None
        names = ["me", *(f"me@{record.version}" for record in reversed(records) if record.accepted)]
        base = {"id": "base", "root": self._base_model, "parent": None}
        mine: list[dict[str, Any]] = [{"id": name, "root": name, "parent": "base"} for name in names]
        return [
            {"object": "model", "created": MODELS_SINCE, "owned_by": "attune", **model}
            for model in [base, *mine]
        ]


def failure(whole: ReplyObject) -> ApiError:
    """A failed reply as an HTTP error."""
    assert whole.error is not None
    if whole.error.code.endswith("_unavailable") or whole.error.code == "overloaded":
        return Unavailable(whole.error.message, code=whole.error.code, retry_after=2)
    return ServerFault(whole.error.message, code=whole.error.code)


def _key(request: Request) -> str | None:
    """The idempotency key of a request, the same namespace as a socket's event_id."""
    key = request.headers.get("idempotency-key")
    if key is not None and not 1 <= len(key) <= 256:
        raise BadRequest("idempotency-key: expected 1 to 256 characters", param="idempotency-key")
    return key


def _starting_after(request: Request) -> int:
    value = request.query_params.get("starting_after", "-1")
    if not value.removeprefix("-").isdecimal() or len(value) > 9:
        raise BadRequest(
            f"starting_after: expected a sequence number, got {value!r:.40}", param="starting_after"
        )
    return int(value)


async def _begun(reply: Reply) -> ReplyObject:
    """The reply as soon as there is one."""
    async with aclosing(reply.events()) as events:
        async for event in events:
            if isinstance(event, Created):
                return event.response
    raise NotFound(f"the log of {reply.id} is no longer kept", code="resume_expired")


async def _reply_stream(reply: Reply, after: int) -> AsyncGenerator[bytes, None]:
    try:
        async with aclosing(reply.events(after)) as events:
            async for event in events:
                yield sse(json_bytes(event), str(event.__struct_config__.tag))
    except Exception as error:
        yield sse({"type": "error", **as_api_error(error).body()}, "error")


# ---------------------------------------------------------------- chat shapes


def chat_completion(whole: ReplyObject) -> dict[str, Any]:
    message = {"role": "assistant", "content": _text(whole), "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": _finish_reason(whole), "logprobs": None}
    return {
        **_chat_head(whole, "chat.completion"),
        "choices": [choice],
        "usage": _chat_usage(whole),
        "metadata": whole.metadata,
    }


async def _chat_stream(reply: Reply, *, include_usage: bool) -> AsyncGenerator[bytes, None]:
    """Chunks: the role, the text, the reason it ended, then usage if asked for, then [DONE]."""
    head: dict[str, Any] = {}
    try:
        async with aclosing(reply.events()) as events:
            async for event in events:
                match event:
                    case Created():
                        head = _chat_head(event.response, "chat.completion.chunk")
                        yield sse(_chunk(head, {"role": "assistant", "content": ""}, None, include_usage))
                    case TextDelta():
                        yield sse(_chunk(head, {"content": event.delta}, None, include_usage))
                    case Completed() | Incomplete():
                        whole = event.response
                        last = _chunk(head, {}, _finish_reason(whole), include_usage)
                        yield sse(last | {"metadata": whole.metadata})
                        if include_usage:
                            yield sse(head | {"choices": [], "usage": _chat_usage(whole)})
                    case Failed():
                        raise failure(event.response)
    except Exception as error:
        yield sse(as_api_error(error).body())
    yield sse(DONE)


def _chunk(
    head: dict[str, Any], delta: dict[str, str], finish_reason: str | None, include_usage: bool
) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
    return head | {"choices": [choice]} | ({"usage": None} if include_usage else {})


def _chat_head(whole: ReplyObject, kind: str) -> dict[str, Any]:
    return {"id": whole.id, "object": kind, "created": int(whole.created_at), "model": whole.model}


def _finish_reason(whole: ReplyObject) -> str:
    reason = whole.incomplete_details.reason if whole.incomplete_details is not None else None
    return "length" if reason == "max_output_tokens" else "stop"


def _chat_usage(whole: ReplyObject) -> dict[str, Any] | None:
    usage = whole.usage
    if usage is None:
        return None
    return {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.input_tokens_details.cached_tokens},
    }


def _text(whole: ReplyObject) -> str:
    return "".join(part.text for message in whole.output for part in message.content)
