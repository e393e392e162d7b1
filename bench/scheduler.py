"""How long the scheduler thinks about a step: `python bench/scheduler.py` prints medians as JSON; a minute.

No model and no ranks: 1,024 sequences decode, results are made up, one step stays in flight. `plan_ms` and
`result_ms` are what one step costs the engine, with nothing waiting and with 100,000 requests waiting: their
ratio is `waiting_costs`. Settings take turns, round by round, and medians are over the steps of all rounds.
"no guesses" is speculation off; with it on, "prose" never repeats itself, so that guesses are looked up and
not tried; "repeats" always does. `chunks` is how many sequences a plan runs. Maxima are Python's garbage
collector, which visits every waiting request in its rare full runs. `--quick` shows that it works.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.report import about, show
from runtime.config import EngineConfig
from runtime.engine import Engine
from runtime.types import Request, SampledToken, SamplingParams, StepPlan, StepResult

REPLIES = ("no guesses", "prose", "repeats")


@dataclass(slots=True)
class Times:
    """Of one setting, an entry a step, milliseconds; `add_us` an entry a round."""

    plan_ms: list[float] = field(default_factory=list)
    result_ms: list[float] = field(default_factory=list)
    add_us: list[float] = field(default_factory=list)
    chunks: list[int] = field(default_factory=list)

    def report(self) -> dict[str, float]:
        return {
            "plan_ms": round(statistics.median(self.plan_ms), 3),
            "plan_max_ms": round(max(self.plan_ms), 3),
            "result_ms": round(statistics.median(self.result_ms), 3),
            "result_max_ms": round(max(self.result_ms), 3),
            "add_us": round(statistics.median(self.add_us), 2),
            "chunks": statistics.median(self.chunks),
        }


def result_of(plan: StepPlan, replies: str) -> StepResult:
    """What ranks would answer: guesses, where there are any, were right."""
    tokens: list[SampledToken] = []
    for chunk in plan.chunks:
        if chunk.samples:
            said = 7 if replies == "repeats" else (plan.step * 7919 + chunk.slot * 104729) % 49152
            tokens += [SampledToken(chunk.slot, token) for token in (said, *chunk.drafts)]
    return StepResult(plan.step, tuple(tokens))


def measure(times: Times, running: int, waiting: int, replies: str, steps: int) -> None:
    """One round of one setting."""
    config = EngineConfig(
        block_size=64,
        total_blocks=running * (steps // 32 + 4),
        max_num_seqs=running,
        max_step_tokens=running + 512,
        max_model_len=4 * steps + 512,
        max_waiting=running + waiting,
        **({"draft_tokens": 0} if replies == "no guesses" else {}),
    )
    engine = Engine(config)
    params = SamplingParams(max_tokens=3 * steps + 256, seed=0)
    prompt = tuple(range(64))
    began = time.perf_counter()
    for index in range(running + waiting):
        engine.add(Request(f"r{index}", (index, *prompt), params), 0.0)
    times.add_us.append((time.perf_counter() - began) / (running + waiting) * 1e6)
    in_flight: list[StepPlan] = []
    planned = 0  # since all run
    measured = False
    while planned < steps:
        measured = measured or engine.load().running == running
        began = time.perf_counter()
        plan = engine.plan(0.0)
        if plan is not None:
            if measured:
                times.plan_ms.append((time.perf_counter() - began) * 1e3)
                times.chunks.append(len(plan.chunks))
                planned += 1
            in_flight.append(plan)
        if plan is not None and len(in_flight) == 1:
            continue  # one ahead, unless the engine waits for what is in flight
        result = result_of(in_flight.pop(0), replies)
        began = time.perf_counter()
        engine.step_finished(result, 0.0)
        if measured:
            times.result_ms.append((time.perf_counter() - began) * 1e3)
    assert engine.load().running == running and engine.load().waiting == waiting


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--running", type=int, default=1024)
    parser.add_argument("--waiting", type=int, default=100_000)
    parser.add_argument("--steps", type=int, default=100, help="of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="few sequences, few steps, one round")
    args = parser.parse_args()
    if args.quick:
        args.running, args.waiting, args.steps, args.rounds = 8, 40, 6, 1
    settings = list(itertools.product(REPLIES, (0, args.waiting)))
    times = {setting: Times() for setting in settings}
    for number in range(args.rounds):
        for replies, waiting in settings[number:] + settings[:number]:
            measure(times[replies, waiting], args.running, waiting, replies, args.steps)
    found = {
        replies: {
            "none_waiting": (none := times[replies, 0].report()),
            "waiting": (many := times[replies, args.waiting].report()),
            "waiting_costs": round(many["plan_ms"] / none["plan_ms"], 3),
        }
        for replies in REPLIES
    }
    result = about(()) | {
        "running": args.running,
        "waiting": args.waiting,
        "steps": args.steps * args.rounds,
        "replies": found,
    }
    columns = [
        "",
        "plan, ms",
        f"plan, {args.waiting:,} waiting",
        "ratio",
        "result, ms",
        "sequences in a plan",
    ]
    rows = [
        [
            replies,
            of["none_waiting"]["plan_ms"],
            of["waiting"]["plan_ms"],
            of["waiting_costs"],
            of["none_waiting"]["result_ms"],
            of["none_waiting"]["chunks"],
        ]
        for replies, of in found.items()
    ]
    show(result, columns, rows)


if __name__ == "__main__":
    main()
