"""A tokenizer's chat template: messages → text, as transformers renders it, without importing transformers.

The template comes with the model and is code, so it runs in jinja2's sandbox and sees plain strings only.
What it cannot take (two turns of one role in a row, an assistant's turn first, a system message) is found out
once, by trying, and `ChatTemplate.messages` gives it only what it can take.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

# For a tokenizer without a template. A turn ends with the tokenizer's end token, if it has one, and a line
# end.
PLAIN_TEMPLATE = """\
{{- bos_token or '' -}}
{%- for message in messages -%}
{{- {'user': 'User', 'assistant': 'Assistant', 'system': 'System'}[message.role] + ':\\n' -}}
{{- message.content + (eos_token or '') + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:\\n' -}}{%- endif -%}
"""
PLAIN_STOP = "\nUser:"

PART_SEPARATOR = "\n\n"  # between turns that share a message


class TemplateFailed(ValueError):
    """The template refuses messages that every chat has, or is not a template. `reason` is jinja2's word."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(f"the tokenizer's chat template failed: {reason}")


@dataclass(frozen=True, slots=True)
class Message:
    """One message and the turns that it is made of (indices into the turns given), joined by
    PART_SEPARATOR."""

    role: str
    parts: tuple[str, ...]
    turns: tuple[int, ...]


class ChatTemplate:
    """`now` gives the time to templates that print a date."""

    def __init__(
        self, source: str | None, special_tokens: Mapping[str, str], *, now: Callable[[], datetime]
    ) -> None:
        self.plain = source is None
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: now().strftime(form)
        try:
            self._template = environment.from_string(PLAIN_TEMPLATE if source is None else source)
        except jinja2.TemplateError as error:
            raise TemplateFailed(str(error)) from error
        self._special_tokens = dict(special_tokens)
        self._merges = not self._takes("user", "user") or not self._takes("user", "assistant", "assistant")
        self._user_first = not self._takes("assistant", "user")
        self._system = self._takes("system", "user")

    def messages(
        self, roles: Sequence[str], texts: Sequence[str], *, instructions: str | None = None
    ) -> list[Message]:
        """The turns as messages that this template takes. Where it wants the roles to alternate, turns of one
        role in a row share a message; where it wants a user first, an assistant's turns before that are left
        out; where it has no place for instructions, they open the first user's message."""
        messages: list[Message] = []
        for index, (role, text) in enumerate(zip(roles, texts, strict=True)):
            last = messages[-1] if messages else None
            if last is None and self._user_first and role != "user":
                continue
            if last is not None and self._merges and last.role == role:
                messages[-1] = Message(role, (*last.parts, text), (*last.turns, index))
            else:
                messages.append(Message(role, (text,), (index,)))
        if instructions is None:
            return messages
        if self._system:
            return [Message("system", (instructions,), (-1,)), *messages]
        for place, message in enumerate(messages):
            if message.role == "user":
                messages[place] = Message("user", (instructions, *message.parts), (-1, *message.turns))
                break
        return messages

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """Raises TemplateFailed."""
        try:
            return self._render(
                [(message.role, PART_SEPARATOR.join(message.parts)) for message in messages],
                add_generation_prompt,
            )
        except jinja2.TemplateError as error:
            raise TemplateFailed(str(error)) from error

    def _render(self, messages: Sequence[tuple[str, str]], add_generation_prompt: bool) -> str:
        return self._template.render(
            messages=[{"role": role, "content": content} for role, content in messages],
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            enable_thinking=False,  # a chat, not a puzzle: models that can do both answer at once
            **self._special_tokens,
        )

    def _takes(self, *roles: str) -> bool:
        words = {role: f"w{place}x" for place, role in enumerate(("system", "user", "assistant"))}
        try:
            text = self._render([(role, words[role]) for role in roles], add_generation_prompt=False)
        except Exception:  # a template may stumble in any way over what it does not expect
            return False
        return all(text.count(words[role]) >= roles.count(role) for role in roles)


def load_template(folder: Path, *, now: Callable[[], datetime]) -> ChatTemplate:
    """The template of a tokenizer folder: `chat_template.jinja`, else the one in `tokenizer_config.json`."""
    config = read_json(folder / "tokenizer_config.json")
    special = _special_tokens(config) | _special_tokens(read_json(folder / "special_tokens_map.json"))
    source = config.get("chat_template")
    if isinstance(source, list):  # several by name
        source = next((each["template"] for each in source if each["name"] == "default"), None)
    beside = folder / "chat_template.jinja"
    if beside.exists():
        source = beside.read_text(encoding="utf-8")
    return ChatTemplate(source, special, now=now)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file, empty if there is no such file."""
    if not path.exists():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path.name}: expected a JSON object, got {type(content).__name__}")
    return content


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """`{"eos_token": "</s>", …}`; a token is written as a string or as an object with its content."""
    tokens = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            tokens[name] = text
    return tokens


class _GenerationBlock(Extension):
    """`{% generation %}…{% endgeneration %}` marks what a model wrote; it renders as what is inside."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

    def _inside(self, caller: Callable[[], str]) -> str:
        return caller()


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """jinja2's own would escape for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
