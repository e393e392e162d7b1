"""Streams that break and go on: through the pipeline, the contract and the client."""

import asyncio
import itertools
import os
import signal
import subprocess
import sys
from dataclasses import replace

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tramontane
from runtime.errors import InvalidArgument, QueueFull
from runtime.server import lifecycle
from runtime.server.pipeline import Completion, Pipeline, Resume
from runtime.types import FinishReason, SamplingParams
from tests.server.harness import ask, bad_field, quiet_port, refusal, serving
from tests.server.scripted import EOS, PieceTokenizer, ScriptedEngine, info_for
from tests.server.test_streams import until
from tests.support import REPOSITORY
from tramontane import AsyncClient, Client
from tramontane.retry import Retry
from tramontane.streams import AsyncStream, Stream

LENGTH = tramontane.FinishReason.LENGTH
NUMBERS = itertools.count()  # no two requests of an engine have one name


def make(reply, pieces=(), context_length=4096, **engine):
    tokenizer = PieceTokenizer(pieces)
    client = ScriptedEngine(reply=reply, **engine)
    return Pipeline(tokenizer, None, client, info_for(tokenizer, context_length)), client


def run(pipeline, **completion):
    async def collect():
        asked = Completion(f"r{next(NUMBERS)}", **{"text": "hi", **completion})
        return [piece async for piece in pipeline.run(asked)]

    return asyncio.run(collect())


def resume(*choices, numerics="test-numerics", seed=3, prompt_digest=b"", max_tokens=0):
    return Resume(choices, numerics, seed, prompt_digest, max_tokens)


@settings(deadline=None, max_examples=60)
@given(
    st.text("abé中", max_size=16),
    st.lists(st.text("abé中", min_size=1, max_size=4), max_size=2),
    st.lists(st.integers(0, 1000), max_size=8),
    st.integers(0, 3),
    st.booleans(),
    st.integers(0, 2),
)
def test_what_is_streamed_is_exactly_what_follows(text, stops, places, min_tokens, ends, overrun):
    """After any number of tokens, in the middle of characters and of what may become a stop string."""
    data = text.encode()
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    pieces = [data[a:b] for a, b in itertools.pairwise(edges)]
    reply = [*range(258, 258 + len(pieces)), *([EOS] if ends else []), 258]
    params = SamplingParams(stop=tuple(stops), min_tokens=min(min_tokens, len(reply)), seed=3, logprobs=1)
    params_all = {"params": params}
    pipeline, _ = make(reply, pieces, overrun=overrun)
    whole = run(pipeline, **params_all)
    tokens = [token for piece in whole for token in piece.token_ids]
    assert whole[-1].final.completion_tokens == len(tokens)
    for known in range(len(tokens) + 1):
        before = [piece for piece in whole if piece.final is None][:known]
        rest = run(pipeline, resume=resume(tokens[:known]), **params_all)
        assert "".join(p.text for p in before + rest) == "".join(p.text for p in whole)
        assert [t for p in before + rest for t in p.token_ids] == tokens
        assert [e for p in before + rest for e in p.logprobs] == [e for p in whole for e in p.logprobs]
        assert rest[-1].final == whole[-1].final
        assert rest[0].begun == whole[0].begun and {p.begun for p in rest[1:]} <= {None}


def test_a_reply_that_has_ended_is_not_computed():
    pipeline, client = make(b"abcd")
    (piece,) = run(pipeline, params=SamplingParams(max_tokens=2), resume=resume(b"ab"))
    assert (piece.text, piece.token_ids, piece.final.finish_reason) == ("", (), FinishReason.LENGTH)
    (piece,) = run(pipeline, params=SamplingParams(stop=("bc",)), resume=resume(b"abc"))
    assert (piece.final.matched_stop, piece.final.completion_tokens) == ("bc", 3)
    (piece,) = run(pipeline, params=SamplingParams(stop=("cx",), max_tokens=3), resume=resume(b"abc"))
    assert piece.text == "c", "it was held back, and now comes"
    assert client.requests == []


@pytest.mark.parametrize(
    ("field", "words", "params", "given"),
    [
        ("resume.choices[0]", "outside the vocabulary", {}, resume([258])),
        ("resume.choices[0]", "outside the vocabulary", {}, resume([-1])),
        ("resume.choices[0]", "more than max_tokens, 2", {"max_tokens": 2}, resume(b"abc")),
        ("resume.choices[0]", "ends after 2", {"stop": ("ab",)}, resume(b"abc")),
        ("resume.choices[0]", "ends after 1", {}, resume([EOS, 97])),
        ("resume.choices", "2 entries", {}, resume(b"a", b"b")),
        ("resume.numerics", "'other'", {}, resume(b"a", numerics="other")),
        ("resume.numerics", "'other'", {}, resume(numerics="other")),
        ("resume.numerics", "must say", {}, resume(b"a", numerics="")),
        ("resume.seed", "which seed", {}, resume(b"a", seed=None)),
        ("resume.seed", "not the request's own, 4", {"seed": 4}, resume(b"a")),
        ("resume.prompt_digest", "another prompt", {}, resume(b"a", prompt_digest=b"x" * 32)),
        ("resume.max_tokens", "5 is not the request's own, 4", {"max_tokens": 4}, resume(max_tokens=5)),
        ("resume.max_tokens", "14 tokens are more than", {}, resume(b"a", max_tokens=14)),
        ("resume.max_tokens", "context of 16, 13", {"max_tokens": 14}, resume(b"a", max_tokens=14)),
        ("resume.max_tokens", "context of 16, 13", {"min_tokens": 14}, resume(b"a", max_tokens=14)),
        ("resume.choices[0]", "more than max_tokens, 2", {"max_tokens": 2}, resume(b"abc", max_tokens=2)),
        # Who set no max_tokens is not told of one.
        ("resume.choices[0]", "more than resume.max_tokens, 2", {}, resume(b"abc", max_tokens=2)),
        ("resume.choices[0]", "prompt of 3 tokens leaves in this", {}, resume(b"a" * 14)),
        ("min_tokens", "max_tokens, 13 (not set: ", {"min_tokens": 14}, resume()),
    ],
)
def test_what_cannot_go_on_is_refused(field, words, params, given):
    pipeline, client = make(b"abcd", context_length=16)
    with pytest.raises(InvalidArgument) as caught:
        run(pipeline, params=SamplingParams(**params), resume=given)
    assert (caught.value.field, words in caught.value.reason) == (field, True), caught.value
    assert client.requests == []


def test_a_prompt_without_any_room_is_at_fault_itself():
    pipeline, _ = make(b"abcd", context_length=3)
    with pytest.raises(InvalidArgument, match=r"^prompt: .* leaves no room to reply"):
        run(pipeline, resume=resume(b"a", max_tokens=13))


@pytest.mark.parametrize("own", [None, 5])
def test_a_reply_is_as_long_wherever_it_goes_on(own):
    """Where the request leaves its length open, the first server's context has settled it."""
    text = b"abcdefghijklmnopqrstuvwxyz"
    params = SamplingParams(max_tokens=own, seed=3)
    pipeline, _ = make(text, context_length=16)
    whole = run(pipeline, params=params)
    tokens, begun = [token for piece in whole for token in piece.token_ids], whole[0].begun
    assert (len(tokens), begun.max_tokens) == ((own or 13),) * 2
    for context_length in (16, 17, 4096):
        for known in range(len(tokens) + 1):
            pipeline, engine = make(text, context_length=context_length)
            given = resume(tokens[:known], max_tokens=begun.max_tokens)
            rest = run(pipeline, params=params, resume=given)
            assert tokens[:known] + [token for piece in rest for token in piece.token_ids] == tokens
            assert rest[-1].final == whole[-1].final and rest[0].begun == begun
            assert {request.params.max_tokens for request in engine.requests} <= {len(tokens)}


def test_who_does_not_say_how_long_has_what_the_context_leaves():
    """As an older client, or one that wants more of a reply than it was to have."""
    pipeline, _ = make(b"abcdefgh", context_length=8)
    rest = run(pipeline, resume=resume(b"ab"))
    assert ("".join(piece.text for piece in rest), rest[0].begun.max_tokens) == ("cde", 5)


def test_over_the_wire():
    async def go():
        engine = ScriptedEngine("añb".encode())
        async with serving(engine) as running:
            whole = [message async for message in running.stub.Generate(ask(seed=7, logprobs=0))]
            begin = whole[0].begin
            assert (begin.seed, begin.numerics, begin.model) == (7, "test-numerics", "scripted")
            assert begin.max_tokens == 4096 - 3
            assert begin.request_id == whole[-1].finish.request_id
            assert not any(message.HasField("begin") for message in whole[1:])
            request = ask(logprobs=0)
            request.resume.choices.add().ids.extend("añ".encode()[:2])
            request.resume.numerics, request.resume.seed = begin.numerics, begin.seed
            request.resume.prompt_digest, request.resume.max_tokens = begin.prompt_digest, begin.max_tokens
            rest = [message async for message in running.stub.Generate(request)]
            assert "".join(message.text for message in rest) == "ñb"
            assert [token for message in rest for token in message.token_ids] == list("añb".encode()[2:])
            assert rest[-1].finish.usage == whole[-1].finish.usage

            request.resume.choices[0].ids.append(999)
            assert bad_field(await refusal(running.stub.Generate(request))) == "resume.choices[0]"
            request.sampling.max_tokens = begin.max_tokens - 1
            assert bad_field(await refusal(running.stub.Generate(request))) == "resume.max_tokens"
            asked = len(engine.requests)
        async with serving(engine, context_length=4095) as shorter:
            request.sampling.ClearField("max_tokens")
            request.resume.choices[0].ids.pop()
            error = await refusal(shorter.stub.Generate(request))
            assert bad_field(error) == "resume.max_tokens"
            assert "4093 tokens" in error.details() and error.details().endswith("4095, 4092")
            assert len(engine.requests) == asked

            request.resume.ClearField("max_tokens")  # as a client does that knows nothing of it
            rest = [message async for message in shorter.stub.Generate(request)]
            assert "".join(message.text for message in rest) == "ñb"
            assert rest[0].begin.max_tokens == 4092

    asyncio.run(go())


@pytest.mark.parametrize("dies", [1, 2, 5])
def test_the_client_goes_on_by_itself(talk, dies):
    options = {"seed": 5, "logprobs": 1, "stop": "zz", "max_tokens": 9}
    text = "añ中zbcd"
    want = talk(ScriptedEngine(text.encode()), lambda client: client.generate("hi", **options))
    engine = ScriptedEngine(text.encode(), dies=dies)
    got = talk(engine, lambda client: client.generate("hi", **options), resumes=2)
    assert (want.resumed, got.resumed) == (0, (9 - 1) // dies)
    for name in ("text", "token_ids", "logprobs", "finish_reason", "usage", "seed", "numerics"):
        assert getattr(got, name) == getattr(want, name), name
    assert {request.params.seed for request in engine.requests} == {5}


def test_a_seed_that_the_server_drew_stays(talk):
    engine = ScriptedEngine(b"abcdef", dies=2)
    reply = talk(engine, lambda client: client.generate("hi"), resumes=2)
    assert (reply.text, reply.resumed) == ("abcdef", 2)
    assert {request.params.seed for request in engine.requests} == {reply.seed}


def test_a_server_that_gives_nothing_is_given_up(talk):
    engine = ScriptedEngine(b"abcdef", dies=0)

    def conversation(client):
        with client.stream_generate("hi", seed=3) as stream:
            with pytest.raises(tramontane.Unavailable, match="rank 1 is gone"):
                list(stream)
            return stream.reply

    reply = talk(engine, conversation, resumes=3)
    assert (reply.finish_reason.value, reply.resumed, len(engine.requests)) == ("error", 0, 4)


def test_what_has_come_can_be_kept_and_asked_for_later(talk):
    def conversation(client):
        with client.stream_generate("hi", max_tokens=6) as stream:
            assert stream.resume is None
            first = [next(stream), next(stream)]
            kept = stream.resume
        rest = client.generate("hi", max_tokens=6, resume=kept)
        return "".join(chunk.text for chunk in first) + rest.text, rest

    text, rest = talk(ScriptedEngine(b"abcdefgh", pace=0.01), conversation)
    assert (text, rest.usage.completion_tokens) == ("abcdef", 6)
    assert len(rest.token_ids) < 6


def test_other_failures_are_not_retried(talk):
    engine = ScriptedEngine(b"a", refuse=InvalidArgument("prompt", "too many"))

    def conversation(client):
        with pytest.raises(tramontane.InvalidRequest):
            client.generate("hi")
        return True

    assert talk(engine, conversation, resumes=8)


def start(port: int, held: int, text: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'proto'}"}
    command = [sys.executable, "-m", "tests.server.process", str(port), str(held), text]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=REPOSITORY, env=environment, text=True)
    assert process.stdout.readline() == f"{port}\n"
    return process


def test_a_server_that_is_killed_and_started_again():
    """By SIGKILL in mid-stream: nothing is said, and the next process knows nothing."""
    text, port = "Μία φορά κι έναν καιρό " * 12, quiet_port()
    first, second = start(port, held=20, text=text), None
    try:
        with Client(f"127.0.0.1:{port}") as client, client.stream_generate("hi", seed=1) as stream:
            chunks = [next(stream)]
            while sum(len(chunk.token_ids) for chunk in chunks) < 20:
                chunks.append(next(stream))
            first.send_signal(signal.SIGKILL)
            first.wait()
            second = start(port, held=0, text=text)
            chunks += list(stream)
        reply = stream.reply
        assert (reply.text, reply.token_ids) == (text, tuple(text.encode()))
        assert "".join(chunk.text for chunk in chunks) == text
        assert reply.resumed == 1
    finally:
        for process in (first, second):
            if process is not None:
                process.kill()
                process.wait()
                process.stdout.close()


def test_another_server_of_the_target_goes_on(monkeypatch):
    monkeypatch.setattr(lifecycle, "_LAST_CALLS", 60.0)  # time to say why, on a machine that stalls too

    async def go():
        text, gate = b"abcdefghij" * 30, asyncio.Event()
        async with (
            serving(ScriptedEngine(text, gate=gate)) as one,
            serving(ScriptedEngine(text, gate=gate)) as other,
        ):
            ports = f"ipv4:{one.target},{other.target}"
            async with AsyncClient(ports) as client, client.stream_generate("hi", seed=2) as stream:
                await anext(stream)
                # The first of the target's servers, unless it was slow to take the connection.
                (busy,) = [running for running in (one, other) if running.engine.running]
                await busy.server.stop()
                gate.set()
                reply = await stream.result()
        assert (reply.text, reply.resumed) == (text.decode(), 1)
        assert one.engine.requests and other.engine.requests

    asyncio.run(go())


async def broken_off(engine, first, then, **options):
    """The reply to a request whose stream breaks at a server with a context of `first` tokens and is taken up
    at one with `then`."""
    other = ScriptedEngine(engine.reply)
    async with serving(engine, context_length=first) as one, serving(other, context_length=then) as two:
        stubs = iter([one.stub, two.stub])
        method = lambda request, timeout: next(stubs).Generate(request, timeout=timeout)  # noqa: E731
        return await AsyncStream(method, ask(**options), None, 8).result()


def test_a_longer_context_gives_no_longer_reply():
    text = b"abcdefghijklmnopqrstuvwxyz"
    reply = asyncio.run(broken_off(ScriptedEngine(text, dies=5), 16, 4096))
    assert (reply.text, reply.finish_reason, reply.resumed) == ("abcdefghijklm", LENGTH, 1)
    assert reply.max_tokens == 13


def test_a_shorter_context_does_not_cut_a_reply_short():
    """What broke is told, and that this server cannot give what was begun; not that the reply is whole."""
    text = b"abcdefghijklmnopqrstuvwxyz"
    with pytest.raises(tramontane.Unavailable) as caught:
        asyncio.run(broken_off(ScriptedEngine(text, dies=5), 4096, 16))
    for words in ("rank 1 is gone", "resume.max_tokens: 4093 tokens", "context of 16, 13"):
        assert words in caught.value.message
    reply = asyncio.run(broken_off(ScriptedEngine(text, dies=5), 4096, 16, max_tokens=13))
    assert (reply.text, reply.finish_reason, reply.resumed) == ("abcdefghijklm", LENGTH, 1)


def test_what_was_kept_is_asked_for_at_a_server_with_another_context(talk):
    text = b"abcdefghijklmnopqrstuvwxyz"

    def begin(client):
        with client.stream_generate("hi") as stream:
            with pytest.raises(tramontane.Unavailable):
                list(stream)
            return stream.resume

    kept = talk(ScriptedEngine(text, dies=14), begin)
    assert (len(kept.token_ids[0]), kept.max_tokens) == (14, 4093)

    def refused(client):
        with pytest.raises(tramontane.InvalidRequest, match=r"resume.max_tokens: 4093 .* context of 16, 13"):
            client.generate("hi", resume=kept)
        with pytest.raises(tramontane.InvalidRequest, match=r"resume.max_tokens: 4093 is not the request's"):
            client.generate("hi", resume=kept, max_tokens=13)
        with pytest.raises(tramontane.InvalidRequest, match=r"resume.choices\[0\]: 14 .* context of 16, 13"):
            client.generate("hi", resume=replace(kept, max_tokens=0))
        with pytest.raises(tramontane.InvalidRequest, match=r"resume.max_tokens: "):
            client.generate("hi", resume=replace(kept, max_tokens=-1))
        return True

    engine = ScriptedEngine(text)
    assert talk(engine, refused, context_length=16) and engine.requests == []
    shorter = replace(kept, token_ids=(kept.token_ids[0][:5],), max_tokens=13)
    rest = talk(ScriptedEngine(text), lambda client: client.generate("hi", resume=shorter))
    assert (rest.text, rest.finish_reason) == ("fghijklm", LENGTH)


def test_another_numerics_does_not_go_on(talk):
    """What broke is told, and why nobody goes on with it."""

    class Changed(ScriptedEngine):
        async def generate(self, request):
            if self.requests:
                raise InvalidArgument("resume.numerics", "made under 'a'; this server computes 'b'")
            async for output in super().generate(request):
                yield output

    def conversation(client):
        with pytest.raises(tramontane.Unavailable) as caught:
            client.generate("hi")
        return caught.value.message

    message = talk(Changed(b"abc", dies=1), conversation, resumes=3)
    assert "rank 1 is gone" in message and "resume.numerics" in message


def test_leaving_ends_the_waiting_too():
    async def go():
        engine = ScriptedEngine(b"abc", dies=1)
        async with serving(engine) as running, AsyncClient(running.target) as client:
            stream = client.stream_generate("hi")
            await anext(stream)
            engine.dies = 0
            waits, plain = [], stream._retry.wait

            def wait(failure):
                waits.append(plain(failure))
                return waits[-1] if len(waits) < 3 else 1000.0

            stream._retry.wait = wait
            reading = asyncio.create_task(stream.result())
            await until(lambda: len(waits) == 3)
            stream.cancel()
            with pytest.raises(tramontane.Cancelled):
                await asyncio.wait_for(reading, 120)
            assert len(engine.requests) == 3 and engine.running == 0

    asyncio.run(go())


@pytest.mark.parametrize("code, told", [("UNAVAILABLE", "Cancelled"), ("INTERNAL", "Error")])
def test_a_call_that_breaks_as_it_is_cancelled(code, told):
    """It would have been made again: that it is not is the user's doing. Another failure stands."""

    class Broken(grpc.RpcError, grpc.Call):
        def code(self):
            return grpc.StatusCode[code]

        def details(self):
            return "gone"

        trailing_metadata = initial_metadata = lambda self: ()
        is_active = time_remaining = cancel = add_callback = lambda self, *_: None

    class Call:
        def __next__(self):
            stream.cancel()
            raise Broken

        def cancel(self):
            pass

    stream = Stream(lambda request, timeout: Call(), ask(), None, 8)
    with pytest.raises(tramontane.Error) as raised:
        next(stream)
    assert type(raised.value).__name__ == told


UNAVAILABLE = tramontane.Unavailable("gone", grpc.StatusCode.UNAVAILABLE)


def waits(retry: Retry, failure) -> list[float]:
    found = []
    with pytest.raises(type(failure)):
        while True:
            found.append(retry.wait(failure))
    return found


def test_waits_double_are_bounded_and_start_anew():
    retry = Retry(8, None)
    before = waits(retry, UNAVAILABLE)
    assert len(before) == 4
    retry.arrived()
    assert retry.resumed == 1
    found = waits(retry, UNAVAILABLE)
    assert len(found) == 8
    for number, wait in enumerate(found):
        whole = min(5.0, 0.1 * 2**number)
        assert whole / 2 <= wait <= whole
    assert waits(Retry(0, None), UNAVAILABLE) == []


def test_no_wait_goes_beyond_the_timeout():
    retry = Retry(8, 0.5)
    retry.arrived()
    assert sum(waits(retry, UNAVAILABLE)) < 3 and retry.remaining() <= 0.5


def test_a_full_queue_is_waited_for_only_with_a_reply_at_stake():
    full = tramontane.Overloaded("full", grpc.StatusCode.RESOURCE_EXHAUSTED, 2.5)
    assert waits(Retry(8, None), full) == []
    retry = Retry(8, None)
    retry.arrived()
    retry.wait(UNAVAILABLE)
    assert waits(retry, full)[0] >= 2.5
    assert waits(Retry(8, None), tramontane.Overloaded("slow reader")) == []


def test_a_full_queue_before_any_token_is_the_user_s(talk):
    def conversation(client):
        with pytest.raises(tramontane.Overloaded):
            client.generate("hi")
        return True

    assert talk(ScriptedEngine(refuse=QueueFull(2.5)), conversation, resumes=8)


def test_nobody_there_is_told_soon():
    with Client("127.0.0.1:1") as client, client.stream_generate("hi") as stream:
        waits, plain = [], stream._retry.wait
        stream._retry.wait = lambda failure: waits.append(plain(failure)) or waits[-1]
        with pytest.raises(tramontane.Unavailable):
            list(stream)
    assert len(waits) == 4 and sum(waits) < 2
