"""Replicas that are lost and built again, without Ray: scripted engines, and real ones in this process."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from functools import partial

import pytest

from runtime.commands import engines
from runtime.commands.engines import start_engine
from runtime.commands.supervisor import Supervised
from runtime.config import EngineConfig, ModelConfig, ParallelConfig, ServeConfig
from runtime.errors import InvalidArgument, NotEnough, Unavailable
from runtime.loop import EngineLoop
from runtime.types import Branch, EngineInfo, Finished, FinishReason, Request, SamplingParams, TokenOutput
from tests.replies import ask
from tests.rule.engines import assert_same, lose_ranks, plain_replies
from tests.server.scripted import PieceTokenizer, ScriptedEngine, info_for

INFO = info_for(PieceTokenizer())
TEXT = b"the quick brown fox jumps"
# Its watch and its readers may hear of a loss in the same turn of the event loop, and then either is quoted.
DEAD = "a rank died"
LONG = 60.0  # seconds for what comes at once, unless it is broken or the machine is slow


class Made:
    """An engine that a test can kill."""

    def __init__(self, info: EngineInfo = INFO):
        self.info = info
        self.engine = ScriptedEngine(TEXT, pace=0.005)
        self.closed = False
        self.mute = False
        self.dead: asyncio.Event | None = None

    @asynccontextmanager
    async def connect(self):
        self.dead = asyncio.Event()
        yield self
        self.dead.set()  # as a channel does: who waits learns that it was closed

    async def generate(self, request):
        async with aclosing(self.engine.generate(request)) as outputs:
            async for output in outputs:
                if self.mute:
                    await self.dead.wait()
                if self.dead.is_set():
                    raise Unavailable(DEAD)
                yield output

    async def load(self):
        if self.mute:
            await asyncio.Event().wait()
        return await self.engine.load()

    async def lost(self, client) -> str:
        await self.dead.wait()
        return DEAD

    def close(self) -> None:
        assert not self.closed
        self.closed = True


class Yard:
    """Builds what a test says: engines, or what is to be raised."""

    def __init__(self, *plan):
        self.plan = list(plan)
        self.made: list[Made] = []
        self.log: list[str] = []

    def __call__(self, say) -> Made:
        say("building")
        what = self.plan.pop(0) if self.plan else None
        if isinstance(what, BaseException):
            raise what
        made = what or Made()
        self.made.append(made)
        return made

    def supervised(self, replicas=1, rebuilds=2, **options) -> Supervised:
        options = {"log": self.log.append, "first_wait": 0.01} | options
        return Supervised(self, replicas, rebuilds=rebuilds, **options)


def asked(name="r") -> Request:
    return Request(name, (1,), SamplingParams(max_tokens=20, seed=1), branches=(Branch(),))


async def reply(client, name="r", at=None, then=lambda: None) -> bytes:
    """The tokens of a reply; `then` is called when `at` of them have come."""
    tokens = []
    async with asyncio.timeout(LONG):
        async for output in client.generate(asked(name)):
            if isinstance(output, TokenOutput):
                tokens.append(output.token)
                if len(tokens) == at:
                    then()
            else:
                assert output.reason is FinishReason.LENGTH, output
    return bytes(tokens)


async def until(condition) -> None:
    async with asyncio.timeout(LONG):
        while not condition():
            await asyncio.sleep(0.005)


def run(engine: Supervised, body) -> None:
    async def go():
        async with engine.connect() as client:
            await body(client)

    try:
        asyncio.run(go())
    finally:
        engine.close()


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_lost_replica_is_built_again_and_used(replicas):
    yard = Yard()
    engine = yard.supervised(replicas)

    async def body(client):
        for number in range(2):
            count = len(yard.made)
            # All that run are killed: with two replicas one after the other, and both come back.
            kill = [made for made in yard.made if not made.closed]
            together = [reply(client, f"{number}.{i}", 5, kill[i].dead.set) for i in range(replicas)]
            assert await asyncio.gather(*together) == [TEXT[:20]] * replicas
            await until(lambda count=count: len(yard.made) == count + replicas)
            await until(lambda: all(seat.client for seat in client._seats))
        assert await reply(client) == TEXT[:20]

    run(engine, body)
    assert all(made.closed for made in yard.made)
    for index in range(replicas):
        mine = [line for line in yard.log if f"replica {index}" in line]
        assert mine[0] == f"replica {index} is lost: {DEAD}"
        assert mine[1] == f"rebuilding replica {index} (try 1 of 2)"
        assert mine[2].startswith(f"replica {index} serves again ") and mine[2].endswith("(here; there)")
        assert mine[4] == f"rebuilding replica {index} (try 2 of 2)"


def test_what_cannot_be_built_is_given_up():
    problem = NotEnough("no GPUs are left")
    yard = Yard(None, None, problem, ValueError("odd"))
    engine = yard.supervised(2)

    async def body(client):
        yard.made[1].dead.set()
        await until(lambda: "replica 1 was not rebuilt: ValueError: odd" in yard.log)
        assert "replica 1 was not rebuilt: no GPUs are left" in yard.log
        assert await reply(client) == TEXT[:20]
        lost = asyncio.create_task(engine.lost(client))
        await asyncio.sleep(0.02)
        assert not lost.done(), "one still serves"
        yard.plan = [problem, problem]
        with pytest.raises(AssertionError, match=DEAD):
            await reply(client, "last", 3, yard.made[0].dead.set)
        assert await asyncio.wait_for(lost, LONG) == DEAD
        with pytest.raises(Unavailable, match=DEAD):
            await reply(client, "later")

    run(engine, body)
    assert len(yard.made) == 2 and all(made.closed for made in yard.made)


def test_without_rebuilds_a_loss_is_final():
    yard = Yard()
    engine = yard.supervised(2, rebuilds=0)

    async def body(client):
        assert await reply(client, "r", 3, yard.made[0].dead.set) == TEXT[:20]
        yard.made[1].dead.set()
        assert await asyncio.wait_for(engine.lost(client), LONG) == DEAD

    run(engine, body)
    assert [line for line in yard.log if "rebuild" in line] == []


def test_one_that_comes_back_another_is_not_used():
    yard = Yard(None, Made(replace(INFO, numerics="other")))
    engine = yard.supervised()

    async def body(client):
        assert await reply(client, "r", 3, yard.made[0].dead.set) == TEXT[:20]

    run(engine, body)
    assert "replica 0 is lost: replica 0 has numerics 'other', the others 'test-numerics'" in yard.log
    assert yard.made[1].engine.requests == [] and len(yard.made) == 3
    assert all(made.closed for made in yard.made)


@pytest.mark.parametrize("together", [False, True])
def test_a_first_build_that_fails_leaves_nothing(together):
    yard = Yard(None, NotEnough("memory"))
    with pytest.raises(NotEnough, match="memory"):
        yard.supervised(2, together=together)
    assert [made.closed for made in yard.made] == [True]
    yard = Yard(None, Made(replace(INFO, numerics="other")))
    with pytest.raises(Unavailable, match="do not compute alike"):
        yard.supervised(2, together=together)
    assert [made.closed for made in yard.made] == [True, True]


def told_to_end(say) -> bool:
    """Builds until it is abandoned, or, a failure, for a minute."""
    until = time.monotonic() + LONG
    while time.monotonic() < until:
        try:
            say("loading")
        except BaseException:
            return True
        time.sleep(0.005)
    return False


def test_the_others_are_built_together_and_a_failure_ends_them_all():
    began, ended = threading.Barrier(2), []

    def build(say):
        say("loading")
        if not yard.made:  # the first, which is built alone
            return yard(say)
        if began.wait(LONG) == 0:
            raise NotEnough("memory")
        ended.append(told_to_end(say))

    yard = Yard()
    with pytest.raises(NotEnough, match="memory"):
        Supervised(build, 3, rebuilds=0, together=True)
    assert ended == [True] and yard.made[0].closed


def test_an_engine_that_falls_silent_is_lost():
    """As when its network is cut: nobody says so."""
    yard = Yard()
    engine = yard.supervised(2, silence=0.1)

    async def body(client):
        yard.made[0].mute = True
        assert await reply(client) == TEXT[:20]
        await until(lambda: any("replica 0 serves again" in line for line in yard.log))

    run(engine, body)
    assert yard.log[0] == "replica 0 is lost: its engine has not answered for 0.1 s"


def test_a_defect_at_the_start_is_told():
    """It does not leave the server waiting for a replica that nobody looks after."""

    class Odd(Made):
        def connect(self):
            raise ZeroDivisionError("odd")

    engine = Yard(Odd(), None).supervised(2)

    async def body(client):
        assert await reply(client) == TEXT[:20]  # by the other
        with pytest.raises(ZeroDivisionError):
            await asyncio.wait_for(engine.lost(client), LONG)

    run(engine, body)


def test_stopping_abandons_a_build():
    """The server ends at once, not when a lost replica stands again."""
    began, ended, yard = threading.Event(), [], Yard()

    def build(say):
        if not yard.made:
            return yard(say)
        began.set()
        ended.append(told_to_end(say))
        raise NotEnough("abandoned")

    engine = Supervised(build, 1, rebuilds=3, log=yard.log.append)

    async def body(client):
        yard.made[0].dead.set()
        assert await asyncio.to_thread(began.wait, LONG)

    run(engine, body)
    assert ended == [True], "the build was waited for"
    assert yard.log[-1].startswith("rebuilding replica 0")


def test_one_that_is_built_when_all_stops_is_stopped_too():
    began, yard = threading.Event(), Yard()

    def build(say):
        if yard.made:
            began.set()
            assert told_to_end(say)  # and goes on: it is all but done
        return yard(lambda text: None)

    engine = Supervised(build, 1, rebuilds=3, log=yard.log.append)

    async def body(client):
        yard.made[0].dead.set()
        assert await asyncio.to_thread(began.wait, LONG)

    run(engine, body)
    assert [made.closed for made in yard.made] == [True, True]


# ---- real engines -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(tiny):
    return ServeConfig(ModelConfig(str(tiny)), EngineConfig(block_size=16), ParallelConfig(threads=1))


@pytest.fixture
def log(monkeypatch) -> list[str]:
    """What engines that start say of their losses. One whose thread is held up for seconds is none here."""
    lines: list[str] = []
    monkeypatch.setattr(engines, "Supervised", partial(Supervised, silence=2 * LONG, log=lines.append))
    return lines


def lose_ranks_at_work(monkeypatch, name: str, *lives: int) -> None:
    """Whichever engine answers a request loses its ranks, after so many steps of it there. Of two that are
    built at once, either may be asked first."""
    plain, left = EngineLoop._step_finished, list(lives)

    def step_finished(loop: EngineLoop, result) -> None:
        at_work = name in loop._deliver
        plain(loop, result)
        if at_work and left:
            left[0] -= 1
            if not left[0]:
                del left[0]
                loop._ranks_lost("killed")

    monkeypatch.setattr(EngineLoop, "_step_finished", step_finished)


@pytest.mark.parametrize(("replicas", "lose"), [(1, "any"), (1, "at work"), (2, "at work")])
def test_real_ranks_that_are_lost_again_and_again(config, replicas, lose, log, monkeypatch):
    """One reply over three losses: the one of a plain run, every logprob too. Where any step counts, the
    second engine is lost in its first step of all, before it is connected."""
    params = SamplingParams(max_tokens=40, temperature=1.1, seed=4, logprobs=2, presence_penalty=0.5)
    request = Request("r", tuple(range(3, 40)), params)
    [want] = plain_replies(config.model.path, [request])
    config = replace(config, parallel=replace(config.parallel, replicas=replicas))

    def losses() -> int:
        return sum("is lost: killed" in line for line in log)

    async def go(engine):
        async with engine.connect() as client:
            async with asyncio.timeout(LONG):
                got, end = await ask(client, request)
            assert client.moved == 3
            assert_same([got], [want])
            assert isinstance(end, Finished) and end.completion_tokens == 40
            await until(lambda: losses() >= 3)  # the reply may be told of a loss before the log is

    with start_engine(config, local=True, rebuilds=3) as engine:
        assert engine.info.total_blocks > 0
        if lose == "any":
            lose_ranks(monkeypatch, 10, 1, 20)
        else:
            lose_ranks_at_work(monkeypatch, "r", 10, 1, 20)
        asyncio.run(go(engine))
    assert losses() == 3


def test_a_model_that_was_exchanged_is_not_loaded(config, tiny, tmp_path, log):
    """What goes on must not go on with other weights."""
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny.read_bytes())
    config = replace(config, model=ModelConfig(str(path)))

    async def go(engine):
        async with engine.connect() as client:
            os.utime(path, ns=(1, 1))
            loop = client._seats[0].client._loop
            await until(lambda: loop.on_lost.__name__ != "<lambda>")  # from when on it is watched
            loop.ranks_lost("killed")
            assert await asyncio.wait_for(engine.lost(client), LONG) == "killed"

    with start_engine(config, local=True, rebuilds=1) as engine:
        asyncio.run(go(engine))
    assert any("replica 0 was not rebuilt: the model's files are not those" in line for line in log)


def test_cores_are_divided(config, monkeypatch):
    monkeypatch.setattr(engines.os, "cpu_count", lambda: 16)
    parallel = ParallelConfig(tp=2, replicas=2)
    divided = engines._divided(replace(config, parallel=parallel), 1)
    assert divided.parallel.threads == 4
    assert engines._divided(replace(config, parallel=parallel), 2).parallel.threads == 8
    given = replace(config, parallel=replace(parallel, threads=3))
    assert engines._divided(given, 1) is given
    alone = replace(config, parallel=ParallelConfig(tp=2))
    assert engines._divided(alone, 1) is alone


def test_no_replicas_are_refused(config):
    from runtime.commands.engines import open_front, preview

    config = replace(config, parallel=ParallelConfig(replicas=0))
    with pytest.raises(InvalidArgument, match="replicas: must be at least 1"):
        preview(open_front(config.model, chat=False), config)
