"""A rank's dealings with the other stages: the residual stream goes on, and the tokens that were sampled come
back. The same on CPUs and GPUs: a pipe carries host tensors, so those of a GPU are copied there and back."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

from runtime.model.communicator import Communicator
from runtime.model.pipe import Pipe
from runtime.model.units import Span
from runtime.types import Chunk, StepResult


class StageLink:
    """Calls must be made in the same order on every rank of every stage."""

    def __init__(self, pipe: Pipe, comm: Communicator, device: torch.device | str = "cpu"):
        """comm: of the ranks of this stage, whose tensors are on `device`."""
        self.pipe = pipe
        self._comm = comm
        self._device = torch.device(device)
        # The tokens of those who sampled in each plan whose tokens this stage was not told yet, oldest first.
        self._untold: deque[list[list]] = deque()

    def send(self, x: torch.Tensor) -> None:
        """Give the next stage this rank's share of x fp32 [M, H], which all ranks of a stage hold whole. x is
        not to be changed afterwards."""
        start, stop = _cuts(x.numel(), self._comm.size)[self._comm.rank]
        self.pipe.send(_on_host(x.view(-1)[start:stop]))

    def receive(self, rows: int, width: int) -> torch.Tensor:
        """fp32 [rows, width] of the stage before: a link between nodes carries it once, not once a rank."""
        cuts = _cuts(rows * width, self._comm.size)
        share = self.pipe.receive(cuts[self._comm.rank][1] - cuts[self._comm.rank][0])
        if self._device.type == "cuda":
            share = share.pin_memory().to(self._device, non_blocking=True)
        if self._comm.size == 1:
            return share.view(rows, width)
        sizes = [4 * (stop - start) for start, stop in cuts]
        parts = self._comm.all_gather(share.view(torch.uint8), sizes)
        return torch.cat(parts).view(torch.float32).view(rows, width)

    def tell(self, chosen: Sequence[Chunk], result: StepResult) -> None:
        """From the last stage to every other, for each token: in which row of `chosen` and which it is."""
        row_of = {chunk.slot: row for row, chunk in enumerate(chosen)}
        self.pipe.tell(torch.tensor([(row_of[choice.slot], choice.token) for choice in result.tokens]))

    def expect(self, sequences: list[list]) -> None:
        """A plan is under way whose tokens will be told: row i of it goes on with `sequences[i]`, which get
        them. A slot may belong to another by then."""
        self._untold.append(sequences)

    def catch_up(self, runs: Sequence[tuple[list, int]]) -> None:
        """Take in what the last stage has told, waiting only until each list of tokens of `runs` is as long
        as is said beside it."""
        while self._untold:
            known = all(len(tokens) >= length for tokens, length in runs)
            told = self.pipe.told(wait=not known)
            if told is None:
                return
            sequences = self._untold.popleft()
            for row, token in told.view(-1, 2).tolist():
                sequences[row].append(max(token, 0))  # as the last stage itself takes NO_TOKEN


def _on_host(x: torch.Tensor) -> torch.Tensor:
    if not x.is_cuda:
        return x
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    host.copy_(x, non_blocking=True)
    torch.cuda.current_stream(x.device).synchronize()
    return host


def _cuts(count: int, parts: int) -> list[Span]:
    """`count` numbers in as many spans, alike but for one."""
    return [(count * n // parts, count * (n + 1) // parts) for n in range(parts)]
