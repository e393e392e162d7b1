"""What an engine's plans meet on their way, which its own counts do not tell."""

from __future__ import annotations

from runtime.engine import Engine
from runtime.types import StepPlan


class Watch:
    """`largest`: most sequences that one plan sampled for. `evicted`: blocks that lost their prefix."""

    def __init__(self, engine: Engine):
        """Looks on from now on, at every plan of the engine."""
        self._engine = engine
        self._plan = engine.plan
        self._named = 0
        self.largest = self.evicted = 0
        engine.plan = self.plan

    def plan(self, now: float) -> StepPlan | None:
        plan = self._plan(now)
        if plan is not None:
            self.largest = max(self.largest, sum(chunk.samples for chunk in plan.chunks))
        # Keys of blocks go away only by eviction; those named since the last look may hide some.
        named = len(self._engine._scheduler.pool.key_of)
        self.evicted += max(0, self._named - named)
        self._named = named
        return plan
