"""Flattens runs of tokens of several sequences to the rows of one step on a GPU, padded where it is to fit a
captured step. Knows block tables and positions; nothing of plans, sampling or what the tokens are for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from runtime.model.batch import Run
from runtime.model.gpu.forward import GpuBatch

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # sequences of a captured step, and its rows
LENGTHS = (1, 16, 64)  # rows of one sequence in a captured step


@dataclass(frozen=True, slots=True)
class Unseen:
    """Tokens that the host does not know, and which rows of a step they belong to."""

    rows: list[int]
    tokens: torch.Tensor  # int32 [rows], on the device


@dataclass(frozen=True, slots=True)
class Shape:
    """What a step has room for."""

    sequences: int
    blocks: int  # of one sequence
    rows: int
    longest: int  # rows of one sequence


def captured_shape(runs: Sequence[Run], most_blocks: int) -> Shape | None:
    """The captured step that has room for `runs`; None if none has, or if not every row's logits are wanted.
    most_blocks: of a sequence of the longest kind."""
    if any(run.samples != len(run.tokens) or run.scores for run in runs):
        return None
    longest = max(len(run.tokens) for run in runs)
    if longest > LENGTHS[-1] or _bucket(LENGTHS, longest) * len(runs) > BUCKETS[-1]:
        return None
    blocks = max(len(run.blocks) for run in runs)
    return Shape(
        _bucket(BUCKETS, len(runs)),
        min(1 << (blocks - 1).bit_length(), most_blocks),
        _bucket(BUCKETS, sum(len(run.tokens) for run in runs)),
        _bucket(LENGTHS, longest),
    )


def make_batch(
    runs: Sequence[Run],
    block_size: int,
    device: torch.device,
    *,
    shape: Shape | None = None,
    unseen: Unseen | None = None,
) -> GpuBatch:
    """Rows in the order of `runs`; wanted are the rows of samples in that order, then the scored ones. Padded
    to `shape`, whose rows are all wanted, if one is given. Where a token is unseen, `runs` hold any."""
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    sampled: list[int] = []
    scored: list[int] = []
    starts = [0]
    contexts: list[int] = []
    tables: list[list[int]] = []
    for run in runs:
        first, stop = len(tokens), run.start + len(run.tokens)
        tokens += run.tokens
        positions += range(run.start, stop)
        slots += [run.blocks[p // block_size] * block_size + p % block_size for p in range(run.start, stop)]
        sampled += range(len(tokens) - run.samples, len(tokens))
        if run.scores:
            scored += range(first, len(tokens))
        starts.append(len(tokens))
        contexts.append(stop)
        tables.append(run.blocks[: -(-stop // block_size)])
    if shape is None:
        longest = max(b - a for a, b in pairwise(starts))
        shape = Shape(len(runs), max(map(len, tables)), len(tokens), longest)
    # Programs share the work of few rows of few sequences; more rows have enough programs of their own, and
    # would want a large workspace.
    few = shape.longest <= LENGTHS[-1] and shape.sequences * shape.longest <= BUCKETS[-1]
    padding, unused = shape.sequences - len(runs), shape.rows - len(tokens)
    sampled += range(len(tokens), shape.rows)
    starts += [len(tokens)] * padding
    tables += [[]] * padding

    def on_device(values: list) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32).to(device, non_blocking=True)

    ids = on_device(tokens + [0] * unused)
    if unseen is not None:
        ids.index_copy_(0, on_device(unseen.rows).long(), unseen.tokens)
    return GpuBatch(
        ids,
        on_device(positions + [0] * unused),
        on_device(slots + [-1] * unused),
        on_device([table + [0] * (shape.blocks - len(table)) for table in tables]),
        on_device(starts),
        on_device(contexts + [0] * padding),
        on_device(sampled + scored),
        shape.longest,
        shape.longest if few else 1,
    )


def _bucket(sizes: Sequence[int], least: int) -> int:
    return next(size for size in sizes if size >= least)
