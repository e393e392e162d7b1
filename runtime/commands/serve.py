"""`tramontane serve`: a model behind gRPC until a signal comes or its ranks are lost."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from runtime.commands.engines import Engine, Front, open_front, preview, start_engine
from runtime.commands.output import log_line, write_json, write_line
from runtime.commands.phases import Phases
from runtime.config import ServeConfig
from runtime.errors import InvalidArgument, Unavailable
from runtime.server.access import exposure, open_access
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
    phases = Phases()
    front = check(config, rebuilds)
    warn(config)

    def ready(facts: Mapping[str, Any]) -> None:
        phases.begin("serving")
        announce({**facts, "phases": phases.begun()}, as_json)

    async def until(server: Server) -> None:
        await server.run_until_signal(DRAIN_SECONDS)

    where = {"local": local, "ray_address": ray_address}
    with start_engine(config, **where, rebuilds=rebuilds, hear=phases.begin) as engine:
        phases.begin("gateway")
        asyncio.run(serve_until(front, engine, config, ready, until))


def check(config: ServeConfig, rebuilds: int) -> Front:
    """Refuse all that can be refused before weights are read. Raises TramontaneError."""
    check_addresses(config.host, config.port, config.metrics_port)
    open_access(config.access)
    front = open_front(config.model, chat=True, device=config.parallel.device)
    preview(front, config)
    if rebuilds < 0:
        raise InvalidArgument("rebuilds", f"must be 0 or more, not {rebuilds}")
    return front


def warn(config: ServeConfig) -> None:
    """Say in a line that strangers may reach what is served, if they may."""
    if (trouble := exposure(config.host, config.access)) is not None:
        log_line(f"warning: {trouble}")


async def serve_until(
    front: Front,
    engine: Engine,
    config: ServeConfig,
    ready: Callable[[Mapping[str, Any]], None],
    until: Callable[[Server], Awaitable[None]],
) -> None:
    """Serve until `until` returns, which drains the server. `ready` gets what the ready line says.

    Raises Unavailable when the last replica is lost."""
    async with engine.connect() as client:
        pipeline = front.pipeline(client, engine.info)
        await _first_step(pipeline)
        server = await start_server(
            pipeline,
            host=config.host,
            port=config.port,
            metrics_port=config.metrics_port,
            access=config.access,
        )
        signalled = asyncio.ensure_future(until(server))
        lost = asyncio.create_task(engine.lost(client))
        await server.ready()
        health = asyncio.create_task(_follow(server, client))
        ready(_facts(server, engine.info, config))
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


def _facts(server: Server, info: EngineInfo, config: ServeConfig) -> dict[str, Any]:
    """What the ready line says."""
    access = config.access
    host = f"[{server.host}]" if ":" in server.host else server.host
    return {
        "address": f"{host}:{server.port}",
        "host": server.host,
        "port": server.port,
        "metrics": None if server.metrics_port is None else f"http://{host}:{server.metrics_port}/metrics",
        "tls": None if access.tls_cert is None else "server" if access.tls_client_ca is None else "mutual",
        "tokens": access.auth_token_file is not None,
        "model": info.model,
        "numerics": info.numerics,
        "tp": info.tp,
        "pp": info.pp,
        "replicas": config.parallel.replicas,
        "units": info.units,
        "context_length": info.context_length,
        "max_num_seqs": info.max_num_seqs,
        "kv_blocks": info.total_blocks,
        "block_size": info.block_size,
        "ranks": list(info.rank_nodes),
    }


def announce(facts: Mapping[str, Any], as_json: bool) -> None:
    """Print the ready line."""
    if as_json:
        write_json(dict(facts))
        return
    stages = "" if facts["pp"] == 1 else f"pp {facts['pp']}, "
    copies = "" if facts["replicas"] == 1 else f"{facts['replicas']} replicas, "
    write_line(
        f"tramontane: serving {facts['model']} on {facts['address']} (tp {facts['tp']}, {stages}{copies}"
        f"context {facts['context_length']}, numerics {facts['numerics']})"
        + (f", metrics at {facts['metrics']}" if facts["metrics"] else "")
    )
