"""Comparing tensors bit for bit, and running torch on a stated number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal type, shape and bits: tells 0 from -0, and a NaN equals itself."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    word = _WORDS[a.dtype.itemsize]
    return torch.equal(a.contiguous().view(word), b.contiguous().view(word))


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Standard normal numbers from a seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
