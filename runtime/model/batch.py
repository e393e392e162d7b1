"""Flattens runs of tokens of several sequences to the rows of one forward pass.

Where torch's attention serves, single tokens share calls, grouped by the length of their KV; longer runs have
calls of their own.
Knows block tables and positions; nothing of plans, sampling or what the tokens are for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

from kernels.attention import (
    AttentionCall,
    Tiles,
    block_run,
    chunk_calls,
    decode_call,
    lay_out,
    native_takes,
    padded_blocks,
    tile_sizes,
)
from runtime.model.forward import Batch
from runtime.model.spec import ModelSpec

_Lone = tuple[int, int, list[int]]  # row, position, block table


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens of a sequence at positions start .. start + len(tokens) - 1."""

    tokens: list[int]
    start: int
    blocks: list[int]  # the sequence's block table, as far as the run at least
    samples: int  # of how many of the last rows the logits are wanted
    scores: bool = False  # of all rows, after those of samples


class BatchMaker:
    """Makes batches for a model's KV cache of `cache_blocks` blocks of `block_size` positions."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, block_size: int, cache_blocks: int):
        self._block_size = block_size
        self._cache_blocks = cache_blocks
        self._dtype = dtype
        self._group = spec.heads // spec.kv_heads
        self._window = spec.sliding_window
        self._native = native_takes(spec.head_dim, dtype)
        if not self._native:
            self._tiles = tile_sizes(self._group, spec.head_dim, dtype)
            self._shape = {"block_size": block_size, "window": spec.sliding_window, "dtype": dtype}

    def make(self, runs: Sequence[Run]) -> Batch:
        """Rows in the order of `runs`; wanted are the rows of samples in that order, then the scored ones."""
        tokens: list[int] = []
        positions: list[int] = []
        blocks: list[int] = []
        sampled: list[int] = []
        scored: list[int] = []
        size = self._block_size
        for run in runs:
            first, stop = len(tokens), run.start + len(run.tokens)
            tokens += run.tokens
            positions += range(run.start, stop)
            blocks += [run.blocks[p // size] for p in range(run.start, stop)]
            sampled += range(len(tokens) - run.samples, len(tokens))
            if run.scores:
                scored += range(first, len(tokens))
        at = torch.tensor(positions)
        cache_rows = torch.tensor(blocks) * size + at % size
        wanted = torch.tensor(sampled + scored, dtype=torch.int64)
        return Batch(torch.tensor(tokens), at, cache_rows, self._calls(runs), wanted)

    def _calls(self, runs: Sequence[Run]) -> list[AttentionCall] | Tiles:
        firsts = accumulate((len(run.tokens) for run in runs), initial=0)
        if self._native:
            laid = [(first, r.start, len(r.tokens), r.blocks) for first, r in zip(firsts, runs, strict=False)]
            tiles = lay_out(laid, block_size=self._block_size, group=self._group, window=self._window)
            # They are read by address, where nothing else would notice.
            lowest, highest = tiles.rows.aminmax() if tiles.gathered is None else tiles.gathered.aminmax()
            end = self._cache_blocks * (self._block_size if tiles.gathered is None else 1)
            if lowest < 0 or highest >= end:
                raise ValueError(f"a plan names KV blocks outside the {self._cache_blocks} there are")
            return tiles
        calls: list[AttentionCall] = []
        lone: list[_Lone] = []
        for first, run in zip(firsts, runs, strict=False):
            if len(run.tokens) == 1:
                lone.append((first, run.start, run.blocks))
                continue
            table = torch.tensor(run.blocks[: -(-(run.start + len(run.tokens)) // self._block_size)])
            calls += chunk_calls(
                first,
                run.start,
                len(run.tokens),
                table,
                group=self._group,
                tile=self._tiles.run,
                **self._shape,
            )
        return calls + self._decode_calls(lone, sum(len(run.tokens) for run in runs))

    def _decode_calls(self, lone: list[_Lone], all_rows: int) -> list[AttentionCall]:
        """Group single tokens of similar KV length, so that padding at most doubles the work."""
        size = self._block_size
        buckets: dict[int, list[_Lone]] = {}
        for entry in lone:
            needed = padded_blocks(entry[1] + 1, size, self._dtype)
            buckets.setdefault(needed.bit_length(), []).append(entry)
        calls = []
        for entries in buckets.values():
            longest = max(entry[1] for entry in entries) + 1
            count = padded_blocks(longest, size, self._dtype)
            rows = None if len(entries) == all_rows else [entry[0] for entry in entries]
            at = torch.tensor([entry[1] for entry in entries])
            blocks = self._one_run(entries, count) if len(entries) == 1 else None
            if blocks is None:
                table = np.zeros((len(entries), count), np.int64)
                for i, (_, position, owned) in enumerate(entries):
                    used = position // size + 1
                    table[i, :used] = owned[:used]
                blocks = torch.from_numpy(table)
            calls.append(decode_call(rows, at, blocks, tile=self._tiles.single, **self._shape))
        return calls

    def _one_run(self, entries: list[_Lone], count: int) -> slice | None:
        """The neighbouring blocks of a lone sequence, if it has such: they are read in place."""
        _, position, owned = entries[0]
        run = block_run(owned[: position // self._block_size + 1], count)
        return run if run is not None and run.stop <= self._cache_blocks else None
