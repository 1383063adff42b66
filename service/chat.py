"""A chat in the terminal, and the client under it: one WebSocket that survives a restart of anything.

A message carries its own id, so when the socket is lost before the reply's first event it is sent again and
joins the reply it began; after the first event the reply is resumed where it stopped.
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
import uuid
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Any, Self

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus

SUBPROTOCOL = "attune.v1.json"
TERMINAL = ("response.completed", "response.incomplete", "response.failed")
RETRY_FOR_S, FIRST_RETRY_S, LONGEST_RETRY_S = 60.0, 0.2, 3.0
READ_BYTES = 1 << 16
RETRIED_CODES = {1000, 1001, 1005, 1006, 1011, 1012, 1013, 4408, 4429}
Event = dict[str, Any]


class ChatRefused(RuntimeError):
    """The service does not want this connection; trying again would not help."""


class ChatClient:
    """One conversation over `/v1/responses`. Use as `async with`; `ask` one thing at a time."""

    def __init__(self, address: str, token: str, conversation: str | None = None) -> None:
        self.conversation = conversation or f"terminal-{uuid.uuid4().hex[:12]}"
        self._url = address.replace("http", "ws", 1) + "/v1/responses"
        self._headers = {"Authorization": f"Bearer {token}"}
        self._socket: ClientConnection | None = None
        self._asked: Event | None = None  # a message whose reply has not ended
        self._response_id: str | None = None
        self._seen = -1  # sequence number of the reply's last event

    async def __aenter__(self) -> Self:
        await self._connect()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._socket is not None:
            await self._socket.close()

    @property
    def replying(self) -> bool:
        return self._asked is not None

    @property
    def response_id(self) -> str | None:
        return self._response_id

    async def ask(self, text: str, model: str = "me", **options: Any) -> None:
        """Send a message; its reply comes as events."""
        self._asked = {
            "type": "response.create",
            "event_id": uuid.uuid4().hex,
            "model": model,
            "input": text,
            "conversation": self.conversation,
            **options,
        }
        self._response_id, self._seen = None, -1
        await self._send(self._asked)

    async def cancel(self) -> None:
        """Stop the reply that is streaming; its last event still comes."""
        if self._response_id is not None:
            cancel = {"type": "response.cancel", "response_id": self._response_id}
            await self._send(cancel | {"event_id": uuid.uuid4().hex})

    async def refresh(self) -> None:
        await self._send({"type": "adapter.refresh.create", "event_id": uuid.uuid4().hex})

    async def next_event(self) -> Event:
        """The next event, whatever happens to the socket meanwhile. Safe to cancel. Raises ChatRefused."""
        while True:
            try:
                assert self._socket is not None
                event: Event = json.loads(await self._socket.recv())
            except ConnectionClosed as closed:
                await self._reconnect(closed)
                continue
            if self._is_news(event):
                return event

    async def reply(self) -> AsyncIterator[Event]:
        """The events up to the end of the reply just asked for."""
        while self.replying:
            yield await self.next_event()

    def _is_news(self, event: Event) -> bool:
        """Keep track of the reply; False for an event that was already seen before the socket was lost."""
        kind = event.get("type")
        asked = self._asked
        if asked is None:
            return True
        if kind == "response.created" and self._response_id is None:
            self._response_id = event["response"]["id"]
        number = event.get("sequence_number")
        if number is not None and event.get("response_id") in (None, self._response_id):
            if number <= self._seen:
                return False
            self._seen = number
            if kind in TERMINAL:
                self._asked = None
        elif kind == "error" and self._ends_wait(event, asked):
            self._asked = None
        return True

    def _ends_wait(self, error: Event, asked: Event) -> bool:
        """Whether no more of the reply will come: it was refused, or is lost. An answer to anything else that
        was asked meanwhile names that by its event_id."""
        answers = error.get("event_id")
        if answers is not None:
            return bool(answers == asked["event_id"])
        return self._response_id is None or error.get("response_id") == self._response_id

    async def _send(self, message: Event) -> None:
        assert self._socket is not None
        # A lost socket is noticed by next_event, which sends what is unanswered again.
        with contextlib.suppress(ConnectionClosed):
            await self._socket.send(json.dumps(message))

    async def _connect(self) -> None:
        try:
            self._socket = await connect(
                self._url,
                additional_headers=self._headers,
                subprotocols=[SUBPROTOCOL],  # type: ignore[list-item]
                compression=None,
                max_size=None,
                proxy=None,  # the service is on this machine, and the token nobody else's
            )
        except InvalidStatus as refused:
            if refused.response.status_code in (401, 403, 404):
                raise ChatRefused(f"the service answered {refused.response.status_code}") from None
            raise

    async def _reconnect(self, closed: ConnectionClosed) -> None:
        """Open the socket again and take up the unfinished reply. Raises ChatRefused, or OSError at last."""
        code = closed.rcvd.code if closed.rcvd else 1006
        if code not in RETRIED_CODES:
            raise ChatRefused(f"closed with {code}: {closed.rcvd.reason if closed.rcvd else ''}".rstrip(": "))
        pause = FIRST_RETRY_S
        try:
            async with asyncio.timeout(RETRY_FOR_S):
                while True:
                    try:
                        await self._connect()
                        break
                    except (OSError, InvalidHandshake):
                        await asyncio.sleep(pause)
                        pause = min(LONGEST_RETRY_S, pause * 2)
        except TimeoutError:
            raise ChatRefused(f"the service has been away for {RETRY_FOR_S:.0f} s") from None
        if self._asked is not None and self._response_id is None:
            await self._send(self._asked)
        elif self._asked is not None:
            resume = {
                "type": "response.resume",
                "response_id": self._response_id,
                "starting_after": self._seen,
            }
            await self._send(resume)


HELP = """  /base TEXT   ask the bare base model       /me TEXT   ask your own again (the default)
  /refresh     learn from what was said      /help      this
  /quit        leave (or Ctrl-D)             Ctrl-C     stop a reply"""


class Terminal:
    """Lines in, words out. `write` takes text as it is; nothing else prints."""

    def __init__(self, client: ChatClient, lines: AsyncIterator[str], write: Callable[[str], None]) -> None:
        self._client = client
        self._lines = lines
        self._write = write
        self._announced: str | None = None  # the newest refresh that was said to begin

    async def run(self) -> None:
        """Read and answer lines until there are no more."""
        self._write(f"Talking to your own model. /help for what else you can do.\n{PROMPT}")
        line = asyncio.ensure_future(anext(self._lines, None))
        event = asyncio.ensure_future(self._client.next_event())
        try:
            while True:
                await asyncio.wait({line, event}, return_when=asyncio.FIRST_COMPLETED)
                if event.done():
                    self._show(event.result())
                    event = asyncio.ensure_future(self._client.next_event())
                if line.done() and not self._client.replying:
                    text = line.result()
                    if text is None or text.strip() == "/quit":
                        return
                    await self._act(text.strip())
                    line = asyncio.ensure_future(anext(self._lines, None))
                elif line.done():  # typed ahead, or the input has ended: the reply comes first
                    await asyncio.wait({event})
        finally:
            for task in (line, event):
                task.cancel()
            await asyncio.gather(line, event, return_exceptions=True)

    async def _act(self, text: str) -> None:
        command, _, rest = text.partition(" ")
        if command in ("/base", "/me") and rest.strip():
            await self._client.ask(rest.strip(), model=command.removeprefix("/"))
        elif command == "/refresh":
            await self._client.refresh()
        elif command.startswith("/"):
            self._write(f"{HELP}\n{PROMPT}")
        elif text:
            await self._client.ask(text)
        else:
            self._write(PROMPT)

    def _show(self, event: Event) -> None:
        kind = event.get("type", "")
        if kind == "adapter.refresh.queued":  # comes as an answer, and to all sockets of a person
            announced, self._announced = self._announced, event.get("job_id")
            if announced == self._announced is not None:
                return
        if kind == "response.created":
            self._write(f"{who(event['response'])}> ")
        elif kind == "response.output_text.delta":
            self._write(event["delta"])
        elif kind in TERMINAL:
            response = event["response"]
            fault = response.get("error") or response.get("incomplete_details")
            note = f"  [{fault.get('message') or fault.get('reason')}]" if fault else ""
            self._write(f"{note}\n{PROMPT}")
        elif kind == "error":
            self._write(f"\n[{event.get('message', 'error')}]\n{PROMPT}")
        elif notice := notice_of(event):
            self._write(f"\n[{notice}]\n" + ("" if self._client.replying else PROMPT))


PROMPT = "you> "


def who(response: Event) -> str:
    """`me v3` or `base`: which weights wrote the reply."""
    version = (response.get("metadata") or {}).get("adapter_version", "0")
    return f"me v{version}" if version not in ("0", "") else "base"


def notice_of(event: Event) -> str | None:
    """One line about something that happened to the adapter, or None when it is not worth one."""
    kind = event.get("type")
    if kind == "adapter.updated":
        return f"your adapter is now version {event.get('to')}"
    if kind == "adapter.refresh.queued":
        return "learning from what you wrote…"
    if kind == "adapter.refresh.completed" and not event.get("published", True):
        return f"learned nothing better: {event.get('reason') or 'the new version was not better'}"
    if kind == "adapter.refresh.failed":
        why = event.get("message") or event.get("code")
        return f"{'nothing learned' if event.get('code') == 'not_enough_turns' else 'learning failed'}: {why}"
    return None


async def stdin_lines() -> AsyncIterator[str]:
    """Lines of standard input, without a thread: one that waits for a line would outlive the chat."""
    source, rest = sys.stdin.fileno(), b""
    while True:
        await readable(source)
        if not (read := os.read(source, READ_BYTES)):
            break
        *lines, rest = (rest + read).split(b"\n")
        for line in lines:
            yield line.decode(errors="replace")
    if rest:
        yield rest.decode(errors="replace")


async def readable(source: int) -> None:
    """Return when a read would not wait. Watched only then: what lies unread wakes the loop without end."""
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    try:
        loop.add_reader(source, ready.set)
    except PermissionError:  # a file, for which nobody waits
        return
    try:
        await ready.wait()
    finally:
        loop.remove_reader(source)


async def chat(address: str, token: str, *, as_json: bool) -> None:
    """Run the chat until its input ends. With `as_json` every event is a line, and nothing else is."""

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    async with ChatClient(address, token) as client:
        if as_json:
            async for line in stdin_lines():
                if line.strip():
                    await client.ask(line.strip())
                    async for event in client.reply():
                        write(json.dumps(event, ensure_ascii=False) + "\n")
            return
        running = asyncio.ensure_future(Terminal(client, stdin_lines(), write).run())
        stopping: set[asyncio.Task[None]] = set()

        def interrupt() -> None:
            if client.replying:
                stopping.add(asyncio.ensure_future(client.cancel()))
            else:
                running.cancel()

        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, interrupt)
        with contextlib.suppress(asyncio.CancelledError):
            await running
        write("\n")
