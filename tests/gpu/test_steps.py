"""Steps in captured shapes: what graphs share, and what happens when memory is short."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bench.gpu.step import flagship
from runtime import capacity
from runtime.config import EngineConfig, ModelConfig, ParallelConfig
from runtime.errors import NotEnough
from runtime.model.batch import Run
from runtime.model.communicator import Alone
from runtime.model.gpu import graphs
from runtime.model.gpu.batch import BUCKETS
from runtime.model.gpu.graphs import FLOOR, Graphs
from runtime.model.gpu.shard import DTYPE
from runtime.model.gpu.steps import MOST_WORKSPACE, Steps, workspace_room
from runtime.model.header import open_model
from tests.gpu.device import ON_GPU
from tests.gpu.folder import write_folder
from tests.gpu.play import Simulated

BLOCK = 16
VOCAB = 11


class _Forward:
    """Instead of a model: a row's logits are its token times 1, 2, .. VOCAB."""

    heads = 4

    def __init__(self, shard, cache, comm, max_positions, scales=None):
        self.shard, self.comm, self.workspace = shard, comm, None
        self.seen: list = []

    def logits(self, batch):
        self.seen.append(batch)
        rows = batch.tokens.index_select(0, batch.sampled).float()
        return rows[:, None] * torch.arange(1, VOCAB + 1)


@pytest.fixture
def steps(monkeypatch) -> Steps:
    """Of sequences of up to 4,096 positions."""
    monkeypatch.setattr("runtime.model.gpu.steps.GpuForward", _Forward)
    spec = replace(flagship(1), heads=4, kv_heads=1, head_dim=8, vocab=VOCAB)
    shard = SimpleNamespace(
        spec=spec, units=spec.units(32), run=(0, 1), layers=[], device=torch.device("cpu"), kv_dtype=DTYPE
    )
    made = Steps(shard, Alone(), total_blocks=1, block_size=BLOCK, max_positions=4096, graphs=True)
    made.recorder = Simulated(made)
    return made


def rows(*counts: int, start: int = 0) -> list[Run]:
    """A sequence a count, with so many rows, all wanted: tokens 2, 3, .. in each."""
    return [
        Run(list(range(2, 2 + count)), start, list(range(-(-(start + count) // BLOCK))), samples=count)
        for count in counts
    ]


def wanted(runs: list[Run]) -> torch.Tensor:
    tokens = torch.tensor([token for run in runs for token in run.tokens]).float()
    return tokens[:, None] * torch.arange(1, VOCAB + 1)


def test_all_shapes_write_one_buffer(steps) -> None:
    many = (rows(1), rows(1, 1, 1), rows(7, 2), rows(*[1] * 256), rows(1, start=4000), rows(1))
    places = set()
    for runs in many:
        found = steps.logits(runs)
        assert torch.equal(found, wanted(runs))
        places.add(found.data_ptr())
    assert len(places) == 1
    assert len(steps.recorder.recorded) == 5  # the first and the last are alike
    assert steps._logits.shape == (BUCKETS[-1], VOCAB)


def test_without_memory_steps_run_as_they_are(steps) -> None:
    steps.recorder.room_for = 1
    for runs in (rows(1), rows(3, 3), rows(1), rows(3, 3), rows(5, 3)):
        assert torch.equal(steps.logits(runs), wanted(runs))
    assert len(steps.recorder.recorded) == 1
    padded = [len(batch.tokens) for batch in steps.forward.seen]
    # Captured and replayed; eager, unpadded; replayed; and eager again, of the same shape though other rows.
    assert padded == [1, 1, 6, 1, 6, 8]
    asked = []
    steps.recorder.room = lambda: asked.append(1)
    steps.logits(rows(3, 3))
    assert not asked, "a shape that was refused once is not asked for again"


def test_attention_has_one_workspace(steps) -> None:
    """Large enough for every step whose attention is shared out, so none takes another."""
    room = steps.forward.workspace.numel()
    assert room == workspace_room(4, 8, 4096) == 256 * 4 * 8 * 10
    for runs in (rows(64, 64, 64, start=4032), rows(*[1] * 256, start=4095), rows(400)):
        steps.graphs = not steps.graphs
        steps.logits(runs)
    shared = [batch.split_rows for batch in steps.forward.seen]
    assert 0 not in shared and max(shared) == 64
    assert workspace_room(64, 128, 32_768) * 4 == 545_259_520  # a 70B: 0.51 GiB
    assert workspace_room(64, 128, 1 << 20) * 4 == MOST_WORKSPACE


def test_attention_without_room_is_streamed(steps) -> None:
    steps.forward.workspace = steps.forward.workspace[: 256 * 4 * 4 * 10]  # half
    steps.logits(rows(*[1] * 256, start=1000))
    steps.logits(rows(*[1] * 256, start=4095))
    assert [batch.split_rows for batch in steps.forward.seen[::2]] == [1, 0]


class _Cuda:
    """Notes what is asked of torch.cuda."""

    def __init__(self, monkeypatch) -> None:
        self.pools: list = []
        self.handles = 0
        self.free = FLOOR
        stream = SimpleNamespace(wait_stream=lambda other: None)
        for name, value in {
            "graph_pool_handle": self.handle,
            "Stream": lambda device: stream,
            "current_stream": lambda: stream,
            "stream": self.within,
            "CUDAGraph": object,
            "graph": self.within,
            "empty_cache": lambda: None,
            "mem_get_info": lambda device: (self.free, 80 << 30),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(graphs, "overlap_pays", lambda device: False)

    def handle(self) -> tuple[int, int]:
        self.handles += 1
        return (0, self.handles)

    @contextmanager
    def within(self, what, pool=None, capture_error_mode=None):
        if capture_error_mode is not None:
            self.pools.append(pool)
        yield


def test_a_models_graphs_share_a_pool(monkeypatch) -> None:
    """Of two models, one drafts while the other's results may still be wanted: each has its own."""
    cuda, done = _Cuda(monkeypatch), []
    model, draft = Graphs(torch.device("cpu")), Graphs(torch.device("cpu"))
    for recorder in (model, draft, model, draft):
        recorder.record(lambda: done.append(1))
    assert cuda.pools == [(0, 1), (0, 2), (0, 1), (0, 2)]
    assert len(done) == 8, "each is run once before it is captured"
    assert model.room()
    cuda.free = FLOOR - 1
    assert not model.room()


@pytest.mark.skipif(ON_GPU, reason="what is free is made up")
def test_room_for_steps_is_no_room_for_kv(tmp_path, monkeypatch) -> None:
    shape = {"hidden": 64, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 32, "ffn": 64, "vocab": 100}
    model = open_model(ModelConfig(str(write_folder(tmp_path, **shape))), "cuda")
    alone = 4 * (256 * 2 * 1 * 34 + 256 * 100)
    assert capacity.step_room(model, ParallelConfig(), 256) == alone
    assert capacity.step_room(model, ParallelConfig(pp=2), 256) == 4 * 256 * 2 * 34
    free = capacity.GPU_SPARE + alone + 3 * 16 * model.kv_bytes_per_position
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 80 << 30))
    settings = (EngineConfig(block_size=16), ParallelConfig(), 48)
    assert capacity.kv_blocks(model, *settings).total_blocks == 3
    free -= 1
    with pytest.raises(NotEnough, match="3 KV blocks of 16 tokens"):
        capacity.kv_blocks(model, *settings)
