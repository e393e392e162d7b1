"""Engines that are lost in the middle of replies: what comes out is what one engine would have said."""

from __future__ import annotations

import asyncio
import itertools
from contextlib import aclosing
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import InvalidArgument, QueueFull, Unavailable
from runtime.server.pipeline import Completion, Pipeline
from runtime.server.replicas import MOST_STALLED, Replicas, joint
from runtime.types import (
    Branch,
    Finished,
    FinishReason,
    Load,
    Request,
    SamplingParams,
    ScoreOutput,
)
from tests.replies import ask_choices
from tests.rule.engines import assert_same, check_idle, engine, lose_ranks, plain_replies
from tests.rule.requests import named, requests
from tests.server import leaping
from tests.server.harness import serving
from tests.server.scripted import EOS, PieceTokenizer, ScriptedEngine, info_for
from tramontane import Client

INFO = info_for(PieceTokenizer())
TEXT = b"the quick brown fox jumps"


@dataclass
class Mortal(ScriptedEngine):
    """Is lost after so many outputs: says so itself, or is just gone."""

    after: int | None = None
    silent: bool = False

    async def generate(self, request):
        left = itertools.count() if self.after is None else range(self.after)
        async with aclosing(super().generate(request)) as outputs:
            for _ in left:
                output = await anext(outputs, None)
                if output is None:
                    return
                yield output
                if isinstance(output, Finished) and output.last:
                    return
        if self.silent:
            raise Unavailable("the engine is gone")
        for branch in request.branches:
            end = Finished(request.request_id, FinishReason.ERROR, 3, 0, 0, detail="a rank")
            yield replace(end, choice=branch.choice, last=branch is request.branches[-1])


def over(*engines, returning=False, patience=5.0) -> Replicas:
    made = Replicas([INFO] * len(engines), returning=returning, patience=patience)
    for index, each in enumerate(engines):
        made.put(index, each, INFO)
    return made


async def collect(client, request: Request) -> list:
    return [output async for output in client.generate(request)]


def by_choice(outputs: list) -> dict[int, list]:
    """Which choice ends last may differ, so `last` is checked here and left out."""
    assert [o.last for o in outputs if isinstance(o, Finished)][:-1] == [False] * (
        sum(isinstance(o, Finished) for o in outputs) - 1
    )
    assert outputs[-1].last
    found: dict[int, list] = {}
    for output in outputs:
        if isinstance(output, Finished):
            output = replace(output, last=True)
        found.setdefault(output.choice, []).append(output)
    return found


def asked(name="r", n=1, stop_ids=(), **params) -> Request:
    params = SamplingParams(**{"max_tokens": 12, "seed": 3, "logprobs": 1, **params})
    return Request(name, (1, 2, 3), params, stop_ids, branches=tuple(Branch(c) for c in range(n)))


@settings(deadline=None, max_examples=120)
@given(
    st.integers(1, 3),
    st.lists(st.tuples(st.integers(0, 40), st.booleans()), min_size=1, max_size=MOST_STALLED - 1),
    st.integers(1, 14),
    st.integers(0, 6),
    st.sampled_from([(), (ord("q"),), (ord("k"), ord("u"))]),
)
def test_losses_leave_no_trace(n, deaths, max_tokens, min_tokens, stop_ids):
    """Any number of outputs from each of several that die, then one that lives: every output as if nothing
    had happened, between a reply's last token and its end too."""

    async def go():
        request = asked(n=n, max_tokens=max_tokens, min_tokens=min_tokens, stop_ids=stop_ids)
        want = await collect(ScriptedEngine(TEXT), request)
        mortals = [Mortal(TEXT, after=after, silent=silent) for after, silent in deaths]
        client = over(*mortals, ScriptedEngine(TEXT))
        got = await collect(client, request)
        assert by_choice(got) == by_choice(want)
        assert client._running == {} and [client._router.work(i) for i in range(len(deaths))] == [0] * len(
            deaths
        )
        assert client.moved <= len(deaths)

    asyncio.run(go())


def test_a_reply_that_had_ended_is_not_asked_for_again():
    async def go():
        # Choice 1 ends by itself; choice 0 lacks its Finished alone, and nobody needs to be asked for that.
        tokens = [7, 8, 9, 4, 5]
        dies, lives = Mortal(tokens, after=6), ScriptedEngine(tokens)
        client = over(dies, lives)
        outputs = await collect(client, asked(n=2, stop_ids=(9,), max_tokens=3))
        ends = {o.choice: o for o in outputs if isinstance(o, Finished)}
        assert {c: (o.reason, o.completion_tokens, o.stop_token) for c, o in ends.items()} == {
            0: (FinishReason.STOP, 3, 9),
            1: (FinishReason.STOP, 2, 9),
        }
        assert lives.requests == []

    asyncio.run(go())


def test_what_engines_counted_is_counted_together():
    class Speculative(ScriptedEngine):
        async def generate(self, request):
            async with aclosing(super().generate(request)) as outputs:
                async for output in outputs:
                    if isinstance(output, Finished):
                        output = replace(output, drafted_tokens=10, accepted_tokens=4)
                    yield output

    async def go():
        client = over(Speculative(TEXT, dies=4, cached=2), Speculative(TEXT, cached=3))
        *_, end = await collect(client, asked())
        assert (end.drafted_tokens, end.accepted_tokens) == (20, 8)
        assert end.cached_tokens == 2, "of its first admission"
        assert (end.prompt_tokens, end.completion_tokens) == (3, 12)

    asyncio.run(go())


@settings(deadline=None, max_examples=80)
@given(
    st.integers(1, 3),
    st.integers(0, 30),
    st.booleans(),
    st.lists(st.text("qbrownfx ", min_size=1, max_size=3), max_size=2),
    st.integers(0, 3),
)
def test_text_and_stop_strings_go_on(n, after, silent, stops, overrun):
    """Through the gateway's pipeline: the engine may be lost before it hears of a stop, or after."""

    async def pieces(client):
        pipeline = Pipeline(PieceTokenizer(), None, client, INFO)
        params = SamplingParams(max_tokens=20, seed=1, stop=tuple(stops), logprobs=0)
        outputs = [p async for p in pipeline.run(Completion("r", text="x", params=params, n=n))]
        found = {c: [p for p in outputs if p.choice == c] for c in range(n)}
        return {
            c: (
                "".join(p.text for p in mine),
                [t for p in mine for t in p.token_ids],
                [e for p in mine for e in p.logprobs],
                mine[-1].final,
            )
            for c, mine in found.items()
        }

    async def go():
        want = await pieces(ScriptedEngine(TEXT))
        mortal = Mortal(TEXT, after=after, silent=silent, overrun=overrun)
        assert await pieces(over(mortal, ScriptedEngine(TEXT))) == want

    asyncio.run(go())


@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize("after", range(5))
def test_scores_go_on(after, silent):
    async def go():
        request = replace(asked(), prompt=tuple(range(8)), scores=True)
        want = await collect(ScriptedEngine(), request)
        mortal, lives = Mortal(after=after, silent=silent), ScriptedEngine()
        got = await collect(over(mortal, lives), request)
        assert got == want
        assert len(lives.requests) == (after < 4), "all scores but no end: nobody is asked"

    asyncio.run(go())


def test_scores_that_come_in_other_portions_are_passed_on_once():
    class Whole(ScriptedEngine):
        async def _outputs(self, request):
            *scored, end = [o async for o in super()._outputs(request)]
            yield ScoreOutput(request.request_id, 1, tuple(s for o in scored for s in o.scores))
            yield end

    async def go():
        request = replace(asked(), prompt=tuple(range(8)), scores=True)
        want = await collect(ScriptedEngine(), request)
        got = await collect(over(Mortal(after=2), Whole()), request)
        assert [o.first for o in got[:-1]] == [1, 3, 5]
        assert [s for o in got[:-1] for s in o.scores] == [s for o in want[:-1] for s in o.scores]

    asyncio.run(go())


def test_where_nobody_is_left_streams_end():
    async def go():
        client = over(Mortal(TEXT, after=3), Mortal(TEXT, after=2))
        *tokens, end = await collect(client, asked())
        assert [o.index for o in tokens] == [0, 1, 2, 3, 4]
        assert (end.reason, end.completion_tokens, end.detail) == (FinishReason.ERROR, 5, "a rank")
        with pytest.raises(Unavailable, match="a rank"):
            await collect(client, asked("later"))
        with pytest.raises(Unavailable, match="a rank"):
            await client.load()
        await asyncio.wait_for(client.until(there=False), 60)
        assert await asyncio.wait_for(client.fallen(1), 60) == "a rank"

    asyncio.run(go())


def test_a_stream_waits_for_the_one_that_comes_back():
    async def go():
        client = over(Mortal(TEXT, after=3), returning=True)
        stream = client.generate(asked())
        first = [await anext(stream) for _ in range(3)]
        rest = asyncio.create_task(collect_rest(stream))
        await asyncio.sleep(0.05)
        assert not rest.done()
        client.put(0, ScriptedEngine(TEXT), INFO)
        want = await collect(ScriptedEngine(TEXT), asked())
        assert [*first, *await asyncio.wait_for(rest, 2)] == want

    async def collect_rest(stream):
        return [output async for output in stream]

    leaping.run(go())


@pytest.mark.parametrize("why", ["given up", "too long", "deadline"])
def test_nobody_waits_for_ever(why):
    async def go():
        client = over(Mortal(TEXT, after=3), returning=True, patience=0.1 if why == "too long" else 60.0)
        request = replace(asked(), deadline=0.1 if why == "deadline" else None)
        task = asyncio.create_task(collect(client, request))
        await asyncio.sleep(0.02)
        if why == "given up":
            client.give_up(0)
        *_, end = await asyncio.wait_for(task, 5)
        assert asyncio.get_running_loop().time() == pytest.approx(0.02 if why == "given up" else 0.1)
        assert end.completion_tokens == 3
        assert end.reason is (FinishReason.DEADLINE if why == "deadline" else FinishReason.ERROR)
        # One that has not begun is refused, or its deadline comes.
        task = asyncio.create_task(collect(client, replace(request, request_id="new")))
        if why == "deadline":
            [end] = await asyncio.wait_for(task, 5)
            assert (end.reason, end.completion_tokens) == (FinishReason.DEADLINE, 0)
        else:
            with pytest.raises(Unavailable):
                await asyncio.wait_for(task, 5)

    leaping.run(go())


def test_a_deadline_is_the_arrivals():
    async def go():
        lives = ScriptedEngine(TEXT, pace=0.05)
        client = over(Mortal(TEXT, after=2, pace=0.05), lives)
        *_, end = await asyncio.wait_for(collect(client, replace(asked(max_tokens=20), deadline=0.3)), 5)
        assert end.reason is FinishReason.DEADLINE and 5 <= end.completion_tokens <= 6
        assert lives.requests[0].deadline == pytest.approx(0.2)

    leaping.run(go())


def test_a_request_that_kills_every_replica_is_stopped():
    async def go():
        mortals = [Mortal(TEXT, after=0) for _ in range(MOST_STALLED + 2)]
        client = over(*mortals)
        [end] = await collect(client, asked())
        assert end.reason is FinishReason.ERROR
        assert sum(len(each.requests) for each in mortals) == 0 and client.moved == MOST_STALLED
        assert len(await collect(client, asked("other", max_tokens=1))) == 1

    asyncio.run(go())


def test_full_queues():
    full = [QueueFull(9.0), QueueFull(4.0)]

    async def go():
        lives = ScriptedEngine(TEXT)
        got = await collect(over(ScriptedEngine(refuse=full[0]), lives), asked())
        assert len(got) == 13 and len(lives.requests) == 1
        client = over(*(ScriptedEngine(refuse=error) for error in full))
        with pytest.raises(QueueFull) as refused:
            await collect(client, asked())
        assert refused.value.retry_after == 4.0
        # A stream under way is not refused: it waits for its turn.
        busy = ScriptedEngine(TEXT, refuse=QueueFull(0.05))
        client = over(Mortal(TEXT, after=3), busy)
        task = asyncio.create_task(collect(client, asked()))
        await asyncio.sleep(0.12)
        assert not task.done()
        busy.refuse = None
        assert len(await asyncio.wait_for(task, 5)) == 13

    leaping.run(go())


def test_what_is_wrong_with_a_request_is_not_the_replicas_fault():
    async def go():
        client = over(ScriptedEngine(refuse=InvalidArgument("prompt", "is bad")), ScriptedEngine(TEXT))
        with pytest.raises(InvalidArgument, match="prompt"):
            await collect(client, asked())
        await asyncio.wait_for(client.until(there=True), 60)
        hangs = over(ScriptedEngine(TEXT, hang=True))
        task = asyncio.create_task(collect(hangs, asked()))
        await asyncio.sleep(0.02)
        with pytest.raises(InvalidArgument, match="running"):
            await collect(hangs, asked())
        task.cancel()

    asyncio.run(go())


def test_closing_a_stream_ends_it_where_it_runs():
    async def go():
        lives = ScriptedEngine(TEXT)
        client = over(Mortal(TEXT, after=2), lives)
        async with aclosing(client.generate(asked())) as stream:
            for _ in range(5):
                await anext(stream)
        assert lives.aborted == ["r"] and lives.running == 0
        assert client._running == {} and client._router.work(1) == 0

    asyncio.run(go())


def test_load_is_the_sum_and_counters_outlive_their_engine():
    one = Load(1, 2, 3, 4, 5, 6, 70, 8, 9, 10, 11, 12)

    class Busy(ScriptedEngine):
        async def load(self):
            if self.refuse:
                raise self.refuse
            return one

    async def go():
        engines = [Busy(), Busy()]
        client = over(*engines)
        assert await client.load() == Load(2, 4, 6, 8, 10, 12, 140, 16, 18, 20, 22, 24)
        engines[0].refuse = Unavailable("gone")
        assert await client.load() == Load(1, 2, 3, 4, 5, 6, 140, 16, 18, 20, 22, 24)
        client.put(0, Busy(), INFO)
        assert await client.load() == Load(2, 4, 6, 8, 10, 12, 210, 24, 27, 30, 33, 36)

    asyncio.run(go())


def test_a_silent_replica_does_not_hide_the_others(monkeypatch):
    monkeypatch.setattr("runtime.server.replicas.LOAD_SECONDS", 0.05)

    class Mute(ScriptedEngine):
        async def load(self):
            if self.hang:
                await asyncio.Event().wait()
            return await super().load()

    async def go():
        engines = [Mute(), Mute()]
        client = over(*engines)
        before = await client.load()
        engines[0].hang = True
        engines[1].running = 5
        assert await client.load() == replace(before, running=5)

    leaping.run(go())


def test_work_is_shared():
    async def go():
        engines = [ScriptedEngine(TEXT, pace=0.01) for _ in range(3)]
        client = over(*engines)
        names = [replace(asked(f"r{i}"), prompt=(i, 1, 2)) for i in range(9)]
        await asyncio.gather(*(collect(client, request) for request in names))
        assert [len(each.requests) for each in engines] == [3, 3, 3]
        assert [client._router.work(i) for i in range(3)] == [0, 0, 0]

    leaping.run(go())


@pytest.mark.parametrize("field", ["numerics", "model", "vocab_size", "context_length"])
def test_one_that_computes_otherwise_is_not_used(field):
    other = replace(INFO, **{field: 5 if field in ("vocab_size", "context_length") else "other"})

    async def go():
        client = Replicas([INFO], returning=True)
        with pytest.raises(Unavailable, match="replica 0 has"):
            client.put(0, ScriptedEngine(), other)

    asyncio.run(go())


def test_several_as_one():
    small = replace(INFO, context_length=100, total_blocks=6)
    both = joint([INFO, small])
    assert (both.context_length, both.total_blocks, both.max_num_seqs) == (100, 70, 16)
    assert both.rank_nodes[2:] == ("replica 1, here", "replica 1, there")
    assert joint([INFO]) is INFO
    with pytest.raises(Unavailable, match=r"do not compute alike.*replica 1: other"):
        joint([INFO, replace(INFO, numerics="other")])


def test_a_client_that_never_resumes_sees_one_stream():
    """Over gRPC, with tokens of several choices in flight."""

    async def go():
        engines = [
            Mortal(TEXT, after=7, pace=0.002),
            Mortal(TEXT, after=9, silent=True),
            ScriptedEngine(TEXT),
        ]
        async with serving(over(*engines)) as running:

            def visit():
                with Client(running.target, resumes=0) as client:
                    return client.generate("hi", n=2, max_tokens=20, logprobs=1, seed=1, timeout=120)

            reply = await asyncio.to_thread(visit)
        assert [choice.text for choice in reply.choices] == [
            TEXT[:20].decode(),
            (TEXT[1:] + TEXT)[:20].decode(),
        ]
        assert reply.resumed == 0 and reply.usage.completion_tokens == 40
        assert all(len(each.requests) == 1 for each in engines)

    asyncio.run(go())


# ---- real engines -----------------------------------------------------------------------------------------


class Cut:
    """A real engine that is lost, to one gateway, after so many outputs of each request."""

    def __init__(self, client, after: int):
        self._client, self._after = client, after
        self.stop_at = client.stop_at

    async def generate(self, request):
        async with aclosing(self._client.generate(request)) as outputs:
            for _ in range(self._after):
                output = await anext(outputs)
                yield output
                if isinstance(output, Finished) and output.last:
                    return
        raise Unavailable("cut")


@pytest.fixture(scope="module")
def model(tiny):
    return tiny(context=128, ffn=352, heads=6, kv_heads=3, head_dim=32, hidden=192)


def test_a_model_that_gives_no_number_is_not_asked_again():
    engines = [ScriptedEngine(TEXT, ending=FinishReason.FAILED) for _ in range(2)]
    client = over(*engines)
    outputs = asyncio.run(collect(client, Request("r", (1,), SamplingParams(max_tokens=5, seed=1))))
    assert outputs[-1].reason is FinishReason.FAILED
    assert client.moved == 0 and sum(len(engine.requests) for engine in engines) == 1


def test_real_engines_cut_at_every_point(model):
    """Tokens, logprobs and alternatives are bit-equal to a plain run's, whatever tp the other has."""
    wanted = requests(384, 128, count=4, longest=10)
    plain = plain_replies(model, wanted)

    async def go(first, second):
        info, other = await first.info(), await second.info()
        cuts = 0
        for cut in range(11):
            client = Replicas([info, other], returning=False)
            for request, want in zip(named(wanted, f".{cut}"), plain, strict=True):
                client.put(0, Cut(first, cut), info)
                client.lose(1, "forget")  # else it is asked first, for what it has seen
                client.put(1, second, other)
                client._router._turns = [0, 1]
                [(got, end)] = await ask_choices(client, request)
                assert_same([got], [want])
                assert end.completion_tokens == len(want.tokens)
            cuts += client.moved
        # After the last token, its end is known without another engine.
        assert cuts == sum(len(want.tokens) for want in plain)

    with engine(model, block_size=16) as one, engine(model, tp=3, block_size=8, max_chunk=7) as two:
        asyncio.run(go(one.client, two.client))
        check_idle(one)
        check_idle(two)


def test_real_ranks_are_lost_in_company(model, monkeypatch):
    """Many streams on two replicas, one of which loses its ranks for good: every reply is the plain one."""
    wanted = requests(384, 128, count=8, longest=16)
    plain = plain_replies(model, wanted)

    async def go(first, second):
        info = await first.client.info()
        client = Replicas([info, info], returning=False)
        client.put(0, first.client, info)
        client.put(1, second.client, info)
        async with asyncio.timeout(240):
            found = await asyncio.gather(*(ask_choices(client, request) for request in wanted))
        assert_same([reply for [(reply, _)] in found], plain)
        assert client.moved > 0
        with pytest.raises(Unavailable, match="killed"):
            client.lose(1, "killed")
            await collect(client, wanted[0])

    with engine(model, block_size=16) as one, engine(model, block_size=16) as two:
        lose_ranks(monkeypatch, 5, of=one.loop)
        asyncio.run(go(one, two))
        check_idle(two)


def test_a_reply_is_as_long_as_it_was_to_be_after_a_loss():
    """Where the request leaves that open: it is settled once, by the shortest context of all."""

    async def go():
        infos = [replace(INFO, context_length=length) for length in (100, 14)]
        engines = [Mortal(TEXT, after=4), ScriptedEngine(TEXT)]
        client = Replicas(infos, returning=False)
        for index, (each, info) in enumerate(zip(engines, infos, strict=True)):
            client.put(index, each, info)
        pipeline = Pipeline(PieceTokenizer(), None, client, await client.info())
        pieces = [p async for p in pipeline.run(Completion("r", text="x"))]
        assert [len(each.requests) for each in engines] == [1, 1]
        assert {each.requests[0].params.max_tokens for each in engines} == {12}
        assert (pieces[0].begun.max_tokens, pieces[-1].final.finish_reason) == (12, FinishReason.LENGTH)
        assert bytes(t for p in pieces for t in p.token_ids) == TEXT[:12]

    asyncio.run(go())


def test_the_end_of_text_ends_after_a_loss():
    """A stop token that came last needs no further engine, through the pipeline either."""

    async def go():
        reply = [*b"ab", EOS]
        client = over(Mortal(reply, after=3, silent=True))
        pipeline = Pipeline(PieceTokenizer(), None, client, INFO)
        pieces = [p async for p in pipeline.run(Completion("r", text="x", params=SamplingParams(seed=1)))]
        final = pieces[-1].final
        assert (final.finish_reason, final.stop_token, final.completion_tokens) == (FinishReason.STOP, EOS, 3)

    asyncio.run(go())
