"""A gateway and an engine on the two ends of a socket: streams, ends of every kind, and who pays for whom."""

from __future__ import annotations

import asyncio
import contextlib
import math
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

import runtime.wire.gateway_channel as module
from runtime.config import EngineConfig, ModelConfig, ParallelConfig
from runtime.errors import InvalidArgument, QueueFull, Unavailable
from runtime.local import LocalEngine
from runtime.types import Branch, Finished, FinishReason, Request, SamplingParams, TokenOutput
from runtime.wire.connection import LENGTH, LOST_SECONDS, Connection, Listener
from runtime.wire.gateway_channel import OUTBOX_BYTES, STALLED_SECONDS, EngineChannel, serve_gateway
from runtime.wire.messages import Abort, Hello, encode
from runtime.wire.outbox import Outbox
from tests.replies import ask, ask_all, ask_choices, greedy

TOKEN = "a secret"
AT_ONCE = 60.0  # seconds for what is to happen at once: a loaded machine may stand still for several


class Steps:
    """How many steps the rank may take yet. A reply is then as far as a test wants it, neither still to come
    nor over, however fast the engine is and however late the test looks."""

    def __init__(self) -> None:
        self._left = math.inf
        self._changed = threading.Condition()

    def hold(self, after: int = 0) -> None:
        """Once so many more have been taken."""
        with self._changed:
            self._left = after
            self._changed.notify()

    def more(self, count: float = math.inf) -> None:
        with self._changed:
            self._left += count
            self._changed.notify()

    def take(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._left > 0)
            self._left -= 1


class Served:
    """An engine of this process behind a listener."""

    limit = OUTBOX_BYTES

    def __init__(self, path, **settings):
        self.engine = LocalEngine(ModelConfig(str(path)), EngineConfig(**settings), ParallelConfig(threads=1))
        self.steps = Steps()
        [runner] = self.engine.loop._ranks._runners
        execute = runner.execute
        runner.execute = lambda plan: (self.steps.take(), execute(plan))[1]
        self.info = asyncio.run(self.engine.client.info())
        self.connections: list[Connection] = []
        self.listener = Listener("127.0.0.1", TOKEN, self._greet)

    def _greet(self, hello: Hello, connection: Connection) -> None:
        self.connections.append(connection)
        serve_gateway(connection, Outbox(connection, self.limit), self.engine.loop, self.info)

    async def connect(self) -> EngineChannel:
        return await EngineChannel.connect(self.listener.host, self.listener.port, TOKEN)

    def raw(self) -> Connection:
        connection = Connection.connect(self.listener.host, self.listener.port, Hello("gateway", TOKEN))
        assert connection.receive()[0] == "welcome"
        return connection

    def healthy(self) -> None:
        answers: queue.SimpleQueue = queue.SimpleQueue()
        self.engine.loop.check(answers.put)
        assert answers.get(timeout=AT_ONCE) is None

    def close(self) -> None:
        self.steps.more()
        self.listener.close()
        self.engine.close()


@pytest.fixture(scope="module")
def path(tiny):
    return tiny(context=2048, layers=1)


@pytest.fixture
def served(path) -> Iterator[Served]:
    made = Served(path, block_size=16)
    yield made
    made.close()


def long(name: str, prompt: tuple[int, ...] = (1, 5, 9)) -> Request:
    return greedy(name, prompt, 1500)


async def until(channel, reached: Callable) -> object:
    """Wait until the engine's load is as wanted; returns it."""
    async with asyncio.timeout(AT_ONCE):
        while not reached(load := await channel.load()):
            await asyncio.sleep(0.005)
    return load


async def all_run(served: Served, channel, count: int) -> None:
    """Wait until so many requests have come, which the steps are held for, and run; they go no further."""
    await until(channel, lambda load: load.running + load.waiting == count)
    served.steps.more(5)  # plans that were made before some had come stand before those that start them
    await until(channel, lambda load: load.running == count)


def run(served: Served, body: Callable, limit: float = 200) -> object:
    async def main():
        channel = await served.connect()
        try:
            async with asyncio.timeout(limit):
                return await body(channel)
        finally:
            await channel.close()

    return asyncio.run(main())


def test_streams_are_what_the_engine_says(served):
    requests = [
        greedy("a", (1, 2, 3), 20, logprobs=3),
        Request("b", (4,) * 70, SamplingParams(max_tokens=10, temperature=1.0, seed=2**64 - 1, logprobs=0)),
        Request("c", (9,), SamplingParams(max_tokens=60, temperature=1.0, seed=5), tuple(range(200, 384))),
        *(greedy(f"d{i}", (7, i), 5) for i in range(20)),
    ]
    local = asyncio.run(ask_all(served.engine.client, requests))
    assert run(served, lambda channel: ask_all(channel, requests)) == local


def test_choices_and_what_goes_on_are_what_the_engine_says(served):
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=3, logprobs=1)
    whole = Request("whole", tuple(range(5, 45)), params, branches=tuple(map(Branch, range(3))))
    local = asyncio.run(ask_choices(served.engine.client, whole))
    again = replace(
        whole,
        request_id="again",
        branches=(Branch(0, local[0][0].tokens[:5]), Branch(2), Branch(1, local[1][0].tokens[:1])),
    )

    async def body(channel):
        return await ask_choices(channel, whole), await ask_choices(channel, again)

    replies, rest = run(served, body)
    assert [reply for reply, _ in replies] == [reply for reply, _ in local]
    assert [reply.tokens for reply, _ in rest] == [
        local[0][0].tokens[5:],
        local[2][0].tokens,
        local[1][0].tokens[1:],
    ]
    served.healthy()


def test_one_choice_is_stopped_alone(served):
    request = replace(long("r"), branches=(Branch(0), Branch(1)))
    served.steps.hold(after=30)  # far enough for what is seen below, and no further

    async def body(channel):
        ends = {}
        stopped = False
        async for output in channel.generate(request):
            if isinstance(output, Finished):
                ends[output.choice] = output
                if output.choice == 1:
                    await channel.stop_at("r", 5, 0)
            elif output.index == 6 and not stopped and output.choice == 1:
                stopped = True
                await channel.stop_at("r", 3, 1)
        assert [(ends[c].completion_tokens, ends[c].last) for c in (1, 0)] == [(3, False), (5, True)]

    run(served, body)
    served.steps.more()
    served.healthy()


def test_scores_are_what_the_engine_says(served):
    request = Request("s", tuple(range(5, 165)), SamplingParams(temperature=0.0, logprobs=2), scores=True)

    async def scores(client):
        return [output async for output in client.generate(request)]

    local = asyncio.run(scores(served.engine.client))
    assert sum(len(output.scores) for output in local[:-1]) == 159
    assert run(served, scores) == local
    served.healthy()


def test_info_and_load(served):
    async def body(channel):
        info, load = await channel.info(), await channel.load()
        assert info == await served.engine.client.info() and info.block_size == 16
        assert load.total_blocks == info.total_blocks == load.free_blocks
        loads = await asyncio.gather(*(channel.load() for _ in range(20)))
        assert all(one == load for one in loads)

    run(served, body)


def test_a_question_that_was_given_up_breaks_nothing(served):
    """A client that cancels GetLoad, while the engine's answer is on its way."""

    async def body(channel):
        asked = [asyncio.create_task(channel.load()) for _ in range(5)]
        await asyncio.sleep(0)
        for each in asked:
            each.cancel()
        # Its answer comes behind those that nobody waits for.
        assert (await asyncio.wait_for(channel.load(), AT_ONCE)).total_blocks > 0

    run(served, body)


def test_a_token_comes_before_the_next_is_made(served):
    served.steps.hold()

    async def body(channel):
        stream = channel.generate(greedy("r", (1, 2), 600))
        for index in range(50):
            served.steps.more(1)  # which makes a token, or more where some were guessed
            output = await asyncio.wait_for(anext(stream), AT_ONCE)
            assert output.index == index
        served.steps.more()
        rest = [output async for output in stream]
        assert len(rest) == 551 and isinstance(rest[-1], Finished)

    run(served, body)


def test_leaving_a_stream_frees_its_kv_within_a_step(served):
    served.steps.hold(after=10)

    async def body(channel):
        stream = channel.generate(long("r", tuple(range(3, 103))))
        for _ in range(3):
            await anext(stream)
        before = await channel.load()
        assert before.running == 1 and before.free_blocks < before.total_blocks
        await stream.aclose()
        asked = await channel.load()  # answered after the abort, on the same connection
        assert asked.running == 0 and asked.waiting == 0
        served.steps.more()
        after = await until(channel, lambda load: load.free_blocks == load.total_blocks)
        await asyncio.sleep(0.1)
        assert (await channel.load()).steps - asked.steps <= 3  # what was in flight, and the slot's end
        assert after.cached_blocks > 0

    run(served, body)
    served.healthy()


def test_a_cancelled_task_leaves_its_stream(served):
    served.steps.hold()

    async def body(channel):
        task = asyncio.create_task(ask(channel, long("r")))
        await until(channel, lambda load: load.running == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(channel, lambda load: load.running == 0)  # with no step that could have ended it
        served.steps.more()
        await until(channel, lambda load: load.free_blocks == load.total_blocks)

    run(served, body)


def test_a_gateway_that_hangs_up_takes_its_requests_along(served):
    served.steps.hold()

    async def body(channel):
        other = served.raw()
        for i in range(5):
            other.send("add", long(f"r{i}"))
        await all_run(served, channel, 5)
        other.close()
        await until(channel, lambda load: load.running == 0)  # with no step that could have ended them
        served.steps.more()
        await until(channel, lambda load: load.free_blocks == load.total_blocks)

    run(served, body)
    served.healthy()


def test_a_gateway_that_does_not_read_holds_nobody_up(served, monkeypatch):
    monkeypatch.setattr(module, "STALLED_SECONDS", 600.0)  # others need not wait until it is given up
    served.steps.hold()

    async def body(channel):
        other = served.raw()
        other.detach().setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        for i in range(30):
            other.send(
                "add", replace(long(f"r{i}"), params=SamplingParams(max_tokens=1500, seed=i, logprobs=20))
            )
        await all_run(served, channel, 30)
        served.steps.more()
        replies = await ask_all(channel, [greedy(f"mine{i}", (1, 2, i), 10) for i in range(5)], AT_ONCE)
        assert all(len(reply.tokens) == 10 for reply in replies)
        other.close()
        await until(channel, lambda load: load.running == 0)

    run(served, body)


def test_a_gateway_that_reads_nothing_is_hung_up_on_at_a_bound(served):
    """What waits for it does not grow for ever; its requests end, and others go on."""

    async def body(channel):
        mine = asyncio.create_task(ask(channel, greedy("mine", (1, 2), 300)))
        served.limit = 20_000  # from now on: whoever reads may be late by more than that
        other = served.raw()
        theirs = served.connections[-1].detach()
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)
        for i in range(8):
            params = SamplingParams(max_tokens=1500, seed=i, logprobs=20)
            other.send("add", replace(long(f"r{i}"), params=params))
        async with asyncio.timeout(AT_ONCE):
            while theirs.fileno() != -1:  # until the engine hangs up
                await asyncio.sleep(0.005)
        assert len((await mine)[0].tokens) == 300
        await until(channel, lambda load: load.running == load.waiting == 0)
        other.close()

    run(served, body)
    served.healthy()


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the kernel does not offer it")
def test_a_vanished_host_is_missed_at_both_ends(served):
    """Even when something was under way to it: else the kernel tries for a quarter of an hour."""

    def limit(sock: socket.socket) -> float:
        return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) / 1000

    async def body(channel):
        assert limit(channel._writer.get_extra_info("socket")) == LOST_SECONDS

    run(served, body)
    other = served.raw()
    assert limit(served.connections[-1].detach()) == STALLED_SECONDS
    other.close()


@pytest.mark.parametrize(
    "nonsense",
    [
        encode("welcome", "me"),
        encode("plan", 1),
        encode("result", 1),
        b"garbage",
        encode("hello", Hello("gateway", TOKEN)),
        encode("lost", "you are"),
        encode("beat", 3),
    ],
    ids=lambda raw: raw[:12],
)
def test_nonsense_ends_its_own_gateway_alone(served, nonsense):
    served.steps.hold()

    async def body(channel):
        mine = asyncio.create_task(ask(channel, greedy("mine", (1, 2), 300)))
        other = served.raw()
        other.send("add", long("theirs"))
        await all_run(served, channel, 2)
        other.detach().sendall(LENGTH.pack(len(nonsense)) + nonsense)
        other.set_timeout(AT_ONCE)
        with pytest.raises(Exception, match=r"gone|hung up"):
            while True:
                other.receive()
        await until(channel, lambda load: load.running == 1)
        served.steps.more()
        reply, _ = await mine
        assert len(reply.tokens) == 300
        await until(channel, lambda load: load.running == 0)

    run(served, body)


def test_ids_of_two_gateways_do_not_meet(served):
    """The same id twice, and an abort that names another's request."""
    served.steps.hold()

    async def body(channel):
        other = await served.connect()
        mine = asyncio.create_task(ask(channel, greedy("same", (1, 2), 300)))
        theirs = asyncio.create_task(ask(other, greedy("same", (5, 6, 7), 200)))
        await all_run(served, channel, 2)
        stranger = served.raw()
        for reason in (FinishReason.CANCELLED, FinishReason.STOP):
            stranger.send("abort", Abort("same", reason))
            stranger.send("abort", Abort("1/same", reason))
            stranger.send("abort", Abort("unknown", reason, 5))
        stranger.send("get_load", 1)
        kind, (_, load) = await asyncio.to_thread(stranger.receive)  # answered after the aborts
        assert (kind, load.running) == ("load", 2)
        served.steps.more()
        (a, _), (b, _) = await mine, await theirs
        assert (len(a.tokens), len(b.tokens)) == (300, 200) and a.tokens[:200] != b.tokens
        stranger.close()
        await other.close()

    run(served, body)


def test_an_id_in_use_is_refused_and_the_first_goes_on(served):
    served.steps.hold()

    async def body(channel):
        first = asyncio.create_task(ask(channel, greedy("r", (1, 2), 200)))
        await until(channel, lambda load: load.running == 1)
        with pytest.raises(InvalidArgument, match="request_id"):
            await ask(channel, greedy("r", (1, 2), 5))
        served.steps.more()
        reply, _ = await first
        assert len(reply.tokens) == 200
        again, _ = await ask(channel, greedy("r", (1, 2), 5))  # free again
        assert again.tokens == reply.tokens[:5]

    run(served, body)
    served.healthy()


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (greedy("r", (), 5), "prompt"),
        (greedy("r", (1,) * 2048, 5), "prompt"),
        (greedy("r", (1, 384), 5), "prompt"),
        (greedy("r", (1, -1), 5), "prompt"),
        (greedy("r", (1,), 0), "max_tokens"),
        (greedy("r", (1,), -7), "max_tokens"),
        (Request("r", (1,), SamplingParams(max_tokens=5, temperature=1.0)), "seed"),
        (Request("r", (1,), SamplingParams(max_tokens=5, seed=1, logit_bias=((999, 1.0),))), None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_refusal_is_the_same_error_here(served, request_, field):
    async def body(channel):
        ahead = asyncio.create_task(ask(channel, greedy("ahead", (1, 2), 100)))
        with pytest.raises(InvalidArgument) as caught:
            await ask(channel, request_)
        if field is not None:
            assert caught.value.field == field
        with pytest.raises(InvalidArgument) as locally:
            await ask(served.engine.client, request_)
        assert str(locally.value) == str(caught.value)
        reply, _ = await ahead
        assert len(reply.tokens) == 100
        await until(channel, lambda load: load.running == load.waiting == 0)

    run(served, body)


@pytest.mark.parametrize("keep", [-1, 10_000, 2**63])
def test_a_stop_that_makes_no_sense_harms_nobody(served, keep):
    async def body(channel):
        stream = channel.generate(greedy("r", (1, 2), 200))
        await anext(stream)
        await channel.stop_at("r", keep)
        await channel.stop_at("never was", keep)
        seen = [output async for output in stream]
        assert isinstance(seen[-1], Finished)
        assert (await channel.load()).running == 0

    run(served, body)
    served.healthy()


def test_a_stop_ends_a_stream_at_a_token(served):
    served.steps.hold(after=20)  # far enough for what is seen below, and no further

    async def body(channel):
        seen = []
        async for output in channel.generate(long("r")):
            seen.append(output)
            if len(seen) == 6:
                await channel.stop_at("r", 4)
        end = seen[-1]
        assert (end.reason, end.completion_tokens) == (FinishReason.STOP, 4)
        assert all(isinstance(output, TokenOutput) for output in seen[:-1])

    run(served, body)


def test_a_full_queue_says_when_to_come_again(path):
    served = Served(path, max_num_seqs=1, max_waiting=2)
    served.steps.hold()

    async def body(channel):
        tasks = []
        for n in range(3):  # one runs, two wait
            tasks.append(asyncio.create_task(ask(channel, long(f"r{n}"))))
            await until(channel, lambda load, n=n: load.running + load.waiting == n + 1)
        with pytest.raises(QueueFull) as caught:
            await ask(channel, long("one too many"))
        assert 0 < caught.value.retry_after <= 60
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await until(channel, lambda load: load.running + load.waiting == 0)
        served.steps.more()
        await ask(channel, greedy("again", (1,), 3))

    try:
        run(served, body)
    finally:
        served.close()


def test_a_deadline_passes_through(served):
    served.steps.hold(after=5)  # nothing else will end it

    async def body(channel):
        started = time.monotonic()
        _, end = await ask(channel, replace(long("r"), deadline=0.15))
        assert end.reason is FinishReason.DEADLINE
        assert 0.1 < time.monotonic() - started < AT_ONCE
        _, end = await ask(channel, replace(long("late"), deadline=-1.0))
        assert (end.reason, end.completion_tokens) == (FinishReason.DEADLINE, 0)

    run(served, body)


@pytest.mark.parametrize("how", ["stopped", "cut"])
def test_an_engine_that_goes_ends_every_stream(path, how):
    served = Served(path)
    served.steps.hold()
    live: list = []

    async def body(channel):
        tasks = [asyncio.create_task(ask(channel, long(f"r{i}"))) for i in range(4)]
        await all_run(served, channel, 4)
        if how == "stopped":
            served.engine.loop.ranks_lost("a rank was lost")
        else:
            for connection in served.connections:  # as when the engine's process dies
                connection.close()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        for end in ends:
            if isinstance(end, tuple):
                assert end[1].reason is FinishReason.ERROR and "a rank was lost" in end[1].detail
            else:
                assert isinstance(end, Unavailable)
        live.extend(ends)
        with pytest.raises(Unavailable):
            await ask(channel, long("later"))

    try:
        run(served, body)
        assert len(live) == 4
    finally:
        served.close()


def test_after_the_engines_end_everything_is_unavailable(path):
    served = Served(path)

    async def body(channel):
        await asyncio.to_thread(served.engine.close)
        for _ in range(2):
            with pytest.raises(Unavailable):
                await ask(channel, long("r"))
            with pytest.raises(Unavailable):
                await channel.load()
        with pytest.raises(Unavailable):
            await ask(served.engine.client, long("r"))
        with pytest.raises(Unavailable):
            await served.engine.client.load()

    run(served, body)
    served.close()


def test_closing_a_channel_ends_its_streams(served):
    served.steps.hold()

    async def body(channel):
        task = asyncio.create_task(ask(channel, long("r")))
        await until(channel, lambda load: load.running == 1)
        await channel.close()
        with pytest.raises(Unavailable):
            await task
        with pytest.raises(Unavailable):
            await channel.info()
        assert await asyncio.wait_for(channel.wait_lost(), AT_ONCE)

    run(served, body)

    async def freed(channel):
        await until(channel, lambda load: load.running == 0)  # with no step that could have ended it

    run(served, freed)


@pytest.mark.parametrize("token", ["", "another", TOKEN + " "])
def test_a_wrong_token_is_unavailable(served, token):
    async def main():
        with pytest.raises(Unavailable, match="does not answer"):
            await EngineChannel.connect(served.listener.host, served.listener.port, token)

    asyncio.run(asyncio.wait_for(main(), AT_ONCE))


def test_nobody_there_is_unavailable(served):
    async def main():
        with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1 does not answer"):
            await EngineChannel.connect("127.0.0.1", 1, TOKEN)

    asyncio.run(asyncio.wait_for(main(), AT_ONCE))


@pytest.mark.parametrize("how", ["silent", "garbage", "half", "stranger", "given up"])
def test_a_channel_that_cannot_be_had_leaves_no_socket(how):
    """A stopped engine, whose kernel accepts all the same, and ends of every other kind."""
    answers = {
        "silent": b"",
        "garbage": LENGTH.pack(4) + b"abcd",
        "half": LENGTH.pack(100) + b"only this",
        "stranger": LENGTH.pack(len(encode("beat", 1))) + encode("beat", 1),
        "given up": b"",
    }
    timeout = 0.3 if how in ("silent", "half") else AT_ONCE  # that the others are not to wait for

    async def main(server: socket.socket) -> None:
        host, port = server.getsockname()
        connecting = asyncio.create_task(EngineChannel.connect(host, port, TOKEN, timeout=timeout))
        near, _ = await asyncio.to_thread(server.accept)
        with near:
            near.settimeout(AT_ONCE)
            with contextlib.suppress(ConnectionError):  # the other end may have given up by now
                near.sendall(answers[how])
            if how == "given up":
                connecting.cancel()
            error = (await asyncio.gather(connecting, return_exceptions=True))[0]
            if how == "given up":
                assert isinstance(error, asyncio.CancelledError)
            else:
                assert isinstance(error, Unavailable) and f"{host}:{port}" in str(error)
            if how in ("silent", "half"):
                assert str(error) == f"the engine at {host}:{port} does not answer within 0.3 s"

            def drained() -> bool:
                while near.recv(1 << 16):
                    pass
                return True

            with contextlib.suppress(ConnectionResetError):
                assert await asyncio.to_thread(drained)

    with socket.create_server(("127.0.0.1", 0)) as server:
        asyncio.run(asyncio.wait_for(main(server), 2 * AT_ONCE))
