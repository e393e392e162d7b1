"""The list of requests through Ray: ranks and engine as actors, tokens over sockets."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from runtime.config import EngineConfig, ParallelConfig, ServeConfig
from tests.conformance.compare import Tally
from tests.conformance.models import Model
from tests.conformance.ways import TINY_BLOCK, Way, serve_way


def run_cluster(model: Model, tp: int, seed: int) -> Tally:
    """On `tp` ranks, in chunks and with little room for KV, for which those that grow fight. A Ray that runs
    in this process is used and left as it is; otherwise one is started and ended."""
    from runtime.cluster.launch import Cluster

    blocks = model.room(model.requests, TINY_BLOCK)
    settings = EngineConfig(block_size=TINY_BLOCK, total_blocks=blocks, max_chunk=13, max_num_seqs=16)
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
        for way in (
            Way("together"),
            Way("together, growing", growing=True, copies=2),
            Way("resumed", ask="resumed"),
            Way("three choices each", ask="choices"),
            Way("prompts scored beside replies", ask="scores"),
        ):
            tally.take(serve_way(model, replace(way, name=f"Ray, {tp} ranks, {way.name}"), seed, connect))
        return tally
    finally:
        made.close()
