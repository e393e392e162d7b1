"""Several replies to one prompt: through the pipeline, the contract and the client."""

import asyncio

import grpc
import pytest

import tramontane
from runtime.errors import InvalidArgument
from runtime.server.backlog import Backlog
from runtime.server.pipeline import Completion, Pipeline, Resume
from runtime.server.reply import Begun, Piece
from runtime.types import Finished, FinishReason, SamplingParams
from tests.server.harness import ask, bad_field, refusal, serving
from tests.server.scripted import EOS, PieceTokenizer, ScriptedEngine, info_for

TEXT = b"abcdef"


def run(engine, **completion):
    """Pieces of each choice."""
    tokenizer = PieceTokenizer()
    pipeline = Pipeline(tokenizer, None, engine, info_for(tokenizer))

    async def collect():
        return [piece async for piece in pipeline.run(Completion("r", text="hi", **completion))]

    pieces = asyncio.run(collect())
    assert [piece.begun is not None for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    found = [[piece for piece in pieces if piece.choice == choice] for choice in range(completion["n"])]
    for choice in found:
        assert [piece.final is not None for piece in choice] == [False] * (len(choice) - 1) + [True]
    return found


def text(pieces):
    return "".join(piece.text for piece in pieces)


def test_every_choice_has_its_own_text_stop_and_count():
    engine = ScriptedEngine(TEXT, overrun=2)
    found = run(engine, n=3, params=SamplingParams(max_tokens=4, stop=("de",), seed=1))
    assert [text(choice) for choice in found] == ["abcd", "bc", "c"]
    assert [choice[-1].final.finish_reason.value for choice in found] == ["length", "stop", "stop"]
    assert [choice[-1].final.completion_tokens for choice in found] == [4, 4, 3]
    assert {choice[-1].final.prompt_tokens for choice in found} == {3}
    assert engine.stopped == {"r/1": 4, "r/2": 3}
    (request,) = engine.requests
    assert [branch.choice for branch in request.branches] == [0, 1, 2]


def test_choices_go_on_each_from_its_place():
    """One has ended, one has begun, one has got nothing."""
    engine = ScriptedEngine(TEXT)
    resume = Resume((b"abc", b"b"), "test-numerics", 1)
    found = run(engine, n=3, params=SamplingParams(max_tokens=3), resume=resume)
    assert [text(choice) for choice in found] == ["", "cd", "cde"]
    assert [choice[-1].final.completion_tokens for choice in found] == [3, 3, 3]
    assert [(b.choice, bytes(b.reply)) for b in engine.requests[0].branches] == [(1, b"b"), (2, b"")]


def test_an_engine_that_fails_with_one_word_ends_every_choice():
    class Terse(ScriptedEngine):
        async def generate(self, request):
            yield Finished(request.request_id, FinishReason.ERROR, 3, 0, 0, detail="gone")

    found = run(Terse(), n=3)
    assert [choice[-1].final.detail for choice in found] == ["gone"] * 3


@pytest.mark.parametrize("n", [0, -1, 65])
def test_how_many_is_checked(n):
    with pytest.raises(InvalidArgument, match=r"^n: must be from 1 to 64"):
        run(ScriptedEngine(TEXT), n=n)


def test_backlog_keeps_choices_apart():
    async def go():
        backlog = Backlog(limit=1000)
        begun = Begun(1, "x", b"", 9)
        for number in range(6):
            piece = Piece(f"{number}", (number,), choice=number % 2, begun=None if number else begun)
            backlog.put(piece)
        backlog.close()
        taken = [await backlog.take(), await backlog.take(), await backlog.take()]
        assert [(piece and piece.text) for piece in taken] == ["024", "135", None]
        assert [piece.begun for piece in taken[:2]] == [begun, None]
        assert [piece.choice for piece in taken[:2]] == [0, 1]

    asyncio.run(go())


def test_backlog_takes_turns():
    async def go():
        backlog = Backlog(limit=100_000)
        for choice in (0, 1):
            for _ in range(200):
                backlog.put(Piece("x" * 64, tuple(range(64)), choice=choice))
        return [(await backlog.take()).choice for _ in range(4)]

    assert asyncio.run(go()) == [0, 1, 0, 1]


def test_over_the_wire():
    async def go():
        async with serving(ScriptedEngine(TEXT)) as running:
            request = ask(max_tokens=3)
            request.n = 2
            texts, ends = ["", ""], [0, 0]
            async for message in running.stub.Generate(request):
                texts[message.choice] += message.text
                ends[message.choice] += message.HasField("finish")
            assert (texts, ends) == (["abc", "bcd"], [1, 1])
            request.n = 0
            assert bad_field(await refusal(running.stub.Generate(request))) == "n"

            running.engine.dies = 1
            request.n = 2
            assert (await refusal(running.stub.Generate(request))).code() is grpc.StatusCode.UNAVAILABLE

    asyncio.run(go())


def test_the_client_gathers_all(talk):
    reply = talk(ScriptedEngine(TEXT), lambda client: client.generate("hi", n=3, max_tokens=4, logprobs=0))
    assert [choice.text for choice in reply.choices] == ["abcd", "bcde", "cdef"]
    assert reply.text == "abcd" and reply.token_ids == reply.choices[0].token_ids
    assert [len(choice.logprobs) for choice in reply.choices] == [4, 4, 4]
    assert reply.usage == tramontane.Usage(prompt_tokens=3, cached_tokens=0, completion_tokens=12)

    reply = talk(ScriptedEngine([97, EOS, 98]), lambda client: client.generate("hi", n=2))
    assert [choice.stop_token_id for choice in reply.choices] == [EOS, EOS]


def test_the_client_goes_on_with_all(talk):
    def conversation(client):
        with client.stream_generate("hi", n=3, seed=4) as stream:
            texts = ["", "", ""]
            for chunk in stream:
                texts[chunk.choice] += chunk.text
            return texts, stream.reply

    texts, reply = talk(ScriptedEngine(TEXT, dies=2), conversation, resumes=2)
    assert texts == [choice.text for choice in reply.choices] == ["abcdef", "bcdefa", "cdefab"]
    assert reply.resumed == 2
