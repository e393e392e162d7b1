"""What the server counts moves with what it does, whatever becomes of its engine."""

import asyncio
import contextlib
import time

import grpc
import prometheus_client
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import QueueFull, Unavailable
from runtime.server import grpc_service, statuses
from runtime.server.engine_metrics import LoadReader, Seen
from runtime.server.metrics import METHODS, Metrics
from runtime.server.replicas import Replicas
from runtime.server.reply import Final, Piece
from runtime.server.statuses import ended_by
from runtime.types import FinishReason
from tests.server.harness import Running, ask, refusal, serving
from tests.server.scrape import Samples, parse, scrape
from tests.server.scripted import BOS, PieceTokenizer, ScriptedEngine, info_for
from tests.server.test_streams import until
from tramontane.v1 import generate_pb2, inference_service_pb2, score_pb2


def watched(engine: ScriptedEngine, visit, calls=1, **options) -> Samples:
    """The samples after `visit(running)`, when the calls that it made of our service have been counted."""

    async def go():
        async with serving(engine, metrics_port=0, **options) as running:
            await visit(running)
            return await settled(running, calls)

    return asyncio.run(go())


async def settled(running: Running, calls: int) -> Samples:
    """A call is counted last of all, after its client has heard how it ended."""

    def counted():
        (family,) = running.server._service._metrics._requests.collect()
        return sum(sample.value for sample in family.samples if sample.name.endswith("_total"))

    await until(lambda: counted() >= calls)
    return await scrape(running.server.metrics_port)


async def read(call) -> list:
    return [message async for message in call]


def test_a_reply_moves_what_it_should():
    async def visit(running):
        await read(running.stub.Generate(ask("hello")))

    start = time.monotonic()
    seen = watched(ScriptedEngine(b"abcde", pace=0.01), visit)
    took = time.monotonic() - start
    assert seen("tramontane_requests_total", method="Generate", code="OK") == 1
    assert seen("tramontane_request_duration_seconds_count", method="Generate") == 1
    duration = seen("tramontane_request_duration_seconds_sum", method="Generate")
    assert 0.05 < duration <= took
    assert seen("tramontane_replies_total", reason="length") == 1
    assert seen("tramontane_prompt_tokens_total") == 6  # BOS and five bytes
    assert seen("tramontane_cached_prompt_tokens_total") == 0
    assert seen("tramontane_completion_tokens_total") == 5
    assert seen("tramontane_time_to_first_token_seconds_count") == 1
    first = seen("tramontane_time_to_first_token_seconds_sum")
    assert first > 0.01
    assert seen("tramontane_time_between_tokens_seconds_count") == 4
    between = seen("tramontane_time_between_tokens_seconds_sum")
    assert between > 0.04 and first + between <= duration
    assert seen("tramontane_resumed_streams_total") == 0
    assert seen("tramontane_ready") == 1 and seen("tramontane_open_streams") == 0
    others = {method: seen("tramontane_requests_total", method=method, code="OK") for method in METHODS}
    assert sum(others.values()) == 1


def test_choices_share_a_prompt_and_count_as_replies():
    async def visit(running):
        await read(running.stub.Generate(generate_pb2.GenerateRequest(text="hi", n=3)))

    seen = watched(ScriptedEngine(b"abcde", cached=2), visit)
    assert seen("tramontane_requests_total", method="Generate", code="OK") == 1
    assert seen("tramontane_replies_total", reason="length") == 3
    assert seen("tramontane_prompt_tokens_total") == 3
    assert seen("tramontane_cached_prompt_tokens_total") == 2
    assert seen("tramontane_completion_tokens_total") == 15
    assert seen("tramontane_time_to_first_token_seconds_count") == 1
    assert seen("tramontane_time_between_tokens_seconds_count") == 12


def test_tokens_after_a_stop_string_do_not_count():
    async def visit(running):
        await read(running.stub.Generate(ask(stop=["c"])))

    seen = watched(ScriptedEngine(b"abcde" * 20, overrun=2), visit)
    assert seen("tramontane_completion_tokens_total") == 3
    assert seen("tramontane_replies_total", reason="stop") == 1


def test_a_cancelled_reply():
    async def visit(running):
        call = running.stub.Generate(ask())
        await call.read()
        await until(lambda: running.engine.sent == 2)
        seen = await scrape(running.server.metrics_port)
        assert seen("tramontane_open_streams") == 1
        assert seen("tramontane_engine_running_sequences") == 1
        call.cancel()

    seen = watched(ScriptedEngine(b"ab", hang=True), visit)
    assert seen("tramontane_requests_total", method="Generate", code="CANCELLED") == 1
    assert seen("tramontane_requests_total", method="Generate", code="OK") == 0
    assert seen("tramontane_replies_total", reason="cancelled") == 1
    assert seen("tramontane_completion_tokens_total") == 2


@pytest.mark.parametrize(
    "left, code",
    [(None, "CANCELLED"), (60.0, "CANCELLED"), (0.002, "DEADLINE_EXCEEDED"), (0.0, "DEADLINE_EXCEEDED")],
)
def test_who_ended_a_call_is_seen_by_the_time_it_had(left, code):
    """At its client a deadline passes a moment earlier than at the server."""

    class Context:
        def done(self):
            return True

        def time_remaining(self):
            return left

    assert ended_by(asyncio.CancelledError(), Context()) is grpc.StatusCode[code]


class Late:
    """The context of a call whose time is up. A client's own clock may end a call a moment before the
    server's would, so no call that is made with a timeout is sure to look so."""

    def __init__(self, context):
        self.done = context.done

    def time_remaining(self):
        return 0


@pytest.mark.parametrize("seen_by", ["engine", "gRPC"])
def test_a_reply_whose_deadline_passes(monkeypatch, seen_by):
    async def visit(running):
        if seen_by == "engine":
            error = await refusal(running.stub.Generate(ask()))
            assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        else:  # the handler is cancelled
            call = running.stub.Generate(ask())
            await call.read()
            call.cancel()

    if seen_by == "gRPC":
        for module in (grpc_service, statuses):
            monkeypatch.setattr(module, "ended_by", lambda error, context: ended_by(error, Late(context)))
        engine = ScriptedEngine(b"ab", hang=True)
    else:
        engine = ScriptedEngine(b"ab", ending=FinishReason.DEADLINE)
    seen = watched(engine, visit)
    assert seen("tramontane_requests_total", method="Generate", code="DEADLINE_EXCEEDED") == 1
    assert seen("tramontane_replies_total", reason="deadline") == 1


def test_a_reply_that_the_engine_fails():
    async def visit(running):
        await refusal(running.stub.Generate(ask()))

    seen = watched(ScriptedEngine(b"abcde", dies=2), visit)
    assert seen("tramontane_requests_total", method="Generate", code="UNAVAILABLE") == 1
    assert seen("tramontane_replies_total", reason="error") == 1
    assert seen("tramontane_completion_tokens_total") == 2


def test_a_reply_that_a_defect_breaks():
    class Broken(ScriptedEngine):
        async def _outputs(self, request):
            async for output in super()._outputs(request):
                yield output
                raise RuntimeError("a defect")

    async def visit(running):
        await refusal(running.stub.Generate(ask()))

    seen = watched(Broken(b"abcde"), visit)
    assert seen("tramontane_requests_total", method="Generate", code="INTERNAL") == 1
    assert seen("tramontane_replies_total", reason="error") == 1


def test_refused_calls_have_a_status_and_no_replies():
    async def visit(running):
        await refusal(running.stub.Generate(ask(temperature=-1.0)))
        await refusal(running.stub.Generate(generate_pb2.GenerateRequest(text="x", model="another")))
        running.engine.refuse = QueueFull(1.0)
        await refusal(running.stub.Generate(ask()))
        path = "/tramontane.v1.InferenceService/Generate"
        await refusal(running.channel.unary_unary(path)(b"\xff"))  # does not parse

    seen = watched(ScriptedEngine(b"a"), visit, calls=4)
    for code, count in {"INVALID_ARGUMENT": 2, "NOT_FOUND": 1, "RESOURCE_EXHAUSTED": 1, "OK": 0}.items():
        assert seen("tramontane_requests_total", method="Generate", code=code) == count
    assert all(seen("tramontane_replies_total", reason=reason.value) == 0 for reason in FinishReason)
    assert seen("tramontane_prompt_tokens_total") == 0


def test_only_streams_that_went_on_count_as_resumed():
    async def visit(running):
        def resuming(numerics):
            resume = generate_pb2.Resume(numerics=numerics, seed=1)
            resume.choices.add(ids=b"ab")
            return generate_pb2.GenerateRequest(text="hi", resume=resume)

        await refusal(running.stub.Generate(resuming("another's")))
        await read(running.stub.Generate(ask()))
        bare = generate_pb2.Resume(numerics="test-numerics")  # of a stream that broke before its first token
        await read(running.stub.Generate(generate_pb2.GenerateRequest(text="hi", resume=bare)))
        assert (await settled(running, 3))("tramontane_resumed_streams_total") == 0
        await read(running.stub.Generate(resuming("test-numerics")))

    seen = watched(ScriptedEngine(b"abcde"), visit, calls=4)
    assert seen("tramontane_resumed_streams_total") == 1
    assert seen("tramontane_completion_tokens_total") == 5 + 5 + 3


def test_a_scored_text_has_a_prompt_and_no_replies():
    async def visit(running):
        await read(running.stub.Score(score_pb2.ScoreRequest(text="hello")))
        await running.stub.ListModels(inference_service_pb2.ListModelsRequest())

    seen = watched(ScriptedEngine(), visit, calls=2)
    assert seen("tramontane_requests_total", method="Score", code="OK") == 1
    assert seen("tramontane_requests_total", method="ListModels", code="OK") == 1
    assert seen("tramontane_prompt_tokens_total") == 6
    assert seen("tramontane_completion_tokens_total") == 0
    assert seen("tramontane_time_to_first_token_seconds_count") == 0
    assert all(seen("tramontane_replies_total", reason=reason.value) == 0 for reason in FinishReason)


def test_the_engine_is_asked_at_each_scrape():
    async def visit(running):
        running.engine.running = 5

    seen = watched(ScriptedEngine(), visit, calls=0)
    assert {name: seen(f"tramontane_engine_{name}") for name in (
        "up", "max_sequences", "running_sequences", "waiting_sequences", "queued_tokens", "kv_blocks",
        "kv_blocks_free", "kv_blocks_cached", "steps_total", "prefix_hit_tokens_total",
        "prefix_query_tokens_total", "preemptions_total", "drafted_tokens_total", "accepted_tokens_total",
    )} == {
        "up": 1, "max_sequences": 8, "running_sequences": 5, "waiting_sequences": 3, "queued_tokens": 100,
        "kv_blocks": 64, "kv_blocks_free": 40, "kv_blocks_cached": 8, "steps_total": 1000,
        "prefix_hit_tokens_total": 50, "prefix_query_tokens_total": 200, "preemptions_total": 2,
        "drafted_tokens_total": 0, "accepted_tokens_total": 0,
    }  # fmt: skip


class Gone(ScriptedEngine):
    async def load(self):
        raise Unavailable("rank 1 is gone")


class Stuck(ScriptedEngine):
    asked = 0

    async def load(self):
        self.asked += 1
        await asyncio.Event().wait()


@pytest.mark.parametrize("kind", [Gone, Stuck])
def test_a_dead_engine_leaves_the_servers_own_metrics(kind):
    async def visit(running):
        await read(running.stub.Generate(ask()))

    seen = watched(kind(b"abc"), visit)
    assert seen("tramontane_engine_up") == 0
    assert seen("tramontane_completion_tokens_total") == 3
    assert (seen("tramontane_replicas"), seen("tramontane_replicas_up")) == (1, 0)
    assert {name for name in seen.names if name.startswith("tramontane_engine")} == {
        "tramontane_engine_up",
        "tramontane_engine_max_sequences",
    }


def test_lost_replicas_and_what_moved_are_counted():
    async def go():
        gate = asyncio.Event()
        engines = [ScriptedEngine(b"a" * 50, gate=gate) for _ in range(2)]
        info = await engines[0].info()
        client = Replicas([info, info], returning=False)
        for index, engine in enumerate(engines):
            client.put(index, engine, info)
        async with serving(client, metrics_port=0) as running:
            port = running.server.metrics_port
            running.server._service._loads._patience = 60.0
            before = await scrape(port)
            call = aiter(running.stub.Generate(ask()))
            await anext(call)
            (busy,) = [index for index, engine in enumerate(engines) if engine.running]
            engines[busy].dies = 5
            gate.set()
            await read(call)
            client.lose(busy, "it is gone")
            return before, await scrape(port)

    before, after = asyncio.run(go())
    names = ("tramontane_replicas", "tramontane_replicas_up", "tramontane_moved_requests_total")
    assert [before(name) for name in names] == [2, 2, 0]
    assert [after(name) for name in names] == [2, 1, 1]
    assert before("tramontane_engine_kv_blocks") == 2 * after("tramontane_engine_kv_blocks") == 128
    assert after("tramontane_completion_tokens_total") == 50


def test_a_stuck_engine_is_asked_once_until_it_answers():
    async def go():
        engine = Stuck()
        reader = LoadReader(engine, patience=0.02)
        nothing = Seen(None, replicas_up=0)
        assert await asyncio.gather(*(reader.read() for _ in range(3))) == [nothing] * 3
        assert await reader.read() == nothing
        assert engine.asked == 1
        reader._asked.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await reader._asked
        engine.load = ScriptedEngine().load
        assert (await reader.read()).load.total_blocks == 64

    asyncio.run(go())


def test_every_label_is_one_of_a_few():
    """Whatever clients send."""

    async def visit(running):
        await refusal(running.stub.Generate(generate_pb2.GenerateRequest(text="x", model="m" * 50)))
        await refusal(running.channel.unary_unary("/tramontane.v1.InferenceService/Steal")(b""))
        await refusal(running.channel.unary_unary("/any.Service/Generate")(b""))
        await read(running.stub.Generate(ask("user input", seed=7)))

    seen = watched(ScriptedEngine(b"a"), visit, calls=2)
    allowed = {
        "method": set(METHODS),
        "code": {code.name for code in grpc.StatusCode},
        "reason": {reason.value for reason in FinishReason},
        "model": {"scripted"},
        "numerics": {"test-numerics"},
        "tp": {"2"},
    }
    for _, labels in seen:
        for label, value in labels:
            assert label in ("le", "version") or value in allowed[label]
    assert ("tramontane_server_info" in seen.names) and len(seen) < 400


@pytest.mark.parametrize("path", ["/any.Service/Generate", "/tramontane.v1.InferenceService/Steal", "", "/"])
def test_other_services_and_methods_are_not_counted(path):
    metrics = Metrics(info_for(PieceTokenizer()))
    before = metrics.render(Seen(None), ready=True, open_streams=0)
    metrics.call(path)("OK")
    assert metrics.render(Seen(None), ready=True, open_streams=0) == before


def test_servers_of_one_process_count_apart():
    async def go():
        async with (
            serving(ScriptedEngine(b"a"), metrics_port=0) as one,
            serving(ScriptedEngine(b"a"), metrics_port=0) as other,
        ):
            await read(one.stub.Generate(ask()))
            return await settled(one, 1), await settled(other, 0)

    one, other = asyncio.run(go())
    assert one("tramontane_completion_tokens_total") == 1 and other("tramontane_completion_tokens_total") == 0
    assert not any("tramontane" in family.name for family in prometheus_client.REGISTRY.collect())


def test_tokens_that_a_reply_begins_with_are_not_made_here():
    """Such as those of a reply that had ended already: no token, no time, but a reply."""

    async def visit(running):
        resume = generate_pb2.Resume(numerics="test-numerics", seed=1)
        resume.choices.add(ids=b"abc")
        request = generate_pb2.GenerateRequest(text="hi", resume=resume)
        request.sampling.max_tokens = 3
        await read(running.stub.Generate(request))

    seen = watched(ScriptedEngine(b"abcde"), visit)
    assert seen("tramontane_completion_tokens_total") == 0
    assert seen("tramontane_time_to_first_token_seconds_count") == 0
    assert seen("tramontane_replies_total", reason="length") == 1
    assert seen("tramontane_resumed_streams_total") == 1


@given(
    st.lists(st.tuples(st.integers(0, 3), st.floats(0, 5), st.booleans()), max_size=40),
    st.sampled_from([FinishReason.CANCELLED, FinishReason.ERROR, FinishReason.DEADLINE]),
)
def test_sums_hold_for_any_order_of_pieces(script, reason):
    """A piece is (choice, seconds since the last one, whether it ends its choice)."""
    now = 0.0
    metrics = Metrics(info_for(PieceTokenizer()), clock=lambda: now)
    meter = metrics.stream(replies=True)
    begun, ended, tokens = {}, set(), 0
    for choice, passed, last in script:
        now += passed
        if choice in ended:
            continue
        final = Final(FinishReason.STOP, None, 1, 7, 4, 1, 0, "") if last else None
        meter.piece(Piece("", () if last else (BOS,), final=final, choice=choice))
        if last:
            ended.add(choice)
        else:
            tokens += 1
            begun.setdefault(choice, now)
    meter.cut_off(reason)
    meter.cut_off(reason)
    seen = parse(metrics.render(Seen(None), ready=False, open_streams=0)[1].decode())
    assert seen("tramontane_completion_tokens_total") == tokens
    assert seen("tramontane_replies_total", reason="stop") == len(ended)
    assert seen("tramontane_replies_total", reason=reason.value) == len(begun.keys() - ended)
    assert seen("tramontane_prompt_tokens_total") == (7 if ended else 0)
    assert seen("tramontane_cached_prompt_tokens_total") == (4 if ended else 0)
    assert seen("tramontane_time_to_first_token_seconds_count") == bool(begun)
    assert seen("tramontane_time_to_first_token_seconds_sum") == pytest.approx(min(begun.values(), default=0))
    assert seen("tramontane_time_between_tokens_seconds_count") == tokens - len(begun)
