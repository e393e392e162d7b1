"""The output head: fp32 logits over one unit's share of the vocabulary.

A bf16 product returns bf16, which ties near-equal logits. So the bf16 pass only finds the most likely
rows; those are computed again in fp32 from the exact rows of the file.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.embedding import RowTable, rows
from kernels.linear import Bf16Weight, Fp32Weight, linear

RESCORED = 32  # rows a unit and token that get exact logits


@dataclass(frozen=True, slots=True)
class HeadShare:
    """One unit's rows of the head. `table` and `base` say where the exact rows stand."""

    weight: Bf16Weight | Fp32Weight
    table: RowTable | None  # None for an fp32 weight, which needs no second pass
    base: int  # the share's first row within `table`


def head_logits(x: torch.Tensor, share: HeadShare, out: torch.Tensor) -> None:
    """x fp32 [M, K], normalised -> out, fp32 logits [M, V of the share]."""
    if share.table is None:
        out.copy_(linear(x, share.weight))
        return
    coarse = linear(x.to(torch.bfloat16), share.weight)
    count = min(RESCORED, coarse.shape[1])
    best = torch.topk(coarse, count, dim=1, sorted=False).indices
    exact = rows(share.table, best.reshape(-1) + share.base).view(x.shape[0], count, -1)
    exact *= x[:, None, :]
    out.copy_(coarse)
    out.scatter_(1, best, exact.sum(dim=-1))
