"""Drives a LocalEngine for benchmarks: asks for replies, all at once, and notes when each token came."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from runtime.config import EngineConfig, ModelConfig, ParallelConfig
from runtime.local import LocalEngine
from runtime.types import Finished, Request, ScoreOutput, TokenOutput, TokenScore

Clock = Callable[[], float]


@dataclass(slots=True)
class Trace:
    """One request: when it was asked, when its tokens came (seconds, an entry a token), and what came."""

    asked: float
    arrivals: list[float] = field(default_factory=list)
    tokens: list[TokenOutput] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)
    finished: Finished | None = None

    @property
    def first_s(self) -> float:
        """Seconds from the question to the first token."""
        return self.arrivals[0] - self.asked

    @property
    def ids(self) -> list[int]:
        return [output.token for output in self.tokens]


@contextmanager
def local_engine(
    path: str, *, context: int, positions: int, threads: int | None = None, **settings: Any
) -> Iterator[LocalEngine]:
    """An engine with KV for `positions` positions and `settings` of EngineConfig."""
    config = EngineConfig(**settings)
    engine = LocalEngine(
        ModelConfig(path, max_model_len=context),
        replace(config, total_blocks=-(-positions // config.block_size)),
        ParallelConfig(device="cpu", threads=threads),
    )
    try:
        yield engine
    finally:
        engine.close()


def ask(engine: LocalEngine, requests: Iterable[Request], clock: Clock = time.perf_counter) -> list[Trace]:
    """Send requests at once and wait until all have ended. Raises the error that refuses one."""

    async def run() -> list[Trace]:
        return await asyncio.gather(*(_trace(engine, request, clock) for request in requests))

    return asyncio.run(run())


async def _trace(engine: LocalEngine, request: Request, clock: Clock) -> Trace:
    trace = Trace(clock())
    async for output in engine.client.generate(request):
        if isinstance(output, TokenOutput):
            trace.arrivals.append(clock())
            trace.tokens.append(output)
        elif isinstance(output, ScoreOutput):
            trace.scores += output.scores
        else:
            trace.finished = output
    return trace


def decode_rate(traces: Sequence[Trace]) -> float:
    """Tokens a second of all streams together, from when the last has its first token until the first ends;
    0 where they never decode together."""
    start = max(trace.arrivals[0] for trace in traces)
    end = min(trace.arrivals[-1] for trace in traces)
    tokens = sum(start < at <= end for trace in traces for at in trace.arrivals)
    return tokens / (end - start) if end > start else 0.0
