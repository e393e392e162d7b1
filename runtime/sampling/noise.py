"""Gumbel noise a token, and which tokens can win with it, without drawing noise for the whole vocabulary.

Gumbel-max: the token with the largest  z + g,  z the scaled logit and g = -log(e), e ~ Exp(1), is a sample
of softmax(z). Here e is a pure function of (seed, absolute position, choice, token id). It is drawn in two
levels: a block of BLOCK consecutive ids has the least of its e, which is Exp(1) / BLOCK, and the id that
holds it, which is uniform; by memorylessness every other id of the block has that least plus a fresh Exp(1).
That is the exact joint distribution of independent Exp(1), and the block's least bounds the noise of all its
tokens: those that cannot reach a value known to be reached are never drawn, and the winner is exactly the
one that drawing everything would find.

Philox counter: (token or block, position, choice, level); key: the seed's low and high half. Every value
comes from elementwise float64 operations, whose bits do not depend on the array's length (tests hold numpy
to that), so neither batching nor pruning shows. Knows no filters' rules and no other sequence's state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.sampling.filters import Ids, Row, fp32_floor, scaled
from runtime.sampling.philox import Words, philox4x32

BLOCK = 256  # ids a block; part of the noise's definition, not a tuning knob

_SHIFT = BLOCK.bit_length() - 1
_TOKEN_LEVEL, _BLOCK_LEVEL = 0, 1


@dataclass(frozen=True, slots=True)
class BlockDraws:
    """The first level of rows' noise, and the noise of one token a row, its pilot. All [rows, blocks] but
    `pilots` and `pilot_noise`, which are [rows]."""

    least: NDArray[np.float64]  # the least exponential of the block
    bound: NDArray[np.float64]  # -log(least): the largest noise of the block
    holder: Ids  # the token that has it, perhaps past the vocabulary's end
    pilots: Ids
    pilot_noise: NDArray[np.float64]
    keys: Words  # [2, rows]
    positions: Words  # [rows]
    choices: Words  # [rows]


def draw_blocks(
    seeds: Sequence[int],
    positions: Sequence[int],
    pilots: Sequence[int],
    vocab_size: int,
    choices: Sequence[int] | None = None,
) -> BlockDraws:
    """First-level noise of every block of the vocabulary for each row. A pilot is a token that is likely to
    come close to winning; any will do, and none changes who wins. `choices` are all 0 where left out."""
    seed, at, pilot = np.array(seeds, np.uint64), np.array(positions, np.uint64), np.array(pilots, np.int64)
    choice = np.zeros(len(seed), np.uint64) if choices is None else np.array(choices, np.uint64)
    keys = np.stack([seed & np.uint64(0xFFFFFFFF), seed >> np.uint64(32)])
    blocks = np.arange(-(-vocab_size >> _SHIFT))
    ids = np.empty((len(seed), len(blocks) + 1), np.uint64)  # one call for blocks and pilots
    ids[:, :-1] = blocks
    ids[:, -1] = pilot
    level = np.full(len(blocks) + 1, _BLOCK_LEVEL, np.uint64)
    level[-1] = _TOKEN_LEVEL
    words = _words(ids, at[:, None], choice[:, None], level, keys[:, :, None])
    fresh = _exponential(words)
    least = fresh[:, :-1] / BLOCK
    holder = (blocks << _SHIFT) + (words[2, :, :-1] >> np.uint64(32 - _SHIFT)).astype(np.int64)
    rows = np.arange(len(seed)), pilot >> _SHIFT
    noise = _gumbel(pilot, least[rows], holder[rows], fresh[:, -1])
    return BlockDraws(least, -np.log(least), holder, pilot, noise, keys, at, choice)


def contenders(draws: BlockDraws, i: int, row: Row, peak: float, temperature: float, kept: Ids | None) -> Ids:
    """Tokens of row i that may have the largest z + g, ascending, the one that has it among them.

    `row` holds the logits, `peak` the largest; `kept` are the ids that may win, ascending, or None for all.
    """
    bound, holder = draws.bound[i], draws.holder[i]
    if kept is None:
        table = _table(row)
        best = scaled(table.reshape(-1)[holder], peak, temperature) + bound
        rivals = draws.pilots[i : i + 1]
    else:
        held = _members(holder, kept)
        best = scaled(row[holder[held]], peak, temperature) + bound[held]
        rivals = draws.pilots[i : i + 1][_members(draws.pilots[i : i + 1], kept)]
    pilot = scaled(row[rivals], peak, temperature) + draws.pilot_noise[i]
    reached = max(np.max(best, initial=-np.inf), np.max(pilot, initial=-np.inf))
    # A token below its block's edge falls short of `reached` even with the block's largest noise.
    edge = fp32_floor(peak + temperature * (reached - bound), peak)
    if kept is not None:
        return kept[row[kept] >= edge[kept >> _SHIFT]]
    hot = np.flatnonzero(table.max(axis=1) >= edge)
    which, inside = np.nonzero(table[hot] >= edge[hot, None])
    return (hot[which] << _SHIFT) + inside


def winners(draws: BlockDraws, tokens: Sequence[Ids], z: Sequence[NDArray[np.float64]]) -> list[int]:
    """For each row, the id of `tokens` with the largest z + g, the lowest such id where several are equal."""
    sizes = [len(ids) for ids in tokens]
    rows = np.repeat(np.arange(len(sizes)), sizes)
    ids = np.concatenate(tokens)
    places = draws.positions[rows], draws.choices[rows]
    words = _words(ids.astype(np.uint64), *places, np.uint64(_TOKEN_LEVEL), draws.keys[:, rows])
    block = rows, ids >> _SHIFT
    noise = _gumbel(ids, draws.least[block], draws.holder[block], _exponential(words))
    starts = np.cumsum([0, *sizes])
    return [int(tokens[i][np.argmax(z[i] + noise[starts[i] : starts[i + 1]])]) for i in range(len(sizes))]


def _words(ids: Words, positions: Words, choices: Words, level: Words | np.uint64, keys: Words) -> Words:
    counter = np.empty((4, *ids.shape), np.uint64)
    counter[0], counter[1], counter[2], counter[3] = ids, positions, choices, level
    return philox4x32(counter, keys)


def _exponential(words: Words) -> NDArray[np.float64]:
    """Exp(1) from 52 random bits: -log(u), u the middle of one of 2**52 equal parts of (0, 1), exact."""
    bits = (words[0] << np.uint64(20)) | (words[1] >> np.uint64(12))
    return -np.log((bits.astype(np.float64) + 0.5) * 2.0**-52)


def _gumbel(
    tokens: Ids, least: NDArray[np.float64], holder: Ids, fresh: NDArray[np.float64]
) -> NDArray[np.float64]:
    return -np.log(least + np.where(tokens == holder, 0.0, fresh))


def _table(row: Row) -> NDArray[np.float32]:
    """`row` as [blocks, BLOCK], with -inf past its end."""
    if len(row) % BLOCK == 0:
        return row.reshape(-1, BLOCK)
    table = np.full(-(-len(row) // BLOCK) * BLOCK, -np.inf, np.float32)
    table[: len(row)] = row
    return table.reshape(-1, BLOCK)


def _members(tokens: Ids, kept: Ids) -> NDArray[np.bool_]:
    """Which of `tokens` are in `kept` (ascending, not empty)."""
    return kept[np.minimum(np.searchsorted(kept, tokens), len(kept) - 1)] == tokens
