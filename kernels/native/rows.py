"""Small operations on rows, each in one call: add and normalise, rotate and store, gate.

A row is done by one thread, in one order. Every rounding is written out: no product is fused with a sum but
the square in the norm.
"""

from __future__ import annotations

import math
import struct
from functools import cache

import torch

from kernels.native.ir import FLOATS, Function, Value, constant, module
from kernels.native.machine import Code, compile_and_place
from kernels.native.tiles import threads_share

LANES = 16
_SERIAL = 1 << 16  # elements that are not worth another thread

Order = tuple[tuple[int, int], ...]


def add_norm(
    x: torch.Tensor,
    parts: torch.Tensor | None,
    order: Order,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor,
) -> None:
    """x += the sum of parts, then out = x / sqrt(mean(x**2) + eps) * weight, rounded once to out's type.

    x fp32 [M, H], weight fp32 [H], H a multiple of 16; parts [P, M, H] bf16 or fp32; out [M, H] bf16 or fp32.
    `order` is the pairs (into, other) in which parts are added, in fp32; the sum ends up in part 0. With no
    parts, x is only read.
    """
    m, h = x.shape
    kind = None if parts is None else parts.dtype
    code = _add_norm_code(kind, 0 if parts is None else parts.shape[0], order, out.dtype)
    code(
        x.data_ptr(),
        4 * x.stride(0),
        0 if parts is None else parts.data_ptr(),
        0 if parts is None else parts.stride(0) * parts.itemsize,
        0 if parts is None else parts.stride(1) * parts.itemsize,
        weight.data_ptr(),
        out.data_ptr(),
        out.stride(0) * out.itemsize,
        m,
        h // LANES,
        _bits(float(h)),
        _bits(eps),
        code.thread_number,
        code.thread_count,
        threads=1 if m * h < _SERIAL else None,
    )


def rotate_and_store(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads: int,
    kv_heads: int,
    cache_: torch.Tensor,
    cache_rows: torch.Tensor,
) -> None:
    """Turn the heads of q and k in place as `kernels.rope` does, and copy k and v to their rows of the cache.

    qkv bf16 [M, (heads + 2 kv_heads) * D]: q, k, v; cos, sin fp32 [M, 1, D], sin with its first half negated;
    cache_ bf16 [rows, 2 kv_heads * D], contiguous; cache_rows int64 [M]; D a multiple of 32."""
    m, dim = qkv.shape[0], cos.shape[-1]
    code = _rotate_code()
    code(
        qkv.data_ptr(),
        2 * qkv.stride(0),
        cos.data_ptr(),
        sin.data_ptr(),
        heads + kv_heads,
        dim // 2 // LANES,
        2 * heads * dim,
        2 * kv_heads * dim // LANES,
        cache_.data_ptr(),
        cache_rows.data_ptr(),
        m,
        code.thread_number,
        code.thread_count,
        threads=1 if qkv.numel() < _SERIAL else None,
    )


def gate(both: torch.Tensor, out: torch.Tensor) -> None:
    """out [M, C] = silu(gate) * up, each rounded, of `both` [M, 2 * C], the gate before the up; both bf16,
    neighbouring columns neighbours in memory, C a multiple of 16. Subnormals become 0."""
    m, width = out.shape
    code = _gate_code()
    code(
        both.data_ptr(),
        2 * both.stride(0),
        width // LANES,
        m,
        out.data_ptr(),
        2 * out.stride(0),
        code.thread_number,
        code.thread_count,
        threads=1 if out.numel() < _SERIAL else None,
    )


@cache
def _bits(value: float) -> int:
    return struct.unpack("<q", struct.pack("<fi", value, 0))[0]


_ADD_NORM = {
    "x": "ptr", "x_row": "i64", "parts": "ptr", "part": "i64", "part_row": "i64", "weight": "ptr",
    "out": "ptr", "out_row": "i64", "rows": "i64", "vectors": "i64", "width": "float", "eps": "float",
    "thread_number": "ptr", "thread_count": "ptr",
}  # fmt: skip
_ROTATE = {
    "qkv": "ptr", "qkv_row": "i64", "cos": "ptr", "sin": "ptr", "turned": "i64", "vectors": "i64",
    "kv_at": "i64", "kv_vectors": "i64", "cache": "ptr", "cache_rows": "ptr", "rows": "i64",
    "thread_number": "ptr", "thread_count": "ptr",
}  # fmt: skip

_GATE = {
    "both": "ptr", "both_row": "i64", "vectors": "i64", "rows": "i64", "out": "ptr", "out_row": "i64",
    "thread_number": "ptr", "thread_count": "ptr",
}  # fmt: skip


@cache
def _add_norm_code(kind: torch.dtype | None, parts: int, order: Order, out: torch.dtype) -> Code:
    f = Function("add_norm", {"arguments": "ptr"}, internal=False)
    a = f.arguments(_ADD_NORM)
    first, mine = threads_share(f, a, a["rows"])

    def row(i: Value, _) -> None:
        at = first + i
        x, target = a["x"] + at * a["x_row"], a["out"] + at * a["out_row"]

        def add(v: Value, carried: list[Value]) -> list[Value]:
            value = (x + v * 64).load(FLOATS, 4)
            if parts:
                size = 2 if kind == torch.bfloat16 else 4
                place = a["parts"] + at * a["part_row"] + v * (LANES * size)
                leaves = [_read(f, place + a["part"] * p, size) for p in range(parts)]
                for into, other in order:
                    leaves[into] = f.floats("fadd", leaves[into], leaves[other])
                value = f.floats("fadd", value, leaves[0])
                (x + v * 64).store(value, 4)
            return [f.fma(value, value, carried[0])]

        (squares,) = f.loop(a["vectors"], add, [(FLOATS, "zeroinitializer")])
        mean = f.floats("fdiv", _sum(f, squares), f.broadcast(a["width"]))
        shifted = f.floats("fadd", mean, f.broadcast(a["eps"]))
        root = f.emit(FLOATS, f"call {FLOATS} @llvm.sqrt.v16f32({FLOATS} {shifted})")

        def scale(v: Value, _) -> None:
            value = f.floats("fdiv", (x + v * 64).load(FLOATS, 4), root)
            value = f.floats("fmul", value, (a["weight"] + v * 64).load(FLOATS, 4))
            _write(f, target + v * (LANES * out.itemsize), value, out.itemsize)

        f.loop(a["vectors"], scale)

    f.when(f.compare("ne", mine, 0), lambda: f.loop(mine, row))
    return compile_and_place(module([f]))["add_norm"]


@cache
def _rotate_code() -> Code:
    f = Function("rotate_and_store", {"arguments": "ptr"}, internal=False)
    a = f.arguments(_ROTATE)
    first, mine = threads_share(f, a, a["rows"])

    def row(i: Value, _) -> None:
        at = first + i
        qkv = a["qkv"] + at * a["qkv_row"]
        half = a["vectors"] * LANES  # channels
        cos, sin = (a[name] + at * half * 8 for name in ("cos", "sin"))

        def head(n: Value, _) -> None:
            def pair(v: Value, _) -> None:
                low = qkv + n * half * 4 + v * (2 * LANES)
                high = low + half * 2
                x, y = _read(f, low, 2), _read(f, high, 2)
                for mine_, other, place, shift in ((x, y, low, v * 64), (y, x, high, half * 4 + v * 64)):
                    turned = f.floats("fmul", mine_, (cos + shift).load(FLOATS, 4))
                    crossed = f.floats("fmul", other, (sin + shift).load(FLOATS, 4))
                    _write(f, place, f.floats("fadd", turned, crossed), 2)

            f.loop(a["vectors"], pair)

        f.loop(a["turned"], head)
        slot = (a["cache_rows"] + at * 8).load("i64", 8)
        target = a["cache"] + slot * a["kv_vectors"] * (2 * LANES)

        def copy(v: Value, _) -> None:
            (target + v * (2 * LANES)).store((qkv + a["kv_at"] + v * (2 * LANES)).load("<16 x i16>"), 1)

        f.loop(a["kv_vectors"], copy)

    f.when(f.compare("ne", mine, 0), lambda: f.loop(mine, row))
    return compile_and_place(module([f]))["rotate_and_store"]


@cache
def _gate_code() -> Code:
    f = Function("gate", {"arguments": "ptr"}, internal=False)
    a = f.arguments(_GATE)
    first, mine = threads_share(f, a, a["rows"])

    def row(i: Value, _) -> None:
        source = a["both"] + (first + i) * a["both_row"]
        target = a["out"] + (first + i) * a["out_row"]

        def vector(v: Value, _) -> None:
            x = _read(f, source + v * (2 * LANES), 2)
            up = _read(f, source + a["vectors"] * (2 * LANES) + v * (2 * LANES), 2)
            grown = f.floats("fadd", _exp_of_minus(f, x), f.splat(1.0))
            place = target + v * (2 * LANES)
            _write(f, place, f.floats("fdiv", x, grown), 2)
            _write(f, place, f.floats("fmul", _read(f, place, 2), up), 2)

        f.loop(a["vectors"], vector)

    f.when(f.compare("ne", mine, 0), lambda: f.loop(mine, row))
    return compile_and_place(module([f]))["gate"]


def _exp_of_minus(f: Function, x: Value) -> Value:
    """exp(-x) to 2**-18: -x = n ln 2 + r with |r| <= ln 2 / 2, then exp(r) by its series, times 2**n. Beyond
    100 it is that of 100: infinite, or as good as 0."""
    y = f.floats("fsub", f.splat(-0.0), x)
    for beyond, limit in (("ogt", 100.0), ("olt", -100.0)):  # a NaN is neither
        bound = f.splat(limit)
        outside = f.emit("<16 x i1>", f"fcmp {beyond} {FLOATS} {y}, {bound}")
        y = f.emit(FLOATS, f"select <16 x i1> {outside}, {FLOATS} {bound}, {FLOATS} {y}")
    turns = f.floats("fmul", y, f.splat(1 / math.log(2)))
    n = f.emit(FLOATS, f"call {FLOATS} @llvm.rint.v16f32({FLOATS} {turns})")
    r = f.fma(n, f.splat(-math.log(2)), y)
    series = f.splat(1 / 120)
    for term in (1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
        series = f.fma(series, r, f.splat(term))
    arguments = f"{FLOATS} {series}, {FLOATS} {n}, {FLOATS} {series}, i16 -1, i32 4"
    return f.emit(FLOATS, f"call {FLOATS} @llvm.x86.avx512.mask.scalef.ps.512({arguments})")


def _read(f: Function, place: Value, size: int) -> Value:
    """16 neighbouring bf16 (size 2) or fp32 (4) as fp32."""
    return place.load(FLOATS, 4) if size == 4 else f.widen(place.load("<16 x i16>"))


def _write(f: Function, place: Value, value: Value, size: int) -> None:
    if size == 2:
        value = f.emit("<16 x bfloat>", f"fptrunc {FLOATS} {value} to <16 x bfloat>")
    place.store(value, size)


def _sum(f: Function, lanes: Value) -> Value:
    """The sum of the 16 lanes, in all of them."""
    for distance in (8, 4, 2, 1):
        order = constant("i32", [lane ^ distance for lane in range(LANES)])
        turned = f.emit(FLOATS, f"shufflevector {FLOATS} {lanes}, {FLOATS} poison, <16 x i32> {order}")
        lanes = f.floats("fadd", lanes, turned)
    return lanes
