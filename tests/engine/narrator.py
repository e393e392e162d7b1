"""Narrated traces: commands to an engine, each followed by what came of it, indented, as people read it.

    engine blocks=8 block=4 seqs=4 step=16 chunk=7   a new engine; also context, waiting, flight, cache,
                                                     guess (most tokens), draft (its cost) and batches
    at 2.5                                           sets the clock
    add r1 prompt=a10 max=4 stop=7 deadline=9 priority=1 salt=x min=0
    add r1 prompt=a10 n=3                            three choices, r1, r1/1 and r1/2
    add r1 prompt=a10 reply=5,6                      with tokens of the reply; of two choices: reply=5,6/7
    plan                                             asks for the next plan
    result r1=7                                      the oldest plan's result; tokens not given are 900, 901..
    result r1=7,8                                    where a guess was right, the token after it too
    run                                              plan and result until both have nothing more
    add r1 prompt=a10 scores=yes                     scores of the prompt, no reply
    abort r1 keep=2                                  with keep: as the gateway does on a stop string
    abort r1 choice=1                                one of its choices alone
    tick / lost / load

A prompt is a list of parts joined by commas: `a10` is the first ten tokens of stream a, a number is a token.
"""

from __future__ import annotations

import re
from collections import Counter, deque

from runtime.config import EngineConfig
from runtime.engine import Engine
from runtime.errors import TramontaneError
from runtime.types import (
    Branch,
    Finished,
    FinishReason,
    Output,
    Request,
    SampledToken,
    SamplingParams,
    ScoreOutput,
    StepResult,
    TokenScore,
)
from tests.engine.harness import stream_name

_SETTINGS = {
    "blocks": "total_blocks",
    "block": "block_size",
    "seqs": "max_num_seqs",
    "step": "max_step_tokens",
    "chunk": "max_chunk",
    "context": "max_model_len",
    "waiting": "max_waiting",
    "guess": "draft_tokens",
    "batches": "microbatches",
}


def renarrate(trace: str) -> str:
    """The trace with every narration line replaced by what the engine does now."""
    narrator = Narrator()
    lines: list[str] = []
    for line in trace.splitlines():
        if line.startswith("  "):
            continue
        lines.append(line)
        if line and not line.startswith("#"):
            lines += ["  " + said for said in narrator.command(line)]
    return "\n".join(lines) + "\n"


def parse_prompt(text: str) -> tuple[int, ...]:
    tokens: list[int] = []
    for part in filter(None, text.split(",")):
        if stream := re.fullmatch(r"([a-z])(\d+)", part):
            tokens += [100_000 * ord(stream[1]) + index for index in range(int(stream[2]))]
        else:
            tokens.append(int(part))
    return tuple(tokens)


class Narrator:
    def command(self, line: str) -> list[str]:
        word, *rest = line.split()
        names = [part for part in rest if "=" not in part]
        options = dict(part.split("=", 1) for part in rest if "=" in part)
        try:
            said = getattr(self, "_" + word)(*names, **options)
        except TramontaneError as error:
            said = [f"{type(error).__name__}: {error}"]
        self.engine.check()
        return said

    def _engine(self, flight: str = "2", cache: str = "on", draft: str = "", **options: str) -> list[str]:
        settings = {_SETTINGS[name]: int(value) for name, value in options.items()}
        settings["draft_cost"] = float(draft) if draft else None
        self.engine = Engine(EngineConfig(prefix_cache=cache == "on", **settings), int(flight))
        self.now = 0.0
        self.slots: dict[int, str] = {}
        self.in_flight: deque = deque()  # (step, [(slot, name)] that sample, scores)
        self.sampled: Counter[str] = Counter()
        return []

    def _at(self, seconds: str) -> list[str]:
        self.now = float(seconds)
        return []

    def _add(
        self,
        name,
        prompt="",
        max="16",
        min="0",
        stop="",
        deadline="",
        priority="0",
        salt="",
        n="1",
        reply="",
        scores="",
    ):
        known = [parse_prompt(part) for part in reply.split("/")]
        known += [()] * (int(n) - len(known))
        request = Request(
            request_id=name,
            prompt=parse_prompt(prompt),
            params=SamplingParams(max_tokens=int(max), min_tokens=int(min), seed=0),
            stop_ids=tuple(int(token) for token in stop.split(",") if token),
            deadline=float(deadline) if deadline else None,
            priority=int(priority),
            cache_salt=salt,
            branches=tuple(Branch(choice, tokens) for choice, tokens in enumerate(known)),
            scores=bool(scores),
        )
        return self._outputs(self.engine.add(request, self.now))

    def _plan(self) -> list[str]:
        plan = self.engine.plan(self.now)
        if plan is None:
            return ["none"]
        said = [f"step {plan.step}"]
        said += [f"end {self.slots.pop(slot)} in slot {slot}" for slot in plan.ends]
        names = {}
        for start in plan.starts:
            names[start.slot] = self._name_of(start)
            reply = len(start.tokens) - start.prompt_length
            again = f", {reply} of them replied" if reply else ""
            said.append(f"start {names[start.slot]} in slot {start.slot}: {len(start.tokens)} tokens{again}")
        self.slots |= names
        for chunk in plan.chunks:
            end = chunk.start + chunk.length
            run = f"{chunk.start}..{end - 1}" if chunk.length > 1 else f"{chunk.start}"
            blocks = f", blocks {' '.join(map(str, chunk.new_blocks))}" if chunk.new_blocks else ""
            samples = f" -> {end}" if chunk.samples else " scored" if chunk.scores else ""
            guess = f", guessing {' '.join(map(str, chunk.drafts))}" if chunk.drafts else ""
            guess += f", {chunk.guesses} guesses of the draft model" if chunk.guesses else ""
            said.append(f"{self.slots[chunk.slot]}: {run}{samples}{guess}{blocks}")
        samplers = [(chunk.slot, self.slots[chunk.slot]) for chunk in plan.chunks if chunk.samples]
        scores = tuple((TokenScore(-1.0),) * chunk.length for chunk in plan.chunks if chunk.scores)
        self.in_flight.append((plan.step, samplers, scores))
        return said

    def _name_of(self, start) -> str:
        # A start does not name its request: it is the running one in that slot.
        running = self.engine._scheduler.running
        return next(stream_name(s.request.request_id, s.choice) for s in running if s.slot == start.slot)

    def _result(self, **given: str) -> list[str]:
        if not self.in_flight:
            return ["none is in flight"]
        step, samplers, scores = self.in_flight.popleft()
        tokens = []
        for slot, name in samplers:
            for token in given.pop(name, str(900 + self.sampled[name])).split(","):
                self.sampled[name] += 1
                tokens.append(SampledToken(slot, int(token)))
        assert not given, f"step {step} did not sample for {list(given)}"
        result = StepResult(step, tuple(tokens), scores)
        return [f"of step {step}", *self._outputs(self.engine.step_finished(result, self.now))]

    def _run(self) -> list[str]:
        said: list[str] = []
        while self.engine.has_work:
            while (planned := self._plan()) != ["none"]:
                said += planned
            said += self._result()
            self.engine.check()
        return said

    def _abort(self, name: str, keep: str = "", choice: str = "") -> list[str]:
        if keep:
            return self._outputs(self.engine.abort(name, FinishReason.STOP, int(keep)))
        if choice:
            return self._outputs(self.engine.abort(name, choice=int(choice)))
        return self._outputs(self.engine.abort(name))

    def _tick(self) -> list[str]:
        return self._outputs(self.engine.tick(self.now))

    def _lost(self) -> list[str]:
        self.slots.clear()
        self.in_flight.clear()
        return self._outputs(self.engine.ranks_lost("rank 1 is gone"))

    def _load(self) -> list[str]:
        load = self.engine.load()
        return [
            f"{load.running} running, {load.waiting} waiting with {load.queued_tokens} tokens, "
            f"{load.preemptions} preempted",
            f"{load.free_blocks} of {load.total_blocks} blocks free, {load.cached_blocks} of them cached; "
            f"{load.prefix_hit_tokens} of {load.prefix_query_tokens} prompt tokens found",
            *([f"{load.accepted_tokens} of {load.drafted_tokens} guesses right"] * bool(load.drafted_tokens)),
        ]

    def _outputs(self, outputs: list[Output]) -> list[str]:
        said = []
        for output in outputs:
            name = stream_name(output.request_id, output.choice)
            if isinstance(output, Finished):
                stop = f" at token {output.stop_token}" if output.stop_token is not None else ""
                detail = f" ({output.detail})" if output.detail else ""
                said.append(
                    f"{name} ends: {output.reason.value}{stop}{detail}; "
                    f"prompt {output.prompt_tokens}, cached {output.cached_tokens}, "
                    f"reply {output.completion_tokens}"
                )
            elif isinstance(output, ScoreOutput):
                said.append(f"{name} scores {output.first}..{output.first + len(output.scores) - 1}")
            else:
                said.append(f"{name}[{output.index}] = {output.token}")
        return said
