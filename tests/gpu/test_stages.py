"""Stages on a GPU give the bits of one rank, whatever is in flight, and hold what is theirs."""

from __future__ import annotations

import asyncio
from contextlib import closing
from pathlib import Path

import pytest
import torch

from runtime.config import EngineConfig, ModelConfig, ParallelConfig
from runtime.model.communicator import Alone
from runtime.model.gpu.shard import build_gpu_shard
from runtime.model.stages import stage_layers
from runtime.types import Request, SamplingParams
from tests.gpu.device import DEVICE
from tests.gpu.folder import write_folder
from tests.gpu.play import BLOCK, Reply, guessed_replies, opened, replies, runner, shard_of
from tests.gpu.staging import Stages
from tests.replies import ask_all

SHAPE = {"hidden": 64, "layers": 3, "heads": 2, "kv_heads": 2, "head_dim": 64, "ffn": 96, "vocab": 260}
BLOCK_BYTES = 2 * 2 * 2 * BLOCK * 2 * 64  # keys and values of two layers, fp16, 2 heads of 64
LENGTH = 4
PROMPTS = ((5, 9, 33, 7, 1, 80, 7, 6, 5), (2, 60, 11))
PARAMS = SamplingParams(
    temperature=0.8, seed=3, repetition_penalty=1.3, presence_penalty=0.2, logprobs=1, max_tokens=LENGTH
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("model"), **SHAPE)


@pytest.fixture(scope="module")
def plain(model) -> list[Reply]:
    """By one rank."""
    return replies(runner(opened(model), 32, 2), PROMPTS, LENGTH, params=PARAMS)


def test_three_stages(model, plain) -> None:
    """A prompt in chunks, and as many plans in flight as there are stages."""
    with closing(Stages(opened(model), ((0, 1), (1, 2), (2, 3)), 1, positions=32, sequences=2)) as made:
        assert replies(made, PROMPTS, LENGTH, chunk=5, ahead=2, params=PARAMS) == plain


def test_two_stages_of_two_ranks_that_guess(model, plain) -> None:
    """Of unlike size. Several tokens of a step reach the first stage, those alone that stood."""
    with closing(Stages(opened(model), ((0, 2), (2, 3)), 2, positions=32, sequences=2)) as made:
        assert guessed_replies(made, PROMPTS, plain, PARAMS) == plain
        kept = [one.cache_bytes for one in made.runners]
    assert kept[0] == kept[1] == 2 * kept[2] == 2 * kept[3], "KV of its own layers"


def test_an_engine_of_stages(model, plain, monkeypatch) -> None:
    """By way of the loaders and the scheduler, as `serve` goes: KV of the longest stage, a plan a stage."""
    pytest.importorskip("psutil", reason="the settings of an engine need it")
    from runtime import capacity, local

    held = []

    def build(spec, units, run, loaded, *, device, **more):
        held.append(more["layers"])
        return build_gpu_shard(spec, units, run, loaded, device=DEVICE, **more)

    steps = capacity.step_room(opened(model), ParallelConfig(pp=2), 32)
    free = capacity.GPU_SPARE + 2 * (steps + 5 * BLOCK_BYTES)  # two ranks on one device
    monkeypatch.setattr("runtime.model.gpu.shard.build_gpu_shard", build)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 80 << 30))
    monkeypatch.setattr(local, "resolve_device", lambda wanted: "cuda")
    made = local.LocalEngine(
        ModelConfig(str(model), quantize="int4", max_model_len=32),
        EngineConfig(block_size=BLOCK, max_num_seqs=3),
        ParallelConfig(threads=1, pp=2),
    )
    with closing(made):
        asked = [Request(str(i), prompt, PARAMS) for i, prompt in enumerate(PROMPTS)]
        found = asyncio.run(ask_all(made.client, asked))
    assert [tuple(zip(r.tokens, r.logprobs, r.tops, strict=True)) for r in found] == plain
    assert held == list(stage_layers(opened(model), 2)) and max(b - a for a, b in held) == 2
    assert (made.config.total_blocks, made.config.microbatches) == (5, 2)


@pytest.mark.parametrize("tied", [False, True])
def test_a_stage_holds_its_layers_and_its_end(tiny, tied) -> None:
    run = opened(tiny(types="Q4_0", layers=3, hidden=128, head_dim=64, heads=2, kv_heads=2, tied=tied))
    whole = shard_of(run, Alone())
    parts = [shard_of(run, Alone(), layers) for layers in ((0, 1), (1, 2), (2, 3))]
    assert [part.embedding is not None for part in parts] == [True, False, False]
    assert [part.output_norm is not None for part in parts] == [False, False, True]
    assert [part.head is not None for part in parts] == [False, False, True]
    assert [len(part.layers) for part in parts] == [1, 1, 1]
    assert sum(part.nbytes for part in parts) == whole.nbytes
