"""The runner that fits a shard: on a CPU or on a GPU, with the same calls."""

from __future__ import annotations

from typing import Protocol

from runtime.model.communicator import Communicator
from runtime.model.runner import Runner, Watch
from runtime.model.shard import Shard
from runtime.types import StepPlan, StepResult


class StepRunner(Protocol):
    """One rank of a group. Calls must be made in the same order on every rank."""

    comm: Communicator
    watch: Watch | None

    @property
    def cache_bytes(self) -> int: ...

    def execute(self, plan: StepPlan) -> StepResult: ...


def make_runner(
    shard, comm: Communicator, *, total_blocks: int, block_size: int, max_positions: int
) -> StepRunner:
    """shard: a `Shard` or a `GpuShard`. Takes the memory for KV."""
    settings = {"total_blocks": total_blocks, "block_size": block_size, "max_positions": max_positions}
    if isinstance(shard, Shard):
        return Runner(shard, comm, **settings)
    from runtime.model.gpu.runner import GpuRunner  # brings Triton along

    return GpuRunner(shard, comm, **settings)
