"""Philox4x32-10, a counter-based random generator, in registers.

Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). The words are those of
the host's sampler, bit for bit. Knows nothing of what they are used for.
"""

from __future__ import annotations

import triton
import triton.language as tl

_ROUNDS = tl.constexpr(10)
_FIRST = tl.constexpr(0xD2511F53)
_SECOND = tl.constexpr(0xCD9E8D57)
_WEYL_LOW = tl.constexpr(0x9E3779B9)
_WEYL_HIGH = tl.constexpr(0xBB67AE85)


@triton.jit
def philox4x32(c0, c1, c2, c3, key):
    """Four random words, uint32, for the counter (c0, c1, c2, c3), uint32 each, of shapes that broadcast.
    key: 64 bits, int64 or uint64."""
    k0 = key.to(tl.uint32)
    k1 = (key.to(tl.uint64) >> 32).to(tl.uint32)
    for _ in tl.static_range(_ROUNDS):
        # One 32 x 32 -> 64 bit multiplication yields both halves.
        a = c0.to(tl.uint64) * _FIRST
        b = c2.to(tl.uint64) * _SECOND
        c0 = (b >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (a >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = b.to(tl.uint32)
        c3 = a.to(tl.uint32)
        k0 += _WEYL_LOW
        k1 += _WEYL_HIGH
    return c0, c1, c2, c3
