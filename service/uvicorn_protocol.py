"""uvicorn's WebSocket protocol, made to let go of clients that stopped reading.

When a peer does not answer pings, or does not read our close frame, uvicorn closes the transport. Closing
waits for the write buffer to drain, which a peer that reads nothing never lets happen: `send()` stays
blocked and the socket with it. An abort, half a second later, releases both."""

from typing import Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

ABORT = "attune.abort"  # scope["extensions"] name: a function that drops the connection at once
GRACE_S = 0.5


class AbortingWebSocketProtocol(WebSocketsSansIOProtocol):
    def keepalive_timeout(self) -> None:
        super().keepalive_timeout()
        self.loop.call_later(GRACE_S, self.transport.abort)

    async def run_asgi(self) -> None:
        extensions: dict[str, Any] = self.scope["extensions"]
        extensions[ABORT] = self.transport.abort
        await super().run_asgi()

    async def send(self, message: Any) -> None:
        await super().send(message)
        if message["type"] == "websocket.close" and self.close_timer is not None:
            self.close_timer.cancel()
            self.close_timer = self.loop.call_later(self.close_timeout, self.transport.abort)
