"""The page's files, from the folder its build wrote, under headers that let nothing foreign in."""

from pathlib import Path

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data: blob:",
        "font-src 'self'",
        "connect-src 'self'",
        "manifest-src 'self'",
        "base-uri 'none'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    )
)
SECURITY_HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}
NOT_BUILT = """\
The page is not built: expected {folder}/index.html.
Run `make page`, or use the OpenAI SDK at /v1 with a token from `attune token USER`.
"""


class SecurityHeaders:
    """Adds the headers to every HTTP answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._headers = [(name.encode(), value.encode()) for name, value in SECURITY_HEADERS.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *self._headers]
            await send(message)

        await self._app(scope, receive, with_headers if scope["type"] == "http" else send)


class PageFiles(StaticFiles):
    """Files whose names carry a hash may be kept for ever; the page itself is asked for again each time."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        kept = path.startswith("assets/")
        response.headers["cache-control"] = "public, max-age=31536000, immutable" if kept else "no-cache"
        return response


def page_app(folder: Path) -> ASGIApp:
    """What answers at `/`: the built page, or what to do about its absence."""
    if (folder / "index.html").is_file():
        return PageFiles(directory=folder, html=True)

    async def not_built(scope: Scope, receive: Receive, send: Send) -> None:
        found = Request(scope).url.path == "/"
        text = NOT_BUILT.format(folder=folder) if found else "Not found"
        await PlainTextResponse(text, 503 if found else 404)(scope, receive, send)

    return not_built
