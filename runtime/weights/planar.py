"""The one form of quantised weights in memory, whatever file they came from: bit planes and scales.

Planes are laid out as `bitplanes` says; sub-scales and minima stand as the file had them (widened to 8 bits),
super-scales as fp16. Nothing is rounded: `dequantize` returns the very bits that the format defines. What a
type's numbers mean is one formula, evaluated in fp32, each operation rounded, in this order:

    scale  = d * sub_scale      (d alone where there are no sub-scales)
    offset = m * sub_min        (m alone where there are no sub-minima; -0.0, which adds nothing, without m)
    w      = (code - zero_point) * scale + offset

Columns may be cut anywhere: group sizes then shrink to the largest size that still divides every piece, and
scales repeat. Knows no file, no kernel and no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd

import numpy as np
import torch

from runtime.weights.bitplanes import cut_planes, empty_planes, pack, unpack
from runtime.weights.blocks import SPECS, Parts, QuantSpec, take_apart
from runtime.weights.formats import TensorType

_CHUNK = 1 << 19  # elements converted at a time: what fits a core's cache


@dataclass(frozen=True, slots=True, eq=False)
class Planar:
    """rows x cols quantised weights.

    planes: one a width in `bits`, low bits of the codes first (see `bitplanes`; columns padded to 128).
    group: columns a scale. super_group: columns a d and m; a multiple of group, equal to it where
    sub_scales is None. d, m: fp16 [rows, cols / super_group]; sub_scales and sub_mins (uint8 or int8):
    [rows, cols / group]. m and sub_mins may be None, and sub_mins may stand without sub_scales (zero points,
    with m = -d). `paired`: sub_scales holds both, the scale in the low nibble and the minimum in the high one
    (Q2_K). `type` names where the numbers come from (a GGUF type, "INT4", or a GPTQ or AWQ format)."""

    type: str
    rows: int
    cols: int
    bits: tuple[int, ...]
    zero_point: int
    group: int
    super_group: int
    planes: tuple[torch.Tensor, ...]
    d: torch.Tensor
    m: torch.Tensor | None = None
    sub_scales: torch.Tensor | None = None
    sub_mins: torch.Tensor | None = None
    paired: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of all that is held."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors())

    def codes(self) -> torch.Tensor:
        """[rows, cols] uint8 from 0 to 2**sum(bits) - 1; signed int8 of 8 bits."""
        return unpack(self.planes, self.bits, self.cols)

    def scales(self) -> torch.Tensor:
        """fp32 [rows, cols / group]."""
        return self._by_group(self.d, self.sub_scales & 15 if self.paired else self.sub_scales)

    def offsets(self) -> torch.Tensor:
        """fp32 [rows, cols / group]; what is added after scaling. -0.0 where the type has no minima."""
        if self.m is None:
            none = torch.full((), -0.0, device=self.d.device)
            return none.expand(self.rows, self.cols // self.group)
        return self._by_group(self.m, self.sub_scales >> 4 if self.paired else self.sub_mins)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """[rows, cols] weights: exact in fp32 (the formula above), rounded to nearest in other types."""
        out = torch.empty((self.rows, self.cols), dtype=dtype, device=self.d.device)
        step = max(1, _CHUNK // self.cols)
        for start in range(0, self.rows, step):
            part = self if step >= self.rows else self.select_rows(slice(start, start + step))
            grouped = (part.rows, -1, part.group)
            weights = part.codes().to(torch.float32).view(grouped)
            if part.zero_point:
                weights -= part.zero_point
            weights *= part.scales().unsqueeze(-1)
            if part.m is not None:
                weights += part.offsets().unsqueeze(-1)
            out[start : start + part.rows] = weights.view(part.rows, part.cols)
        return out

    def select_rows(self, index: torch.Tensor | slice) -> Planar:
        """The rows named by an int64 [n] index (in its order, copied) or a slice (shared, not copied)."""
        part = self._map(lambda tensor: tensor[index])
        return replace(part, rows=part.d.shape[0])

    def select_cols(self, start: int, stop: int) -> Planar:
        """Columns start .. stop - 1, wherever they fall, copied; groups shrink where they are cut. Costs what
        it returns, so that all units' columns cost the tensor once."""
        if not 0 <= start < stop <= self.cols:
            raise ValueError(f"columns {start}:{stop} of {self.cols}")
        group, super_group = gcd(self.group, start, stop), gcd(self.super_group, start, stop)

        def pick(values: torch.Tensor | None, old: int, new: int) -> torch.Tensor | None:
            if values is None:
                return None
            return values.index_select(1, torch.arange(start, stop, new, device=values.device) // old)

        return replace(
            self,
            cols=stop - start,
            group=group,
            super_group=super_group,
            planes=cut_planes(self.planes, self.bits, start, stop),
            d=pick(self.d, self.super_group, super_group),
            m=pick(self.m, self.super_group, super_group),
            sub_scales=pick(self.sub_scales, self.group, group),
            sub_mins=pick(self.sub_mins, self.group, group),
        )

    def to(self, device: torch.device | str) -> Planar:
        return self._map(lambda tensor: tensor.to(device))

    def contiguous(self) -> Planar:
        """The same numbers, every tensor in row-major order; shared where it is so already."""
        return self._map(torch.Tensor.contiguous)

    @staticmethod
    def cat_rows(parts: Sequence[Planar]) -> Planar:
        """Stacks what has the same type, columns and groups. ValueError if they differ."""
        if not parts:
            raise ValueError("nothing to stack")
        first = parts[0]
        for part in parts[1:]:
            if part._kind() != first._kind():
                raise ValueError(f"cannot stack {part._kind()} under {first._kind()}")

        def stack(name: str) -> torch.Tensor | None:
            pieces = [getattr(part, name) for part in parts]
            return None if pieces[0] is None else torch.cat(pieces)

        planes = tuple(torch.cat(pieces) for pieces in zip(*(part.planes for part in parts), strict=True))
        names = ("d", "m", "sub_scales", "sub_mins")
        return replace(
            first,
            rows=sum(part.rows for part in parts),
            planes=planes,
            **{name: stack(name) for name in names},
        )

    def _kind(self) -> tuple:
        return self.type, self.cols, self.bits, self.zero_point, self.group, self.super_group

    def _tensors(self) -> list[torch.Tensor]:
        return [t for t in (*self.planes, self.d, self.m, self.sub_scales, self.sub_mins) if t is not None]

    def _map(self, function) -> Planar:
        def apply(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else function(tensor)

        return replace(
            self,
            planes=tuple(function(plane) for plane in self.planes),
            d=function(self.d),
            m=apply(self.m),
            sub_scales=apply(self.sub_scales),
            sub_mins=apply(self.sub_mins),
        )

    def _by_group(self, coarse: torch.Tensor, fine: torch.Tensor | None) -> torch.Tensor:
        wide = coarse.to(torch.float32)
        repeat = self.super_group // self.group
        if repeat > 1:
            wide = wide.repeat_interleave(repeat, dim=1)
        return wide if fine is None else wide * fine.to(torch.float32)


def from_gguf_bytes(
    raw: torch.Tensor | np.ndarray,
    type: TensorType | str,
    rows: int,
    cols: int,
    col_start: int = 0,
    col_stop: int | None = None,
) -> Planar:
    """Columns col_start .. col_stop - 1 of `rows` rows of a GGUF tensor with `cols` columns.

    raw: uint8 of any shape, row after row the whole blocks that cover those columns and no others. The
    result holds no reference to it. ValueError if sizes do not fit or the type is not quantised."""
    type = TensorType(type)
    col_stop = cols if col_stop is None else col_stop
    if type not in SPECS:
        raise ValueError(f"{type} is not quantised")
    if not 0 <= col_start < col_stop <= cols or cols % type.block:
        raise ValueError(f"columns {col_start}:{col_stop} of {cols}, in blocks of {type.block}")
    spec, first = SPECS[type], col_start // type.block
    blocks = -(-col_stop // type.block) - first
    data = raw.numpy() if isinstance(raw, torch.Tensor) else raw
    if data.dtype != np.uint8 or data.size != rows * blocks * type.block_bytes:
        raise ValueError(
            f"{data.size} items of {data.dtype} where {rows} rows x {blocks} blocks of {type} are "
            f"{rows * blocks * type.block_bytes} bytes"
        )
    data = data.reshape(rows, blocks, type.block_bytes)
    before = first * type.block
    planes = empty_planes(rows, col_stop - col_start, spec.bits)
    step = max(1, _CHUNK // (blocks * type.block))
    pieces = []
    for start in range(0, rows, step):
        parts = take_apart(data[start : start + step], type)
        parts, cut = cut_parts(parts, spec, col_start - before, col_stop - before)
        pack(parts.codes, spec.bits, [plane[start : start + step] for plane in planes])
        pieces.append((parts.d, parts.m, parts.sub_scales, parts.sub_mins))
    return _assemble(type, cut, rows, col_stop - col_start, planes, pieces)


def planar_of_parts(type: str, spec: QuantSpec, parts: Parts) -> Planar:
    """Packs codes [rows, cols] with their scales. spec.super_group must divide cols."""
    rows, cols = parts.codes.shape
    planes = empty_planes(rows, cols, spec.bits)
    pack(parts.codes, spec.bits, planes)
    return _assemble(type, spec, rows, cols, planes, [(parts.d, parts.m, parts.sub_scales, parts.sub_mins)])


def cut_parts(parts: Parts, spec: QuantSpec, start: int, stop: int) -> tuple[Parts, QuantSpec]:
    """Columns start .. stop - 1 of codes and scales, scales repeated where a group no longer fits, and the
    spec with the groups that result."""
    cut = replace(spec, group=gcd(spec.group, start, stop), super_group=gcd(spec.super_group, start, stop))

    def pick(values: np.ndarray | None, old: int, new: int) -> np.ndarray | None:
        return None if values is None else values[:, np.arange(start, stop, new) // old]

    return Parts(
        parts.codes[:, start:stop],
        pick(parts.d, spec.super_group, cut.super_group),
        pick(parts.m, spec.super_group, cut.super_group),
        pick(parts.sub_scales, spec.group, cut.group),
        pick(parts.sub_mins, spec.group, cut.group),
    ), cut


def _assemble(
    type: str, spec: QuantSpec, rows: int, cols: int, planes: Sequence[np.ndarray], pieces: list[tuple]
) -> Planar:
    scales = [
        None if column[0] is None else torch.from_numpy(np.concatenate(column))
        for column in zip(*pieces, strict=True)
    ]
    return Planar(
        type=str(type),
        rows=rows,
        cols=cols,
        bits=spec.bits,
        zero_point=spec.zero_point,
        group=spec.group,
        super_group=spec.super_group,
        planes=tuple(torch.from_numpy(plane) for plane in planes),
        **dict(zip(("d", "m", "sub_scales", "sub_mins"), scales, strict=True)),
        paired=spec.paired,
    )
