"""How long the scheduler thinks about a step: `python bench/scheduler.py` prints medians as JSON.

No model and no ranks: 1,024 sequences decode, results are made up, one step stays in flight. `plan_ms` and
`result_ms` are what one step costs the engine, with nothing waiting and with 100,000 requests waiting.
The maxima are Python's garbage collector, which visits every waiting request in its rare full runs.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time

from runtime.config import EngineConfig
from runtime.engine import Engine
from runtime.types import Request, SampledToken, SamplingParams, StepPlan, StepResult


def result_of(plan: StepPlan) -> StepResult:
    return StepResult(plan.step, tuple(SampledToken(c.slot, 7) for c in plan.chunks if c.samples))


def measure(running: int, waiting: int, steps: int) -> dict[str, float]:
    """Medians and maxima over `steps` steps, milliseconds; `add_us` a request, microseconds."""
    config = EngineConfig(
        block_size=64,
        total_blocks=running * 8,
        max_num_seqs=running,
        max_step_tokens=running + 512,
        max_model_len=4096,
        max_waiting=running + waiting,
    )
    engine = Engine(config)
    params = SamplingParams(max_tokens=400, seed=0)
    prompt = tuple(range(64))
    began = time.perf_counter()
    for index in range(running + waiting):
        engine.add(Request(f"r{index}", (index, *prompt), params), 0.0)
    add_us = (time.perf_counter() - began) / (running + waiting) * 1e6
    in_flight = [engine.plan(0.0)]
    while engine.load().running < running:
        in_flight.append(engine.plan(0.0))
        engine.step_finished(result_of(in_flight.pop(0)), 0.0)
    plan_ms, result_ms = [], []
    for _ in range(steps):
        began = time.perf_counter()
        in_flight.append(engine.plan(0.0))
        plan_ms.append((time.perf_counter() - began) * 1e3)
        result = result_of(in_flight.pop(0))
        began = time.perf_counter()
        engine.step_finished(result, 0.0)
        result_ms.append((time.perf_counter() - began) * 1e3)
    assert engine.load().running == running and engine.load().waiting == waiting
    return {
        "plan_ms": round(statistics.median(plan_ms), 3),
        "plan_max_ms": round(max(plan_ms), 3),
        "result_ms": round(statistics.median(result_ms), 3),
        "result_max_ms": round(max(result_ms), 3),
        "add_us": round(add_us, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--running", type=int, default=1024)
    parser.add_argument("--waiting", type=int, nargs="*", default=[0, 100_000])
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    report = {
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "running": arguments.running,
        "waiting": {
            str(waiting): measure(arguments.running, waiting, arguments.steps)
            for waiting in arguments.waiting
        },
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
