"""Who runs in the next step, and with how many tokens. Decides; touches no tensor.

Every step: replies that decode get one token each; the rest of the token budget goes to prompts, in
chunks; what is left of it admits waiting requests. A request is admitted when the pages for all its
tokens and for its adapter are there. When a decoding reply needs a page and there is none, the newest
running request gives up its pages and returns to the queue (its prompt and output so far are computed
again later), so the oldest always moves on.

A step may be scheduled while the one before it still runs: the token that one draws counts as there, though
nobody knows it yet. A reply whose last allowed token is being drawn is complete; a request that gave up its
pages returns only once all its tokens are known. An admitted request whose adapter is still being copied to
the device lets others run meanwhile, unless there are none.

The queue is fair between users (Sheng et al., "Fairness in Serving Large Language Models", 2023): each
user has a counter of tokens served, and the user with the lowest goes first. A user who was away starts
at the lowest counter of those present, so that absence saves nothing up. Waiting counts against the
counter, so that nobody waits for ever.
"""

from bisect import insort
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from heapq import heappop, heappush, heapreplace
from math import inf

from engine.adapters import AdapterCache, AdapterUnavailable
from engine.config import EngineConfig
from engine.pages import PagePool
from engine.prefix import PrefixCache
from engine.request import AdapterRef, Chunk, Sequence

OUTPUT_TOKEN_COST = 2  # an input token costs 1; a decode step moves all weights for one token
MOST_ABSENT = 1024  # counters of absent users kept before those without debt are dropped
BUSY_STEPS = 4  # over so many prompts may be spread, so that no place stays empty for long
LOOKAHEAD = 256  # requests looked at, for their adapters, behind those admitted


class ArenaExceeded(ValueError):
    """A request that could not run even alone: it `needs` more slabs than the `total` there are."""

    code = "arena_exceeded"

    def __init__(self, needs: int, total: int) -> None:
        super().__init__(f"the request needs {needs} slabs of device memory, the arena has {total}")
        self.needs = needs
        self.total = total


Refusal = AdapterUnavailable | ArenaExceeded


@dataclass(frozen=True, slots=True)
class Plan:
    chunks: tuple[Chunk, ...]
    refused: tuple[tuple[Sequence, Refusal], ...]  # out of the queue and of the scheduler


@dataclass(slots=True)
class QueueStats:
    admitted: int = 0
    preemptions: int = 0
    lookup_tokens: int = 0  # of admitted requests
    hit_tokens: int = 0  # of those, found in the prefix cache


class Scheduler:
    def __init__(
        self,
        config: EngineConfig,
        pool: PagePool,
        blocks: PrefixCache,
        adapters: AdapterCache,
        clock: Callable[[], float],
        *,
        slab_bytes: int = 1,
    ) -> None:
        self.running: list[Sequence] = []  # oldest first
        self.stats = QueueStats()
        self._config = config
        self._pool = pool
        self._blocks = blocks
        self._adapters = adapters
        self._clock = clock
        self._waiting: dict[str, list[Sequence]] = {}  # by user, each list in the order to be admitted
        self._num_waiting = self._waiting_tokens = 0
        # (rank, number, user) of the first of every queue; some of what is no longer first, or has a higher
        # rank by now
        self._heads: list[tuple[float, int, str]] = []
        self._queue_changes = 0
        # What the last pass through the queue found, and up to how many available slabs it would end the same
        self._looked_at: tuple[tuple[int, ...], float] = ((), 0)
        # Whose pages were not there in that pass: its rank then, and how many of its blocks were cached
        self._held_up: tuple[Sequence, float, int] | None = None
        self._served: dict[str, float] = {}  # by user: tokens, weighted
        self._present: dict[str, int] = {}  # by user: requests waiting or running
        self._next_number = 0
        self._max_running = min(config.max_running, config.max_tokens_per_step)  # each may decode
        limit = config.max_adapter_bytes_per_step
        self._max_adapter_slabs = None if limit is None else max(1, limit // slab_bytes)

    @property
    def num_waiting(self) -> int:
        return self._num_waiting

    @property
    def waiting(self) -> Iterator[Sequence]:
        for queue in self._waiting.values():
            yield from queue

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._blocks.block_size)

    def slabs_for(self, sequence: Sequence) -> int:
        """Slabs of its K/V when it is complete; the last token is output only and never computed."""
        return self.blocks_for(sequence.num_prompt + sequence.request.sampling.max_tokens - 1)

    # Coming and going

    def add(self, sequence: Sequence) -> None:
        request = sequence.request
        sequence.number = self._next_number
        self._next_number += 1
        sequence.arrived_at = self._clock()
        if request.adapter is not None:
            sequence.adapter_tier = self._adapters.tier(request.adapter)
            self._adapters.stats.found[sequence.adapter_tier] += 1
        self._welcome(request.user_key)
        self._enqueue(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Finished, failed or cancelled: gives back what it holds."""
        if sequence.blocks:
            self._let_go(sequence)
        else:
            self._dequeue(sequence)
        user = sequence.request.user_key
        self._present[user] -= 1
        if self._present[user] == 0:
            del self._present[user]

    def advance(self, chunk: Chunk) -> None:
        """The chunk's step has been launched: later ones find its K/V."""
        chunk.sequence.num_computed += chunk.length
        self.register(chunk.sequence)

    def register(self, sequence: Sequence) -> None:
        """Let others find its whole blocks, as far as their tokens are known."""
        known, end = sequence.num_known, sequence.num_computed
        whole = (known if known < end else end) // self._blocks.block_size
        if whole <= sequence.num_registered or not self._blocks.enabled:
            return
        self._extend_keys(sequence, whole * self._blocks.block_size)
        for index in range(sequence.num_registered, whole):
            self._blocks.register(sequence.block_keys[index], sequence.blocks[index], sequence.labels)
        sequence.num_registered = whole

    def disown(self, sequence: Sequence) -> None:
        """Its K/V, which it may have given up by now, is not to be found by anyone: what came of it was not
        finite.
        """
        self._blocks.disown(sequence.blocks or self._blocks.match(sequence.block_keys))

    def charge(self, sequence: Sequence, tokens: float) -> None:
        self._served[sequence.request.user_key] += tokens

    # A step

    def schedule(self) -> Plan:
        chunks: list[Chunk] = []
        moving = [
            (sequence, len(sequence.tokens) - sequence.num_computed)
            for sequence in self.running
            if len(sequence.tokens) < sequence.most_tokens and not self._is_arriving(sequence)
        ]
        budget = self._prompt_tokens([pending for _, pending in moving])
        block_size = self._blocks.block_size
        for sequence, pending in moving:
            if not sequence.blocks:
                continue  # gave way to an older one in this loop
            length = 1 if pending == 1 else min(pending, budget)
            if length == 0:
                continue
            start = sequence.num_computed
            while start + length > len(sequence.blocks) * block_size and not self._grow(sequence, length):
                if self._preempt_newest() is sequence:
                    break
            else:
                budget -= length if pending > 1 else 0
                chunks.append(Chunk(sequence, start, length, length == pending))
        refused = self._admit(chunks, budget)
        if not chunks:  # nobody is held up by waiting for a copy
            late = next((s for s in self.running if s.is_arriving), None)
            if late is not None:
                late.is_arriving = False
                chunks.append(self._chunk(late, min(late.num_pending, self._config.max_tokens_per_step)))
        return Plan(tuple(chunks), tuple(refused))

    def _prompt_tokens(self, pending: list[int]) -> int:
        """Tokens of prompts for this step, beside those who run and have so many tokens pending each."""
        config, decoding = self._config, pending.count(1)
        most = config.max_tokens_per_step - decoding
        few = min(most, max(config.max_tokens_per_busy_step - decoding, decoding))
        free = min(self._max_running - len(self.running), self._num_waiting)
        wanted = sum(pending) - decoding + free * self._waiting_tokens // max(1, self._num_waiting)
        return few if decoding >= self._max_running / 2 and wanted <= BUSY_STEPS * few else most

    def _admit(self, chunks: list[Chunk], budget: int) -> list[tuple[Sequence, Refusal]]:
        """Admit waiting requests in fair order while the budget and the pages last; append their chunks.

        A request whose adapter is not ready is passed over. One whose pages are not there is not: it
        would wait for ever behind smaller ones.
        """
        refused: list[tuple[Sequence, Refusal]] = []
        required: dict[AdapterRef, None] = {}
        is_open = budget > 0 and len(self.running) < self._max_running
        looked_at, same_up_to = self._looked_at
        if looked_at == self._changes and (
            not is_open or (self._pool.available <= same_up_to and self._is_held_up_as_before)
        ):
            return refused
        # Who is not admitted once all that could be were waits for an adapter, not for slabs. But who was
        # looked at while nobody could be admitted is to be looked at again.
        same_up_to, looked_ahead = inf if is_open else -1, 0
        self._held_up = None
        with closing(self._fair_order()) as order:
            for sequence in order:
                if is_open and (budget <= 0 or len(self.running) >= self._max_running):
                    is_open, same_up_to = False, -1
                if not is_open:  # only to have the adapters of the next ones read
                    looked_ahead += 1
                    if looked_ahead > LOOKAHEAD:
                        break
                if sequence.num_known < len(sequence.tokens):
                    is_open, same_up_to = False, -1  # gave way in this step; nobody takes what it will need
                    continue
                adapter = sequence.request.adapter
                if adapter is not None and not self._adapters.ready(adapter):
                    failure = self._adapters.failure(adapter, sequence.arrived_at)
                    if failure is not None:
                        refused.append((sequence, failure))
                    else:
                        required[adapter] = None
                    continue
                if sequence.adapter_ready_at is None:
                    sequence.adapter_ready_at = self._clock()
                if is_open:
                    try:
                        is_open = self._try_admit(sequence)
                    except (AdapterUnavailable, ArenaExceeded) as error:
                        refused.append((sequence, error))
                        continue
                    if is_open and sequence.is_arriving:
                        continue
                    if is_open:
                        length = min(sequence.num_pending, budget)
                        budget -= length
                        chunks.append(self._chunk(sequence, length))
                        continue
                    same_up_to = self._pool.available
                    self._held_up = (sequence, self._rank(sequence), len(self._cached_blocks(sequence)))
                if adapter is not None:
                    required[adapter] = None
        self._adapters.require(required)
        for sequence, _ in refused:
            self.remove(sequence)
        self._looked_at = (self._changes, same_up_to)
        return refused

    @property
    def _changes(self) -> tuple[int, ...]:
        """While this stays the same, so does what a pass through the queue finds, but for room."""
        return (self._queue_changes, *self._adapters.changes)

    @property
    def _is_held_up_as_before(self) -> bool:
        """Others may have come before it as its user was served, and what it waits for may be less by now."""
        if self._held_up is None:
            return True
        sequence, rank, cached = self._held_up
        return rank == self._rank(sequence) and cached == len(self._cached_blocks(sequence))

    def _fair_order(self) -> Generator[Sequence, None, None]:
        """Waiting requests, the most deserving user's first. Charges made while iterating change what
        follows.
        """
        passed: dict[int, str] = {}  # by number: heads that stay in the queue, or may
        later: list[tuple[float, int, str, int]] = []  # the next of users whose head was passed over
        try:
            while (head := self._next_head(passed)) or later:
                if head and (not later or head < later[0]):
                    heappop(self._heads)
                    _, number, user = head
                    passed[number] = user
                    position = 0
                else:
                    _, _, user, position = heappop(later)
                sequence = self._waiting[user][position]
                yield sequence
                queue = self._waiting.get(user, [])
                if position < len(queue) and queue[position] is sequence:
                    position += 1
                elif position == 0:
                    continue  # the new head is among the heads
                if position < len(queue):
                    following = queue[position]
                    heappush(later, (self._rank(following), following.number, user, position))
        finally:
            for number, user in passed.items():
                queue = self._waiting.get(user, [])
                if queue and queue[0].number == number:
                    heappush(self._heads, (self._rank(queue[0]), number, user))

    def _rank(self, sequence: Sequence) -> float:
        """Lowest first. A second more of waiting is worth the same for all, so their order needs no clock."""
        served = self._served[sequence.request.user_key]
        return served + self._config.ageing_tokens_per_s * sequence.arrived_at

    def _next_head(self, passed: dict[int, str]) -> tuple[float, int, str] | None:
        """The lowest of the heads, once those that are none any more are gone and ranks are true."""
        while self._heads:
            rank, number, user = self._heads[0]
            queue = self._waiting.get(user)
            if not queue or queue[0].number != number or number in passed:
                heappop(self._heads)
            elif (now := self._rank(queue[0])) > rank:
                heapreplace(self._heads, (now, number, user))
            else:
                return self._heads[0]
        return None

    def _try_admit(self, sequence: Sequence) -> bool:
        """Take the pages of a waiting request whose adapter is ready, all or none; False if they are not
        there.
        """
        adapter = sequence.request.adapter
        if adapter is not None:
            slabs = self._adapters.slabs_of(adapter)
            if self.slabs_for(sequence) + slabs > self._pool.total:
                raise ArenaExceeded(self.slabs_for(sequence) + slabs, self._pool.total)
            if not self._within_adapter_bytes(adapter, slabs):
                return False
        found: list[int] = []
        if self._blocks.enabled:
            self._extend_keys(sequence, sequence.num_tokens)
            found = self._cached_blocks(sequence)
        self._blocks.acquire(found)
        new_blocks = self.blocks_for(sequence.num_tokens) - len(found)
        # Each running reply may want a block soon; without this reserve, admitting would only bring on
        # preemption.
        reserve = len(self.running)
        try:
            taken = self._take(adapter, new_blocks, reserve, sequence)
        except AdapterUnavailable:
            self._blocks.release(found)
            raise
        if taken is None:
            self._blocks.release(found)
            return False
        sequence.blocks = (*found, *taken)
        sequence.num_computed = len(found) * self._blocks.block_size
        sequence.num_registered = len(found)
        sequence.is_arriving = adapter is not None and self._adapters.is_copying(adapter)
        self._dequeue(sequence)
        insort(self.running, sequence, key=lambda running: running.number)
        if sequence.admitted_at is None:
            sequence.admitted_at = self._clock()
            sequence.cached_tokens = sequence.num_computed
            self.charge(sequence, sequence.num_tokens - sequence.num_computed)
            self.stats.admitted += 1
            self.stats.lookup_tokens += sequence.num_tokens
            self.stats.hit_tokens += sequence.num_computed
        return True

    def _cached_blocks(self, sequence: Sequence) -> list[int]:
        """Those it begins behind. One token at least must run, or there would be nothing to sample from."""
        whole = (sequence.num_tokens - 1) // self._blocks.block_size
        return self._blocks.match(sequence.block_keys[:whole])

    def _take(
        self, adapter: AdapterRef | None, new_blocks: int, reserve: int, sequence: Sequence
    ) -> list[int] | None:
        """Pin the adapter and allocate the blocks, or neither."""
        on_device = adapter is not None and self._adapters.slabs_to_place(adapter) == 0
        if adapter is not None and on_device:
            sequence.resident = self._adapters.pin(adapter)  # first, or it would count as available
        to_place = 0 if adapter is None else self._adapters.slabs_to_place(adapter)
        if self._pool.available < new_blocks + to_place + reserve:
            if adapter is not None and on_device:
                self._adapters.unpin(adapter)
                sequence.resident = None
            return None
        if adapter is not None and not on_device:
            sequence.resident = self._adapters.pin(adapter)
        taken = self._blocks.allocate(new_blocks)
        assert taken is not None, "counted as available above"
        return taken

    def _within_adapter_bytes(self, adapter: AdapterRef, slabs: int) -> bool:
        if self._max_adapter_slabs is None:
            return True
        in_use = {s.request.adapter for s in self.running if s.request.adapter is not None}
        if not in_use or adapter in in_use:
            return True
        return slabs + sum(self._adapters.slabs_of(ref) for ref in in_use) <= self._max_adapter_slabs

    def _is_arriving(self, sequence: Sequence) -> bool:
        if sequence.is_arriving:
            adapter = sequence.request.adapter
            sequence.is_arriving = adapter is not None and self._adapters.is_copying(adapter)
        return sequence.is_arriving

    def _grow(self, sequence: Sequence, length: int) -> bool:
        """Blocks for `length` more positions than are computed; False if there are none."""
        taken = self._blocks.allocate(self.blocks_for(sequence.num_computed + length) - len(sequence.blocks))
        if taken is None:
            return False
        sequence.blocks += tuple(taken)
        return True

    def _preempt_newest(self) -> Sequence:
        sequence = self.running[-1]
        self._let_go(sequence)
        sequence.num_computed = 0
        sequence.preemptions += 1
        self.stats.preemptions += 1
        self._enqueue(sequence)
        return sequence

    def _let_go(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._queue_changes += 1
        self._blocks.release(sequence.blocks)
        sequence.blocks = ()
        sequence.is_arriving = False
        if sequence.request.adapter is not None:
            self._adapters.unpin(sequence.request.adapter)
            sequence.resident = None

    def _welcome(self, user: str) -> None:
        """Count one more request of this user; lift the counter of one who was away to the lowest present."""
        if user not in self._present:
            if not self._present:
                self._heads.clear()
                self._served.clear()  # nobody to be fair to: all debts are void
            floor = min((self._served[other] for other in self._present), default=0.0)
            if len(self._served) > 2 * len(self._present) + MOST_ABSENT:
                # Who owes nothing above the floor would be lifted to it anyway.
                self._served = {u: s for u, s in self._served.items() if s > floor or u in self._present}
            self._served[user] = max(self._served.get(user, 0.0), floor)
            self._present[user] = 0
        self._present[user] += 1

    def _enqueue(self, sequence: Sequence) -> None:
        queue = self._waiting.setdefault(sequence.request.user_key, [])
        # What was preempted has begun to answer; it goes before its user's other requests.
        insort(queue, sequence, key=lambda s: (s.preemptions == 0, -s.request.priority, s.number))
        self._num_waiting += 1
        self._waiting_tokens += sequence.num_prompt
        self._queue_changes += 1
        if queue[0] is sequence:
            heappush(self._heads, (self._rank(sequence), sequence.number, sequence.request.user_key))

    def _dequeue(self, sequence: Sequence) -> None:
        user = sequence.request.user_key
        queue = self._waiting[user]
        was_first = queue[0] is sequence
        queue.remove(sequence)
        self._num_waiting -= 1
        self._waiting_tokens -= sequence.num_prompt
        self._queue_changes += 1
        if not queue:
            del self._waiting[user]
        elif was_first:
            heappush(self._heads, (self._rank(queue[0]), queue[0].number, user))

    def _extend_keys(self, sequence: Sequence, upto: int) -> None:
        if len(sequence.block_keys) < upto // self._blocks.block_size:
            root = self._blocks.root(sequence.request.adapter)
            self._blocks.extend_keys(sequence.block_keys, root, sequence.tokens, upto)

    @staticmethod
    def _chunk(sequence: Sequence, length: int) -> Chunk:
        start = sequence.num_computed
        return Chunk(sequence, start, length, wants_token=start + length == sequence.num_tokens)


def held(sequences: Iterable[Sequence]) -> tuple[list[tuple[int, ...]], list[AdapterRef]]:
    """The block lists and adapters that these sequences hold, for check_integrity."""
    listed = list(sequences)
    return (
        [sequence.blocks for sequence in listed],
        [s.request.adapter for s in listed if s.resident is not None and s.request.adapter is not None],
    )
