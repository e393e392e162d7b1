"""Free block ids as maximal contiguous runs, so that a sequence's blocks tend to follow one another.

Attention on a CPU reads a contiguous run of blocks without copying it; nothing depends on it but speed.
Knows nothing of sequences or of what blocks hold.
"""

from __future__ import annotations

import heapq


class FreeRuns:
    """The free ids among 0 .. total - 1. Every operation is O(log runs) or better, amortised."""

    def __init__(self, total: int):
        self.count = 0
        self.length_at: dict[int, int] = {}  # first id of a run -> how many ids
        self._start_of: dict[int, int] = {}  # one past a run's last id -> its first id
        self._largest: list[tuple[int, int]] = []  # heap of (-length, first id); stale entries stay
        if total:
            self._insert(0, total)
            self.count = total

    def give(self, block: int) -> None:
        """Makes an id free; it must not be free already."""
        start, length = block, 1
        if block in self._start_of:
            start = self._start_of[block]
            length += self._remove(start)
        if block + 1 in self.length_at:
            length += self._remove(block + 1)
        self._insert(start, length)
        self.count += 1

    def take(self, count: int, after: int | None) -> list[int]:
        """`count` ids (there must be as many), continuing from the taken id `after` where possible."""
        taken: list[int] = []
        self.count -= count
        while count:
            # An id that is not free can only be followed by the first id of a run.
            follows = after is not None and after + 1 in self.length_at
            run = after + 1 if follows else self._pop_largest()
            length = self._remove(run)
            size = min(count, length)
            # The block before a run belongs to a sequence that may grow into it. Starting half way
            # leaves room to grow both for that one and for this.
            first = run if follows or run == 0 else run + min(length // 2, length - size)
            if first > run:
                self._insert(run, first - run)
            if first + size < run + length:
                self._insert(first + size, run + length - first - size)
            taken.extend(range(first, first + size))
            after = first + size - 1
            count -= size
        return taken

    def ids(self) -> set[int]:
        return {block for start, length in self.length_at.items() for block in range(start, start + length)}

    def _insert(self, start: int, length: int) -> None:
        self.length_at[start] = length
        self._start_of[start + length] = start
        heapq.heappush(self._largest, (-length, start))
        if len(self._largest) > 4 * len(self.length_at) + 64:
            self._largest = [(-length, start) for start, length in self.length_at.items()]
            heapq.heapify(self._largest)

    def _remove(self, start: int) -> int:
        length = self.length_at.pop(start)
        del self._start_of[start + length]
        return length

    def _pop_largest(self) -> int:
        while True:
            length, start = heapq.heappop(self._largest)
            if self.length_at.get(start) == -length:
                return start
