"""Root-mean-square normalisation: y = x / sqrt(mean(x**2) + eps) * weight (Zhang and Sennrich 2019).

With it comes what always stands before it: the residual stream takes up the sum of a layer's partial results.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kernels.native import machine, rows

Order = tuple[tuple[int, int], ...]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
    """Normalise rows of x, fp32 [M, H], by weight, fp32 [H]; the result is rounded once, to `dtype`.

    A row's mean is one reduction over that row. torch splits a reduction between threads only for a lone
    row of 32,768 elements or more, so wider rows are refused.
    """
    _check(x, weight)
    if _native(x):
        out = x.new_empty(x.shape, dtype=dtype)
        rows.add_norm(x, None, (), weight, eps, out)
        return out
    y = torch.nn.functional.rms_norm(x, weight.shape, weight, eps)
    return y if dtype == torch.float32 else y.to(dtype)


def add_norm(
    x: torch.Tensor,
    parts: torch.Tensor | Sequence[torch.Tensor],
    order: Order,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor,
) -> None:
    """x += the sum of parts; then out [M, H], bf16 or fp32, is `rms_norm` of x.

    parts [P, M, H] bf16 or fp32 are added in fp32: for each pair (into, other) of `order` the one takes up
    the other, until part 0 is the sum.
    """
    _check(x, weight)
    if _native(x) and isinstance(parts, torch.Tensor):
        rows.add_norm(x, parts, order, weight, eps, out)
        return
    leaves = [part.float() for part in parts]
    for into, other in order:
        leaves[into] = leaves[into] + leaves[other]
    x += leaves[0]
    out.copy_(rms_norm(x, weight, eps, out.dtype))


def _native(x: torch.Tensor) -> bool:
    return x.shape[1] % rows.LANES == 0 and x.stride(1) == 1 and machine.supported()


def _check(x: torch.Tensor, weight: torch.Tensor) -> None:
    if x.dtype != torch.float32 or x.shape[-1] != weight.shape[0]:
        raise ValueError(f"rms_norm: x is {x.dtype} {tuple(x.shape)}, weight {tuple(weight.shape)}")
    if x.shape[-1] >= 32768:
        raise ValueError(f"rms_norm: rows of {x.shape[-1]} are not reduced in one order")
