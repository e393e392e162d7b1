"""Any schedule gives the sequential reply: random requests and interleavings on a checking executor."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from runtime.config import EngineConfig
from runtime.errors import InvalidArgument, QueueFull
from runtime.types import Branch, FinishReason, Request, SamplingParams
from tests.engine.executor import VOCABULARY, reference, reference_scores
from tests.engine.harness import Harness

configs = st.builds(
    EngineConfig,
    block_size=st.sampled_from([1, 2, 3, 4, 8]),
    total_blocks=st.integers(1, 24),
    max_num_seqs=st.integers(1, 6),
    max_step_tokens=st.sampled_from([1, 2, 5, 9, 16, 64]),
    max_chunk=st.sampled_from([None, 1, 3, 7, 64]),
    max_model_len=st.integers(2, 64),
    max_waiting=st.sampled_from([2, 5, 1000]),
    prefix_cache=st.booleans() | st.just(True),
    draft_tokens=st.sampled_from([0, 1, 3, 8]),
    draft_cost=st.sampled_from([None, None, 0.0, 0.1]),
    microbatches=st.sampled_from([1, 1, 1, 2, 3]),
)

# Few distinct beginnings, so that prefixes are often shared; one looks alike at every offset.
_streams = st.sampled_from(
    [*(tuple((i * i + 3 * s) % VOCABULARY for i in range(40)) for s in (0, 1)), (5,) * 40]
)
_tails = st.lists(st.integers(0, VOCABULARY - 1), max_size=5).map(tuple)
prompts = st.builds(lambda stream, n, tail: stream[:n] + tail, _streams, st.integers(0, 40), _tails)


@st.composite
def requests(draw, name: str, now: float = 0.0, deadlines: bool = True) -> Request:
    return Request(
        request_id=name,
        prompt=draw(prompts),
        params=SamplingParams(
            max_tokens=draw(st.none() | st.integers(0, 20)),
            min_tokens=draw(st.integers(0, 3)),
            seed=draw(st.integers(0, 3)),
        ),
        stop_ids=tuple(draw(st.sets(st.integers(0, VOCABULARY - 1), max_size=4))),
        deadline=draw(st.none() | st.floats(now, now + 40)) if deadlines else None,
        priority=draw(st.sampled_from([0, 0, 0, 1, -1])),
        cache_salt=draw(st.sampled_from(["", "", "x"])),
    )


@st.composite
def branched(draw, request: Request, context: int) -> Request:
    """The request with several choices, at times, and with beginnings of their replies, at times."""
    if not 0 < len(request.prompt) < context or request.params.max_tokens == 0:
        return request  # to be refused
    if len(request.prompt) > 1 and draw(st.integers(0, 5)) == 0:
        return replace(request, scores=True)
    branches = []
    for choice in draw(st.sampled_from([[0], [0], [0, 1], [0, 1, 2], [2, 0], [5]])):
        whole, _ = reference(request, context, choice)
        known = draw(st.sampled_from([0, 0, draw(st.integers(0, len(whole) - 1))]))
        branches.append(Branch(choice, tuple(whole[:known])))
    return replace(request, branches=tuple(branches))


class EngineMachine(RuleBasedStateMachine):
    """Events in any order, results one plan or more behind."""

    names = Bundle("names")

    @initialize(config=configs, steps_in_flight=st.sampled_from([1, 2, 2, 2, 3]))
    def begin(self, config: EngineConfig, steps_in_flight: int) -> None:
        self.harness = Harness(config, steps_in_flight)
        self.count = 0

    @rule(target=names, data=st.data())
    def add(self, data) -> str:
        self.count += 1
        name = f"r{self.count}"
        harness, config = self.harness, self.harness.config
        request = data.draw(branched(data.draw(requests(name, harness.now)), config.max_model_len))
        try:
            harness.add(request)
        except InvalidArgument as error:
            prompt, wanted = len(request.prompt), request.params.max_tokens
            room = min(config.max_model_len - 1, config.total_blocks * config.block_size)
            limit = config.max_model_len
            if wanted is not None:
                limit = min(limit, prompt + wanted)
            if error.field == "prompt":
                assert prompt == 0 or prompt > room
            elif error.field == "n":
                assert len(request.branches) > config.max_waiting
            else:
                assert error.field == "max_tokens"
                assert wanted == 0 or limit - 1 > config.total_blocks * config.block_size
        except QueueFull as error:
            assert harness.engine.load().waiting + len(request.branches) > config.max_waiting
            assert error.retry_after > 0
        else:
            load = harness.engine.load()
            assert load.waiting <= config.max_waiting + load.preemptions
        harness.engine.check()
        return name

    @rule(name=consumes(names))
    def abort(self, name: str) -> None:
        self.harness.abort(name)
        self.harness.abort(name)

    @rule(name=names, choice=st.sampled_from([0, 0, 1, 2, 5]))
    def abort_one_choice(self, name: str, choice: int) -> None:
        self.harness.abort(name, choice=choice)

    @rule(name=consumes(names), data=st.data())
    def stop_string(self, name: str, data) -> None:
        stream = self.harness.streams.get(name)
        if stream is None or stream.finished or not stream.tokens:
            return
        keep = data.draw(st.integers(0, len(stream.tokens)))
        self.harness.abort(name, FinishReason.STOP, keep, stream.choice)
        assert stream.finished.completion_tokens == keep

    @rule()
    def plan(self) -> None:
        self.harness.plan()

    @rule()
    def deliver(self) -> None:
        self.harness.deliver()

    @rule(steps=st.integers(1, 12))
    def steps(self, steps: int) -> None:
        for _ in range(steps):
            while self.harness.plan():
                pass
            self.harness.deliver()

    @rule(seconds=st.floats(0, 10))
    def tick(self, seconds: float) -> None:
        self.harness.tick(seconds)

    @rule(chance=st.integers(0, 19))
    def lose_ranks(self, chance: int) -> None:
        if chance == 0:
            stale = list(self.harness.executor.results)
            self.harness.lose_ranks()
            for result in stale:
                assert self.harness.engine.step_finished(result, self.harness.now) == []

    @invariant()
    def sound(self) -> None:
        if hasattr(self, "harness"):
            self.harness.engine.check()

    def teardown(self) -> None:
        if hasattr(self, "harness"):
            self.harness.finish()


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(
    max_examples=80, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


class TestEngineMachineLong(EngineMachine.TestCase):
    settings = settings(
        max_examples=500, stateful_step_count=80, deadline=None, suppress_health_check=list(HealthCheck)
    )
    pytestmark = pytest.mark.slow


@settings(max_examples=100, deadline=None)
@given(data=st.data(), config=configs, steps_in_flight=st.integers(1, 3))
def test_every_accepted_request_ends_with_its_whole_reply(data, config, steps_in_flight) -> None:
    """No aborts and no deadlines, so nothing may end early, whatever memory there is."""
    harness = Harness(config, steps_in_flight)
    for index in range(data.draw(st.integers(1, 10))):
        try:
            asked = data.draw(requests(f"r{index}", deadlines=False))
            harness.add(data.draw(branched(asked, config.max_model_len)))
        except (InvalidArgument, QueueFull):
            continue
        for _ in range(data.draw(st.integers(0, 4))):
            harness.plan()
            if data.draw(st.booleans()):
                harness.deliver()
    harness.finish()
    for stream in harness.streams.values():
        if stream.request.scores:
            assert stream.scores == reference_scores(stream.request)
            continue
        whole = reference(stream.request, config.max_model_len, stream.choice)
        assert (stream.tokens, stream.finished.reason) == whole
