"""A model's steps on one rank's GPU: its KV cache, its forward pass, and the graphs captured of it.

Steps of few rows whose logits are all wanted (decode, guesses) run in shapes of a few sizes, each captured in
a CUDA graph when it first comes up and replayed from then on; padding rows write nothing and no other row can
see them. Other steps run as they are, and so do those that come up when memory is short. All that steps keep
beside their weights and KV is taken once, for the largest of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from kernels.gpu.attention import workspace_floats
from runtime.model.batch import Run
from runtime.model.communicator import Communicator
from runtime.model.gpu.batch import BUCKETS, Shape, Unseen, captured_shape, make_batch
from runtime.model.gpu.forward import GpuBatch, GpuForward
from runtime.model.gpu.graphs import Graphs
from runtime.model.gpu.shard import FP8, GpuShard

MOST_WORKSPACE = 1 << 30  # bytes
_CHANGING = ("tokens", "positions", "slots", "block_table", "query_start", "context_len")


def workspace_room(heads: int, head_dim: int, positions: int) -> int:
    """fp32 elements of attention's workspace that are kept for steps of a rank with so many query heads, in
    which a sequence has up to `positions` positions."""
    return min(workspace_floats(BUCKETS[-1], heads, head_dim, positions), MOST_WORKSPACE // 4)


def logits_room(vocab: int) -> int:
    """fp32 elements of the logits of the largest captured step."""
    return BUCKETS[-1] * vocab


@dataclass(slots=True)
class Captured:
    """A graph with the tensors it reads; it writes the first rows of `Steps`' logits."""

    graph: torch.cuda.CUDAGraph
    batch: GpuBatch


class Steps:
    """Calls must be made in the same order on every rank of a group."""

    def __init__(
        self,
        shard: GpuShard,
        comm: Communicator,
        *,
        total_blocks: int,
        block_size: int,
        max_positions: int,
        graphs: bool | None = None,
    ):
        """`graphs`: capture; None: on a GPU of a group of one, since what ranks exchange through the host
        cannot be captured."""
        spec = shard.spec
        held = shard.units[shard.run[0] : shard.run[1]]
        kv_heads = held[-1].kv_heads[1] - held[0].kv_heads[0]
        shape = (len(shard.layers), total_blocks, 2, kv_heads, block_size, spec.head_dim)
        cache = torch.zeros(shape, dtype=shard.kv_dtype, device=shard.device)
        scales = None
        if shard.kv_dtype == FP8:
            scales = torch.zeros(shape[:-1], dtype=torch.float32, device=shard.device)
        self.forward = GpuForward(shard, cache, comm, max_positions, scales)
        self.graphs = graphs if graphs is not None else shard.device.type == "cuda" and comm.size == 1
        self._block_size = block_size
        self._most_blocks = -(-max_positions // block_size)
        room = workspace_room(self.forward.heads, spec.head_dim, self._most_blocks * block_size)
        self.forward.workspace = torch.empty(room, dtype=torch.float32, device=shard.device)
        self.recorder = Graphs(shard.device)
        self._captured: dict[Shape, Captured] = {}
        self._refused: set[Shape] = set()  # came up when memory was short
        self._logits: torch.Tensor | None = None  # what graphs write: fp32 [most rows, V]

    @property
    def device(self) -> torch.device:
        return self.forward.shard.device

    @property
    def cache_bytes(self) -> int:
        forward = self.forward
        return forward.cache.nbytes + (0 if forward.scales is None else forward.scales.nbytes)

    def logits(self, runs: Sequence[Run], unseen: Unseen | None = None) -> torch.Tensor | None:
        """fp32 [wanted, V] at rank 0: rows of samples in the order of `runs`, then scored ones. To be used
        before the next call, which may write over it."""
        shape = captured_shape(runs, self._most_blocks) if self.graphs else None
        if shape is None or not self._captures(shape):
            return self.forward.logits(self._batch(runs, None, unseen))
        batch = self._batch(runs, shape, unseen)
        captured = self._captured.get(shape)
        if captured is None:
            captured = self._captured[shape] = self._capture(batch)
        for name in _CHANGING:
            getattr(captured.batch, name).copy_(getattr(batch, name))
        captured.graph.replay()
        return None if self._logits is None else self._logits[: sum(len(run.tokens) for run in runs)]

    def batch(self, runs: Sequence[Run]) -> GpuBatch:
        """The rows of `runs`, whose tokens are all known, for a step that runs in parts."""
        return self._batch(runs, None, None)

    def _batch(self, runs: Sequence[Run], shape: Shape | None, unseen: Unseen | None) -> GpuBatch:
        """Attention that the workspace has no room for is streamed, to the same bits."""
        batch = make_batch(runs, self._block_size, self.device, shape=shape, unseen=unseen)
        sequences, blocks = batch.block_table.shape
        forward, positions = self.forward, blocks * self._block_size
        needed = workspace_floats(
            sequences, forward.heads, forward.shard.spec.head_dim, positions, split_rows=batch.split_rows
        )
        return batch if needed <= forward.workspace.numel() else replace(batch, split_rows=0)

    def _captures(self, shape: Shape) -> bool:
        """Whether there is a graph of this shape, or memory for one; asked for once."""
        if shape in self._captured:
            return True
        if shape not in self._refused and not self.recorder.room():
            self._refused.add(shape)
        return shape not in self._refused

    def _capture(self, batch: GpuBatch) -> Captured:
        """A graph of the step of `batch`, whose tensors it keeps."""
        forward = self.forward
        if self._logits is None and forward.comm.rank == 0:
            vocab = forward.shard.spec.vocab
            self._logits = torch.empty(logits_room(vocab), dtype=torch.float32, device=self.device)
            self._logits = self._logits.view(-1, vocab)

        def work() -> None:
            logits = forward.logits(batch)
            if logits is not None:
                self._logits[: len(logits)].copy_(logits)

        return Captured(self.recorder.record(work), batch)
