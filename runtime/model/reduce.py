"""The sum over units: one tree, whoever holds which units.

A row-parallel product yields a partial sum a unit. A rank folds those of its units that form whole subtrees,
ranks exchange subtrees, and all fold the rest in the same order. Partials are in the operator's type and
are added in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from runtime.model.communicator import Communicator
from runtime.model.units import Span, fold, rank_units, subtrees

LARGE = 256 * 1024  # bytes of one rank's payload from which ranks exchange slices instead of wholes


def _add(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a + b in fp32. May reuse a's memory; bf16 leaves widen exactly."""
    return a.add_(b) if a.dtype == torch.float32 else a.float().add_(b)


class UnitSum:
    """Folds partials of one kind (attention output, or FFN) over the units of a group."""

    def __init__(
        self,
        empty: Sequence[bool],
        comm: Communicator,
        leaf_dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ):
        """`empty[u]` says that unit u contributes nothing to this kind of sum. device: of the partials, and
        so of the payload of a rank that has none."""
        units = len(empty)
        self.units = units
        self.comm = comm
        self.leaf_dtype = leaf_dtype
        self.device = device
        runs = rank_units(units, comm.size)
        self.run = runs[comm.rank]
        self.spans: list[list[Span]] = [
            [span for span in subtrees(run, units) if not all(empty[span[0] : span[1]])] for run in runs
        ]
        self._single = {
            span: sum(not empty[u] for u in range(*span)) == 1 for spans in self.spans for span in spans
        }
        for spans in self.spans:
            spans.sort(key=lambda span: self._single[span])  # fp32 first: payloads then keep its alignment
        # The folds within this rank, as (into, other) pairs of partials in the order they are done, and the
        # partial in which each of its subtrees ends up. Where one rank holds all units it is number 0.
        self._order: list[tuple[int, int]] = []
        held = [u for u in range(*self.run) if not empty[u]]
        leaves = {(u, u + 1): None if empty[u] else held.index(u) for u in range(*self.run)}
        self._first = [fold(leaves, span, self._note) for span in self.spans[comm.rank]]
        self.order = tuple(self._order)
        self._full_missing = {
            span: None for run in runs for span in subtrees(run, units) if all(empty[span[0] : span[1]])
        }

    def __call__(self, partials: Sequence[torch.Tensor], m: int, width: int) -> torch.Tensor:
        """partials [m, width] of the non-empty units held here, in order -> fp32 [m, width], the same on
        every rank. Consumes its input."""
        sums = list(partials)
        for into, other in self._order:
            sums[into] = _add(sums[into], sums[other])
        if self.comm.size == 1:
            return sums[0].float()
        return self.exchange([sums[first] for first in self._first], m, width)

    def exchange(self, mine: list[torch.Tensor], m: int, width: int) -> torch.Tensor:
        """Fold across ranks: `mine` holds the sum [m, width] of each of `spans[rank]`, in their order."""
        if m * width * 4 >= LARGE:
            return self._sliced(mine, m, width)
        return self._whole(mine, m, width)

    def _note(self, into: int, other: int) -> int:
        self._order.append((into, other))
        return into

    def _type(self, span: Span) -> torch.dtype:
        return self.leaf_dtype if self._single[span] else torch.float32

    def _size(self, rank: int, m: int, width: int) -> int:
        return sum(m * width * self._type(span).itemsize for span in self.spans[rank])

    def _pack(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The bytes of tensors, one after another."""
        flat = [t.contiguous().view(-1).view(torch.uint8) for t in tensors]
        if not flat:
            return torch.empty(0, dtype=torch.uint8, device=self.device)
        return flat[0] if len(flat) == 1 else torch.cat(flat)

    def _unpack(self, payloads: list[torch.Tensor], m: int, width: int) -> torch.Tensor:
        leaves = dict(self._full_missing)
        for rank, payload in enumerate(payloads):
            at = 0
            for span in self.spans[rank]:
                kind = self._type(span)
                size = m * width * kind.itemsize
                leaves[span] = payload[at : at + size].view(kind).view(m, width)
                at += size
        # Payloads may be another thread's tensors: the first addition must not write into them.
        return fold(leaves, (0, self.units), _add_fresh).float()

    def _whole(self, mine: list[torch.Tensor], m: int, width: int) -> torch.Tensor:
        sizes = [self._size(rank, m, width) for rank in range(self.comm.size)]
        return self._unpack(self.comm.all_gather(self._pack(mine), sizes), m, width)

    def _sliced(self, mine: list[torch.Tensor], m: int, width: int) -> torch.Tensor:
        """Each rank folds one slice of the columns and hands it round: less to send than wholes."""
        n = self.comm.size
        cuts = [width * r // n for r in range(n + 1)]
        outgoing = [self._pack([t[:, cuts[r] : cuts[r + 1]] for t in mine]) for r in range(n)]
        own = cuts[self.comm.rank + 1] - cuts[self.comm.rank]
        arrived = self.comm.all_to_all(outgoing, [self._size(r, m, own) for r in range(n)])
        folded = self._unpack(arrived, m, own)
        sizes = [m * (cuts[r + 1] - cuts[r]) * 4 for r in range(n)]
        slices = self.comm.all_gather(self._pack([folded]), sizes)
        return torch.cat([s.view(torch.float32).view(m, -1) for s in slices], dim=1)


def _add_fresh(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.float() + b
