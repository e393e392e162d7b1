"""Captures work in CUDA graphs that share one pool of memory. Knows nothing of what the work is.

A graph keeps the memory of what it computes with for as long as it lives. In pools of their own, hundreds of
graphs would take hundreds of times that; in one pool each takes what the one before it gave back. So they
must not be replayed at once, and what one leaves in its pool is gone when another is replayed: work writes
its results to memory from outside.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from kernels.gpu.overlap import overlap
from kernels.gpu.tuning import overlap_pays

FLOOR = 512 << 20  # bytes that must be free for another graph: what is not captured needs memory as well


class Graphs:
    def __init__(self, device: torch.device):
        self.device = device
        self._pool: tuple[int, int] | None = None

    def room(self) -> bool:
        """Whether the device has memory for one more. Takes milliseconds: to be asked once for each."""
        torch.cuda.empty_cache()  # as a capture does before it begins
        free, _ = torch.cuda.mem_get_info(self.device)
        return free >= FLOOR

    def record(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """A graph of `work`, which is run once before, to compile what is not compiled yet."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream())
        with overlap(overlap_pays(self.device)):
            with torch.cuda.stream(side):
                work()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # Another thread may be waiting for the last plan's tokens, which is no part of the capture.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                work()
        return graph
