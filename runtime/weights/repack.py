"""Turns what was read of a GPTQ or AWQ layer into the planar form, exactly.

    w[n, k] = (code - zero point) * scale

becomes planar's (code - zero_point) * scale + offset with a d of `scale`, and, unless the format is
symmetric, an m of -scale and the zero points as sub_mins. A scale has 11 bits and a code at most 8, so every
step is exact in fp32 and both forms give the same number. 8-bit codes are held less 128, as planar's are
signed; their sub_mins are the zero points less 128, signed too.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd

import numpy as np
import torch

from runtime.errors import BadModelFile, UnsupportedModel
from runtime.weights import awq, gptq
from runtime.weights.bitplanes import empty_planes, pack
from runtime.weights.formats import TensorInfo, TensorType
from runtime.weights.packed import MAX_GROUP, PackedInfo
from runtime.weights.planar import Planar

_CHUNK = 1 << 19  # codes at a time: what fits a core's cache


def repack(
    info: PackedInfo, rows: tuple[int, int], cols: tuple[int, int], raw: Mapping[str, np.ndarray]
) -> Planar:
    """Rows and columns (start, stop) of a layer. `raw` has, of each part the layer has, the bytes (uint8,
    [rows of the part, bytes]) that `plan.packed_reads` asks for, and no others.

    Columns of a group share a scale; groups shrink to what divides the cut and to at most 128. Raises
    BadModelFile or UnsupportedModel, naming file and tensor, for act-order, biases, scales that fp16
    cannot hold, and zero points that are not what the format says."""
    format, (row, row_stop), (col, col_stop) = info.type, rows, cols
    height, width = row_stop - row, col_stop - col
    if info.bias is not None and np.any(_floats(raw["bias"], info.bias)):
        raise UnsupportedModel(f"{info.bias.file}: {info.bias.name}: biases are not served")
    if info.g_idx is not None:
        gptq.check_order(info, raw["g_idx"].view("<i4")[0], col)
    a_scale = format.columns_a_scale(info.cols)
    group = gcd(MAX_GROUP, format.block, col, col_stop)
    pick = np.arange(col, col_stop, group) // a_scale - col // a_scale
    d = np.ascontiguousarray(_fp16(raw["scales"], info.scales).T[:, pick])
    zeros = _zeros(info, raw["qzeros"], row % format.per_word, height)
    middle = 1 << (format.bits - 1)
    m = minima = None
    if zeros is not None:
        m = -d
        minima = np.ascontiguousarray(zeros.T[:, pick])
        if format.bits == 8:
            minima = (minima ^ np.uint8(middle)).view(np.int8)
    planes = empty_planes(height, width, (format.bits,))
    step = max(1, _CHUNK // width // 8 * 8)
    for start in range(0, height, step):
        stop = min(start + step, height)
        codes = _codes(info, raw["qweight"], (row, col), (start, stop), width)
        pack(codes, (format.bits,), [plane[start:stop] for plane in planes])
    return Planar(
        type=str(format),
        rows=height,
        cols=width,
        bits=(format.bits,),
        zero_point=middle if zeros is None and format.bits == 4 else 0,
        group=group,
        super_group=group,
        planes=tuple(torch.from_numpy(plane) for plane in planes),
        d=torch.from_numpy(d),
        m=None if m is None else torch.from_numpy(m),
        sub_mins=None if minima is None else torch.from_numpy(minima),
    )


def _codes(
    info: PackedInfo, words: np.ndarray, origin: tuple[int, int], rows: tuple[int, int], width: int
) -> np.ndarray:
    """Codes [rows, width] of rows counted from the slice's first: uint8, or int8 of 8 bits."""
    format, (row, col) = info.type, origin
    if format.method == "awq":
        before = row % format.per_word  # outputs of the first word that belong to the rows before
        return awq.codes_of_outputs(words, before + rows[0], before + rows[1])
    codes = gptq.codes_of_outputs(words, *rows, format.bits)
    before = col % format.per_word
    codes = codes[:, before : before + width]
    return (codes ^ np.uint8(128)).view(np.int8) if format.bits == 8 else codes


def _zeros(info: PackedInfo, words: np.ndarray, before: int, height: int) -> np.ndarray | None:
    """Zero points [groups, height], uint8; None where all are the middle, as a symmetric format says."""
    format, held = info.type, info.qzeros
    fields = awq.fields(words) if format.method == "awq" else gptq.fields(words, format.bits)
    stored = fields[:, before : before + height]
    top, middle = (1 << format.bits) - 1, 1 << (format.bits - 1)
    if format.symmetric:
        # Some writers say "gptq" and store zero points as gptq_v2 does. What is symmetric tells them apart.
        if not any(np.all(stored == middle - less) for less in {0, format.zero_shift}):
            raise BadModelFile(
                held.file, held.name, f"holds other zero points than {middle} in a symmetric format"
            )
        return None
    if format.zero_shift and np.any(stored == top):
        # Its kernels make 2**bits of it, its Python code 0, and GPTQModel carries into the next field.
        raise UnsupportedModel(
            f"{held.file}: {held.name}: a stored zero point of {top} means different things to different "
            "readers of checkpoint_format gptq; save the model as gptq_v2"
        )
    return stored + np.uint8(format.zero_shift)


def _floats(raw: np.ndarray, info: TensorInfo) -> np.ndarray:
    """Bytes [rows, bytes] of a float tensor as fp16 or fp32, nothing rounded."""
    if info.type is TensorType.F16:
        return raw.view("<f2")
    if info.type is TensorType.F32:
        return raw.view("<f4")
    return (raw.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)


def _fp16(raw: np.ndarray, info: TensorInfo) -> np.ndarray:
    values = _floats(raw, info)
    with np.errstate(over="ignore", invalid="ignore"):
        scales = values.astype(np.float16)
    if not np.isfinite(scales).all():
        raise BadModelFile(info.file, info.name, "a scale is not a finite fp16 number")
    if not np.array_equal(scales.astype(np.float32), values.astype(np.float32)):
        raise UnsupportedModel(
            f"{info.file}: {info.name}: a scale of type {info.type} is not exact in fp16, which is needed"
        )
    return scales
