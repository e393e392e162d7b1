"""Attention without the rule, for bench/rule.py: what a plain engine calls torch's operator with.

Single tokens see exactly as many KV positions as the longest of them has, under no mask where all have as
many. A run of tokens is one call, causal, heads grouped by the operator itself. Bits then depend on the
batch and on how a prompt is chunked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kernels import attention
from kernels.attention import AttentionCall


@dataclass(frozen=True, slots=True)
class FreeCall:
    """Rows of q over their KV: B lone tokens [B, KV heads, group, D], or a run [1, heads, T, D]."""

    rows: torch.Tensor | slice | None  # of q; None: all
    run: bool
    blocks: torch.Tensor | slice  # int64 [B, n], 1 for a run, or the neighbours that a lone token reads
    length: int  # KV positions
    mask: torch.Tensor | None  # additive; None where all is seen, or what comes before, as `causal` says
    causal: bool


def blocks_of(positions: int, block_size: int, dtype: torch.dtype) -> int:
    """`attention.padded_blocks` without the padding."""
    return -(-positions // block_size)


def decode_call(
    rows: Sequence[int] | None,
    positions: torch.Tensor,
    blocks: torch.Tensor | slice,
    *,
    tile: int,
    block_size: int,
    window: int | None,
    dtype: torch.dtype,
) -> FreeCall:
    """As `attention.decode_call`."""
    length = int(positions.max()) + 1
    mask = None
    if window is not None or int(positions.min()) + 1 != length:
        mask = _mask(positions[:, None, None, None], length, window, dtype)
    return FreeCall(None if rows is None else torch.tensor(rows), False, blocks, length, mask, False)


def chunk_calls(
    first_row: int,
    start: int,
    length: int,
    blocks: torch.Tensor,
    *,
    group: int,
    tile: int,
    block_size: int,
    window: int | None,
    dtype: torch.dtype,
) -> list[FreeCall]:
    """As `attention.chunk_calls`."""
    stop = start + length
    causal = start == 0 and window is None
    mask = None if causal else _mask(torch.arange(start, stop)[:, None], stop, window, dtype)
    here = blocks[None, : blocks_of(stop, block_size, dtype)]
    return [FreeCall(slice(first_row, first_row + length), True, here, stop, mask, causal)]


def tile_buffers(
    calls: Sequence[AttentionCall | FreeCall] | attention.Tiles, q_shape: Sequence[int], dtype: torch.dtype
) -> list[torch.Tensor | None]:
    """As `attention.tile_buffers`; a free call needs none."""
    if isinstance(calls, attention.Tiles):
        return attention.tile_buffers(calls, q_shape, dtype)
    ruled = [call for call in calls if isinstance(call, AttentionCall)]
    theirs = iter(attention.tile_buffers(ruled, q_shape, dtype))
    return [next(theirs) if isinstance(call, AttentionCall) else None for call in calls]


def paged_attention(
    q: torch.Tensor,
    cache: torch.Tensor,
    calls: Sequence[AttentionCall | FreeCall] | attention.Tiles,
    buffers: Sequence[torch.Tensor | None],
    scale: float,
    out: torch.Tensor,
) -> torch.Tensor:
    """As `attention.paged_attention`, which the ruled ones of `calls` are handed to."""
    if isinstance(calls, attention.Tiles):
        return attention.paged_attention(q, cache, calls, buffers, scale, out)
    for call, buffer in zip(calls, buffers, strict=True):
        if isinstance(call, AttentionCall):
            attention.paged_attention(q, cache, (call,), (buffer,), scale, out)
        else:
            _attend(q, cache, call, scale, out)
    return out


def _attend(q: torch.Tensor, cache: torch.Tensor, call: FreeCall, scale: float, out: torch.Tensor) -> None:
    kv_heads, group, dim = q.shape[1:]
    if isinstance(call.blocks, slice):
        kv, batch = cache[call.blocks], 1
    else:
        kv, batch = cache.index_select(0, call.blocks.view(-1)), call.blocks.shape[0]
    kv = kv.view(batch, -1, 2, kv_heads, dim)[:, : call.length]
    k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
    if isinstance(call.rows, torch.Tensor):
        mine = q.index_select(0, call.rows)
    else:
        mine = q if call.rows is None else q[call.rows]
    if call.run:
        mine = mine.reshape(1, mine.shape[0], kv_heads * group, dim).transpose(1, 2)
    y = torch.nn.functional.scaled_dot_product_attention(
        mine, k, v, attn_mask=call.mask, is_causal=call.causal, scale=scale, enable_gqa=call.run and group > 1
    )
    rows = (y.transpose(1, 2) if call.run else y).reshape(-1, kv_heads * group * dim)
    if isinstance(call.rows, torch.Tensor):
        out.index_copy_(0, call.rows, rows)
    else:
        out[call.rows or slice(0, q.shape[0])] = rows


def _mask(positions: torch.Tensor, length: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """Which of `length` positions each of `positions` [..., 1] sees, additive: [..., length]."""
    at = torch.arange(length)
    seen = at <= positions
    if window is not None:
        seen &= at > positions - window
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))
