"""Batches whose attention reads the KV cache by address name no address outside it."""

from __future__ import annotations

import pytest
import torch

from kernels.attention import Tiles, native_takes
from runtime.model.batch import BatchMaker, Run
from tests.model.driver import opened

BLOCKS = 8


@pytest.fixture(scope="module")
def spec(tiny):
    return opened(tiny(types="Q8_0", hidden=128, heads=4, kv_heads=2, head_dim=32, ffn=256)).spec


@pytest.mark.skipif(not native_takes(32, torch.bfloat16), reason="no AMX, or no compiler for it")
@pytest.mark.parametrize("size", [4, 16, 64])
def test_blocks_that_are_not_there_are_refused(spec, size):
    batches = BatchMaker(spec, torch.bfloat16, size, BLOCKS)
    start = 2 * size
    assert isinstance(batches.make([Run([5], start, [0, 3, BLOCKS - 1], 1)]).calls, Tiles)
    for outside in (-1, BLOCKS, 1 << 40):
        with pytest.raises(ValueError, match=f"KV blocks outside the {BLOCKS}"):
            batches.make([Run([5], 0, [0], 1), Run([5], start, [0, outside, 1], 1)])
