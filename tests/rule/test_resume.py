"""A reply that goes on after any number of its tokens, anywhere, is the reply that never stopped."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from runtime.server.pipeline import Completion, Pipeline, Resume
from runtime.types import Branch, Request, SamplingParams
from tests.replies import Reply, ask_all
from tests.rule.engines import assert_same, check_idle, engine, plain_replies
from tests.rule.requests import requests
from tests.server.scripted import PieceTokenizer

CONTEXT, VOCAB = 128, 384
SHAPE = {"types": {"*": "Q4_1", "ffn_down": "Q8_0"}, "heads": 6, "kv_heads": 3, "head_dim": 32, "hidden": 192}


@pytest.fixture(scope="module")
def model(tiny) -> Path:
    return tiny(context=CONTEXT, ffn=352, **SHAPE)


def rest(reply: Reply, known: int) -> Reply:
    """What is left of a reply after its first tokens."""
    return replace(
        reply, tokens=reply.tokens[known:], logprobs=reply.logprobs[known:], tops=reply.tops[known:]
    )


@pytest.mark.parametrize(
    "setting",
    [
        {"block_size": 16, "max_num_seqs": 24},
        {"tp": 3, "max_chunk": 7, "prefix_cache": False},
        {"pp": 2, "block_size": 16, "max_num_seqs": 24},
        {"block_size": 8, "total_blocks": 20, "max_step_tokens": 40},
    ],
    ids=str,
)
def test_after_every_number_of_tokens(model, setting):
    """Penalties, seeds, filters, logprobs, min_tokens and stop tokens: all count from the reply's start."""
    asked = requests(VOCAB, CONTEXT, longest=12)
    want = plain_replies(model, asked)
    parts: list[tuple[Request, Reply]] = []
    for request, reply in zip(asked, want, strict=True):
        for known in range(len(reply.tokens)):
            name = f"{request.request_id}.{known}"
            branches = (Branch(0, reply.tokens[:known]),)
            parts.append((replace(request, request_id=name, branches=branches), rest(reply, known)))
    assert len(parts) > 100
    with engine(model, **setting) as made:
        got = asyncio.run(ask_all(made.client, [request for request, _ in parts]))
        check_idle(made)
    assert_same(got, [reply for _, reply in parts])


# Pieces that begin or end inside characters, and that make up stop strings across tokens.
CHARACTERS = "é".encode(), "中文".encode()
PIECES = [
    CHARACTERS[0][:1],
    CHARACTERS[0][1:],
    CHARACTERS[1][:4],
    CHARACTERS[1][4:],
    b"ab",
    b"ba",
    b"a",
    b"b",
]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.0, repetition_penalty=1.4, logprobs=2),
        SamplingParams(temperature=1.5, seed=5, frequency_penalty=0.6, presence_penalty=0.3, logprobs=1),
        SamplingParams(temperature=4.0, seed=6, stop=("aba", "é中"), logprobs=0, min_tokens=3),
        SamplingParams(temperature=4.0, seed=2**63, top_k=90, stop=("bb", "\ufffd\ufffd")),
    ],
)
def test_text_goes_on_where_it_stopped(model, params):
    """Through the gateway's pipeline, on a vocabulary of fragments of characters."""
    fill = [PIECES[i % len(PIECES)] for i in range(VOCAB - 258)]

    async def run(pipeline, name, resume=None):
        completion = Completion(name, text="ab", params=replace(params, max_tokens=24), resume=resume)
        return [piece async for piece in pipeline.run(completion)]

    async def go(made):
        info = await made.client.info()
        pipeline = Pipeline(PieceTokenizer(fill), None, made.client, info)
        whole = await run(pipeline, "whole")
        begun, final = whole[0].begun, whole[-1].final
        tokens = [token for piece in whole for token in piece.token_ids]
        for known in range(len(tokens) + 1):
            resume = Resume((tokens[:known],), begun.numerics, begun.seed, begun.prompt_digest)
            before = [piece for piece in whole if piece.final is None][:known]
            pieces = [*before, *await run(pipeline, f"from {known}", resume)]
            assert "".join(p.text for p in pieces) == "".join(p.text for p in whole)
            assert [t for p in pieces for t in p.token_ids] == tokens
            assert [e for p in pieces for e in p.logprobs] == [e for p in whole for e in p.logprobs]
            assert replace(pieces[-1].final, cached_tokens=0) == replace(final, cached_tokens=0)
        return final

    with engine(model, block_size=8) as made:
        final = asyncio.run(go(made))
        check_idle(made)
    assert final.completion_tokens > 3, "too short to be worth it"
