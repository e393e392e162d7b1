"""Each of several replies to a prompt is what it would be if it were asked for alone."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from runtime.types import Branch, Request
from tests.replies import Reply, ask_all, ask_choices
from tests.rule.engines import HANGS, assert_same, check_idle, engine, plain_replies
from tests.rule.requests import others, requests

CONTEXT, VOCAB, CHOICES = 128, 384, 3
SHAPE = {"types": {"*": "Q4_1", "ffn_down": "Q8_0"}, "heads": 6, "kv_heads": 3, "head_dim": 32, "hidden": 192}


@pytest.fixture(scope="module")
def model(tiny) -> Path:
    return tiny(context=CONTEXT, ffn=352, **SHAPE)


@pytest.fixture(scope="module")
def case(model) -> tuple[list[Request], list[Reply]]:
    """Requests, and the plain replies of each one's choices, asked one at a time."""
    asked = requests(VOCAB, CONTEXT, longest=16)
    alone = [
        replace(request, request_id=f"{request.request_id}.{choice}", branches=(Branch(choice),))
        for request in asked
        for choice in range(CHOICES)
    ]
    return asked, plain_replies(model, alone)


def several(request: Request) -> Request:
    return replace(request, branches=tuple(Branch(choice) for choice in range(CHOICES)))


@pytest.mark.parametrize(
    "setting",
    [
        {"block_size": 16, "max_num_seqs": 40},
        {"tp": 2, "block_size": 8, "total_blocks": 36, "max_chunk": 13},
        {"tp": 3, "prefix_cache": False},
        {"pp": 2, "block_size": 16, "max_num_seqs": 40},
    ],
    ids=str,
)
def test_together_as_alone(model, case, setting):
    asked, want = case

    async def serve(made):
        replies = asyncio.gather(*(ask_choices(made.client, several(request)) for request in asked))
        crowd = ask_all(made.client, others(VOCAB, CONTEXT, 6))
        return (await asyncio.gather(replies, crowd))[0]

    with engine(model, **setting) as made:
        found = asyncio.run(serve(made))
        check_idle(made)
    assert_same([reply for choices in found for reply, _ in choices], want)


def test_choice_0_is_the_reply_without_choices_and_the_others_differ(model, case):
    asked, want = case
    assert_same(plain_replies(model, asked), want[::CHOICES])
    sampled = [i for i, request in enumerate(asked) if request.params.temperature > 0.5]
    for i in sampled:
        assert len({reply.tokens for reply in want[i * CHOICES : (i + 1) * CHOICES]}) > 1


def test_the_prompt_is_computed_once(model):
    """Of 64 positions in blocks of 16, 48 are shared; the last block is each choice's own."""
    [request] = [r for r in requests(VOCAB, CONTEXT) if len(r.prompt) == 64][:1]
    request = replace(request, params=replace(request.params, max_tokens=1), stop_ids=())

    async def serve(made):
        ends = [end for _, end in await ask_choices(made.client, several(request))]
        return ends, await made.client.load()

    with engine(model, block_size=16) as made:
        ends, load = asyncio.run(serve(made))
        assert load.cached_blocks == 4
        again, _ = asyncio.run(serve(made))
        check_idle(made)
    assert [(end.prompt_tokens, end.cached_tokens) for end in ends] == [(64, 0)] * CHOICES
    assert [(end.prompt_tokens, end.cached_tokens) for end in again] == [(64, 48)] * CHOICES


def test_a_caller_who_leaves_frees_all_choices(model):
    [request] = [r for r in requests(VOCAB, CONTEXT) if len(r.prompt) == 64][:1]
    request = replace(several(request), stop_ids=(), params=replace(request.params, max_tokens=60))

    async def serve(made):
        stream = made.client.generate(request)
        await anext(stream)
        await stream.aclose()
        async with asyncio.timeout(HANGS):
            while (load := await made.client.load()).free_blocks < load.total_blocks:
                await asyncio.sleep(0.01)
        assert (load.running, load.waiting) == (0, 0)

    with engine(model, block_size=16) as made:
        asyncio.run(serve(made))
        check_idle(made)
