"""The product of bf16 rows with quantised weights on AMX: y = x @ w.T, w = code * scale + zero.

Codes have 4 bits or 8, and a meaning that bf16 holds exactly: code - 8, or an int8. A group of K at a time,
16 columns of y and up to 16 rows:
    codes = x's share of the group times the codes: one or more `tdpbf16ps`
    y    += codes * scale + (sum of x's share) * zero, in fp32, one or two fused multiply-adds
so weights are multiplied as exactly as fp32 scales them. Unpacking 32 codes of 4 bits takes one table look-up
(`vpermw`), 32 of 8 bits five conversions. The sum of x's share is its product with ones, on the same tiles.
What a row's bits are depends on that row alone: tiles compute rows apart, whatever their number, and groups
are added in order.

Several products, of shares of K of any width, go in one call. How weights lie in memory: packed.py.

Instructions: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from kernels.native.ir import FLOATS, WORDS, Function, Value, constant, module
from kernels.native.machine import Code, compile_and_place
from kernels.native.packed import COLUMNS, Layout, Parts
from kernels.native.tiles import configuration, load_tile, multiply, store_tile, threads_share, zero_tile

ROWS = 16  # of x, in one tile
_SLAB = 128  # rows of one call
_SUMS = 4096  # groups of a part in all tiles of rows of one call, where their sums are kept
_HEIGHTS = (1, 2, 4, 8, 16)  # rows whose sums stay in registers
_SUM, _X, _W, _ONES = 0, 1, 2, 3  # tile registers


def product(x: torch.Tensor, weight: Parts, out: torch.Tensor) -> None:
    """out [parts, M, N] = x [M, K], the parts' shares of K side by side, by each part's weights; both bf16,
    with neighbouring columns neighbours in memory."""
    layout, m = weight.layout, x.shape[0]
    x_row, out_row = 2 * x.stride(0), 2 * out.stride(1)
    code = _code(layout.bits, layout.span, layout.zeros)
    slab = min(_SLAB, _SUMS * layout.group // max(weight.widths) * ROWS)
    for at in range(0, m, slab):
        rows = min(slab, m - at)
        code(
            x.data_ptr() + at * x_row,
            x_row,
            weight.packed.data_ptr(),
            weight.table.data_ptr(),
            len(weight.widths),
            max(weight.widths) // layout.group,
            layout.group // layout.span,
            rows,
            out.data_ptr() + at * out_row,
            out_row,
            2 * out.stride(0),
            weight.out_features // COLUMNS,
            _constants(min(rows, ROWS), layout.span).data_ptr(),
            code.thread_number,
            code.thread_count,
        )


@cache
def _code(bits: int, span: int, zeros: bool) -> Code:
    return compile_and_place(module(_program(Layout(bits, span, zeros))))["codes_product"]


@cache
def _constants(rows: int, span: int) -> torch.Tensor:
    """The tiles' shapes for `rows` rows; then bf16 of code - 8 for codes of 4 bits, and a tile of ones."""
    # A look-up takes five bits of its index, of which the fifth is the next code's: the table repeats.
    table = torch.arange(-8, 8).repeat(2).to(torch.bfloat16)
    ones = torch.ones(span // 2, COLUMNS, 2, dtype=torch.bfloat16)
    shapes = {_SUM: (rows, 64), _X: (rows, 2 * span), _W: (span // 2, 64), _ONES: (span // 2, 64)}
    return configuration(shapes, table, ones)


_PARAMETERS = {
    "x": "ptr", "x_row": "i64", "packed": "ptr", "table": "ptr", "parts": "i64", "widest": "i64",
    "tiles": "i64", "rows": "i64", "out": "ptr", "out_row": "i64", "out_part": "i64", "blocks": "i64",
    "constants": "ptr", "thread_number": "ptr", "thread_count": "ptr",
}  # fmt: skip


def _program(layout: Layout) -> list[Function]:
    unpack, sums = _unpack(layout), _sums(layout)
    products = {height: _product(layout, height) for height in _HEIGHTS}
    return [unpack, sums, *products.values(), _main(layout, unpack, sums, products)]


def _unpack(layout: Layout) -> Function:
    """The codes of 16 columns as tiles of bf16, each `span / 2` pairs of K by 16 columns by 2."""
    f = Function("unpack", {"packed": "ptr", "w": "ptr", "table": "ptr", "groups": "i64", "tiles": "i64"})
    record = f["tiles"] * layout.tile + layout.scales
    one = _unpack_4(f) if layout.bits == 4 else _unpack_8(f, layout)

    def group(i: Value, _) -> None:
        def tile(j: Value, _) -> None:
            target = f["w"] + (i * f["tiles"] + j) * (32 * layout.span)
            one(f["packed"] + i * record + j * layout.tile, target)

        f.loop(f["tiles"], tile)

    f.loop(f["groups"], group)
    return f


def _unpack_4(f: Function) -> Callable[[Value, Value], None]:
    table = f["table"].load(WORDS)

    def tile(source: Value, target: Value) -> None:
        for quarter in range(4):
            words = (source + 64 * quarter).load(WORDS)
            for pair in range(4):
                shift = constant("i16", [4 * pair] * 32)
                index = f.emit(WORDS, f"lshr {WORDS} {words}, {shift}")
                found = f.emit(
                    WORDS,
                    f"call {WORDS} @llvm.x86.avx512.permvar.hi.512({WORDS} {table}, {WORDS} {index})",
                )
                (target + 64 * (4 * quarter + pair)).store(found, 64)

    return tile


def _unpack_8(f: Function, layout: Layout) -> Callable[[Value, Value], None]:
    def tile(source: Value, target: Value) -> None:
        for pair in range(layout.span // 2):
            codes = (source + 32 * pair).load("<32 x i8>")
            numbers = f.emit("<32 x float>", f"sitofp <32 x i8> {codes} to <32 x float>")
            halves = f.emit("<32 x bfloat>", f"fptrunc <32 x float> {numbers} to <32 x bfloat>")
            (target + 64 * pair).store(halves, 64)

    return tile


def _sums(layout: Layout) -> Function:
    """The sum of each of 16 rows' shares of a group -> fp32 [groups, 16]."""
    f = Function(
        "sums", {"x": "ptr", "x_row": "i64", "ones": "ptr", "sums": "ptr", "groups": "i64", "tiles": "i64"}
    )
    load_tile(f, _ONES, f["ones"], 64)
    spread = f.space(1024)

    def group(i: Value, _) -> None:
        zero_tile(f, _SUM)

        def tile(j: Value, _) -> None:
            load_tile(f, _X, f["x"] + (i * f["tiles"] + j) * (2 * layout.span), f["x_row"])
            multiply(f, _SUM, _X, _ONES)

        f.loop(f["tiles"], tile)
        store_tile(f, _SUM, spread)
        for row in range(ROWS):
            (f["sums"] + i * 64 + 4 * row).store((spread + 64 * row).load("float", 4), 4)

    f.loop(f["groups"], group)
    return f


def _product(layout: Layout, height: int) -> Function:
    """At most `height` rows by 16 unpacked columns -> bf16, `rows` of them written."""
    f = Function(
        f"product{height}",
        {
            "x": "ptr", "x_row": "i64", "w": "ptr", "packed": "ptr", "sums": "ptr", "groups": "i64",
            "tiles": "i64", "rows": "i64", "out": "ptr", "out_row": "i64",
        },
    )  # fmt: skip
    scales_at = f["tiles"] * layout.tile
    record = scales_at + layout.scales
    # The next 16 columns are fetched meanwhile: nothing else keeps memory busy between two unpackings.
    following_block = f["packed"] + f["groups"] * record
    spread = f.space(4 * 1024)  # four in turn, so that a group need not wait for the one before

    def group(i: Value, totals: list[Value]) -> list[Value]:
        zero_tile(f, _SUM)

        def tile(j: Value, _) -> None:
            at = i * f["tiles"] + j
            load_tile(f, _X, f["x"] + at * (2 * layout.span), f["x_row"])
            load_tile(f, _W, f["w"] + at * (32 * layout.span), 64)
            multiply(f, _SUM, _X, _W)
            for line in range(0, layout.tile, 64):
                f.prefetch(following_block + i * record + j * layout.tile + line)

        f.loop(f["tiles"], tile)
        for line in range(0, layout.scales, 64):
            f.prefetch(following_block + i * record + scales_at + line)
        codes = spread + i % 4 * 1024
        store_tile(f, _SUM, codes)
        scale = _scale(f, layout, f["packed"] + i * record + scales_at)
        if layout.zeros:
            zero = _scale(f, layout, f["packed"] + i * record + scales_at + layout.scale)
        following = []
        for row, total in enumerate(totals):
            if layout.zeros:
                share = f.broadcast((f["sums"] + i * 64 + 4 * row).load("float", 4))
                total = f.fma(share, zero, total)
            following.append(f.fma((codes + 64 * row).load(FLOATS, 64), scale, total))
        return following

    totals = f.loop(f["groups"], group, [(FLOATS, "zeroinitializer")] * height)
    for row, total in enumerate(totals):
        (spread + 64 * row).store(total, 64)

    def write(i: Value, _) -> None:
        total = (spread + i * 64).load(FLOATS, 64)
        (f["out"] + i * f["out_row"]).store(
            f.emit("<16 x bfloat>", f"fptrunc {FLOATS} {total} to <16 x bfloat>")
        )

    f.loop(f["rows"], write)
    return f


def _scale(f: Function, layout: Layout, place: Value) -> Value:
    return f.widen(place.load("<16 x i16>")) if layout.bits == 4 else place.load(FLOATS)


def _main(layout: Layout, unpack: Function, sums: Function, products: dict[int, Function]) -> Function:
    """What each thread does: its run of the blocks of 16 columns, of all parts."""
    f = Function("codes_product", {"arguments": "ptr"}, internal=False)
    a = f.arguments(_PARAMETERS)
    first, mine = threads_share(f, a, a["blocks"] * a["parts"])
    # Rows come in tiles of 16; the last is moved up to end with the last row, and computes some rows again.
    height = a["rows"].minimum(ROWS)
    row_tiles = (a["rows"] + (ROWS - 1)) // ROWS
    last_row = a["rows"] - height
    table, ones = a["constants"] + 64, a["constants"] + 128
    group_bytes = a["tiles"] * layout.tile + layout.scales

    def work() -> None:
        f.line(f"call void @llvm.x86.ldtilecfg(ptr {a['constants']})")
        w = f.space(a["widest"] * a["tiles"] * (32 * layout.span))
        sums_at = f.space(row_tiles * a["widest"] * 64)

        def block(i: Value, carried: list[Value]) -> list[Value]:
            part, column = (first + i) // a["blocks"], (first + i) % a["blocks"]
            x_at, groups, data_at = ((a["table"] + part * 24 + 8 * n).load("i64", 8) for n in range(3))
            x = a["x"] + x_at
            out = a["out"] + part * a["out_part"] + column * (2 * COLUMNS)
            packed = a["packed"] + data_at + column * (groups * group_bytes)
            sums_of_tile = groups * 64

            def sum_rows() -> None:
                def sum_tile(t: Value, _) -> None:
                    row = (t * ROWS).minimum(last_row)
                    f.call(
                        sums, x + row * a["x_row"], a["x_row"], ones, sums_at + t * sums_of_tile, groups,
                        a["tiles"],
                    )  # fmt: skip

                f.loop(row_tiles, sum_tile)

            if layout.zeros:
                f.when(f.compare("ne", part, carried[0]), sum_rows)
            f.call(unpack, packed, w, table, groups, a["tiles"])

            def row_tile(t: Value, _) -> None:
                row = (t * ROWS).minimum(last_row)
                passed = (
                    x + row * a["x_row"], a["x_row"], w, packed, sums_at + t * sums_of_tile, groups,
                    a["tiles"], height, out + row * a["out_row"], a["out_row"],
                )  # fmt: skip
                lower = 0
                for tall, product in products.items():
                    fits = f.compare("ule", height, tall)
                    above = f.compare("ugt", height, lower)
                    f.when(
                        f.emit("i1", f"and i1 {fits}, {above}"),
                        lambda product=product: f.call(product, *passed),
                    )
                    lower = tall

            f.loop(row_tiles, row_tile)
            return [part]

        f.loop(mine, block, [("i64", "-1")])
        f.line("call void @llvm.x86.tilerelease()")

    f.when(f.compare("ne", mine, 0), work)
    return f
