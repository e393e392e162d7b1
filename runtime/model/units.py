"""Units: the fixed pieces a model is cut into, so that the degree of parallelism cannot change a bit.

A model has U units whatever the number of ranks; a rank holds a contiguous run of them. Whatever is summed
over units folds in one binary tree over 0..U-1. Pure arithmetic: knows nothing of tensors or files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from runtime.errors import InvalidArgument

MAX_UNITS = 8
T = TypeVar("T")
Span = tuple[int, int]  # [start, stop)


@dataclass(frozen=True, slots=True)
class Unit:
    """What one unit owns, as half-open ranges over the whole model."""

    kv_heads: Span
    heads: Span  # the query heads that read those KV heads
    ffn: Span  # FFN channels; may be empty
    vocab: Span  # rows of the embedding and of the head


def unit_count(kv_heads: int) -> int:
    """The largest divisor of `kv_heads` that is at most 8."""
    return max(n for n in range(1, MAX_UNITS + 1) if kv_heads % n == 0)


def cut_units(*, heads: int, kv_heads: int, ffn: int, ffn_block: int, vocab: int) -> tuple[Unit, ...]:
    """Cut a model into its units.

    FFN boundary i stands at floor(i * blocks / U) quantisation blocks of `ffn_block` channels, so that a
    unit's share of the down projection starts on a block; a unit may get none.
    """
    count = unit_count(kv_heads)
    group = heads // kv_heads
    per_unit = kv_heads // count
    blocks = -(-ffn // ffn_block)
    ffn_at = [min(ffn, i * blocks // count * ffn_block) for i in range(count + 1)]
    vocab_at = [i * vocab // count for i in range(count + 1)]
    return tuple(
        Unit(
            kv_heads=(i * per_unit, (i + 1) * per_unit),
            heads=(i * per_unit * group, (i + 1) * per_unit * group),
            ffn=(ffn_at[i], ffn_at[i + 1]),
            vocab=(vocab_at[i], vocab_at[i + 1]),
        )
        for i in range(count)
    )


def rank_units(units: int, tp: int) -> tuple[Span, ...]:
    """The contiguous run of units of each of `tp` ranks; the first ranks hold one more where uneven."""
    if not 1 <= tp <= units:
        raise InvalidArgument("tp", f"{tp} is not possible: this model has {units} units, so 1 to {units}")
    share, extra = divmod(units, tp)
    starts = [r * share + min(r, extra) for r in range(tp + 1)]
    return tuple((starts[r], starts[r + 1]) for r in range(tp))


def _split(start: int, stop: int) -> int:
    """Where the tree over [start, stop) parts: the largest power of two below its size from the left."""
    return start + (1 << ((stop - start - 1).bit_length() - 1))


def subtrees(run: Span, units: int) -> tuple[Span, ...]:
    """The largest subtrees of the tree over [0, units) that lie inside `run`, left to right."""

    def visit(start: int, stop: int) -> tuple[Span, ...]:
        if stop <= run[0] or run[1] <= start:
            return ()
        if run[0] <= start and stop <= run[1]:
            return ((start, stop),)
        middle = _split(start, stop)
        return visit(start, middle) + visit(middle, stop)

    return visit(0, units)


def fold(leaves: Mapping[Span, T | None], span: Span, add: Callable[[T, T], T]) -> T | None:
    """Fold `span` in the tree's order. `leaves` holds a value for each subtree that is already summed;
    None stands for a unit that contributes nothing and is skipped, not added."""
    if span in leaves:
        return leaves[span]
    middle = _split(*span)
    left = fold(leaves, (span[0], middle), add)
    right = fold(leaves, (middle, span[1]), add)
    if left is None or right is None:
        return left if right is None else right
    return add(left, right)
