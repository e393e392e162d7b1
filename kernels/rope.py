"""Rotary position embedding, in the half-split order: channel i turns with channel i + D/2.

y = x * cos + swap(x) * (-sin, sin), each product and the sum rounded by itself in fp32 (Su et al. 2021).
Frequencies are a table made once in float64 by the caller.
"""

from __future__ import annotations

import torch


def rope_(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x in place. x [M, heads, D]; cos and sin fp32 [M, 1, D], sin with its first half negated."""
    swapped = x.roll(x.shape[-1] // 2, -1)
    return torch.add(x * cos, swapped * sin, out=x)
