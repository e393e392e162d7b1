"""A rank's end of the step channel: plans in, results and heartbeats out."""

from __future__ import annotations

import threading

from runtime.errors import TramontaneError
from runtime.model.runners import StepRunner
from runtime.types import StepPlan
from runtime.wire.connection import Connection
from runtime.wire.messages import Hello, WireError

BEAT_SECONDS = 1.0


def run_rank(runner: StepRunner, host: str, port: int, token: str) -> str:
    """A rank's life: join the engine, execute plans until it hangs up. Returns why it ended."""
    connection = Connection.connect(host, port, Hello("rank", token, runner.comm.rank))
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT_SECONDS):
            try:
                connection.send("beat", 0)
            except WireError:
                return  # the main thread sees it too

    threading.Thread(target=beat, name="heartbeat", daemon=True).start()
    try:
        while True:
            try:
                _, plan = connection.receive()
            except WireError as error:
                return str(error)
            if not isinstance(plan, StepPlan):
                return "the engine sent something that is not a plan"
            try:
                result = runner.execute(plan)
            except Exception as error:  # a defect in a step ends the group, never silently
                kind = "" if isinstance(error, TramontaneError) else f"{type(error).__name__}: "
                connection.send("failed", f"{kind}{error}")
                raise
            if runner.comm.rank == 0:
                connection.send("result", result)
    finally:
        ended.set()
        connection.close()
