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

from kernels.native.attention_parts import (
    GROUP,
    LANES,
    NOTHING,
    STEP,
    fetch,
    finish,
    queries,
    scores,
    take_up,
    values,
    weigh,
)
from kernels.native.ir import Function, Value, module
from kernels.native.machine import Code, compile_and_place
from kernels.native.tiles import configuration

SEGMENT = 128
TILES_AT_ONCE = 8  # that share a segment's values once these are paired
_SERIAL = 512  # positions that are not worth another thread


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
    query heads a KV head. ValueError if block_size neither divides 16 nor is a multiple of it, or a block
    table ends before its run."""
    if block_size % GROUP and GROUP % block_size:
        raise ValueError(f"attention: blocks of {block_size} positions are no share of {GROUP}, nor so many")
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
        if len(owned) * block_size < stop:
            raise ValueError(f"attention: {len(table)} blocks of {block_size} do not hold {stop} positions")
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
        "queries": queries(dim),
        "values": values(dim),
        "fetch": fetch(dim),
        "scores": scores(dim),
        "weigh": weigh(windowed),
        "take_up": take_up(dim),
        "finish": finish(dim),
    }
    return compile_and_place(module([*parts.values(), _main(dim, parts)]))["attend"]


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
        each = (tile_o, tile_queries, tile_state)
        o, query_tiles, states = (f.space(TILES_AT_ONCE * size) for size in each)
        paired, scored, weights = f.space(2 * SEGMENT * dim), f.space(64 * SEGMENT), f.space(32 * SEGMENT)

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
                    query_tiles + t * tile_queries,
                )  # fmt: skip
                state = states + t * tile_state
                state.store(f.splat(NOTHING), 64)
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
                f.call(parts["values"], keys + values_at, a["cache_row"], here, groups, steps, paired)
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
                        query_tiles + t * tile_queries, scored,
                    )  # fmt: skip
                    f.call(
                        parts["weigh"], scored, weights, state, a["seen"] + (first_tile + t) * 128, first,
                        steps, a["scale"],
                    )  # fmt: skip
                    f.call(parts["take_up"], weights, paired, o + t * tile_o, state + 128, steps, used)

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
