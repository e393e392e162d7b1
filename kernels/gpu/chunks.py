"""Which sums a GEMM makes and in which order they are added: chunks of K, units, splits.

K is cut inside a unit into chunks of CHUNK columns, by the unit's width alone. Each chunk is summed from
zero; chunks fold in the tree over the unit's chunks, units in the tree over units. A launch may split that
tree into subtrees, each summed by other thread blocks: what is added to what does not change.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from kernels.gpu.tree import cut, merges

CHUNK = 2048  # columns; part of `numerics`
FIELDS = 4  # integers a leaf


@dataclass(frozen=True, slots=True)
class Schedule:
    """leaves: int32 [n, FIELDS]: unit, first column, last column + 1 (within the unit's width, up to whole
    blocks), additions that follow. spans: int32 [splits, 2]: the leaves of each split. depth: the most
    sums that wait at once, the two in registers left out."""

    leaves: torch.Tensor
    spans: torch.Tensor
    splits: int
    depth: int


@cache
def schedule(width: int, units: int, depth: int, device: torch.device) -> Schedule:
    """Leaves of `units` units of `width` columns, split at `depth` cuts from the root of the tree: over
    units, or over one unit's chunks where there is one unit. There are at most 2**depth splits."""
    chunks = [(at, min(at + CHUNK, -(-width // 128) * 128)) for at in range(0, width, CHUNK)]
    parts: list[list[tuple[int, int, int]]] = []  # of a split: unit, chunk, additions
    if units > 1:
        for start, stop in cut(units, depth):
            leaves = []
            for unit, after in zip(range(start, stop), merges(stop - start), strict=True):
                inside = merges(len(chunks))
                leaves += [
                    (unit, i, n + (after if i == len(chunks) - 1 else 0)) for i, n in enumerate(inside)
                ]
            parts.append(leaves)
    else:
        for start, stop in cut(len(chunks), depth):
            inside = merges(stop - start)
            parts.append([(0, i, n) for i, n in zip(range(start, stop), inside, strict=True)])
    leaves, spans, deepest = [], [], 0
    for part in parts:
        spans.append((len(leaves), len(leaves) + len(part)))
        waiting = 0
        for unit, i, additions in part:
            deepest = max(deepest, waiting - 1 if additions else waiting)
            waiting += 1 - additions
            leaves.append((unit, *chunks[i], additions))
    table = torch.tensor(leaves, dtype=torch.int32, device=device)
    return Schedule(table, torch.tensor(spans, dtype=torch.int32, device=device), len(spans), deepest)
