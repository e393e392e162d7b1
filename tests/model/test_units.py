"""Units cover the model once, and their sum is one tree whoever holds them."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import InvalidArgument
from runtime.model.units import cut_units, fold, rank_units, subtrees, unit_count

UNITS = st.integers(1, 8)


def joined(spans: list[tuple[int, int]]) -> tuple[int, int]:
    """First start and last stop of spans that follow each other without a gap."""
    for (start, stop), (after, _) in pairwise(spans):
        assert start <= stop == after
    return spans[0][0], spans[-1][1]


@given(
    kv_heads=st.integers(1, 64),
    group=st.integers(1, 32),
    ffn=st.integers(1, 40000),
    block=st.sampled_from([1, 32, 256]),
    vocab=st.integers(1, 200_000),
)
def test_units_cover_the_model_once(kv_heads, group, ffn, block, vocab):
    units = cut_units(heads=kv_heads * group, kv_heads=kv_heads, ffn=ffn, ffn_block=block, vocab=vocab)
    assert len(units) == unit_count(kv_heads)
    assert joined([u.kv_heads for u in units]) == (0, kv_heads)
    assert joined([u.heads for u in units]) == (0, kv_heads * group)
    assert joined([u.ffn for u in units]) == (0, ffn)
    assert joined([u.vocab for u in units]) == (0, vocab)
    blocks = -(-ffn // block)
    for i, unit in enumerate(units):
        assert unit.heads[1] - unit.heads[0] == (unit.kv_heads[1] - unit.kv_heads[0]) * group
        assert unit.ffn[0] == i * blocks // len(units) * block
        assert unit.ffn[1] == ffn or unit.ffn[1] % block == 0


def test_unit_counts_of_known_models():
    assert [unit_count(n) for n in (1, 2, 3, 4, 5, 7, 8, 11, 12, 16, 32, 40)] == [
        1, 2, 3, 4, 5, 7, 8, 1, 6, 8, 8, 8,
    ]  # fmt: skip


@given(UNITS.flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))))
def test_ranks_cover_the_units_once_and_nearly_evenly(case):
    units, tp = case
    runs = rank_units(units, tp)
    assert len(runs) == tp and joined(list(runs)) == (0, units)
    sizes = [stop - start for start, stop in runs]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1 and sizes[-1] >= 1


@pytest.mark.parametrize(("units", "tp"), [(3, 0), (3, -1), (3, 4), (1, 2), (8, 9)])
def test_an_impossible_tp_says_what_is_possible(units, tp):
    with pytest.raises(InvalidArgument, match=rf"^tp: {tp} .*1 to {units}$"):
        rank_units(units, tp)


def brackets(a: str, b: str) -> str:
    """A sum that is neither associative nor commutative: it shows the whole tree."""
    return f"({a}+{b})"


def whole(empty: tuple[bool, ...]) -> str | None:
    units = len(empty)
    leaves = {(u, u + 1): None if empty[u] else str(u) for u in range(units)}
    return fold(leaves, (0, units), brackets)


def test_the_tree_splits_at_the_largest_power_of_two_below():
    assert whole((False,) * 2) == "(0+1)"
    assert whole((False,) * 3) == "((0+1)+2)"
    assert whole((False,) * 5) == "(((0+1)+(2+3))+4)"
    assert whole((False,) * 7) == "(((0+1)+(2+3))+((4+5)+6))"
    assert whole((False,) * 8) == "(((0+1)+(2+3))+((4+5)+(6+7)))"


def test_a_unit_without_a_share_is_skipped():
    assert whole((False, True, False, False)) == "(0+(2+3))"
    assert whole((True, True, False)) == "2"
    assert whole((True, True, True)) is None


@given(st.lists(st.booleans(), min_size=1, max_size=8).map(tuple), st.data())
def test_any_contiguous_split_among_ranks_gives_the_same_tree(empty, data):
    """Not only the splits that rank_units makes: any cut of the units into runs."""
    units = len(empty)
    cuts = sorted(data.draw(st.sets(st.integers(1, units - 1)))) if units > 1 else []
    edges = [0, *cuts, units]
    leaves = {(u, u + 1): None if empty[u] else str(u) for u in range(units)}
    sums = {}
    for start, stop in pairwise(edges):
        spans = subtrees((start, stop), units)
        assert joined(list(spans)) == (start, stop)
        for span in spans:
            mine = {leaf: value for leaf, value in leaves.items() if start <= leaf[0] < stop}
            sums[span] = fold(mine, span, brackets)  # needs no unit of another rank
    assert fold(sums, (0, units), brackets) == whole(empty)


@given(UNITS.flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1), st.integers(1, n))))
def test_subtrees_are_the_largest(case):
    units, start, stop = case
    if start >= stop:
        assert subtrees((start, start), units) == ()
        return
    spans = subtrees((start, stop), units)
    every = subtrees((0, units), units)
    assert every == ((0, units),)
    for (a, _), (_, d) in pairwise(spans):
        assert subtrees((a, d), units) != ((a, d),)  # two neighbours never form a subtree themselves
