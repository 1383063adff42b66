"""The one renderer: turns → token ids, for serving (`prompt`) and for training (`example`), so that a model
is trained on the very ids that it is served with.

Earlier conversations join the prompt as earlier turns of the same chat: the simplest thing, and what training
sees too. A corrected turn is shown as corrected. Text is stripped at both ends, as most templates do.

The window is whole turns, newest first. Its start must not move with every message, or no prompt would begin
like the one before and the prefix cache could reuse nothing; nor may it depend on anything but the turns. So
the window is grown turn by turn from the first one given, and each time it is full its start jumps: to that
one of the user's turns which leave it 35 % to 65 % full whose id hashes lowest. Two lists that end alike but
begin at different places (the newest 400 turns, one message later) soon jump to the same turn and stay
together.
"""

import hashlib
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import accumulate
from pathlib import Path

from tokenizers import Tokenizer

from personalization.history import Turn, effective, learned
from personalization.template import PLAIN_STOP, Message, TemplateFailed, load_template, read_json

COUNTED_TEXTS = 65_536  # texts whose token count is remembered
KEPT_AT_A_JUMP = (0.35, 0.65)  # of the window

# Put around a turn's text to see where the template leaves it; private characters, never part of a
# vocabulary.
_OPEN, _CLOSE, _END = "\ue000", "\ue001", "\ue002"
_MARK = re.compile(f"([{_OPEN}{_CLOSE}])(\\d+){_END}")
_WORD_JOINER = "\u2060"


class PromptTooLong(ValueError):
    """The newest message alone leaves no room for the reply. Counted in tokens."""

    def __init__(self, tokens: int, limit: int) -> None:
        self.tokens, self.limit = tokens, limit
        super().__init__(f"expected a message of at most {limit} tokens with its frame, got {tokens}")


class TokenizerMissing(FileNotFoundError):
    """The model folder has no fast tokenizer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        super().__init__(f"expected tokenizer.json in {folder}, got none")


class TokenizerDamaged(ValueError):
    """A file of the model folder's tokenizer cannot be read."""

    def __init__(self, folder: Path, reason: Exception) -> None:
        self.folder = folder
        super().__init__(f"expected a tokenizer in {folder}, got files that cannot be read: {reason}")


UNUSABLE_TOKENIZER = (TokenizerMissing, TokenizerDamaged, TemplateFailed)


@dataclass(frozen=True, slots=True)
class Prompt:
    """`history_turns` of the turns shown are from the history; `truncated` if any turn given was left out."""

    token_ids: tuple[int, ...]
    history_turns: int
    truncated: bool


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids and, for each, whether it is one to learn: those of learned turns with their end of turn."""

    token_ids: tuple[int, ...]
    learn_mask: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class _Rendered:
    """A text and where in it (start, end) each turn's own words stand; None if that cannot be told."""

    text: str
    spans: tuple[tuple[int, int] | None, ...]


class Renderer:
    """Reads a Hugging Face tokenizer folder. Safe to share between threads. Raises one of
    UNUSABLE_TOKENIZER."""

    def __init__(
        self, tokenizer_folder: Path, context_length: int, *, now: Callable[[], datetime] = datetime.now
    ) -> None:
        file = tokenizer_folder / "tokenizer.json"
        if not file.exists():
            raise TokenizerMissing(tokenizer_folder)
        self.context_length = context_length
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
            self._template = load_template(tokenizer_folder, now=now)
        except TemplateFailed:
            raise
        except Exception as error:  # the library raises no narrower type
            raise TokenizerDamaged(tokenizer_folder, error) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = {token_id: token.content for token_id, token in added.items() if token.special}
        self._forged = re.compile(
            "|".join(map(re.escape, sorted(self._special.values(), key=len, reverse=True)))
        )
        self._counts: dict[bytes, int] = {}
        self.eos_token_ids = self._find_end_tokens(tokenizer_folder)
        self._measure_frame()

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Where a reply must end if the model has no end-of-turn token to say so."""
        return (PLAIN_STOP,) if self._template.plain else ()

    def prompt(
        self,
        history: Sequence[Turn],
        current: Sequence[Turn],
        *,
        max_new_tokens: int,
        instructions: str | None = None,
    ) -> Prompt:
        """Token ids that end where the reply begins and leave room for `max_new_tokens`.

        `history` is of earlier conversations, `current` this conversation with the newest message last; turns
        that are in both count as current. Raises PromptTooLong if not even the newest message fits."""
        if not current:
            raise ValueError("expected at least the newest message in `current`, got no turn")
        here = {turn.id for turn in current}
        said = effective([*(turn for turn in history if turn.id not in here), *current])
        limit = self.context_length - max_new_tokens
        tokens = 0
        for start in self._fitting_starts(
            said, limit - self.frame_cost - self._instruction_cost(instructions)
        ):
            shown = said[start:]
            token_ids = self._encode(self._text(shown, instructions))
            tokens = len(token_ids)
            if tokens <= limit:
                earlier = sum(turn.id not in here for turn in shown)
                return Prompt(tuple(token_ids), earlier, truncated=start > 0)
        raise PromptTooLong(tokens, limit)

    def example(self, turns: Sequence[Turn], learn: Callable[[Turn], bool] = learned) -> Example:
        """The turns as one chat, and which of its tokens belong to turns to learn. A turn whose place in the
        rendered text cannot be told for certain is not learned. Between two that are learned there is always
        a token that is not, so that they can be told apart: where nothing else is, the first one's end of
        turn.

        The ids before a reply are those of its prompt, as long as the tokenizer does not join the white space
        at a prompt's end with what follows (GPT-2's does, behind a template that ends in two line ends)."""
        said = effective(turns)
        rendered = self._locate(said)
        encoding = self._tokenizer.encode(rendered.text, add_special_tokens=False)
        starts = [start for start, _ in encoding.offsets]
        ends = [end for _, end in encoding.offsets]
        lessons = [
            (bisect_right(ends, span[0]), bisect_left(starts, span[1]))
            for turn, span in zip(said, rendered.spans, strict=True)
            if span is not None and learn(turn)
        ]
        following = [first for first, _ in lessons[1:]] + [len(encoding.ids) + 1]
        mask = [False] * len(encoding.ids)
        for (first, past), after in zip(lessons, following, strict=False):
            end = self._end_of_turn(encoding.ids, past)
            end = end if end < after else min(past, after - 1)
            mask[first:end] = [True] * (end - first)
        return Example(tuple(encoding.ids), tuple(mask))

    def cost(self, turn: Turn) -> int:
        """At most how many tokens the turn adds to a prompt or an example, its frame included."""
        return self._count(turn.text) + self._turn_cost[turn.role]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, special tokens left out."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def stream_decoder(self) -> "StreamDecoder":
        return StreamDecoder(self.decode)

    # Inside

    def _encode(self, text: str) -> list[int]:
        # The template writes the begin token where it wants one; adding it here would put it in twice.
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _count(self, text: str) -> int:
        """Tokens of a text by itself. Known counts are kept under a digest: nobody's words stay in memory."""
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        count = self._counts.get(digest)
        if count is None:
            count = len(self._encode(self._clean(text)))
            if len(self._counts) >= COUNTED_TEXTS:
                self._counts.clear()
            self._counts[digest] = count
        return count

    def _clean(self, text: str) -> str:
        """Stripped, and with the model's own special tokens broken up: nobody ends a turn by writing so."""
        text = text.strip()
        return self._forged.sub(_break_up, text) if self._special else text

    def _messages(self, turns: Sequence[Turn], instructions: str | None = None) -> list[Message]:
        if instructions is not None:
            instructions = self._clean(instructions)
        return self._template.messages(
            [turn.role for turn in turns],
            [self._clean(turn.text) for turn in turns],
            instructions=instructions,
        )

    def _text(self, turns: Sequence[Turn], instructions: str | None) -> str:
        return self._template.render(self._messages(turns, instructions), add_generation_prompt=True)

    def _locate(self, turns: Sequence[Turn]) -> _Rendered:
        """Render, and find where each turn's words went: with every turn's words between two marks, a
        template that only copies them gives the same text plus the marks. Of one that does more, only those
        turns are found whose words stand exactly once in what their message added to the text."""
        messages = self._messages(turns)
        text = self._template.render(messages, add_generation_prompt=False)
        spans: list[tuple[int, int] | None] = [None] * len(turns)
        if not any(mark in text for mark in (_OPEN, _CLOSE, _END)):
            marked = self._template.render(
                [
                    Message(message.role, tuple(map(_mark, message.turns, message.parts)), message.turns)
                    for message in messages
                ],
                add_generation_prompt=False,
            )
            if _MARK.sub("", marked) == text:
                return _Rendered(text, tuple(_read_marks(marked, spans)))
        before = ""
        for count, message in enumerate(messages, start=1):
            upto = self._template.render(messages[:count], add_generation_prompt=False)
            if not upto.startswith(before) or not text.startswith(upto):
                break
            for turn, part in zip(message.turns, message.parts, strict=True):
                if part and upto.count(part, len(before)) == 1:
                    place = upto.index(part, len(before))
                    spans[turn] = (place, place + len(part))
            before = upto
        return _Rendered(text, tuple(spans))

    def _end_of_turn(self, ids: Sequence[int], past: int) -> int:
        """One past the special token that directly follows place `past`, white space between allowed; `past`
        itself if there is none: then nothing but the next turn's frame tells the end."""
        place = past
        while (
            place < len(ids)
            and ids[place] not in self._special
            and not self.decode(ids[place : place + 1]).strip()
        ):
            place += 1
        return place + 1 if place < len(ids) and ids[place] in self._special else past

    def window_starts(self, turns: Sequence[Turn], budget: int) -> list[int]:
        """Where the window of turns[:n] begins if it may take `budget` tokens, for n = 1 .. len(turns); see
        the top of this file. The costs are upper bounds, so what begins there nearly always fits."""
        upto = list(accumulate((self.cost(turn) for turn in turns), initial=0))  # upto[i]: cost of turns[:i]
        least, most = (part * budget for part in KEPT_AT_A_JUMP)
        start = 0
        starts = []
        for end in range(1, len(turns) + 1):
            if upto[end] - upto[start] > budget:
                users = [
                    place
                    for place in range(start + 1, end)
                    if turns[place].role == "user" and upto[end] - upto[place] <= most
                ]
                enough = [place for place in users if upto[end] - upto[place] >= least]
                newest = end - 1 if turns[end - 1].role == "user" else end
                start = (
                    min(enough, key=lambda place: _rank(turns[place]))
                    if enough
                    else min(users, default=newest)
                )
            starts.append(start)
        return starts

    def _fitting_starts(self, turns: Sequence[Turn], budget: int) -> list[int]:
        """Where the window may begin, best first; each one after the first shows less."""
        start = self.window_starts(turns, budget)[-1]
        later = [place for place in range(start + 1, len(turns) - 1) if turns[place].role == "user"]
        last = len(turns) - 1
        return list(dict.fromkeys([min(start, last), *later, last]))

    def _instruction_cost(self, instructions: str | None) -> int:
        return 0 if instructions is None else self._count(instructions) + self._turn_cost["user"]

    def _measure_frame(self) -> None:
        """What the template adds to each turn (`_turn_cost`) and once per prompt (`frame_cost`), in
        tokens."""
        word = "x"

        def tokens(*roles: str, reply: bool = False) -> int:
            messages = self._template.messages(roles, [word] * len(roles))
            return len(self._encode(self._template.render(messages, add_generation_prompt=reply)))

        user, pair = tokens("user"), tokens("user", "assistant")
        triple, both = tokens("user", "assistant", "user"), tokens("user", "assistant", "user", "assistant")
        words = self._count(word)
        spare = 2  # a turn may split differently beside its neighbours than it does alone
        per_user, per_assistant = max(0, triple - pair - words), max(0, both - triple - words)
        self._turn_cost = {"user": per_user + spare, "assistant": per_assistant + spare}
        self.frame_cost = max(0, max(user, tokens("user", reply=True)) - per_user - words)

    def _find_end_tokens(self, folder: Path) -> tuple[int, ...]:
        """The ids that end a reply: the tokenizer's and the generation config's, and what the template puts
        after an assistant's turn."""
        found: set[int | None] = set()
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            token = read_json(folder / file).get("eos_token")
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str):
                found.add(self._tokenizer.token_to_id(text))
        listed = read_json(folder / "generation_config.json").get("eos_token_id")
        found.update(listed if isinstance(listed, list) else [listed])
        messages = self._template.messages(["user", "assistant"], ["w1x", "w2x"])
        text = self._template.render(messages, add_generation_prompt=False)
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        place = text.rfind("w2x")
        past = bisect_left([start for start, _ in encoding.offsets], place + 3)
        end = self._end_of_turn(encoding.ids, past)
        if place >= 0 and end > past:
            found.add(encoding.ids[end - 1])
        return tuple(sorted(token_id for token_id in found if token_id is not None))


class StreamDecoder:
    """Ids as they come → text as far as it is certain: never half a character. All that `push` gives, joined,
    and then `finish`, are `decode` of all the ids."""

    # A trailing replacement character may be the beginning of a character still to come; where bytes are
    # tokens, one missing byte turns the whole run of bytes before it into replacement characters. More than
    # this many in a row are what the model meant.
    _HELD = 64

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        # The ids from the last but one moment at which all was certain: some decoders drop the space at the
        # very start, so new ids are decoded behind some that are known.
        self._ids: list[int] = []
        self._known = 0  # ids that were there at the last such moment
        self._given = 0  # characters of decode(self._ids) that were given out

    def push(self, ids: Sequence[int]) -> str:
        self._ids += ids
        text = self._decode(self._ids)
        certain = len(text) - min(len(text) - len(text.rstrip("\ufffd")), self._HELD)
        new = text[self._given : certain]
        self._given = max(self._given, certain)
        if certain == len(text):
            later = self._decode(self._ids[self._known :])
            if later:
                self._ids, self._given = self._ids[self._known :], len(later)
            self._known = len(self._ids)
        return new

    def finish(self) -> str:
        """What was held back, as it stands."""
        rest = self._decode(self._ids)[self._given :]
        self._ids, self._known, self._given = [], 0, 0
        return rest


def _break_up(token: re.Match[str]) -> str:
    text = token[0]
    return text[0] + _WORD_JOINER + text[1:] if len(text) > 1 else ""


def _mark(turn: int, part: str) -> str:
    # -1 is the instructions, which nobody learns
    return part if turn < 0 else f"{_OPEN}{turn}{_END}{part}{_CLOSE}{turn}{_END}"


def _read_marks(marked: str, spans: list[tuple[int, int] | None]) -> list[tuple[int, int] | None]:
    """Fill `spans` with where the marks of each turn would be in the text without marks."""
    opened: dict[int, int] = {}
    removed = 0
    for mark in _MARK.finditer(marked):
        place, turn = mark.start() - removed, int(mark[2])
        removed += len(mark[0])
        if mark[1] == _OPEN:
            opened[turn] = place
        elif turn in opened:
            spans[turn] = (opened[turn], place)
    return spans


def _rank(turn: Turn) -> bytes:
    return hashlib.sha256(turn.id.encode("utf-8")).digest()
