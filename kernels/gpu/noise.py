"""Gumbel noise a token, in float64: the host sampler's definition, so that both choose alike.

e ~ Exp(1) is drawn in two levels (runtime/sampling/noise.py says why): a block of BLOCK consecutive ids has
the least of its e, Exp(1) / BLOCK, and the id that holds it; every other id has that least plus a fresh
Exp(1). The noise is -log(e). Philox counter: (token or block, position, choice, level); key: the seed. Random
bits equal the host's; logarithms are the GPU's own, within a rounding or two of float64. Knows no logits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gpu.philox import philox4x32

BLOCK = 256  # ids a block; part of the noise's definition, not a tuning knob

_BLOCK = tl.constexpr(BLOCK)
_SHIFT = tl.constexpr(BLOCK.bit_length() - 1)
_TOKEN_LEVEL = tl.constexpr(0)
_BLOCK_LEVEL = tl.constexpr(1)
_STEP = tl.constexpr(2.0**-52)


@triton.jit
def exponential(ids, position, choice, level: tl.constexpr, seed):
    """Exp(1) from 52 random bits, float64, and the third word, for uint32 `ids` at one level."""
    top = tl.full((), level, tl.uint32)
    w0, w1, w2, _ = philox4x32(ids, position.to(tl.uint32), choice.to(tl.uint32), top, seed)
    bits = (w0.to(tl.uint64) << 20) | (w1.to(tl.uint64) >> 12)
    return -tl.log((bits.to(tl.int64).to(tl.float64) + 0.5) * _STEP), w2


@triton.jit
def gumbel(block, inside, position, choice, seed):
    """Noise [blocks, BLOCK], float64, of the ids block * BLOCK + inside. block: int32 [blocks], inside: int32
    [BLOCK], all of it; position, choice, seed: scalars."""
    smallest, word = exponential(block.to(tl.uint32), position, choice, _BLOCK_LEVEL, seed)
    least = (smallest * (1.0 / _BLOCK))[:, None]
    holder = (word >> (32 - _SHIFT)).to(tl.int32)[:, None]
    ids = block[:, None] * _BLOCK + inside[None, :]
    fresh, _ = exponential(ids.to(tl.uint32), position, choice, _TOKEN_LEVEL, seed)
    return -tl.log(least + tl.where(inside[None, :] == holder, 0.0, fresh))
