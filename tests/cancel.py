"""Inputs whose exact result is zero, so that what is computed is the rounding of the sums and nothing else.

A result in bf16 hides that its sum was made in another order in all but one of some twenty thousand elements.
Where every term has its opposite somewhere in the sum, the order shows in nearly every element.
"""

from __future__ import annotations

import torch

from tests.bits import random


def _pairs(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two halves of 0 .. count - 1 (one left out if it is odd), shuffled: entry i of one cancels entry i of
    the other."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    half = count // 2
    return order[:half], order[half : 2 * half]


def cancelling_product(
    m: int, n: int, k: int, seed: int = 0, *, codes: bool = False, block: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [m, k] and w [n, k], exact in bf16, with x @ w.T == 0. `codes`: w is whole numbers from -7 to 7.
    `block`: what cancels stands within the same so many columns, as where each block's sum is rounded."""
    pieces = [(at, *_pairs(min(block or k, k - at), seed + at)) for at in range(0, k, block or k)]
    first = torch.cat([at + one for at, one, _ in pieces])
    second = torch.cat([at + other for at, _, other in pieces])
    x, w = random(seed, m, k).bfloat16().float(), random(seed + 1, n, k).bfloat16().float()
    if codes:
        w = torch.randint(-7, 8, (n, k), generator=torch.Generator().manual_seed(seed + 1)).float()
    x[:, second], w[:, second] = x[:, first], -w[:, first]
    if k % 2:
        x[:, list({*range(k)} - {*first.tolist(), *second.tolist()})] = 0
    return x, w


def cancel_values(k: torch.Tensor, v: torch.Tensor, count: int, seed: int = 0) -> None:
    """Make keys of the first `count` positions [L, heads, D] come in pairs, with opposite values: attention
    of the query at position count - 1 is then zero."""
    first, second = _pairs(count, seed)
    k[second], v[second] = k[first], -v[first]
    if count % 2:
        v[list({*range(count)} - {*first.tolist(), *second.tolist()})] = 0
