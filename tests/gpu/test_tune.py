"""What is tuned is what steps look up, and no tiling that gives other bits is kept."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench.gpu import tune as tuner
from bench.gpu.step import decode_batch, flagship, kv_cache, random_shard
from bench.gpu.tune import MIXES, ROWS, Dims, Product, candidates, products, tune
from kernels.gpu import linear as gemm
from kernels.gpu.tuning import Tiling, shape_name
from runtime.config import EngineConfig
from runtime.model.communicator import Alone
from runtime.model.gpu.batch import BUCKETS
from runtime.model.gpu.forward import GpuForward
from tests.gpu.device import DEVICE

DIMS = {"hidden": 256, "heads": 4, "kv_heads": 2, "head_dim": 64, "ffn": 512, "vocab": 96}
ONE = Product("head", (("Q4_K", 64),), 512)


def names(mix: str, dims: Dims, rows: int) -> set[str]:
    return {shape_name(rows, one.make(DEVICE), one.gated) for one in products(MIXES[mix], dims)}


def test_all_that_a_step_looks_up_is_tuned(monkeypatch) -> None:
    """Of two layers, one of each kind: names are what the kernel's own look-up makes of them."""
    spec = replace(flagship(2), **DIMS)
    forward = GpuForward(random_shard(spec, DEVICE), kv_cache(spec, 2, 70, DEVICE)[0], Alone(), 70)
    asked, look_up = set(), gemm.tiling_for

    def noted(rows, weights, gated, device) -> Tiling:
        asked.add(shape_name(rows, weights, gated))
        return look_up(rows, weights, gated, device)

    monkeypatch.setattr(gemm, "tiling_for", noted)
    forward.logits(decode_batch(2, 70, spec.vocab, DEVICE))
    assert asked == names("Q4_K_M", Dims(**DIMS, units=2), 2)
    assert len(asked) == 7  # two kinds of q k v and of down, output, gate and up, head


def test_all_rows_that_steps_have_are_tuned() -> None:
    weights = ONE.make(DEVICE)
    tuned = {shape_name(rows, weights, False) for rows in ROWS}
    steps = (*BUCKETS, *range(1, EngineConfig().max_step_tokens + 1))
    assert {shape_name(rows, weights, False) for rows in steps} == tuned


def test_candidates_are_few() -> None:
    for mix in MIXES.values():
        for one in products(mix, Dims()):
            assert sum(len(candidates(one, rows)) for rows in ROWS) <= 40
            assert len({t for rows in ROWS if rows > 64 for t in candidates(one, rows)}) <= 5


@pytest.fixture
def timer(monkeypatch) -> dict[Tiling, float]:
    """Times that calls take, told and not measured: 10 ms unless said otherwise."""
    taken: dict[Tiling, float] = {}
    monkeypatch.setattr(tuner, "captured", lambda calls: calls[0])
    monkeypatch.setattr(tuner, "median_ms", lambda run, repeats: taken.get(run.args[2], 10.0))
    monkeypatch.setattr(tuner, "COLD", 1)
    return taken


A, B, C, D = (Tiling(64, 16, stages=stages) for stages in (2, 4, 5, 6))


def found(rows=(16,), **settings) -> tuner.Found:
    settings = {"seconds": 60.0, "device": DEVICE, "tries": lambda product, rows: [A, B, C, D], **settings}
    return list(tune([ONE], rows, 5, **settings))[-1]


def test_the_quickest_that_gives_the_same_bits(timer, monkeypatch, capsys) -> None:
    """A is quicker than all and wrong in one bit of one number; B does not start; D is slower than C."""
    timer |= {A: 1.0, B: 2.0, C: 3.0, D: 4.0}
    run = Product.run

    def spoiled(self, x, weights, tiling=None) -> torch.Tensor:
        if tiling == B:
            raise RuntimeError("out of resource: shared memory")
        out = run(self, x, weights, tiling)
        if tiling == A:
            out.view(torch.int32)[0, 3, 5] ^= 1
        return out

    monkeypatch.setattr(Product, "run", spoiled)
    made = found()
    name = shape_name(16, ONE.make(DEVICE), False)
    assert made.tilings == {name: C}
    assert made.refused == [f"{name}: {A}"]
    told = capsys.readouterr().err
    assert "other bits" in told and "out of resource" in told


def test_the_default_stays_where_nothing_is_quicker(timer) -> None:
    timer |= {A: 10.0, B: 11.0, C: 10.5, D: 12.0}
    (tiling,) = found().tilings.values()
    assert tiling not in (A, B, C, D)


def test_what_is_known_or_out_of_time_is_left(timer) -> None:
    name = shape_name(16, ONE.make(DEVICE), False)
    assert found(known=[name]).tilings == {}
    late = found(rows=(16, 32), seconds=-1.0)
    assert (late.tilings, late.left) == ({}, 2)
