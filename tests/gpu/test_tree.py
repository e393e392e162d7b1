"""The postfix form of the tree against its definition, and that any cut of it adds up alike."""

from __future__ import annotations

import pytest

from kernels.gpu.tree import cut, merges


def defined(start: int, stop: int):
    """The tree in words: split at the largest power of two below n."""
    if stop - start == 1:
        return start
    half = 1
    while half * 2 < stop - start:
        half *= 2
    return defined(start, start + half), defined(start + half, stop)


def added(leaves: list):
    pending: list = []
    for leaf, count in zip(leaves, merges(len(leaves)), strict=True):
        pending.append(leaf)
        for _ in range(count):
            right, left = pending.pop(), pending.pop()
            pending.append((left, right))
    assert len(pending) == 1
    return pending[0]


@pytest.mark.parametrize("n", range(1, 40))
def test_postfix_and_cuts(n: int) -> None:
    assert added(list(range(n))) == defined(0, n)
    for depth in range(7):
        parts = [added(list(range(*span))) for span in cut(n, depth)]
        assert added(parts) == defined(0, n)


def test_no_leaves() -> None:
    with pytest.raises(ValueError, match="0 leaves"):
        merges(0)
