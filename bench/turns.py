"""Engines of one process that take turns, a few steps each: whatever slows the machine slows them alike.

On a shared machine the same work takes up to five times as long from one second to the next. Two engines that
are compared must run within moments of each other: each waits before its next step until it is given a turn.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from bench.local import Clock, Trace, ask
from runtime.local import LocalEngine
from runtime.types import Request, StepPlan, StepResult


class Turns:
    """Requests of one engine, asked at once, which go on only while `until` is called. Then `finish`."""

    def __init__(self, engine: LocalEngine, requests: Sequence[Request], clock: Clock):
        self.tokens = 0  # that have come, of all requests
        self._clock = clock
        self._target: float = 0  # tokens up to which steps may begin
        self._changed = threading.Condition()
        self._runner = next(r for r in engine.loop._ranks._runners if r.comm.rank == 0)
        self._execute = self._runner.execute
        self._runner.execute = self._step
        self._traces: list[Trace] = []
        self._error: BaseException | None = None
        self._ended = False
        self._thread = threading.Thread(target=self._ask, args=(engine, requests), daemon=True)
        self._thread.start()

    def until(self, tokens: int) -> float:
        """Seconds until so many tokens have come in all, or all requests have ended."""
        began = self._clock()
        with self._changed:
            self._target = tokens
            self._changed.notify_all()
            self._changed.wait_for(lambda: self.tokens >= tokens or self._ended)
        return self._clock() - began

    def finish(self) -> list[Trace]:
        """What came of the requests, once they have ended."""
        with self._changed:
            self._target = float("inf")
            self._changed.notify_all()
        self._thread.join()
        self._runner.execute = self._execute
        if self._error is not None:
            raise self._error
        return self._traces

    def _step(self, plan: StepPlan) -> StepResult:
        with self._changed:
            self._changed.wait_for(lambda: self.tokens < self._target)
        result = self._execute(plan)
        with self._changed:
            self.tokens += len(result.tokens)
            self._changed.notify_all()
        return result

    def _ask(self, engine: LocalEngine, requests: Sequence[Request]) -> None:
        try:
            self._traces = ask(engine, requests, self._clock)
        except BaseException as error:  # told by `finish`
            self._error = error
        with self._changed:
            self._ended = True
            self._changed.notify_all()
