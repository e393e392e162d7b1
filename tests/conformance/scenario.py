"""A scenario is plain data: an engine's settings and who comes when. Playing it twice makes the same plans.

Time is counted in plans issued, and results are taken only where the engine waits for one, so no thread or
clock decides anything: what hypothesis finds it can shrink, and what a seed finds it finds again.
"""

from __future__ import annotations

import queue
from dataclasses import dataclass, field, replace

from runtime.config import EngineConfig
from runtime.engine import Engine
from runtime.engine.sequence import Sequence
from runtime.engine.speculation import Guesser
from runtime.local import LocalRanks
from runtime.types import Branch, Finished, Output, Request, ScoreOutput, StepPlan, StepResult, TokenOutput
from tests.conformance.compare import (
    EVICTED,
    FOUND,
    MODEL,
    PLAN,
    PREEMPTED,
    RIGHT,
    TEXT,
    WRONG,
    Tally,
    encode_reply,
    encode_scores,
)
from tests.conformance.models import Model
from tests.conformance.watch import Watch
from tests.replies import Reply

STEP_SECONDS = 60.0  # a step that takes longer hangs


@dataclass(frozen=True)
class Arrival:
    """A request of the list, and how it comes."""

    request: int  # its index
    at: int = 0  # plans issued before it comes
    choices: int = 1
    known: int = 0  # tokens of its replies that it brings along, at most all but the last
    leaves: int = 0  # tokens after which its caller leaves; 0: stays
    scores: bool = False  # asks what is thought of the prompt instead
    priority: int = 0
    salt: str = ""


@dataclass(frozen=True)
class Scenario:
    """Engine settings as in `EngineConfig`, and the arrivals. `crowd`: so many more requests of the list at
    the very beginning, to fill the batch."""

    tp: int = 1
    pp: int = 1
    block_size: int = 64
    total_blocks: int = 64
    max_num_seqs: int = 64
    max_step_tokens: int = 512
    max_chunk: int | None = None
    prefix_cache: bool = True
    draft_tokens: int = 8
    draft: str = ""  # as in `Model.runners`; "plan": guesses that plans carry, wrong at times
    steps_in_flight: int = 2
    crowd: int = 0
    arrivals: tuple[Arrival, ...] = ()


@dataclass
class _Stream:
    request: Request
    arrival: Arrival
    left: bool = False
    tokens: dict[int, list[TokenOutput]] = field(default_factory=dict)
    ends: dict[int, Finished] = field(default_factory=dict)
    scores: list = field(default_factory=list)


class Play:
    """One scenario on one model. `tally` has what came of it, `trace` a line a plan."""

    def __init__(self, model: Model, scenario: Scenario):
        self.model = model
        self.scenario = scenario
        self.tally = Tally()
        self.trace: list[str] = []
        self._streams: dict[str, _Stream] = {}
        self._plans = 0
        config = EngineConfig(
            **{
                name: getattr(scenario, name)
                for name in (
                    "block_size",
                    "total_blocks",
                    "max_num_seqs",
                    "max_step_tokens",
                    "max_chunk",
                    "prefix_cache",
                    "draft_tokens",
                )
            },
            draft_cost=0.0 if scenario.draft in ("right", "doubtful") else None,
        )
        self._config = model.settle(config, scenario.tp, scenario.pp)
        engine = Guessing if scenario.draft == "plan" else Engine
        self._engine = engine(self._config, scenario.steps_in_flight)
        self._engine.play = self
        self._watch = Watch(self._engine)

    def run(self) -> Tally:
        results: queue.SimpleQueue[StepResult | str] = queue.SimpleQueue()
        scenario = self.scenario
        draft = "" if scenario.draft == "plan" else scenario.draft
        ranks = LocalRanks(self.model.runners(self._config, scenario.tp, scenario.pp, draft))
        ranks.start(results.put, results.put)
        try:
            self._drive(ranks, results)
        finally:
            ranks.close()
        self._engine.check()
        load = self._engine.load()
        assert (load.running, load.waiting, load.free_blocks) == (0, 0, load.total_blocks)
        for stream in self._streams.values():
            self._compare(stream)
        self.tally.note("scenarios", 1)
        self.tally.note("plans", self._plans)
        source = {"": TEXT, "plan": PLAN}.get(scenario.draft, MODEL)
        self.tally.note(PREEMPTED, load.preemptions)
        self.tally.note(FOUND, load.prefix_hit_tokens)
        self.tally.note(EVICTED, self._watch.evicted)
        self.tally.note(RIGHT.format(source), load.accepted_tokens)
        self.tally.note(WRONG.format(source), load.drafted_tokens - load.accepted_tokens)
        return self.tally

    def _drive(self, ranks: LocalRanks, results: queue.SimpleQueue) -> None:
        size = len(self.model.requests)
        crowd = [Arrival(i % size) for i in range(self.scenario.crowd)]
        coming = sorted([*crowd, *self.scenario.arrivals], key=lambda a: a.at)
        skipped = 0  # plans that were not needed while nobody was there
        while coming or self._engine.has_work:
            if coming and not self._engine.has_work:
                skipped = max(skipped, coming[0].at - self._plans)
            while coming and coming[0].at <= self._plans + skipped:
                self._add(coming.pop(0))
            plan = self._engine.plan(0.0)
            if plan is not None:
                self._plans += 1
                self.trace.append(describe(plan))
                ranks.submit(plan)
                continue
            result = results.get(timeout=STEP_SECONDS)
            assert isinstance(result, StepResult), result
            self._receive(self._engine.step_finished(result, 0.0))

    def _add(self, arrival: Arrival) -> None:
        asked = self.model.requests[arrival.request]
        name = f"{len(self._streams)}:{asked.request_id}"
        request = replace(asked, request_id=name, priority=arrival.priority, cache_salt=arrival.salt)
        if arrival.scores and len(asked.prompt) > 1:
            request = replace(request, scores=True)
            self.tally.note("prompts scored", 1)
        else:
            branches = []
            for choice in range(arrival.choices):
                tokens = self.model.plain.reply(asked, choice).tokens
                branches.append(Branch(choice, tokens[: min(arrival.known, len(tokens) - 1)]))
            request = replace(request, branches=tuple(branches))
            self.tally.note("replies resumed", sum(bool(branch.reply) for branch in branches))
        self._streams[name] = _Stream(request, arrival)
        self._receive(self._engine.add(request, 0.0))

    def _receive(self, outputs: list[Output]) -> None:
        for output in outputs:
            stream = self._streams[output.request_id]
            if isinstance(output, Finished):
                stream.ends[output.choice] = output
            elif isinstance(output, ScoreOutput):
                stream.scores += output.scores
            else:
                tokens = stream.tokens.setdefault(output.choice, [])
                tokens.append(output)
                if len(tokens) == stream.arrival.leaves and not stream.left:
                    stream.left = True
        for stream in self._streams.values():
            if stream.left and len(stream.ends) < len(stream.request.branches):
                self.tally.note("callers who left", 1)
                self._receive(self._engine.abort(stream.request.request_id))

    def _compare(self, stream: _Stream) -> None:
        request, asked = stream.request, self.model.requests[stream.arrival.request]
        assert len(stream.ends) == len(request.branches), f"{request.request_id} did not end"
        if request.scores:
            want = encode_scores(self.model.plain.scores(asked))
            self.tally.compare(request.request_id, encode_scores(stream.scores), want)
            return
        for branch in request.branches:
            tokens, end = stream.tokens.get(branch.choice, []), stream.ends[branch.choice]
            known = len(branch.reply)
            assert [t.index for t in tokens] == list(range(known, known + len(tokens)))
            got = Reply(
                tuple(t.token for t in tokens),
                tuple(t.logprob for t in tokens),
                tuple(t.top for t in tokens),
                end.reason,
                end.stop_token,
            )
            want = encode_reply(self.model.plain.reply(asked, branch.choice))[known:]
            whole = not stream.left
            name = f"{request.request_id}, choice {branch.choice}"
            if whole or tokens:
                got_items = encode_reply(got, whole=whole)
                self.tally.compare(name, got_items, want if whole else want[: len(got_items)])


class Guessing(Engine):
    """An engine whose plans carry guesses all the time, most of them right: it knows the plain replies."""

    play: Play

    def _guesser(self, sequence: Sequence) -> Guesser:
        stream = self.play._streams[sequence.request.request_id]
        asked = self.play.model.requests[stream.arrival.request]
        reply = self.play.model.plain.reply(asked, sequence.choice).tokens
        return Knowing(sequence, reply, self.config.draft_tokens)


class Knowing(Guesser):
    """Guesses what a reply will be, and every third or so token wrongly."""

    def __init__(self, sequence: Sequence, reply: tuple[int, ...], most: int):
        super().__init__((), most, None)
        self._sequence, self._reply = sequence, reply
        self.steady = most

    def push(self, token: int) -> None: ...

    def propose(self, most: int) -> tuple[tuple[int, ...], int]:
        known = len(self._sequence.reply)
        ahead = self._reply[known : known + min(most, self.most)]
        return tuple(t if (t + known + i) % 3 else t ^ 1 for i, t in enumerate(ahead)), 0


def describe(plan: StepPlan) -> str:
    """A plan in one line: who ends, who starts, which positions run, and how many guesses."""
    parts = [
        f"{c.slot}:{c.start}..{c.start + c.length - 1}{'*' if c.samples else ''}"
        + (f"+{len(c.drafts) + c.guesses}" if c.drafts or c.guesses else "")
        for c in plan.chunks
    ]
    ends = f" end {','.join(map(str, plan.ends))}" if plan.ends else ""
    starts = f" start {','.join(f'{s.slot}({len(s.tokens)})' for s in plan.starts)}" if plan.starts else ""
    return f"plan {plan.step}:{ends}{starts} run {' '.join(parts)}"
