"""PagePool: who owns which slab of the arena. One free list for K/V and adapters, one eviction order.

The pool holds numbers, not tensors. A slab is free, or owned by "kv" or by "adapter". What is owned but
not in use right now may *rest*: resting things of both kinds stand in one least-recently-used order, and
`allocate` takes the oldest of them back when the free list alone does not suffice. So free + kv +
adapters == total always holds, and `check_integrity` proves it.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from typing import Literal

Owner = Literal["kv", "adapter"]
OWNERS: tuple[Owner, ...] = ("kv", "adapter")


class BrokenBooks(RuntimeError):
    """The page accounting contradicts itself: a bug of the engine, never of a request."""


class PagePool:
    def __init__(self, num_slabs: int) -> None:
        if num_slabs < 1:
            raise ValueError(f"num_slabs: expected 1 or more, got {num_slabs}")
        self.total = num_slabs
        self._free = list(range(num_slabs - 1, -1, -1))  # a stack; low numbers leave first
        self._owner: list[Owner | None] = [None] * num_slabs
        self._owned: dict[Owner, int] = dict.fromkeys(OWNERS, 0)
        # (owner, item) -> its slabs, least recently used first
        self._resting: OrderedDict[tuple[Owner, Hashable], tuple[int, ...]] = OrderedDict()
        self._resting_slabs: dict[Owner, int] = dict.fromkeys(OWNERS, 0)
        self._evicted: dict[Owner, Callable[[Hashable], None]] = {}
        self.evictions: dict[Owner, int] = dict.fromkeys(OWNERS, 0)  # items taken back since the start

    @property
    def free_slabs(self) -> int:
        return len(self._free)

    @property
    def available(self) -> int:
        """Slabs that `allocate` can give: the free ones and the resting ones."""
        return len(self._free) + sum(self._resting_slabs.values())

    def owned(self, owner: Owner) -> int:
        return self._owned[owner]

    def resting(self, owner: Owner) -> int:
        return self._resting_slabs[owner]

    def on_evicted(self, owner: Owner, forget: Callable[[Hashable], None]) -> None:
        """`forget(item)` is called when a resting item of this owner was taken back; its slabs are free by
        then.
        """
        self._evicted[owner] = forget

    def allocate(self, n: int, owner: Owner) -> list[int] | None:
        """Take n slabs, evicting resting things oldest first if needed. All or nothing: None
        evicts nothing.
        """
        if n > self.available:
            return None
        while len(self._free) < n:
            (kind, item), slabs = self._resting.popitem(last=False)
            self._resting_slabs[kind] -= len(slabs)
            self.free(slabs, kind)
            self.evictions[kind] += 1
            self._evicted[kind](item)
        taken = [self._free.pop() for _ in range(n)]
        for slab in taken:
            self._owner[slab] = owner
        self._owned[owner] += n
        return taken

    def free(self, slabs: Iterable[int], owner: Owner) -> None:
        for slab in slabs:
            if self._owner[slab] != owner:
                raise BrokenBooks(
                    f"slab {slab}: expected to be owned by {owner}, is {self._owner[slab] or 'free'}"
                )
            self._owner[slab] = None
            self._free.append(slab)
            self._owned[owner] -= 1

    def rest(self, item: Hashable, slabs: Iterable[int], owner: Owner) -> None:
        """The item is not used now but worth keeping; it becomes the most recently used of the resting."""
        if (owner, item) in self._resting:
            raise BrokenBooks(f"{owner} {item} rests already")
        kept = tuple(slabs)
        self._resting[owner, item] = kept
        self._resting_slabs[owner] += len(kept)

    def wake(self, item: Hashable, owner: Owner) -> bool:
        """The item is used again and cannot be evicted. False if it was not resting."""
        slabs = self._resting.pop((owner, item), None)
        if slabs is None:
            return False
        self._resting_slabs[owner] -= len(slabs)
        return True

    def check_integrity(self) -> None:
        """Raise BrokenBooks unless every slab is free or owned exactly once and the counts say the same."""
        free = set(self._free)
        if len(free) != len(self._free):
            raise BrokenBooks("a slab is on the free list twice")
        for slab, owner in enumerate(self._owner):
            if (owner is None) != (slab in free):
                raise BrokenBooks(
                    f"slab {slab} is owned by {owner} and {'' if slab in free else 'not '}on the free list"
                )
        for kind in OWNERS:
            if self._owned[kind] != self._owner.count(kind):
                raise BrokenBooks(f"{kind}: {self._owned[kind]} counted, {self._owner.count(kind)} owned")
        if len(self._free) + sum(self._owned.values()) != self.total:
            raise BrokenBooks(f"free {len(self._free)} + owned {self._owned} != total {self.total}")
        seen: set[int] = set()
        resting = dict.fromkeys(OWNERS, 0)
        for (kind, item), slabs in self._resting.items():
            for slab in slabs:
                if slab in seen or self._owner[slab] != kind:
                    raise BrokenBooks(
                        f"slab {slab} of resting {kind} {item} rests twice or has another owner"
                    )
                seen.add(slab)
            resting[kind] += len(slabs)
        if resting != self._resting_slabs:
            raise BrokenBooks(f"resting: {self._resting_slabs} counted, {resting} found")
