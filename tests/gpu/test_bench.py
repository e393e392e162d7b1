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
from runtime.model.gpu import forward
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
    model = GpuForward(shard, cache, Alone(), 70, scales)
    logits = model.logits(decode_batch(2, 70, spec.vocab, DEVICE))
    assert logits.shape == (2, 96)
    assert logits.isfinite().all()


def test_splits_of_a_product_are_all_added(monkeypatch) -> None:
    """Whatever a tiling splits: the head, and three formats side by side."""
    spec = replace(flagship(1), hidden=256, heads=4, kv_heads=2, head_dim=64, ffn=512, vocab=96)
    shard = random_shard(spec, DEVICE)
    q, k, v = (random_weight(kind, 64, 256, 1, DEVICE) for kind in ("Q4_K", "Q6_K", "Q5_K"))
    x = torch.randn(3, 256, device=DEVICE).half()
    cache, _ = kv_cache(spec, 2, 70, DEVICE)
    batch = decode_batch(2, 70, spec.vocab, DEVICE)
    plain = (
        GpuForward(shard, cache.clone(), Alone(), 70).logits(batch),
        forward.side_by_side(x, (q, k, v)),
    )

    def in_splits(*arguments) -> torch.Tensor:
        whole = linear(*arguments)
        return torch.cat((torch.zeros_like(whole), whole, torch.zeros_like(whole)))

    monkeypatch.setattr(forward, "linear", in_splits)
    split = (
        GpuForward(shard, cache.clone(), Alone(), 70).logits(batch),
        forward.side_by_side(x, (q, k, v)),
    )
    for one, other in zip(plain, split, strict=True):
        assert torch.equal(one, other)


@pytest.mark.skipif(ON_GPU, reason="there is a GPU to time")
@pytest.mark.parametrize("name", ["linear", "step", "small", "attention"])
def test_without_a_gpu_nothing_is_timed(name: str) -> None:
    command = [sys.executable, str(REPOSITORY / "bench" / "gpu" / f"{name}.py")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no CUDA device; nothing was timed" in done.stderr
    assert not done.stdout
