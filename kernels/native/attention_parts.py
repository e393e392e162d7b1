"""The stages of attention on AMX, a function of IR each: what they add up to is said in
`kernels.native.attention`.

A tile is 16 lanes, each a query row. Positions are read in groups of 16 that lie side by side in the cache,
and weighed in steps of 32.
"""

from __future__ import annotations

import math

from kernels.native.ir import FLOATS, Function, Value, constant
from kernels.native.tiles import load_tile, multiply, store_tile, transposed, zero_tile

LANES = 16
GROUP = 16  # neighbouring positions that lie side by side in the cache
STEP = 32  # positions of one product with values
UNSEEN, NOTHING = -1e30, -1e29  # a score that is not seen; the largest of none
_INTS = "<16 x i32>"
_PAIRS = "<32 x i16>"
_SUM, _KEYS, _QUERIES = 0, 1, 4  # tile registers: queries take up to four, sums of values 0 to 3
_WEIGHTS, _VALUES = 4, 5


def queries(dim: int) -> Function:
    """The queries of 16 lanes, those past `used` being the last again -> pairs of channels by lanes."""
    f = Function("queries", {"q": "ptr", "lanes": "ptr", "used": "i64", "target": "ptr"})
    last = f["used"] - 1
    places = []
    for lane in range(LANES):
        number = Value(f, "i64", str(lane)).minimum(last)
        places.append(f["q"] + (f["lanes"] + number * 8).load("i64", 8))
    for part in range(dim // 32):
        found = transposed(f, [(place + 64 * part).load(FLOATS) for place in places])
        for pair, row in enumerate(found):
            (f["target"] + (1024 * part + 64 * pair)).store(row, 64)
    return f


def values(dim: int) -> Function:
    """The values of a segment's positions in pairs: [steps, D / 16, 16 pairs, 16 channels, 2]. Of 32 channels
    the first tile has those whose number by 8 leaves less than 4, the second the others."""
    f = Function(
        "values",
        {"values": "ptr", "row": "i64", "rows": "ptr", "groups": "i64", "steps": "i64", "target": "ptr"},
    )
    low = [n for lane in range(4) for at in range(4) for n in (8 * lane + at, 32 + 8 * lane + at)]
    halves = low, [n + 4 for n in low]

    def step(s: Value, _) -> None:
        for half in range(2):
            number = (s * 2 + half).minimum(f["groups"] - 1)
            place = f["values"] + (f["rows"] + number * 8).load("i64", 8) * f["row"]
            for pair in range(GROUP // 2):
                for chunk in range(dim // 32):
                    a, b = ((place + f["row"] * (2 * pair + n) + 64 * chunk).load(_PAIRS) for n in range(2))
                    for n, lanes in enumerate(halves):
                        mixed = f.emit(
                            _PAIRS,
                            f"shufflevector {_PAIRS} {a}, {_PAIRS} {b}, <32 x i32> {constant('i32', lanes)}",
                        )
                        at = (2 * chunk + n) * 1024 + (half * GROUP // 2 + pair) * 64
                        (f["target"] + s * (dim // 16 * 1024) + at).store(mixed, 64)

    f.loop(f["steps"], step)
    return f


def fetch(dim: int) -> Function:
    """Ask for the keys and values of so many groups of positions."""
    f = Function("fetch", {"keys": "ptr", "row": "i64", "rows": "ptr", "groups": "i64"})

    def group(g: Value, _) -> None:
        place = f["keys"] + (f["rows"] + g * 8).load("i64", 8) * f["row"]

        def position(n: Value, _) -> None:
            for start in (place + n * f["row"], place + (n * f["row"] + f["row"] // 2)):
                for line in range(0, 2 * dim, 64):
                    f.prefetch(start + line)

        f.loop(GROUP, position)

    f.loop(f["groups"], group)
    return f


def scores(dim: int) -> Function:
    """The keys of a segment by the queries of a tile -> fp32 [positions, 16 lanes]."""
    f = Function(
        "scores",
        {
            "keys": "ptr", "row": "i64", "rows": "ptr", "groups": "i64", "steps": "i64", "queries": "ptr",
            "target": "ptr",
        },
    )  # fmt: skip
    parts = dim // 32
    if parts <= 4:
        for part in range(parts):
            load_tile(f, _QUERIES + part, f["queries"] + 1024 * part, 64)

    def group(g: Value, _) -> None:
        number = g.minimum(f["groups"] - 1)
        place = f["keys"] + (f["rows"] + number * 8).load("i64", 8) * f["row"]
        zero_tile(f, _SUM)
        for part in range(parts):
            register = _QUERIES + part % 4
            if parts > 4:
                load_tile(f, register, f["queries"] + 1024 * part, 64)
            load_tile(f, _KEYS, place + 64 * part, f["row"])
            multiply(f, _SUM, _KEYS, register)
        store_tile(f, _SUM, f["target"] + g * 1024)

    f.loop(f["steps"] * 2, group)
    return f


def weigh(windowed: bool) -> Function:
    """Scores -> weights in bf16, [steps, 16 lanes, 32 positions]. `state` is m, l and what to rescale by,
    fp32 [3, 16]. Scores are written over."""
    f = Function(
        "weigh",
        {
            "scores": "ptr", "weights": "ptr", "state": "ptr", "seen": "ptr", "first": "i64", "steps": "i64",
            "scale": "float",
        },
    )  # fmt: skip
    scale = f.broadcast(f["scale"])
    begin, last = ((f["seen"] + 64 * n).load(_INTS, 4) for n in range(2))

    def visible(at: Value) -> Value:
        before = f.emit("<16 x i1>", f"icmp sle {_INTS} {at}, {last}")
        if not windowed:
            return before
        after = f.emit("<16 x i1>", f"icmp sge {_INTS} {at}, {begin}")
        return f.emit("<16 x i1>", f"and <16 x i1> {after}, {before}")

    def look(s: Value, carried: list[Value]) -> list[Value]:
        (largest,) = carried
        base = _splat(f, f["first"] + s * STEP)
        for n in range(STEP):
            place = f["scores"] + s * (64 * STEP) + 64 * n
            at = f.emit(_INTS, f"add {_INTS} {base}, {constant('i32', [n] * LANES)}")
            score = f.floats("fmul", place.load(FLOATS, 64), scale)
            score = f.emit(
                FLOATS, f"select <16 x i1> {visible(at)}, {FLOATS} {score}, {FLOATS} {f.splat(UNSEEN)}"
            )
            place.store(score, 64)
            largest = _larger(f, score, largest)
        return [largest]

    (largest,) = f.loop(f["steps"], look, [(FLOATS, str(f.splat(UNSEEN)))])
    old = f["state"].load(FLOATS, 64)
    whole = f.emit(FLOATS, f"call {FLOATS} @llvm.rint.v16f32({FLOATS} {largest})")
    new = _larger(f, whole, old)
    rescale = _power_of_2(f, f.floats("fsub", old, new))
    f["state"].store(new, 64)
    (f["state"] + 128).store(rescale, 64)

    def power(s: Value, carried: list[Value]) -> list[Value]:
        sums = list(carried)
        pairs = []
        for n in range(0, STEP, 2):
            place = f["scores"] + s * (64 * STEP) + 64 * n
            both = []
            for which in range(2):
                weight = _power_of_2(f, f.floats("fsub", (place + 64 * which).load(FLOATS, 64), new))
                both.append(f.emit("<16 x bfloat>", f"fptrunc {FLOATS} {weight} to <16 x bfloat>"))
                # What is summed is what values are weighed by: their rounding then cancels.
                rounded = f.widen(f.emit("<16 x i16>", f"bitcast <16 x bfloat> {both[-1]} to <16 x i16>"))
                sums[which] = f.floats("fadd", sums[which], rounded)
            order = constant("i32", [i + 16 * which for i in range(LANES) for which in range(2)])
            mixed = f.emit(
                "<32 x bfloat>",
                f"shufflevector <16 x bfloat> {both[0]}, <16 x bfloat> {both[1]}, <32 x i32> {order}",
            )
            pairs.append(f.emit(FLOATS, f"bitcast <32 x bfloat> {mixed} to {FLOATS}"))
        for lane, row in enumerate(transposed(f, pairs)):
            (f["weights"] + s * 1024 + 64 * lane).store(row, 64)
        return sums

    even, odd = f.loop(f["steps"], power, [(FLOATS, "zeroinitializer")] * 2)
    total = f.fma((f["state"] + 64).load(FLOATS, 64), rescale, f.floats("fadd", even, odd))
    (f["state"] + 64).store(total, 64)
    return f


def take_up(dim: int) -> Function:
    """o [16 lanes, D] = o * rescale + weights by values, for the lanes in use."""
    f = Function(
        "take_up",
        {"weights": "ptr", "values": "ptr", "o": "ptr", "rescale": "ptr", "steps": "i64", "used": "i64"},
    )
    spread = f.space(4 * 1024)
    blocks = dim // 16
    for first in range(0, blocks, 4):
        some = range(first, min(first + 4, blocks))
        for block in some:
            zero_tile(f, block - first)

        def step(s: Value, _, some: range = some, first: int = first) -> None:
            load_tile(f, _WEIGHTS, f["weights"] + s * 1024, 64)
            for block in some:
                load_tile(f, _VALUES, f["values"] + s * (blocks * 1024) + block * 1024, 64)
                multiply(f, block - first, _WEIGHTS, _VALUES)

        f.loop(f["steps"], step)
        for block in some:
            store_tile(f, block - first, spread + 1024 * (block - first))

        def lane(i: Value, _, some: range = some, first: int = first) -> None:
            by = f.broadcast((f["rescale"] + i * 4).load("float", 4))
            for block in some:
                place = f["o"] + i * (4 * dim) + 64 * block
                sums = (spread + (block - first) * 1024 + i * 64).load(FLOATS, 64)
                place.store(f.fma(place.load(FLOATS, 64), by, sums), 64)

        f.loop(f["used"], lane)
    return f


def finish(dim: int) -> Function:
    """o / l of the lanes in use, their channels in order again -> bf16."""
    f = Function("finish", {"o": "ptr", "sums": "ptr", "out": "ptr", "lanes": "ptr", "used": "i64"})

    def lane(i: Value, _) -> None:
        by = f.broadcast((f["sums"] + i * 4).load("float", 4))
        target = f["out"] + (f["lanes"] + i * 8).load("i64", 8)
        for chunk in range(dim // 32):
            place = f["o"] + i * (4 * dim) + 128 * chunk
            both = [f.floats("fdiv", (place + 64 * n).load(FLOATS, 64), by) for n in range(2)]
            for half in range(2):
                channels = range(16 * half, 16 * half + 16)
                order = constant("i32", [c // 8 * 4 + c % 4 + (16 if c % 8 > 3 else 0) for c in channels])
                some = f.emit(
                    FLOATS, f"shufflevector {FLOATS} {both[0]}, {FLOATS} {both[1]}, {_INTS} {order}"
                )
                # What was not seen added +0 or -0: only the sign of a zero could tell how often.
                some = f.floats("fadd", some, f.splat(0.0))
                some = f.emit("<16 x bfloat>", f"fptrunc {FLOATS} {some} to <16 x bfloat>")
                (target + (64 * chunk + 32 * half)).store(some)

    f.loop(f["used"], lane)
    return f


def _splat(f: Function, number: Value) -> Value:
    """An i64 as i32 in all lanes."""
    small = f.emit("i32", f"trunc i64 {number} to i32")
    one = f.emit(_INTS, f"insertelement {_INTS} poison, i32 {small}, i32 0")
    return f.emit(_INTS, f"shufflevector {_INTS} {one}, {_INTS} poison, {_INTS} zeroinitializer")


def _larger(f: Function, a: Value, b: Value) -> Value:
    """The larger of each lane, b's if one is NaN."""
    above = f.emit("<16 x i1>", f"fcmp ogt {FLOATS} {a}, {b}")
    return f.emit(FLOATS, f"select <16 x i1> {above}, {FLOATS} {a}, {FLOATS} {b}")


def _power_of_2(f: Function, x: Value) -> Value:
    """2**x to 2**-18, for x at most 1: x = n + r with n whole and |r| <= 1/2, 2**r by its series, times 2**n.
    Below -200 it is 0; whole numbers are exact."""
    x = _larger(f, f.splat(-200.0), x)
    n = f.emit(FLOATS, f"call {FLOATS} @llvm.rint.v16f32({FLOATS} {x})")
    r = f.floats("fsub", x, n)
    series = f.splat(math.log(2) ** 5 / 120)
    for power in (4, 3, 2, 1, 0):
        series = f.fma(series, r, f.splat(math.log(2) ** power / math.factorial(power)))
    arguments = f"{FLOATS} {series}, {FLOATS} {n}, {FLOATS} {series}, i16 -1, i32 4"
    return f.emit(FLOATS, f"call {FLOATS} @llvm.x86.avx512.mask.scalef.ps.512({arguments})")
