"""How quantised weights lie in memory for `kernels.native.codes`: tiles of codes, scales behind them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

COLUMNS = 16  # of y, in one tile
LONGEST = 16384  # of a part's K: with a slab's rows, what a thread keeps on its stack stays below a megabyte


@dataclass(frozen=True, slots=True)
class Layout:
    """How weights are packed. 4 bits come with bf16 scales and zeros; 8 bits with fp32 ones, or no zeros."""

    bits: int
    group: int  # columns of K that share a scale: 16, or a multiple of 32
    zeros: bool

    @property
    def span(self) -> int:
        """Columns of K in one tile."""
        return min(self.group, 32)

    @property
    def tile(self) -> int:
        """Bytes of a tile of codes."""
        return COLUMNS * self.span * self.bits // 8

    @property
    def scale(self) -> int:
        """Bytes of a group's 16 scales, and of its 16 zeros."""
        return COLUMNS * (2 if self.bits == 4 else 4)

    @property
    def scales(self) -> int:
        """Bytes of both."""
        return self.scale * (2 if self.zeros else 1)

    @property
    def record(self) -> int:
        """Bytes of 16 columns of y and a group."""
        return self.tile * (self.group // self.span) + self.scales


@dataclass(frozen=True, slots=True)
class Parts:
    """Weights of one layout, alike in columns of y and each with its own share of K: x holds their shares
    side by side, and each has a y of its own. Data for all of them lie one after another."""

    layout: Layout
    out_features: int
    widths: tuple[int, ...]  # columns of K
    packed: torch.Tensor  # uint8
    table: torch.Tensor  # int64 [parts, 3]: bytes to its share of a row of x, its groups, bytes to its data

    @property
    def in_features(self) -> int:
        return sum(self.widths)

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes


def pack(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, layout: Layout) -> Parts:
    """Codes [N, K], uint8 below 16 or int8, and scales and zeros [N, K / group] -> one part. N is a multiple
    of 16, K of the group.

    Data are [N / 16, K / group, record]: tiles of codes, then scales, then zeros. Of 8 bits a tile is, for
    each pair of K, 16 columns of both. Of 4 bits a 16-bit word holds the codes of four pairs of K, lowest
    bits first; 32 words, of 16 columns and both halves of a pair, are 64 bytes; four of those are a tile."""
    n, k = codes.shape
    blocks, groups, span = n // COLUMNS, scales.shape[1], layout.span
    if layout.bits == 4:
        # [blocks, column, tile, quarter, pair within it, half] -> [blocks, tile, quarter, column, half, pair]
        nibbles = codes.view(blocks, COLUMNS, k // span, 4, 4, 2).permute(0, 2, 3, 1, 5, 4).to(torch.uint8)
        low, high = (nibbles[..., at] | nibbles[..., at + 1] << 4 for at in (0, 2))
        tiles = torch.stack((low, high), -1)
    else:
        tiles = codes.view(torch.uint8).view(blocks, COLUMNS, k // span, span // 2, 2).permute(0, 2, 3, 1, 4)

    def line(values: torch.Tensor) -> torch.Tensor:
        lined = values.view(blocks, COLUMNS, groups).transpose(1, 2)
        return lined.to(torch.bfloat16 if layout.bits == 4 else torch.float32).contiguous().view(torch.uint8)

    lines = [line(values) for values in (scales, zeros) if values is not None]
    packed = torch.cat((tiles.reshape(blocks, groups, -1), *lines), dim=2).view(-1)
    return Parts(layout, n, (k,), packed, torch.tensor([[0, groups, 0]]))


def joined(parts: Sequence[Parts]) -> Parts | None:
    """Several as one; None if their layouts, or their columns of y, differ."""
    first = parts[0]
    if any((p.layout, p.out_features) != (first.layout, first.out_features) for p in parts):
        return None
    entries, columns, data = [], 0, 0
    for part in parts:
        entries += [[x + 2 * columns, groups, at + data] for x, groups, at in part.table.tolist()]
        columns += part.in_features
        data += part.nbytes
    widths = tuple(width for part in parts for width in part.widths)
    packed = torch.cat([part.packed for part in parts])
    return Parts(first.layout, first.out_features, widths, packed, torch.tensor(entries))
