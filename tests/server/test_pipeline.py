"""The way from a completion to pieces of text, over an engine with a script."""

import asyncio
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import InvalidArgument, QueueFull
from runtime.server.pipeline import Completion, Pipeline
from runtime.types import FinishReason, SamplingParams
from tests.server.scripted import BOS, EOS, PieceTokenizer, ScriptedEngine, info_for
from tests.server.test_stops import cut, naive


def make(reply=(), pieces=(), context_length=4096, **engine):
    tokenizer = PieceTokenizer(pieces)
    client = ScriptedEngine(reply=reply, **engine)
    return Pipeline(tokenizer, None, client, info_for(tokenizer, context_length)), client


async def collect(pipeline, **completion):
    return [piece async for piece in pipeline.run(Completion("r1", **completion))]


def run(pipeline, **completion):
    """Text, tokens, logprobs and final of a whole reply."""
    completion = {"text": "hi", **completion}
    pieces = asyncio.run(collect(pipeline, **completion))
    assert [piece.final for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    return (
        "".join(piece.text for piece in pieces),
        [token for piece in pieces for token in piece.token_ids],
        [entry for piece in pieces for entry in piece.logprobs],
        pieces[-1].final,
    )


def test_a_reply_that_reaches_max_tokens():
    pipeline, client = make(b"hello world", cached=2)
    text, tokens, logprobs, final = run(pipeline, params=SamplingParams(max_tokens=5, seed=7))
    assert (text, bytes(tokens), logprobs) == ("hello", b"hello", [])
    assert final.finish_reason is FinishReason.LENGTH
    assert (final.prompt_tokens, final.cached_tokens, final.completion_tokens) == (3, 2, 5)
    assert (final.seed, final.numerics) == (7, "test-numerics")
    assert client.requests[0].prompt == (BOS, *b"hi")


def test_open_parameters_are_filled_in():
    pipeline, client = make(b"x", context_length=100)
    finals = [run(pipeline)[3] for _ in range(2)]
    assert finals[0].seed != finals[1].seed
    request = client.requests[0]
    assert request.params.max_tokens == 100 - 3
    assert request.params.seed == finals[0].seed
    assert request.stop_ids == (EOS,)


def test_stop_ids_join_both_kinds_and_ignore_eos_leaves_out_one():
    pipeline, client = make(b"x")
    run(pipeline, params=SamplingParams(stop_token_ids=(5, EOS)))
    run(pipeline, params=SamplingParams(stop_token_ids=(5,), ignore_eos=True))
    assert [request.stop_ids for request in client.requests] == [(5, EOS), (5,)]


def test_a_stop_token_adds_no_text_but_is_a_token():
    pipeline, _ = make(b"ab!cd")
    text, tokens, _, final = run(pipeline, params=SamplingParams(stop_token_ids=(ord("!"),)))
    assert (text, bytes(tokens)) == ("ab", b"ab!")
    assert (final.finish_reason, final.stop_token, final.matched_stop) == (FinishReason.STOP, ord("!"), None)
    assert final.completion_tokens == 3


def test_a_stop_string_across_tokens_is_cut_off_and_the_engine_told():
    pipeline, client = make(b"one two three", overrun=3)
    text, tokens, _, final = run(pipeline, params=SamplingParams(stop=(" tw", "zzz")))
    assert (text, bytes(tokens)) == ("one", b"one tw")
    assert client.stopped == {"r1": 6}
    assert (final.finish_reason, final.matched_stop, final.stop_token) == (FinishReason.STOP, " tw", None)
    assert final.completion_tokens == 6
    assert client.sent == 9, "the engine ran ahead, which nobody may see"


def test_a_match_stands_where_the_engine_ended_the_request_first():
    pipeline, _ = make(b"abc", overrun=10)
    text, tokens, _, final = run(pipeline, params=SamplingParams(stop=("b",)))
    assert (text, bytes(tokens)) == ("a", b"ab")
    assert (final.finish_reason, final.completion_tokens) == (FinishReason.STOP, 2)


def test_text_that_might_become_a_stop_string_comes_at_the_end():
    pipeline, _ = make(b"abEN")
    pieces = asyncio.run(collect(pipeline, text="hi", params=SamplingParams(stop=("END",))))
    assert [piece.text for piece in pieces] == ["a", "b", "", "", "EN"]
    assert [piece.token_ids for piece in pieces] == [(97,), (98,), (69,), (78,), ()]


def test_min_tokens_disarms_stop_strings():
    pipeline, _ = make(b"a.b.c.d")
    text, _, _, final = run(pipeline, params=SamplingParams(stop=(".",), min_tokens=3))
    assert (text, final.completion_tokens) == ("a.b", 4)


def test_half_a_character_at_the_end_is_shown_and_may_match():
    pipeline, _ = make("é".encode()[:1])
    assert run(pipeline)[0] == "�"
    text, _, _, final = run(pipeline, params=SamplingParams(stop=("�",)))
    assert (text, final.finish_reason, final.completion_tokens) == ("", FinishReason.STOP, 1)


def test_logprobs_come_with_their_tokens():
    pipeline, _ = make(b"ab")
    _, tokens, logprobs, _ = run(pipeline, params=SamplingParams(logprobs=2))
    assert [entry.logprob for entry in logprobs] == [-0.5 - token for token in tokens]
    assert [[top.token for top in entry.top] for entry in logprobs] == [[97, 98], [98, 99]]


@settings(deadline=None)
@given(
    st.text("ab\u00e9\u4e2d", max_size=24),
    st.lists(st.text("ab\u00e9\u4e2d", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 1000), max_size=10),
    st.integers(0, 3),
)
def test_stop_strings_do_not_depend_on_how_text_is_cut_into_tokens(text, stops, places, overrun):
    """Cuts fall inside characters too. Tokens are those up to the one that completes the match."""
    data = text.encode()
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    pieces = [data[a:b] for a, b in itertools.pairwise(edges)]
    pipeline, client = make(range(258, 258 + len(pieces)), pieces, overrun=overrun)
    got, tokens, _, final = run(pipeline, params=SamplingParams(stop=tuple(stops)))
    expected, found = naive(text, stops)
    assert (got, final.matched_stop) == (expected, found)
    if found is None:
        assert final.finish_reason is FinishReason.LENGTH
        assert len(tokens) == final.completion_tokens == len(pieces)
    else:
        needed = (expected + found).encode()
        keep = next(n for n in range(1, len(pieces) + 1) if len(b"".join(pieces[:n])) >= len(needed))
        assert len(tokens) == final.completion_tokens == client.stopped["r1"] == keep


@pytest.mark.parametrize(
    ("field", "completion"),
    [
        ("prompt", {"text": None}),
        ("prompt", {"text": "a", "token_ids": [1]}),
        ("prompt", {"text": None, "token_ids": []}),
        ("prompt", {"text": "x" * 4096}),
        ("prompt", {"text": "bad \udcff byte"}),
        ("token_ids", {"text": None, "token_ids": [1, 258]}),
        ("token_ids", {"text": None, "token_ids": [-1]}),
        ("prompt", {"text": None, "token_ids": [258] * 4097}),
        ("messages", {"text": None, "messages": [{"role": "user", "content": "x"}]}),
        ("max_tokens", {"params": SamplingParams(max_tokens=0)}),
        ("temperature", {"params": SamplingParams(temperature=float("nan"))}),
        ("stop[1]", {"params": SamplingParams(stop=("a", "\ud800"))}),
    ],
)
def test_bad_input_names_its_field(field, completion):
    pipeline, client = make(b"x")
    with pytest.raises(InvalidArgument) as caught:
        run(pipeline, **completion)
    assert caught.value.field == field
    assert client.requests == []


def test_an_empty_text_is_one_token_where_there_is_a_bos():
    pipeline, client = make(b"x")
    run(pipeline, text="")
    assert client.requests[0].prompt == (BOS,)


def test_refusals_pass_through():
    pipeline, _ = make(refuse=QueueFull(2.0))
    with pytest.raises(QueueFull):
        run(pipeline)


@pytest.mark.parametrize("way", ["close", "cancel"])
def test_leaving_early_aborts_the_request(way):
    async def leave():
        pipeline, client = make(b"abcdef" * 50, pace=0.001)
        pieces = pipeline.run(Completion("r1", text="hi"))
        await anext(pieces)
        if way == "close":
            await pieces.aclose()
        else:
            task = asyncio.ensure_future(anext(pieces))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
        return client

    client = asyncio.run(leave())
    assert client.aborted == ["r1"] and client.running == 0


@pytest.mark.parametrize("reason", [FinishReason.ERROR, FinishReason.CANCELLED, FinishReason.DEADLINE])
def test_what_was_held_back_stays_back_when_the_reply_is_cut_off(reason):
    """Whoever goes on with its tokens is sent the rest of the text, and would have it twice."""
    pipeline, _ = make(b"abEN", ending=reason)
    text, _, _, final = run(pipeline, params=SamplingParams(stop=("END",)))
    assert (text, final.finish_reason, final.matched_stop) == ("ab", reason, None)
    assert final.detail == ("rank 1 is gone" if reason is FinishReason.ERROR else "")


def test_cut_is_a_partition():
    assert cut("abcd", [1, 3]) == ["a", "bc", "d"]


@pytest.mark.parametrize("scores", [False, True])
def test_a_text_that_cannot_fit_is_refused_before_it_is_encoded(scores):
    pipeline, client = make(b"x")
    pipeline.tokenizer.encode = None
    completion = Completion("r1", text="x" * 20_000)
    prepare = pipeline.prepare_score if scores else pipeline.prepare
    with pytest.raises(InvalidArgument) as caught:
        asyncio.run(prepare(completion))
    assert str(caught.value) == "prompt: holds at least 10000 tokens; the context is of 4096"
    assert client.requests == []


def test_min_tokens_that_no_token_can_meet_is_refused():
    """A rank would have no token left to choose from, which ends its replica."""
    pipeline, client = make(b"x")
    all_but_eos = tuple(token for token in range(258) if token != EOS)
    for params in (
        SamplingParams(min_tokens=1, stop_token_ids=all_but_eos),
        SamplingParams(min_tokens=1, stop_token_ids=(*all_but_eos, EOS), ignore_eos=True),
    ):
        with pytest.raises(InvalidArgument) as caught:
            run(pipeline, params=params)
        assert caught.value.field == "min_tokens"
    assert client.requests == []
    for params in (
        SamplingParams(stop_token_ids=all_but_eos),  # any token ends the reply, and may
        SamplingParams(min_tokens=1, stop_token_ids=all_but_eos, ignore_eos=True),
        SamplingParams(min_tokens=1, stop_token_ids=(5, *all_but_eos[1:], 5)),
    ):
        run(pipeline, params=params)
    assert len(client.requests) == 3
