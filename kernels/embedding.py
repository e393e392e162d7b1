"""Rows of a table by index, exactly as the file stores them: the embedding, and the head's rescoring."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class RowTable:
    """Rows [V, K]. Quantised: value = code * scale + offset, a group of K at a time; dense: codes alone."""

    codes: torch.Tensor  # uint8 or int8 [V, K], or a floating type when dense
    scales: torch.Tensor | None  # fp32 [V, K / group]
    offsets: torch.Tensor | None  # fp32, same shape; None adds nothing
    group: int

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.codes, self.scales, self.offsets) if t is not None)


def rows(table: RowTable, index: torch.Tensor) -> torch.Tensor:
    """The rows at `index` (int64 [n], inside the table) as fp32 [n, K]."""
    values = table.codes.index_select(0, index).float()
    if table.scales is None:
        return values
    n, k = values.shape
    grouped = values.view(n, k // table.group, table.group)
    grouped *= table.scales.index_select(0, index)[:, :, None]
    if table.offsets is not None:
        grouped += table.offsets.index_select(0, index)[:, :, None]
    return values
