"""Chooses the operator of each weight and packs it.

The choice looks at the type in the file, at the weight's role, and at shapes of units, never at a rank's
share: two ranks that hold the same unit compute it alike, whatever else each of them holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from kernels.linear import TILE, Weight, int4_takes, linear, pack_bf16, pack_fp32, pack_int4, stack
from runtime.model.units import Span
from runtime.weights.planar import Planar

Loaded = torch.Tensor | Planar


@dataclass(frozen=True, slots=True)
class Columns:
    """Column-parallel weights side by side: outputs of the parts concatenate to `width` columns."""

    parts: tuple[Weight, ...]
    width: int


@dataclass(slots=True)
class Packer:
    """Packs the weights of one rank. `dense` names the roles kept in bf16 even where int4 would do."""

    dtype: torch.dtype
    dense: frozenset[str]
    # Shapes whose dense products were found to give, in one call, the bits that one call a unit gives.
    _fusible: dict[tuple, bool] = field(default_factory=dict)

    def weight(self, value: Loaded, role: str) -> Weight:
        """One unit's rows, or columns, of one tensor."""
        if self.dtype == torch.float32:
            return pack_fp32(dense(value, torch.float32))
        if role not in self.dense and _int4(value, row_count(value)):
            return pack_int4(*_int4_parts(value))
        return pack_bf16(dense(value, torch.bfloat16))

    def inputs(self, values: Sequence[Loaded], role: str) -> tuple[Weight, ...]:
        """A unit's columns of one tensor each, for `linear_parts`: several weights, or one for all units."""
        return stack([self.weight(value, role) for value in values])

    def columns(self, parts: Sequence[tuple[Loaded, Sequence[Span]]], role: str) -> Columns:
        """Tensors that share an input, each with the row ranges of its units within it, laid end to end.

        int4 columns do not depend on each other, so all of them go into one call where one group size
        allows it. Dense ones are defined by a call a range, and are fused into one where that is proven to
        give the same bits."""
        width = sum(stop - start for _, spans in parts for start, stop in spans)
        if self.dtype == torch.bfloat16 and role not in self.dense:
            fused = _int4_columns(parts)
            if fused is not None:
                return Columns((fused,), width)
        pieces = [(value, span) for value, spans in parts for span in spans]
        weights: list[Weight] = []
        lined_up: list[torch.Tensor] = []
        for value, (start, stop) in pieces:
            piece = select(value, slice(start, stop))
            if self.dtype == torch.bfloat16 and (role in self.dense or not _int4(piece, stop - start)):
                lined_up.append(dense(piece, torch.bfloat16))
                continue
            weights += self._fuse(lined_up)
            lined_up = []
            weights.append(self.weight(piece, role))
        weights += self._fuse(lined_up)
        return Columns(tuple(weights), width)

    def _fuse(self, pieces: list[torch.Tensor]) -> list[Weight]:
        """Dense bf16 pieces as one weight if a product with it equals the pieces' own products bit for bit.

        The order in which an element is summed follows from shapes, not from values, so one comparison
        settles a shape, given values that show any other order: here every product meets its opposite, so
        that a result is nothing but the rounding of the sums on the way."""
        if len(pieces) < 2:
            return [pack_bf16(piece) for piece in pieces]
        shapes = tuple(piece.shape for piece in pieces)
        if shapes not in self._fusible:
            draw = torch.Generator().manual_seed(0)
            half = pieces[0].shape[1] // 2
            order = torch.randperm(half, generator=draw)
            rest = torch.zeros(1, pieces[0].shape[1] - 2 * half)
            x = torch.randn(TILE, half, generator=draw)
            x = torch.cat((x, x[:, order], rest.expand(TILE, -1)), dim=1).to(torch.bfloat16)
            probes = []
            for piece in pieces:
                w = torch.randn(piece.shape[0], half, generator=draw)
                probes.append(torch.cat((w, -w[:, order], rest.expand(len(w), -1)), dim=1))
            apart = torch.cat([linear(x, pack_bf16(probe)) for probe in probes], dim=1)
            self._fusible[shapes] = torch.equal(apart, linear(x, pack_bf16(torch.cat(probes))))
        if self._fusible[shapes]:
            return [pack_bf16(torch.cat(pieces))]
        return [pack_bf16(piece) for piece in pieces]


def row_count(value: Loaded) -> int:
    return value.rows if isinstance(value, Planar) else value.shape[0]


def dense(value: Loaded, dtype: torch.dtype) -> torch.Tensor:
    return value.dequantize(dtype) if isinstance(value, Planar) else value.to(dtype)


def select(value: Loaded, rows: slice | torch.Tensor) -> Loaded:
    return value.select_rows(rows) if isinstance(value, Planar) else value[rows]


def select_cols(value: Loaded, span: Span) -> Loaded:
    if span == (0, value.cols if isinstance(value, Planar) else value.shape[1]):
        return value
    return value.select_cols(*span) if isinstance(value, Planar) else value[:, span[0] : span[1]]


def _int4(value: Loaded, rows: int) -> bool:
    """Whether the int4 operator serves `rows` rows (a unit's) of this tensor."""
    return isinstance(value, Planar) and sum(value.bits) == 4 and int4_takes(rows, value.cols, value.group)


def _int4_parts(value: Planar) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    scales = value.scales()
    return value.codes(), scales, value.offsets() - value.zero_point * scales, value.group


def _int4_columns(parts: Sequence[tuple[Loaded, Sequence[Span]]]) -> Weight | None:
    if not all(_int4(value, stop - start) for value, spans in parts for start, stop in spans):
        return None
    if len({value.group for value, _ in parts if isinstance(value, Planar)}) != 1:
        return None
    pieces = [
        _int4_parts(select(value, slice(start, stop)))
        for value, spans in parts
        for start, stop in spans
        if isinstance(value, Planar)
    ]
    codes, scales, offsets = (torch.cat([piece[n] for piece in pieces]) for n in range(3))
    return pack_int4(codes, scales, offsets, pieces[0][3])
