"""Streams that go wrong: clients that leave, are late, do not read, or send garbage."""

import asyncio
import itertools
import math
import os
import subprocess
import time
import tracemalloc

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.server import backlog as backlogs
from runtime.server.backlog import Backlog
from runtime.server.lifecycle import Limits, channel_options
from runtime.server.malformed import explain
from runtime.server.reply import Piece, TokenLogprobs
from runtime.server.statuses import SlowReader
from runtime.types import Finished, FinishReason, TokenLogprob, TokenOutput
from tests.server.harness import ask, bad_field, details, refusal, serving
from tests.server.scripted import ScriptedEngine
from tramontane.v1 import generate_pb2, inference_service_pb2

GENERATE = "/tramontane.v1.InferenceService/Generate"


async def until(condition, seconds=120.0):
    """Return when `condition` holds. What it waits for must never come where the code is wrong: `seconds` are
    for a machine that stands still now and then."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, "it never happened"
        await asyncio.sleep(0.002)


@pytest.mark.parametrize("first", ["silent", "streaming"])
def test_a_client_that_cancels_frees_its_request(first):
    async def go():
        engine = ScriptedEngine(b"" if first == "silent" else b"a" * 4000, pace=0.002, hang=True)
        async with serving(engine) as running:
            call = running.stub.Generate(ask())
            if first == "streaming":
                await call.read()
            await until(lambda: engine.running == 1)
            call.cancel()  # nothing else ever ends it
            await until(lambda: engine.running == 0)
            assert len(engine.aborted) == 1
            await until(lambda: running.server._service.open_streams == 0)

    asyncio.run(go())


def test_a_connection_that_breaks_frees_its_requests():
    async def go():
        engine = ScriptedEngine(b"ab", hang=True)
        async with serving(engine) as running:
            async with grpc.aio.insecure_channel(running.target) as channel:
                stubs = type(running.stub)(channel)
                calls = [stubs.Generate(ask()) for _ in range(5)]
                for call in calls:
                    await call.read()
                assert engine.running == 5
            await until(lambda: engine.running == 0)

    asyncio.run(go())


def test_many_cancellations_leave_nothing_behind(caplog):
    async def go():
        engine = ScriptedEngine(b"abc", hang=True)
        async with serving(engine) as running:
            for _ in range(20):
                calls = [running.stub.Generate(ask()) for _ in range(20)]
                await asyncio.sleep(0.002)
                for call in calls:
                    call.cancel()
            await until(lambda: engine.running == 0 and running.server._service.open_streams == 0)
            loops = [task.get_name() for task in asyncio.all_tasks() if "_pump" in repr(task.get_coro())]
            assert loops == []
            assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []

    asyncio.run(go())


def test_the_deadline_reaches_the_engine_and_ends_the_call():
    async def go():
        engine = ScriptedEngine(b"a", hang=True)
        async with serving(engine) as running:
            start = time.monotonic()
            call = running.stub.Generate(ask(), timeout=100)
            await call.read()
            # gRPC carries a timeout in whole milliseconds and rounds it up, once at either end. What is left
            # at the other end is by the clock on the wall, which is set now and then.
            took = time.monotonic() - start
            assert 100 - took - 1 < engine.requests[0].deadline <= 100.01
            call.cancel()
            await until(lambda: engine.running == 0)

            # A machine that stalls may spend a timeout before the engine has been asked.
            timeout = 0.3
            while len(engine.requests) == 1:
                error = await refusal(running.stub.Generate(ask(), timeout=timeout))
                assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
                timeout *= 3
            await until(lambda: engine.running == 0)

            await running.stub.Generate(ask(max_tokens=1)).read()
            assert engine.requests[-1].deadline is None

    asyncio.run(go())


def test_a_slow_reader_gets_merged_pieces_and_holds_nobody_up():
    """The engine's side runs to its end while the client has read nothing."""
    reply = b"0123456789" * 3000

    async def go():
        engine = ScriptedEngine(reply)
        async with serving(engine, context_length=100_000) as running:
            call = running.stub.Generate(ask(logprobs=0))
            await until(lambda: engine.sent == len(reply))
            text, writes = "", 0
            async for message in call:
                text += message.text
                writes += 1
                assert message.ByteSize() < 1 << 20
            return text, writes

    text, writes = asyncio.run(go())
    assert text.encode() == reply
    # A write takes two turns of the loop at least, and a token comes in each.
    assert writes < len(reply) * 2 / 3, "nothing was merged"


def test_a_reader_too_far_behind_loses_its_stream_alone():
    async def go():
        # gRPC itself takes some megabytes ahead of a reader; 50 alternatives a token go past that.
        engine = ScriptedEngine(b"x" * 60_000)
        async with serving(engine, limits=Limits(max_lag=5_000), context_length=100_000) as running:
            slow = running.stub.Generate(ask(logprobs=50))
            await until(lambda: engine.running == 0 and engine.requests)
            assert engine.sent < 60_000
            other = await running.stub.Tokenize(inference_service_pb2.TokenizeRequest(text="a"))
            assert other.token_ids
            return await refusal(slow)

    error = asyncio.run(go())
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details(error)["ErrorInfo"].reason == "SLOW_READER"


def test_backlog_merges_in_order_and_bounds_what_it_holds():
    async def go():
        backlog = Backlog(limit=100_000)
        logprobs = (TokenLogprobs(-1.0, tuple(TokenLogprob(n, -2.0) for n in range(20))),)
        for number in range(1000):
            backlog.put(Piece(f"{number},", (number,), logprobs))
        backlog.close()
        taken = []
        while (piece := await backlog.take()) is not None:
            taken.append(piece)
        assert 1 < len(taken) < 10
        assert "".join(piece.text for piece in taken) == "".join(f"{number}," for number in range(1000))
        assert [token for piece in taken for token in piece.token_ids] == list(range(1000))
        assert sum(len(piece.logprobs) for piece in taken) == 1000

        small = Backlog(limit=2)
        small.put(Piece("a", (1,)))
        small.put(Piece("b", (2,)))
        with pytest.raises(SlowReader):
            small.put(Piece("c", (3,)))

    asyncio.run(go())


def test_a_piece_fits_an_empty_backlog_whatever_it_weighs():
    async def go():
        backlog = Backlog(limit=2)
        for _ in range(2):
            backlog.put(Piece("abc", (1, 2, 3)))
            assert (await backlog.take()).token_ids == (1, 2, 3)
        backlog.put(Piece("abc", (1, 2, 3)))
        with pytest.raises(SlowReader, match="3 tokens behind"):
            backlog.put(Piece("d", (4,)))

    asyncio.run(go())


def test_a_burst_does_not_make_a_reader_too_slow(monkeypatch):
    """What an engine has ready, from when the event loop was held up, comes without a turn for the reader."""
    # Half a second is more than this reader takes, but not if the machine stands still meanwhile.
    monkeypatch.setattr(backlogs, "_GRACE", 60.0)

    class AtOnce(ScriptedEngine):
        async def _outputs(self, request):
            for index in range(3000):
                for choice in range(4):
                    yield TokenOutput(request.request_id, index, ord("x"), choice=choice)
            for choice in range(4):
                yield Finished(
                    request.request_id, FinishReason.LENGTH, 3, 0, 3000, None, "", choice, choice == 3
                )

    async def go():
        async with serving(AtOnce(), limits=Limits(max_lag=1000)) as running:
            request = ask()
            request.n = 4
            return [message async for message in running.stub.Generate(request)]

    messages = asyncio.run(go())
    assert sum(len(message.token_ids) for message in messages) == 12_000
    assert sum(message.HasField("finish") for message in messages) == 4


def test_time_in_which_the_loop_stands_still_is_not_the_readers():
    async def go():
        backlog = Backlog(limit=2)
        for token in (1, 2):
            backlog.put(Piece("a", (token,)))

        async def read():  # wants a few turns before it takes anything, as gRPC does
            for _ in range(20):
                await asyncio.sleep(0)
            return await backlog.take()

        loop = asyncio.get_running_loop()
        waiting = loop.create_task(backlog.room(Piece("b", (3,))))
        await asyncio.sleep(0)
        time.sleep(2 * backlogs._GRACE)
        reading = loop.create_task(read())
        await waiting
        backlog.put(Piece("b", (3,)))
        assert (await reading).token_ids == (1, 2)

    asyncio.run(go())


def test_a_backlog_that_was_closed_takes_no_more():
    async def go():
        backlog = Backlog(limit=100)
        backlog.put(Piece("a", (1,)))
        backlog.close(ValueError("first"))
        backlog.put(Piece("b", (2,)))
        backlog.close()
        await asyncio.wait_for(backlog.emptied(), 60)  # whoever waited to put more has no need to
        assert (await backlog.take()).text == "a"
        with pytest.raises(ValueError, match="first"):
            await backlog.take()

    asyncio.run(go())


def some(count):
    floats = st.floats(-1e30, 0.0)
    tops = st.lists(st.builds(TokenLogprob, st.integers(0, 2**32 - 1), floats), max_size=3).map(tuple)
    entries = st.builds(TokenLogprobs, st.none() | floats, tops)
    return st.tuples(*[entries] * count)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 3).flatmap(some) | st.just(()), max_size=8), st.integers(0, 7))
def test_what_waits_comes_out_as_it_was(logprobs, taken_after):
    """Logprobs are kept in another form while they wait."""
    pieces = [Piece("x" * len(each), tuple(range(len(each))), each) for each in logprobs]

    async def go():
        backlog, taken = Backlog(limit=1000), []
        for number, piece in enumerate(pieces):
            backlog.put(piece)
            if number == taken_after:
                taken.append(await backlog.take())
        backlog.close()
        while (piece := await backlog.take()) is not None:
            taken.append(piece)
        return taken

    taken = asyncio.run(go())
    for name in ("text", "token_ids", "logprobs"):
        sent, got = ([list(getattr(piece, name)) for piece in some] for some in (pieces, taken))
        assert list(itertools.chain(*got)) == list(itertools.chain(*sent))


def keeps_less(most: int, make) -> bool:
    """Whether what `make()` returns keeps fewer bytes than `most`. What other threads allocate meanwhile only
    adds to what is measured, so once is enough."""

    def measured() -> int:
        tracemalloc.start()
        try:
            made = make()
            found = tracemalloc.get_traced_memory()[0]
            del made
            return found
        finally:
            tracemalloc.stop()

    return any(measured() < most for _ in range(3))


def test_many_choices_with_many_alternatives_may_wait():
    """A unit of what a reader may be behind is memory: 64 choices of 100 alternatives are not behind after
    some steps of the engine."""

    def token(number):
        top = tuple(TokenLogprob(100_000 + number * 100 + rank, -0.5 - rank) for rank in range(100))
        return (TokenLogprobs(-0.25, top),)

    def make():
        backlog = Backlog(limit=8192)
        for number in range(75 * 8):
            backlog.put(Piece("word", (30_000,), token(number), choice=number % 8))
        return backlog

    assert keeps_less(8192 * 130, make)


def test_what_waits_is_kept_small():
    """A thousand readers that do not read must not take the machine with them."""

    def make():
        backlog = Backlog(limit=65_536)
        for number in range(20_000):
            backlog.put(Piece(f"word{number}", (30_000 + number,)))
        return backlog

    assert keeps_less(20_000 * 110, make)


async def raw(running, path: str, data: bytes):
    """A call whose request is `data`, whatever that is."""
    plain = running.channel.unary_stream(path, lambda data: data, lambda data: data)
    return await refusal(plain(data))


TEXT = b"\x12"  # GenerateRequest.text
SAMPLING = b"\x2a"  # GenerateRequest.sampling
STOP = b"\x62"  # SamplingParams.stop


@pytest.mark.parametrize(
    ("data", "field"),
    [
        (TEXT + b"\x02\xff\xfe", "text"),
        (SAMPLING + b"\x04" + STOP + b"\x02a\xff", "sampling.stop"),
        (b"\x22\x05\x0a\x03\x12\x01\x80", "messages.messages.content"),
        (TEXT + b"\x7fabc", "request"),
        (b"\xff" * 12, "request"),
        (SAMPLING + b"\x02\x08", "request"),
        (SAMPLING + b"\x02\x08\xff", "sampling"),
    ],
)
def test_a_malformed_request_is_invalid_and_says_where(data, field):
    async def go():
        async with serving(ScriptedEngine()) as running:
            return await raw(running, GENERATE, data)

    error = asyncio.run(go())
    assert bad_field(error) == field
    assert "DecodeError" not in error.details() and "google" not in error.details()


def test_a_malformed_health_check_is_invalid_too():
    async def go():
        async with serving(ScriptedEngine()) as running:
            return await raw(running, "/grpc.health.v1.Health/Check", b"\x0a\x7f")

    assert asyncio.run(go()).code() is grpc.StatusCode.INVALID_ARGUMENT


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60))
def test_explaining_garbage_never_fails(data):
    found = explain(data, generate_pb2.GenerateRequest.DESCRIPTOR)
    assert found.reason


@settings(max_examples=100, deadline=None)
@given(st.binary(min_size=1, max_size=8), st.integers(0, 1000))
def test_requests_with_bytes_changed_never_end_in_an_internal_error(patch, place):
    request = ask("hello", stop=["abc", "d"], temperature=0.5, max_tokens=4)
    request.sampling.logit_bias[3] = 1.0
    data = bytearray(request.SerializeToString())
    place %= len(data)
    data[place : place + len(patch)] = patch

    async def go():
        async with serving(ScriptedEngine(b"ab")) as running:
            call = running.channel.unary_stream(GENERATE, lambda data: data, lambda data: data)(bytes(data))
            try:
                async for _ in call:
                    pass
            except grpc.aio.AioRpcError as error:
                return error.code()
            return grpc.StatusCode.OK

    allowed = {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}
    assert asyncio.run(go()) in allowed


def test_not_a_number_reaches_the_check_and_not_the_engine():
    engine = ScriptedEngine(b"x")

    async def go():
        async with serving(engine) as running:
            return await refusal(running.stub.Generate(ask(temperature=-math.nan)))

    assert bad_field(asyncio.run(go())) == "sampling.temperature"
    assert engine.requests == []


def test_channel_arguments_are_ones_that_grpc_knows():
    """gRPC ignores a misspelt argument in silence."""
    from grpc._cython import cygrpc

    from tramontane import client

    library = cygrpc.__file__
    assert os.path.getsize(library) > 1 << 20
    names = {name for name, _ in [*channel_options(Limits()), *client._CHANNEL]}
    for name in names:
        found = subprocess.run(["grep", "-c", "-a", "-F", name, library], capture_output=True, timeout=60)
        assert found.returncode == 0, name


@pytest.mark.slow
def test_pings_of_a_client_do_not_cut_a_silent_stream():
    async def go():
        engine = ScriptedEngine(b"abc", pace=4.0)
        async with serving(engine) as running:
            eager = [("grpc.keepalive_time_ms", 200), ("grpc.http2.max_pings_without_data", 0)]
            async with grpc.aio.insecure_channel(running.target, options=eager) as channel:
                call = type(running.stub)(channel).Generate(ask())
                return "".join([message.text async for message in call])

    assert asyncio.run(go()) == "abc"
