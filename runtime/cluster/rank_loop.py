"""A rank's end of the step channel: plans in, results and heartbeats out."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable

from runtime.errors import TramontaneError
from runtime.model.runners import StepRunner, answers
from runtime.types import StepPlan
from runtime.wire.connection import Connection
from runtime.wire.messages import Hello, WireError

BEAT_SECONDS = 0.5


def run_rank(
    runner: StepRunner,
    rank: int,
    host: str,
    port: int,
    token: str,
    gone: Callable[[], None] = lambda: None,
) -> str:
    """A rank's life: join the engine, execute plans until it hangs up. Returns why it ended. `rank` counts
    over all stages. `gone` hears it, on another thread, when no heartbeat reaches the engine any
    more, whatever a step may be waiting for."""
    connection = Connection.connect(host, port, Hello("rank", token, rank))
    connection.expect_reader()  # the engine has a thread that does nothing else
    replies = answers(runner)
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT_SECONDS):
            try:
                connection.send("beat", 0)
            except WireError:
                gone()
                return

    threading.Thread(target=beat, name="heartbeat", daemon=True).start()
    collector = _Collector(runner, connection) if _launches(runner) else None
    try:
        while True:
            try:
                _, plan = connection.receive()
            except WireError as error:
                return str(error)
            if not isinstance(plan, StepPlan):
                return "the engine sent something that is not a plan"
            try:
                if collector is not None:
                    collector.launch(plan)
                    continue
                result = runner.execute(plan)
            except Exception as error:  # a defect in a step ends the group, never silently
                connection.send("failed", _told(error))
                raise
            if replies:
                connection.send("result", result)
    finally:
        ended.set()
        if collector is not None:
            collector.close()
        connection.close()


def _launches(runner: StepRunner) -> bool:
    """Whether plans can be started before the last one's tokens are known: on a GPU that is alone."""
    return hasattr(runner, "launch") and runner.comm.size == 1 and not hasattr(runner, "pipe")


class _Collector:
    """Waits for launched plans in a thread of its own, so that the next plan starts meanwhile."""

    def __init__(self, runner, connection: Connection):
        self._runner = runner
        self._connection = connection
        self._launched: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="collector", daemon=True)
        self._thread.start()

    def launch(self, plan: StepPlan) -> None:
        self._launched.put(self._runner.launch(plan))

    def close(self) -> None:
        self._launched.put(None)
        self._thread.join(timeout=10)

    def _work(self) -> None:
        try:
            while (launched := self._launched.get()) is not None:
                self._connection.send("result", self._runner.collect(launched))
        except WireError:
            return  # the main thread sees it too
        except Exception as error:  # a defect in a step ends the group, never silently
            with contextlib.suppress(WireError):
                self._connection.send("failed", _told(error))
            self._connection.close()


def _told(error: Exception) -> str:
    kind = "" if isinstance(error, TramontaneError) else f"{type(error).__name__}: "
    return f"{kind}{error}"
