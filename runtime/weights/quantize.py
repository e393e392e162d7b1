"""Quantises dense weights to 4 bits on load: groups of 32 columns, asymmetric, scale and minimum in fp16.

Group g covers columns 32 g .. 32 g + 31 of the tensor, so a column slice that starts on a group boundary
quantises as it does within the whole. Deterministic: elementwise fp32 operations and exact reductions only.
"""

from __future__ import annotations

import numpy as np
import torch

from runtime.weights.blocks import Parts, QuantSpec
from runtime.weights.planar import Planar, cut_parts, planar_of_parts

GROUP = 32
_CHUNK = 1 << 20  # elements at a time


def quantize_int4(weight: torch.Tensor) -> Planar:
    """weight [rows, cols] of any float type -> Planar "INT4" with w = code * d + m, 0 <= code <= 15.

    d = fp16((max - min) / 15), m = fp16(min), code = round-to-even((w - m) / d), clamped; d is 0 (and so are
    the codes) where the group is constant. If cols is not a multiple of 32 the last group is shorter, and
    scales repeat over the largest group size that divides cols. ValueError if a weight is not finite or a
    scale or minimum leaves fp16's range."""
    rows, cols = weight.shape
    groups = -(-cols // GROUP)
    codes = np.empty((rows, cols), np.uint8)
    d, m = np.empty((rows, groups), np.float16), np.empty((rows, groups), np.float16)
    step = max(1, _CHUNK // (groups * GROUP))
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        codes[part], d[part], m[part] = _quantize_rows(weight[part].to(torch.float32).numpy())
    whole = Parts(codes, d, m)
    spec = QuantSpec((4,), 0, GROUP, GROUP)
    return planar_of_parts("INT4", *reversed(cut_parts(whole, spec, 0, cols)))


def _quantize_rows(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows, cols = weight.shape
    groups = -(-cols // GROUP)
    if cols % GROUP:  # repeat the last column: it changes neither minimum nor maximum of its group
        weight = np.pad(weight, ((0, 0), (0, groups * GROUP - cols)), mode="edge")
    grouped = weight.reshape(rows, groups, GROUP)
    low, high = grouped.min(axis=-1), grouped.max(axis=-1)
    with np.errstate(over="ignore", invalid="ignore"):
        d, m = ((high - low) / np.float32(15)).astype(np.float16), low.astype(np.float16)
    if not (np.isfinite(d).all() and np.isfinite(m).all()):
        raise ValueError("a weight is not finite or too large for int4 groups with fp16 scales")
    scale = d.astype(np.float32)[..., None]
    codes = grouped - m.astype(np.float32)[..., None]
    np.divide(codes, scale, out=codes, where=scale != 0)
    np.copyto(codes, 0, where=scale == 0)
    np.clip(np.rint(codes, out=codes), 0, 15, out=codes)
    return codes.astype(np.uint8).reshape(rows, -1)[:, :cols], d, m
