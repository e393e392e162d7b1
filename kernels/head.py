"""The output head: fp32 logits over a share of the vocabulary.

On AMX a quantised table is multiplied as the file stores it, by x in fp32 (`kernels.native.head`).
Elsewhere, and for dense tables, there is a bf16 copy of the rows. Its product returns bf16, which ties
near-equal logits, so it only finds the most likely rows; those are computed again in fp32 from the file's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from kernels.embedding import RowTable, rows
from kernels.linear import Bf16Weight, Fp32Weight, linear, pack_bf16, pack_fp32
from kernels.native import head, machine

RESCORED = 32  # rows a unit and token that get exact logits, where others do not
_COPIED = 4096  # rows at once: bounds an fp32 copy


@dataclass(frozen=True, slots=True)
class HeadShare:
    """One unit's rows of the head, or of neighbouring units: `size` rows of `table` from `base` on."""

    weight: Bf16Weight | Fp32Weight | None  # a copy of the rows; None where the table itself is multiplied
    table: RowTable | None  # None for an fp32 weight, which needs nothing else
    base: int
    size: int


def head_share(table: RowTable, start: int, stop: int, dtype: torch.dtype) -> HeadShare:
    """Rows start .. stop - 1 of a table, for activations of `dtype`."""
    if dtype == torch.bfloat16 and machine.supported() and stop - start >= head.ROWS and _served(table):
        return HeadShare(None, table, start, stop - start)
    return copied_share(table, start, stop, dtype)


def merged(shares: Sequence[HeadShare]) -> tuple[HeadShare, ...]:
    """Shares that follow each other, as one where the table itself is multiplied: its rows stand alone."""
    if any(share.weight is not None for share in shares):
        return tuple(shares)
    return (replace(shares[0], size=sum(share.size for share in shares)),)


def copied_share(table: RowTable, start: int, stop: int, dtype: torch.dtype) -> HeadShare:
    """The same where nothing multiplies the table as it is."""
    index = torch.arange(start, stop)
    exact = torch.cat([rows(table, part).to(dtype) for part in index.split(_COPIED)])
    if dtype == torch.float32:
        return HeadShare(pack_fp32(exact), None, 0, stop - start)
    return HeadShare(pack_bf16(exact), table, start, stop - start)


def head_logits(x: torch.Tensor, share: HeadShare, out: torch.Tensor) -> None:
    """x fp32 [M, K], normalised -> out, fp32 logits [M, V of the share]."""
    table = share.table
    if share.weight is None:
        mine = slice(share.base, share.base + share.size)
        offsets = None if table.offsets is None else table.offsets[mine]
        head.logits(x, table.codes[mine], table.scales[mine], offsets, table.group, out)
        return
    if table is None:
        out.copy_(linear(x, share.weight))
        return
    coarse = linear(x.to(torch.bfloat16), share.weight)
    count = min(RESCORED, coarse.shape[1])
    best = torch.topk(coarse, count, dim=1, sorted=False).indices
    exact = rows(table, best.reshape(-1) + share.base).view(x.shape[0], count, -1)
    exact *= x[:, None, :]
    out.copy_(coarse)
    out.scatter_(1, best, exact.sum(dim=-1))


def _served(table: RowTable) -> bool:
    return table.scales is not None and head.takes(table.codes, table.group)
