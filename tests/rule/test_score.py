"""What a model thinks of given tokens is what it thought when it chose them, whatever happens around it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from runtime.types import Finished, FinishReason, Request, ScoreOutput, TokenScore
from tests.replies import ask_all
from tests.rule.engines import check_idle, engine, plain_replies
from tests.rule.requests import others, requests

CONTEXT, VOCAB = 128, 384
SHAPE = {"types": {"*": "Q4_1", "ffn_down": "Q8_0"}, "heads": 6, "kv_heads": 3, "head_dim": 32, "hidden": 192}


@pytest.fixture(scope="module")
def model(tiny) -> Path:
    return tiny(context=CONTEXT, ffn=352, **SHAPE)


@pytest.fixture(scope="module")
def case(model) -> list[tuple[Request, tuple[TokenScore, ...]]]:
    """Prompts that end in the reply to what stands before, and what was thought of that reply's tokens."""
    asked = [
        replace(request, params=replace(request.params, logprobs=2), stop_ids=())
        for request in requests(VOCAB, CONTEXT, longest=14)
    ]
    made = []
    for request, reply in zip(asked, plain_replies(model, asked), strict=True):
        text = replace(request, prompt=request.prompt + reply.tokens, scores=True)
        thought = zip(reply.logprobs, reply.tops, strict=True)
        made.append((text, tuple(TokenScore(logprob, top) for logprob, top in thought)))
    return made


async def scores_of(client, request: Request) -> list[TokenScore]:
    found: list[TokenScore] = []
    async for output in client.generate(request):
        if isinstance(output, Finished):
            assert (output.reason, output.prompt_tokens) == (FinishReason.LENGTH, len(request.prompt))
            return found
        assert isinstance(output, ScoreOutput) and output.first == len(found) + 1
        found += output.scores
    raise AssertionError("a stream ended without its last output")


def test_scores_are_the_reply_s_logprobs(model, case):
    """Rows of a prefill against rows of single steps, to the last bit; whole prompts, and one at a time."""

    async def serve(made):
        return [await scores_of(made.client, request) for request, _ in case]

    with engine(model, max_num_seqs=1) as made:
        found = asyncio.run(serve(made))
        check_idle(made)
    for scores, (request, thought) in zip(found, case, strict=True):
        assert len(scores) == len(request.prompt) - 1
        assert tuple(scores[-len(thought) :]) == thought


@pytest.mark.parametrize(
    "setting",
    [
        {"max_chunk": 1, "block_size": 16},
        {"tp": 2, "block_size": 8, "total_blocks": 36, "max_step_tokens": 50},
        {"tp": 3, "max_chunk": 13, "prefix_cache": False},
        {"pp": 2, "tp": 2, "max_chunk": 13},
    ],
    ids=str,
)
def test_whatever_happens_around_them(model, case, setting):
    async def serve(made):
        crowd = ask_all(made.client, others(VOCAB, CONTEXT, 6))
        texts = asyncio.gather(*(scores_of(made.client, request) for request, _ in case))
        return (await asyncio.gather(texts, crowd))[0]

    with engine(model) as alone:
        want = [asyncio.run(scores_of(alone.client, request)) for request, _ in case]
    with engine(model, **setting) as made:
        found = asyncio.run(serve(made))
        check_idle(made)
    assert found == want


def test_a_text_that_was_scored_is_a_prefix_that_was_computed(model, case):
    text, _ = case[4]
    assert len(text.prompt) > 64
    reply = replace(text, scores=False, params=replace(text.params, max_tokens=3), request_id="again")

    async def serve(made):
        await scores_of(made.client, text)
        await ask_all(made.client, [reply])
        return (await made.client.load()).prefix_hit_tokens

    with engine(model, block_size=16) as made:
        assert asyncio.run(serve(made)) >= 64
