"""Texts that are scored: through the contract and the client, over an engine with a script."""

import asyncio
import math

import grpc
import pytest

import tramontane
from runtime.errors import QueueFull
from tests.server.harness import bad_field, refusal, serving
from tests.server.scripted import BOS, ScriptedEngine
from tests.server.test_streams import until
from tramontane.v1 import generate_pb2, score_pb2


def test_over_the_wire():
    async def go():
        engine = ScriptedEngine()
        async with serving(engine) as running:
            request = score_pb2.ScoreRequest(text="hello", top=2, priority=3, cache_salt="me")
            messages = [message async for message in running.stub.Score(request)]
            tokens = [token for message in messages for token in message.tokens]
            assert [token.token_id for token in tokens] == [BOS, *b"hello"]
            assert not tokens[0].HasField("logprob") and not tokens[0].top
            assert [token.logprob for token in tokens[1:]] == [-0.5 - byte for byte in b"hello"]
            assert [top.token_id for top in tokens[1].top] == [104, 105]
            assert [message.HasField("finish") for message in messages] == [False] * (len(messages) - 1) + [
                True
            ]
            finish = messages[-1].finish
            assert (finish.usage.prompt_tokens, finish.usage.completion_tokens) == (6, 0)
            assert (finish.numerics, finish.model) == ("test-numerics", "scripted")
            (sent,) = engine.requests
            assert (sent.scores, sent.priority, sent.cache_salt, sent.params.logprobs) == (True, 3, "me", 2)

    asyncio.run(go())


def ids(*tokens):
    return generate_pb2.TokenIds(ids=tokens)


@pytest.mark.parametrize(
    ("field", "request_"),
    [
        ("prompt", score_pb2.ScoreRequest()),
        ("prompt", score_pb2.ScoreRequest(token_ids=ids(5))),
        ("prompt", score_pb2.ScoreRequest(token_ids=ids(*[5] * 4097))),
        ("token_ids", score_pb2.ScoreRequest(token_ids=ids(5, 258))),
        ("top", score_pb2.ScoreRequest(text="hi", top=-1)),
        ("top", score_pb2.ScoreRequest(text="hi", top=101)),
    ],
)
def test_bad_input_names_its_field(field, request_):
    async def go():
        async with serving(ScriptedEngine()) as running:
            assert bad_field(await refusal(running.stub.Score(request_))) == field
            assert running.engine.requests == []

    asyncio.run(go())


def test_what_else_can_go_wrong():
    async def go():
        request = score_pb2.ScoreRequest(text="hello")
        async with serving(ScriptedEngine(dies=1), ready=False) as running:
            error = await refusal(running.stub.Score(request))
            assert error.code() is grpc.StatusCode.UNAVAILABLE and "not ready" in error.details()
            await running.server.ready()
            error = await refusal(running.stub.Score(request))
            assert error.code() is grpc.StatusCode.UNAVAILABLE and "rank 1" in error.details()
            request.model = "other"
            assert (await refusal(running.stub.Score(request))).code() is grpc.StatusCode.NOT_FOUND

    asyncio.run(go())


def test_a_client_that_cancels_frees_its_request():
    async def go():
        engine = ScriptedEngine(pace=0.01)
        async with serving(engine) as running:
            call = running.stub.Score(score_pb2.ScoreRequest(text="a" * 4000))
            await call.read()
            await until(lambda: engine.running == 1)
            call.cancel()
            await until(lambda: engine.running == 0 and running.server._service.open_streams == 0)

    asyncio.run(go())


def test_the_client(talk):
    score = talk(ScriptedEngine(), lambda client: client.score("ab", top=1))
    assert score.tokens[0] == tramontane.ScoredToken(BOS, None, ())
    assert score.tokens[2] == tramontane.ScoredToken(98, -98.5, (tramontane.Candidate(98, -98.5),))
    assert (score.numerics, score.model) == ("test-numerics", "scripted")
    assert score.logprob == -97.5 - 98.5
    assert math.isclose(score.perplexity, math.exp(98))
    assert talk(ScriptedEngine(), lambda client: client.score([5, 6])).logprob == -6.5


def test_the_client_asks_again(talk):
    engine = ScriptedEngine(dies=2)
    assert len(talk(engine, lambda client: client.score("ab"), resumes=2).tokens) == 3
    assert len(engine.requests) == 3


def test_the_client_gives_up(talk):
    def conversation(client):
        with pytest.raises(tramontane.Unavailable):
            client.score("ab")
        with pytest.raises(tramontane.InvalidRequest, match="top"):
            client.score("ab", top=-1)
        with pytest.raises(tramontane.InvalidRequest, match="priority"):
            client.score("ab", priority="high")
        return True

    assert talk(ScriptedEngine(dies=9), conversation, resumes=1)

    def full(client):
        with pytest.raises(tramontane.Overloaded):
            client.score("ab")
        return True

    assert talk(ScriptedEngine(refuse=QueueFull(1.0)), full, resumes=1)
