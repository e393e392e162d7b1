"""tramontane.Client and AsyncClient against a real server."""

import asyncio

import pytest

import tramontane
from runtime.errors import InvalidArgument, QueueFull
from runtime.server.lifecycle import Limits
from runtime.types import FinishReason as EngineReason
from tests.server.harness import serving
from tests.server.scripted import BOS, EOS, ScriptedEngine
from tests.server.test_streams import until
from tramontane import AsyncClient, Client, FinishReason


def test_a_whole_reply(talk):
    engine = ScriptedEngine(b"hello--", cached=1)
    reply = talk(
        engine,
        lambda client: client.generate("hi", stop="--", seed=7, logprobs=1, logit_bias={3: 1.5}, priority=2),
    )
    assert (reply.text, bytes(reply.token_ids)) == ("hello", b"hello--")
    assert (reply.finish_reason, reply.stop_string, reply.stop_token_id) == (FinishReason.STOP, "--", None)
    assert reply.usage == tramontane.Usage(prompt_tokens=3, cached_tokens=1, completion_tokens=7)
    assert (reply.seed, reply.numerics, reply.model) == (7, "test-numerics", "scripted")
    assert reply.logprobs[0] == tramontane.TokenLogprobs(
        -0.5 - ord("h"), (tramontane.Candidate(ord("h"), -0.5 - ord("h")),)
    )
    (sent,) = engine.requests
    assert (sent.params.stop, sent.params.logit_bias, sent.priority) == (("--",), ((3, 1.5),), 2)


def test_options_left_out_or_none_keep_the_servers_defaults(talk):
    engine = ScriptedEngine(b"a")
    talk(engine, lambda client: client.generate([BOS, 5], temperature=None, max_tokens=2))
    (sent,) = engine.requests
    assert (sent.prompt, sent.params.temperature, sent.params.max_tokens) == ((BOS, 5), 1.0, 2)


def test_a_reply_that_streams(talk):
    def conversation(client):
        with client.stream_generate("hi", max_tokens=4) as stream:
            assert stream.reply is None
            return list(stream), stream.reply

    chunks, reply = talk(ScriptedEngine([97, 98, EOS]), conversation)
    assert "".join(chunk.text for chunk in chunks) == reply.text == "ab"
    assert tuple(token for chunk in chunks for token in chunk.token_ids) == reply.token_ids == (97, 98, EOS)
    assert (reply.finish_reason, reply.stop_token_id) == (FinishReason.STOP, EOS)


def test_tokens_models_and_load(talk):
    def conversation(client):
        assert client.tokenize("ab") == [BOS, 97, 98]
        assert client.tokenize("a</s>", add_special=False, parse_special=True) == [97, EOS]
        assert client.detokenize([BOS, 97]) == "a"
        assert client.detokenize([BOS, 97], skip_special=False) == "<s>a"
        assert client.models() == [client.model()] == [client.model("scripted")]
        assert (client.model().bos_token_id, client.model().eos_token_ids) == (BOS, (EOS,))
        assert client.load().free_blocks == 40
        return True

    assert talk(ScriptedEngine(), conversation)


def test_a_stream_that_is_left_frees_its_request(talk):
    engine = ScriptedEngine(b"a", hang=True)

    def conversation(client):
        with client.stream_generate("hi") as stream:
            next(stream)
        asyncio.run(until(lambda: engine.running == 0))
        with pytest.raises(tramontane.Cancelled):
            list(stream)
        return True

    assert talk(engine, conversation)
    assert len(engine.aborted) == 1


@pytest.mark.parametrize(
    ("kind", "words", "engine", "options"),
    [
        (tramontane.InvalidRequest, "sampling.top_p: ", ScriptedEngine(), {"top_p": 3.0}),
        (tramontane.ModelNotFound, "'other'", ScriptedEngine(), {"model": "other"}),
        (tramontane.DeadlineExceeded, "", ScriptedEngine(hang=True), {"timeout": 0.2}),
        (tramontane.Unavailable, "gone", ScriptedEngine(ending=EngineReason.ERROR), {}),
        # These never leave the client.
        (tramontane.InvalidRequest, "seed: ", ScriptedEngine(), {"seed": -1}),
        (tramontane.InvalidRequest, "temperature: ", ScriptedEngine(), {"temperature": "hot"}),
        (tramontane.InvalidRequest, "stop: ", ScriptedEngine(), {"stop": [3]}),
        (tramontane.InvalidRequest, "stop_token_ids: ", ScriptedEngine(), {"stop_token_ids": [-4]}),
        (tramontane.InvalidRequest, "logit_bias: ", ScriptedEngine(), {"logit_bias": {"a": 1}}),
        (TypeError, "'temprature'", ScriptedEngine(), {"temprature": 1}),
    ],
)
def test_failures_are_clear(talk, kind, words, engine, options):
    def conversation(client):
        with pytest.raises(kind) as caught:
            client.generate("hi", **options)
        return str(caught.value)

    message = talk(engine, conversation)
    assert words in message and "\n" not in message


def test_a_prompt_that_cannot_be_sent(talk):
    def conversation(client):
        for prompt in ([-1], [2**40], "\udcff"):
            with pytest.raises(tramontane.InvalidRequest):
                client.generate(prompt)
        for messages in (["hi"], [{"role": "user"}], [{"role": "user", "content": 3}]):
            with pytest.raises(tramontane.InvalidRequest, match=r"messages\[0\]"):
                client.chat(messages)
        return True

    assert talk(ScriptedEngine(), conversation)


def test_an_overloaded_server_says_when_to_try_again(talk):
    def conversation(client):
        with pytest.raises(tramontane.Overloaded) as caught:
            client.generate("hi")
        return caught.value.retry_after

    assert talk(ScriptedEngine(refuse=QueueFull(2.5)), conversation) == 2.5
    assert talk(ScriptedEngine(), conversation, limits=Limits(max_streams=0)) == 1.0


def test_what_a_failed_stream_gave_stands(talk):
    def conversation(client):
        with client.stream_generate("hi", seed=3) as stream:
            with pytest.raises(tramontane.Unavailable):
                list(stream)
            return stream.reply

    reply = talk(ScriptedEngine(b"abc", ending=EngineReason.ERROR), conversation)
    assert (reply.text, reply.finish_reason, reply.seed) == ("abc", FinishReason.ERROR, 3)


def test_nobody_there():
    with Client("127.0.0.1:1") as client, pytest.raises(tramontane.Unavailable):
        client.load(timeout=60)


def test_cancelling_a_task_cancels_its_request():
    async def go():
        engine = ScriptedEngine(b"a", hang=True)
        async with serving(engine) as running, AsyncClient(running.target) as client:
            task = asyncio.create_task(client.generate("hi"))
            await until(lambda: engine.running == 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(lambda: engine.running == 0)

    asyncio.run(go())


def test_an_invalid_argument_of_the_engine_names_its_field_too(talk):
    def conversation(client):
        with pytest.raises(tramontane.InvalidRequest, match=r"^prompt: too many"):
            client.generate("hi")
        return True

    assert talk(ScriptedEngine(refuse=InvalidArgument("prompt", "too many")), conversation)
