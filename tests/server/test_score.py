"""Texts that are scored: through the contract and the client, over an engine with a script."""

import asyncio
import math

import grpc
import pytest

import tramontane
from runtime.errors import QueueFull
from runtime.server import backlog
from runtime.server.lifecycle import Limits
from runtime.types import Finished, FinishReason, ScoreOutput, TokenLogprob, TokenScore
from tests.server.harness import bad_field, details, refusal, serving
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
        engine = ScriptedEngine(pace=1000.0)
        async with serving(engine) as running:
            call = running.stub.Score(score_pb2.ScoreRequest(text="a" * 4000))
            await call.read()
            await until(lambda: engine.running == 1)
            call.cancel()  # nothing else ever ends it
            await until(lambda: engine.running == 0 and running.server._service.open_streams == 0)
            assert len(engine.aborted) == 1

    asyncio.run(go())


class InChunks(ScriptedEngine):
    """Scores come a chunk at a time, and as fast as they are taken."""

    chunk = 1024

    async def _outputs(self, request):
        length = len(request.prompt)
        top = tuple(TokenLogprob(token, -1.0) for token in range(request.params.logprobs))
        for first in range(1, length, self.chunk):
            count = min(self.chunk, length - first)
            yield ScoreOutput(
                request.request_id, first, tuple(TokenScore(-float(first + n), top) for n in range(count))
            )
            self.sent += count
        yield Finished(request.request_id, FinishReason.LENGTH, length, 0, 0)


def test_however_many_alternatives_a_chunk_has_no_reader_is_too_slow():
    async def go():
        async with serving(InChunks(), limits=Limits(max_lag=10)) as running:
            request = score_pb2.ScoreRequest(top=100, token_ids=ids(*[5] * 1100))
            messages = [message async for message in running.stub.Score(request)]
            logprobs = [token.logprob for message in messages for token in message.tokens]
            assert logprobs == [-float(place) for place in range(1100)]
            assert all(len(token.top) == 100 for message in messages for token in message.tokens[1:])
            assert max(message.ByteSize() for message in messages) < 1 << 18
            assert messages[-1].HasField("finish")

    asyncio.run(go())


def test_scores_wait_for_their_reader():
    async def go():
        engine = InChunks()
        async with serving(engine, context_length=200_000) as running:
            call = running.stub.Score(score_pb2.ScoreRequest(top=50, token_ids=ids(*[5] * 100_000)))
            await call.read()
            await asyncio.sleep(0.2)
            # gRPC takes some megabytes ahead of a reader, of 70 that there are.
            assert engine.sent < 50_000 and engine.running == 1
            call.cancel()
            await until(lambda: engine.running == 0)

    asyncio.run(go())


def test_a_reader_that_stops_gives_its_share_back(monkeypatch):
    """What it keeps waiting counts against everyone's scores."""
    monkeypatch.setattr(backlog, "_STALLED", 0.2)

    async def go():
        engine = InChunks()
        limits = Limits(max_scores=30)
        async with serving(engine, context_length=200_000, limits=limits) as running:
            call = running.stub.Score(score_pb2.ScoreRequest(top=50, token_ids=ids(*[5] * 100_000)))
            await until(lambda: engine.requests and engine.running == 0)
            monkeypatch.setattr(
                backlog, "_STALLED", 60.0
            )  # a reader that reads may be on a machine that stalls
            short = running.stub.Score(score_pb2.ScoreRequest(token_ids=ids(5, 5)))
            assert [message async for message in short][-1].HasField("finish")
            assert details(await refusal(call))["ErrorInfo"].reason == "SLOW_READER"

    asyncio.run(go())


def test_scores_that_may_wait_are_bounded_together():
    async def go():
        async with serving(ScriptedEngine(pace=1000.0), limits=Limits(max_scores=30)) as running:
            long, short = (score_pb2.ScoreRequest(text="a" * length, top=4) for length in (30, 2))
            first = running.stub.Score(long)
            await first.read()  # alone, any fits
            error = await refusal(running.stub.Score(short))
            assert details(error)["ErrorInfo"].reason == "QUEUE_FULL" and "155" in error.details()
            first.cancel()
            await until(lambda: running.server._service.open_streams == 0)
            both = [running.stub.Score(short), running.stub.Score(short)]
            for call in both:
                await call.read()
            assert details(await refusal(running.stub.Score(short)))["ErrorInfo"].reason == "QUEUE_FULL"
            for call in both:
                call.cancel()

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
