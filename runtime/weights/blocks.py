"""Takes GGUF quant blocks apart: codes, sub-scales, sub-minima and super-scales. Numpy only.

Block layouts: ggml/src/ggml-common.h; their meaning: ggml-quants.c (dequantize_row_*). Every type is brought
to one formula, in fp32 and in this order:

    scale  = d * sub_scale                 (or d, where the type has no sub-scales)
    offset = m * sub_min                   (or m, where the type has no sub-minima; none at all: -0.0)
    w      = (code - zero_point) * scale + offset

K-quants subtract dmin * sub_min: their m is -dmin, which changes no bit of the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from runtime.weights.formats import TensorType


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """What a type's numbers mean. `group` columns share a scale, `super_group` columns a d (and m); they
    are equal where there are no sub-scales. `bits` are the planes' widths, low bits first. `paired`: a
    sub-scale and its sub-minimum are the low and high nibble of one byte, and stay so."""

    bits: tuple[int, ...]
    zero_point: int
    group: int
    super_group: int
    paired: bool = False


@dataclass(frozen=True, slots=True)
class Parts:
    """Blocks taken apart, for rows x cols elements: codes [rows, cols] uint8 (int8 of Q8_0); d and m fp16
    [rows, cols / super_group]; sub_scales and sub_mins [rows, cols / group], or both in sub_scales where
    they are paired."""

    codes: np.ndarray
    d: np.ndarray
    m: np.ndarray | None = None
    sub_scales: np.ndarray | None = None
    sub_mins: np.ndarray | None = None


SPECS: dict[TensorType, QuantSpec] = {
    TensorType.Q4_0: QuantSpec((4,), 8, 32, 32),
    TensorType.Q4_1: QuantSpec((4,), 0, 32, 32),
    TensorType.Q5_0: QuantSpec((4, 1), 16, 32, 32),
    TensorType.Q5_1: QuantSpec((4, 1), 0, 32, 32),
    TensorType.Q8_0: QuantSpec((8,), 0, 32, 32),
    TensorType.Q2_K: QuantSpec((2,), 0, 16, 256, paired=True),
    TensorType.Q3_K: QuantSpec((2, 1), 4, 16, 256),
    TensorType.Q4_K: QuantSpec((4,), 0, 32, 256),
    TensorType.Q5_K: QuantSpec((4, 1), 0, 32, 256),
    TensorType.Q6_K: QuantSpec((4, 2), 32, 16, 256),
}


def take_apart(blocks: np.ndarray, type: TensorType) -> Parts:
    """blocks: [rows, blocks a row, bytes a block] uint8."""
    return _READERS[type](blocks)


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    """The fp16 at byte `at` of every block: [rows, blocks]."""
    return np.ascontiguousarray(blocks[..., at : at + 2]).view("<f2")[..., 0]


def _fields(packed: np.ndarray, run: int, width: int, out: np.ndarray, shift: int = 0) -> None:
    """Spreads bytes over codes: in every `run` bytes, field f (bits width*f ..) of byte i is code
    run * f + i. The fields land `shift` bits up in `out`, which is set where shift is 0, else or-ed into."""
    fields = 8 // width
    source = packed.reshape(*packed.shape[:2], -1, run)
    target = out.reshape(*out.shape[:2], -1, fields, run)
    for field in range(fields):
        part = source >> np.uint8(width * field) if field else source
        if field < fields - 1:
            part = part & np.uint8((1 << width) - 1)
        if shift:
            target[..., field, :] |= part << np.uint8(shift)
        else:
            target[..., field, :] = part


def _codes(blocks: np.ndarray, size: int) -> np.ndarray:
    return np.empty((*blocks.shape[:2], size), np.uint8)


def _flat(array: np.ndarray) -> np.ndarray:
    return array.reshape(array.shape[0], -1)


def _legacy(header: int, minima: bool, high: bool) -> Callable[[np.ndarray], Parts]:
    """Q4_0, Q4_1, Q5_0, Q5_1: d, then m, then 32 fifth bits, then 16 bytes of nibbles (low ones first)."""

    def read(blocks: np.ndarray) -> Parts:
        codes = _codes(blocks, 32)
        _fields(blocks[..., header:], 16, 4, codes)
        if high:
            bits = np.unpackbits(blocks[..., header - 4 : header], axis=-1, bitorder="little")
            codes |= bits << np.uint8(4)
        return Parts(_flat(codes), _half(blocks, 0), _half(blocks, 2) if minima else None)

    return read


def _q8_0(blocks: np.ndarray) -> Parts:
    return Parts(_flat(blocks[..., 2:].view(np.int8)), _half(blocks, 0))


def _q2_k(blocks: np.ndarray) -> Parts:
    codes = _codes(blocks, 256)
    _fields(blocks[..., 16:80], 32, 2, codes)
    return Parts(_flat(codes), _half(blocks, 80), -_half(blocks, 82), _flat(blocks[..., :16]))


def _q3_k(blocks: np.ndarray) -> Parts:
    codes = _codes(blocks, 256)
    _fields(blocks[..., 32:96], 32, 2, codes)
    _fields(blocks[..., :32], 32, 1, codes, shift=2)  # a set bit means "do not subtract 4": it adds 4 to ours
    scales = _codes(blocks, 16)
    _fields(blocks[..., 96:104], 8, 4, scales)
    _fields(blocks[..., 104:108], 4, 2, scales, shift=4)
    return Parts(_flat(codes), _half(blocks, 108), sub_scales=_flat(scales.view(np.int8) - np.int8(32)))


def _six_bit_pairs(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 8 scales and 8 minima of Q4_K and Q5_K, 6 bits each in 12 bytes: bytes 0-3 and 4-7 hold the first
    four of each in their low 6 bits; bytes 8-11 the low nibbles of the others (scale, then minimum), whose
    two high bits are those of bytes 0-3 and 4-7."""
    first, second, low = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales, minima = _codes(packed, 8), _codes(packed, 8)
    scales[..., :4], minima[..., :4] = first & np.uint8(63), second & np.uint8(63)
    scales[..., 4:] = (low & np.uint8(15)) | (first >> np.uint8(6) << np.uint8(4))
    minima[..., 4:] = (low >> np.uint8(4)) | (second >> np.uint8(6) << np.uint8(4))
    return _flat(scales), _flat(minima)


def _q4_k(blocks: np.ndarray) -> Parts:
    codes = _codes(blocks, 256)
    _fields(blocks[..., 16:], 32, 4, codes)
    return Parts(_flat(codes), _half(blocks, 0), -_half(blocks, 2), *_six_bit_pairs(blocks[..., 4:16]))


def _q5_k(blocks: np.ndarray) -> Parts:
    codes = _codes(blocks, 256)
    _fields(blocks[..., 48:], 32, 4, codes)
    _fields(blocks[..., 16:48], 32, 1, codes, shift=4)
    return Parts(_flat(codes), _half(blocks, 0), -_half(blocks, 2), *_six_bit_pairs(blocks[..., 4:16]))


def _q6_k(blocks: np.ndarray) -> Parts:
    codes = _codes(blocks, 256)
    _fields(blocks[..., :128], 64, 4, codes)
    _fields(blocks[..., 128:192], 32, 2, codes, shift=4)
    return Parts(_flat(codes), _half(blocks, 208), sub_scales=_flat(blocks[..., 192:208].view(np.int8)))


_READERS: dict[TensorType, Callable[[np.ndarray], Parts]] = {
    TensorType.Q4_0: _legacy(2, minima=False, high=False),
    TensorType.Q4_1: _legacy(4, minima=True, high=False),
    TensorType.Q5_0: _legacy(6, minima=False, high=True),
    TensorType.Q5_1: _legacy(8, minima=True, high=True),
    TensorType.Q8_0: _q8_0,
    TensorType.Q2_K: _q2_k,
    TensorType.Q3_K: _q3_k,
    TensorType.Q4_K: _q4_k,
    TensorType.Q5_K: _q5_k,
    TensorType.Q6_K: _q6_k,
}
