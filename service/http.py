"""What every HTTP endpoint does alike: who asks, how much they may send, how errors and streams are
written."""

from collections.abc import AsyncIterator
from typing import Any, TypeVar

import msgspec
import structlog
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse

from engine.client import EngineLost
from personalization.store import HistoryForgotten, StoreUnavailable
from service.auth import Authenticator, Person
from service.errors import (
    ApiError,
    BadRequest,
    Conflict,
    NotAuthenticated,
    NotFound,
    ServerFault,
    TooLarge,
    Unavailable,
)
from service.events import json_bytes
from service.limits import RateLimits
from service.metrics import Metrics
from service.protocol import read_body

log = structlog.get_logger(__name__)
T = TypeVar("T")

MAX_BODY_BYTES = 1 << 20
# What `as_api_error` knows by name. Anything else is a fault of ours, and its traceback is logged.
KNOWN_ERRORS = (
    ApiError,
    StoreUnavailable,
    EngineLost,
    HistoryForgotten,
    msgspec.ValidationError,
    HTTPException,
)
SSE_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class Door:
    """Lets requests in: rates by address, then the credential, then rates by person."""

    def __init__(self, auth: Authenticator, limits: RateLimits) -> None:
        self.auth = auth
        self.limits = limits

    async def person(self, request: Request) -> Person:
        """Who asks. Raises RateLimited, Forbidden (a foreign page), NotAuthenticated."""
        await self.knock(request)
        try:
            person = self.auth.bearer(request.headers.get("authorization"))
        except NotAuthenticated:
            await self.limits.failure(address(request))
            raise
        await self.limits.message(person.user)
        return person

    async def knock(self, request: Request) -> None:
        """What is asked of a request before anyone knows whose it is."""
        await self.limits.request(address(request))
        self.auth.check_origin(request.headers.get("origin"))


def address(request: Request) -> str:
    return request.client.host if request.client is not None else "local"


async def read_json(request: Request, kind: type[T]) -> T:
    """The body as the struct `kind`. Raises BadRequest, TooLarge."""
    return read_body(await read_limited(request, MAX_BODY_BYTES), kind)


async def read_limited(request: Request, limit: int) -> bytes:
    """The body, refused as soon as it is longer than `limit` bytes. Raises TooLarge, and BadRequest when the
    client leaves in the middle of it."""
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > limit:
        raise TooLarge(f"expected a body of at most {limit} bytes, got {declared}")
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise TooLarge(f"expected a body of at most {limit} bytes, got more")
    except ClientDisconnect:  # nobody reads the answer, but it is no fault of ours either
        raise BadRequest("expected the whole body, got a part of it", code="incomplete_body") from None
    return bytes(body)


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json_bytes(content), status, headers, media_type="application/json")


def event_stream(lines: AsyncIterator[bytes]) -> StreamingResponse:
    return StreamingResponse(lines, media_type="text/event-stream", headers=SSE_HEADERS)


def sse(data: Any, event: str | None = None) -> bytes:
    """One server-sent event. JSON has no raw line breaks, so one data line holds it."""
    head = b"" if event is None else f"event: {event}\n".encode()
    return head + b"data: " + (data if isinstance(data, bytes) else json_bytes(data)) + b"\n\n"


def as_api_error(error: Exception) -> ApiError:
    """Any error of the rooms below in the client's vocabulary."""
    match error:
        case ApiError():
            return error
        case StoreUnavailable():
            return Unavailable("the history cannot be reached", code="store_unavailable", retry_after=2)
        case EngineLost():
            return Unavailable("the engine cannot be reached", code="engine_unavailable", retry_after=2)
        case HistoryForgotten():
            return Conflict("your history was forgotten while this was being asked")
        case msgspec.ValidationError():
            return BadRequest(str(error))
        case HTTPException(status_code=404):
            return NotFound(str(error.detail))
        case HTTPException():
            known = ApiError(str(error.detail), code="http_error")
            known.status, known.type = error.status_code, "invalid_request_error"
            return known
    log.error("request failed", exc_info=error)
    return ServerFault("an internal error")


def error_handler(metrics: Metrics) -> Any:
    """Starlette's exception handler: every error as OpenAI's clients read it."""

    async def answer(request: Request, error: Exception) -> Response:
        known = as_api_error(error)
        if isinstance(error, HTTPException) and error.status_code in (404, 405):
            known.message = f"nothing answers {request.method} {request.url.path:.160}"
        metrics.refused.labels(code=known.code).inc()
        headers = known.headers()
        if known.status == 401:
            headers["www-authenticate"] = "Bearer"
        return json_response(known.body(), known.status, headers)

    return answer
