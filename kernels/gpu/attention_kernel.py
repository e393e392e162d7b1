"""The kernel of paged attention: one tile of query rows against KV in pages, streamed or a segment at a time.

kernels/gpu/attention.py launches it and says what it computes; what fixes its bits is in attention_fold.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gpu.attention_fold import EMPTY, TILE, fold, power_of_2, tile_sum
from kernels.gpu.launch import INTERPRETED
from kernels.gpu.overlap import after_previous

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def _widen(x, TYPE: tl.constexpr):
    """KV as the products want it. uint8 stands for e4m3 where the GPU lacks it; exact but for NaN."""
    if x.dtype == tl.uint8:
        x = x.to(tl.int16)
        bits = ((x & 0x80) << 8) | ((x & 0x7F) << 7)
        return (bits.to(tl.float16, bitcast=True) * 256.0).to(TYPE)
    return x.to(TYPE)


@triton.jit
def _dot(a, b, added):
    if _INTERPRETED:  # whose products take bf16 for integers; widened, they are as exact
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, added)


@triton.jit
def _tile(
    peak,
    total,
    values,
    query,  # [WIDTH, PADDED]
    position,  # [WIDTH]: where each row stands
    origin,  # of the tile's first position
    low,  # the program's rows see positions low .. high - 1, each a part of them
    high,
    first_position,  # of the first row
    cache,
    scales,
    table,
    kv_head,
    part,
    exponent_scale,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    SCALED: tl.constexpr,
):
    """The segment's (peak, total, values) with one more tile of KV."""
    WIDTH: tl.constexpr = query.shape[0]
    # Probabilities are kept times 2**LIFT, off the subnormals of fp16; a scale of V may still multiply them.
    LIFT: tl.constexpr = 7.0 if SCALED else 15.0
    d = tl.arange(0, query.shape[1])
    e = part * values.shape[1] + tl.arange(0, values.shape[1])
    where = origin + tl.arange(0, TILE)
    live = where < high
    if WINDOW:
        live = live & (where >= low)
    block = tl.load(table + where // BLOCK, mask=live, other=0).to(tl.int64)
    inside = kv_head * BLOCK + where % BLOCK  # of the block's keys; its values lie behind
    kv = cache + (block * (2 * KV_HEADS * BLOCK * D) + inside * D)[:, None]
    key = tl.load(kv + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0)
    fresh = tl.zeros([WIDTH, TILE], tl.float32)
    score = _dot(query, tl.trans(_widen(key, query.dtype)), fresh)
    if SCALED:
        scale = scales + block * (2 * KV_HEADS * BLOCK) + inside
        score *= tl.load(scale, mask=live, other=0.0)[None, :]
    partly = origin + TILE > first_position + 1
    if WINDOW:
        partly = partly | (origin < high - WINDOW)
    if partly:
        visible = where[None, :] <= position[:, None]
        if WINDOW:
            visible = visible & (where[None, :] > position[:, None] - WINDOW)
        score = tl.where(visible, score, float("-inf"))
    top = tl.maximum(peak, tl.ceil(tl.max(score, axis=1) * exponent_scale))
    keep = power_of_2(peak - top)
    weight = tl.exp2(tl.fma(score, exponent_scale, (LIFT - top)[:, None]))
    total = total * keep + tile_sum(weight, WIDTH)
    if SCALED:
        weight *= tl.load(scale + KV_HEADS * BLOCK, mask=live, other=0.0)[None, :]
    value = tl.load(kv + KV_HEADS * BLOCK * D + e[None, :], mask=live[:, None] & (e < D)[None, :], other=0.0)
    values = _dot(weight.to(query.dtype), _widen(value, query.dtype), values * keep[:, None])
    return top, total, values


@triton.jit(do_not_specialize=["batch", "max_blocks", "split_rows", "segments"])
def attend(
    q,  # [M, HEADS, D]
    cache,  # [blocks, 2, KV_HEADS, BLOCK, D]
    scales,  # fp32 [blocks, 2, KV_HEADS, BLOCK] if SCALED
    block_table,  # int32 [batch, max_blocks]
    query_start,  # int32 [batch + 1]
    context_len,  # int32 [batch]
    out,  # [M, HEADS, D]
    peaks,  # fp32 [batch, KV_HEADS, segments, split_rows * group] if SPLIT, and so the next two
    totals,
    partials,  # fp32 [..., segments, D]
    exponent_scale,  # softmax scale x log2(e)
    batch,
    max_blocks,
    split_rows,  # sequences of up to so many rows are split, longer ones streamed
    segments,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    PADDED: tl.constexpr,  # D up to a power of two
    VALUES: tl.constexpr,  # columns of V that one program takes; divides PADDED
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    WINDOW: tl.constexpr,  # 0: none
    TILES: tl.constexpr,  # of positions, a segment
    SCALED: tl.constexpr,
    SPLIT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Grid (lanes, KV heads, sequences x tiles) if SPLIT: a lane takes every so many-th segment of a tile.
    Else (tiles of all sequences, KV heads). Parts of V's columns multiply the first."""
    after_previous(OVERLAP)  # programs that find nothing to do wait, too: whoever comes next relies on it
    GROUP: tl.constexpr = HEADS // KV_HEADS
    TOKENS: tl.constexpr = WIDTH // GROUP  # a tile
    kv_head = tl.program_id(1)
    part = tl.program_id(0) % (PADDED // VALUES)
    first = tl.program_id(0) // (PADDED // VALUES)
    if SPLIT:
        tiles = tl.num_programs(2) // batch
        sequence = tl.program_id(2) // tiles
        tile = tl.program_id(2) % tiles
    else:
        # Sequence b owns the tiles from query_start[b] // TOKENS + b on: enough, and found without a list.
        # The last tiles of a prompt see the most, and so come first.
        number = tl.num_programs(0) // (PADDED // VALUES) - 1 - first
        sequence = -1
        for base in range(0, batch, 128):
            b = base + tl.arange(0, 128)
            owned = tl.load(query_start + b, mask=b < batch, other=0) // TOKENS + b
            sequence += tl.sum(((owned <= number) & (b < batch)).to(tl.int32))
        sequence = tl.maximum(sequence, 0)
        tile = number - tl.load(query_start + sequence) // TOKENS - sequence

    context = tl.load(context_len + sequence)
    start = tl.load(query_start + sequence)
    rows = tl.load(query_start + sequence + 1) - start
    first_token = tile * TOKENS
    if (context == 0) | (tile < 0) | (first_token >= rows) | ((rows <= split_rows) != SPLIT):
        return
    # The tile sees positions low .. high - 1; its rows each a part of them.
    first_position = context - rows + first_token
    high = context - rows + tl.minimum(first_token + TOKENS, rows)
    low = tl.maximum(first_position - WINDOW + 1, 0) if WINDOW else 0
    first_tile = low // TILE
    end_tile = (high - 1) // TILE + 1

    # Rows of a tile: tokens, and in each the group's heads. Offsets in the tile are small.
    r = tl.arange(0, WIDTH)
    count = tl.minimum(rows - first_token, TOKENS) * GROUP
    position = first_position + r // GROUP
    d = tl.arange(0, PADDED)
    e = part * VALUES + tl.arange(0, VALUES)
    corner = ((start + first_token).to(tl.int64) * HEADS + kv_head * GROUP) * D
    offset = (r // GROUP * HEADS + r % GROUP) * D
    query = tl.load(
        q + corner + offset[:, None] + d[None, :], mask=(r < count)[:, None] & (d < D)[None, :], other=0.0
    )

    table = block_table + sequence.to(tl.int64) * max_blocks
    if SPLIT:
        lanes = tl.num_programs(0) // (PADDED // VALUES)
        for segment in range(first_tile // TILES + first, (end_tile - 1) // TILES + 1, lanes):
            peak = tl.full([WIDTH], EMPTY, tl.float32)
            total = tl.zeros([WIDTH], tl.float32)
            values = tl.zeros([WIDTH, VALUES], tl.float32)
            begin = tl.maximum(first_tile, segment * TILES)
            for at in range(begin, tl.minimum(end_tile, segment * TILES + TILES)):
                peak, total, values = _tile(
                    peak, total, values, query, position, at * TILE, low, high, first_position, cache, scales,
                    table, kv_head, part, exponent_scale, KV_HEADS, D, BLOCK, WINDOW, SCALED,
                )  # fmt: skip
            slot = (sequence * KV_HEADS + kv_head).to(tl.int64) * segments + segment
            slot = (slot * split_rows + first_token) * GROUP
            tl.store(peaks + slot + r, peak, mask=r < count)
            tl.store(totals + slot + r, total, mask=r < count)
            tl.store(
                partials + slot * D + (r[:, None] * D + e[None, :]),
                values,
                mask=(r < count)[:, None] & (e < D)[None, :],
            )
    else:
        peak = tl.full([WIDTH], EMPTY, tl.float32)  # of the segment
        total = tl.zeros([WIDTH], tl.float32)
        values = tl.zeros([WIDTH, VALUES], tl.float32)
        row_peak = peak  # of all segments before
        row_total = total
        row_values = values
        for at in range(first_tile, end_tile):
            # A segment is closed where the next begins, before that one's products: closed after its own,
            # sm_90's products would wait for each other one by one (docs/gpu/attention.md).
            if at % TILES == 0:
                row_peak, row_total, row_values = fold(row_peak, row_total, row_values, peak, total, values)
                peak = tl.full([WIDTH], EMPTY, tl.float32)
                total = tl.zeros([WIDTH], tl.float32)
                values = tl.zeros([WIDTH, VALUES], tl.float32)
            peak, total, values = _tile(
                peak, total, values, query, position, at * TILE, low, high, first_position, cache, scales,
                table, kv_head, part, exponent_scale, KV_HEADS, D, BLOCK, WINDOW, SCALED,
            )  # fmt: skip
        row_peak, row_total, row_values = fold(row_peak, row_total, row_values, peak, total, values)
        result = tl.div_rn(row_values, row_total[:, None]).to(query.dtype)
        tl.store(
            out + corner + (offset[:, None] + e[None, :]),
            result,
            mask=(r < count)[:, None] & (e < D)[None, :],
        )
