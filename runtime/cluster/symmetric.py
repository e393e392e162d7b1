"""Small exchanges between GPUs of one host through torch's symmetric memory: a rank reads its peers' buffers.

One barrier before and one after, both on the device, and no reduction: what arrives is added by the caller,
in the tree's order. Not verified on several GPUs yet; `open_symmetric` tries an exchange and declines if
anything about it is not as it should be.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

MOST = 1 << 20  # bytes of a rank's payload


class SymmetricGather:
    """Payloads of up to MOST bytes, from every rank to every rank. The same calls on every rank."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        import torch.distributed._symmetric_memory as symmetric

        self._own = symmetric.empty(MOST, dtype=torch.uint8, device=device)
        self._handle = symmetric.rendezvous(self._own, group.group_name)
        ranks = range(dist.get_world_size(group))
        self._all = [self._handle.get_buffer(rank, (MOST,), torch.uint8) for rank in ranks]

    def all_gather(self, mine: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
        self._own[: mine.numel()].copy_(mine)
        self._handle.barrier(channel=0)  # all have written
        parts = [peer[:size].clone() for peer, size in zip(self._all, sizes, strict=True)]
        self._handle.barrier(channel=1)  # all have read: buffers may be written again
        return parts


def open_symmetric(group: dist.ProcessGroup, device: torch.device, rank: int) -> SymmetricGather | None:
    """None, on every rank alike, where the GPUs, the driver or torch do not offer it."""
    found, right = None, False
    try:
        found = SymmetricGather(group, device)
        size = dist.get_world_size(group)
        sizes = [1000 + peer for peer in range(size)]
        got = found.all_gather(torch.full((sizes[rank],), rank, dtype=torch.uint8, device=device), sizes)
        right = all(bool((part == peer).all()) for peer, part in enumerate(got))
    except (RuntimeError, ImportError, AttributeError, NotImplementedError):
        right = False
    agreed = torch.tensor([int(right)], device=device)
    dist.all_reduce(agreed, op=dist.ReduceOp.MIN, group=group)
    return found if int(agreed) else None
