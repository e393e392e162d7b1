"""Turns queries and keys to their positions and writes keys and values into the paged cache, in one pass.

Takes the partial sums of the fused q, k, v product, adds them in the tree's order, rotates in the half-split
order (Su et al. 2021; channel i turns with channel i + D/2), each product and the sum rounded by itself in
fp32, and rounds each result once: queries to their tensor, keys and values to the cache. A row's bits depend
on its own sums and position. Knows blocks and slots, but no sequence.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gpu.convert import E4M3_MAX, e4m3_bits, narrowed
from kernels.gpu.fold import check_partials, fold
from kernels.gpu.launch import check, launch, next_power_of_2, same_device
from kernels.gpu.overlap import after_previous, overlapping

_CHANNELS = 1024  # a program's, in whole heads; no sum runs across them, so that it may be any number
_WARPS = 4
_E4M3_MAX = tl.constexpr(E4M3_MAX)


@triton.jit
def rope_store_kernel(
    partials_ptr,
    positions_ptr,
    slots_ptr,
    cos_ptr,
    sin_ptr,
    q_ptr,
    cache_ptr,
    scales_ptr,
    stride,
    table,
    capacity,
    S: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PAGE: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    TILE_HALF: tl.constexpr,
    FP8: tl.constexpr,
    SCALED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program (row, t) takes heads t * TILE_HEADS and on: those of q, then of k, then of v."""
    after_previous(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    if (slot >= 0) & (slot < capacity):
        head = (tl.program_id(1) * TILE_HEADS + tl.arange(0, TILE_HEADS))[:, None]
        channel = tl.arange(0, TILE_HALF)[None, :]
        mask = (head < HEADS + 2 * KV_HEADS) & (channel < HALF)
        at = row * ((HEADS + 2 * KV_HEADS) * 2 * HALF) + head * (2 * HALF) + channel
        low = fold(partials_ptr, stride, at, mask, S)
        high = fold(partials_ptr, stride, at + HALF, mask, S)

        # A position that the table does not have shows as NaN rather than as another one's angle.
        angle = tl.load(positions_ptr + row).to(tl.int64) * HALF + channel
        known = (angle >= 0) & (angle < table) & (channel < HALF)
        cos = tl.load(cos_ptr + angle, mask=known, other=float("nan"))
        sin = tl.load(sin_ptr + angle, mask=known, other=float("nan"))
        turns = head < HEADS + KV_HEADS
        new_low = tl.where(turns, low * cos - high * sin, low)
        new_high = tl.where(turns, high * cos + low * sin, high)

        is_q = mask & (head < HEADS)
        q_at = q_ptr + row * (HEADS * 2 * HALF) + head * (2 * HALF) + channel
        tl.store(q_at, narrowed(new_low, q_ptr.dtype.element_ty), mask=is_q)
        tl.store(q_at + HALF, narrowed(new_high, q_ptr.dtype.element_ty), mask=is_q)

        kv = head - HEADS  # keys, then values
        is_kv = mask & (kv >= 0)
        page = ((slot // PAGE) * (2 * KV_HEADS) + kv) * PAGE + slot % PAGE
        kv_at = cache_ptr + page * (2 * HALF) + channel
        if FP8:
            if SCALED:
                size = tl.maximum(tl.abs(new_low), tl.abs(new_high))
                largest = tl.max(tl.where(mask, size, 0.0), axis=1, keep_dims=True)
                scale = tl.div_rn(largest, tl.full(largest.shape, _E4M3_MAX, tl.float32))
                tl.store(scales_ptr + page, scale, mask=(kv >= 0) & (kv < 2 * KV_HEADS))
                divisor = tl.where(scale > 0.0, scale, 1.0)  # all zeros, or too small to scale
                new_low = tl.div_rn(new_low, tl.broadcast_to(divisor, new_low.shape))
                new_high = tl.div_rn(new_high, tl.broadcast_to(divisor, new_high.shape))
            tl.store(kv_at, e4m3_bits(new_low), mask=is_kv)
            tl.store(kv_at + HALF, e4m3_bits(new_high), mask=is_kv)
        else:
            tl.store(kv_at, narrowed(new_low, cache_ptr.dtype.element_ty), mask=is_kv)
            tl.store(kv_at + HALF, narrowed(new_high, cache_ptr.dtype.element_ty), mask=is_kv)


def rope_store(
    partials: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q: torch.Tensor,
    cache: torch.Tensor,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    scales: torch.Tensor | None = None,
) -> None:
    """Queries to `q`, keys and values to `cache` at `slots`.

    partials: fp32 [S, M, (heads + 2 * kv_heads) * D]: q, then k, then v, head by head. positions: int32 or
    int64 [M]. cos, sin: fp32 [positions, D/2]. q: fp16 or bf16 [M, heads, D]. cache: q's type or
    float8_e4m3fn, [blocks, 2, kv_heads, block_size, D]. slots: int32 or int64 [M], block * block_size +
    offset; a row whose slot is -1 (or past the cache) writes nothing at all.
    scales, for an fp8 cache: fp32 [blocks, 2, kv_heads, block_size]; a token's head is divided by its largest
    absolute value / 448, stored there. Without them values are cast, saturating at +-448.
    Raises ValueError naming what does not fit.
    """
    if heads < 1 or kv_heads < 1 or head_dim < 2 or head_dim % 2:
        raise ValueError(f"rope_store: {heads} heads, {kv_heads} kv_heads and a head_dim of {head_dim}")
    check("rope_store", "q", q, (torch.float16, torch.bfloat16), -1, heads, head_dim)
    rows, half, all_heads = q.shape[0], head_dim // 2, heads + 2 * kv_heads
    count = check_partials("rope_store", partials, rows, all_heads * head_dim)
    integers = (torch.int32, torch.int64)
    check("rope_store", "positions", positions, integers, rows)
    check("rope_store", "slots", slots, integers, rows)
    check("rope_store", "cos", cos, torch.float32, -1, half)
    check("rope_store", "sin", sin, torch.float32, cos.shape[0], half)
    check("rope_store", "cache", cache, (q.dtype, torch.float8_e4m3fn), -1, 2, kv_heads, -1, head_dim)
    blocks, page, fp8 = cache.shape[0], cache.shape[3], cache.dtype == torch.float8_e4m3fn
    if page < 1 or page & (page - 1):
        raise ValueError(f"rope_store: cache has blocks of {page} positions, not a power of two")
    if scales is not None:
        if not fp8:
            raise ValueError(f"rope_store: scales are for a float8_e4m3fn cache, not for {cache.dtype}")
        check("rope_store", "scales", scales, torch.float32, blocks, 2, kv_heads, page)
    same_device(
        "rope_store", q=q, partials=partials, positions=positions, slots=slots, cos=cos, sin=sin, cache=cache,
        scales=scales,
    )  # fmt: skip
    tile_half = next_power_of_2(half)
    tile_heads = min(next_power_of_2(all_heads), max(1, _CHANNELS // (2 * tile_half)))
    launch(
        rope_store_kernel,
        (rows, -(-all_heads // tile_heads)),
        partials,
        positions,
        slots,
        cos,
        sin,
        q,
        cache.view(torch.uint8) if fp8 else cache,
        q if scales is None else scales,
        rows * all_heads * head_dim,
        cos.numel(),
        blocks * page,
        warps=_WARPS,
        S=count,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HALF=half,
        PAGE=page,
        TILE_HEADS=tile_heads,
        TILE_HALF=tile_half,
        FP8=fp8,
        SCALED=scales is not None,
        OVERLAP=overlapping(q.device),
    )
