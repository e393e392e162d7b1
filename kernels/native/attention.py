"""Attention over a paged KV cache on AMX: each query row reads keys and values where they lie.

A tile is 16 lanes, each a query row: neighbouring tokens of one sequence by some heads of one KV head.
Positions go in segments of 128, from position 0 or the window's first segment on, each as
    scores  = keys by queries: positions are the rows of the product, lanes its columns (`tdpbf16ps`)
    m'      = the larger of m and the segment's largest score in base 2, rounded to a whole number
    p       = 2**(score - m') rounded to bf16, 0 where a lane does not see the position
    l, o    = l * 2**(m - m') + sum of p, o * 2**(m - m') + p by values (`tdpbf16ps`)
and a row is o / l. Rescaling is exact, since m is whole. A lane's numbers come from its own query and the
positions that it sees, in one order: what it does not see adds exact zeros. So a row's bits are the same in
any tile, chunk or batch, and whatever the block size.

Instructions: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2. The recurrence: Milakov
and Gimelshein 2018, Online normalizer calculation for softmax.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from kernels.native.ir import FLOATS, Function, Value, constant, module
from kernels.native.machine import Code, compile_and_place
from kernels.native.tiles import configuration, load_tile, multiply, store_tile, transposed, zero_tile

LANES = 16
GROUP = 16  # neighbouring positions that lie side by side in the cache
STEP = 32  # positions of one product with values
SEGMENT = 128
TILES_AT_ONCE = 8  # that share a segment's values once these are paired
_SERIAL = 512  # positions that are not worth another thread
_INTS = "<16 x i32>"
_PAIRS = "<32 x i16>"
_UNSEEN, _NOTHING = -1e30, -1e29  # a score that is not seen; the largest of none
_SUM, _KEYS, _QUERIES = 0, 1, 4  # tile registers: queries take up to four, sums of values 0 to 3
_WEIGHTS, _VALUES = 4, 5


@dataclass(frozen=True, slots=True)
class Tiles:
    """The queries of a step, laid out once for all its layers.

    items int64 [items, 5]: first tile, tiles, first entry of `rows`, first position read, end of positions.
    tiles int64 [tiles, 2]: first row of q, lanes in use. seen int32 [tiles, 2, 16]: first and last position
    that a lane sees. rows int64 [groups of 16 positions]: the cache row of the first. `heads`: query heads of
    a tile, `splits`: tiles that the query heads of a KV head take. `gathered` int64: blocks that are copied
    one after another first, where a block holds less than a group; `rows` are rows of the copy then."""

    items: torch.Tensor
    tiles: torch.Tensor
    seen: torch.Tensor
    rows: torch.Tensor
    heads: int
    splits: int
    gathered: torch.Tensor | None
    positions: int  # that all tiles read
    windowed: bool


def takes(dim: int, dtype: torch.dtype) -> bool:
    """Whether heads of `dim` channels are served."""
    return dtype == torch.bfloat16 and dim % 32 == 0 and dim <= 256


def lay_out(
    runs: Sequence[tuple[int, int, int, list[int]]], *, block_size: int, group: int, window: int | None
) -> Tiles:
    """`runs`: (first row of q, first position, tokens, block table) of each sequence in the step. `group`:
    query heads a KV head. block_size divides 16 or is a multiple of it."""
    splits = next(n for n in range(1, group + 1) if group % n == 0 and group // n <= LANES)
    heads = group // splits
    per_tile = LANES // heads
    whole = max(1, GROUP // block_size)  # blocks that make up whole groups
    rows_: list[int] = []  # first row of q, of each tile
    starts: list[int] = []  # position of its first token
    tokens: list[int] = []
    blocks: list[int] = []
    items: list[tuple[int, int, int, int, int]] = []
    for row, start, length, table in runs:
        stop, entry = start + length, len(blocks) * block_size // GROUP
        owned = table[: -(-stop // block_size)]
        blocks += owned + owned[:1] * (-len(owned) % whole)
        for at in range(0, length, per_tile * TILES_AT_ONCE):
            end = min(length, at + per_tile * TILES_AT_ONCE)
            first = 0 if window is None else max(0, start + at - window + 1) // SEGMENT * SEGMENT
            firsts = range(at, end, per_tile)
            items.append((len(rows_), len(firsts), entry, first, start + end))
            rows_ += range(row + at, row + end, per_tile)
            starts += range(start + at, start + end, per_tile)
            tokens += (min(per_tile, end - n) for n in firsts)
    facts = torch.tensor((rows_, starts, tokens))
    token = torch.arange(LANES) // heads
    last = facts[1][:, None] + torch.minimum(token, facts[2][:, None] - 1)
    first_seen = torch.zeros_like(last) if window is None else (last - window + 1).clamp_(min=0)
    of_blocks = torch.tensor(blocks)
    gathered = None
    if block_size < GROUP:
        gathered, of_blocks = of_blocks, torch.arange(0, len(blocks), whole)
    groups = of_blocks[:, None] * block_size + torch.arange(0, block_size, GROUP)
    return Tiles(
        torch.tensor(items),
        torch.stack((facts[0], facts[2] * heads), dim=1),
        torch.stack((first_seen, last), dim=1).to(torch.int32),
        groups.view(-1),
        heads,
        splits,
        gathered,
        sum(count * (end - first) for _, count, _, first, end in items),
        window is not None,
    )


def attend(q: torch.Tensor, cache_: torch.Tensor, tiles: Tiles, scale: float, out: torch.Tensor) -> None:
    """q [M, KV heads, group, D], each row contiguous; cache_ [blocks, block_size, 2, KV heads, D], keys then
    values; out [M, heads * D], contiguous. All bf16. Rows that no tile names are left as they are."""
    kv_heads, group, dim = q.shape[1:]
    if tiles.gathered is not None:
        cache_ = cache_.index_select(0, tiles.gathered)
    code = _code(dim, tiles.windowed)
    q_row, out_row = 2 * q.stride(0), 2 * out.stride(0)
    code(
        q.data_ptr(),
        q_row,
        _lane_offsets(tiles.heads, q_row, dim).data_ptr(),
        cache_.data_ptr(),
        4 * kv_heads * dim,
        tiles.items.data_ptr(),
        len(tiles.items),
        tiles.tiles.data_ptr(),
        tiles.seen.data_ptr(),
        tiles.rows.data_ptr(),
        kv_heads,
        tiles.splits,
        2 * group * dim,
        2 * tiles.heads * dim,
        _bits(scale / math.log(2)),
        out.data_ptr(),
        out_row,
        _lane_offsets(tiles.heads, out_row, dim).data_ptr(),
        _constants().data_ptr(),
        code.thread_number,
        code.thread_count,
        threads=1 if tiles.positions * kv_heads * tiles.splits < _SERIAL else None,
    )


@cache
def _lane_offsets(heads: int, row: int, dim: int) -> torch.Tensor:
    """int64 [16]: bytes from a tile's first query to each lane's."""
    return torch.tensor([lane // heads * row + lane % heads * dim * 2 for lane in range(LANES)])


@cache
def _bits(value: float) -> int:
    return struct.unpack("<q", struct.pack("<fi", value, 0))[0]


@cache
def _constants() -> torch.Tensor:
    return configuration({register: (16, 64) for register in range(8)})


_PARAMETERS = {
    "q": "ptr", "q_row": "i64", "q_lanes": "ptr", "cache": "ptr", "cache_row": "i64", "items": "ptr",
    "item_count": "i64", "tiles": "ptr", "seen": "ptr", "rows": "ptr", "kv_heads": "i64", "splits": "i64",
    "group": "i64", "split": "i64", "scale": "float", "out": "ptr", "out_row": "i64", "out_lanes": "ptr",
    "constants": "ptr", "thread_number": "ptr", "thread_count": "ptr",
}  # fmt: skip


@cache
def _code(dim: int, windowed: bool) -> Code:
    parts = {
        "queries": _queries(dim),
        "values": _values(dim),
        "fetch": _fetch(dim),
        "scores": _scores(dim),
        "weigh": _weigh(windowed),
        "take_up": _take_up(dim),
        "finish": _finish(dim),
    }
    return compile_and_place(module([*parts.values(), _main(dim, parts)]))["attend"]


def _queries(dim: int) -> Function:
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


def _values(dim: int) -> Function:
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


def _fetch(dim: int) -> Function:
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


def _scores(dim: int) -> Function:
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


def _weigh(windowed: bool) -> Function:
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
                FLOATS, f"select <16 x i1> {visible(at)}, {FLOATS} {score}, {FLOATS} {f.splat(_UNSEEN)}"
            )
            place.store(score, 64)
            largest = _larger(f, score, largest)
        return [largest]

    (largest,) = f.loop(f["steps"], look, [(FLOATS, str(f.splat(_UNSEEN)))])
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


def _take_up(dim: int) -> Function:
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


def _finish(dim: int) -> Function:
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


def _main(dim: int, parts: dict[str, Function]) -> Function:
    """What each thread does: every so many-th pair of an item and a share of a KV head's query heads."""
    f = Function("attend", {"arguments": "ptr"}, internal=False)
    a = f.arguments(_PARAMETERS)
    number, threads = (
        f.emit("i64", f"zext i32 {f.emit('i32', f'call i32 {a[name]}()')} to i64")
        for name in ("thread_number", "thread_count")
    )
    shares = a["kv_heads"] * a["splits"]
    mine = (a["item_count"] * shares - number + (threads - 1)) // threads
    tile_o, tile_queries, tile_state = 4 * LANES * dim, 1024 * (dim // 32), 3 * 64
    values_at = a["cache_row"] // 2

    def groups_of(positions: Value) -> Value:
        return (positions + (GROUP - 1)) // GROUP

    def work() -> None:
        f.line(f"call void @llvm.x86.ldtilecfg(ptr {a['constants']})")
        o, queries, states = (f.space(TILES_AT_ONCE * size) for size in (tile_o, tile_queries, tile_state))
        values, scores, weights = f.space(2 * SEGMENT * dim), f.space(64 * SEGMENT), f.space(32 * SEGMENT)

        def pair(n: Value, _) -> None:
            which = number + n * threads
            item, share = a["items"] + which // shares * 40, which % shares
            kv_head, split = share // a["splits"], share % a["splits"]
            first_tile, tiles, first_row, start, end = ((item + 8 * i).load("i64", 8) for i in range(5))
            segments = (end - start + (SEGMENT - 1)) // SEGMENT
            head = kv_head * a["group"] + split * a["split"]
            keys = a["cache"] + kv_head * (2 * dim)
            rows = a["rows"] + first_row * 8

            def tile_facts(t: Value) -> tuple[Value, Value]:
                place = a["tiles"] + (first_tile + t) * 16
                return place.load("i64", 8), (place + 8).load("i64", 8)

            def prepare(t: Value, _) -> None:
                row, used = tile_facts(t)
                f.call(
                    parts["queries"], a["q"] + row * a["q_row"] + head, a["q_lanes"], used,
                    queries + t * tile_queries,
                )  # fmt: skip
                state = states + t * tile_state
                state.store(f.splat(_NOTHING), 64)
                (state + 64).store(f.splat(0.0), 64)
                f.loop(dim, lambda i, _: (o + t * tile_o + i * 64).store(f.splat(0.0), 64))

            f.loop(tiles, prepare)

            def fetch_another() -> None:
                following = which + threads
                item = a["items"] + following // shares * 40
                first_row, start, end = ((item + 8 * i).load("i64", 8) for i in (2, 3, 4))
                keys = a["cache"] + following % shares // a["splits"] * (2 * dim)
                rows = a["rows"] + (first_row + start // GROUP) * 8
                groups = groups_of((end - start).minimum(SEGMENT))
                f.call(parts["fetch"], keys, a["cache_row"], rows, groups)

            def segment(s: Value, _) -> None:
                first = start + s * SEGMENT
                count = (end - first).minimum(SEGMENT)
                steps, groups = (count + (STEP - 1)) // STEP, groups_of(count)
                here = rows + first // GROUP * 8
                f.call(parts["values"], keys + values_at, a["cache_row"], here, groups, steps, values)
                # What comes next is on its way while this is computed.
                f.when(
                    f.compare("sgt", segments, s + 1),
                    lambda: f.call(
                        parts["fetch"], keys, a["cache_row"], here + SEGMENT // GROUP * 8,
                        groups_of((end - first - SEGMENT).minimum(SEGMENT)),
                    ),
                )  # fmt: skip
                last = f.compare("eq", segments, s + 1)
                another = f.compare("sgt", mine, n + 1)
                f.when(f.emit("i1", f"and i1 {last}, {another}"), fetch_another)

                def tile(t: Value, _) -> None:
                    _, used = tile_facts(t)
                    state = states + t * tile_state
                    f.call(
                        parts["scores"], keys, a["cache_row"], here, groups, steps,
                        queries + t * tile_queries, scores,
                    )  # fmt: skip
                    f.call(
                        parts["weigh"], scores, weights, state, a["seen"] + (first_tile + t) * 128, first,
                        steps, a["scale"],
                    )  # fmt: skip
                    f.call(parts["take_up"], weights, values, o + t * tile_o, state + 128, steps, used)

                f.loop(tiles, tile)

            f.loop(segments, segment)

            def conclude(t: Value, _) -> None:
                row, used = tile_facts(t)
                f.call(
                    parts["finish"], o + t * tile_o, states + t * tile_state + 64,
                    a["out"] + row * a["out_row"] + head, a["out_lanes"], used,
                )  # fmt: skip

            f.loop(tiles, conclude)

        f.loop(mine, pair)
        f.line("call void @llvm.x86.tilerelease()")

    f.when(f.compare("sgt", mine, 0), work)
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
