"""The one binary tree in which partial sums are added: split at the largest power of two below n.

A tree is written in postfix: `merges[i]` says how many additions follow once leaf i has been pushed. What
makes the tree is n alone, so any cut of it into subtrees adds up to the same bits.
"""

from __future__ import annotations

from functools import cache


@cache
def merges(n: int) -> tuple[int, ...]:
    """Additions after each of n leaves; they sum to n - 1.

    Leaf i ends every subtree [start, i + 1) of the tree that is somebody's right half."""
    if n < 1:
        raise ValueError(f"a tree of {n} leaves")
    if n == 1:
        return (0,)
    left = 1 << ((n - 1).bit_length() - 1)
    right = merges(n - left)
    return merges(left) + right[:-1] + (right[-1] + 1,)


@cache
def cut(n: int, depth: int) -> tuple[tuple[int, int], ...]:
    """The subtrees of the tree over n leaves at `depth` cuts from the root, as [start, stop) from the left;
    a leaf is not cut further. Added up in the order `merges(len(cut))`, they give what the whole tree gives:
    each has a power of two of leaves except the last, as the tree over the cuts wants it."""

    def visit(start: int, stop: int, left: int) -> tuple[tuple[int, int], ...]:
        if left == 0 or stop - start == 1:
            return ((start, stop),)
        middle = start + (1 << ((stop - start - 1).bit_length() - 1))
        return visit(start, middle, left - 1) + visit(middle, stop, left - 1)

    return visit(0, n, depth)
