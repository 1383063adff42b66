"""Reuse of K/V blocks: only for the same base, adapter, version and tokens, and never by mistake."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.pages import BrokenBooks, PagePool
from engine.prefix import PrefixCache
from engine.request import AdapterRef

BLOCK = 4
NOBODY: frozenset[str] = frozenset()


def make(slabs: int = 16, *, enabled: bool = True, base: str = "base-hash") -> tuple[PagePool, PrefixCache]:
    pool = PagePool(slabs)
    return pool, PrefixCache(pool, BLOCK, base, enabled=enabled)


def keys_of(cache: PrefixCache, adapter: AdapterRef | None, tokens: list[int]) -> list[bytes]:
    keys: list[bytes] = []
    cache.extend_keys(keys, cache.root(adapter), tokens, len(tokens))
    return keys


def compute(
    cache: PrefixCache, adapter: AdapterRef | None, tokens: list[int], labels: frozenset[str] = NOBODY
) -> list[int]:
    """What a request does: take what is cached, allocate the rest, register whole blocks. Still in use."""
    keys = keys_of(cache, adapter, tokens)
    found = cache.match(keys)
    cache.acquire(found)
    fresh = cache.allocate(len(keys) - len(found))
    assert fresh is not None
    for key, slab in zip(keys[len(found) :], fresh, strict=True):
        cache.register(key, slab, labels)
    return found + fresh


def test_the_same_tokens_are_found_again() -> None:
    _, cache = make()
    slabs = compute(cache, None, list(range(12)))
    cache.release(slabs)
    assert cache.match(keys_of(cache, None, [*range(12), 99])) == slabs


def test_a_shared_beginning_is_found_up_to_the_first_block_that_differs() -> None:
    _, cache = make()
    slabs = compute(cache, None, list(range(12)))
    assert cache.match(keys_of(cache, None, [0, 1, 2, 3, 4, 5, 6, 77, 8, 9, 10, 11])) == slabs[:1]


def test_a_block_is_not_found_under_another_beginning() -> None:
    _, cache = make()
    compute(cache, None, list(range(8)))
    assert cache.match(keys_of(cache, None, [9, 9, 9, 9, 4, 5, 6, 7])) == []


@pytest.mark.parametrize(
    "other",
    [None, AdapterRef("ada", 2), AdapterRef("bob", 1)],
    ids=["base", "other version", "other adapter"],
)
def test_kv_is_never_shared_between_adapters_or_versions(other: AdapterRef | None) -> None:
    _, cache = make()
    compute(cache, AdapterRef("ada", 1), list(range(8)))
    assert cache.match(keys_of(cache, other, list(range(8)))) == []


def test_another_base_model_has_other_keys() -> None:
    assert make(base="one")[1].root(None) != make(base="two")[1].root(None)


def test_no_adapter_id_can_read_like_the_base_or_like_another_version() -> None:
    _, cache = make()
    refs = [None, AdapterRef("base", 1), AdapterRef("a", 11), AdapterRef("a1", 1), AdapterRef("adaptera", 1)]
    assert len({cache.root(ref) for ref in refs}) == len(refs)


def test_a_block_in_use_is_not_evicted_and_an_idle_one_is() -> None:
    pool, cache = make(slabs=3)
    used = compute(cache, None, [1, 2, 3, 4])
    cache.release(compute(cache, None, [5, 6, 7, 8]))
    assert cache.allocate(2) is not None
    assert cache.match(keys_of(cache, None, [1, 2, 3, 4])) == used
    assert cache.match(keys_of(cache, None, [5, 6, 7, 8])) == []
    assert cache.allocate(1) is None
    pool.check_integrity()


def test_a_chain_is_evicted_from_its_end() -> None:
    _, cache = make(slabs=3)
    slabs = compute(cache, None, list(range(12)))
    cache.release(slabs)
    assert cache.allocate(1) is not None
    assert cache.match(keys_of(cache, None, list(range(12)))) == slabs[:2]


def test_blocks_that_were_never_registered_are_free_after_their_release() -> None:
    pool, cache = make()
    slabs = cache.allocate(5)
    assert slabs is not None
    cache.release(slabs)
    assert pool.free_slabs == pool.total


def test_a_disabled_cache_finds_nothing_and_keeps_nothing() -> None:
    pool, cache = make(enabled=False)
    cache.release(compute(cache, None, list(range(8))))
    assert cache.match(keys_of(cache, None, list(range(8)))) == []
    assert pool.free_slabs == pool.total


def test_of_two_equal_blocks_the_first_is_kept_and_the_second_is_freed() -> None:
    pool, cache = make()
    keys = keys_of(cache, None, [1, 2, 3, 4])
    first, second = cache.allocate(2) or []
    cache.register(keys[0], first, NOBODY)
    cache.register(keys[0], second, NOBODY)
    cache.release([first])
    cache.release([second])
    assert cache.match(keys) == [first]
    assert pool.owned("kv") == 1


def test_forget_drops_idle_blocks_at_once_and_used_ones_at_their_release() -> None:
    pool, cache = make()
    ada = frozenset({"ada"})
    cache.release(compute(cache, AdapterRef("ada", 1), list(range(8)), ada))
    used = compute(cache, AdapterRef("ada", 2), list(range(8)), ada)
    kept = compute(cache, None, list(range(8)), frozenset({"bob"}))
    assert cache.forget("ada") == 4
    assert pool.owned("kv") == 4
    assert cache.match(keys_of(cache, AdapterRef("ada", 2), list(range(8)))) == []
    cache.check_integrity([used, kept])
    cache.release(used)
    assert pool.owned("kv") == 2
    assert cache.match(keys_of(cache, None, list(range(8)))) == kept
    assert cache.forget("ada") == 0


def test_releasing_too_often_is_refused() -> None:
    _, cache = make()
    slabs = compute(cache, None, [1, 2, 3, 4])
    cache.release(slabs)
    with pytest.raises(BrokenBooks, match="more often"):
        cache.release(slabs)


def test_the_integrity_check_finds_a_leaked_reference() -> None:
    _, cache = make()
    slabs = compute(cache, None, list(range(8)))
    cache.check_integrity([slabs])
    with pytest.raises(BrokenBooks, match="references"):
        cache.check_integrity([])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([None, AdapterRef("a", 1), AdapterRef("a", 2), AdapterRef("b", 1)]),
            st.lists(st.integers(0, 1), min_size=BLOCK, max_size=5 * BLOCK),
            st.integers(0, 4),
        ),
        max_size=40,
    )
)
def test_any_history_of_requests_finds_only_its_own_kv(
    history: list[tuple[AdapterRef | None, list[int], int]],
) -> None:
    """Small alphabet, small pool: many shared prefixes, evictions and duplicates."""
    pool, cache = make(slabs=10)
    content: dict[int, tuple[AdapterRef | None, tuple[int, ...]]] = {}
    running: list[list[int]] = []
    for adapter, tokens, finished in history:
        keys = keys_of(cache, adapter, tokens)
        found = cache.match(keys)
        for index, slab in enumerate(found):
            assert content[slab] == (adapter, tuple(tokens[: (index + 1) * BLOCK]))
        cache.acquire(found)
        fresh = cache.allocate(len(keys) - len(found))
        if fresh is None:
            cache.release(found)
        else:
            for index, (key, slab) in enumerate(zip(keys[len(found) :], fresh, strict=True), len(found)):
                content[slab] = (adapter, tuple(tokens[: (index + 1) * BLOCK]))
                cache.register(key, slab, NOBODY)
            running.append(found + fresh)
        for _ in range(min(finished, len(running))):
            cache.release(running.pop(0))
        pool.check_integrity()
        cache.check_integrity(running)
    for slabs in running:
        cache.release(slabs)
    assert pool.available == pool.total
