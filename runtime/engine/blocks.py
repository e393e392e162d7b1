"""The pool of KV blocks: who holds each, which free ones still hold a reusable prefix, what to evict.

A block is held (reference count > 0), cached (free, yet findable by its key) or empty. Knows nothing of
requests; a holder is whoever took a reference and will release it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from runtime.engine.runs import FreeRuns


class BlockPool:
    """`total` blocks, ids 0 .. total - 1."""

    def __init__(self, total: int):
        self.total = total
        self.references = [0] * total
        self.empty = FreeRuns(total)
        self.key_of: dict[int, bytes] = {}  # held or cached block -> key
        self.block_of: dict[bytes, int] = {}
        # Least recently released first. Releasing a sequence's last block first puts leaves before the
        # prefixes they extend, and whoever uses a leaf uses (and later releases) its prefix too: popping
        # from the front evicts leaves first, while any cached block can be evicted when it must be.
        self.cached: OrderedDict[int, None] = OrderedDict()
        # Evicting a few at once lets them join into runs. Small beside the pool, nothing in a tiny one.
        self._evict_at_once = total // 64

    @property
    def available(self) -> int:
        """Blocks that `take` can give."""
        return self.empty.count + len(self.cached)

    def take(self, count: int, after: int | None = None) -> list[int]:
        """`count` (<= available) blocks with one reference each, near the held block `after` if cheap."""
        if count > self.available:
            raise ValueError(f"{count} blocks wanted, {self.available} available")
        if self.empty.count < count:
            wanted = max(count - self.empty.count, min(self._evict_at_once, len(self.cached)))
            for _ in range(wanted):
                block, _ = self.cached.popitem(last=False)
                del self.block_of[self.key_of.pop(block)]
                self.empty.give(block)
        blocks = self.empty.take(count, after)
        for block in blocks:
            self.references[block] = 1
        return blocks

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """The blocks of the longest run of known keys from the first one. Takes no reference."""
        blocks = []
        for key in keys:
            block = self.block_of.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def idle_among(self, blocks: Sequence[int]) -> int:
        """How many of `blocks` are held by no one: sharing those makes fewer available."""
        return sum(self.references[block] == 0 for block in blocks)

    def share(self, blocks: Sequence[int]) -> None:
        """One more reference to each of the found blocks."""
        for block in blocks:
            if self.references[block] == 0:
                del self.cached[block]
            self.references[block] += 1

    def name(self, block: int, key: bytes) -> None:
        """Lets a held block be found by `key`; if another block has that key already, nothing changes."""
        if key not in self.block_of:
            self.block_of[key] = block
            self.key_of[block] = key

    def unname(self, block: int) -> None:
        """Nobody finds this block any more."""
        key = self.key_of.pop(block, None)
        if key is None:
            return
        del self.block_of[key]
        if self.references[block] == 0:
            del self.cached[block]
            self.empty.give(block)

    def release(self, table: Sequence[int]) -> None:
        """Takes back one reference to each block of a sequence's table, given first to last."""
        for block in reversed(table):
            self.references[block] -= 1
            if self.references[block] == 0:
                if block in self.key_of:
                    self.cached[block] = None
                else:
                    self.empty.give(block)
