"""Drives an engine and its ranks: events in, plans to the ranks, outputs to whoever asked.

The same loop serves ranks in this process and ranks on a cluster. One thread owns the engine; every other
thread only posts events. One step runs on the ranks while the next waits there, so they never idle.
Knows neither Ray nor sockets nor text.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from runtime.config import EngineConfig
from runtime.engine import Engine
from runtime.errors import TramontaneError, Unavailable
from runtime.types import Finished, FinishReason, Load, Output, Request, StepPlan, StepResult

Deliver = Callable[[Output | TramontaneError], None]
"""Takes a request's outputs, or the one error that refused it. Called on the loop's thread: never blocks."""

TICK = 0.05  # seconds between looks at deadlines while something waits for one


class Ranks(Protocol):
    """The far side of the step channel. Results come to the callbacks given to `start`, in plan order."""

    def start(self, on_result: Callable[[StepResult], None], on_lost: Callable[[str], None]) -> None: ...

    def submit(self, plan: StepPlan) -> None:
        """Hand a plan over without waiting for it. A rank that cannot be reached is told to `on_lost`."""

    def close(self) -> None: ...


class EngineLoop:
    """An engine at work. Public methods may be called from any thread."""

    def __init__(self, config: EngineConfig, ranks: Ranks):
        self._engine = Engine(config)
        self._ranks = ranks
        self._events: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._deliver: dict[str, Deliver] = {}
        self._lost: str | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine-loop", daemon=True)
        self.on_lost: Callable[[str], None] = lambda detail: None

    def start(self) -> None:
        self._ranks.start(
            lambda result: self._events.put(lambda: self._step_finished(result)),
            lambda detail: self._events.put(lambda: self._ranks_lost(detail)),
        )
        self._thread.start()

    def add(self, request: Request, deliver: Deliver) -> None:
        """Queue a request, its deadline given in seconds from now; `deliver` gets all that follows."""
        received = time.monotonic()
        self._events.put(lambda: self._add(request, deliver, received))

    def abort(
        self, request_id: str, reason: FinishReason = FinishReason.CANCELLED, keep: int | None = None
    ) -> None:
        self._events.put(lambda: self._send(self._engine.abort(request_id, reason, keep)))

    def load(self, answer: Callable[[Load], None]) -> None:
        self._events.put(lambda: answer(self._engine.load()))

    def check(self, answer: Callable[[Exception | None], None]) -> None:
        """Run the engine's integrity check and hand over what it found."""

        def run() -> None:
            try:
                self._engine.check()
            except Exception as error:  # whatever is wrong is the answer
                answer(error)
            else:
                answer(None)

        self._events.put(run)

    def ranks_lost(self, detail: str) -> None:
        self._events.put(lambda: self._ranks_lost(detail))

    def close(self) -> None:
        """End every request, stop the ranks and the thread."""
        self._events.put(self._stop)
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    # ---- on the loop's thread ----------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping:
            for event in self._next_events():
                event()
            if self._stopping:
                break
            now = time.monotonic()
            self._send(self._engine.tick(now))
            while self._lost is None and (plan := self._engine.plan(now)) is not None:
                self._ranks.submit(plan)
        self._ranks.close()

    def _next_events(self) -> list[Callable[[], None]]:
        """All events that have arrived; waits for one, at most a tick while requests are about."""
        try:
            events = [self._events.get(timeout=TICK if self._deliver else None)]
        except queue.Empty:
            return []
        while not self._events.empty():
            events.append(self._events.get())
        return events

    def _add(self, request: Request, deliver: Deliver, received: float) -> None:
        if self._lost is not None:
            deliver(Unavailable(self._lost))
            return
        if request.deadline is not None:
            request = replace(request, deadline=received + request.deadline)
        try:
            outputs = self._engine.add(request, time.monotonic())
        except TramontaneError as error:
            deliver(error)
            return
        self._deliver[request.request_id] = deliver
        self._send(outputs)

    def _step_finished(self, result: StepResult) -> None:
        if self._lost is None:
            self._send(self._engine.step_finished(result, time.monotonic()))

    def _ranks_lost(self, detail: str) -> None:
        if self._lost is not None:
            return
        self._lost = detail
        self._send(self._engine.ranks_lost(detail))
        self.on_lost(detail)

    def _stop(self) -> None:
        self._ranks_lost("the engine was stopped")
        self._stopping = True

    def _send(self, outputs: list[Output]) -> None:
        for output in outputs:
            deliver = self._deliver.get(output.request_id)
            if deliver is None:
                continue
            if isinstance(output, Finished):
                del self._deliver[output.request_id]
            deliver(output)
