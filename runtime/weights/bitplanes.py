"""Packs small unsigned codes into bit planes of int16 words, and back. Knows nothing of scales or files.

Layout, for a plane of b bits (4, 2 or 1). Columns are padded with zero codes to a multiple of BLOCK = 128.
Within each 128-wide block the plane has 8 * b int16 words; field j of a word is its bits b*j .. b*j + b - 1:

    b = 4: 32 words, nibble j (0..3)  of word w = column 32 * j + w of the block
    b = 2: 16 words, pair   j (0..7)  of word w = column 16 * j + w
    b = 1:  8 words, bit    j (0..15) of word w = column  8 * j + w

Words of block 0 come first, then those of block 1: a plane is [rows, padded columns / 128 * 8 * b]. So one
shift and one mask over the words of a block yield a contiguous run of columns, which is what a kernel wants.
Codes wider than four bits are split low bits first: planes (4, 2) hold bits 0-3 and 4-5. Codes of 8 bits are
not split: their plane is the padded int8 codes themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

BLOCK = 128


def padded(cols: int) -> int:
    """Columns as stored: the next multiple of 128."""
    return -(-cols // BLOCK) * BLOCK


def empty_planes(rows: int, cols: int, bits: Sequence[int]) -> tuple[np.ndarray, ...]:
    """Uninitialised planes for [rows, cols] codes: int16 words, or int8 codes where a width is 8."""
    blocks = padded(cols) // BLOCK
    return tuple(
        np.empty((rows, blocks * BLOCK), np.int8)
        if width == 8
        else np.empty((rows, blocks * 8 * width), np.int16)
        for width in bits
    )


def pack(codes: np.ndarray, bits: Sequence[int], planes: Sequence[np.ndarray]) -> None:
    """Writes codes [rows, cols] (uint8, below 2**sum(bits); int8 for bits == (8,)) into `planes`, which are
    rows of what `empty_planes` returned."""
    rows, cols = codes.shape
    if cols % BLOCK:
        wide = np.zeros((rows, padded(cols)), codes.dtype)
        wide[:, :cols] = codes
        codes = wide
    if tuple(bits) == (8,):
        planes[0][:] = codes
        return
    shift = 0
    for width, plane in zip(bits, planes, strict=True):
        # Work on bytes, two halves of a word apart: fields of the low byte, then those of the high one.
        fields = codes.reshape(rows, -1, 16 // width, 8 * width)
        mask = np.uint8((1 << width) - 1)
        words = plane.view(np.uint8).reshape(rows, -1, 8 * width, 2)
        part = np.empty((rows, fields.shape[1], 8 * width), np.uint8)
        for half in range(2):
            total = np.zeros_like(part)
            for field in range(8 // width):
                np.right_shift(fields[:, :, half * (8 // width) + field], np.uint8(shift), out=part)
                np.bitwise_and(part, mask, out=part)
                np.left_shift(part, np.uint8(width * field), out=part)
                np.bitwise_or(total, part, out=total)
            words[..., half] = total
        shift += width


def unpack(planes: Sequence[torch.Tensor], bits: Sequence[int], cols: int) -> torch.Tensor:
    """Codes [rows, cols] of packed planes: uint8, or int8 for bits == (8,). Works on the planes' device."""
    rows = planes[0].shape[0]
    if tuple(bits) == (8,):
        return planes[0][:, :cols]
    blocks = padded(cols) // BLOCK
    out = torch.empty((rows, blocks, BLOCK), dtype=torch.uint8, device=planes[0].device)
    shift = 0
    for width, plane in zip(bits, planes, strict=True):
        fields = out.view(rows, blocks, 16 // width, 8 * width)
        words = plane.view(rows, blocks, 8 * width)
        for field in range(16 // width):
            part = ((words >> (width * field)) & ((1 << width) - 1)).to(torch.uint8)
            if shift:
                fields[:, :, field] |= part << shift
            else:
                fields[:, :, field] = part
        shift += width
    return out.view(rows, blocks * BLOCK)[:, :cols]


def cut_planes(
    planes: Sequence[torch.Tensor], bits: Sequence[int], start: int, stop: int
) -> tuple[torch.Tensor, ...]:
    """Columns start .. stop - 1 of packed planes as planes of their own, on their device. Only the blocks
    that hold those columns are touched; a cut between blocks copies their words as they are."""
    first, last = start // BLOCK, padded(stop) // BLOCK
    widths = [BLOCK if width == 8 else 8 * width for width in bits]
    held = [plane[:, first * w : last * w] for plane, w in zip(planes, widths, strict=True)]
    if start % BLOCK == stop % BLOCK == 0:
        return tuple(plane.clone(memory_format=torch.contiguous_format) for plane in held)
    before = first * BLOCK
    codes = unpack(held, bits, stop - before)[:, start - before :].cpu().numpy()
    packed = empty_planes(len(codes), stop - start, bits)
    pack(codes, bits, packed)
    return tuple(torch.from_numpy(plane).to(planes[0].device) for plane in packed)
