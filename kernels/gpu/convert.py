"""fp32 to narrower types, rounded to nearest even: the same bits on every GPU and under the interpreter.

e4m3 (Micikevicius et al. 2022, "FP8 formats for deep learning"; no infinities, largest value 448) is encoded
by integer arithmetic, since GPUs older than Ada have no instruction for it. Knows nothing of scales.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gpu.launch import INTERPRETED

E4M3_MAX = 448.0

_INTERPRETED = tl.constexpr(INTERPRETED)
_E4M3_MAX = tl.constexpr(E4M3_MAX)


@triton.jit
def narrowed(x, dtype: tl.constexpr):
    """x, fp32, as fp16, bf16 or fp32."""
    if _INTERPRETED and dtype == tl.bfloat16:  # the interpreter truncates
        bits = x.to(tl.uint32, bitcast=True)
        odd = (bits >> 16) & 1
        rounded = tl.where(x == x, (bits + 0x7FFF + odd) >> 16, 0x7FC0)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def e4m3_bits(x):
    """x, fp32, as the uint8 of an e4m3 number; beyond +-448 it saturates, NaN stays NaN."""
    bits = x.to(tl.uint32, bitcast=True)
    size = tl.minimum(tl.abs(x), _E4M3_MAX)
    whole = size.to(tl.uint32, bitcast=True)
    # Normal numbers, from 2**-6: three bits of mantissa stay, and the exponent's bias goes from 127 to 7.
    normal = ((whole + 0x7FFFF + ((whole >> 20) & 1)) >> 20) - (120 << 3)
    # Below, steps of 2**-9: those of fp32 at 2**14, so that an addition rounds to them.
    small = (size + 16384.0).to(tl.uint32, bitcast=True) & 0xF
    code = tl.where(size >= 0.015625, normal, small)
    code = tl.where(x == x, code, 0x7F)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)
