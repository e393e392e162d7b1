"""What the ranks of neighbouring stages need of each other, and the way to have it inside one process.

A pipe runs through the ranks that hold the same units in every stage. The residual stream, or this rank's
share of it, goes from stage to stage; sampled tokens go from the last stage to every other, which needs them
for a later plan. Nobody waits for a receiver: what is sent lies there until it is wanted.
"""

from __future__ import annotations

import queue
from typing import Protocol

import torch

from runtime.errors import Unavailable


class Pipe(Protocol):
    """A rank's end of it. A lost neighbour raises Unavailable."""

    stage: int
    stages: int

    @property
    def last(self) -> bool:
        """Whether tokens are sampled here."""

    def send(self, x: torch.Tensor) -> None:
        """fp32 to the next stage; x is not to be changed afterwards."""

    def receive(self, count: int) -> torch.Tensor:
        """fp32 [count] of the stage before, which may be changed."""

    def tell(self, tokens: torch.Tensor) -> None:
        """From the last stage to every other: int64 of any shape."""

    def told(self, wait: bool) -> torch.Tensor | None:
        """The next int64 [n] that the last stage told, in order; None if it is not there and `wait` is not
        asked for."""

    def close(self) -> None:
        """Tell those who wait for this stage that nothing more will come."""


class ThreadPipe:
    """A pipe whose ends are threads of this process."""

    def __init__(self, stage: int, onward: list[queue.SimpleQueue], back: list[queue.SimpleQueue]):
        """onward[s] leads from stage s to s + 1, back[s] from the last stage to s."""
        self.stage = stage
        self.stages = len(onward) + 1
        self._onward, self._back = onward, back

    @staticmethod
    def group(stages: int) -> list[ThreadPipe]:
        onward, back = ([queue.SimpleQueue() for _ in range(stages - 1)] for _ in range(2))
        return [ThreadPipe(stage, onward, back) for stage in range(stages)]

    @property
    def last(self) -> bool:
        return self.stage == self.stages - 1

    def send(self, x: torch.Tensor) -> None:
        self._onward[self.stage].put(x.reshape(-1))

    def receive(self, count: int) -> torch.Tensor:
        x = _taken(self._onward[self.stage - 1])
        if x.numel() != count:
            raise ValueError(f"stage {self.stage} was sent {x.numel()} numbers for {count}")
        return x

    def tell(self, tokens: torch.Tensor) -> None:
        for told in self._back:
            told.put(tokens.reshape(-1))

    def told(self, wait: bool) -> torch.Tensor | None:
        waiting = self._back[self.stage]
        return None if not wait and waiting.empty() else _taken(waiting)

    def close(self) -> None:
        for ending in self._back if self.last else [self._onward[self.stage]]:
            ending.put(None)


def _taken(waiting: queue.SimpleQueue) -> torch.Tensor:
    value = waiting.get()
    if value is None:
        waiting.put(None)  # for whoever asks again
        raise Unavailable("a stage of this process stopped")
    return value
