"""The runner that fits a shard: of a whole model or of a stage, on a CPU or on a GPU, with the same calls."""

from __future__ import annotations

from typing import Protocol

from runtime.model.communicator import Communicator
from runtime.model.pipe import Pipe
from runtime.model.runner import Runner, Watch
from runtime.model.shard import Shard
from runtime.model.stage_runner import StageRunner
from runtime.types import StepPlan, StepResult


class StepRunner(Protocol):
    """One rank of a group. Calls must be made in the same order on every rank."""

    comm: Communicator
    watch: Watch | None

    @property
    def cache_bytes(self) -> int: ...

    def execute(self, plan: StepPlan) -> StepResult: ...


def make_runner(
    shard,
    comm: Communicator,
    *,
    total_blocks: int,
    block_size: int,
    max_positions: int,
    pipe: Pipe | None = None,
    draft=None,
) -> StepRunner:
    """shard: a `Shard` or a `GpuShard`; `pipe`: to the other stages, if the shard is of one;
    `draft`: a shard of a draft model, of the same kind (in one stage). Takes the memory for KV."""
    settings = {"total_blocks": total_blocks, "block_size": block_size, "max_positions": max_positions}
    if isinstance(shard, Shard):
        if pipe is not None:
            return StageRunner(shard, comm, pipe, **settings)
        return Runner(shard, comm, **settings, draft=draft)
    from runtime.model.gpu.runner import GpuRunner  # brings Triton along
    from runtime.model.gpu.stage_runner import GpuStageRunner

    if pipe is not None:
        return GpuStageRunner(shard, comm, pipe, **settings)
    return GpuRunner(shard, comm, **settings, draft=draft)


def answers(runner: StepRunner) -> bool:
    """Whether this rank's results are those of all: rank 0 of the last stage."""
    pipe = getattr(runner, "pipe", None)
    return runner.comm.rank == 0 and (pipe is None or pipe.last)
