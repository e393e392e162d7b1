"""The output head on AMX: fp32 logits from the rows of a quantised table as the file stores them.

    logit = sum over groups of K of (sum of x * code) * scale + (sum of x) * offset
A code of 8 bits is exact in bf16, and an fp32 x is the exact sum of three bf16 numbers, so the products of
the three with the codes (`tdpbf16ps`) lose nothing but to fp32 sums. The table is the first operand, 16 of
its rows by 32 of K; up to 16 rows of x are the second. A logit depends on its row of x and its row of the
table alone, and groups are added in order.

Codes become fp16 in one instruction (`vcvtw2ph`). The upper 16 - 3 bits of fp16, taken for bf16, are the same
number times 2**-112, since exponents of 5 bits count from 15 and of 8 from 127. So x is multiplied by 2**100,
which keeps products far from both ends of fp32, and logits, in the end, by what is missing, 2**12: exact all.
"""

from __future__ import annotations

from functools import cache

import torch

from kernels.native.ir import FLOATS, WORDS, Function, Value, constant, module
from kernels.native.machine import Code, compile_and_place
from kernels.native.tiles import (
    configuration,
    load_tile,
    multiply,
    store_tile,
    threads_share,
    transposed,
    zero_tile,
)

ROWS = 16  # of the table, and of x, in one tile
LONGEST = 16384  # of K: a thread keeps 16 rows of the table on its stack
_SUM, _TABLE, _X = 0, 1, 2  # tile registers; x takes three
_PARTS = 3  # bf16 numbers that an fp32 one is the sum of
_CODES_BY, _X_BY = 2.0**-112, 2.0**100


def takes(codes: torch.Tensor, group: int) -> bool:
    """Whether codes [V, K] of this group size are served, 16 rows or more of them."""
    return (
        codes.dtype in (torch.int8, torch.uint8)
        and codes.is_contiguous()
        and codes.shape[1] % 32 == 0
        and codes.shape[1] <= LONGEST
        and (group == 16 or group % 32 == 0)
    )


def logits(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    group: int,
    out: torch.Tensor,
) -> None:
    """x fp32 [M, K] by codes int8 or uint8 [V, K] with scales and offsets fp32 [V, K / group] -> out fp32
    [M, V], neighbouring columns neighbours in memory. The rest is contiguous."""
    m, k = x.shape
    padded = x.new_zeros(-(-m // ROWS) * ROWS, k)
    padded[:m] = x
    operand = _operand(padded * _X_BY)
    padded *= _X_BY * _CODES_BY
    sums = operand if offsets is None else padded.view(-1, ROWS, k // group, group).sum(3).mT.contiguous()
    span = min(group, 32)
    code = _code(codes.dtype is torch.int8, offsets is not None, span)
    code(
        operand.data_ptr(),
        sums.data_ptr(),
        codes.data_ptr(),
        scales.data_ptr(),
        0 if offsets is None else offsets.data_ptr(),
        codes.shape[0],
        k // group,
        group // span,
        m,
        out.data_ptr(),
        4 * out.stride(0),
        _constants(span).data_ptr(),
        code.thread_number,
        code.thread_count,
    )


def _operand(padded: torch.Tensor) -> torch.Tensor:
    """fp32 [tiles * 16, K] -> bf16 [tiles, 3, K / 2, 16, 2]: the three parts of x, in pairs of K."""
    rest, parts = padded, []
    for _ in range(_PARTS):
        parts.append(rest.to(torch.bfloat16))
        rest = rest - parts[-1]
    paired = torch.stack(parts).view(_PARTS, -1, ROWS, padded.shape[1] // 2, 2)
    return paired.permute(1, 0, 3, 2, 4).contiguous()


@cache
def _constants(span: int) -> torch.Tensor:
    xs = {_X + part: (span // 2, 64) for part in range(_PARTS)}
    return configuration({_SUM: (ROWS, 64), _TABLE: (ROWS, 2 * span), **xs})


@cache
def _code(signed: bool, offset: bool, span: int) -> Code:
    widen, dot = _widen(signed), _dot(offset, span)
    return compile_and_place(module([widen, dot, _main(widen, dot, span)]))["head_logits"]


_PARAMETERS = {
    "x": "ptr", "sums": "ptr", "codes": "ptr", "scales": "ptr", "offsets": "ptr", "vocab": "i64",
    "groups": "i64", "tiles": "i64", "rows": "i64", "out": "ptr", "out_row": "i64", "constants": "ptr",
    "thread_number": "ptr", "thread_count": "ptr",
}  # fmt: skip


def _widen(signed: bool) -> Function:
    """16 rows of `width` codes, a multiple of 32 -> as many bf16, code * 2**-112."""
    f = Function("widen", {"codes": "ptr", "wide": "ptr", "width": "i64"})

    def piece(i: Value, _) -> None:
        for row in range(ROWS):
            codes = (f["codes"] + f["width"] * row + i * 32).load("<32 x i8>")
            words = f.emit(WORDS, f"{'s' if signed else 'z'}ext <32 x i8> {codes} to {WORDS}")
            halves = f.emit("<32 x half>", f"sitofp {WORDS} {words} to <32 x half>")
            bits = f.emit(WORDS, f"bitcast <32 x half> {halves} to {WORDS}")
            moved = f.emit(WORDS, f"ashr {WORDS} {bits}, {constant('i16', [3] * 32)}")
            signs = constant("i16", [-0x7001] * 32)  # one sign bit of the four that the shift leaves
            kept = f.emit(WORDS, f"and {WORDS} {moved}, {signs}")
            (f["wide"] + f["width"] * (2 * row) + i * 64).store(kept, 64)

    f.loop(f["width"] // 32, piece)
    return f


def _dot(offset: bool, span: int) -> Function:
    """16 rows of the table by 16 of x -> fp32 [16 of x, 16], `rows` of them written."""
    f = Function(
        "dot",
        {
            "x": "ptr", "sums": "ptr", "wide": "ptr", "scales": "ptr", "offsets": "ptr", "groups": "i64",
            "tiles": "i64", "rows": "i64", "out": "ptr", "out_row": "i64",
        },
    )  # fmt: skip
    width = f["groups"] * f["tiles"] * span
    spread = f.space(4 * 1024)  # four in turn, so that a group need not wait for the one before

    def group(i: Value, totals: list[Value]) -> list[Value]:
        zero_tile(f, _SUM)

        def tile(j: Value, _) -> None:
            at = (i * f["tiles"] + j) * span
            load_tile(f, _TABLE, f["wide"] + at * 2, width * 2)
            for part in reversed(range(_PARTS)):
                load_tile(f, _X + part, f["x"] + (width * part + at) * (2 * ROWS), 64)
                multiply(f, _SUM, _TABLE, _X + part)

        f.loop(f["tiles"], tile)
        codes = spread + i % 4 * 1024
        store_tile(f, _SUM, codes)
        following = []
        for row, total in enumerate(totals):
            at = (f["groups"] * row + i) * 4
            if offset:
                share = (f["sums"] + i * 64).load(FLOATS, 4)
                total = f.fma(share, f.broadcast((f["offsets"] + at).load("float", 4)), total)
            scale = f.broadcast((f["scales"] + at).load("float", 4))
            following.append(f.fma((codes + 64 * row).load(FLOATS, 64), scale, total))
        return following

    totals = f.loop(f["groups"], group, [(FLOATS, "zeroinitializer")] * ROWS)
    missing = f.splat(1 / (_CODES_BY * _X_BY))
    totals = [f.floats("fmul", total, missing) for total in totals]
    for row, turned in enumerate(transposed(f, totals)):
        (spread + 64 * row).store(turned, 64)
    f.loop(f["rows"], lambda i, _: (f["out"] + i * f["out_row"]).store((spread + i * 64).load(FLOATS, 64), 4))
    return f


def _main(widen: Function, dot: Function, span: int) -> Function:
    """What each thread does: its run of the tiles of 16 rows of the table."""
    f = Function("head_logits", {"arguments": "ptr"}, internal=False)
    a = f.arguments(_PARAMETERS)
    first, mine = threads_share(f, a, (a["vocab"] + (ROWS - 1)) // ROWS)
    width = a["groups"] * a["tiles"] * span
    groups_bytes = a["groups"] * 4

    def work() -> None:
        f.line(f"call void @llvm.x86.ldtilecfg(ptr {a['constants']})")
        wide = f.space(width * (2 * ROWS))

        def block(i: Value, _) -> None:
            # The last tile is moved up to end with the last row, and computes some rows again.
            row = ((first + i) * ROWS).minimum(a["vocab"] - ROWS)
            f.call(widen, a["codes"] + row * width, wide, width)

            def x_tile(t: Value, _) -> None:
                at = t * ROWS
                f.call(
                    dot, a["x"] + t * width * (2 * ROWS * _PARTS), a["sums"] + t * a["groups"] * 64, wide,
                    a["scales"] + row * groups_bytes, a["offsets"] + row * groups_bytes, a["groups"],
                    a["tiles"], (a["rows"] - at).minimum(ROWS),
                    a["out"] + at * a["out_row"] + row * 4, a["out_row"],
                )  # fmt: skip

            f.loop((a["rows"] + (ROWS - 1)) // ROWS, x_tile)

        f.loop(mine, block)
        f.line("call void @llvm.x86.tilerelease()")

    f.when(f.compare("ne", mine, 0), work)
    return f
