"""A priority queue of sequences from which finished ones fall out lazily.

Finishing one costs nothing here; the dead are skipped at the front, and swept once they are the majority.
"""

from __future__ import annotations

import heapq
from typing import Any

from runtime.engine.sequence import Sequence


class SequenceQueue:
    """Smallest key first; keys order totally (they end in something unique)."""

    def __init__(self) -> None:
        self._heap: list[tuple[Any, Sequence]] = []
        self._dead = 0

    def __len__(self) -> int:
        return len(self._heap) - self._dead

    def push(self, key: Any, sequence: Sequence) -> None:
        heapq.heappush(self._heap, (key, sequence))

    def peek(self) -> tuple[Any, Sequence] | None:
        """The smallest key and its sequence."""
        while self._heap and self._heap[0][1].finished:
            heapq.heappop(self._heap)
            self._dead -= 1
        return self._heap[0] if self._heap else None

    def pop(self) -> Sequence:
        """Removes what `peek` showed."""
        return heapq.heappop(self._heap)[1]

    def note_finished(self) -> None:
        """One sequence in this queue was just marked finished."""
        self._dead += 1
        if self._dead > len(self._heap) // 2 + 32:
            self._heap = [entry for entry in self._heap if not entry[1].finished]
            heapq.heapify(self._heap)
            self._dead = 0

    def live(self) -> list[Sequence]:
        """Every live sequence, in no order."""
        return [sequence for _, sequence in self._heap if not sequence.finished]
