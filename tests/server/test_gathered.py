"""What the client makes of a reply's messages, however often its stream breaks."""

import asyncio
import itertools
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tramontane
from runtime.errors import QueueFull, Unavailable
from runtime.server import convert
from runtime.server.pipeline import Pipeline
from runtime.types import Finished, FinishReason, TokenOutput
from tests.server.harness import ask
from tests.server.scripted import PieceTokenizer, ScriptedEngine, info_for
from tramontane.gathered import Gathered
from tramontane.v1 import generate_pb2

NUMBERS = itertools.count()  # no two requests of an engine have one name


def answered(pipeline, request):
    """All messages of the server's answer."""

    async def collect():
        name = f"r{next(NUMBERS)}"
        pieces = pipeline.run(convert.completion(request, name, None))
        return [convert.response(piece, name, "m") async for piece in pieces]

    return asyncio.run(collect())


def told(reply):
    """What a user has of a reply, but for what says how it came."""
    return [(each.text, each.token_ids, each.logprobs, each.finish_reason) for each in reply.choices]


@settings(deadline=None, max_examples=60)
@given(
    st.text("abcé", min_size=1, max_size=8),
    st.lists(st.text("abcé", min_size=1, max_size=4), max_size=2),
    st.integers(1, 3),
    st.integers(1, 10),
    st.lists(st.integers(0, 1000), max_size=4),
)
def test_a_stream_that_breaks_between_any_two_messages(text, stops, n, max_tokens, places):
    """Also after the last message of some choices, or of all."""
    tokenizer = PieceTokenizer()
    pipeline = Pipeline(tokenizer, None, ScriptedEngine(text.encode()), info_for(tokenizer))
    request = ask(stop=stops, max_tokens=max_tokens, seed=3, logprobs=1)
    request.n = n
    whole, broken = Gathered(request), Gathered(request)
    for message in answered(pipeline, request):
        whole.add(message)
    shown = [""] * n
    for place in [*places, None]:
        messages = answered(pipeline, broken.request())
        for message in messages if place is None else messages[: place % (len(messages) + 1)]:
            chunk = broken.add(message)
            if chunk is not None:
                shown[chunk.choice] += chunk.text
    want = whole.reply(0)
    assert told(broken.reply(0)) == told(want)
    assert shown == [choice.text for choice in want.choices]


class HalfDone(ScriptedEngine):
    """Choice 0 ends; choice 1, if it was asked for, goes on to its end only after `breaks` failures."""

    def __init__(self, breaks, later=None):
        super().__init__()
        self.breaks = breaks
        self.later = later or Unavailable("the engine is gone")  # failures after the first

    async def generate(self, request):
        self.requests.append(request)
        name = request.request_id
        for branch in request.branches:
            for index in range(len(branch.reply), 3 if branch.choice == 0 else 1):
                yield TokenOutput(name, index, b"abc"[index], choice=branch.choice)
            if branch.choice == 0:
                yield Finished(name, FinishReason.LENGTH, 3, 0, 3, choice=0, last=False)
        if len(self.requests) <= self.breaks:
            raise Unavailable("the engine is gone") if len(self.requests) == 1 else self.later
        for index in range(1, 3):
            yield TokenOutput(name, index, b"abc"[index], choice=1)
        yield Finished(name, FinishReason.LENGTH, 3, 0, 3, choice=1, last=True)


def test_text_that_was_held_back_comes_once(talk):
    engine = HalfDone(breaks=2)

    def conversation(client):
        with client.stream_generate("hi", n=2, max_tokens=3, stop=["cz"], seed=1) as stream:
            chunks = list(stream)
            return chunks, stream.reply

    chunks, reply = talk(engine, conversation, resumes=2)
    for choice in range(2):
        assert "".join(chunk.text for chunk in chunks if chunk.choice == choice) == "abc"
    assert [(choice.text, choice.token_ids) for choice in reply.choices] == [("abc", (97, 98, 99))] * 2
    assert reply.resumed == 1, "the second break came before anything new"


def test_a_reply_that_is_whole_needs_no_status(talk):
    engine = HalfDone(breaks=10)
    options = {"max_tokens": 3, "stop": ["cz"]}
    reply = talk(engine, lambda client: client.generate("hi", **options), resumes=2)
    assert (reply.text, reply.resumed, len(engine.requests)) == ("abc", 0, 1)


def test_what_has_come_before_is_no_progress(talk):
    """A client would never give up a server that can say no more than how choice 0 ended."""
    engine = HalfDone(breaks=20)

    def conversation(client):
        with pytest.raises(tramontane.Unavailable, match="the engine is gone"):
            client.generate("hi", n=2, max_tokens=3, stop=["cz"], seed=1)
        return True

    assert talk(engine, conversation, resumes=2)
    assert len(engine.requests) == 3


def test_a_full_queue_after_a_last_message_that_came_again_is_waited_for(talk):
    engine = HalfDone(breaks=2, later=QueueFull(0.05))
    reply = talk(engine, lambda client: client.generate("hi", n=2, max_tokens=3, stop=["cz"]), resumes=3)
    assert ([choice.text for choice in reply.choices], reply.resumed) == (["abc", "abc"], 1)


def test_a_number_of_choices_that_no_server_takes_costs_nothing(talk):
    tracemalloc.start()
    try:
        gathered = Gathered(generate_pb2.GenerateRequest(n=200_000))
        assert (gathered.resume(), gathered.reply(0), gathered.whole) == (None, None, False)
        # A list of so many is 1.6 MB; other threads may allocate a little meanwhile.
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()

    def conversation(client):
        with pytest.raises(tramontane.InvalidRequest) as caught:
            client.generate("hi", n=1_000_000)
        return caught.value.message

    assert talk(ScriptedEngine(b"a"), conversation).startswith("n: ")


def test_what_settles_a_reply_is_asked_for_again():
    """Its length too, where the request leaves that to the server; an older one does not say it."""
    begin = generate_pb2.Begin(seed=3, numerics="x", prompt_digest=b"d", max_tokens=9)
    for most in (9, 0):
        begin.max_tokens = most
        gathered = Gathered(ask())
        gathered.add(generate_pb2.GenerateResponse(token_ids=[1], begin=begin))
        assert gathered.resume() == tramontane.Resume(((1,),), "x", 3, b"d", most)
        asked = gathered.request()
        assert asked.resume.max_tokens == most and not asked.sampling.HasField("max_tokens")


def test_a_choice_that_was_not_asked_for_is_refused():
    gathered = Gathered(generate_pb2.GenerateRequest(n=2))
    with pytest.raises(tramontane.Error, match="choice 2 of a reply with 2"):
        gathered.add(generate_pb2.GenerateResponse(choice=2, token_ids=[1]))


def test_tokens_that_the_user_had_stay_with_their_choice():
    request = generate_pb2.GenerateRequest(n=3)
    for ids in ([1, 2], [3]):
        request.resume.choices.add().ids.extend(ids)
    gathered = Gathered(request)
    gathered.add(generate_pb2.GenerateResponse(choice=2, token_ids=[5], begin={"seed": 3, "numerics": "x"}))
    gathered.add(generate_pb2.GenerateResponse(choice=0, token_ids=[4]))
    assert gathered.resume().token_ids == ((1, 2, 4), (3,), (5,))
