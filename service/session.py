"""One person's message, from what they said to the last word of the reply. Reads top to bottom.

    answer:  pointer + history → prompt → the person's turn is saved → the reply is promised
    speak:   stream → text → the reply's turn is saved → maybe a refresh

`answer` runs in the request that asked and may refuse; `speak` runs in the reply's own task and outlives
it. The pointer is read once, in `answer`: the reply keeps that version to its end."""

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import structlog
from msgspec import UNSET

from engine.client import EngineClient, EngineError, EngineLost
from engine.request import AdapterRef, FinishedEvent, InvalidRequest, SamplingParams
from personalization.history import InvalidTurn, Turn, served_turns
from personalization.lineage import stand_ins
from personalization.prompt import Prompt, PromptTooLong, Renderer
from personalization.store import HistoryForgotten, Pointer, Store, StoreUnavailable, UnknownTurn
from personalization.trial import TrialPolicy, on_trial, settle
from personalization.when import When, due_now
from service.errors import BadRequest, Conflict, ContextTooLong, ModelNotFound, NotFound, Unavailable
from service.events import FeedbackCreated
from service.generation import FellBack, Generation
from service.input import Said, brought_turns, checked_turn
from service.metrics import Metrics
from service.pen import Pen
from service.protocol import CreateChatCompletion, CreateResponse, FeedbackCreate, ModelName, parse_model
from service.replies import Replies
from service.reply import Plan, Reply, fingerprint
from service.store_health import StoreHealth
from service.writing import Ending, Writing

log = structlog.get_logger(__name__)

NOT_SAVED = "history not saved"
NOT_READ = "history not read"
PEOPLE_REMEMBERED = 1024


@dataclass(frozen=True)
class SessionOptions:
    """What a request may leave out, and how patient a reply is, in seconds."""

    temperature: float = 0.8
    top_p: float = 0.95
    max_output_tokens: int = 256
    when: When = field(default_factory=When)  # a refresh starts by itself
    trial: TrialPolicy = field(default_factory=TrialPolicy)  # a new version is promoted or rolled back
    trial_seed: bytes = b""  # decides which replies a version on trial answers; secret, at most 64 bytes
    engine_patience: float = 120.0


@dataclass(frozen=True)
class Remembered:
    """The newest that was read of a person, for when the store is away."""

    pointer: Pointer
    turns: tuple[Turn, ...]


@dataclass
class Session:
    store: Store
    health: StoreHealth
    engine: EngineClient
    renderer: Renderer
    replies: Replies
    metrics: Metrics
    options: SessionOptions
    refresh: Callable[[str, str], Awaitable[dict[str, Any]]]  # (user, reason)
    clock: Callable[[], float]
    new_id: Callable[[], str]  # hexadecimal, never the same twice
    new_seed: Callable[[], int]
    _remembered: OrderedDict[str, Remembered] = field(default_factory=OrderedDict)
    _replaced: dict[str, int] = field(default_factory=dict)  # versions that could not be loaded, by user
    _forgets: int = 0  # so far, of anyone

    # ------------------------------------------------------------ answer

    async def answer(
        self,
        user: str,
        asked: CreateResponse | CreateChatCompletion,
        said: Said,
        conversation: str | None,
        *,
        key: str | None = None,
        stored_turns: bool = True,
    ) -> Reply:
        """A reply to `said`, running. The person's turn is saved before this returns.

        `conversation` None begins a new one; `stored_turns` False: the client brings its turns along, those
        stored are not read. `key` is the idempotency key: the same one again gives the reply it began.
        Raises ApiError.
        """
        name = self._reply_name(user, key)
        begun = self.replies.here(user, f"resp_{name}", fingerprint(asked))
        if begun is not None:
            return begun
        with self.replies.room(user):
            try:
                plan = await self._plan(user, asked, said, conversation, name, stored_turns=stored_turns)
                return await self.replies.start(plan)
            except HistoryForgotten:
                self.forget(user)  # what was recalled before that
                raise Conflict("your history was forgotten while this was being asked") from None

    async def _plan(
        self,
        user: str,
        asked: CreateResponse | CreateChatCompletion,
        said: Said,
        conversation: str | None,
        name: str,
        *,
        stored_turns: bool,
    ) -> Plan:
        """Everything of a reply but its text. First what can be refused, last the person's turn is saved."""
        model = parse_model(asked.model)
        if model is None:
            raise ModelNotFound(asked.model)
        stop = (*_stops(asked.stop), *self.renderer.stop_strings)
        metadata = _checked_metadata(asked.metadata)
        sampling = self._sampling(asked)

        recalled, read = await self._recall(user)
        version = await self._version(user, model, asked.model, recalled.pointer, name)
        where = conversation or f"conv_{name}"
        now = datetime.fromtimestamp(self.clock(), UTC)
        current = await self._conversation(user, where, recalled, new=not (conversation and stored_turns))
        # Behind what was said before, though a clock was set back since or was ahead elsewhere.
        said_at = max([now, *(turn.at for turn in current)])
        current, turn = _with_message(current, said, where, said_at, turn_id=f"turn_{name}")
        history = [turn for turn in recalled.turns if turn.conversation != where]
        prompt = await self._prompt(history, current, said, sampling.max_tokens)

        save = asked.store is not False
        epoch = recalled.pointer.epoch if read else None
        saved = turn is None or not save or await self._save(user, [turn], epoch, begun=now)
        notices = [text for text, true in ((NOT_READ, not read), (NOT_SAVED, not saved)) if true]
        return Plan(
            id=f"resp_{name}",
            user=user,
            epoch=epoch,
            model=asked.model,
            version=version,
            conversation=where,
            item_id=f"msg_{name}",
            user_turn_id=turn.id if turn is not None and save else None,
            created_at=now.timestamp(),
            prompt=prompt.token_ids,
            history_turns=prompt.history_turns,
            truncated=prompt.truncated,
            seed=sampling.seed,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            max_tokens=sampling.max_tokens,
            stop=stop,
            stop_token_ids=self.renderer.eos_token_ids,
            save=save,
            saved=saved and save,
            unsaved=None if turn is None or saved else turn.text,
            background=bool(getattr(asked, "background", False)),
            instructions=said.instructions,
            previous_response_id=getattr(asked, "previous_response_id", None),
            metadata=metadata,
            fingerprint=fingerprint(asked),
            notice="; ".join(notices) or None,
            said_at=said_at.timestamp(),
        )

    async def pointer(self, user: str) -> Pointer:
        """Where the person's adapter stands, as far as can be told."""
        with suppress(StoreUnavailable):
            return await self.health.ask(lambda: self.store.pointer(user))
        return self._remembered[user].pointer if user in self._remembered else Pointer(0, None, 0)

    async def prefetch(self, user: str) -> None:
        """Have the engine fetch the person's adapter; a hint, so nothing here may fail what follows."""
        pointer = await self.pointer(user)
        tried = 0 if pointer.trial is None else pointer.trial.version
        for version in filter(None, (pointer.version, tried)):
            if self.engine.connected:
                with suppress(EngineLost):
                    await self.engine.prefetch(AdapterRef(self.store.adapter_id(user), version))

    # ------------------------------------------------------------ speak

    async def speak(self, reply: Reply, replies: Replies) -> None:
        """Write the reply to its end; or the rest of it, when its log already has a beginning."""
        plan = reply.plan
        writing = Writing(reply, self.renderer.stream_decoder())
        generation = Generation(
            self.engine,
            self.store.adapter_id(plan.user),
            reply,
            writing,
            versions=lambda bad: self._versions_below(plan.user, bad),
            clock=self.clock,
            patience_s=self.options.engine_patience,
            metrics=self.metrics,
            new_id=self.new_id,
        )
        if not reply.entries:
            await replies.write(reply, writing.opening())
        try:
            finished = await self._listen(generation, writing, reply, replies)
            ending = Ending.of(finished, stopped=writing.stopped, cancel_reason=reply.cancel_reason)
        except (EngineError, ValueError) as error:
            log.exception("a reply could not be written", response_id=reply.id)
            finished = generation.stopped_here()
            ending = Ending.failed(getattr(error, "code", "server_error"), "the engine refused this reply")
        if plan.save:
            writing.history_saved = await self._save_said(writing, ending)
            writing.note(NOT_SAVED, holds=not writing.history_saved)
        numbers = generation.numbers(finished)
        await replies.write(reply, writing.closing(ending, finished.usage, numbers, self.clock()))
        self._count(ending, finished, generation.first_token_s)
        if writing.history_saved:
            if self._may_be_tried(plan.user, writing.version):
                await self.settle_trial(plan.user)
            await self._maybe_refresh(plan.user, plan.version if writing.version != plan.version else 0)

    async def _listen(
        self, generation: Generation, writing: Writing, reply: Reply, replies: Replies
    ) -> FinishedEvent:
        """Tokens into the log, until the engine has said why it stopped or a stop string was written."""
        finished = generation.stopped_here()  # of a reply taken over after its stop string
        async with Pen(replies, reply, writing) as pen, aclosing(generation.events()) as events:
            if not writing.stopped:
                async for event in events:
                    if isinstance(event, FinishedEvent):
                        finished = event
                        writing.finish()
                    elif isinstance(event, FellBack):
                        await pen.lift()
                        await replies.write(reply, writing.served_by(event.version, event.notice))
                    else:
                        writing.hear(event.token_ids)
                        pen.touch()
                        if writing.stopped:
                            await generation.cut()
            await pen.lift()
        return finished

    async def _save_said(self, writing: Writing, ending: Ending) -> bool:
        """Save the reply, and before it what it answers if the store was away for that. Whether the history
        has all that was said."""
        plan, whole = writing.plan, True
        turns = [] if plan.unsaved is None else [_unsaved_turn(plan, plan.unsaved)]
        if ending.status != "failed" and writing.text.strip():
            try:
                turns.append(self._reply_turn(writing))
            except InvalidTurn as error:  # longer than a turn may be
                log.warning("a reply cannot be saved", response_id=plan.id, reason=str(error))
                whole = False
        saved = not turns or await self._save(plan.user, turns, plan.epoch, begun=plan.begun)
        return saved and whole

    def _may_be_tried(self, user: str, version: int) -> bool:
        """Whether the version that wrote a reply is on trial, as far as this process knows."""
        known = self._remembered.get(user)
        return known is None or (known.pointer.trial is not None and known.pointer.trial.version == version)

    async def feedback(self, user: str, given: FeedbackCreate) -> FeedbackCreated:
        """Save a rating, a correction or both; whoever hands them on settles the trial then. Raises
        BadRequest, NotFound."""
        if given.rating is UNSET and given.correction is None:
            raise BadRequest("rating: expected a rating, a correction or both", param="rating")
        saved = FeedbackCreated(item_id=given.item_id, event_id=given.event_id)
        try:
            if given.correction is not None:  # first, as it may be refused: then nothing is saved
                saved.correction_id = (await self.store.correct(user, given.item_id, given.correction)).id
            if given.rating is not UNSET:
                await self.store.rate(user, given.item_id, given.rating)
                saved.rating = given.rating
        except UnknownTurn:
            raise NotFound(f"no turn {given.item_id!r:.80}", code="turn_not_found", param="item_id") from None
        except InvalidTurn as error:
            raise BadRequest(str(error), param=error.field) from None
        return saved

    async def settle_trial(self, user: str) -> None:
        """After a reply or a rating: end the person's trial if enough was said. It never costs either."""
        try:
            now = datetime.fromtimestamp(self.clock(), UTC)
            end = await self.health.ask(lambda: settle(self.store, user, self.options.trial, now))
            if end is not None:
                log.info("trial.ended", version=end.version, outcome=end.outcome, **end.numbers)
        except StoreUnavailable:
            pass
        except Exception:
            log.exception("a trial could not be settled")

    async def _maybe_refresh(self, user: str, lost: int) -> None:
        """Ask for a refresh once it pays. It never costs the reply. `lost`: the version that could not be
        loaded for it, for which it is asked once."""
        if not self.options.when.after_turns:
            return
        lost = 0 if self._replaced.get(user) == lost else lost
        try:
            standing = await self.health.ask(lambda: self.store.standing(user))
            if due_now(standing, self.options.when, lost=lost).due:
                asked = await self.refresh(user, "turns")
                if lost and asked["state"] != "failed":  # else one that failed lately is not begun again yet
                    self._replaced[user] = lost
        except StoreUnavailable:
            pass
        except Exception:
            log.exception("a refresh could not be asked for")

    # ------------------------------------------------------------ what both need

    async def _recall(self, user: str) -> tuple[Remembered, bool]:
        """The person's pointer and newest turns; while the store is away what was last read, and False."""
        forgets = self._forgets
        with suppress(StoreUnavailable):
            pointer = await self.health.ask(lambda: self.store.pointer(user))
            turns = await self.health.ask(lambda: self.store.recent(user, self._turns_that_may_fit))
            read = Remembered(pointer, tuple(turns))
            if forgets == self._forgets:  # else it may be what was forgotten that was read
                self._remember(user, read)
            return read, True
        return self._remembered.get(user, Remembered(Pointer(0, None, 0), ())), False

    def _remember(self, user: str, what: Remembered) -> None:
        self._remembered[user] = what
        self._remembered.move_to_end(user)
        while len(self._remembered) > PEOPLE_REMEMBERED:
            self._remembered.popitem(last=False)

    def forget(self, user: str) -> None:
        self.replies.forget(user)
        self._remembered.pop(user, None)
        self._replaced.pop(user, None)
        self._forgets += 1

    async def forget_the_forgotten(self) -> None:
        """Nobody may have said here that someone was forgotten: ask of everyone known. Raises
        StoreUnavailable."""
        for user, known in list(self._remembered.items()):
            if (await self.store.pointer(user)).epoch != known.pointer.epoch:
                self.forget(user)

    async def _version(
        self, user: str, model: ModelName, asked: str, pointer: Pointer, reply_name: str
    ) -> int:
        """The adapter version a model name means for this person's reply. Raises ModelNotFound,
        Unavailable."""
        if model.base or model.version == 0:
            return 0
        if model.version is None and pointer.trial is not None:
            tried = on_trial(pointer, reply_name, self.options.trial_seed)
            return pointer.trial.version if tried else pointer.version
        if model.version is None or model.version == pointer.version:
            return pointer.version
        try:
            records = await self.health.ask(lambda: self.store.versions(user))
        except StoreUnavailable:
            raise Unavailable("versions cannot be read", code="store_unavailable", retry_after=2) from None
        if not any(record.version == model.version and record.accepted for record in records):
            raise ModelNotFound(asked)
        return model.version

    async def _versions_below(self, user: str, bad: int) -> list[int]:
        """The one that serves and those that may stand in for it, if they are older than a bad one, newest
        first; none while the store is away. Others were taken back, not tried to the end, or saw what may not
        be learned any more."""
        try:
            serving = (await self.health.ask(lambda: self.store.pointer(user))).version
            records = await self.health.ask(lambda: self.store.versions(user))
            learnable = await self.health.ask(lambda: self.store.learned_ids(user))
        except StoreUnavailable:
            return []
        found = (serving, *stand_ins(records, learnable, serving))
        return [version for version in found if 0 < version < bad]

    async def _conversation(
        self, user: str, conversation: str, recalled: Remembered, *, new: bool
    ) -> list[Turn]:
        """The turns of one conversation, as far back as it goes."""
        if new:
            return []
        with suppress(StoreUnavailable):
            return await self.health.ask(lambda: self.store.conversation(user, conversation))
        return [turn for turn in recalled.turns if turn.conversation == conversation]

    @property
    def _turns_that_may_fit(self) -> int:
        """How many turns are read for one prompt: a turn with its frame is seldom below eight tokens."""
        return min(2_000, max(64, self.renderer.context_length // 8))

    async def _prompt(
        self, history: Sequence[Turn], current: Sequence[Turn], said: Said, max_new_tokens: int
    ) -> Prompt:
        try:
            return await asyncio.to_thread(
                self.renderer.prompt,
                served_turns(history),
                served_turns(current),
                max_new_tokens=max_new_tokens,
                instructions=said.instructions,
            )
        except PromptTooLong as error:
            raise ContextTooLong(str(error), param="input") from None

    def _sampling(self, asked: CreateResponse | CreateChatCompletion) -> SamplingParams:
        """What was asked, with defaults; at most half the context is for the reply. Raises BadRequest."""
        if isinstance(asked, CreateResponse):
            wanted, field_name = asked.max_output_tokens, "max_output_tokens"
        else:
            wanted, field_name = asked.max_completion_tokens, "max_completion_tokens"
            if wanted is None:
                wanted, field_name = asked.max_tokens, "max_tokens"
        most = self.renderer.context_length // 2
        options = self.options
        try:
            sampling = SamplingParams(
                temperature=options.temperature if asked.temperature is None else asked.temperature,
                top_p=options.top_p if asked.top_p is None else asked.top_p,
                top_k=asked.top_k or 0,
                min_p=asked.min_p or 0.0,
                seed=self.new_seed() if asked.seed is None else asked.seed,
                max_tokens=options.max_output_tokens if wanted is None else wanted,
            )
        except InvalidRequest as error:
            param = field_name if error.field == "max_tokens" else error.field
            message = f"{param}: expected {error.expected}, got {error.got!r}"
            raise BadRequest(message, param=param) from None
        return replace(sampling, max_tokens=min(sampling.max_tokens, most))

    async def _save(self, user: str, turns: Sequence[Turn], epoch: int | None, *, begun: datetime) -> bool:
        """Append turns; False when the store could not be reached for that. A short absence is waited out,
        and sending a turn again is harmless."""
        saved = False
        for _ in range(2):
            with suppress(StoreUnavailable):
                await self.health.ask(lambda: self.store.append(user, turns, epoch=epoch, begun=begun))
                saved = True
                break
        known = self._remembered.get(user)
        if known is not None:
            there = {turn.id for turn in known.turns}
            new = [turn for turn in turns if turn.id not in there]
            self._remember(user, replace(known, turns=(*known.turns, *new)))
        if not saved:
            self.metrics.unsaved.inc(len(turns))
        return saved

    def _reply_turn(self, writing: Writing) -> Turn:
        plan = writing.plan
        return Turn(
            id=plan.item_id,
            conversation=plan.conversation,
            at=max(plan.said, datetime.fromtimestamp(self.clock(), UTC)),
            role="assistant",
            text=writing.text,
            author="model",
            version=writing.version,
        )

    def _reply_name(self, user: str, key: str | None) -> str:
        """What the ids of a reply and its turns end in: random, or the same for the same idempotency key."""
        if key is None:
            return self.new_id()
        return hashlib.sha256(f"{self.store.adapter_id(user)}\0{key}".encode()).hexdigest()[:32]

    def _count(self, ending: Ending, finished: FinishedEvent, first_token_s: float | None) -> None:
        metrics, usage, timings = self.metrics, finished.usage, finished.timings
        metrics.replies.labels(outcome=ending.reason or ending.status).inc()
        metrics.output_tokens.inc(usage.completion_tokens)
        metrics.prompt_tokens.labels(cached="yes").inc(usage.cached_tokens)
        metrics.prompt_tokens.labels(cached="no").inc(usage.prompt_tokens - usage.cached_tokens)
        metrics.queued.observe(timings.queued_s)
        metrics.adapter_load.labels(tier=timings.adapter_tier).observe(timings.adapter_load_s)
        if first_token_s is not None:
            metrics.first_token.observe(first_token_s)


def _unsaved_turn(plan: Plan, text: str) -> Turn:
    """What the person said, as it would have been saved at once."""
    assert plan.user_turn_id is not None
    return Turn(
        id=plan.user_turn_id,
        conversation=plan.conversation,
        at=plan.said,
        role="user",
        text=text,
        author="person",
    )


def _with_message(
    stored: Sequence[Turn], said: Said, conversation: str, now: datetime, *, turn_id: str
) -> tuple[list[Turn], Turn | None]:
    """The conversation to reply to, and the person's new turn in it. Without a new message it ends at their
    last one, whatever was replied to that before. Raises BadRequest."""
    # A request that is sent again after a crash finds its own turn saved already.
    turns = [turn for turn in stored if turn.id != turn_id] + brought_turns(said, conversation, now)
    if said.text is not None:
        turn = checked_turn(
            id=turn_id, conversation=conversation, at=now, role="user", text=said.text, author="person"
        )
        return [*turns, turn], turn
    while turns and turns[-1].role != "user":
        turns.pop()
    if not turns:
        raise BadRequest("input: expected a message, or a conversation to reply to again", param="input")
    return turns, None


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > 16 or any(not 1 <= len(each) <= 256 for each in stops):
        raise BadRequest("stop: expected at most 16 strings of 1 to 256 characters", param="stop")
    return stops


def _checked_metadata(metadata: dict[str, str] | None) -> dict[str, str]:
    metadata = metadata or {}
    if len(metadata) > 16 or any(len(k) > 64 or len(v) > 512 for k, v in metadata.items()):
        raise BadRequest(
            "metadata: expected at most 16 pairs, names up to 64 and values up to 512 characters",
            param="metadata",
        )
    return metadata
