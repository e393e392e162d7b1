"""What the ranks of a tensor-parallel group need of each other, and the two ways of being alone.

The model is written against `Communicator`; sockets and torch.distributed stand behind it elsewhere.
Payloads are flat uint8 tensors, since what ranks exchange differs in size from rank to rank.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol

import torch

from runtime.errors import Unavailable


class Communicator(Protocol):
    """A group of `size` ranks that make the same calls in the same order. Calls block; a lost peer
    raises Unavailable."""

    rank: int
    size: int

    def all_gather(self, mine: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
        """Every rank's payload, in rank order; `sizes` are their bytes."""

    def all_to_all(self, outgoing: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[torch.Tensor]:
        """outgoing[r] goes to rank r; returns what each rank sent here, `sizes` bytes of it."""

    def gather(self, mine: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor] | None:
        """Every rank's payload at rank 0; None elsewhere."""

    def broadcast(self, payload: torch.Tensor | None, size: int) -> torch.Tensor:
        """Rank 0's payload of `size` bytes, on every rank."""


class Alone:
    """A group of one."""

    rank = 0
    size = 1

    def all_gather(self, mine: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
        return [mine]

    def all_to_all(self, outgoing: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[torch.Tensor]:
        return list(outgoing)

    def gather(self, mine: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor] | None:
        return [mine]

    def broadcast(self, payload: torch.Tensor | None, size: int) -> torch.Tensor:
        assert payload is not None
        return payload


class _Board:
    """Where the threads of one process leave payloads for each other."""

    def __init__(self, size: int):
        self.slots: list[object] = [None] * size
        self.barrier = threading.Barrier(size)


class Threads:
    """One rank of a group whose ranks are threads of this process."""

    def __init__(self, rank: int, board: _Board):
        self.rank = rank
        self.size = len(board.slots)
        self._board = board

    @staticmethod
    def group(size: int) -> list[Threads]:
        board = _Board(size)
        return [Threads(rank, board) for rank in range(size)]

    def close(self) -> None:
        """Wake every thread that waits for this one; their calls raise Unavailable."""
        self._board.barrier.abort()

    def _exchange(self, mine: object) -> list:
        try:
            self._board.slots[self.rank] = mine
            self._board.barrier.wait()
            seen = list(self._board.slots)
            self._board.barrier.wait()  # nobody overwrites a slot that another has yet to read
        except threading.BrokenBarrierError:
            raise Unavailable("a rank of this process stopped") from None
        return seen

    def all_gather(self, mine: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
        return self._exchange(mine)

    def all_to_all(self, outgoing: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[torch.Tensor]:
        return [sent[self.rank] for sent in self._exchange(outgoing)]

    def gather(self, mine: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor] | None:
        seen = self._exchange(mine)
        return seen if self.rank == 0 else None

    def broadcast(self, payload: torch.Tensor | None, size: int) -> torch.Tensor:
        return self._exchange(payload)[0]
