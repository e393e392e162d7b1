"""Rows of the token table, dequantised exactly, as the residual stream's beginning.

A quantised table stays in the planar form: bit planes in blocks of 128 columns, a plane of b bits having
8 * b int16 words a block, field j of word w being column 8 * b * j + w; int8 codes as they are. Its formula,
fp32, each operation rounded by itself:

    scale  = d * sub_scale,  offset = m * sub_min,  w = (code - zero_point) * scale + offset

without the factors and the sum where the type has none. A dense table is widened. A shard of the vocabulary
gives zeros for tokens it does not hold, so that shards add up to the row. Knows no file.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gpu.launch import check, launch, same_device
from kernels.gpu.overlap import after_previous, overlapping
from kernels.gpu.planar import Planar

_COLUMNS = 1024  # a program's; no sum runs across them
_WARPS = 4
_DENSE = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit
def _field(plane_ptr, row, column, mask, BITS: tl.constexpr, BLOCKS: tl.constexpr):
    """Codes of one plane, int32; of 8 bits, with their sign."""
    if BITS == 8:
        return tl.load(plane_ptr + row * (BLOCKS * 128) + column, mask=mask, other=0).to(tl.int32)
    else:
        words: tl.constexpr = 8 * BITS
        inside = column % 128
        word = row * (BLOCKS * words) + (column // 128) * words + inside % words
        found = tl.load(plane_ptr + word, mask=mask, other=0).to(tl.int32)
        return (found >> (inside // words * BITS)) & ((1 << BITS) - 1)


@triton.jit
def embed_planar_kernel(
    low_ptr,
    high_ptr,
    d_ptr,
    m_ptr,
    sub_scales_ptr,
    sub_mins_ptr,
    tokens_ptr,
    out_ptr,
    first,
    rows,
    H: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    ZERO_POINT: tl.constexpr,
    GROUP: tl.constexpr,
    SUPER_GROUP: tl.constexpr,
    SUB_SCALES: tl.constexpr,
    OFFSETS: tl.constexpr,
    SUB_MINS: tl.constexpr,
    PAIRED: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    after_previous(OVERLAP)
    at = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(tokens_ptr + at).to(tl.int64) - first
    w = tl.zeros((BLOCK,), tl.float32)
    if (row >= 0) & (row < rows):
        mask = column < H
        BLOCKS: tl.constexpr = (H + 127) // 128
        code = _field(low_ptr, row, column, mask, LOW, BLOCKS)
        if HIGH > 0:
            code |= _field(high_ptr, row, column, mask, HIGH, BLOCKS) << LOW
        coarse = row * (H // SUPER_GROUP) + column // SUPER_GROUP
        fine = row * (H // GROUP) + column // GROUP
        scale = tl.load(d_ptr + coarse, mask=mask, other=0.0).to(tl.float32)
        if SUB_SCALES:
            both = tl.load(sub_scales_ptr + fine, mask=mask, other=0).to(tl.int32)
            scale *= ((both & 15) if PAIRED else both).to(tl.float32)
        w = (code - ZERO_POINT).to(tl.float32) * scale
        if OFFSETS:
            offset = tl.load(m_ptr + coarse, mask=mask, other=0.0).to(tl.float32)
            if PAIRED:
                offset *= (both >> 4).to(tl.float32)
            if SUB_MINS:
                offset *= tl.load(sub_mins_ptr + fine, mask=mask, other=0).to(tl.float32)
            w += offset
    tl.store(out_ptr + at * H + column, w, mask=column < H)


@triton.jit
def embed_dense_kernel(
    table_ptr,
    tokens_ptr,
    out_ptr,
    first,
    rows,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    after_previous(OVERLAP)
    at = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(tokens_ptr + at).to(tl.int64) - first
    x = tl.zeros((BLOCK,), tl.float32)
    if (row >= 0) & (row < rows):
        x = tl.load(table_ptr + row * H + column, mask=column < H, other=0.0).to(tl.float32)
    tl.store(out_ptr + at * H + column, x, mask=column < H)


def embed(table: torch.Tensor | Planar, tokens: torch.Tensor, out: torch.Tensor, first: int = 0) -> None:
    """out[i] = the row of token tokens[i], fp32 [M, H], overwritten.

    table: fp16, bf16 or fp32 [V, H], or planar. Its first row is token `first`; tokens that it does not hold
    give zeros. tokens: int32 or int64 [M]. Raises ValueError naming what does not fit.
    """
    check("embed", "tokens", tokens, (torch.int32, torch.int64), -1)
    if first < 0:
        raise ValueError(f"embed: first is {first}, below 0")
    if isinstance(table, torch.Tensor):
        check("embed", "table", table, _DENSE, -1, -1)
        rows, width = table.shape
        same_device("embed", table=table, tokens=tokens, out=out)
    else:
        rows, width = table.rows, table.cols
        _check_planar(table)
        same_device("embed", planes=table.planes[0], tokens=tokens, out=out)
    check("embed", "out", out, torch.float32, len(tokens), width)
    grid = (len(tokens), -(-width // _COLUMNS))
    shared = {"warps": _WARPS, "H": width, "BLOCK": _COLUMNS, "OVERLAP": overlapping(tokens.device)}
    if isinstance(table, torch.Tensor):
        launch(embed_dense_kernel, grid, table, tokens, out, first, rows, **shared)
        return
    unused = table.d
    launch(
        embed_planar_kernel,
        grid,
        table.planes[0],
        table.planes[-1],
        table.d,
        unused if table.m is None else table.m,
        unused if table.sub_scales is None else table.sub_scales,
        unused if table.sub_mins is None else table.sub_mins,
        tokens,
        out,
        first,
        rows,
        LOW=table.bits[0],
        HIGH=table.bits[1] if len(table.bits) > 1 else 0,
        ZERO_POINT=table.zero_point,
        GROUP=table.group,
        SUPER_GROUP=table.super_group,
        SUB_SCALES=table.sub_scales is not None,
        OFFSETS=table.m is not None,
        SUB_MINS=table.sub_mins is not None,
        PAIRED=table.paired,
        **shared,
    )


def _check_planar(table: Planar) -> None:
    bits, rows, cols = tuple(table.bits), table.rows, table.cols
    if bits not in ((8,), (4,), (2,), (1,), (4, 1), (4, 2), (2, 1)) or len(table.planes) != len(bits):
        raise ValueError(f"embed: {len(table.planes)} planes of {bits} bits")
    if min(table.group, table.super_group) < 1 or cols % table.super_group or table.super_group % table.group:
        raise ValueError(f"embed: groups of {table.group} in {table.super_group} columns, of {cols}")
    blocks = -(-cols // 128)
    for width, plane in zip(bits, table.planes, strict=True):
        words, dtype = (128, torch.int8) if width == 8 else (8 * width, torch.int16)
        check("embed", f"plane of {width} bits", plane, dtype, rows, blocks * words)
    for name, dtypes, group in (
        ("d", torch.float16, table.super_group),
        ("m", torch.float16, table.super_group),
        ("sub_scales", (torch.uint8, torch.int8), table.group),
        ("sub_mins", (torch.uint8, torch.int8), table.group),
    ):
        tensor = getattr(table, name)
        if tensor is not None:
            check("embed", name, tensor, dtypes, rows, cols // group)
            same_device("embed", planes=table.planes[0], **{name: tensor})
    if table.paired and (table.sub_scales is None or table.sub_mins is not None):
        raise ValueError("embed: paired scales need sub_scales and no sub_mins")
    if table.m is None and (table.paired or table.sub_mins is not None):
        raise ValueError("embed: minima without m")
    if table.sub_scales is None and table.sub_mins is None and table.group != table.super_group:
        raise ValueError(f"embed: groups of {table.group} in {table.super_group} without sub_scales")
