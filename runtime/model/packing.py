"""Chooses the operator of each weight and packs it.

The choice looks at the type in the file, at the weight's role, and at shapes of units, never at a rank's
share: two ranks that hold the same unit compute it alike, whatever else each of them holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch

from kernels.linear import (
    TILE,
    Weight,
    int4_takes,
    int8_takes,
    linear,
    pack_bf16,
    pack_fp32,
    pack_int4,
    pack_int8,
    stack,
)
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
    """Packs the weights of one rank. `dense` names the roles kept in bf16 even where codes would do."""

    dtype: torch.dtype
    dense: frozenset[str]
    # Shapes whose dense products were found to give, in one call, the bits that one call a unit gives.
    _fusible: dict[tuple, bool] = field(default_factory=dict)

    def weight(self, value: Loaded, role: str) -> Weight:
        """One unit's rows, or columns, of one tensor."""
        match self._kind(value, row_count(value), role):
            case ("int4", _):
                return _int4([value])
            case ("int8", *_):
                return _int8([value])
            case _ if self.dtype == torch.float32:
                return pack_fp32(dense(value, torch.float32))
        return pack_bf16(dense(value, torch.bfloat16))

    def inputs(self, values: Sequence[Loaded], role: str) -> tuple[Weight, ...]:
        """A unit's columns of one tensor each, for `linear_parts`: several weights, or one for all units."""
        return stack([self.weight(value, role) for value in values])

    def columns(self, parts: Sequence[tuple[Loaded, Sequence[Span]]], role: str) -> Columns:
        """Tensors that share an input, each with the row ranges of its units within it, laid end to end.

        Columns of codes do not depend on each other, so neighbours of one kind go into one call. Dense ones
        are defined by a call a range, and are fused into one where that is proven to give the same bits."""
        width = sum(stop - start for _, spans in parts for start, stop in spans)
        pieces = [select(value, slice(start, stop)) for value, spans in parts for start, stop in spans]
        weights: list[Weight] = []
        for kind, run in groupby(pieces, lambda piece: self._kind(piece, row_count(piece), role)):
            match kind:
                case ("int4", _):
                    weights.append(_int4(list(run)))
                case ("int8", *_):
                    weights.append(_int8(list(run)))
                case _ if self.dtype == torch.float32:
                    weights += [pack_fp32(dense(piece, torch.float32)) for piece in run]
                case _:
                    weights += self._fuse([dense(piece, torch.bfloat16) for piece in run])
        return Columns(tuple(weights), width)

    def _kind(self, value: Loaded, rows: int, role: str) -> tuple:
        """Which operator serves `rows` rows (a unit's) of this tensor; equal for what one call can hold."""
        if self.dtype == torch.float32 or role in self.dense or not isinstance(value, Planar):
            return ()
        if sum(value.bits) == 4 and int4_takes(rows, value.cols, value.group):
            return "int4", value.group
        # Codes of 8 bits are signed as they are; others are once the zero point is taken off.
        if (sum(value.bits) < 8 or not value.zero_point) and int8_takes(rows, value.cols, value.group):
            return "int8", value.group, value.m is not None
        return ()

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


def _int4(pieces: Sequence[Planar]) -> Weight:
    """Rows of one kind, one piece after another."""
    codes = torch.cat([piece.codes() for piece in pieces])
    scales = torch.cat([piece.scales() for piece in pieces])
    offsets = torch.cat([piece.offsets() - piece.zero_point * piece.scales() for piece in pieces])
    return pack_int4(codes, scales, offsets, pieces[0].group)


def _int8(pieces: Sequence[Planar]) -> Weight:
    codes = torch.cat([(piece.codes().to(torch.int16) - piece.zero_point).to(torch.int8) for piece in pieces])
    scales = torch.cat([piece.scales() for piece in pieces])
    offsets = None if pieces[0].m is None else torch.cat([piece.offsets() for piece in pieces])
    return pack_int8(codes, scales, offsets, pieces[0].group)
