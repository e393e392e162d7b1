"""`tramontane serve`: a model behind gRPC until a signal comes or its ranks are lost."""

from __future__ import annotations

import asyncio
import contextlib

from runtime.commands.engines import Engine, Front, open_front, preview, start_engine
from runtime.commands.output import write_json, write_line
from runtime.config import ServeConfig
from runtime.errors import InvalidArgument, Unavailable
from runtime.server.engine_client import EngineClient
from runtime.server.lifecycle import Server, check_addresses
from runtime.server.lifecycle import serve as start_server
from runtime.server.pipeline import Completion, Pipeline
from runtime.server.replicas import Replicas
from runtime.types import EngineInfo, FinishReason, SamplingParams

DRAIN_SECONDS = 30.0  # what running replies have to finish in after a signal
LOST_SECONDS = 2.0  # for the statuses of broken streams to reach their clients


def serve(config: ServeConfig, *, local: bool, ray_address: str | None, rebuilds: int, as_json: bool) -> None:
    """Print one line with the address once a real forward step has passed; return after a drain. A replica
    that is lost is built again, at most `rebuilds` times in a row.

    Raises TramontaneError: what cannot be served, a busy port, the loss of the last replica.
    """
    # All that can be refused is refused before weights are read.
    check_addresses(config.host, config.port, config.metrics_port)
    front = open_front(config.model, chat=True)
    preview(front, config)
    if rebuilds < 0:
        raise InvalidArgument("rebuilds", f"must be 0 or more, not {rebuilds}")
    with start_engine(config, local=local, ray_address=ray_address, rebuilds=rebuilds) as engine:
        asyncio.run(_serve(front, engine, config, as_json))


async def _serve(front: Front, engine: Engine, config: ServeConfig, as_json: bool) -> None:
    async with engine.connect() as client:
        pipeline = front.pipeline(client, engine.info)
        await _first_step(pipeline)
        server = await start_server(
            pipeline, host=config.host, port=config.port, metrics_port=config.metrics_port
        )
        signalled = asyncio.create_task(server.run_until_signal(DRAIN_SECONDS))
        lost = asyncio.create_task(engine.lost(client))
        await server.ready()
        health = asyncio.create_task(_follow(server, client))
        _announce(server, engine.info, config.parallel.replicas, as_json)
        await asyncio.wait([signalled, lost], return_when=asyncio.FIRST_COMPLETED)
        health.cancel()
        if lost.done() and not signalled.done():
            signalled.cancel()
            # Broken streams end with a status of their own; new ones are refused meanwhile.
            await server.drain(LOST_SECONDS)
            raise Unavailable(f"{lost.result()}; the server stops, start it again")
        lost.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await lost
        await signalled


async def _follow(server: Server, client: EngineClient) -> None:
    """Take new requests only while some replica is there to answer them."""
    while isinstance(client, Replicas):
        await client.until(there=False)
        await server.not_ready()
        await client.until(there=True)
        await server.ready()


async def _first_step(pipeline: Pipeline) -> None:
    """One token through scheduler, ranks and sampling."""
    params = SamplingParams(max_tokens=1, temperature=0.0, seed=0)
    async for piece in pipeline.run(Completion("first-step", token_ids=(0,), params=params)):
        if piece.final and piece.final.finish_reason not in (FinishReason.LENGTH, FinishReason.STOP):
            raise Unavailable(f"the first forward step failed: {piece.final.detail}")


def _announce(server: Server, info: EngineInfo, replicas: int, as_json: bool) -> None:
    host = f"[{server.host}]" if ":" in server.host else server.host
    address = f"{host}:{server.port}"
    metrics = None if server.metrics_port is None else f"http://{host}:{server.metrics_port}/metrics"
    if as_json:
        write_json(
            {
                "address": address,
                "host": server.host,
                "port": server.port,
                "metrics": metrics,
                "model": info.model,
                "numerics": info.numerics,
                "tp": info.tp,
                "pp": info.pp,
                "replicas": replicas,
                "units": info.units,
                "context_length": info.context_length,
                "max_num_seqs": info.max_num_seqs,
                "kv_blocks": info.total_blocks,
                "block_size": info.block_size,
                "ranks": list(info.rank_nodes),
            }
        )
    else:
        stages = "" if info.pp == 1 else f"pp {info.pp}, "
        copies = "" if replicas == 1 else f"{replicas} replicas, "
        write_line(
            f"tramontane: serving {info.model} on {address} "
            f"(tp {info.tp}, {stages}{copies}context {info.context_length}, numerics {info.numerics})"
            + (f", metrics at {metrics}" if metrics else "")
        )
