"""A model's steps on one rank's GPU: its KV cache, its forward pass, and the graphs captured of it.

Steps of few rows whose logits are all wanted (decode, guesses) run in shapes of a few sizes, each captured in
a CUDA graph when it first comes up and replayed from then on; padding rows write nothing and no other row can
see them. Other steps run as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kernels.gpu.overlap import overlap
from kernels.gpu.tuning import overlap_pays
from runtime.model.batch import Run
from runtime.model.communicator import Communicator
from runtime.model.gpu.batch import Shape, Unseen, captured_shape, make_batch
from runtime.model.gpu.forward import GpuBatch, GpuForward
from runtime.model.gpu.shard import FP8, GpuShard

_CHANGING = ("tokens", "positions", "slots", "block_table", "query_start", "context_len")


@dataclass(slots=True)
class Captured:
    """A graph with the tensors it reads and the one it writes."""

    graph: torch.cuda.CUDAGraph
    batch: GpuBatch
    logits: torch.Tensor | None


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
        self._captured: dict[Shape, Captured] = {}

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
        batch = make_batch(runs, self._block_size, self.device, shape=shape, unseen=unseen)
        if shape is None:
            return self.forward.logits(batch)
        captured = self._captured.get(shape)
        if captured is None:
            captured = self._captured[shape] = self.capture(batch)
        for name in _CHANGING:
            getattr(captured.batch, name).copy_(getattr(batch, name))
        captured.graph.replay()
        rows = sum(len(run.tokens) for run in runs)
        return None if captured.logits is None else captured.logits[:rows]

    def batch(self, runs: Sequence[Run]) -> GpuBatch:
        """The rows of `runs`, whose tokens are all known, for a step that runs in parts."""
        return make_batch(runs, self._block_size, self.device)

    def capture(self, batch: GpuBatch) -> Captured:
        """A graph of the step of `batch`, whose tensors it keeps."""
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream())
        with overlap(overlap_pays(self.device)):
            with torch.cuda.stream(side):  # compiles what is not compiled yet
                self.forward.logits(batch)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # Another thread may be waiting for the last plan's tokens, which is no part of the capture.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                logits = self.forward.logits(batch)
        return Captured(graph, batch, logits)
