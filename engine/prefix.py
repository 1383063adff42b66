"""K/V blocks: reference counts, and reuse of whole blocks whose tokens an earlier request computed.

A block's key is a hash chain, so it names everything its K/V depends on:

    root     = H(base hash, adapter id and version, or "base")
    key_i    = H(key_{i-1}, tokens of block i)

K/V is therefore never shared between adapters or versions. A block nobody uses stays cached: it rests in the
pool's eviction order, its children before it, so that a chain is evicted from its end.
"""

from array import array
from collections.abc import Hashable, Iterable, Sequence
from hashlib import blake2b

from engine.pages import BrokenBooks, PagePool
from engine.request import AdapterRef


class PrefixCache:
    def __init__(self, pool: PagePool, block_size: int, base_hash: str, *, enabled: bool = True) -> None:
        self.block_size = block_size
        self.enabled = enabled
        self._pool = pool
        self._base_hash = base_hash
        self._references: dict[int, int] = {}  # slab -> sequences using it; 0 only while it rests
        self._slab_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}  # registered slabs only
        self._labels_of: dict[int, frozenset[str]] = {}
        self._slabs_of_label: dict[str, set[int]] = {}
        pool.on_evicted("kv", self._on_evicted)

    # Keys

    def root(self, adapter: AdapterRef | None) -> bytes:
        digest = blake2b(digest_size=32, person=b"attune-kv-root")
        for part in (
            self._base_hash,
            *(("adapter", adapter.id, str(adapter.version)) if adapter else ("base",)),
        ):
            encoded = part.encode()
            digest.update(len(encoded).to_bytes(4, "little"))  # lengths, so that no two part lists read alike
            digest.update(encoded)
        return digest.digest()

    def extend_keys(self, keys: list[bytes], root: bytes, tokens: Sequence[int], upto: int) -> None:
        """Append the keys of the whole blocks within tokens[:upto] that `keys` does not hold yet."""
        for block in range(len(keys), upto // self.block_size):
            start = block * self.block_size
            content = array("q", tokens[start : start + self.block_size]).tobytes()
            parent = keys[-1] if keys else root
            keys.append(blake2b(content, digest_size=32, key=parent).digest())

    # Blocks

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """The slabs of the longest cached run of these keys from the first on. They are not acquired yet."""
        slabs: list[int] = []
        for key in keys:
            slab = self._slab_of.get(key)
            if slab is None:
                break
            slabs.append(slab)
        return slabs

    def acquire(self, slabs: Iterable[int]) -> None:
        """Use cached blocks; every acquire is undone by one release."""
        for slab in slabs:
            if self._references[slab] == 0 and not self._pool.wake(slab, "kv"):
                raise BrokenBooks(f"block {slab} has no user and does not rest")
            self._references[slab] += 1

    def allocate(self, n: int) -> list[int] | None:
        """n blocks with one user and no content yet, or None."""
        slabs = self._pool.allocate(n, "kv")
        for slab in slabs or ():
            self._references[slab] = 1
        return slabs

    def register(self, key: bytes, slab: int, labels: frozenset[str]) -> None:
        """The block's K/V is computed: others may find it by its key, and `forget` by any of its labels.

        Two sequences may compute the same block at once; the first one is kept, the other stays private.
        """
        if not self.enabled or key in self._slab_of:
            return
        self._slab_of[key] = slab
        self._key_of[slab] = key
        self._labels_of[slab] = labels
        for label in labels:
            self._slabs_of_label.setdefault(label, set()).add(slab)

    def disown(self, slabs: Iterable[int]) -> None:
        """These blocks hold what nobody should find again: they are freed, those in use at their last
        release.
        """
        for slab in slabs:
            if slab in self._key_of:
                self._unregister(slab)
                if self._references[slab] == 0:
                    self._pool.wake(slab, "kv")
                    del self._references[slab]
                    self._pool.free((slab,), "kv")

    def release(self, slabs: Sequence[int]) -> None:
        """Give up one use of each block of one sequence, in the order of its positions."""
        # Backwards: a chain's end becomes the older, and is evicted before what it hangs on.
        for slab in reversed(slabs):
            self._references[slab] -= 1
            if self._references[slab] < 0:
                raise BrokenBooks(f"block {slab} was released more often than acquired")
            if self._references[slab] == 0:
                if slab in self._key_of:
                    self._pool.rest(slab, (slab,), "kv")
                else:
                    del self._references[slab]
                    self._pool.free((slab,), "kv")

    def forget(self, label: str) -> int:
        """Drop every cached block registered under the label; blocks in use are freed at their
        last release.
        """
        slabs = list(self._slabs_of_label.get(label, ()))
        self.disown(slabs)
        return len(slabs)

    def check_integrity(self, used: Iterable[Sequence[int]]) -> None:
        """Raise BrokenBooks unless the reference counts are exactly those of the block lists in `used`."""
        counted = dict.fromkeys(self._references, 0)
        for slabs in used:
            for slab in slabs:
                if slab not in counted:
                    raise BrokenBooks(f"a sequence uses block {slab}, which is not allocated")
                counted[slab] += 1
        if counted != self._references:
            wrong = {s: (self._references[s], n) for s, n in counted.items() if n != self._references[s]}
            raise BrokenBooks(f"references of blocks (counted, found): {wrong}")
        if len(self._references) != self._pool.owned("kv"):
            raise BrokenBooks(f"{len(self._references)} blocks, the pool says {self._pool.owned('kv')}")
        unused = [slab for slab, users in self._references.items() if users == 0]
        if len(unused) != self._pool.resting("kv") or any(slab not in self._key_of for slab in unused):
            raise BrokenBooks(f"unused blocks {unused}, resting {self._pool.resting('kv')}")
        if {slab: key for key, slab in self._slab_of.items()} != self._key_of:
            raise BrokenBooks("keys and slabs do not mirror each other")
        if self._labels_of.keys() != self._key_of.keys():
            raise BrokenBooks("labels and registered blocks differ")

    def _unregister(self, slab: int) -> None:
        del self._slab_of[self._key_of.pop(slab)]
        for label in self._labels_of.pop(slab):
            self._slabs_of_label[label].discard(slab)
            if not self._slabs_of_label[label]:
                del self._slabs_of_label[label]

    def _on_evicted(self, item: Hashable) -> None:
        assert isinstance(item, int)
        self._unregister(item)
        del self._references[item]
