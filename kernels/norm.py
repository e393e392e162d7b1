"""Root-mean-square normalisation: y = x / sqrt(mean(x**2) + eps) * weight (Zhang and Sennrich 2019)."""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
    """Normalise rows of x, fp32 [M, H], by weight, fp32 [H]; the result is rounded once, to `dtype`.

    A row's mean is one reduction over that row. torch splits a reduction between threads only for a lone
    row of 32,768 elements or more, so wider rows are refused.
    """
    if x.dtype != torch.float32 or x.shape[-1] != weight.shape[0]:
        raise ValueError(f"rms_norm: x is {x.dtype} {tuple(x.shape)}, weight {tuple(weight.shape)}")
    if x.shape[-1] >= 32768:
        raise ValueError(f"rms_norm: rows of {x.shape[-1]} are not reduced in one order")
    y = torch.nn.functional.rms_norm(x, weight.shape, weight, eps)
    return y if dtype == torch.float32 else y.to(dtype)
