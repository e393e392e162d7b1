"""Executes step plans on one rank of one stage among several.

Every stage sees every plan and keeps every sequence's tokens and block table. The first takes the tokens of a
plan, each sends the residual stream on, and the last samples, answers, and tells the others what came of it.
A stage goes on to the next plan without waiting for that, unless the plan runs a token that it was not told
yet; so as many stages work at once as there are plans in flight.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from runtime.model.communicator import Communicator
from runtime.model.pipe import Pipe
from runtime.model.runner import Runner, _Sequence
from runtime.model.shard import Shard
from runtime.model.stage_link import StageLink
from runtime.types import SequenceStart, StepPlan, StepResult

Observe = Callable[[int, float, float], None]
"""Sees a step's number and when its work began and ended here (monotonic seconds), waits left out."""


class StageRunner(Runner):
    """One rank of a stage. Calls must be made in the same order on every rank of every stage."""

    def __init__(self, shard: Shard, comm: Communicator, pipe: Pipe, **settings: int):
        """`settings` as of a Runner."""
        super().__init__(shard, comm, **settings)
        self.pipe = pipe
        self.observe: Observe | None = None
        self._link = StageLink(pipe, comm)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Run one plan. Rank 0 of the last stage returns what was sampled; other stages nothing."""
        self._apply(plan)
        if not plan.chunks:
            return StepResult(plan.step, ())
        pipe, link, forward = self.pipe, self._link, self.forward
        if not pipe.last:
            link.catch_up([(self._sequences[c.slot].tokens, c.start + c.length) for c in plan.chunks])
        began = time.monotonic()
        batch = self._batch(plan.chunks)
        if pipe.stage == 0:
            x = forward.embed(batch.tokens)
        else:
            waited = time.monotonic()
            x = link.receive(batch.tokens.shape[0], forward.shard.spec.hidden)
            began += time.monotonic() - waited
        x = forward.layers(x, batch)
        chosen = [chunk for chunk in plan.chunks if chunk.samples]
        if pipe.last:
            result = self._conclude(plan.step, plan.chunks, forward.normalised(x, batch))
            if chosen:
                link.tell(chosen, result)
        else:
            link.send(x)
            if chosen:
                link.expect([self._sequences[chunk.slot].tokens for chunk in chosen])
            result = StepResult(plan.step, ())
        if self.observe is not None:
            self.observe(plan.step, began, time.monotonic())
        return result

    def _begin(self, start: SequenceStart) -> _Sequence:
        if self.pipe.last:
            return super()._begin(start)
        return _Sequence(list(start.tokens), None, start.params.logprobs is not None)
