"""Executes step plans on one rank of one stage among several.

Every stage sees every plan and keeps every sequence's tokens and block table. The first takes the tokens of a
plan, each sends the residual stream on, and the last samples, answers, and tells the others what came of it.
A stage goes on to the next plan without waiting for that, unless the plan runs a token that it was not told
yet; so as many stages work at once as there are plans in flight.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import torch

from runtime.model.communicator import Communicator
from runtime.model.pipe import Pipe
from runtime.model.runner import Runner, _Sequence
from runtime.model.shard import Shard
from runtime.model.units import Span
from runtime.types import Chunk, SequenceStart, StepPlan, StepResult

Observe = Callable[[int, float, float], None]
"""Sees a step's number and when its work began and ended here (monotonic seconds), waits left out."""


class StageRunner(Runner):
    """One rank of a stage. Calls must be made in the same order on every rank of every stage."""

    def __init__(self, shard: Shard, comm: Communicator, pipe: Pipe, **settings: int):
        """`settings` as of a Runner."""
        super().__init__(shard, comm, **settings)
        self.pipe = pipe
        self.observe: Observe | None = None
        # Who sampled in each plan whose tokens this stage was not told yet, oldest first.
        self._untold: deque[list[_Sequence]] = deque()

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Run one plan. Rank 0 of the last stage returns what was sampled; other stages nothing."""
        self._apply(plan)
        if not plan.chunks:
            return StepResult(plan.step, ())
        pipe, forward = self.pipe, self.forward
        if not pipe.last:
            self._catch_up(plan.chunks)
        began = time.monotonic()
        batch = self._batch(plan.chunks)
        if pipe.stage == 0:
            x = forward.embed(batch.tokens)
        else:
            waited = time.monotonic()
            x = self._receive(batch.tokens.shape[0])
            began += time.monotonic() - waited
        x = forward.layers(x, batch)
        chosen = [chunk for chunk in plan.chunks if chunk.samples]
        if pipe.last:
            result = self._conclude(plan.step, plan.chunks, forward.normalised(x, batch))
            if chosen:
                self._tell(chosen, result)
        else:
            self._send(x)
            if chosen:
                self._untold.append([self._sequences[chunk.slot] for chunk in chosen])
            result = StepResult(plan.step, ())
        if self.observe is not None:
            self.observe(plan.step, began, time.monotonic())
        return result

    def _begin(self, start: SequenceStart) -> _Sequence:
        if self.pipe.last:
            return super()._begin(start)
        return _Sequence(list(start.tokens), None, start.params.logprobs is not None)

    def _send(self, x: torch.Tensor) -> None:
        """Give the next stage this rank's share of x [M, H], which all ranks of a stage hold whole."""
        start, stop = _cuts(x.numel(), self.comm.size)[self.comm.rank]
        self.pipe.send(x.view(-1)[start:stop])

    def _receive(self, rows: int) -> torch.Tensor:
        """fp32 [rows, H] of the stage before: a link between nodes carries it once, not once a rank."""
        width = self.forward.shard.spec.hidden
        cuts = _cuts(rows * width, self.comm.size)
        share = self.pipe.receive(cuts[self.comm.rank][1] - cuts[self.comm.rank][0])
        if self.comm.size == 1:
            return share.view(rows, width)
        sizes = [4 * (stop - start) for start, stop in cuts]
        parts = self.comm.all_gather(share.view(torch.uint8), sizes)
        return torch.cat(parts).view(torch.float32).view(rows, width)

    def _tell(self, chosen: list[Chunk], result: StepResult) -> None:
        """Tell every other stage, for each token, in which row of `chosen` and which it is."""
        row_of = {chunk.slot: row for row, chunk in enumerate(chosen)}
        self.pipe.tell(torch.tensor([(row_of[choice.slot], choice.token) for choice in result.tokens]))

    def _catch_up(self, chunks: tuple[Chunk, ...]) -> None:
        """Take in what the last stage has told, waiting for no more than `chunks` run."""
        while self._untold:
            known = all(
                len(self._sequences[chunk.slot].tokens) >= chunk.start + chunk.length for chunk in chunks
            )
            told = self.pipe.told(wait=not known)
            if told is None:
                return
            sequences = self._untold.popleft()
            for row, token in told.view(-1, 2).tolist():
                sequences[row].tokens.append(token)


def _cuts(count: int, parts: int) -> list[Span]:
    """`count` numbers in as many spans, alike but for one."""
    return [(count * n // parts, count * (n + 1) // parts) for n in range(parts)]
