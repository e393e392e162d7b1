"""InferenceService over a real connection: what comes back, and what is refused and how."""

import asyncio
import base64
import math
import urllib.parse

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import QueueFull, Unavailable
from runtime.server import statuses
from runtime.server.lifecycle import Limits
from runtime.types import FinishReason
from tests.server.harness import ask, bad_field, details, refusal, serving
from tests.server.scripted import BOS, EOS, ScriptedEngine
from tramontane.v1 import generate_pb2, inference_service_pb2


def generated(engine, request, **options):
    """The messages of one reply."""

    async def go():
        async with serving(engine, **options) as running:
            return [message async for message in running.stub.Generate(request)]

    return asyncio.run(go())


def refused(engine, request, method="Generate", **options):
    async def go():
        async with serving(engine, **options) as running:
            return await refusal(getattr(running.stub, method)(request))

    return asyncio.run(go())


def test_a_reply_streams_and_ends_with_its_counts():
    messages = generated(ScriptedEngine(b"hello", cached=1), ask(seed=2**64 - 1, logprobs=2))
    assert "".join(message.text for message in messages) == "hello"
    assert [token for message in messages for token in message.token_ids] == list(b"hello")
    logprobs = [entry for message in messages for entry in message.logprobs]
    assert [entry.logprob for entry in logprobs] == [-0.5 - token for token in b"hello"]
    assert [top.token_id for top in logprobs[0].top] == [ord("h"), ord("h") + 1]
    assert all(not message.HasField("finish") for message in messages[:-1])
    finish = messages[-1].finish
    assert finish.reason == generate_pb2.FINISH_REASON_LENGTH
    assert finish.WhichOneof("matched_stop") is None
    assert (finish.usage.prompt_tokens, finish.usage.cached_tokens, finish.usage.completion_tokens) == (
        3,
        1,
        5,
    )
    assert (finish.seed, finish.numerics, finish.model) == (2**64 - 1, "test-numerics", "scripted")
    assert finish.request_id


def test_absent_parameters_keep_their_defaults_and_zeros_are_values():
    engine = ScriptedEngine(b"x")

    async def go():
        async with serving(engine) as running:
            for request in (generate_pb2.GenerateRequest(text="a"), ask("a", temperature=0, logprobs=0)):
                assert [message async for message in running.stub.Generate(request)]

    asyncio.run(go())
    absent, zero = (request.params for request in engine.requests)
    assert (absent.temperature, absent.logprobs, absent.top_p) == (1.0, None, 1.0)
    assert (zero.temperature, zero.logprobs, zero.top_p) == (0.0, 0, 1.0)


def test_every_parameter_arrives_as_it_was_sent():
    engine = ScriptedEngine(b"x")
    request = ask(
        max_tokens=9, min_tokens=2, temperature=0.7, top_k=3, top_p=0.9, min_p=0.1, repetition_penalty=1.1,
        presence_penalty=0.2, frequency_penalty=-0.3, seed=5, stop=["zz", "y"], stop_token_ids=[4, 6],
        ignore_eos=True, logprobs=1,
    )  # fmt: skip
    request.sampling.logit_bias[9] = -1.5
    request.sampling.logit_bias[3] = 2.5
    request.priority, request.cache_salt = -2, "tenant"
    generated(engine, request)
    (sent,) = engine.requests
    params = sent.params
    assert (params.max_tokens, params.min_tokens, params.top_k, params.logprobs, params.seed) == (
        9,
        2,
        3,
        1,
        5,
    )
    assert (params.temperature, params.top_p, params.min_p) == (0.7, 0.9, 0.1)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.1, 0.2, -0.3)
    assert params.logit_bias == ((3, 2.5), (9, -1.5))
    assert (params.stop, params.stop_token_ids, params.ignore_eos) == (("zz", "y"), (4, 6), True)
    assert (sent.priority, sent.cache_salt) == (-2, "tenant")


def test_token_ids_go_to_the_engine_as_they_are():
    engine = ScriptedEngine(b"x")
    generated(engine, generate_pb2.GenerateRequest(token_ids={"ids": [5, BOS, 7]}))
    assert engine.requests[0].prompt == (5, BOS, 7)


def test_the_matched_stop_is_told():
    by_string = generated(ScriptedEngine(b"ab--cd"), ask(stop=["--"]))[-1].finish
    assert (by_string.reason, by_string.stop_string) == (generate_pb2.FINISH_REASON_STOP, "--")
    assert by_string.usage.completion_tokens == 4
    by_token = generated(ScriptedEngine([97, EOS, 98]), ask())[-1].finish
    assert (by_token.reason, by_token.WhichOneof("matched_stop")) == (
        generate_pb2.FINISH_REASON_STOP,
        "stop_token_id",
    )
    assert by_token.stop_token_id == EOS


@pytest.mark.parametrize(
    ("field", "request_"),
    [
        ("prompt", generate_pb2.GenerateRequest()),
        ("prompt", generate_pb2.GenerateRequest(token_ids={})),
        ("prompt", generate_pb2.GenerateRequest(text="x" * 5000)),
        ("token_ids", generate_pb2.GenerateRequest(token_ids={"ids": [1, 2**32 - 1]})),
        ("messages", generate_pb2.GenerateRequest(messages={})),
        ("sampling.temperature", ask(temperature=math.nan)),
        ("sampling.temperature", ask(temperature=math.inf)),
        ("sampling.temperature", ask(temperature=-1)),
        ("sampling.top_p", ask(top_p=0)),
        ("sampling.top_p", ask(top_p=1.5)),
        ("sampling.min_p", ask(min_p=math.nan)),
        ("sampling.top_k", ask(top_k=-1)),
        ("sampling.max_tokens", ask(max_tokens=0)),
        ("sampling.max_tokens", ask(max_tokens=2**31 - 1)),
        ("sampling.min_tokens", ask(min_tokens=5, max_tokens=4)),
        ("sampling.repetition_penalty", ask(repetition_penalty=0)),
        ("sampling.presence_penalty", ask(presence_penalty=-math.inf)),
        ("sampling.frequency_penalty", ask(frequency_penalty=1e300)),
        ("sampling.logprobs", ask(logprobs=-1)),
        ("sampling.logprobs", ask(logprobs=2**31 - 1)),
        ("sampling.stop", ask(stop=[""])),
        ("sampling.stop", ask(stop=["x"] * 10_000)),
        ("sampling.stop_token_ids", ask(stop_token_ids=[2**31])),
        (
            "sampling.logit_bias",
            generate_pb2.GenerateRequest(text="x", sampling={"logit_bias": {1: math.nan}}),
        ),
        (
            "sampling.logit_bias",
            generate_pb2.GenerateRequest(text="x", sampling={"logit_bias": {2**30: 1.0}}),
        ),
    ],
)
def test_bad_input_is_refused_and_named(field, request_):
    engine = ScriptedEngine(b"x")
    error = refused(engine, request_)
    assert bad_field(error) == field
    assert field in error.details()
    assert details(error)["ErrorInfo"].domain == "tramontane"
    assert engine.requests == []


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("Generate", generate_pb2.GenerateRequest(model="other", text="x")),
        ("Tokenize", inference_service_pb2.TokenizeRequest(model="other", text="x")),
        ("Detokenize", inference_service_pb2.DetokenizeRequest(model="other")),
        ("GetModel", inference_service_pb2.GetModelRequest(model="other")),
    ],
)
def test_an_unknown_model_is_not_found(method, request_):
    error = refused(ScriptedEngine(), request_, method)
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert "'other'" in error.details() and "'scripted'" in error.details()
    assert details(error)["ResourceInfo"].resource_name == "other"


@pytest.mark.parametrize("character", ["x", "é", "中", "\U0001f600", "%", "\\"])
def test_a_huge_name_does_not_break_the_answer(character):
    error = refused(ScriptedEngine(), generate_pb2.GenerateRequest(model=character * 100_000, text="x"))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    name = details(error)["ResourceInfo"].resource_name
    assert len(error.details().encode()) <= 600 and error.details().endswith("...")
    assert len(name.encode()) <= 600 and set(name) == {character, "."}
    # What travels: characters beyond ASCII, and the percent sign, as %NN for each byte.
    raw = dict(error.trailing_metadata())["grpc-status-details-bin"]
    assert len(urllib.parse.quote(error.details())) + len(base64.b64encode(raw)) < 4096


@given(text=st.text(st.characters(codec=None), max_size=700), end=st.sampled_from(["", "\U0001f600" * 200]))
def test_shortened_texts_are_their_beginnings(text, end):
    text += end
    sent = statuses._short(text)
    whole = text.encode("utf-8", "replace").decode()
    assert len(sent.encode()) <= 600
    if len(whole.encode()) <= 600:
        assert sent == whole
    else:
        assert sent.endswith("...") and whole.startswith(sent[:-3]) and len(sent.encode()) > 596


def test_a_full_queue_says_when_to_come_back():
    error = refused(ScriptedEngine(refuse=QueueFull(2.5)), ask())
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details(error)["RetryInfo"].retry_delay.ToMilliseconds() == 2500
    assert dict(error.trailing_metadata())["grpc-retry-pushback-ms"] == "2500"


def test_an_engine_that_is_gone_is_unavailable():
    error = refused(ScriptedEngine(refuse=Unavailable("the engine is gone")), ask())
    assert (error.code(), error.details()) == (grpc.StatusCode.UNAVAILABLE, "the engine is gone")


def test_a_defect_is_internal_and_keeps_its_words_to_itself(caplog):
    error = refused(ScriptedEngine(refuse=ZeroDivisionError("secret")), ask())
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in error.details()
    assert "secret" in caplog.text


@pytest.mark.parametrize(
    ("reason", "number", "code"),
    [
        (FinishReason.ERROR, generate_pb2.FINISH_REASON_ERROR, grpc.StatusCode.UNAVAILABLE),
        (FinishReason.FAILED, generate_pb2.FINISH_REASON_ERROR, grpc.StatusCode.INTERNAL),
        (FinishReason.CANCELLED, generate_pb2.FINISH_REASON_CANCELLED, grpc.StatusCode.CANCELLED),
        (FinishReason.DEADLINE, generate_pb2.FINISH_REASON_DEADLINE, grpc.StatusCode.DEADLINE_EXCEEDED),
    ],
)
def test_a_reply_cut_off_gives_what_there_is_and_then_a_status(reason, number, code):
    async def go():
        messages = []
        async with serving(ScriptedEngine(b"abc", ending=reason)) as running:
            with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError)) as caught:
                call = running.stub.Generate(ask())
                async for message in call:
                    messages.append(message)
            assert await call.code() is code
        return messages, caught.value

    messages, _ = asyncio.run(go())
    assert "".join(message.text for message in messages) == "abc"
    assert messages[-1].finish.reason == number
    assert messages[-1].finish.usage.completion_tokens == 3


def test_too_many_streams_are_refused_at_once():
    async def go():
        async with serving(ScriptedEngine(b"a", hang=True), limits=Limits(max_streams=2)) as running:
            calls = [running.stub.Generate(ask()) for _ in range(2)]
            for call in calls:
                await call.read()
            error = await refusal(running.stub.Generate(ask()))
            for call in calls:
                call.cancel()
            return error

    error = asyncio.run(go())
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details(error)["RetryInfo"].retry_delay.ToMilliseconds() > 0


def test_a_message_over_the_limit_is_refused_by_size():
    error = refused(ScriptedEngine(), ask("x" * 10_000), limits=Limits(max_message_bytes=9_000))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "9000" in error.details()


def test_tokenize_and_detokenize():
    async def go():
        async with serving(ScriptedEngine()) as running:
            stub = running.stub
            tokenize, detokenize = (
                inference_service_pb2.TokenizeRequest,
                inference_service_pb2.DetokenizeRequest,
            )
            assert list((await stub.Tokenize(tokenize(text="ab"))).token_ids) == [BOS, 97, 98]
            assert list((await stub.Tokenize(tokenize(text="ab", add_special=False))).token_ids) == [97, 98]
            special = tokenize(text="a</s>", add_special=False, parse_special=True)
            assert list((await stub.Tokenize(special)).token_ids) == [97, EOS]
            assert (await stub.Detokenize(detokenize(token_ids=[BOS, 97, 98]))).text == "ab"
            shown = detokenize(token_ids=[BOS, 97], skip_special=False)
            assert (await stub.Detokenize(shown)).text == "<s>a"
            assert bad_field(await refusal(stub.Tokenize(tokenize()))) == "input"
            assert bad_field(await refusal(stub.Detokenize(detokenize(token_ids=[999])))) == "token_ids"

    asyncio.run(go())


def test_models_and_load():
    async def go():
        async with serving(ScriptedEngine()) as running:
            model = (await running.stub.GetModel(inference_service_pb2.GetModelRequest())).model
            models = await running.stub.ListModels(inference_service_pb2.ListModelsRequest())
            load = await running.stub.GetLoad(inference_service_pb2.GetLoadRequest())
            return model, models, load

    model, models, load = asyncio.run(go())
    assert list(models.models) == [model]
    assert (model.name, model.numerics, model.tp, model.units) == ("scripted", "test-numerics", 2, 3)
    assert (model.bos_token_id, list(model.eos_token_ids), model.vocab_size) == (BOS, [EOS], 258)
    assert list(model.rank_nodes) == ["here", "there"]
    assert (load.waiting, load.free_blocks, load.cached_blocks, load.prefix_hit_tokens) == (3, 40, 8, 50)
