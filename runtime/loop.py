"""Drives an engine and its ranks: events in, plans to the ranks, outputs to whoever asked.

The same loop serves ranks in this process and ranks on a cluster. One thread owns the engine; every other
thread only posts events. One step runs on the ranks while the next waits there, so they never idle.
Knows neither Ray nor sockets nor text.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from runtime.config import EngineConfig
from runtime.engine import Engine
from runtime.errors import InvalidArgument, TramontaneError, Unavailable
from runtime.types import Finished, FinishReason, Load, Output, Request, StepPlan, StepResult

Deliver = Callable[[Output | TramontaneError], None]
"""Takes a request's outputs, or the one error that refused it. Called on the loop's thread: never blocks."""

TICK = 0.05  # seconds between looks at deadlines while something waits for one
IDLE = 1.0  # seconds without requests after which the engine's state is checked, once


class Ranks(Protocol):
    """The far side of the step channel. Results come to the callbacks given to `start`, in plan order."""

    def start(self, on_result: Callable[[StepResult], None], on_lost: Callable[[str], None]) -> None: ...

    def submit(self, plan: StepPlan) -> None:
        """Hand a plan over without waiting for it. A rank that cannot be reached is told to `on_lost`."""

    def close(self) -> None: ...


class EngineLoop:
    """An engine at work. Public methods may be called from any thread."""

    def __init__(self, config: EngineConfig, ranks: Ranks, vocab_size: int):
        # A plan for each stage to work at, and one that waits for the first.
        self._engine = Engine(config, config.microbatches + 1)
        self._ranks = ranks
        self._vocab_size = vocab_size
        self._events: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._deliver: dict[str, Deliver] = {}
        self._lost: str | None = None
        self._stopping = False
        self._unchecked = False  # steps were taken since the engine's state was last checked
        self._open = threading.Lock()  # over _stopping: an event is posted before the stop, or refused
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
        self._post(lambda: self._add(request, deliver, received), deliver)

    def abort(
        self,
        request_id: str,
        reason: FinishReason = FinishReason.CANCELLED,
        keep: int | None = None,
        choice: int | None = None,
    ) -> None:
        """End a request, or one of its replies alone. One that is unknown, or has fewer tokens than
        `keep`, is left as it is."""

        def run() -> None:
            with contextlib.suppress(InvalidArgument):
                self._send(self._engine.abort(request_id, reason, keep, choice))

        self._post(run)

    def load(self, answer: Callable[[Load | TramontaneError], None]) -> None:
        self._post(lambda: answer(self._engine.load()), answer)

    def check(self, answer: Callable[[Exception | None], None]) -> None:
        """Run the engine's integrity check and hand over what it found."""

        def run() -> None:
            try:
                self._engine.check()
            except Exception as error:  # whatever is wrong is the answer
                answer(error)
            else:
                answer(None)

        self._post(run, answer)

    def ranks_lost(self, detail: str) -> None:
        self._post(lambda: self._ranks_lost(detail))

    def when_lost(self, tell: Callable[[str], None]) -> None:
        """`tell` gets why the ranks are lost, when they are or at once if they have been, on any thread. Of
        several, the last one is told."""

        def watch() -> None:
            self.on_lost = tell
            if self._lost is not None:
                tell(self._lost)

        self._post(watch, lambda error: tell(str(error)))

    def close(self) -> None:
        """End every request, stop the ranks and the thread. What is asked later is refused."""
        self._post(self._stop)
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    def _post(self, event: Callable[[], None], refuse: Callable[[Unavailable], None] | None = None) -> None:
        with self._open:
            if not self._stopping:
                self._events.put(event)
                return
        if refuse is not None:
            refuse(Unavailable("the engine was stopped"))

    # ---- on the loop's thread ----------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping:
            for event in self._next_events():
                self._guard(event)
            if self._lost is None:
                self._guard(self._step)
        self._ranks.close()
        while not self._events.empty():  # what slipped in before the door was shut
            self._guard(self._events.get())

    def _guard(self, part: Callable[[], None]) -> None:
        """A defect must end streams, not leave them waiting for a thread that is gone."""
        try:
            part()
        except Exception as error:
            self._ranks_lost(f"the engine failed: {type(error).__name__}: {error}")

    def _step(self) -> None:
        now = time.monotonic()
        self._send(self._engine.tick(now))
        while self._lost is None and (plan := self._engine.plan(now)) is not None:
            self._ranks.submit(plan)
            self._unchecked = True

    def _next_events(self) -> list[Callable[[], None]]:
        """All events that have arrived; waits for one, at most a tick while requests are about. When there
        have been none for a while, whether every block and slot is accounted for is looked at."""
        wait = TICK if self._deliver else IDLE if self._unchecked and self._lost is None else None
        try:
            events = [self._events.get(timeout=wait)]
        except queue.Empty:
            if self._deliver:
                return []
            self._unchecked = False
            return [self._engine.check]
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
            self._check(request)
            outputs = self._engine.add(request, time.monotonic())
        except TramontaneError as error:
            deliver(error)
            return
        self._deliver[request.request_id] = deliver
        self._send(outputs)

    def _check(self, request: Request) -> None:
        """Refuse what would fail on the ranks, where it would take every other request along."""
        params = request.params
        ids = (*request.prompt, *request.stop_ids, *(token for token, _ in params.logit_bias))
        if any(not 0 <= token < self._vocab_size for token in ids):
            raise InvalidArgument("prompt", f"a token id is outside the vocabulary of {self._vocab_size}")
        for branch in request.branches:
            if any(not 0 <= token < self._vocab_size for token in branch.reply):
                raise InvalidArgument(
                    f"resume.choices[{branch.choice}]",
                    f"a token id is outside the vocabulary of {self._vocab_size}",
                )
        if params.min_tokens and len(set(request.stop_ids)) >= self._vocab_size:
            raise InvalidArgument("min_tokens", "every token of the vocabulary would end the reply")
        if params.temperature > 0 and params.seed is None:
            raise InvalidArgument("seed", "sampling at a temperature above 0 needs one")

    def _step_finished(self, result: StepResult) -> None:
        if self._lost is None:
            self._send(self._engine.step_finished(result, time.monotonic()))

    def _ranks_lost(self, detail: str) -> None:
        if self._lost is not None:
            return
        self._lost = detail
        try:
            outputs = self._engine.ranks_lost(detail)
        except Exception:  # the engine itself is what failed; its requests still end
            outputs = [Finished(name, FinishReason.ERROR, 0, 0, 0, detail=detail) for name in self._deliver]
        self._send(outputs)
        self.on_lost(detail)

    def _stop(self) -> None:
        self._ranks_lost("the engine was stopped")
        with self._open:
            self._stopping = True

    def _send(self, outputs: list[Output]) -> None:
        for output in outputs:
            deliver = self._deliver.get(output.request_id)
            if deliver is None:
                continue
            if isinstance(output, Finished) and output.last:
                del self._deliver[output.request_id]
            try:
                deliver(output)
            except RuntimeError:  # the receiver's event loop has closed: nobody is left to tell
                if self._deliver.pop(output.request_id, None) is not None:
                    self.abort(output.request_id)
