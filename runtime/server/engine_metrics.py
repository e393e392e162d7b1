"""An engine's Load as Prometheus metrics, and the asking for it; and how many engines there are behind it.

An engine that is stuck or gone must not take its metrics' reader along: it is given a moment, and then the
only thing said of it is that it is down. Knows nothing of streams and ports.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from runtime.errors import TramontaneError
from runtime.server.engine_client import EngineClient
from runtime.server.replicas import Replicas
from runtime.types import Load

PATIENCE = 1.0  # seconds that an engine has to answer; scrapes time out after ten by default
# Name after "tramontane_engine_": the field of Load, and what it is.
_GAUGES = {
    "running_sequences": ("running", "Sequences in the batch."),
    "waiting_sequences": ("waiting", "Sequences that wait to be admitted."),
    "queued_tokens": ("queued_tokens", "Prompt tokens of the sequences that wait."),
    "kv_blocks": ("total_blocks", "KV blocks there are."),
    "kv_blocks_free": ("free_blocks", "KV blocks that a sequence could take."),
    "kv_blocks_cached": ("cached_blocks", "Of the free KV blocks, those that still hold a prefix."),
}
_COUNTERS = {
    "steps": ("steps", "Forward steps planned."),
    "preemptions": ("preemptions", "Sequences put back to wait, for want of KV blocks."),
    "prefix_query_tokens": ("prefix_query_tokens", "Prompt tokens looked up in the prefix cache."),
    "prefix_hit_tokens": ("prefix_hit_tokens", "Prompt tokens found in the prefix cache."),
    "drafted_tokens": ("drafted_tokens", "Tokens guessed ahead by speculation."),
    "accepted_tokens": ("accepted_tokens", "Guessed tokens that were right."),
}


@dataclass(frozen=True, slots=True)
class Seen:
    """What a gateway sees behind it at one moment."""

    load: Load | None  # None: no answer
    replicas: int = 1
    replicas_up: int = 1
    moved: int = 0  # requests that went on at another replica, so far


class EngineCollector(Collector):
    """The metrics of `seen`, which whoever writes them out sets just before."""

    def __init__(self, max_sequences: int):
        self.seen = Seen(None)
        self._max_sequences = max_sequences

    def collect(self) -> Iterator[Metric]:
        seen = self.seen
        yield GaugeMetricFamily("tramontane_replicas", "Replicas there are if none is lost.", seen.replicas)
        yield GaugeMetricFamily("tramontane_replicas_up", "Replicas there are now.", seen.replicas_up)
        yield CounterMetricFamily(
            "tramontane_moved_requests", "Requests that lost a replica and went on at another.", seen.moved
        )
        yield GaugeMetricFamily(
            "tramontane_engine_up", "1 if the engine answered, else 0.", seen.load is not None
        )
        yield GaugeMetricFamily(
            "tramontane_engine_max_sequences", "Most sequences in a batch.", self._max_sequences
        )
        if seen.load is None:
            return
        for family, readings in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for name, (field, text) in readings.items():
                yield family(f"tramontane_engine_{name}", text, getattr(seen.load, field))


class LoadReader:
    """Asks an engine how busy it is, for all who want to know."""

    def __init__(self, client: EngineClient, patience: float = PATIENCE):
        """`patience`: seconds that the engine has to answer where a scrape waits."""
        self._client = client
        self._patience = patience
        self._asked: asyncio.Task[Load] | None = None

    async def read(self) -> Seen:
        load = await self._load()
        if isinstance(self._client, Replicas):
            return Seen(load, self._client.places, self._client.there, self._client.moved)
        return Seen(load, replicas_up=int(load is not None))

    async def ask(self) -> Load:
        """How busy the engine is, whenever it answers. Raises TramontaneError."""
        return await asyncio.shield(self._question())

    async def _load(self) -> Load | None:
        """None if the engine is gone or does not answer in time."""
        asked = self._question()
        # Not `wait_for`, which would cancel what another scrape may be waiting for too.
        await asyncio.wait([asked], timeout=self._patience)
        if not asked.done():
            return None
        try:
            return asked.result()
        except TramontaneError:
            return None

    def _question(self) -> asyncio.Task[Load]:
        """A question that is still open is not asked again: many who ask a stuck engine leave one behind, not
        many."""
        if self._asked is None or self._asked.done():
            self._asked = asyncio.create_task(self._client.load())
            self._asked.add_done_callback(_take_notice)
        return self._asked


def _take_notice(asked: asyncio.Task[Load]) -> None:
    """asyncio complains of errors that nobody looked at."""
    if not asked.cancelled():
        asked.exception()
