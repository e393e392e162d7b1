"""Executes step plans on one rank's GPU of one stage among several, as `runtime.model.stage_runner` does on a
CPU, with the same dealings between stages.

A plan's work ends before the next one's begins: the residual stream leaves through the host, and so do the
tokens. Stages overlap by plans, of which as many are in flight as there are stages. Steps are not captured.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from runtime.model.communicator import Communicator
from runtime.model.gpu.forward import GpuBatch
from runtime.model.gpu.runner import GpuRunner, _Sequence
from runtime.model.gpu.shard import GpuShard
from runtime.model.pipe import Pipe
from runtime.model.stage_link import StageLink
from runtime.model.stage_runner import Observe
from runtime.types import Chunk, SequenceStart, StepPlan, StepResult


class GpuStageRunner(GpuRunner):
    """One rank of a stage. Calls must be made in the same order on every rank of every stage."""

    def __init__(self, shard: GpuShard, comm: Communicator, pipe: Pipe, **settings: int):
        """`settings` as of a GpuRunner, without a draft model or graphs."""
        super().__init__(shard, comm, **settings, graphs=False)
        self.pipe = pipe
        self.observe: Observe | None = None
        self._link = StageLink(pipe, comm, shard.device)
        self._waited = 0.0  # seconds of the plan at hand that the stage before took

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Run one plan. Rank 0 of the last stage returns what was sampled; other stages nothing."""
        if not plan.chunks:
            self._apply(plan)
            return StepResult(plan.step, ())
        return self._conclude(plan) if self.pipe.last else self._pass_on(plan)

    def _pass_on(self, plan: StepPlan) -> StepResult:
        """A plan's work in a stage that has another after it."""
        self._apply(plan)
        self._link.catch_up([(self._sequences[c.slot].tokens, c.start + c.length) for c in plan.chunks])
        began = time.monotonic()
        x, _ = self._residual(plan.chunks)
        self._link.send(x)
        chosen = [self._sequences[chunk.slot].tokens for chunk in plan.chunks if chunk.samples]
        if chosen:
            self._link.expect(chosen)
        self._note(plan.step, began)
        return StepResult(plan.step, ())

    def _conclude(self, plan: StepPlan) -> StepResult:
        """A plan's work in the last stage, which samples at once: nothing here is a plan ahead."""
        began = time.monotonic()
        launched = self.launch(plan)
        result = self.collect(launched)
        if launched.chunks:
            self._link.tell(launched.chunks, result)
        self._note(plan.step, began)
        return result

    def _logits(self, chunks: Sequence[Chunk]) -> torch.Tensor | None:
        """fp32 [wanted, V] at rank 0 of the last stage, as of a GpuRunner."""
        return self.forward.head(*self._residual(chunks))

    def _residual(self, chunks: Sequence[Chunk]) -> tuple[torch.Tensor, GpuBatch]:
        """The residual stream fp32 [M, H] after this stage's layers, which write their KV; and the rows."""
        runs, _ = self._runs(chunks)
        batch = self.steps.batch(runs)
        self._waited = 0.0
        if self.pipe.stage == 0:
            x = self.forward.embed(batch.tokens)
        else:
            started = time.monotonic()
            x = self._link.receive(batch.tokens.shape[0], self.forward.shard.spec.hidden)
            self._waited = time.monotonic() - started
        return self.forward.layers(x, batch), batch

    def _note(self, step: int, began: float) -> None:
        if self.observe is not None:
            self.observe(step, began + self._waited, time.monotonic())

    def _begin(self, start: SequenceStart) -> _Sequence:
        if self.pipe.last:
            return super()._begin(start)
        return _Sequence(list(start.tokens), start.params.logprobs)
