"""The books of the arena: random walks over the pool, and each promise by itself."""

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.pages import OWNERS, BrokenBooks, PagePool

TOTAL = 12


class PoolMachine(RuleBasedStateMachine):
    """Two owners take, rest, wake and free; a plain model of the order says what must be evicted."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(TOTAL)
        self.in_use: dict[tuple[Any, int], list[int]] = {}
        self.idle: list[tuple[Any, int]] = []  # oldest first
        self.idle_slabs: dict[tuple[Any, int], list[int]] = {}
        self.evicted: list[tuple[Any, int]] = []
        self.next_item = 0
        self.pool.on_evicted("kv", lambda item: self.evicted.append(("kv", item)))  # type: ignore[arg-type]
        self.pool.on_evicted("adapter", lambda item: self.evicted.append(("adapter", item)))  # type: ignore[arg-type]

    @rule(n=st.integers(0, TOTAL + 1), owner=st.sampled_from(OWNERS))
    def allocate(self, n: int, owner: Any) -> None:
        free = TOTAL - sum(map(len, self.in_use.values())) - sum(map(len, self.idle_slabs.values()))
        expected: list[tuple[Any, int]] = []
        gain = free
        for item in self.idle:
            if gain >= n:
                break
            expected.append(item)
            gain += len(self.idle_slabs[item])
        self.evicted.clear()
        taken = self.pool.allocate(n, owner)
        if gain < n:
            assert taken is None
            assert self.evicted == []
            return
        assert taken is not None
        assert len(set(taken)) == n
        assert self.evicted == expected
        for item in expected:
            self.idle.remove(item)
            del self.idle_slabs[item]
        for held in (*self.in_use.values(), *self.idle_slabs.values()):
            assert not set(held) & set(taken)
        self.in_use[owner, self.next_item] = taken
        self.next_item += 1

    @precondition(lambda self: self.in_use)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        item = data.draw(st.sampled_from(sorted(self.in_use)))
        self.pool.free(self.in_use.pop(item), item[0])

    @precondition(lambda self: self.in_use)
    @rule(data=st.data())
    def rest(self, data: st.DataObject) -> None:
        item = data.draw(st.sampled_from(sorted(self.in_use)))
        self.idle_slabs[item] = self.in_use.pop(item)
        self.idle.append(item)
        self.pool.rest(item[1], self.idle_slabs[item], item[0])

    @precondition(lambda self: self.idle)
    @rule(data=st.data())
    def wake(self, data: st.DataObject) -> None:
        item = data.draw(st.sampled_from(sorted(self.idle)))
        assert self.pool.wake(item[1], item[0])
        self.idle.remove(item)
        self.in_use[item] = self.idle_slabs.pop(item)

    @invariant()
    def books_balance(self) -> None:
        self.pool.check_integrity()
        assert self.pool.free_slabs + self.pool.owned("kv") + self.pool.owned("adapter") == TOTAL
        for owner in OWNERS:
            idle = sum(len(slabs) for (kind, _), slabs in self.idle_slabs.items() if kind == owner)
            used = sum(len(slabs) for (kind, _), slabs in self.in_use.items() if kind == owner)
            assert self.pool.resting(owner) == idle
            assert self.pool.owned(owner) == idle + used


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_freeing_twice_is_refused() -> None:
    pool = PagePool(3)
    slabs = pool.allocate(2, "kv")
    assert slabs is not None
    pool.free(slabs, "kv")
    with pytest.raises(BrokenBooks, match="is free"):
        pool.free(slabs, "kv")


def test_freeing_what_another_owns_is_refused() -> None:
    pool = PagePool(3)
    slabs = pool.allocate(1, "adapter")
    assert slabs is not None
    with pytest.raises(BrokenBooks, match="owned by kv, is adapter"):
        pool.free(slabs, "kv")


def test_resting_twice_is_refused() -> None:
    pool = PagePool(3)
    pool.rest("a", pool.allocate(1, "kv") or [], "kv")
    with pytest.raises(BrokenBooks, match="rests already"):
        pool.rest("a", [], "kv")


def test_kv_and_adapters_stand_in_one_eviction_order() -> None:
    pool = PagePool(4)
    gone: list[object] = []
    pool.on_evicted("kv", gone.append)
    pool.on_evicted("adapter", gone.append)
    for item, owner in (("block 1", "kv"), ("adapter", "adapter"), ("block 2", "kv"), ("block 3", "kv")):
        pool.rest(item, pool.allocate(1, owner) or [], owner)  # type: ignore[arg-type]
    assert pool.allocate(3, "kv") is not None
    assert gone == ["block 1", "adapter", "block 2"]
    assert pool.evictions == {"kv": 2, "adapter": 1}


@pytest.mark.parametrize("damage", ["lost slab", "leaked owner", "wrong count", "resting slab freed"])
def test_the_integrity_check_finds_damage(damage: str) -> None:
    pool = PagePool(4)
    taken = pool.allocate(2, "kv")
    assert taken is not None
    pool.rest("block", taken[:1], "kv")
    pool.check_integrity()
    if damage == "lost slab":
        pool._free.pop()
    elif damage == "leaked owner":
        pool._free.append(taken[1])
    elif damage == "wrong count":
        pool._owned["kv"] -= 1
    else:
        pool.free(taken[:1], "kv")
    with pytest.raises(BrokenBooks):
        pool.check_integrity()
