"""Kernels that start before the one before them has ended: off unless chosen, and free of influence."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench.gpu.step import decode_batch, flagship, kv_cache, random_shard
from bench.gpu.timing import captured
from kernels.gpu import tuning
from kernels.gpu.overlap import OLDEST, overlap, overlapping
from kernels.gpu.tuning import Tiling, overlap_pays, save
from runtime.model.communicator import Alone
from runtime.model.gpu.forward import GpuForward
from runtime.model.gpu.shard import DTYPE, FP8
from tests.gpu.device import DEVICE, ON_GPU

ABLE = ON_GPU and torch.cuda.get_device_capability() >= OLDEST


def test_only_where_chosen_and_able() -> None:
    device = torch.device(DEVICE)
    assert not overlapping(device)
    with overlap():
        assert overlapping(device) == ABLE
        with overlap(False):
            assert not overlapping(device)
    assert not overlapping(device)


def test_a_tuned_file_keeps_it_beside_tilings(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    monkeypatch.setattr(tuning, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA Test GPU")
    device = torch.device("cuda")
    tuning._tuned.cache_clear()
    try:
        assert not overlap_pays(device)
        for found in ({"overlap": True}, {"16: a": Tiling(split=2)}):
            path = save("NVIDIA Test GPU", found)
        tuning._tuned.cache_clear()
        assert overlap_pays(device)
        assert not overlap_pays(torch.device("cpu"))
        assert path.name == "test_gpu.json"
        assert Tiling(**tuning._tuned(path.name)["16: a"]) == Tiling(split=2)
    finally:
        tuning._tuned.cache_clear()


@pytest.mark.skipif(not ABLE, reason="needs a GPU of compute capability 9.0")
@pytest.mark.parametrize("dtype", [DTYPE, FP8], ids=["fp16", "fp8"])
@pytest.mark.parametrize("sequences", [1, 8])
def test_captured_steps_give_the_same_bits(sequences: int, dtype: torch.dtype) -> None:
    """Many replays: a kernel that does not wait would now and then read what is not there yet."""
    spec = replace(flagship(8), hidden=1024, heads=16, kv_heads=2, head_dim=64, ffn=2048, vocab=4096)
    cache, scales = kv_cache(spec, sequences, 600, dtype=dtype)
    forward = GpuForward(random_shard(spec), cache, Alone(), 600, scales)
    batch = decode_batch(sequences, 600, spec.vocab)
    state = [cache.view(torch.uint8), *([] if scales is None else [scales])]
    kept = [tensor.clone() for tensor in state]
    with torch.inference_mode():
        want = forward.logits(batch).clone()
        written = [tensor.clone() for tensor in state]
        with overlap():
            out: list[torch.Tensor] = []
            run = captured([lambda: out.append(forward.logits(batch))])
        for _ in range(200):
            for tensor, before in zip(state, kept, strict=True):
                tensor.copy_(before)
            out[-1].fill_(float("nan"))
            run()
            assert torch.equal(out[-1].view(torch.int32), want.view(torch.int32))
            assert all(torch.equal(tensor, after) for tensor, after in zip(state, written, strict=True))
