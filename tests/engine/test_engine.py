"""What single calls promise: errors, bounds, counts, and a cost that does not grow with the queue."""

from __future__ import annotations

import gc
import sys
from dataclasses import replace

import pytest

from runtime.config import EngineConfig
from runtime.engine import Engine, IntegrityError
from runtime.engine.scheduler import Scheduler
from runtime.errors import InvalidArgument, QueueFull
from runtime.types import Branch, Finished, FinishReason, SampledToken, StepResult, TokenScore
from tests.engine.executor import OVERFLOW
from tests.engine.harness import Harness, request

CONFIG = EngineConfig(block_size=4, total_blocks=64, max_num_seqs=8, max_step_tokens=64, max_model_len=200)


@pytest.mark.parametrize(
    "field", ["block_size", "total_blocks", "max_num_seqs", "max_step_tokens", "max_chunk", "max_waiting"]
)
def test_settings_that_cannot_work_are_refused(field: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{field}: "):
        Engine(replace(CONFIG, **{field: 0}))


def test_a_refused_request_leaves_no_trace() -> None:
    engine = Engine(replace(CONFIG, max_waiting=1))
    engine.add(request("r1", (1, 2)), 0.0)
    for bad in (request("r1", (1,)), request("r2", ()), request("r3", (1,) * 200), request("r4", (1,), 0)):
        with pytest.raises(InvalidArgument):
            engine.add(bad, 0.0)
    with pytest.raises(QueueFull):
        engine.add(request("r5", (1,)), 0.0)
    engine.check()
    assert engine.load().waiting == 1
    assert engine.abort("r5") == []


def test_an_ended_name_can_be_used_again() -> None:
    engine = Engine(CONFIG)
    for _ in range(3):
        engine.add(request("r1", (1, 2)), 0.0)
        assert [type(output) for output in engine.abort("r1")] == [Finished]
        assert engine.abort("r1") == []


def test_retry_grows_with_the_wait() -> None:
    engine = Engine(replace(CONFIG, max_waiting=1, max_num_seqs=1))
    engine.add(request("r1", (1,)), 0.0)
    with pytest.raises(QueueFull) as soon:
        engine.add(request("r2", (1,)), 0.0)
    with pytest.raises(QueueFull) as late:
        engine.add(request("r2", (1,)), 100.0)
    assert 0 < soon.value.retry_after < late.value.retry_after <= 30


def test_the_largest_request_that_fits_runs_to_its_end() -> None:
    config = replace(CONFIG, total_blocks=3, block_size=4)
    harness = Harness(config)
    harness.add(request("r1", tuple(range(5)), max_tokens=8))  # 12 positions are computed, 13 tokens
    with pytest.raises(InvalidArgument, match="max_tokens: 9 after"):
        harness.add(request("r2", tuple(range(5)), max_tokens=9))
    harness.finish()
    assert harness.streams["r1"].finished.completion_tokens == 8


@pytest.mark.parametrize("steps_in_flight", [1, 2, 5])
def test_plans_in_flight_are_bounded_by_number_and_max_tokens(steps_in_flight: int) -> None:
    engine = Engine(CONFIG, steps_in_flight)
    engine.add(request("r1", (1, 2, 3), max_tokens=3), 0.0)
    plans = []
    while plan := engine.plan(0.0):
        plans.append(plan)
    assert len(plans) == min(steps_in_flight, 3)
    assert [chunk.start for plan in plans for chunk in plan.chunks] == [0, 3, 4][: len(plans)]


def test_a_result_must_be_its_plan_s() -> None:
    engine = Engine(CONFIG)
    with pytest.raises(IntegrityError, match="step 1, expected None"):
        engine.step_finished(StepResult(1, ()), 0.0)
    engine.add(request("r1", (1, 2)), 0.0)
    engine.plan(0.0)
    engine.plan(0.0)
    with pytest.raises(IntegrityError, match="step 2, expected 1"):
        engine.step_finished(StepResult(2, (SampledToken(0, 5),)), 0.0)
    for tokens in ((), (SampledToken(1, 5),), (SampledToken(0, 5), SampledToken(0, 6))):
        with pytest.raises(IntegrityError, match="step 1 sampled"):
            engine.step_finished(StepResult(1, tokens), 0.0)
    engine.check()  # a refused result changed nothing
    assert engine.step_finished(StepResult(1, (SampledToken(0, 5),)), 0.0)[0].token == 5


def test_logprobs_travel_with_the_token() -> None:
    engine = Engine(CONFIG)
    engine.add(request("r1", (1, 2)), 0.0)
    engine.plan(0.0)
    (output,) = engine.step_finished(StepResult(1, (SampledToken(0, 5, -0.5, ()),)), 0.0)
    assert (output.index, output.token, output.logprob) == (0, 5, -0.5)


def test_no_token_ends_that_reply_alone() -> None:
    engine = Engine(CONFIG)
    engine.add(request("bad", (1, 2)), 0.0)
    engine.add(request("good", (3, 4)), 0.0)
    engine.plan(0.0)
    engine.plan(0.0)  # goes on from both
    end, output = engine.step_finished(StepResult(1, (SampledToken(0, -1), SampledToken(1, 7))), 0.0)
    assert (end.request_id, end.reason, end.completion_tokens) == ("bad", FinishReason.FAILED, 0)
    assert "NaN" in end.detail and (output.request_id, output.token) == ("good", 7)
    (output,) = engine.step_finished(StepResult(2, (SampledToken(0, 0), SampledToken(1, 8))), 0.0)
    assert (output.request_id, output.token) == ("good", 8)
    engine.check()


def test_a_wrong_guess_that_finds_no_token_keeps_those_before() -> None:
    engine = Engine(CONFIG)
    engine.add(request("r", (1, 2)), 0.0)
    engine.plan(0.0)
    engine.step_finished(StepResult(1, (SampledToken(0, 5),)), 0.0)
    engine.plan(0.0)
    (end,) = engine.step_finished(StepResult(2, (SampledToken(0, -1),)), 0.0)
    assert (end.reason, end.completion_tokens) == (FinishReason.FAILED, 1)


def test_a_guess_that_overflows_is_not_held_against_the_reply() -> None:
    """What a guess makes of the rows beside it is not the reply's own: it is computed again without."""
    engine = Engine(replace(CONFIG, draft_tokens=4, draft_cost=0.0))
    engine.add(request("r", (1, 2), max_tokens=50), 0.0)
    seen: list = []
    for step in range(40):
        while plan := engine.plan(0.0):
            seen.append(plan)
        plan = seen[step]
        answers = []
        for chunk in plan.chunks:
            if chunk.samples:
                answers.append(SampledToken(chunk.slot, -1 if chunk.drafts or chunk.guesses else 5))
        outputs = engine.step_finished(StepResult(plan.step, tuple(answers)), 0.0)
        assert not any(isinstance(output, Finished) for output in outputs)
        engine.check()
    assert any(chunk.drafts or chunk.guesses for plan in seen for chunk in plan.chunks)


def test_choices_that_have_not_begun_fail_with_the_first() -> None:
    engine = Engine(CONFIG)
    engine.add(request("r", (1, 2), branches=tuple(Branch(choice) for choice in range(3))), 0.0)
    engine.plan(0.0)
    ends = engine.step_finished(StepResult(1, (SampledToken(0, -1),)), 0.0)
    assert [(end.reason, end.last) for end in ends] == [(FinishReason.FAILED, i == 2) for i in range(3)]
    engine.check()


@pytest.mark.parametrize("steps_in_flight", [1, 2, 4])
def test_who_shares_what_another_text_spoiled_is_computed_again(monkeypatch, steps_in_flight: int) -> None:
    config = replace(CONFIG, block_size=4, total_blocks=64)
    harness = Harness(config, steps_in_flight)
    common = tuple(range(10))
    restarts = []
    plain = Scheduler.restart
    monkeypatch.setattr(
        Scheduler, "restart", lambda s, q: (restarts.append(q.request.request_id), plain(s, q))
    )
    harness.add(request("bad", (*common, OVERFLOW, 1)))
    harness.plan()
    if steps_in_flight == 1:
        harness.deliver()
    for i in range(3):
        harness.add(request(f"good {i}", (*common, 2 + i), seed=i))
    harness.add(request("bad again", (*common, 5, OVERFLOW)))
    harness.finish()
    ends = {name: stream.finished.reason for name, stream in harness.streams.items()}
    assert ends.pop("bad") is ends.pop("bad again") is FinishReason.FAILED
    assert set(ends.values()) == {FinishReason.LENGTH}
    # With one step in flight, what was spoiled is forgotten before anyone could find it.
    assert set(restarts) == ({"good 0", "good 1", "good 2", "bad again"} if steps_in_flight > 1 else set())
    harness.add(request("later", (*common, 6)))
    harness.finish()
    assert harness.streams["later"].finished.reason is FinishReason.LENGTH


def test_scores_that_are_no_numbers_end_the_request() -> None:
    engine = Engine(CONFIG)
    engine.add(request("r", (1, 2, 3), scores=True), 0.0)
    engine.plan(0.0)
    scores = ((TokenScore(-1.0), TokenScore(float("nan"))),)
    sound, end = engine.step_finished(StepResult(1, (), scores), 0.0)
    assert (sound.first, sound.scores) == (1, (TokenScore(-1.0),))
    assert (end.request_id, end.reason) == ("r", FinishReason.FAILED)
    engine.check()


def test_all_ends_when_ranks_are_lost_and_new_ranks_serve() -> None:
    harness = Harness(CONFIG)
    for index in range(20):
        harness.add(request(f"r{index}", tuple(range(index + 1))))
    harness.plan()
    harness.plan()
    stale = harness.executor.take_result()
    harness.lose_ranks()
    assert {stream.finished.reason for stream in harness.streams.values()} == {FinishReason.ERROR}
    assert harness.engine.step_finished(stale, 0.0) == []
    harness.add(request("again", (1, 2, 3)))
    harness.finish()
    assert harness.streams["again"].finished.reason is FinishReason.LENGTH


def test_no_one_starves() -> None:
    """A stream of small requests does not keep a large one out, nor a preempted one from going on."""
    harness = Harness(replace(CONFIG, total_blocks=8, max_num_seqs=4))
    harness.add(request("small0", (1,), max_tokens=12))
    harness.add(request("large", tuple(range(20)), max_tokens=12))
    for index in range(1, 60):
        harness.add(request(f"small{index}", (index,), max_tokens=12))
        while harness.plan():
            pass
        harness.deliver()
    assert harness.streams["large"].finished
    harness.finish()


def calls_of(function) -> int:
    """How many Python and C functions a call runs."""
    count = 0

    def profile(frame, event, argument) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    gc.disable()  # a collection calls whoever asked to hear of it
    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


def test_a_step_costs_what_runs_not_what_waits() -> None:
    costs = {}
    for waiting in (1, 20_000):
        engine = Engine(replace(CONFIG, max_waiting=100_000, total_blocks=64))
        for index in range(8 + waiting):
            engine.add(request(f"r{index}", (index, 2, 3), max_tokens=20, deadline=1e9 + index), 0.0)
        engine.plan(0.0)
        result = StepResult(1, tuple(SampledToken(slot, 5) for slot in range(8)))
        costs[waiting] = (
            calls_of(lambda engine=engine: engine.plan(0.0)),
            calls_of(lambda engine=engine, result=result: engine.step_finished(result, 0.0)),
            calls_of(lambda engine=engine: engine.tick(0.0)),
            calls_of(engine.load),
        )
    assert costs[1] == costs[20_000]


def test_many_that_end_while_they_wait_are_forgotten() -> None:
    engine = Engine(replace(CONFIG, max_waiting=100_000))
    for index in range(5_000):
        engine.add(request(f"r{index}", (1, 2), deadline=1e9), 0.0)
    for index in range(4_900):
        engine.abort(f"r{index}")
    engine.check()
    assert engine.load().waiting == 100
    assert len(engine._scheduler.waiting._heap) < 400
    assert len(engine._deadlines._heap) < 400
