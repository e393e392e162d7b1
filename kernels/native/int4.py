"""The product of bf16 rows with 4-bit weights on AMX: y = x @ w.T, w = (code - 8) * scale + zero.

A group of K at a time, 16 columns of y and up to 16 rows:
    codes = x's share of the group times (code - 8), which bf16 holds exactly: one or more `tdpbf16ps`
    y    += codes * scale + (sum of x's share) * zero, in fp32, two fused multiply-adds
so weights are multiplied as exactly as fp32 scales them, and unpacking 32 of them takes one table look-up
(`vpermw`). The sum of x's share is its product with ones, on the same tiles. What a row's bits are depends on
that row alone: tiles compute rows apart, whatever their number, and groups are added in order.

Instructions: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2.
"""

from __future__ import annotations

from functools import cache

import torch

from kernels.native.ir import FLOATS, WORDS, Function, Value, constant, module
from kernels.native.machine import Code, compile_and_place
from kernels.native.tiles import configuration, load_tile, multiply, store_tile, threads_share, zero_tile

COLUMNS = 16  # of y, in one tile
SPAN = 32  # of K, in one tile
ROWS = 16  # of x, in one tile
CODES = 256  # bytes of a tile of codes
SCALES = 64  # bytes of a group's 16 scales and 16 zeros, bf16
LONGEST = 16384  # of K: with a slab's rows, what a thread keeps on its stack stays below a megabyte
_SLAB = 128  # rows of one call
_HEIGHTS = (1, 2, 4, 8, 16)  # rows whose sums stay in registers
_SUM, _X, _W, _ONES = 0, 1, 2, 3  # tile registers


def pack(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """codes [N, K] in 0..15, scales and zeros [N, K / group] -> uint8 [N / 16, K / group, bytes].

    A record is of 16 columns and a group: tiles of codes first, then scales, then zeros.

    A 16-bit word holds the codes of four pairs of K, lowest bits first; 32 words, of 16 columns and both
    halves of a pair, are 64 bytes; four of those are a tile."""
    n, k = codes.shape
    blocks, groups = n // COLUMNS, scales.shape[1]
    # [blocks, column, tile, quarter, pair within it, half] -> [blocks, tile, quarter, column, half, pair]
    nibbles = codes.view(blocks, COLUMNS, k // SPAN, 4, 4, 2).permute(0, 2, 3, 1, 5, 4).to(torch.uint8)
    packed = torch.stack((nibbles[..., 0] | nibbles[..., 1] << 4, nibbles[..., 2] | nibbles[..., 3] << 4), -1)

    def line(values: torch.Tensor) -> torch.Tensor:
        lined = values.view(blocks, COLUMNS, groups).transpose(1, 2).to(torch.bfloat16).contiguous()
        return lined.view(torch.uint8)

    return torch.cat((packed.reshape(blocks, groups, -1), line(scales), line(zeros)), dim=2)


def product(x: torch.Tensor, packed: torch.Tensor, group: int, parts: int, out: torch.Tensor) -> None:
    """out [parts, M, N] = x [parts, M, K] by the packed weights of all parts, one after another; both bf16,
    with neighbouring columns neighbours in memory. Where `parts` is 1, x and out may be [M, K] and [M, N]."""
    m, k = x.shape[-2:]
    blocks = packed.shape[0] // parts
    x_part, x_row = (2 * x.stride(0) if parts > 1 else 0), 2 * x.stride(-2)
    out_part, out_row = (2 * out.stride(0) if parts > 1 else 0), 2 * out.stride(-2)
    code = _code()
    for at in range(0, m, _SLAB):
        rows = min(_SLAB, m - at)
        code(
            x.data_ptr() + at * x_row,
            x_row,
            x_part,
            packed.data_ptr(),
            k // group,
            group // SPAN,
            rows,
            out.data_ptr() + at * out_row,
            out_row,
            out_part,
            blocks,
            parts,
            _constants(min(rows, ROWS)).data_ptr(),
            code.thread_number,
            code.thread_count,
        )


@cache
def _code() -> Code:
    return compile_and_place(module(_program()))["int4_product"]


@cache
def _constants(rows: int) -> torch.Tensor:
    """The tiles' shapes for `rows` rows; then bf16 of code - 8, and a tile of ones."""
    # A look-up takes five bits of its index, of which the fifth is the next code's: the table repeats.
    table = torch.arange(-8, 8).repeat(2).to(torch.bfloat16)
    ones = torch.ones(SPAN // 2, COLUMNS, 2, dtype=torch.bfloat16)
    shapes = {_SUM: (rows, 64), _X: (rows, 64), _W: (SPAN // 2, 64), _ONES: (SPAN // 2, 64)}
    return configuration(shapes, table, ones)


_PARAMETERS = {
    "x": "ptr", "x_row": "i64", "x_part": "i64", "packed": "ptr", "groups": "i64", "tiles": "i64",
    "rows": "i64", "out": "ptr", "out_row": "i64", "out_part": "i64", "blocks": "i64", "parts": "i64",
    "constants": "ptr", "thread_number": "ptr", "thread_count": "ptr",
}  # fmt: skip


def _program() -> list[Function]:
    unpack, sums = _unpack(), _sums()
    products = {height: _product(height) for height in _HEIGHTS}
    return [unpack, sums, *products.values(), _main(unpack, sums, products)]


def _unpack() -> Function:
    """The codes of 16 columns as tiles of bf16, each 16 pairs of K by 16 columns by 2."""
    f = Function("unpack", {"packed": "ptr", "w": "ptr", "table": "ptr", "groups": "i64", "tiles": "i64"})
    table = f["table"].load(WORDS)
    record = f["tiles"] * CODES + SCALES

    def group(i: Value, _) -> None:
        def tile(j: Value, _) -> None:
            source = f["packed"] + i * record + j * CODES
            target = f["w"] + (i * f["tiles"] + j) * 1024
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

        f.loop(f["tiles"], tile)

    f.loop(f["groups"], group)
    return f


def _sums() -> Function:
    """The sum of each of 16 rows' shares of a group -> fp32 [groups, 16]."""
    f = Function(
        "sums", {"x": "ptr", "x_row": "i64", "ones": "ptr", "sums": "ptr", "groups": "i64", "tiles": "i64"}
    )
    load_tile(f, _ONES, f["ones"], 64)
    spread = f.space(1024)

    def group(i: Value, _) -> None:
        zero_tile(f, _SUM)

        def tile(j: Value, _) -> None:
            load_tile(f, _X, f["x"] + (i * f["tiles"] + j) * 64, f["x_row"])
            multiply(f, _SUM, _X, _ONES)

        f.loop(f["tiles"], tile)
        store_tile(f, _SUM, spread)
        for row in range(ROWS):
            (f["sums"] + i * 64 + 4 * row).store((spread + 64 * row).load("float", 4), 4)

    f.loop(f["groups"], group)
    return f


def _product(height: int) -> Function:
    """At most `height` rows by 16 unpacked columns -> bf16, `rows` of them written."""
    f = Function(
        f"product{height}",
        {
            "x": "ptr", "x_row": "i64", "w": "ptr", "packed": "ptr", "sums": "ptr", "groups": "i64",
            "tiles": "i64", "rows": "i64", "out": "ptr", "out_row": "i64",
        },
    )  # fmt: skip
    scales_at = f["tiles"] * CODES
    # The next 16 columns are fetched meanwhile: nothing else keeps memory busy between two unpackings.
    following_block = f["packed"] + f["groups"] * (scales_at + SCALES)
    spread = f.space(4 * 1024)  # four in turn, so that a group need not wait for the one before

    def group(i: Value, totals: list[Value]) -> list[Value]:
        zero_tile(f, _SUM)

        def tile(j: Value, _) -> None:
            at = i * f["tiles"] + j
            load_tile(f, _X, f["x"] + at * 64, f["x_row"])
            load_tile(f, _W, f["w"] + at * 1024, 64)
            multiply(f, _SUM, _X, _W)
            for line in range(0, CODES, 64):
                f.prefetch(following_block + i * (scales_at + SCALES) + j * CODES + line)

        f.loop(f["tiles"], tile)
        f.prefetch(following_block + i * (scales_at + SCALES) + scales_at)
        codes = spread + i % 4 * 1024
        store_tile(f, _SUM, codes)
        scales = f["packed"] + i * (scales_at + SCALES) + scales_at
        scale, zero = (f.widen((scales + at).load("<16 x i16>")) for at in (0, 32))
        following = []
        for row, total in enumerate(totals):
            share = f.broadcast((f["sums"] + i * 64 + 4 * row).load("float", 4))
            product = (codes + 64 * row).load(FLOATS, 64)
            following.append(f.fma(product, scale, f.fma(share, zero, total)))
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


def _main(unpack: Function, sums: Function, products: dict[int, Function]) -> Function:
    """What each thread does: its run of the blocks of 16 columns, of all parts."""
    f = Function("int4_product", {"arguments": "ptr"}, internal=False)
    a = f.arguments(_PARAMETERS)
    first, mine = threads_share(f, a, a["blocks"] * a["parts"])
    # Rows come in tiles of 16; the last is moved up to end with the last row, and computes some rows again.
    height = a["rows"].minimum(ROWS)
    row_tiles = (a["rows"] + (ROWS - 1)) // ROWS
    last_row = a["rows"] - height
    table, ones = a["constants"] + 64, a["constants"] + 128
    record = a["groups"] * (a["tiles"] * CODES + SCALES)
    sums_of_tile = a["groups"] * 64

    def work() -> None:
        f.line(f"call void @llvm.x86.ldtilecfg(ptr {a['constants']})")
        w = f.space(a["groups"] * a["tiles"] * 1024)
        sums_at = f.space(row_tiles * sums_of_tile)

        def block(i: Value, carried: list[Value]) -> list[Value]:
            at = first + i
            part = at // a["blocks"]
            x = a["x"] + part * a["x_part"]
            out = a["out"] + part * a["out_part"] + at % a["blocks"] * (2 * COLUMNS)
            packed = a["packed"] + at * record

            def sum_rows() -> None:
                def sum_tile(t: Value, _) -> None:
                    row = (t * ROWS).minimum(last_row)
                    f.call(
                        sums, x + row * a["x_row"], a["x_row"], ones, sums_at + t * sums_of_tile,
                        a["groups"], a["tiles"],
                    )  # fmt: skip

                f.loop(row_tiles, sum_tile)

            f.when(f.compare("ne", part, carried[0]), sum_rows)
            f.call(unpack, packed, w, table, a["groups"], a["tiles"])

            def row_tile(t: Value, _) -> None:
                row = (t * ROWS).minimum(last_row)
                passed = (
                    x + row * a["x_row"], a["x_row"], w, packed, sums_at + t * sums_of_tile, a["groups"],
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
