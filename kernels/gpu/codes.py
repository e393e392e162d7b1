"""Codes out of bit planes, in registers: 16-bit words in, four fp16 fragments of 32 columns out.

A word of the low plane holds a column of each quarter of a block of 128, or, with fewer bits, several;
`shift` says how far a lane's words are to be moved so that quarter j stands at bit 4 * j. The machine takes
two words a register: the code goes into the mantissa of 1024 (one instruction), and what was added is
subtracted, exactly. Codes at bit 4 of a byte are taken at sixteen times their worth and scaled in the same
subtraction, which spares a shift. Under the interpreter, which knows no assembly, a plain twin does the same.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl


def _both(bits: int) -> str:
    return f"0x{bits | bits << 16:08X}"


def _half(value: float) -> str:
    return _both(struct.unpack("<H", struct.pack("<e", value))[0])


def assembly(low: int, high: int, zero: int) -> str:
    """PTX for one register of each plane: $0 to $3 quarters 0 to 3 of code - zero; then the low words, their
    shifts (two registers of equal value, where low < 4), the high words and their shifts."""
    shifts_low, at = ("$5", 7) if low < 4 else ("", 5)
    word_high, shifts_high = f"${at}", f"${at + 1}"
    lines = [f"shr.b32 a, $4, {shifts_low};" if low < 4 else "mov.b32 a, $4;"]
    if high:
        lines.append(f"shr.b32 h, {word_high}, {shifts_high};")
    for quarter in range(4):
        odd = quarter % 2 * 4
        if quarter == 2:
            lines.append("shr.b32 a, a, 8;")
        if high and not odd:
            lines.append(f"shr.b32 t, h, {8 - low};" if quarter else f"shl.b32 t, h, {low};")
        mask, mask_high = ((1 << low) - 1) << odd, ((1 << high) - 1) << (low + odd)
        lines.append(f"lop3.b32 ${quarter}, a, {_both(mask)}, {_half(1024)}, 0xEA;")  # (a & b) | c
        if high:
            lines.append(f"lop3.b32 ${quarter}, t, {_both(mask_high)}, ${quarter}, 0xEA;")
        if odd:  # 1024 + 16 * code
            lines.append(f"fma.rn.f16x2 ${quarter}, ${quarter}, e, g;")
        else:
            lines.append(f"sub.f16x2 ${quarter}, ${quarter}, c;")
    constants = (
        f"mov.b32 c, {_half(1024 + zero)}; mov.b32 e, {_half(1 / 16)}; mov.b32 g, {_half(-64 - zero)};"
    )
    return "{ .reg .b32 a, h, t, c, e, g; " + constants + "\n" + "\n".join(lines) + "\n}"


def shifts(low: int, high: int, device: torch.device) -> torch.Tensor:
    """int32 [64]: for each of 32 columns, the shift of the low plane's word, then of the high plane's."""
    column = torch.arange(32, dtype=torch.int32)
    return torch.cat([column // (8 * bits) * bits if bits else column * 0 for bits in (low, high)]).to(device)


@triton.jit
def quarters(
    low,
    shift_low,
    high,
    shift_high,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    ZERO: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """Words [rows, 32] -> four fp16 [rows, 32]: code - ZERO for columns 0 to 31, 32 to 63, ... of the block.
    ASSEMBLY: what `assembly` returned, or None for the plain twin."""

    if ASSEMBLY is None:
        a = _quarter(low, shift_low, high, shift_high, 0, LOW, HIGH, ZERO)
        b = _quarter(low, shift_low, high, shift_high, 4, LOW, HIGH, ZERO)
        c = _quarter(low, shift_low, high, shift_high, 8, LOW, HIGH, ZERO)
        d = _quarter(low, shift_low, high, shift_high, 12, LOW, HIGH, ZERO)
    elif LOW == 4 and HIGH == 0:
        a, b, c, d = tl.inline_asm_elementwise(
            ASSEMBLY,
            "=&r,=&r,=&r,=&r,r",
            [low],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    elif LOW == 4:
        a, b, c, d = tl.inline_asm_elementwise(
            ASSEMBLY,
            "=&r,=&r,=&r,=&r,r,r,r,r",
            [low, high, shift_high],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    elif HIGH == 0:
        a, b, c, d = tl.inline_asm_elementwise(
            ASSEMBLY,
            "=&r,=&r,=&r,=&r,r,r,r",
            [low, shift_low],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        a, b, c, d = tl.inline_asm_elementwise(
            ASSEMBLY,
            "=&r,=&r,=&r,=&r,r,r,r,r,r,r",
            [low, shift_low, high, shift_high],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    return a, b, c, d


@triton.jit
def _quarter(
    low,
    shift_low,
    high,
    shift_high,
    AT: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    ZERO: tl.constexpr,
):
    code = (low.to(tl.int32) >> (shift_low + AT)) & ((1 << LOW) - 1)
    if HIGH:
        code |= ((high.to(tl.int32) >> (shift_high + AT)) & ((1 << HIGH) - 1)) << LOW
    return (code - ZERO).to(tl.float16)
