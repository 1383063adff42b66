"""Decisions of the scheduler, step by step, with no tensor and no time but the test's own."""

from collections.abc import Callable
from concurrent.futures import Executor, Future
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.adapters import AdapterCache, AdapterUnavailable
from engine.config import EngineConfig
from engine.pages import PagePool
from engine.prefix import PrefixCache
from engine.request import AdapterRef, Request, SamplingParams, Sequence
from engine.scheduler import OUTPUT_TOKEN_COST, ArenaExceeded, Plan, Scheduler, held

BLOCK = 4


class GatedExecutor(Executor):
    """Runs a load at once, unless the gate is shut; then when `open` is called."""

    def __init__(self) -> None:
        self.shut = False
        self.waiting: list[Callable[[], None]] = []

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(fn(*args, **kwargs))
            except Exception as error:
                future.set_exception(error)

        if self.shut:
            self.waiting.append(run)
        else:
            run()
        return future

    def open(self) -> None:
        self.shut = False
        while self.waiting:
            self.waiting.pop(0)()


class World:
    """A scheduler whose model appends 100 + output index: enough to see that recomputing loses nothing."""

    def __init__(
        self, slabs: int = 64, *, adapter_slabs: int = 2, slab_bytes: int = 1, **config: Any
    ) -> None:
        config = {"max_tokens_per_step": 16, "max_running": 8, "ageing_tokens_per_s": 0.0, **config}
        self.config = EngineConfig(**config)
        self.now = 0.0
        self.adapter_slabs: dict[str, int] = {}
        self.default_slabs = adapter_slabs
        self.pool = PagePool(slabs)
        self.blocks = PrefixCache(self.pool, BLOCK, "base", enabled=self.config.prefix_cache)
        self.readers = GatedExecutor()
        self.adapters = AdapterCache(
            self.pool,
            self.load,
            self.place,
            self.readers,
            lambda: self.now,
            host_bytes=1000,
            max_loading=4,
            retry_s=1.0,
        )
        self.scheduler = Scheduler(
            self.config, self.pool, self.blocks, self.adapters, lambda: self.now, slab_bytes=slab_bytes
        )
        self.live: list[Sequence] = []
        self.done: list[str] = []
        self.refused: dict[str, Exception] = {}
        self.copying: set[str] = set()  # adapters whose copies to the device do not end
        self.peak_distinct_adapters = 0

    def place(self, ref: AdapterRef, packed: Any, slabs: tuple[int, ...]) -> tuple[Any, Any]:
        return SimpleNamespace(slabs=slabs), SimpleNamespace(done=lambda: ref.id not in self.copying)

    def load(self, ref: AdapterRef) -> Any:
        if ref.id.startswith("bad"):
            raise OSError("no such version")
        slabs = self.adapter_slabs.get(ref.id, self.default_slabs)
        return SimpleNamespace(
            layout=SimpleNamespace(slabs_needed=slabs), image=SimpleNamespace(nbytes=slabs)
        )

    def add(
        self,
        id: str,
        prompt: int,
        max_tokens: int = 4,
        *,
        user: str = "",
        adapter: str = "",
        first: int = 1,
        **more: Any,
    ) -> Sequence:
        request = Request(
            id=id,
            prompt=tuple(range(first, first + prompt)),
            sampling=SamplingParams(max_tokens=max_tokens),
            user_key=user or id,
            adapter=AdapterRef(adapter, 1) if adapter else None,
            **more,
        )
        sequence = Sequence(request)
        self.live.append(sequence)
        self.scheduler.add(sequence)
        return sequence

    def drop(self, sequence: Sequence) -> None:
        self.live.remove(sequence)
        self.scheduler.remove(sequence)

    def step(self) -> Plan:
        self.adapters.poll()
        plan = self.scheduler.schedule()
        for sequence, error in plan.refused:
            self.live.remove(sequence)
            self.refused[sequence.id] = error
        assert sum(chunk.length for chunk in plan.chunks) <= self.config.max_tokens_per_step
        assert len({id(chunk.sequence) for chunk in plan.chunks}) == len(plan.chunks)
        assert not self.could_have_run(plan)
        distinct = {chunk.sequence.request.adapter for chunk in plan.chunks} - {None}
        self.peak_distinct_adapters = max(self.peak_distinct_adapters, len(distinct))
        for chunk in plan.chunks:
            sequence = chunk.sequence
            assert chunk.start == sequence.num_computed
            assert len(sequence.blocks) * BLOCK >= chunk.start + chunk.length
            assert (sequence.resident is not None) == (sequence.request.adapter is not None)
            self.scheduler.advance(chunk)
            if chunk.wants_token:
                sequence.tokens.append(100 + sequence.num_output)
                sequence.num_known += 1
                self.scheduler.register(sequence)
                self.scheduler.charge(sequence, OUTPUT_TOKEN_COST)
                if sequence.num_output >= sequence.request.sampling.max_tokens:
                    self.drop(sequence)
                    self.done.append(sequence.id)
        self.check()
        return plan

    def could_have_run(self, plan: Plan) -> list[str]:
        """Who waits although there was room for all who wait, in the step, among the running and in memory,
        and their adapters were there."""
        scheduler, waiting = self.scheduler, list(self.scheduler.waiting)
        ready = [
            sequence
            for sequence in waiting
            if sequence.num_known == len(sequence.tokens)
            and (sequence.request.adapter is None or self.adapters.ready(sequence.request.adapter))
        ]
        needed = sum(scheduler.blocks_for(sequence.num_tokens) + self.default_slabs for sequence in ready)
        tokens = sum(chunk.length for chunk in plan.chunks)
        limits = (
            len(ready) == len(waiting)
            and tokens < min(self.config.max_tokens_per_step, self.config.max_tokens_per_busy_step)
            and len(scheduler.running) < min(self.config.max_running, self.config.max_tokens_per_step)
            and self.config.max_adapter_bytes_per_step is None
            and self.pool.available >= needed + 2 * len(scheduler.running)
            and not self.adapter_slabs
        )
        return [sequence.id for sequence in ready] if limits else []

    def check(self) -> None:
        blocks, adapters = held(self.scheduler.running)
        self.pool.check_integrity()
        self.blocks.check_integrity(blocks)
        self.adapters.check_integrity(adapters)
        assert len(self.scheduler.running) + self.scheduler.num_waiting == len(self.live)
        waiting_tokens = sum(sequence.num_prompt for sequence in self.scheduler.waiting)
        assert self.scheduler._waiting_tokens == waiting_tokens

    def lengths(self) -> dict[str, int]:
        return {chunk.sequence.id: chunk.length for chunk in self.step().chunks}

    def finish(self, steps: int = 500) -> int:
        for taken in range(steps):
            if not self.live:
                return taken
            self.step()
        raise AssertionError(f"{[s.id for s in self.live]} did not finish in {steps} steps")


# Batching


def test_a_request_joins_while_others_decode() -> None:
    world = World()
    world.add("a", 3)
    assert world.lengths() == {"a": 3}
    world.add("b", 5)
    assert world.lengths() == {"a": 1, "b": 5}
    assert world.lengths() == {"a": 1, "b": 1}


def test_a_long_prompt_runs_in_chunks_beside_decodes_within_the_budget() -> None:
    world = World(max_tokens_per_step=8)
    world.add("short", 2, 10)
    world.step()
    world.add("long", 17)
    assert world.lengths() == {"short": 1, "long": 7}
    assert world.lengths() == {"short": 1, "long": 7}
    assert world.lengths() == {"short": 1, "long": 3}
    assert world.lengths() == {"short": 1, "long": 1}


def test_a_request_that_came_while_a_prompt_took_the_whole_budget_is_admitted_behind_it() -> None:
    world = World(max_tokens_per_step=8)
    world.add("long", 20, 30)
    assert world.lengths() == {"long": 8}
    world.add("late", 3)
    assert world.lengths() == {"long": 8}
    assert world.lengths() == {"long": 4, "late": 3}
    assert world.lengths() == {"long": 1, "late": 1}


def test_beside_many_replies_prompts_are_spread_over_more_steps() -> None:
    world = World(max_running=8, max_tokens_per_step=64, max_tokens_per_busy_step=10, prefix_cache=False)
    for name in "abc":
        world.add(name, 20, 40)
    assert world.lengths() == {"a": 20, "b": 20, "c": 20}
    world.add("d", 30, 40)
    assert world.lengths() == {"a": 1, "b": 1, "c": 1, "d": 30}  # fewer than half of the places decode
    world.add("e", 9, 40)
    replies = dict.fromkeys("abcd", 1)
    assert world.lengths() == replies | {"e": 6}
    assert world.lengths() == replies | {"e": 3}
    for name in "fg":
        world.add(name, 2, 40)
    assert world.lengths() == replies | {"e": 1, "f": 2, "g": 2}  # 5 + 4 of 10
    world.add("h", 28, 2)
    replies = dict.fromkeys("abcdefg", 1)
    assert world.lengths() == replies | {"h": 7}  # never fewer than replies
    assert world.lengths() == replies | {"h": 7}
    world.drop(world.live[-1])
    world.add("i", 29, 40)
    assert world.lengths() == replies | {"i": 29}  # more than four such steps would take
    world.finish()


def test_only_the_end_of_the_known_tokens_is_sampled_from() -> None:
    world = World(max_tokens_per_step=8)
    world.add("a", 12)
    assert [chunk.wants_token for chunk in world.step().chunks] == [False]
    assert [chunk.wants_token for chunk in world.step().chunks] == [True]
    assert [chunk.wants_token for chunk in world.step().chunks] == [True]


def test_no_more_requests_run_than_allowed() -> None:
    world = World(max_running=2)
    for name in "abc":
        world.add(name, 2, 2)
    assert world.lengths() == {"a": 2, "b": 2}
    assert world.lengths() == {"a": 1, "b": 1}
    assert world.lengths() == {"c": 2}


def test_no_more_requests_run_than_can_decode_in_one_step() -> None:
    world = World(max_tokens_per_step=3, max_running=8)
    for name in "abcde":
        world.add(name, 1, 4)
    assert len(world.lengths()) == 3
    world.finish()
    assert sorted(world.done) == list("abcde")


def test_the_same_history_is_scheduled_the_same_way() -> None:
    def run() -> list[dict[str, int]]:
        world = World(slabs=12)
        for index in range(6):
            world.add(f"r{index}", 5 + index, 6, user=f"u{index % 2}", adapter="ada" if index % 3 else "")
        return [world.lengths() for _ in range(30)]

    assert run() == run()


# Prefix reuse


def test_a_returning_prompt_computes_only_what_is_new() -> None:
    world = World()
    world.add("first", 13, 1)
    world.finish()
    again = world.add("again", 15, 1)
    assert world.lengths() == {"again": 3}
    assert again.cached_tokens == 12
    assert world.scheduler.stats.hit_tokens == 12


def test_a_fully_cached_prompt_still_runs_one_block_to_sample_from() -> None:
    world = World()
    world.add("first", 12, 5)
    world.finish()
    world.add("again", 12, 1)
    assert world.lengths() == {"again": 4}


def test_another_version_of_the_adapter_finds_no_prefix() -> None:
    world = World()
    world.add("first", 12, 1, adapter="ada")
    world.finish()
    other = Sequence(
        Request("other", tuple(range(1, 13)), SamplingParams(max_tokens=1), AdapterRef("ada", 2), "first")
    )
    world.live.append(other)
    world.scheduler.add(other)
    world.finish()
    assert other.cached_tokens == 0
    same = world.add("same", 12, 1, adapter="ada")
    world.finish()
    assert same.cached_tokens == 8


# Pages, preemption


def test_a_request_waits_until_its_pages_are_free() -> None:
    world = World(slabs=4)
    world.add("a", 12, 2)
    world.step()
    world.add("b", 8, 1, first=50)
    assert world.lengths() == {"a": 1}
    assert world.lengths() == {"b": 8}


def test_a_small_request_does_not_pass_a_large_one_that_waits_for_pages() -> None:
    world = World(slabs=6)
    world.add("running", 12, 4)
    world.step()
    world.add("large", 14, 1, first=50)
    world.add("small", 2, 1, first=90)
    world.step()
    assert [s.id for s in world.scheduler.running] == ["running"]
    world.finish()
    assert world.done == ["running", "large", "small"]


def test_when_pages_run_out_the_newest_gives_way_and_no_token_changes() -> None:
    world = World(slabs=6, prefix_cache=False)
    old = world.add("old", 7, 12)
    new = world.add("new", 7, 12, first=50)
    world.finish()
    assert world.scheduler.stats.preemptions > 0
    assert old.preemptions == 0
    assert new.preemptions > 0
    assert world.done == ["old", "new"]
    assert new.tokens[7:] == [100 + index for index in range(12)]


def test_a_request_is_not_admitted_into_the_pages_that_running_replies_grow_into() -> None:
    world = World(slabs=5)
    world.add("old", 15, 6)
    world.step()
    world.add("new", 3, 6, first=50)
    world.finish()
    assert world.done == ["old", "new"]
    assert world.scheduler.stats.preemptions == 0


def test_a_preempted_request_goes_on_from_its_cached_blocks() -> None:
    world = World(slabs=7)
    world.add("old", 7, 12)
    new = world.add("new", 7, 12, first=50)
    for _ in range(20):
        world.step()
        if new.preemptions and new.blocks:
            break
    assert new.preemptions == 1
    assert new.cached_tokens == 0  # on its first admission
    assert world.scheduler.stats.lookup_tokens == 14  # a second admission is no new lookup
    assert new.num_computed > 2 * BLOCK
    world.finish()
    assert new.tokens[7:] == [100 + index for index in range(12)]


def test_what_a_request_that_gave_way_had_computed_badly_is_not_found() -> None:
    world = World(slabs=7)
    world.add("old", 8, 12)
    late = world.add("late", 8, 12, first=50)
    while not late.preemptions:
        world.step()
    assert world.blocks.match(late.block_keys)
    world.scheduler.disown(late)
    world.check()
    assert not world.blocks.match(late.block_keys)
    world.finish()


def test_a_preempted_request_goes_before_its_users_other_requests() -> None:
    world = World(slabs=7)
    world.add("old", 7, 12, user="u")
    new = world.add("new", 7, 12, user="u", first=50)
    for _ in range(20):
        world.step()
        if new.preemptions:
            break
    assert new.preemptions == 1
    world.add("later", 4, 1, user="u", first=90, priority=5)
    assert [s.id for s in world.scheduler.waiting] == ["new", "later"]


def test_a_request_with_its_adapter_larger_than_the_arena_is_refused_and_others_run() -> None:
    world = World(slabs=8)
    world.adapter_slabs["huge"] = 7
    world.add("bad", 8, 4, adapter="huge")
    world.add("good", 8, 4)
    world.finish()
    assert world.done == ["good"]
    assert isinstance(world.refused["bad"], ArenaExceeded)
    assert (world.refused["bad"].needs, world.refused["bad"].total) == (10, 8)


def test_an_idle_adapter_gives_way_to_kv_and_returns_when_needed() -> None:
    world = World(slabs=6, adapter_slabs=3)
    world.add("a", 4, 1, adapter="ada")
    world.finish()
    assert world.adapters.tier(AdapterRef("ada", 1)) == "device"
    world.add("long", 20, 2, first=50)
    world.finish()
    assert world.adapters.tier(AdapterRef("ada", 1)) == "host"
    world.add("b", 4, 1, adapter="ada")
    world.finish()
    assert world.done == ["a", "long", "b"]


def test_who_waits_for_pages_gives_way_once_its_user_has_had_more_than_another() -> None:
    world = World(slabs=16, prefix_cache=False)
    world.add("long", 4, 40, user="u")
    world.step()
    world.add("large", 60, 1, user="u", first=50)
    world.add("small", 4, 1, user="v")
    assert set(world.lengths()) == {"long"}  # both users have had the same, and the large one came first
    assert set(world.lengths()) == {"long", "small"}


def test_who_waits_for_pages_is_admitted_once_enough_of_its_prompt_was_computed_by_another() -> None:
    world = World(slabs=9, max_tokens_per_step=14)
    world.add("first", 24, 10)
    assert world.lengths() == {"first": 14}
    again = world.add("again", 24, 1)
    assert world.lengths() == {"first": 10}
    assert world.lengths() == {"first": 1, "again": 4}
    assert again.cached_tokens == 20


# Adapters


def test_a_request_whose_adapter_loads_holds_up_nobody() -> None:
    world = World()
    world.readers.shut = True
    world.add("slow", 4, 2, adapter="ada")
    world.add("quick", 4, 2)
    assert world.lengths() == {"quick": 4}
    assert world.lengths() == {"quick": 1}
    world.readers.open()
    assert world.lengths() == {"slow": 4}


def test_a_request_whose_adapter_is_being_copied_lets_others_run_and_runs_when_nobody_does() -> None:
    world = World()
    world.add("other", 4, 4)
    world.step()
    world.copying |= {"ada", "bob"}
    world.add("slow", 4, 4, adapter="ada")
    world.add("slower", 4, 4, adapter="bob")
    assert world.lengths() == {"other": 1}
    assert world.lengths() == {"other": 1}
    world.copying.remove("ada")
    assert world.lengths() == {"other": 1, "slow": 4}
    assert world.lengths() == {"slow": 1}
    world.add("newest", 4, 4)
    assert world.lengths() == {"slow": 1, "newest": 4}
    world.drop(world.live[0])
    world.drop(world.live[-1])
    assert world.lengths() == {"slower": 4}
    assert world.lengths() == {"slower": 1}


def test_an_adapter_that_cannot_be_loaded_fails_only_its_own_request() -> None:
    world = World()
    world.add("broken", 4, 2, adapter="bad")
    world.add("fine", 4, 2, adapter="ada")
    world.finish()
    assert world.done == ["fine"]
    assert isinstance(world.refused["broken"], AdapterUnavailable)


def test_a_step_holds_as_many_distinct_adapters_as_rows() -> None:
    world = World(slabs=64)
    for name in "abcdefgh":
        world.add(name, 2, 8, adapter=f"adapter-{name}")
    world.finish()
    assert world.peak_distinct_adapters == 8


def test_distinct_adapters_of_a_step_are_bounded_by_bytes_when_asked() -> None:
    world = World(slabs=64, adapter_slabs=2, slab_bytes=10, max_adapter_bytes_per_step=50)
    for name in "abcd":
        world.add(name, 2, 8, adapter=f"adapter-{name}")
    world.finish()
    assert world.peak_distinct_adapters == 2


def test_the_tier_an_adapter_was_found_in_is_noted_on_arrival() -> None:
    world = World()
    first = world.add("first", 4, 1, adapter="ada")
    world.finish()
    second = world.add("second", 4, 1, adapter="ada")
    base = world.add("base", 4, 1)
    assert [s.adapter_tier for s in (first, second, base)] == ["disk", "device", "none"]
    assert world.adapters.stats.found == {"device": 1, "host": 0, "disk": 1}


# Fairness


def test_a_light_user_passes_the_backlog_of_a_heavy_one() -> None:
    world = World(max_running=1)
    for index in range(6):
        world.add(f"heavy{index}", 8, 2, user="heavy")
    world.step()
    world.add("light", 8, 2, user="light")
    world.finish()
    assert world.done[:2] == ["heavy0", "light"]


def test_users_with_equal_backlogs_take_turns() -> None:
    world = World(max_running=1, prefix_cache=False)
    for index in range(3):
        world.add(f"a{index}", 8, 2, user="a")
    for index in range(3):
        world.add(f"b{index}", 8, 2, user="b")
    world.finish()
    assert world.done == ["a0", "b0", "a1", "b1", "a2", "b2"]


def test_absence_saves_up_no_credit() -> None:
    world = World(max_running=1)
    world.add("early", 2, 1, user="sleeper")
    world.finish()
    for index in range(4):
        world.add(f"busy{index}", 8, 4, user="busy")
    for _ in range(12):
        world.step()
    for index in range(3):
        world.add(f"sleeper{index}", 8, 4, user="sleeper")
    world.finish()
    tail = world.done[-4:]
    assert "busy3" in tail[:3]  # the sleeper does not get all three of its turns first


def served_in_debt(ageing: float) -> list[str]:
    """A user with much served behind them waits, while a new user comes every step."""
    world = World(max_running=1, ageing_tokens_per_s=ageing, prefix_cache=False)
    world.add("feast", 15, 40, user="glutton")
    world.add("next", 8, 2, user="glutton")
    for index in range(150):
        world.step()
        world.now += 1.0
        world.add(f"new{index}", 8, 2, user=f"new{index}")
    return world.done


def test_a_user_in_debt_is_served_at_last_although_new_users_keep_coming() -> None:
    done = served_in_debt(ageing=10.0)
    assert 3 < done.index("next") < 20


def test_without_ageing_that_user_would_starve() -> None:
    """The control of the test above: it is the ageing that serves them."""
    assert "next" not in served_in_debt(ageing=0.0)


def test_priority_orders_one_users_own_requests() -> None:
    world = World(max_running=1)
    world.add("first", 4, 1, user="u")
    world.add("low", 4, 1, user="u", priority=-1)
    world.add("high", 4, 1, user="u", priority=1)
    world.finish()
    assert world.done == ["high", "first", "low"]


def test_a_user_who_floods_the_queue_makes_nobody_else_wait() -> None:
    """2,000 requests of one user, then one each of ten others, who are all served within two turns."""
    world = World(max_running=4, ageing_tokens_per_s=50.0, prefix_cache=False)
    for number in range(2000):
        world.add(f"flood{number}", 8, 4, user="flood")
    for _ in range(20):
        world.step()
        world.now += 0.02
    for number in range(10):
        world.add(f"guest{number}", 8, 4)
    steps = 0
    while sum(name.startswith("guest") for name in world.done) < 10:
        world.step()
        world.now += 0.02
        steps += 1
    # Ten of them, four at a time and four steps each, behind those that run when they come.
    assert steps <= 24
    assert world.scheduler.num_waiting > 1900


def test_fairness_counters_do_not_grow_with_the_number_of_past_users() -> None:
    world = World()
    for index in range(3000):
        world.add(f"r{index}", 2, 1, user=f"u{index}")
        if index % 4 == 3:
            world.step()
    world.finish(2000)
    assert len(world.scheduler._served) < 1100


# Cancelling


@pytest.mark.parametrize("when", ["waiting", "in its prompt", "decoding"])
def test_a_cancelled_request_gives_back_everything(when: str) -> None:
    world = World(max_tokens_per_step=8, prefix_cache=False)
    sequence = world.add("a", 12, 8, adapter="ada")
    for _ in range({"waiting": 0, "in its prompt": 2, "decoding": 4}[when]):
        world.step()
    world.drop(sequence)
    world.check()
    assert world.pool.owned("kv") == 0
    assert world.pool.available == world.pool.total


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any_traffic_ends_with_every_request_answered_in_full(data: st.DataObject) -> None:
    """A tight arena or a roomy one, shared prompts, bad adapters, cancels: no starvation, no leak, no lost
    token."""
    world = World(
        slabs=data.draw(st.integers(9, 20) | st.just(90)),
        max_tokens_per_step=data.draw(st.integers(4, 20)),
        max_running=4,
        prefix_cache=data.draw(st.booleans()),
        ageing_tokens_per_s=5.0,
        max_tokens_per_busy_step=data.draw(st.integers(1, 20)),
    )
    kept: list[Sequence] = []
    for index in range(data.draw(st.integers(1, 14))):
        sequence = world.add(
            f"r{index}",
            data.draw(st.integers(1, 15)),
            data.draw(st.integers(1, 10)),
            user=data.draw(st.sampled_from("uvw")),
            adapter=data.draw(st.sampled_from(["", "ada", "bob", "bad"])),
            first=data.draw(st.sampled_from([1, 50])),
        )
        kept.append(sequence)
        for _ in range(data.draw(st.integers(0, 4))):
            world.now += 0.25
            world.step()
        if world.live and data.draw(st.integers(0, 5)) == 0:
            victim = data.draw(st.sampled_from(world.live))
            world.drop(victim)
            kept.remove(victim)
    world.finish()
    for sequence in kept:
        if sequence.id in world.refused:
            assert sequence.request.adapter == AdapterRef("bad", 1)
        else:
            expected = [100 + i for i in range(sequence.request.sampling.max_tokens)]
            assert sequence.tokens[sequence.num_prompt :] == expected
    assert world.pool.available == world.pool.total
