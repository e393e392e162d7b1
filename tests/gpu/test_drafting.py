"""A draft model on a GPU: guesses come from it, and nothing that is sent depends on them."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from runtime.config import EngineConfig, ModelConfig, ParallelConfig
from runtime.model.gpu.sampler import DeviceSampler
from runtime.model.gpu.shard import build_gpu_shard
from runtime.types import Request, SamplingParams, SequenceStart
from tests.gpu.device import DEVICE
from tests.gpu.drafting import Played, play
from tests.gpu.folder import write_folder
from tests.gpu.play import BLOCK, by_ranks, opened, runner, simulate_graphs
from tests.replies import ask_all

SHAPE = {"hidden": 64, "layers": 1, "heads": 2, "kv_heads": 2, "head_dim": 64, "ffn": 64, "vocab": 260}
BLOCK_BYTES = 2 * BLOCK * 2 * 2 * 64 * 2  # both models' keys and values, 2 heads of 64, fp16
LENGTH = 7
ASKED = (
    (tuple(range(3, 16)), SamplingParams(temperature=0.0, logprobs=2)),
    ((5, 9, 33, 7, 1, 80, 7, 6, 5, 4, 250), SamplingParams(temperature=0.8, seed=3, logprobs=0)),
    ((2, 60, 11), SamplingParams(temperature=0.9, top_p=0.9, top_k=50, seed=5, logprobs=1)),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("model"), **SHAPE)


@pytest.fixture(scope="module")
def plain(model) -> Played:
    """Without a draft model."""
    return play(runner(opened(model), 64, 3), ASKED, LENGTH)


def test_a_model_that_drafts_for_itself_is_always_right(model, plain, monkeypatch) -> None:
    """Cold and after having fallen behind, in captured steps, while another sequence is a plan ahead: were a
    position of the draft model's KV stale, or its noise another, some guess would be wrong."""
    made = runner(opened(model), 64, 3, draft=opened(model))
    simulate_graphs(monkeypatch, made.steps)
    simulate_graphs(monkeypatch, made._drafter.steps)
    found = play(made, ASKED, LENGTH, guessing={0: (1, 2), 1: (2, 0, 1)}, ahead=1)
    assert found.replies == plain.replies
    assert found.right == found.tried == 6
    assert made.cache_bytes == 2 * made.steps.cache_bytes


def test_ranks_get_the_same_guesses(model, plain) -> None:
    """Without graphs; one sequence guesses, alone. Its first guess is spoiled, and the second goes on from
    that: what they left in the draft model's KV must not be taken for the tokens that follow instead."""

    def work(comm) -> Played:
        made = runner(opened(model), 64, 1, comm, draft=opened(model))
        choose, first = made._drafter._choose, [1]

        def spoiled(logits, asks, ahead):
            return choose(logits, asks, ahead) ^ (first.pop() if first else 0)

        made._drafter._choose = spoiled
        return play(made, ASKED[1:2], LENGTH, guessing={0: (2, 0, 2)})

    found = by_ranks(2, work)
    assert found[0].replies == plain.replies[1:2]
    assert [(one.tried, one.right) for one in found] == [(4, 2), (4, 2)]


def test_an_engine_whose_guesses_are_wrong(model, plain, tmp_path, monkeypatch) -> None:
    """By way of the loaders and the scheduler, as `serve` goes. KV is what is free once both models' weights
    have taken theirs, and both keep theirs by the same blocks."""
    pytest.importorskip("psutil", reason="the settings of an engine need it")
    draft = write_folder(tmp_path, **SHAPE, seed=2)
    happened = []

    def build(spec, units, run, loaded, *, device, **more):
        happened.append("load")
        return build_gpu_shard(spec, units, run, loaded, device=DEVICE, **more)

    def free(*device) -> tuple[int, int]:
        happened.append("measure")
        steps = capacity.step_room(opened(model), ParallelConfig(), 64)  # the draft model's are as large
        return capacity.GPU_SPARE + 2 * steps + 10 * BLOCK_BYTES, 80 << 30

    from runtime import capacity, local

    monkeypatch.setattr("runtime.model.gpu.shard.build_gpu_shard", build)
    monkeypatch.setattr(torch.cuda, "mem_get_info", free)
    monkeypatch.setattr(local, "resolve_device", lambda wanted: "cuda")
    made = local.LocalEngine(
        ModelConfig(str(model), quantize="int4", max_model_len=64, draft=str(draft)),
        EngineConfig(block_size=BLOCK, max_num_seqs=3, draft_cost=0.0),
        ParallelConfig(threads=1),
    )
    try:
        requests = [
            Request(str(i), tuple(prompt), replace(params, max_tokens=4))
            for i, (prompt, params) in enumerate(ASKED)
        ]
        found = asyncio.run(ask_all(made.client, requests))
        load = asyncio.run(made.client.load())
    finally:
        made.close()
    assert happened[:3] == ["load", "load", "measure"]  # then, on a GPU, before each capture
    assert made.config.total_blocks == 10
    replies = [tuple(zip(r.tokens, r.logprobs, r.tops, strict=True)) for r in found]
    assert replies == [reply[:4] for reply in plain.replies]
    assert load.accepted_tokens < load.drafted_tokens


def test_a_choice_that_is_not_remembered() -> None:
    """`choose` gives what `sample` is about to, and leaves no trace: counts, least length, newest token."""
    sampler = DeviceSampler(300, torch.device(DEVICE))
    params = (
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.9, seed=7, frequency_penalty=0.5, min_tokens=3, max_tokens=9),
    )
    for slot, one in enumerate(params):
        sampler.start(SequenceStart(slot, (4, 5, 6), 3, one, (8, 9)))
    logits = torch.randn(2, 300, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    logits[1, 8] = 100.0
    before = sampler.last.clone()
    for position in (3, 4, 5, 6):
        kept = logits.clone()
        first, again = (sampler.choose(logits, [0, 1], [position] * 2).tolist() for _ in range(2))
        assert torch.equal(logits, kept) and torch.equal(sampler.last, before)
        assert first == again == sampler.sample(logits, [0, 1], [position] * 2).tolist()
        assert (first[1] == 8) == (position == 6), "barred until the reply has its least length"
        before = sampler.last.clone()
