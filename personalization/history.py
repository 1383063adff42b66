"""What people said: one turn, which turns are learned from, and the interchange format, JSON Lines.

    {"user": str, "conversation": str, "at": ISO-8601, "role": "user"|"assistant", "text": str,
     "author": "person"|"model", "rating": "up"|"down"|null}

One turn a line, UTF-8. `author` may be left out (a person wrote the user's turns, a model the assistant's),
a time without an offset is UTC, unknown fields are ignored. `dump` adds `id`, `version`, `corrects` and
`removed` where a turn has them: an export brought back is the same history, not a second copy of it.

Pure: no clock, no disk, no network.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, cast, get_args

Role = Literal["user", "assistant"]
Author = Literal["person", "model"]
Rating = Literal["up", "down"]

MAX_LINE_BYTES = 1 << 20
MAX_TEXT_CHARS = 65_536
MAX_NAME_CHARS = 256  # of a user, a conversation, a turn id

CLOCK_SKEW = timedelta(minutes=5)  # so far ahead may the clock be by which an imported turn was said

# Dates outside are typing errors; they would sort before or after everything a person ever says.
EARLIEST = datetime(1970, 1, 1, tzinfo=UTC)
LATEST = datetime(2100, 1, 1, tzinfo=UTC)


class InvalidTurn(ValueError):
    """A turn breaks a rule of the format. `field` names where; the message says expected and got."""

    def __init__(self, field: str, expected: str, got: object) -> None:
        self.field = field
        shown = repr(got)
        if len(shown) > 60:
            shown = shown[:57] + "..."
        super().__init__(f"{field}: expected {expected}, got {shown}")


@dataclass(frozen=True, slots=True)
class Turn:
    """One thing said. `at` is UTC; `version` is the adapter version that wrote a model's turn (0 is the bare
    base); `corrects` is the id of the turn that this one replaces; `removed` means that the person took it
    out of learning, or that a correction took its place. Raises InvalidTurn."""

    id: str
    conversation: str
    at: datetime
    role: Role
    text: str
    author: Author
    rating: Rating | None = None
    version: int | None = None
    corrects: str | None = None
    removed: bool = False

    def __post_init__(self) -> None:
        _check_name("id", self.id)
        _check_name("conversation", self.conversation)
        if not isinstance(self.at, datetime) or self.at.utcoffset() is None:
            raise InvalidTurn("at", "a date with a time zone", self.at)
        if self.at.tzinfo is not UTC:
            object.__setattr__(self, "at", self.at.astimezone(UTC))
        if not EARLIEST <= self.at < LATEST:
            raise InvalidTurn("at", f"a date from {EARLIEST.year} to {LATEST.year - 1}", self.at.isoformat())
        _check_choice("role", self.role, Role)
        _check_text(self.text)
        _check_choice("author", self.author, Author)
        if self.rating is not None:
            _check_choice("rating", self.rating, Rating)
        version = self.version
        if version is not None and (isinstance(version, bool) or not isinstance(version, int) or version < 0):
            raise InvalidTurn("version", "an adapter version from 0, or null", version)
        if self.corrects is not None:
            _check_name("corrects", self.corrects)
        if not isinstance(self.removed, bool):
            raise InvalidTurn("removed", "true or false", self.removed)


def learned(turn: Turn) -> bool:
    """Whether training may use the turn as something to learn: what a person wrote, and model turns rated up;
    never a turn rated down, removed or blank."""
    if turn.removed or turn.rating == "down" or not turn.text.strip():
        return False
    return turn.author == "person" or turn.rating == "up"


def effective(turns: Sequence[Turn]) -> list[Turn]:
    """The turns as they should have been: a corrected turn gives its place to its newest correction, which is
    the last one that no other has removed: those that were brought along may bear any time. A correction
    whose original is not among the turns stays where it is."""
    present = {turn.id for turn in turns}
    corrections = [turn for turn in turns if turn.corrects in present]
    corrections.sort(key=lambda turn: not turn.removed)  # of equals the last one stays the last
    newest = {turn.corrects: turn for turn in corrections}
    said = []
    for turn in turns:
        if turn.corrects in present:
            continue
        seen = {turn.id}
        while turn.id in newest and newest[turn.id].id not in seen:  # a correction may itself be corrected
            turn = newest[turn.id]
            seen.add(turn.id)
        said.append(turn)
    return said


def served_turns(turns: Sequence[Turn]) -> list[Turn]:
    """The turns without replies that were asked for again: of our replies in a row, the last one counts."""
    return [
        turn
        for turn, after in zip(turns, [*turns[1:], None], strict=False)
        if not (
            _ours(turn) and after is not None and _ours(after) and after.conversation == turn.conversation
        )
    ]


def _ours(turn: Turn) -> bool:
    return turn.author == "model" and turn.version is not None


@dataclass(frozen=True, slots=True)
class LineError:
    """A line that was left out, counted from 1."""

    number: int
    message: str


@dataclass(frozen=True, slots=True)
class Parsed:
    """`turns` by user, each list ordered by `at`, ties in file order; `errors` in file order."""

    turns: dict[str, list[Turn]]
    errors: list[LineError]


def parse(lines: Iterable[bytes], *, not_after: datetime | None = None) -> Parsed:
    """Read the interchange format. A bad line becomes an error with its number, the rest is read; blank lines
    are skipped. `not_after` refuses turns from the future: they would stay newer than all that is said
    later."""
    turns: dict[str, list[Turn]] = {}
    errors: list[LineError] = []
    repeats: Counter[str] = Counter()
    for number, line in enumerate(lines, start=1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        try:
            user, turn = _read_line(line, repeats)
            if not_after is not None and turn.at > not_after:
                raise InvalidTurn("at", f"not after {not_after.isoformat()}", turn.at.isoformat())
        except InvalidTurn as error:
            errors.append(LineError(number, str(error)))
        else:
            turns.setdefault(user, []).append(turn)
    for history in turns.values():
        history.sort(key=lambda turn: turn.at)
    return Parsed(turns, errors)


def dump(user: str, turns: Iterable[Turn]) -> Iterator[str]:
    """One line per turn, without line ends, in the order given; `parse` makes the same turns of them."""
    check_user(user)
    repeats: Counter[str] = Counter()
    for turn in turns:
        line: dict[str, object] = {
            "user": user,
            "conversation": turn.conversation,
            "at": turn.at.isoformat(),
            "role": turn.role,
            "text": turn.text,
            "author": turn.author,
            "rating": turn.rating,
        }
        key = _content_key(user, turn.conversation, turn.at, turn.role, turn.text)
        if turn.id == _turn_id(key, repeats[key]):
            repeats[key] += 1  # the reader finds the same id by itself
        else:
            line["id"] = turn.id
        if turn.version is not None:
            line["version"] = turn.version
        if turn.corrects is not None:
            line["corrects"] = turn.corrects
        if turn.removed:
            line["removed"] = True
        yield json.dumps(line, ensure_ascii=False)


def check_user(user: object) -> str:
    """The user's name, if it can be one: 1 to 256 printable characters. Raises InvalidTurn."""
    _check_name("user", user)
    return cast(str, user)


def _read_line(line: bytes, repeats: Counter[str]) -> tuple[str, Turn]:
    record = _read_json(line)
    user = check_user(_required(record, "user"))
    conversation = _check_name("conversation", _required(record, "conversation"))
    at = _read_time(_required(record, "at"))
    role = _check_choice("role", _required(record, "role"), Role)
    text = _check_text(_required(record, "text"))
    author = record.get("author")
    if author is None:
        author = "person" if role == "user" else "model"
    given_id = record.get("id")
    key = _content_key(user, conversation, at, role, text)
    turn = Turn(
        id=_turn_id(key, repeats[key]) if given_id is None else cast(str, given_id),
        conversation=conversation,
        at=at,
        role=cast(Role, role),
        text=text,
        author=cast(Author, author),
        rating=cast("Rating | None", record.get("rating")),
        version=cast("int | None", record.get("version")),
        corrects=cast("str | None", record.get("corrects")),
        removed=cast(bool, record.get("removed", False)),
    )
    if given_id is None:
        repeats[key] += 1
    return user, turn


def _read_json(line: bytes) -> Mapping[str, Any]:
    if len(line) > MAX_LINE_BYTES:
        raise InvalidTurn("line", f"at most {MAX_LINE_BYTES} bytes", f"{len(line)} bytes")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidTurn("line", "UTF-8", line[error.start : error.start + 8]) from error
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidTurn("line", f"JSON ({error})", text) from error
    if not isinstance(record, dict):
        raise InvalidTurn("line", "a JSON object", record)
    return record


def _required(record: Mapping[str, Any], field: str) -> Any:
    if field not in record:
        raise InvalidTurn(field, "a value", "nothing")
    return record[field]


def _read_time(value: object) -> datetime:
    expected = "an ISO-8601 date"
    if not isinstance(value, str):
        raise InvalidTurn("at", expected, value)
    try:
        at = datetime.fromisoformat(value)
        return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise InvalidTurn("at", expected, value) from error


def _check_name(field: str, value: object) -> str:
    if not isinstance(value, str):
        raise InvalidTurn(field, "a string", value)
    if not 1 <= len(value) <= MAX_NAME_CHARS or not value.isprintable() or not value.strip():
        raise InvalidTurn(field, f"1 to {MAX_NAME_CHARS} printable characters", value)
    return value


def _check_text(value: object) -> str:
    if not isinstance(value, str):
        raise InvalidTurn("text", "a string", value)
    if len(value) > MAX_TEXT_CHARS:
        raise InvalidTurn("text", f"at most {MAX_TEXT_CHARS} characters", f"{len(value)} characters")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, which is not a character
        raise InvalidTurn("text", "whole Unicode characters", value[error.start : error.end]) from error
    return value


def _check_choice(field: str, value: object, choices: object) -> str:
    allowed = get_args(choices)
    if value not in allowed:
        raise InvalidTurn(field, " or ".join(f'"{choice}"' for choice in allowed), value)
    return cast(str, value)


def _content_key(user: str, conversation: str, at: datetime, role: str, text: str) -> str:
    """Names a turn by what it says; JSON keeps the parts apart."""
    said = json.dumps([user, conversation, at.isoformat(), role, text])
    return hashlib.sha256(said.encode("utf-8")).hexdigest()


def _turn_id(content_key: str, ordinal: int) -> str:
    """The id of the `ordinal`-th turn (from 0) that says exactly this: the same file, the same ids."""
    return hashlib.sha256(f"{content_key}:{ordinal}".encode()).hexdigest()[:32]
