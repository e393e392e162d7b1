"""An engine, the checking executor and a clock, with what every request received."""

from __future__ import annotations

from dataclasses import dataclass, field

from runtime.config import EngineConfig
from runtime.engine import Engine
from runtime.types import (
    Finished,
    FinishReason,
    Output,
    Request,
    SamplingParams,
    ScoreOutput,
    TokenScore,
)
from tests.engine.executor import Executor, reference, reference_scores


def request(
    name: str,
    prompt: tuple[int, ...],
    max_tokens: int | None = 8,
    stop_ids: tuple[int, ...] = (),
    seed: int = 0,
    min_tokens: int = 0,
    **more,
) -> Request:
    params = SamplingParams(max_tokens=max_tokens, min_tokens=min_tokens, seed=seed)
    return Request(name, prompt, params, stop_ids, **more)


@dataclass
class Stream:
    """What a client saw of one reply, and what it sent along of it."""

    request: Request
    choice: int = 0
    tokens: list[int] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)
    finished: Finished | None = None


def stream_name(request_id: str, choice: int) -> str:
    return f"{request_id}/{choice}" if choice else request_id


class Harness:
    """Every event is followed by the integrity check, every output is held against what came before."""

    def __init__(self, config: EngineConfig, steps_in_flight: int = 2):
        self.config = config
        self.engine = Engine(config, steps_in_flight)
        self.executor = Executor(config)
        self.now = 0.0
        self.streams: dict[str, Stream] = {}

    def add(self, request: Request) -> None:
        outputs = self.engine.add(request, self.now)
        for branch in request.branches:
            name = stream_name(request.request_id, branch.choice)
            self.streams[name] = Stream(request, branch.choice, list(branch.reply))
        self.receive(outputs)

    def abort(
        self,
        name: str,
        reason: FinishReason = FinishReason.CANCELLED,
        keep: int | None = None,
        choice: int | None = None,
    ):
        self.receive(self.engine.abort(name, reason, keep, choice))

    def tick(self, seconds: float) -> None:
        self.now += seconds
        self.receive(self.engine.tick(self.now))

    def plan(self) -> bool:
        plan = self.engine.plan(self.now)
        if plan is not None:
            self.executor.run(plan)
        self.engine.check()
        return plan is not None

    def deliver(self) -> bool:
        if not self.executor.results:
            return False
        self.receive(self.engine.step_finished(self.executor.take_result(), self.now))
        return True

    def lose_ranks(self) -> None:
        self.receive(self.engine.ranks_lost("rank 1 is gone"))
        steps = self.executor.steps
        self.executor = Executor(self.config)
        self.executor.steps = steps
        assert all(stream.finished for stream in self.streams.values())

    def receive(self, outputs: list[Output]) -> None:
        self.engine.check()
        for output in outputs:
            stream = self.streams[stream_name(output.request_id, output.choice)]
            assert stream.finished is None, "an output after the last"
            if isinstance(output, Finished):
                stream.finished = output
                others = [s for s in self.streams.values() if s.request is stream.request]
                assert output.last == all(s.finished for s in others)
                self._check_end(stream)
            elif isinstance(output, ScoreOutput):
                assert output.first == len(stream.scores) + 1 and output.scores
                stream.scores += output.scores
            else:
                assert output.index == len(stream.tokens)
                stream.tokens.append(output.token)

    def _check_end(self, stream: Stream) -> None:
        finished = stream.finished
        if stream.request.scores:
            scores = reference_scores(stream.request)
            whole = finished.reason is FinishReason.LENGTH
            assert stream.scores == (scores if whole else scores[: len(stream.scores)])
            assert (finished.prompt_tokens, finished.cached_tokens) == (len(stream.request.prompt), 0)
            assert (stream.tokens, finished.completion_tokens) == ([], 0)
            return
        tokens, reason = reference(stream.request, self.config.max_model_len, stream.choice)
        assert stream.tokens == tokens[: len(stream.tokens)]
        assert finished.prompt_tokens == len(stream.request.prompt)
        goes_on = any(branch.reply for branch in stream.request.branches)
        assert 0 <= finished.cached_tokens < finished.prompt_tokens + goes_on
        if finished.reason is FinishReason.LENGTH or finished.stop_token is not None:
            assert (stream.tokens, finished.reason) == (tokens, reason)
            assert finished.completion_tokens == len(tokens)
            assert finished.stop_token == (tokens[-1] if reason is FinishReason.STOP else None)
        else:
            assert len(stream.tokens) < len(tokens), "the whole reply was sent, but it ended otherwise"
            assert finished.completion_tokens <= len(stream.tokens)

    def finish(self, limit: int = 100_000) -> None:
        """Runs to the end as the loop does: as many plans ahead as allowed, then a result."""
        while self.engine.has_work:
            while self.plan():
                pass
            assert self.deliver(), "work is left, but no plan is made and none is in flight"
            limit -= 1
            assert limit, "no end in sight"
        self.check_idle()

    def check_idle(self) -> None:
        assert all(stream.finished for stream in self.streams.values())
        assert not self.executor.slots, "the ranks still hold slots"
        load = self.engine.load()
        assert (load.running, load.waiting, load.queued_tokens) == (0, 0, 0)
        assert load.free_blocks == load.total_blocks
        assert self.engine.plan(self.now) is None
        self.engine.check()
