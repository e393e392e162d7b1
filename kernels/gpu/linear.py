"""y = x @ w.T for planar quantised weights, dequantised in registers; and two such products that share x.

Weights are the first operand of the matrix instruction, from registers, and tokens its second: any number of
rows uses one instruction and one order of K, so a row's bits do not depend on its company. Sums are fp32 and
are added as `chunks` says; how the work is shared out (`tuning.Tiling`) cannot change a bit.

With several units a weight's K is theirs, side by side. Products come out as fp32 partial sums [splits, M, N]
for the consumer to fold (`fold`), or, of gate and up, as fp16 silu(gate) * up.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from kernels.gpu.activation import silu_mul
from kernels.gpu.chunks import FIELDS, schedule
from kernels.gpu.codes import assembly, quarters, shifts
from kernels.gpu.launch import INTERPRETED, check, launch
from kernels.gpu.overlap import after_previous, fetch_ahead, overlapping
from kernels.gpu.planar import Format, PlanarWeight
from kernels.gpu.tuning import Tiling, tiling_for


def linear(
    x: torch.Tensor, weight: PlanarWeight, out: torch.Tensor | None = None, tiling: Tiling | None = None
) -> torch.Tensor:
    """x fp16 [M, units * width] -> fp32 partial sums [splits, M, rows], `out` if given."""
    return _run(x, (weight,), False, out, tiling)


def linear_pair(
    x: torch.Tensor,
    first: PlanarWeight,
    second: PlanarWeight,
    out: torch.Tensor | None = None,
    tiling: Tiling | None = None,
) -> torch.Tensor:
    """Both products of x fp16 [M, width], of any two formats, side by side in one launch
    -> fp32 partial sums [splits, M, first.rows + second.rows]."""
    return _run(x, (first, second), False, out, tiling)


def gated_linear(
    x: torch.Tensor,
    gate: PlanarWeight,
    up: PlanarWeight,
    out: torch.Tensor | None = None,
    tiling: Tiling | None = None,
) -> torch.Tensor:
    """silu(x @ gate.T) * (x @ up.T), in fp32, rounded once to fp16 [M, rows]."""
    return _run(x, (gate, up), True, out, tiling)


def _run(
    x: torch.Tensor,
    weights: tuple[PlanarWeight, ...],
    gated: bool,
    out: torch.Tensor | None,
    tiling: Tiling | None,
) -> torch.Tensor:
    first, second = weights[0], weights[-1]
    m, n = x.shape[0], first.rows if gated else sum(w.rows for w in weights)
    check("linear", "x", x, torch.float16, -1, first.units * first.width)
    if (second.units, second.width) != (first.units, first.width):
        raise ValueError(
            f"linear: weights of {first.units} x {first.width} and {second.units} x {second.width}"
        )
    if gated and (first.rows != second.rows or first.units != 1):
        raise ValueError(f"linear: gate has {first.rows} rows, up {second.rows}, and one unit is taken")
    for weight in weights:
        if weight.low.device != x.device:
            raise ValueError(f"linear: x is on {x.device}, a weight on {weight.low.device}")
    tiling = tiling or tiling_for(m, weights, gated, x.device)
    if tiling.weights < 64 or tiling.tokens < 16 or tiling.warps < 4:
        raise ValueError(f"linear: {tiling} leaves the family of matrix instructions that fixes the bits")
    plan = schedule(first.width, first.units, 0 if gated else tiling.split, x.device)
    if gated:
        out = _output(out, x, torch.float16, m, n)
    else:
        out = _output(out, x, torch.float32, plan.splits, m, n)
    if m == 0:
        return out
    tiles_first = -(-first.rows // tiling.weights)
    tiles = tiles_first if gated or first is second else tiles_first - (-second.rows // tiling.weights)
    work = tiles * -(-m // tiling.tokens) * plan.splits
    programs = min(work, _multiprocessors(x.device) * tiling.blocks) if plan.depth else work
    per_program = plan.depth * (2 if gated else 1) * tiling.weights * tiling.tokens
    pending = torch.empty(max(1, programs * per_program), dtype=torch.float32, device=x.device)
    arguments = []
    constants: dict[str, object] = {}
    for side, weight in zip("AB", (first, second), strict=True):
        f = weight.format
        none = weight.low  # stands in for what a format does not have, and is not read
        arguments += [
            t if t is not None else none
            for t in (weight.low, weight.high, weight.d, weight.sub, weight.mins, _shifts(f, x.device))
        ]
        arguments += [weight.rows, _height(weight.d), _height(weight.sub), _height(weight.mins)]
        constants |= {f"{k}_{side}": v for k, v in _constants(f).items()}
    launch(
        _kernel,
        (programs,),
        x,
        *arguments,
        plan.leaves,
        plan.spans,
        out,
        pending,
        m,
        n,
        first.units * first.width,
        work,
        tiles_first,
        warps=tiling.warps,
        stages=tiling.stages,
        WIDTH=first.width,
        SPLITS=plan.splits,
        DEPTH=plan.depth,
        PAIR=2 if gated else 1 if first is not second else 0,
        BN=tiling.weights,
        BM=tiling.tokens,
        FIELDS=FIELDS,
        OVERLAP=overlapping(x.device),
        **constants,
    )
    return out


def _output(out: torch.Tensor | None, x: torch.Tensor, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    if out is None:
        return torch.empty(shape, dtype=dtype, device=x.device)
    check("linear", "out", out, dtype, *shape)
    return out


def _height(t: torch.Tensor | None) -> int:
    return 0 if t is None else t.shape[1]


def _constants(f: Format) -> dict[str, object]:
    return {
        "LOW": f.low,
        "HIGH": f.high,
        "ZERO": f.zero,
        "GROUP": f.group,
        "SPAN": f.span,
        "SUB": f.sub,
        "MINIMUM": f.minimum,
        "ASSEMBLY": None if INTERPRETED or f.low >= 8 else assembly(f.low, f.high, f.zero),
    }


@cache
def _shifts(f: Format, device: torch.device) -> torch.Tensor:
    return shifts(f.low, f.high, device)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@triton.jit
def _low_half(word):
    return (word & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _high_half(word):
    return (word >> 16).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _byte(word, AT: tl.constexpr, SUB: tl.constexpr):
    """Byte AT of each word as fp16: unsigned, signed (SUB 2), or its low nibble (SUB 3)."""
    if SUB == 2:
        return (word << (24 - 8 * AT) >> 24).to(tl.float16)
    elif SUB == 3:
        return ((word >> (8 * AT)) & 0xF).to(tl.float16)
    else:
        return ((word >> (8 * AT)) & 0xFF).to(tl.float16)


@triton.jit
def _times(codes, scale, offset, MINIMUM: tl.constexpr):
    """codes [BN, 32] by scale and offset, which are [BN, 1] or [BN, 32]."""
    if MINIMUM:
        return tl.fma(codes, tl.broadcast_to(scale, codes.shape), tl.broadcast_to(offset, codes.shape))
    else:
        return codes * scale


@triton.jit
def _words(
    d,
    sub,
    mins,
    n,
    rows,
    block,
    LOW: tl.constexpr,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    SUB: tl.constexpr,
    MINIMUM: tl.constexpr,
):
    """The words that hold the scales of block `block` of rows `n`, each int32 [BN]: up to 4 of d, 2 of sub,
    2 of mins; where there are fewer, the first stands in and is not read. (8 of d in groups of 16.)"""
    if LOW == 16:
        return n, n, n, n, n, n, n, n, n, n, n, n
    PER: tl.constexpr = SPAN if MINIMUM else 2 * SPAN  # columns a word of d
    MANY: tl.constexpr = 128 // PER if PER < 128 else 1
    at = d + (block * MANY if PER <= 128 else block // (PER // 128)) * rows + n
    d0 = tl.load(at)
    if MINIMUM:
        d1, d2, d3 = d0, d0, d0
    else:
        if PER > 128:  # two spans a word: which of them is wanted stands low from here on
            d0 = d0 >> (block // (SPAN // 128) % 2 * 16)
        d1, d2, d3 = d0, d0, d0
    if MANY > 1:
        d1 = tl.load(at + rows)
    if MANY > 2:
        d2 = tl.load(at + 2 * rows)
        d3 = tl.load(at + 3 * rows)
    d4, d5, d6, d7 = d0, d0, d0, d0
    if MANY > 4:
        d4 = tl.load(at + 4 * rows)
        d5 = tl.load(at + 5 * rows)
        d6 = tl.load(at + 6 * rows)
        d7 = tl.load(at + 7 * rows)
    s0, s1, m0, m1 = d0, d0, d0, d0
    if SUB:
        at_sub = sub + block * (32 // GROUP) * rows + n
        s0 = tl.load(at_sub)
        if GROUP == 16:
            s1 = tl.load(at_sub + rows)
        if MINIMUM and SUB < 3:
            at_min = mins + block * (32 // GROUP) * rows + n
            m0 = tl.load(at_min)
            if GROUP == 16:
                m1 = tl.load(at_min + rows)
    return d0, d1, d2, d3, d4, d5, d6, d7, s0, s1, m0, m1


@triton.jit
def _scaled(
    codes,
    words,
    QUARTER: tl.constexpr,
    LOW: tl.constexpr,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    SUB: tl.constexpr,
    MINIMUM: tl.constexpr,
):
    """Codes [BN, 32] of one quarter of a block, with the block's words -> weights, fp16."""
    if LOW == 16:
        return codes
    left = (tl.arange(0, 32) < 16)[None, :]
    if SUB == 0 and SPAN == 16:
        one, two = words[2 * QUARTER], words[2 * QUARTER + 1]
        scale = tl.where(left, _low_half(one)[:, None], _low_half(two)[:, None])
        offset = tl.where(left, _high_half(one)[:, None], _high_half(two)[:, None])
        return _times(codes, scale, offset, True)
    elif SUB == 0 and MINIMUM:
        word = words[QUARTER * 32 // SPAN]
        return _times(codes, _low_half(word)[:, None], _high_half(word)[:, None], True)
    elif SUB == 0:
        word = words[QUARTER * 32 // (2 * SPAN)]
        if SPAN < 128 and QUARTER * 32 // SPAN % 2:
            scale = _high_half(word)
        else:
            scale = _low_half(word)
        return _times(codes, scale[:, None], scale[:, None], False)
    else:
        big, small = _low_half(words[0]), _high_half(words[0])
        if GROUP == 32:
            scale = (big * _byte(words[8], QUARTER, SUB))[:, None]
            offset = scale
            if MINIMUM:
                offset = (small * _byte(words[10], QUARTER, 1))[:, None]
            return _times(codes, scale, offset, MINIMUM)
        else:
            EVEN: tl.constexpr = QUARTER % 2 * 2
            subs = words[8 + QUARTER // 2]
            one, two = big * _byte(subs, EVEN, SUB), big * _byte(subs, EVEN + 1, SUB)
            scale = tl.where(left, one[:, None], two[:, None])
            offset = scale
            if MINIMUM:
                if SUB == 3:
                    least = (subs >> 4) & 0x0F0F0F0F
                else:
                    least = words[10 + QUARTER // 2]
                one, two = small * _byte(least, EVEN, 1), small * _byte(least, EVEN + 1, 1)
                offset = tl.where(left, one[:, None], two[:, None])
            return _times(codes, scale, offset, MINIMUM)


@triton.jit
def _pieces(
    low,
    high,
    shift_low,
    shift_high,
    n,
    block,
    BLOCKS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    ZERO: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """Codes of block `block` of rows `n`: four fp16 [BN, 32]."""
    c = tl.arange(0, 32)
    row = n[:, None].to(tl.int64) * BLOCKS + block
    if LOW >= 8:
        at = low + row * 128 + c[None, :]
        a = tl.load(at).to(tl.float16)
        b = tl.load(at + 32).to(tl.float16)
        c_ = tl.load(at + 64).to(tl.float16)
        d = tl.load(at + 96).to(tl.float16)
        return a, b, c_, d
    else:
        word_low = tl.load(low + row * (8 * LOW) + (c % (8 * LOW))[None, :])
        word_high = word_low
        if HIGH:
            word_high = tl.load(high + row * (8 * HIGH) + (c % (8 * HIGH))[None, :])
        return quarters(word_low, shift_low, word_high, shift_high, LOW, HIGH, ZERO, ASSEMBLY)


@triton.jit
def _sum(
    x,
    low_A,
    high_A,
    d_A,
    sub_A,
    mins_A,
    shifts_A,
    rows_A,
    d_words_A,
    sub_words_A,
    min_words_A,
    low_B,
    high_B,
    d_B,
    sub_B,
    mins_B,
    shifts_B,
    rows_B,
    d_words_B,
    sub_words_B,
    min_words_B,
    leaves,
    first,
    last,
    pending,
    tile,
    tokens_at,
    M,
    stride,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    BOTH: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    FIELDS: tl.constexpr,
    LOW_A: tl.constexpr,
    HIGH_A: tl.constexpr,
    ZERO_A: tl.constexpr,
    GROUP_A: tl.constexpr,
    SPAN_A: tl.constexpr,
    SUB_A: tl.constexpr,
    MINIMUM_A: tl.constexpr,
    ASSEMBLY_A: tl.constexpr,
    LOW_B: tl.constexpr,
    HIGH_B: tl.constexpr,
    ZERO_B: tl.constexpr,
    GROUP_B: tl.constexpr,
    SPAN_B: tl.constexpr,
    SUB_B: tl.constexpr,
    MINIMUM_B: tl.constexpr,
    ASSEMBLY_B: tl.constexpr,
):
    """Leaves first .. last - 1, folded: fp32 [BN, BM] of A and, if BOTH, of B (else A's twice)."""
    BLOCKS: tl.constexpr = (WIDTH + 127) // 128
    c = tl.arange(0, 32)
    # Rows past the end are the last one again: their products are computed and not stored.
    n = tl.minimum(tile * BN + tl.arange(0, BN), rows_A - 1)
    m = tl.minimum(tokens_at + tl.arange(0, BM), M - 1)
    shift_low_A = tl.broadcast_to(tl.load(shifts_A + c)[None, :], (BN, 32))
    shift_high_A = tl.broadcast_to(tl.load(shifts_A + 32 + c)[None, :], (BN, 32))
    shift_low_B = tl.broadcast_to(tl.load(shifts_B + c)[None, :], (BN, 32))
    shift_high_B = tl.broadcast_to(tl.load(shifts_B + 32 + c)[None, :], (BN, 32))
    x_rows = x + m[:, None].to(tl.int64) * stride
    slot = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
    waiting = 0
    held = tl.zeros((BN, BM), tl.float32)
    held_B = held
    for leaf in range(first, last):
        unit = tl.load(leaves + leaf * FIELDS).to(tl.int64)
        start = tl.load(leaves + leaf * FIELDS + 1) // 128
        stop = tl.load(leaves + leaf * FIELDS + 2) // 128
        additions = tl.load(leaves + leaf * FIELDS + 3)
        PER_LOW_A: tl.constexpr = BLOCKS * (128 if LOW_A >= 8 else 8 * LOW_A)
        low_a = low_A + unit * rows_A * PER_LOW_A
        high_a = high_A + unit * rows_A * (BLOCKS * 8 * HIGH_A)
        d_a = d_A + unit * rows_A * d_words_A
        sub_a = sub_A + unit * rows_A * sub_words_A
        mins_a = mins_A + unit * rows_A * min_words_A
        total = tl.zeros((BN, BM), tl.float32)
        total_B = total
        for block in range(start, stop):
            pieces = _pieces(
                low_a, high_a, shift_low_A, shift_high_A, n, block, BLOCKS, LOW_A, HIGH_A, ZERO_A, ASSEMBLY_A
            )
            words = _words(d_a, sub_a, mins_a, n, rows_A, block, LOW_A, GROUP_A, SPAN_A, SUB_A, MINIMUM_A)
            if BOTH:
                pieces_B = _pieces(
                    low_B, high_B, shift_low_B, shift_high_B, n, block,
                    BLOCKS, LOW_B, HIGH_B, ZERO_B, ASSEMBLY_B,
                )  # fmt: skip
                words_B = _words(
                    d_B, sub_B, mins_B, n, rows_B, block, LOW_B, GROUP_B, SPAN_B, SUB_B, MINIMUM_B
                )
            for quarter in tl.static_range(4):
                at = block * 128 + quarter * 32 + c
                if WIDTH % 128:
                    tokens = tl.load(
                        x_rows + (unit * WIDTH + at)[None, :], mask=(at < WIDTH)[None, :], other=0.0
                    )
                else:
                    tokens = tl.load(x_rows + (unit * WIDTH + at)[None, :])
                w = _scaled(pieces[quarter], words, quarter, LOW_A, GROUP_A, SPAN_A, SUB_A, MINIMUM_A)
                total = tl.dot(w, tl.trans(tokens), total)
                if BOTH:
                    w = _scaled(pieces_B[quarter], words_B, quarter, LOW_B, GROUP_B, SPAN_B, SUB_B, MINIMUM_B)
                    total_B = tl.dot(w, tl.trans(tokens), total_B)
        if DEPTH == 0:
            # At most two sums are ever alive: the tree is a line.
            held = total if leaf == first else held + total
            if BOTH:
                held_B = total_B if leaf == first else held_B + total_B
        else:
            if additions > 0:
                held = held + total
                if BOTH:
                    held_B = held_B + total_B
            else:
                if leaf > first:
                    tl.store(pending + waiting * (BN * BM) + slot, held)
                    if BOTH:
                        tl.store(pending + (DEPTH + waiting) * (BN * BM) + slot, held_B)
                    waiting += 1
                held = total
                if BOTH:
                    held_B = total_B
            for _ in range(1, additions):
                waiting -= 1
                # A thread reads what it wrote: stores and loads of one shape have one layout. The barrier
                # is for where they do not.
                tl.debug_barrier()
                held = tl.load(pending + waiting * (BN * BM) + slot) + held
                if BOTH:
                    held_B = tl.load(pending + (DEPTH + waiting) * (BN * BM) + slot) + held_B
    return held, held_B


@triton.jit
def _fetch(low, rows, n, leaf, WIDTH: tl.constexpr, LOW: tl.constexpr):
    """Asks for the first two lines of codes of each of rows `n`, while x is not there yet."""
    BLOCKS: tl.constexpr = (WIDTH + 127) // 128
    PER: tl.constexpr = 128 if LOW >= 8 else 8 * LOW  # elements a block
    LINE: tl.constexpr = 128 if LOW == 8 else 64  # elements of 128 bytes
    unit = tl.load(leaf).to(tl.int64)
    row = unit * rows + tl.minimum(n, rows - 1)
    column = tl.load(leaf + 1) // 128 * PER + tl.arange(0, 2) * LINE
    fetch_ahead(low + row[:, None] * (BLOCKS * PER) + tl.minimum(column, BLOCKS * PER - 1)[None, :])


@triton.jit
def _kernel(
    x,
    low_A,
    high_A,
    d_A,
    sub_A,
    mins_A,
    shifts_A,
    rows_A,
    d_words_A,
    sub_words_A,
    min_words_A,
    low_B,
    high_B,
    d_B,
    sub_B,
    mins_B,
    shifts_B,
    rows_B,
    d_words_B,
    sub_words_B,
    min_words_B,
    leaves,
    spans,
    out,
    pending,
    M,
    N,
    stride,
    work,
    tiles_first,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    DEPTH: tl.constexpr,
    PAIR: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    FIELDS: tl.constexpr,
    OVERLAP: tl.constexpr,
    LOW_A: tl.constexpr,
    HIGH_A: tl.constexpr,
    ZERO_A: tl.constexpr,
    GROUP_A: tl.constexpr,
    SPAN_A: tl.constexpr,
    SUB_A: tl.constexpr,
    MINIMUM_A: tl.constexpr,
    ASSEMBLY_A: tl.constexpr,
    LOW_B: tl.constexpr,
    HIGH_B: tl.constexpr,
    ZERO_B: tl.constexpr,
    GROUP_B: tl.constexpr,
    SPAN_B: tl.constexpr,
    SUB_B: tl.constexpr,
    MINIMUM_B: tl.constexpr,
    ASSEMBLY_B: tl.constexpr,
):
    """PAIR: 0 A alone, 1 A then B side by side, 2 silu(A) * B. Items of work: tokens fastest, so that blocks
    that run together share a tile of weights; then splits, then tiles."""
    token_tiles = tl.cdiv(M, BM)
    if OVERLAP:
        tile = tl.program_id(0) // token_tiles // SPLITS
        leaf = leaves + tl.load(spans + tl.program_id(0) // token_tiles % SPLITS * 2) * FIELDS
        if PAIR == 1 and tile >= tiles_first:
            _fetch(low_B, rows_B, (tile - tiles_first) * BN + tl.arange(0, BN), leaf, WIDTH, LOW_B)
        else:
            _fetch(low_A, rows_A, tile * BN + tl.arange(0, BN), leaf, WIDTH, LOW_A)
            if PAIR == 2:
                _fetch(low_B, rows_B, tile * BN + tl.arange(0, BN), leaf, WIDTH, LOW_B)
    after_previous(OVERLAP)
    own = pending + tl.program_id(0).to(tl.int64) * (DEPTH * (2 if PAIR == 2 else 1) * BN * BM)
    for item in range(tl.program_id(0), work, tl.num_programs(0)):
        tokens_at = item % token_tiles * BM
        split = item // token_tiles % SPLITS
        tile = item // token_tiles // SPLITS
        first = tl.load(spans + split * 2)
        last = tl.load(spans + split * 2 + 1)
        m = tokens_at + tl.arange(0, BM)
        if PAIR == 1 and tile >= tiles_first:
            result, _ = _sum(
                x, low_B, high_B, d_B, sub_B, mins_B, shifts_B, rows_B, d_words_B, sub_words_B, min_words_B,
                low_B, high_B, d_B, sub_B, mins_B, shifts_B, rows_B, d_words_B, sub_words_B, min_words_B,
                leaves, first, last, own, tile - tiles_first, tokens_at, M, stride,
                WIDTH, DEPTH, False, BN, BM, FIELDS,
                LOW_B, HIGH_B, ZERO_B, GROUP_B, SPAN_B, SUB_B, MINIMUM_B, ASSEMBLY_B,
                LOW_B, HIGH_B, ZERO_B, GROUP_B, SPAN_B, SUB_B, MINIMUM_B, ASSEMBLY_B,
            )  # fmt: skip
            n = (tile - tiles_first) * BN + tl.arange(0, BN)
            inside = (n < rows_B)[:, None] & (m < M)[None, :]
            at = (split * M + m).to(tl.int64)[None, :] * N + (rows_A + n)[:, None]
            tl.store(out + at, result, mask=inside)
        else:
            result, other = _sum(
                x, low_A, high_A, d_A, sub_A, mins_A, shifts_A, rows_A, d_words_A, sub_words_A, min_words_A,
                low_B, high_B, d_B, sub_B, mins_B, shifts_B, rows_B, d_words_B, sub_words_B, min_words_B,
                leaves, first, last, own, tile, tokens_at, M, stride,
                WIDTH, DEPTH, PAIR == 2, BN, BM, FIELDS,
                LOW_A, HIGH_A, ZERO_A, GROUP_A, SPAN_A, SUB_A, MINIMUM_A, ASSEMBLY_A,
                LOW_B, HIGH_B, ZERO_B, GROUP_B, SPAN_B, SUB_B, MINIMUM_B, ASSEMBLY_B,
            )  # fmt: skip
            n = tile * BN + tl.arange(0, BN)
            inside = (n < rows_A)[:, None] & (m < M)[None, :]
            at = (split * M + m).to(tl.int64)[None, :] * N + n[:, None]
            if PAIR == 2:
                tl.store(out + at, silu_mul(result, other).to(tl.float16), mask=inside)
            else:
                tl.store(out + at, result, mask=inside)
