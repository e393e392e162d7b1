"""What fixes the bits of attention: how a tile, a segment and a row are summed, whoever does it.

The KV positions of a row fall into tiles of 64 and segments of 512, by absolute position. Inside a segment
the tiles go in order into one running (peak, sum, values); a segment starts fresh, and segments are folded
from the left. A peak is an integer, in powers of two: so every rescaling is by a power of two, and exact.
Both ways through a row use these functions: one program that streams all its segments (kernels/gpu/
attention.py), and programs that share them and leave partial results for `fold_segments` here. Knows nothing
of pages, masks or queries.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gpu.overlap import after_previous

TILE = tl.constexpr(64)  # positions that one matrix product takes; part of numerics
SEGMENT = 512  # positions that start from a fresh sum; part of numerics
EMPTY = tl.constexpr(-1e30)  # the peak of no positions at all; finite, so that no difference is NaN


@triton.jit
def power_of_2(exponent):
    """2**exponent for integers <= 0 kept in fp32, exactly; 0 from -127 on."""
    return ((tl.maximum(exponent, -127.0) + 127.0).to(tl.int32) << 23).to(tl.float32, bitcast=True)


@triton.jit
def tile_sum(x, ROWS: tl.constexpr):
    """Sums [ROWS, 64] over its 64 in one order: pairs 32, 16, 8 apart, then neighbours, then 4 and 2 apart.

    `tl.sum` alone adds in an order that follows how the compiler laid out the tensor over threads, which
    follows ROWS and the number of warps. A sum of two has but one order."""
    x = tl.sum(tl.reshape(x, [ROWS, 2, 32]), axis=1)
    x = tl.sum(tl.reshape(x, [ROWS, 2, 16]), axis=1)
    x = tl.sum(tl.reshape(x, [ROWS, 2, 8]), axis=1)
    x = tl.sum(tl.reshape(x, [ROWS, 4, 2]), axis=2)
    x = tl.sum(tl.reshape(x, [ROWS, 2, 2]), axis=1)
    return tl.sum(x, axis=1)


@triton.jit
def fold(peak, total, values, segment_peak, segment_total, segment_values):
    """The rows so far with one more segment: [R], [R], [R, D] each. A segment of which a row sees nothing
    leaves that row's bits as they are. Adding 0.0 makes a -0.0 of an underflow +0.0, as a fresh one is."""
    top = tl.maximum(peak, segment_peak)
    old = power_of_2(peak - top)
    new = power_of_2(segment_peak - top)
    seen = segment_peak > EMPTY
    total = tl.where(seen, total * old + segment_total * new, total)
    added = values * old[:, None] + (segment_values * new[:, None] + 0.0)
    return top, total, tl.where(seen[:, None], added, values)


@triton.jit
def fold_segments(
    peaks,  # fp32 [B, KV heads, segments, split_rows * group]
    totals,  # the same
    partials,  # fp32 [..., D]
    query_start,
    context_len,
    out,  # [M, heads, D]
    segments,
    split_rows,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    PADDED: tl.constexpr,  # D up to a power of two
    WINDOW: tl.constexpr,
    SPAN: tl.constexpr,  # positions a segment
    OVERLAP: tl.constexpr,
):
    """One row of one head: its segments' partial results, in order."""
    after_previous(OVERLAP)
    sequence = tl.program_id(0) // split_rows
    token = tl.program_id(0) % split_rows
    head = tl.program_id(1)
    context = tl.load(context_len + sequence)
    start = tl.load(query_start + sequence)
    rows = tl.load(query_start + sequence + 1) - start
    if (context == 0) | (rows > split_rows) | (token >= rows):
        return
    position = context - rows + token
    first = tl.maximum(position - WINDOW + 1, 0) // SPAN if WINDOW else 0
    d = tl.arange(0, PADDED)[None, :]
    one = tl.arange(0, 1)
    group: tl.constexpr = HEADS // KV_HEADS
    stride = split_rows * group  # from a segment to the next
    at = (sequence * KV_HEADS + head // group).to(tl.int64) * segments * stride
    at += token * group + head % group
    peak = tl.full([1], EMPTY, tl.float32)
    total = tl.zeros([1], tl.float32)
    values = tl.zeros([1, PADDED], tl.float32)
    for segment in range(first, position // SPAN + 1):
        slot = at + segment * stride
        part = tl.load(partials + slot * D + d, mask=d < D, other=0.0)
        part_peak = tl.load(peaks + slot + one)
        part_total = tl.load(totals + slot + one)
        peak, total, values = fold(peak, total, values, part_peak, part_total, part)
    result = tl.div_rn(values, total[:, None])
    row = (start + token).to(tl.int64) * HEADS + head
    tl.store(out + row * D + d, result.to(out.dtype.element_ty), mask=d < D)
