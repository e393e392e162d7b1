"""Quantised weights as the GEMM reads them: bit planes by rows, scales by columns.

The planes are those of the planar form (16-bit words; within a block of 128 columns a plane of b bits has
8 * b words, field j of word w being column 8 * b * j + w). Scales are packed into 32-bit words and
transposed, so that the rows of a tile read neighbouring words, asynchronously. Nothing is rounded by the
repacking. What a weight is worth to the kernel, each operation rounded to fp16 where it says so:

    scale = fp16(d * sub_scale), or d      offset = fp16(m * sub_min), or m
    w     = fp16((code - zero) * scale + offset), fused: rounded once

Where sub-scales do not fit the kernel's stride (a super-group cut by a unit's edge, zero points of GPTQ),
scale and offset are computed here by the same formula, and kept: other bytes, the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

BLOCK = 128  # columns of one turn of the kernel's loop
_PLANES = {(4,): (4, 0), (4, 1): (4, 1), (4, 2): (4, 2), (2,): (2, 0), (2, 1): (2, 1), (8,): (8, 0)}


class Planar(Protocol):
    """rows x cols weights in the planar form. planes: [rows, ceil(cols / 128) * 8 * b] int16 (int8 codes,
    128 a block, for 8 bits), low bits of the codes first. d, m: fp16 [rows, cols / super_group]; sub_scales
    and sub_mins (uint8 or int8): [rows, cols / group]; m, sub_scales and sub_mins may be None. paired:
    sub_scales holds a scale in its low and a minimum in its high nibble."""

    rows: int
    cols: int
    bits: tuple[int, ...]
    zero_point: int
    group: int
    super_group: int
    planes: tuple[torch.Tensor, ...]
    d: torch.Tensor
    m: torch.Tensor | None
    sub_scales: torch.Tensor | None
    sub_mins: torch.Tensor | None
    paired: bool


@dataclass(frozen=True, slots=True)
class Format:
    """What the kernel must know at compile time.

    low, high: bits of the planes (high 0: one plane; low 8: plain int8 codes; low 16: no codes at all, but
    weights in fp16, to which the rest does not apply). zero: subtracted from codes.
    group: columns a scale; span: columns a word of d (with `minimum`), or a half of one (without).
    sub: 0 none, 1 unsigned bytes, 2 signed bytes, 3 nibbles: scale low, minimum high."""

    low: int
    high: int
    zero: int
    group: int
    span: int
    sub: int
    minimum: bool


@dataclass(frozen=True, slots=True)
class PlanarWeight:
    """`units` matrices [rows, width] side by side along K, all of one format.

    low, high: int16 [units, rows, words] (int8 codes or fp16 weights [units, rows, padded width] where low
    bits are 8 or 16).
    d: int32 [units, words, rows]: fp16 d in the low half and m in the high one, or two d in turn.
    sub, mins: int32 [units, words, rows], four bytes of neighbouring groups a word."""

    format: Format
    rows: int
    width: int
    units: int
    low: torch.Tensor
    high: torch.Tensor | None
    d: torch.Tensor | None
    sub: torch.Tensor | None
    mins: torch.Tensor | None

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.low, self.high, self.d, self.sub, self.mins) if t is not None)


def prepare(parts: Sequence[Planar] | Planar) -> PlanarWeight:
    """Repack planar weights for the kernel, on their device: one matrix, or one a unit, alike in all but
    values. Raises ValueError naming what does not fit."""
    units = list(parts) if isinstance(parts, Sequence) else [parts]
    first = units[0]
    if first.bits not in _PLANES:
        raise ValueError(f"linear: no kernel for planes of {first.bits} bits")
    for part in units:
        if (part.rows, part.cols, part.bits, part.zero_point) != (
            first.rows,
            first.cols,
            first.bits,
            first.zero_point,
        ):
            raise ValueError("linear: units differ in shape or type, and need a weight each")
    for part in units:
        _finite(part)
    plain = all(_sub_fits(part) for part in units) and len({_sub_kind(part) for part in units}) == 1
    packed = [_with_subs(part) if plain else _with_pairs(part) for part in units]
    group = min(p[0] for p in packed)
    span = min(p[1] for p in packed)
    if any((p[0], p[1]) != (group, span) for p in packed):  # units cut at different places
        packed = [_with_pairs(part, group) for part in units]
        span = group
    low, high = _PLANES[first.bits]
    form = Format(low, high, first.zero_point, group, span, _sub_kind(first) if plain else 0, packed[0][5])

    def stack(tensors: list[torch.Tensor | None]) -> torch.Tensor | None:
        return None if tensors[0] is None else torch.stack(tensors)

    return PlanarWeight(
        form,
        first.rows,
        first.cols,
        len(units),
        stack([part.planes[0] for part in units]),
        stack([part.planes[1] for part in units]) if high else None,
        *(stack([p[i] for p in packed]) for i in (2, 3, 4)),
    )


def prepare_dense(parts: Sequence[torch.Tensor] | torch.Tensor) -> PlanarWeight:
    """Dense weights [rows, width] of any floating type, one matrix or one a unit, kept in fp16. Raises
    ValueError for values beyond fp16's range."""
    units = list(parts) if isinstance(parts, Sequence) else [parts]
    first = units[0]
    if any(part.shape != first.shape for part in units):
        raise ValueError("linear: units differ in shape, and need a weight each")
    rows, width = first.shape
    low = torch.zeros(len(units), rows, -(-width // BLOCK) * BLOCK, dtype=torch.float16, device=first.device)
    for unit, part in enumerate(units):
        low[unit, :, :width] = part
    wrong = (~low.isfinite()).nonzero()
    if len(wrong):
        raise ValueError(f"linear: a weight of row {int(wrong[0, 1])} does not fit fp16")
    return PlanarWeight(
        Format(16, 0, 0, 128, 128, 0, False), rows, width, len(units), low, None, None, None, None
    )


def _finite(part: Planar) -> None:
    """Refuse scales and offsets beyond fp16, which no model has and a damaged file may."""
    for what, coarse, fine in (("scale", part.d, part.sub_scales), ("offset", part.m, part.sub_mins)):
        if coarse is None:
            continue
        least = coarse.abs().amax(dim=1).float()
        if part.paired:
            least = least * 15
        elif fine is not None:
            least = least * fine.to(torch.int16).abs().amax(dim=1)
        # The largest of both may not meet: an upper bound, far above what models have.
        wrong = (~(least <= 65504)).nonzero()
        if len(wrong):
            raise ValueError(f"linear: the {what} of row {int(wrong[0])} does not fit fp16")


def _sub_kind(part: Planar) -> int:
    if part.sub_scales is None:
        return 0
    return 3 if part.paired else 2 if part.sub_scales.dtype == torch.int8 else 1


def _sub_fits(part: Planar) -> bool:
    """Whether the file's own sub-scales suit the kernel's stride; types without any always do."""
    if part.sub_scales is None:
        return part.sub_mins is None and (part.group % BLOCK == 0 or part.group in (32, 64))
    return part.group in (16, 32) and part.super_group % BLOCK == 0


_Packed = tuple[int, int, torch.Tensor, torch.Tensor | None, torch.Tensor | None, bool]


def _with_subs(part: Planar) -> _Packed:
    d = part.d.view(torch.int16)
    if part.m is not None:
        words = _join(d, part.m.view(torch.int16))
    else:
        even = torch.nn.functional.pad(d, (0, -d.shape[1] % 2)).view(part.rows, -1, 2)
        words = _join(even[..., 0], even[..., 1])
    sub = None if part.sub_scales is None else _bytes(part.sub_scales)
    mins = None if part.sub_mins is None else _bytes(part.sub_mins)
    return part.group, part.super_group, _columns(words), sub, mins, part.m is not None


def _with_pairs(part: Planar, group: int | None = None) -> _Packed:
    """Scale and offset a group, by the kernel's own formula."""
    own = part.group if part.group % BLOCK == 0 or part.group in (16, 32, 64) else 16
    group = group or own
    if part.group % group:
        raise ValueError(
            f"linear: groups of {part.group} columns cannot be cut into {group}; 16 is the least"
        )
    repeat = part.super_group // part.group
    scale, offset = part.d, part.m
    subs, mins = part.sub_scales, part.sub_mins
    if part.paired and subs is not None:
        subs, mins = subs & 15, subs >> 4
    scale, offset = (None if t is None else t.repeat_interleave(repeat, dim=1) for t in (scale, offset))
    if subs is not None:
        scale = scale * subs.to(torch.float16)
    if offset is None:
        offset = torch.full_like(scale, -0.0)
    elif mins is not None:
        offset = offset * mins.to(torch.float16)
    scale, offset = (t.repeat_interleave(part.group // group, dim=1) for t in (scale, offset))
    words = _join(scale.view(torch.int16), offset.view(torch.int16))
    return group, group, _columns(words, -words.shape[1] % max(1, BLOCK // group)), None, None, True


def _join(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    return torch.stack((low, high), dim=-1).contiguous().view(torch.int32).squeeze(-1)


def _bytes(values: torch.Tensor) -> torch.Tensor:
    """uint8 or int8 [rows, n] -> int32 [ceil(n / 8) * 2, rows], zero-padded to whole blocks of groups."""
    wide = torch.nn.functional.pad(values.view(torch.uint8), (0, -values.shape[1] % 8))
    return _columns(wide.contiguous().view(torch.int32))


def _columns(words: torch.Tensor, more: int = 0) -> torch.Tensor:
    """int32 [rows, n] -> [n + more, rows]; zero words follow, which a last, part-filled block reads."""
    spare = more or -words.shape[1] % 4
    return torch.nn.functional.pad(words, (0, spare)).t().contiguous()


def dequantize(part: Planar) -> torch.Tensor:
    """fp16 [rows, cols]: the weights exactly as the kernel multiplies them, in plain torch; for tests."""
    group, _, words, _, _, _ = _with_pairs(part)
    pairs = words.t().contiguous().view(torch.float16).view(part.rows, -1, 2)
    scale, offset = (pairs[..., i].repeat_interleave(group, dim=1)[:, : part.cols].double() for i in range(2))
    codes = _codes(part).double() - part.zero_point
    return (codes * scale + offset).to(torch.float16)


def _codes(part: Planar) -> torch.Tensor:
    if part.bits == (8,):
        return part.planes[0][:, : part.cols]
    total = torch.zeros(part.rows, -(-part.cols // BLOCK), BLOCK, dtype=torch.int32)
    shift = 0
    for bits, plane in zip(part.bits, part.planes, strict=True):
        words = plane.view(part.rows, -1, 1, 8 * bits).int().cpu()
        fields = torch.arange(16 // bits, dtype=torch.int32)[:, None] * bits
        total += (((words >> fields) & ((1 << bits) - 1)) << shift).reshape(total.shape)
        shift += bits
    return total.view(part.rows, -1)[:, : part.cols].to(part.d.device)
