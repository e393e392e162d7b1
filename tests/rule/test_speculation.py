"""Guesses make replies come sooner and never other ones."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from runtime.config import EngineConfig, ModelConfig, ParallelConfig
from runtime.errors import InvalidArgument
from runtime.local import LocalEngine
from runtime.types import Request, SamplingParams
from tests.replies import ask_all, ask_in_turn
from tests.rule.engines import assert_same, check_idle, engine, plain_replies
from tests.rule.requests import named, requests

SHAPE = {"types": "F32", "heads": 6, "kv_heads": 3, "head_dim": 16, "hidden": 96, "ffn": 172}
CONTEXT = 128


def drafted(path, draft, *, tp: int = 1, **settings) -> LocalEngine:
    config = EngineConfig(block_size=8, draft_cost=0.0, **settings)
    return LocalEngine(ModelConfig(str(path), draft=str(draft)), config, ParallelConfig(tp=tp, threads=1))


@pytest.mark.parametrize("tp", [1, 2])
def test_a_model_that_drafts_for_itself_is_always_right(tiny, tp):
    """With every way to choose a token, alone and in company, cold and from a cache that both models share:
    were a position of the draft model's KV stale, or its noise another, some guess would be wrong."""
    path = tiny(context=CONTEXT, **SHAPE)
    asked = requests(384, CONTEXT, longest=12)
    want = plain_replies(path, asked)
    made = drafted(path, path, tp=tp, max_num_seqs=4, max_chunk=13)
    try:
        for turn in range(2):
            assert_same(asyncio.run(ask_all(made.client, named(asked, f".{turn}"), limit=120)), want)
        load = asyncio.run(made.client.load())
        check_idle(made)
    finally:
        made.close()
    assert load.accepted_tokens == load.drafted_tokens > 100
    assert load.prefix_hit_tokens > 0


def test_a_model_that_falls_behind_catches_up(tiny):
    """The draft model sees nothing of tokens that other guesses, or none, stood for."""
    path = tiny(context=CONTEXT, **SHAPE)
    other = tiny(context=CONTEXT, seed=5, **SHAPE)
    params = SamplingParams(temperature=0.0, max_tokens=60, logprobs=1)
    asked = [Request(f"r{i}", tuple(range(3 + i, 30)), params) for i in range(3)]
    want = plain_replies(path, asked)
    made = drafted(path, other, total_blocks=30)
    try:
        assert_same(asyncio.run(ask_all(made.client, asked, limit=120)), want)
        load = asyncio.run(made.client.load())
    finally:
        made.close()
    assert 0 < load.drafted_tokens < 120, "it is asked ever less often where it is wrong"


def test_a_text_that_repeats_itself_takes_fewer_steps(tiny):
    path = tiny(context=CONTEXT, **SHAPE)
    # A bias makes the one token the reply consists of.
    params = SamplingParams(temperature=0.0, max_tokens=60, logit_bias=((9, 1000.0),), logprobs=1)
    asked = [Request("r", (3, 4, 5), params)]
    steps, replies = [], []
    for most in (0, 8):
        with engine(path, draft_tokens=most) as made:
            replies.append(asyncio.run(ask_in_turn(made.client, asked)))
            steps.append(asyncio.run(made.client.load()).steps)
    assert_same(*replies)
    assert steps[1] < steps[0] / 3


def test_what_cannot_draft_is_refused(tiny):
    path = tiny(context=CONTEXT, **SHAPE)
    small = tiny(context=CONTEXT, **{**SHAPE, "vocab": 300})
    with pytest.raises(InvalidArgument, match=r"draft: .* vocabulary of 300 tokens .* one of 384"):
        drafted(path, small)
    fewer = tiny(context=CONTEXT, **{**SHAPE, "kv_heads": 2})
    with pytest.raises(InvalidArgument, match=r"draft: .* has 2 units, too few for --tp 3"):
        drafted(path, fewer, tp=3)
    staged = ParallelConfig(pp=2, threads=1)
    with pytest.raises(InvalidArgument, match=r"draft: .*--pp 2"):
        LocalEngine(ModelConfig(str(path), draft=str(path)), None, staged)
    for wrong in (-1, 64):
        with pytest.raises(InvalidArgument, match="draft_tokens"):
            LocalEngine(ModelConfig(str(path)), replace(EngineConfig(), draft_tokens=wrong))
