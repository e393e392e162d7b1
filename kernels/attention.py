"""Attention over a paged KV cache, grouped-query heads packed into tiles of query rows.

On AMX, bf16 heads of a multiple of 32 channels go to `kernels.native.attention`: `Tiles` stand for the calls
then. The rest of this module is torch's operator, which serves everything else.

What a row's bits are is defined by one call: 16 query rows of one KV head, KV padded to a multiple of 64
(bf16, where a comparison at start-up shows that it is enough) or of 512, an additive mask. Called so, torch's
CPU kernel gives a row the same bits whatever else stands in the tile, the batch or the padding
(docs/numerics.md); called with any number of queries it does not. In bf16, tiles of 2 to 32 rows turn out to
give the bits of 16. Where a comparison at start-up shows that they do (`tile_sizes`), single tokens go
without padding rows, and prompts in tiles of 32.
The kernel reduces KV in segments of 512 absolute positions, in order; its fp32 products also depend on how
long the last segment is, and so do bf16 ones where MKL has no AVX-512 for them: hence the coarser padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from kernels.native import attention as native
from kernels.native import machine
from kernels.native.attention import Tiles, lay_out

__all__ = [
    "TILE",
    "WIDE",
    "AttentionCall",
    "TileSizes",
    "Tiles",
    "block_run",
    "chunk_calls",
    "decode_call",
    "kv_pad",
    "lay_out",
    "native_takes",
    "padded_blocks",
    "paged_attention",
    "tile_buffers",
    "tile_sizes",
]

TILE = 16  # rows of the call that defines the bits
WIDE = 32  # the most rows of a tile where their number is free
SEGMENT = 512  # positions that the kernel reduces at once
FINE_PAD = 64  # positions, where the length of the last segment does not matter
_MASK_LIMIT = 1 << 23  # mask elements of one call; longer work is cut into several calls


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """B tiles of R rows, up to `tokens` tokens each, over KV of one padded length L.

    Rows of a tile past its tokens are padding; `query` names a real row for them and `out` drops them."""

    query: torch.Tensor | None  # int64 [B * tokens]: rows of q; None: all rows of q, in order
    tokens: int
    blocks: torch.Tensor | slice  # int64 [B or 1, L / block_size]: KV blocks in order; 1 is shared by all
    # tiles. A slice is the one run of neighbouring blocks that all tiles read, without a copy.
    mask: torch.Tensor  # [B, 1, R, L] additive
    keep: int  # leading entries of `query` that are real


@dataclass(frozen=True, slots=True)
class TileSizes:
    """Rows of a tile for a single token, and for a run of tokens."""

    single: int
    run: int


def native_takes(dim: int, dtype: torch.dtype) -> bool:
    """Whether `lay_out` makes what `paged_attention` takes, for heads of `dim` channels."""
    return native.takes(dim, dtype) and machine.supported()


def tile_sizes(group: int, dim: int, dtype: torch.dtype) -> TileSizes:
    """The cheapest tiles that give the bits of 16 rows, for `group` query heads a KV head of `dim` channels.

    Which products torch calls for follows from shapes, not from values, so a comparison settles it, given
    values that show any other order of sums: keys in equal pairs whose values cancel, so that the result is
    nothing but the rounding of the sums on the way. A lone row is never taken: it is a vector product, which
    sums in another order. The result may differ between machines; the bits do not."""
    packed = group // _head_split(group)
    wide = TileSizes(max(2, packed), WIDE // packed * packed)
    if dtype == torch.bfloat16 and all(_gives_bits_of_16(n, dim) for n in (wide.single, wide.run)):
        return wide
    return TileSizes(TILE, TILE)


def _gives_bits_of_16(rows: int, dim: int) -> bool:
    dtype = torch.bfloat16
    halves = (slice(0, TILE), slice(TILE, WIDE))
    for length in (64, 192, 512, 1088):
        length = -(-length // kv_pad(dtype)) * kv_pad(dtype)
        q, k, v, mask = _cancelling(length, dim, dtype)
        defined = torch.cat([_attend(q[:, :, rows], k, v, mask[:, :, rows]) for rows in halves], dim=2)
        if not torch.equal(_attend(q[:, :, :rows], k, v, mask[:, :, :rows]), defined[:, :, :rows]):
            return False
    return True


@cache
def kv_pad(dtype: torch.dtype) -> int:
    """Positions to a multiple of which KV is padded, so that bits do not show how much of it there is."""
    fine = dtype == torch.bfloat16 and all(_hides_padding(dim) for dim in (8, 64, 128))
    return FINE_PAD if fine else SEGMENT


def _hides_padding(dim: int) -> bool:
    """Whether 16 rows of bf16 have the same bits by KV padded to FINE_PAD and to SEGMENT."""
    dtype = torch.bfloat16
    for length in (FINE_PAD, 320, SEGMENT + 192):
        q, k, v, mask = _cancelling(length, dim, dtype)
        q, mask = q[:, :, :TILE], mask[:, :, :TILE]
        more = -length % SEGMENT
        k_padded, v_padded = (torch.nn.functional.pad(t, (0, 0, 0, more)) for t in (k, v))
        mask_padded = torch.nn.functional.pad(mask, (0, more), value=float("-inf"))
        if not torch.equal(_attend(q, k, v, mask), _attend(q, k_padded, v_padded, mask_padded)):
            return False
    return True


def _cancelling(length: int, dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Queries, keys, values and mask of 2 tiles of WIDE rows on 3 heads, whose result is nothing but the
    rounding of the sums on the way. `length` is even."""
    draw = torch.Generator().manual_seed(length)
    order = torch.randperm(length // 2, generator=draw)
    q = torch.randn(2, 3, WIDE, dim, generator=draw).to(dtype)
    k, v = (torch.randn(2, 3, length // 2, dim, generator=draw).to(dtype) for _ in range(2))
    k, v = torch.cat((k, k[:, :, order]), dim=2), torch.cat((v, -v[:, :, order]), dim=2)
    seen = torch.rand(2, 1, WIDE, length // 2, generator=draw) < 0.7
    seen[..., 0] = True
    return q, k, v, _additive(torch.cat((seen, seen[..., order]), dim=3), dtype)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=q.shape[3] ** -0.5)


def padded_blocks(positions: int, block_size: int, dtype: torch.dtype) -> int:
    """Blocks that hold `positions` positions after padding. block_size divides 512 or is a multiple of it."""
    pad = max(kv_pad(dtype), block_size)
    return -(-positions // pad) * pad // block_size


def block_run(blocks: Sequence[int], count: int) -> slice | None:
    """`blocks`, extended to `count` entries by whatever follows the last, as one run of neighbours; None if
    they are not neighbours. Entries past the sequence's own hold other sequences' values, all masked."""
    first = blocks[0]
    if any(block != first + i for i, block in enumerate(blocks)):
        return None
    return slice(first, first + count)


def decode_call(
    rows: Sequence[int] | None,
    positions: torch.Tensor,
    blocks: torch.Tensor | slice,
    *,
    tile: int,
    block_size: int,
    window: int | None,
    dtype: torch.dtype,
) -> AttentionCall:
    """One token of each of B sequences, in rows `rows` of q, or in all of them (None). positions int64 [B];
    blocks int64 [B, n] with n from `padded_blocks`, unused entries 0, or a run of n blocks where B is 1.
    `tile` is the rows of a tile."""
    count = blocks.stop - blocks.start if isinstance(blocks, slice) else blocks.shape[1]
    allowed = _allowed(positions[:, None], count * block_size, window)  # [B, 1, L]
    mask = _additive(allowed, dtype)[:, :, None, :].expand(-1, 1, tile, -1)
    query = None if rows is None else torch.tensor(rows)
    return AttentionCall(query, 1, blocks, mask, positions.shape[0])


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
) -> list[AttentionCall]:
    """A run of `length` tokens from position `start` of one sequence, whose rows begin at `first_row`.
    blocks int64 [n] covers positions 0 .. start + length - 1. `tile` is the rows of a tile."""
    packed = group // _head_split(group)
    tokens = tile // packed
    used = tokens * packed
    calls = []
    done = 0
    while done < length:
        # Tiles that end within the same 256 positions share a call, so little of the KV is masked work.
        stop = min(length, (start + done) // 256 * 256 + 256 - start)
        if length - stop < tokens:
            stop = length
        kv_blocks = padded_blocks(start + stop, block_size, dtype)
        stop = min(stop, done + max(1, _MASK_LIMIT // (kv_blocks * block_size * tile)) * tokens)
        tiles = -(-(stop - done) // tokens)
        real = torch.arange(done, done + tiles * tokens).clamp_(max=stop - 1)
        here = blocks[:kv_blocks]
        if here.shape[0] < kv_blocks:
            here = torch.nn.functional.pad(here, (0, kv_blocks - here.shape[0]))
        allowed = _allowed((real + start).view(tiles, tokens), kv_blocks * block_size, window)
        mask = _additive(allowed, dtype).repeat_interleave(packed, dim=1)
        mask = torch.nn.functional.pad(mask, (0, 0, 0, tile - used)) if used < tile else mask
        calls.append(AttentionCall(real + first_row, tokens, here[None], mask[:, None], stop - done))
        done = stop
    return calls


def tile_buffers(
    calls: Sequence[AttentionCall] | Tiles, q_shape: Sequence[int], dtype: torch.dtype
) -> list[torch.Tensor | None]:
    """A zeroed tile buffer a call, for q of shape [M, KV heads, group, D]; good for all layers of a step.
    None for a call whose tiles are q as it lies."""
    if isinstance(calls, Tiles):
        return []
    _, kv_heads, group, dim = q_shape
    split = _head_split(group)
    return [
        None
        if call.query is None and call.tokens == 1 and call.mask.shape[2] == group // split
        else torch.zeros(call.mask.shape[0], kv_heads * split, call.mask.shape[2], dim, dtype=dtype)
        for call in calls
    ]


def paged_attention(
    q: torch.Tensor,
    cache: torch.Tensor,
    calls: Sequence[AttentionCall] | Tiles,
    buffers: Sequence[torch.Tensor | None],
    scale: float,
    out: torch.Tensor,
) -> torch.Tensor:
    """q [M, KV heads, group, D]; cache [blocks, block_size, 2, KV heads, D], keys then values; `buffers`
    from `tile_buffers`.

    Writes out [M, heads * D] and returns it. Types of q, cache and out are equal, bf16 or fp32. Rows that no
    call names are left as they are.
    """
    kv_heads, group, dim = q.shape[1:]
    if cache.shape[2:] != (2, kv_heads, dim) or cache.dtype != q.dtype:
        raise ValueError(f"attention: q {q.dtype} {tuple(q.shape)} does not fit cache {tuple(cache.shape)}")
    if isinstance(calls, Tiles):
        native.attend(q, cache, calls, scale, out)
        return out
    split = _head_split(group)
    lanes, packed = kv_heads * split, group // split
    for call, tile in zip(calls, buffers, strict=True):
        tiles, length = call.mask.shape[0], call.mask.shape[3]
        if isinstance(call.blocks, slice):
            kv = cache[call.blocks]
        else:
            kv = cache.index_select(0, call.blocks.view(-1))
        k, v = kv.view(-1, length, 2, kv_heads, dim).permute(2, 0, 3, 1, 4).unbind(0)
        if split > 1:
            k, v = (t.repeat_interleave(split, dim=1) for t in (k, v))
        if k.shape[0] != tiles:
            k, v = k.expand(tiles, -1, -1, -1), v.expand(tiles, -1, -1, -1)
        used = call.tokens * packed
        if tile is None:
            tile = q.view(tiles, lanes, packed, dim)
        else:
            wanted = q if call.query is None else q.index_select(0, call.query)
            tile[:, :, :used].view(tiles, lanes, call.tokens, packed, dim).copy_(
                wanted.view(tiles, call.tokens, lanes, packed, dim).transpose(1, 2)
            )
        y = torch.nn.functional.scaled_dot_product_attention(tile, k, v, attn_mask=call.mask, scale=scale)
        if call.query is None and call.tokens == 1:
            out.view(tiles, lanes, used, dim).copy_(y if used == y.shape[2] else y[:, :, :used])
            continue
        # [tiles, tokens, lanes, packed, D], as the rows of `out` want it
        y = y[:, :, :used].unflatten(2, (call.tokens, packed)).transpose(1, 2)
        if call.query is None:
            out.view(y.shape).copy_(y)
        else:
            rows = y.reshape(tiles * call.tokens, -1)
            out.index_copy_(0, call.query[: call.keep], rows[: call.keep])
    return out


def _head_split(group: int) -> int:
    """Pieces a group of query heads is cut into so that each fits a tile."""
    return next(n for n in range(1, group + 1) if group % n == 0 and group // n <= TILE)


def _allowed(positions: torch.Tensor, length: int, window: int | None) -> torch.Tensor:
    """Which of `length` KV positions each query position sees: [..., L] for positions [...]."""
    at = torch.arange(length)
    seen = at <= positions[..., None]
    if window is not None:
        seen &= at > positions[..., None] - window
    return seen


def _additive(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, float("-inf"))
