"""The exchanges of a stage's ranks on GPUs: symmetric memory for small payloads where there is such, NCCL for
the rest.

Payloads are bytes on the device. NCCL moves whole buffers of one size, so those that differ are padded; what
is added to what stays with the caller, who adds in the tree's order: nothing is reduced here. Not verified
on several GPUs yet (docs/gpu/README.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from runtime.cluster.peers import SocketCommunicator
from runtime.cluster.symmetric import MOST, open_symmetric
from runtime.errors import Unavailable


class GpuCommunicator:
    """A `Communicator` for tensors on this rank's device. `host` has brought torch.distributed up."""

    def __init__(self, host: SocketCommunicator, backend: str = "nccl", device: torch.device | str = "cuda"):
        self.rank, self.size = host.rank, host.size
        self._host = host
        self._device = torch.device(device)
        try:
            # Every rank has a part in making every stage's group, in the same order.
            for first in range(0, host.mesh.size, host.size):
                group = dist.new_group(list(range(first, first + host.size)), backend=backend)
                if first == host.first:
                    self._group = group
        except (RuntimeError, ValueError) as error:
            raise Unavailable(f"rank {self.rank}: {backend} does not start: {_line(error)}") from None
        self._small = None
        if self._device.type == "cuda":
            self._small = open_symmetric(self._group, self._device, self.rank)

    def close(self) -> None:
        self._host.close()

    def all_gather(self, mine: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
        widest = max(1, *sizes)
        if self._small is not None and widest <= MOST:
            return self._small.all_gather(mine, sizes)
        parts = [torch.empty(widest, dtype=torch.uint8, device=self._device) for _ in sizes]
        self._call(dist.all_gather, parts, self._padded(mine, widest))
        return [part[:size] for part, size in zip(parts, sizes, strict=True)]

    def all_to_all(self, outgoing: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[torch.Tensor]:
        arrived = [torch.empty(size, dtype=torch.uint8, device=self._device) for size in sizes]
        arrived[self.rank] = outgoing[self.rank]
        moves = []
        for step in range(1, self.size):
            to, source = (self.rank + step) % self.size, (self.rank - step) % self.size
            moves.append(
                dist.P2POp(dist.isend, outgoing[to].contiguous(), self._host.first + to, self._group)
            )
            moves.append(dist.P2POp(dist.irecv, arrived[source], self._host.first + source, self._group))
        moves = [move for move in moves if move.tensor.numel()]
        works = self._call(dist.batch_isend_irecv, moves, group=False) if moves else []
        for work in works:
            self._call(work.wait, group=False)
        return arrived

    def gather(self, mine: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor] | None:
        parts = self.all_gather(mine, sizes)
        return parts if self.rank == 0 else None

    def broadcast(self, payload: torch.Tensor | None, size: int) -> torch.Tensor:
        """Tokens, which live on the host on either side."""
        return self._host.broadcast(payload, size)

    def _padded(self, payload: torch.Tensor, size: int) -> torch.Tensor:
        if payload.numel() == size:
            return payload.contiguous()
        return torch.nn.functional.pad(payload, (0, size - payload.numel()))

    def _call(self, function, *args, group: bool = True):
        try:
            return function(*args, **({"group": self._group} if group else {}))
        except RuntimeError as error:
            raise Unavailable(f"rank {self.rank} lost a peer: {_line(error)}") from None


def _line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
