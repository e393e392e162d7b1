"""A paged KV cache of random sequences, ways to attend over it, and the plain float64 answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kernels.attention import (
    TILE,
    AttentionCall,
    TileSizes,
    block_run,
    chunk_calls,
    decode_call,
    padded_blocks,
    paged_attention,
    tile_buffers,
    tile_sizes,
)
from tests.bits import random
from tests.cancel import cancel_values

DEFINING = TileSizes(TILE, TILE)  # the tiles whose bits every other size must give


@dataclass(frozen=True)
class Shape:
    dtype: torch.dtype = torch.bfloat16
    kv_heads: int = 2
    group: int = 4
    dim: int = 16
    block_size: int = 64
    window: int | None = None

    @property
    def scale(self) -> float:
        return self.dim**-0.5


@dataclass(frozen=True)
class Run:
    """Consecutive tokens of one sequence that a step computes together."""

    sequence: int
    start: int
    length: int


class Paged:
    """Sequences whose q, k and v are random, k and v laid out over scattered blocks.

    Positions that no sequence wrote hold `garbage`: what an earlier owner of the block left behind.
    `layout` seeds the order of blocks; None keeps each sequence's blocks side by side. `cancel`: the values
    of the first sequence's first so many positions cancel (see tests/cancel.py)."""

    def __init__(
        self,
        shape: Shape,
        lengths: Sequence[int],
        *,
        seed: int = 0,
        layout: int | None = 0,
        garbage: float = 0.0,
        cancel: int = 0,
    ):
        self.shape, self.lengths = shape, lengths
        heads = (shape.kv_heads, shape.dim)
        self.q = [
            random(seed + 3 * i, n, shape.kv_heads, shape.group, shape.dim, dtype=shape.dtype)
            for i, n in enumerate(lengths)
        ]
        self.k = [random(seed + 3 * i + 1, n, *heads, dtype=shape.dtype) for i, n in enumerate(lengths)]
        self.v = [random(seed + 3 * i + 2, n, *heads, dtype=shape.dtype) for i, n in enumerate(lengths)]
        cancel_values(self.k[0], self.v[0], cancel)
        size = shape.block_size
        counts = [-(-n // size) for n in lengths]
        total = sum(counts) + 3
        order = torch.arange(total)
        if layout is not None:
            order = torch.randperm(total, generator=torch.Generator().manual_seed(layout))
        self.tables = [part.clone() for part in order[: sum(counts)].split(counts)]
        self.cache = torch.full((total, size, 2, *heads), garbage, dtype=shape.dtype)
        for i, table in enumerate(self.tables):
            at = torch.arange(lengths[i])
            self.cache[table[at // size], at % size, 0] = self.k[i]
            self.cache[table[at // size], at % size, 1] = self.v[i]

    def heads(self, start: int, stop: int) -> Paged:
        """The same sequences as a rank sees them that holds KV heads start .. stop - 1."""
        part = object.__new__(Paged)
        part.shape = Shape(**{**self.shape.__dict__, "kv_heads": stop - start})
        part.lengths, part.tables = self.lengths, self.tables
        part.q, part.k, part.v = ([t[:, start:stop] for t in ts] for ts in (self.q, self.k, self.v))
        part.cache = self.cache[:, :, :, start:stop].contiguous()
        return part

    def attend(
        self, runs: Sequence[Run], *, decode: bool = True, tiles: TileSizes | None = None
    ) -> list[torch.Tensor]:
        """One step over `runs`: [length, KV heads, group, D] of each. Lone tokens share a decode call, as
        a runner would have it, unless `decode` is off. `tiles`: None for the cheapest of this machine."""
        shape, calls, rows = self.shape, [], []
        tiles = tiles or tile_sizes(shape.group, shape.dim, shape.dtype)
        lone: list[tuple[int, Run]] = []
        at = 0
        spec = {"block_size": shape.block_size, "window": shape.window, "dtype": shape.dtype}
        for run in runs:
            rows.append(self.q[run.sequence][run.start : run.start + run.length])
            if run.length == 1 and decode:
                lone.append((at, run))
            else:
                stop = run.start + run.length
                table = self.tables[run.sequence][: -(-stop // shape.block_size)]
                calls += chunk_calls(
                    at, run.start, run.length, table, group=shape.group, tile=tiles.run, **spec
                )
            at += run.length
        if lone:
            calls.append(self._decode(lone, at, spec | {"tile": tiles.single}))
        q = torch.cat(rows)
        out = torch.full((q.shape[0], q[0].numel()), float("nan"), dtype=shape.dtype)
        buffers = tile_buffers(calls, q.shape, shape.dtype)
        for _ in range(2):  # a step's layers share the buffers
            assert paged_attention(q, self.cache, calls, buffers, shape.scale, out) is out
        return list(out.view(q.shape).split([run.length for run in runs]))

    def _decode(self, lone: list[tuple[int, Run]], all_rows: int, spec: dict) -> AttentionCall:
        """As a runner does it: a lone sequence in neighbouring blocks is read in place, and rows that are
        the whole step are not picked."""
        size = self.shape.block_size
        count = padded_blocks(max(run.start for _, run in lone) + 1, size, self.shape.dtype)
        positions = torch.tensor([run.start for _, run in lone])
        rows = None if len(lone) == all_rows else [row for row, _ in lone]
        used = [self.tables[run.sequence][: run.start // size + 1] for _, run in lone]
        if len(lone) == 1:
            run = block_run(used[0].tolist(), count)
            if run is not None and run.stop <= self.cache.shape[0]:
                return decode_call(rows, positions, run, **spec)
        table = torch.zeros(len(lone), count, dtype=torch.int64)
        for i, blocks in enumerate(used):
            table[i, : len(blocks)] = blocks
        return decode_call(rows, positions, table, **spec)

    def alone(self, sequence: int, position: int) -> torch.Tensor:
        """One position by itself, in the defining tile: [KV heads, group, D]."""
        return self.attend([Run(sequence, position, 1)], tiles=DEFINING)[0][0]

    def plain(self, run: Run) -> torch.Tensor:
        """Softmax attention in float64, a query at a time: [length, KV heads, group, D]."""
        rows = []
        for position in range(run.start, run.start + run.length):
            first = 0 if self.shape.window is None else max(0, position - self.shape.window + 1)
            q = self.q[run.sequence][position].double()
            k = self.k[run.sequence][first : position + 1].double()
            v = self.v[run.sequence][first : position + 1].double()
            weights = torch.softmax(torch.einsum("hgd,lhd->hgl", q, k) * self.shape.scale, dim=-1)
            rows.append(torch.einsum("hgl,lhd->hgd", weights, v))
        return torch.stack(rows)
