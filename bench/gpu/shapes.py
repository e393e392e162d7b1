"""The flagship's shapes (Llama-2-70B's) with random planar weights, made on the GPU."""

from __future__ import annotations

import torch

from kernels.gpu.planar import Format, PlanarWeight

HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, LAYERS, VOCAB, UNITS = 8192, 28672, 64, 8, 128, 80, 32000, 8
FORMATS = {
    "Q2_K": Format(2, 0, 0, 16, 256, 3, True),
    "Q3_K": Format(2, 1, 4, 16, 256, 2, False),
    "Q4_K": Format(4, 0, 0, 32, 256, 1, True),
    "Q5_K": Format(4, 1, 0, 32, 256, 1, True),
    "Q6_K": Format(4, 2, 32, 16, 256, 2, False),
    "Q8_0": Format(8, 0, 0, 32, 32, 0, False),
    "int4 g128": Format(4, 0, 0, 128, 128, 0, True),
    "fp16": Format(16, 0, 0, 128, 128, 0, False),
}


def random_weight(kind: str, rows: int, width: int, units: int = 1, device: str = "cuda") -> PlanarWeight:
    """Random codes and sub-scales; d and m of a size that keeps products near 1. Widths of whole blocks."""
    f = FORMATS[kind]
    blocks = width // 128

    def integers(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        info = torch.iinfo(dtype)
        return torch.randint(info.min, info.max, shape, dtype=dtype, device=device)

    if f.low == 16:
        low = torch.randn(units, rows, width, device=device, dtype=torch.float16) * 0.02
        return PlanarWeight(f, rows, width, units, low, None, None, None, None)
    if f.low == 8:
        low = integers(torch.int8, units, rows, width)
    else:
        low = integers(torch.int16, units, rows, blocks * 8 * f.low)
    high = integers(torch.int16, units, rows, blocks * 8 * f.high) if f.high else None
    spans = width // f.span if f.minimum else width // (2 * f.span)
    scale = 0.02 / (1 << (f.low + f.high)) / (32 if f.sub else 1)
    halves = scale * (0.5 + torch.rand(units, max(1, spans), rows, 2, device=device))
    d = halves.half().view(torch.int32).squeeze(-1)
    words = width // f.group // 4
    sub = integers(torch.int32, units, words, rows) if f.sub else None
    mins = integers(torch.int32, units, words, rows) if f.minimum and f.sub in (1, 2) else None
    return PlanarWeight(f, rows, width, units, low, high, d, sub, mins)
