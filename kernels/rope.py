"""Rotary position embedding, in the half-split order: channel i turns with channel i + D/2.

y = x * cos + swap(x) * (-sin, sin), each product and the sum rounded by itself in fp32 (Su et al. 2021).
Frequencies are a table made once in float64 by the caller.
"""

from __future__ import annotations

import torch

from kernels.native import machine, rows


def rope_(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x in place. x [M, heads, D]; cos and sin fp32 [M, 1, D], sin with its first half negated."""
    swapped = x.roll(x.shape[-1] // 2, -1)
    return torch.add(x * cos, swapped * sin, out=x)


def rotate_and_store(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads: int,
    kv_heads: int,
    cache: torch.Tensor,
    cache_rows: torch.Tensor,
) -> None:
    """`rope_` of q and k in place; then k and v go to their rows of the cache.

    qkv [M, (heads + 2 kv_heads) * D], q before k before v; cos and sin as in `rope_`; cache, of qkv's type,
    [rows, 2 kv_heads * D], contiguous; cache_rows int64 [M], each within the cache.
    """
    dim = cos.shape[-1]
    if qkv.dtype == torch.bfloat16 and dim % (2 * rows.LANES) == 0 and machine.supported():
        rows.rotate_and_store(qkv, cos, sin, heads, kv_heads, cache, cache_rows)
        return
    rope_(qkv[:, : (heads + kv_heads) * dim].view(qkv.shape[0], -1, dim), cos, sin)
    cache.index_copy_(0, cache_rows, qkv[:, heads * dim :])
