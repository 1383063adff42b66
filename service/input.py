"""What a request says: its new message, the turns it brings along, its instructions. Pure."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from personalization.history import InvalidTurn, Role, Turn
from service.errors import BadRequest, ContextTooLong
from service.protocol import CreateChatCompletion, CreateResponse, InputItem, OutputFormat, text_of

SYSTEM_ROLES = ("system", "developer")


@dataclass(frozen=True)
class Said:
    """`text` is the new message; None asks again for a reply to the conversation's last one. `before` are the
    turns the client sent with it, which are read but not saved: they were, when they were new."""

    text: str | None
    before: tuple[tuple[Role, str], ...] = ()
    instructions: str | None = None


def said_in_response(asked: CreateResponse) -> Said:
    if isinstance(asked.input, list):
        said = _said(asked.input, "input")
        parts = [part for part in (asked.instructions, said.instructions) if part]
        return Said(said.text, said.before, "\n\n".join(parts) or None)
    if asked.input is not None and not asked.input.strip():
        raise BadRequest("input: expected a message, got an empty one", param="input")
    return Said(asked.input, instructions=asked.instructions or None)


def said_in_chat(asked: CreateChatCompletion) -> Said:
    said = _said(asked.messages, "messages")
    if said.text is None:
        raise BadRequest("messages: expected at least one message", param="messages")
    return said


def chat_conversation(user: str, said: Said) -> str:
    """A conversation's id for clients that hold it themselves: the same one while it begins the same way."""
    first = next((text for role, text in said.before if role == "user"), said.text or "")
    named = f"{user}\0{said.instructions or ''}\0{first}"
    return "chat_" + hashlib.sha256(named.encode()).hexdigest()[:32]


def refuse_tools(tools: list[Any] | None) -> None:
    if tools:
        raise BadRequest("tools: expected none, this model cannot call any", param="tools")


def refuse_formats(asked: OutputFormat | None, param: str) -> None:
    if asked is not None and asked.type != "text":
        raise BadRequest(f"{param}.type: expected text, got {asked.type!r:.80}", param=param)


def _said(items: Sequence[InputItem], param: str) -> Said:
    spoken: list[tuple[Role, str]] = []
    instructions: list[str] = []
    for at, item in enumerate(items):
        where = f"{param}[{at}]"
        if item.type != "message":
            raise BadRequest(f"{where}.type: expected 'message', got {item.type!r:.80}", param=where)
        # OpenAI's clients write null where an assistant's message has no words.
        wordless = item.content is None and item.role == "assistant"
        text = "" if wordless else text_of(item.content, f"{where}.content")
        if item.role in SYSTEM_ROLES:
            instructions.append(text)
        elif item.role == "user" or item.role == "assistant":
            spoken.append(("user" if item.role == "user" else "assistant", text))
        else:
            raise BadRequest(
                f"{where}.role: expected user, assistant, system or developer, got {item.role!r:.80}",
                param=where,
            )
    said_instructions = "\n\n".join(part for part in instructions if part) or None
    if not spoken:
        return Said(None, (), said_instructions)
    *before, (role, text) = spoken
    if role != "user":
        raise BadRequest(f"{param}: expected the last message to be the user's", param=param)
    if not text.strip():
        raise BadRequest(f"{param}: expected a message, got an empty one", param=param)
    return Said(text, tuple(before), said_instructions)


def brought_turns(said: Said, conversation: str, now: datetime) -> list[Turn]:
    """`before` as turns, one microsecond apart and older than `now`."""
    start = now.astimezone(UTC) - timedelta(microseconds=len(said.before))
    return [
        checked_turn(
            id=f"sent_{at}",
            conversation=conversation,
            at=start + timedelta(microseconds=at),
            role=role,
            text=text,
            author="person" if role == "user" else "model",
        )
        for at, (role, text) in enumerate(said.before)
    ]


def checked_turn(**fields: object) -> Turn:
    """A turn of what a client sent. Raises BadRequest, ContextTooLong, where Turn raises InvalidTurn."""
    try:
        return Turn(**fields)  # type: ignore[arg-type]
    except InvalidTurn as error:
        if error.field == "text" and "at most" in str(error):
            raise ContextTooLong(str(error), param="input") from None
        raise BadRequest(str(error), param=error.field) from None
