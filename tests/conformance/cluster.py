"""The list of requests through Ray: ranks and engine as actors, tokens over sockets."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from runtime.config import EngineConfig, ParallelConfig, ServeConfig
from tests.conformance.compare import Tally
from tests.conformance.models import CONTEXT, Model
from tests.conformance.ways import Way, serve_way


def run_cluster(model: Model, tp: int, seed: int) -> Tally:
    """On `tp` ranks, in chunks and with little room for KV, so that sequences are preempted. A Ray that runs
    in this process is used and left as it is; otherwise one is started and ended."""
    from runtime.cluster.launch import Cluster

    settings = EngineConfig(block_size=4, total_blocks=CONTEXT // 4 + 2, max_chunk=13, max_num_seqs=16)
    config = replace(model.config, max_model_len=model.context)
    made = Cluster(ServeConfig(config, settings, ParallelConfig(tp=tp, device="cpu", threads=1)))
    try:

        @asynccontextmanager
        async def connect() -> AsyncIterator:
            channel = await made.connect()
            try:
                yield channel
            finally:
                await channel.close()

        tally = Tally()
        for ask in ("together", "resumed"):
            tally.take(serve_way(model, Way(f"Ray, {tp} ranks, {ask}", ask=ask), seed, connect))
        return tally
    finally:
        made.close()
