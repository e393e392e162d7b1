"""The benchmarks' own making of weights and steps, at a size that can be interpreted."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from bench.gpu.shapes import FORMATS, random_weight
from bench.gpu.step import decode_batch, flagship, kv_cache, random_shard
from kernels.gpu.linear import linear
from runtime.model.communicator import Alone
from runtime.model.gpu.forward import GpuForward
from runtime.model.gpu.shard import DTYPE, FP8
from tests.gpu.device import DEVICE, ON_GPU
from tests.support import REPOSITORY


@pytest.mark.parametrize("kind", FORMATS)
def test_random_weights_are_of_a_models_size(kind: str) -> None:
    weight = random_weight(kind, 64, 512, 1, DEVICE)
    y = linear(torch.randn(4, 512, device=DEVICE).half(), weight)
    assert y.isfinite().all()
    assert 0.01 < float(y.std()) < 10


@pytest.mark.parametrize("dtype", [DTYPE, FP8], ids=["fp16", "fp8"])
def test_a_small_step(dtype: torch.dtype) -> None:
    spec = replace(flagship(1), hidden=256, heads=4, kv_heads=2, head_dim=64, ffn=512, vocab=96)
    shard = random_shard(spec, DEVICE)
    cache, scales = kv_cache(spec, 2, 70, DEVICE, dtype)
    forward = GpuForward(shard, cache, Alone(), 70, scales)
    logits = forward.logits(decode_batch(2, 70, spec.vocab, DEVICE))
    assert logits.shape == (2, 96)
    assert logits.isfinite().all()


@pytest.mark.skipif(ON_GPU, reason="there is a GPU to time")
@pytest.mark.parametrize("name", ["linear", "step", "small", "attention"])
def test_without_a_gpu_nothing_is_timed(name: str) -> None:
    command = [sys.executable, str(REPOSITORY / "bench" / "gpu" / f"{name}.py")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no CUDA device; nothing was timed" in done.stderr
    assert not done.stdout
