"""Attention over a paged KV cache: prefill, decode, and both in one batch, with the same bits either way.

The query heads that read one KV head are packed into the rows of one tile (tokens x group), which meets that
head's KV in tiles of 64 positions. Queries are the M of the matrix instructions, always in multiples of the
same one, so how many share a tile shows in no row. A sequence of few rows (decode, a draft to be verified) is
shared out over programs by segments of 512 positions, which leave partial results that a second kernel folds;
a longer one is streamed, all its segments in one program. kernels/gpu/attention_fold.py has what fixes bits,
and docs/gpu/attention.md why it is built so. Knows nothing of how KV got into the cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.gpu.attention_fold import EMPTY, SEGMENT, TILE, fold, fold_segments, power_of_2, tile_sum
from kernels.gpu.launch import INTERPRETED, check, launch, next_power_of_2, same_device

FP8 = torch.float8_e4m3fn
_NAME = "paged_attention"


@dataclass(frozen=True, slots=True)
class AttentionTuning:
    """Launch shapes, none of which can change a bit. Widths are query rows (tokens x group) a program takes:
    a power of two, at least 64 where matrix instructions are warp-group wide (sm_90 and up), else 16."""

    split_width: int = 64
    split_warps: int = 4
    split_stages: int = 3
    split_programs: int = 2048  # about as many programs share the segments; more exit early, empty
    stream_width: int = 128
    stream_warps: int = 8
    stream_stages: int = 2


@triton.jit
def _widen(x, TYPE: tl.constexpr):
    """KV as the products want it. uint8 stands for e4m3 on GPUs without it: exact but for NaN, never stored."""
    if x.dtype == tl.uint8:
        x = x.to(tl.int16)
        bits = ((x & 0x80) << 8) | ((x & 0x7F) << 7)
        return (bits.to(tl.float16, bitcast=True) * 256.0).to(TYPE)
    return x.to(TYPE)


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
    score = tl.dot(query, tl.trans(_widen(key, query.dtype)))
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
    values = tl.dot(weight.to(query.dtype), _widen(value, query.dtype), values * keep[:, None])
    return top, total, values


@triton.jit(do_not_specialize=["batch", "max_blocks", "split_rows", "segments"])
def _attend(
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
):
    """SPLIT: grid (lanes, KV heads, sequence x tile); lane z takes segments z, z + lanes, ... of its tile.
    Else: grid (tiles of all sequences, KV heads, parts of V's columns)."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    TOKENS: tl.constexpr = WIDTH // GROUP  # a tile
    kv_head = tl.program_id(1)
    if SPLIT:
        tiles = (split_rows + TOKENS - 1) // TOKENS
        sequence = tl.program_id(2) // tiles
        tile = tl.program_id(2) % tiles
        part = 0
    else:
        # Sequence b owns the tiles from query_start[b] // TOKENS + b on: enough, and found without a list.
        # The last tiles of a prompt see the most, and so come first.
        number = tl.num_programs(0) - 1 - tl.program_id(0)
        sequence = -1
        for base in range(0, batch, 128):
            b = base + tl.arange(0, 128)
            owned = tl.load(query_start + b, mask=b < batch, other=0) // TOKENS + b
            sequence += tl.sum(((owned <= number) & (b < batch)).to(tl.int32))
        tile = number - tl.load(query_start + sequence) // TOKENS - sequence
        part = tl.program_id(2)

    context = tl.load(context_len + sequence)
    start = tl.load(query_start + sequence)
    rows = tl.load(query_start + sequence + 1) - start
    first_token = tile * TOKENS
    if (context == 0) | (first_token >= rows) | ((rows <= split_rows) != SPLIT):
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
        first_segment = first_tile // TILES + tl.program_id(0)
        for segment in range(first_segment, (end_tile - 1) // TILES + 1, tl.num_programs(0)):
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


def workspace_floats(batch: int, heads: int, head_dim: int, positions: int, *, split_rows: int = 1) -> int:
    """fp32 elements of workspace that `paged_attention` needs for a batch of so many sequences, of up to
    `positions` positions each (max_blocks x block_size)."""
    return batch * split_rows * heads * -(-positions // SEGMENT) * (head_dim + 2)


def tuning_for(head_dim: int, device: torch.device | str) -> AttentionTuning:
    """Launch shapes for a GPU, by its generation. Not timed yet (docs/gpu/attention.md)."""
    if INTERPRETED or torch.cuda.get_device_capability(device) >= (9, 0):
        return AttentionTuning() if head_dim <= 128 else AttentionTuning(split_stages=2)
    return AttentionTuning(split_width=16, split_stages=2)


def paged_attention(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start: torch.Tensor,
    context_len: torch.Tensor,
    out: torch.Tensor,
    workspace: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    scales: torch.Tensor | None = None,
    split_rows: int = 1,
    longest: int | None = None,
    tuning: AttentionTuning | None = None,
) -> None:
    """Causal attention of a step's rows over their sequences' KV; what a row gets depends on it alone.

    q: fp16 or bf16 [M, heads, D], D a multiple of 16 from 64 to 256. cache: [blocks, 2, KV heads, block_size,
    D], keys then values, of q's type or float8_e4m3fn; `scales`, fp32 [blocks, 2, KV heads, block_size],
    multiply an fp8 cache, a token and head each. block_table: int32 [B, max_blocks]; query_start: int32
    [B + 1], sequence b's rows are query_start[b] .. query_start[b + 1] - 1; context_len: int32 [B], positions
    after this step, so that row i of n stands at context_len[b] - n + i; 0 for a padding sequence. What
    block_table holds past a sequence's end, and the cache outside its positions, is not looked at; all keys
    and values inside must be finite. out: as q; rows of no sequence are left alone.

    A row sees positions up to its own, the last `window` of them if given. `scale` multiplies q . k.
    Sequences of up to `split_rows` rows share their segments out over programs, through `workspace` (fp32,
    `workspace_floats`); longer ones are streamed. `longest` bounds the rows of any sequence, if the caller
    knows better than M: up to split_rows, nothing is launched for longer ones. Grids follow from shapes and
    these numbers alone, so a call can be captured in a CUDA graph.

    Raises ValueError naming the tensor or setting that does not fit."""
    group = _check(q, cache, block_table, query_start, context_len, out, scales, scale, window)
    rows, heads, dim = q.shape
    kv_heads, block_size = cache.shape[2:4]
    batch, max_blocks = block_table.shape
    tuning = tuning or tuning_for(dim, q.device)
    longest = rows if longest is None else longest
    if split_rows < 0 or longest < 0:
        raise ValueError(f"{_NAME}: split_rows is {split_rows}, longest {longest}; neither may be negative")
    least = max(16, group)
    if not INTERPRETED and torch.cuda.get_device_capability(q.device) >= (9, 0):
        least = max(64, group)
    for name in ("split_width", "stream_width"):
        width = getattr(tuning, name)
        if width < least or width & (width - 1):
            raise ValueError(f"{_NAME}: {name} is {width}, not a power of two from {least} on")
    check(_NAME, "workspace", workspace, torch.float32, -1)
    needed = workspace_floats(batch, heads, dim, max_blocks * block_size, split_rows=split_rows)
    if workspace.numel() < needed:
        raise ValueError(f"{_NAME}: workspace has {workspace.numel()} elements, not {needed}")
    same_device(
        _NAME, q=q, cache=cache, block_table=block_table, query_start=query_start, context_len=context_len,
        out=out, workspace=workspace, scales=scales,
    )  # fmt: skip

    segments = -(-max_blocks * block_size // SEGMENT)
    slots = batch * split_rows * heads * segments
    partials = workspace[: slots * dim]
    peaks = workspace[slots * dim :]
    totals = workspace[slots * (dim + 1) :]
    if cache.dtype == FP8 and not INTERPRETED and torch.cuda.get_device_capability(q.device) < (8, 9):
        cache = cache.view(torch.uint8)
    pointers = (q, cache, scales, block_table, query_start, context_len, out, peaks, totals, partials)
    numbers = (scale * math.log2(math.e), batch, max_blocks, split_rows, segments)
    padded = next_power_of_2(dim)
    shape = {
        "HEADS": heads, "KV_HEADS": kv_heads, "D": dim, "PADDED": padded, "BLOCK": block_size,
        "WINDOW": window or 0, "TILES": SEGMENT // TILE.value, "SCALED": scales is not None,
    }  # fmt: skip
    if split_rows:
        width = tuning.split_width
        tiles = -(-min(split_rows, longest) // (width // group))
        lanes = min(segments, -(-tuning.split_programs // (kv_heads * batch * tiles or 1)))
        launch(
            _attend, (lanes, kv_heads, batch * tiles), *pointers, *numbers, **shape, VALUES=padded,
            WIDTH=width, SPLIT=True, warps=tuning.split_warps, stages=tuning.split_stages,
        )  # fmt: skip
        launch(
            fold_segments, (batch * split_rows, heads), peaks, totals, partials, query_start, context_len, out,
            segments, split_rows, HEADS=heads, KV_HEADS=kv_heads, D=dim, PADDED=padded, WINDOW=window or 0, SPAN=SEGMENT,
            warps=1, stages=3,
        )  # fmt: skip
    if longest > split_rows:
        width = tuning.stream_width
        values = min(padded, 128)  # wider ones, twice over, would not leave room for registers
        launch(
            _attend, (rows // (width // group) + batch, kv_heads, padded // values), *pointers, *numbers, **shape,
            VALUES=values, WIDTH=width, SPLIT=False, warps=tuning.stream_warps, stages=tuning.stream_stages,
        )  # fmt: skip


def _check(q, cache, block_table, query_start, context_len, out, scales, scale, window) -> int:
    """Refuse what the kernels do not take; the query heads that read one KV head."""
    check(_NAME, "q", q, (torch.float16, torch.bfloat16), -1, -1, -1)
    rows, heads, dim = q.shape
    if dim % 16 or not 64 <= dim <= 256:
        raise ValueError(f"{_NAME}: head dimension {dim} is not a multiple of 16 from 64 to 256")
    check(_NAME, "cache", cache, (q.dtype, FP8), -1, 2, -1, -1, dim)
    kv_heads, block_size = cache.shape[2:4]
    if block_size & (block_size - 1) or not 16 <= block_size <= 128:
        raise ValueError(f"{_NAME}: block size {block_size} is not a power of two from 16 to 128")
    if kv_heads < 1 or heads % kv_heads or not 1 <= heads // kv_heads <= 64:
        raise ValueError(f"{_NAME}: {heads} heads do not share {kv_heads} KV heads, 1 to 64 each")
    check(_NAME, "block_table", block_table, torch.int32, -1, -1)
    check(_NAME, "query_start", query_start, torch.int32, block_table.shape[0] + 1)
    check(_NAME, "context_len", context_len, torch.int32, block_table.shape[0])
    check(_NAME, "out", out, q.dtype, rows, heads, dim)
    if scales is not None:
        if cache.dtype != FP8:
            raise ValueError(f"{_NAME}: scales belong to an fp8 cache, and this one is {cache.dtype}")
        check(_NAME, "scales", scales, torch.float32, cache.shape[0], 2, kv_heads, block_size)
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"{_NAME}: scale is {scale}, not a positive number")
    if window is not None and window < 1:
        raise ValueError(f"{_NAME}: window is {window}, not a positive number of positions")
    return heads // kv_heads
