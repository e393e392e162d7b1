"""A model's stages on one device: runners of every rank of every stage, each in a thread of its own, played
as one runner is."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait

from runtime.model.communicator import Alone, Threads
from runtime.model.gpu.stage_runner import GpuStageRunner
from runtime.model.header import OpenModel
from runtime.model.pipe import ThreadPipe
from runtime.model.runners import answers, make_runner
from runtime.model.units import Span
from runtime.types import StepPlan, StepResult
from tests.gpu.play import BLOCK, shard_of


class Stages:
    """Takes plans as a GpuRunner does. Stages wait for what they need of each other alone."""

    def __init__(self, model: OpenModel, cuts: Sequence[Span], tp: int, *, positions: int, sequences: int):
        most = -(-positions // BLOCK)
        pipes = [ThreadPipe.group(len(cuts)) for _ in range(tp)]
        self.runners: list[GpuStageRunner] = []
        for stage, layers in enumerate(cuts):
            for comm in Threads.group(tp) if tp > 1 else [Alone()]:
                self.runners.append(
                    make_runner(
                        shard_of(model, comm, layers),
                        comm,
                        total_blocks=most * sequences,
                        block_size=BLOCK,
                        max_positions=most * BLOCK,
                        pipe=pipes[comm.rank][stage],
                    )
                )
        self._threads = [ThreadPoolExecutor(1) for _ in self.runners]

    def launch(self, plan: StepPlan) -> list[Future[StepResult]]:
        return [
            thread.submit(self._run, runner, plan)
            for thread, runner in zip(self._threads, self.runners, strict=True)
        ]

    def collect(self, launched: list[Future[StepResult]]) -> StepResult:
        """What the rank that answers says; the others say nothing of scores, and early stages nothing."""
        done, missing = wait(launched, 240, return_when=FIRST_EXCEPTION)
        results = [future.result(0) for future in launched if future in done]
        assert not missing
        for runner, result in zip(self.runners, results, strict=True):
            assert runner.pipe.last or not result.tokens
        (told,) = (r for runner, r in zip(self.runners, results, strict=True) if answers(runner))
        return told

    def execute(self, plan: StepPlan) -> StepResult:
        return self.collect(self.launch(plan))

    def close(self) -> None:
        for thread in self._threads:
            thread.shutdown()

    def _run(self, runner: GpuStageRunner, plan: StepPlan) -> StepResult:
        try:
            return runner.execute(plan)
        except BaseException:
            runner.pipe.close()
            if isinstance(runner.comm, Threads):
                runner.comm.close()
            raise
