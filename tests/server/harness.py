"""A real gRPC server on a free port of this machine, over an engine with a script."""

import contextlib
import random
import socket
from dataclasses import dataclass
from pathlib import Path

import grpc
from google.rpc import error_details_pb2, status_pb2

from runtime.config import AccessConfig
from runtime.server.lifecycle import Limits, Server, serve
from runtime.server.pipeline import Pipeline
from tests.server.scripted import PieceTokenizer, ScriptedEngine, info_for
from tramontane.v1 import generate_pb2, inference_service_pb2_grpc

DETAILS = (
    error_details_pb2.ErrorInfo,
    error_details_pb2.BadRequest,
    error_details_pb2.RetryInfo,
    error_details_pb2.ResourceInfo,
)


@dataclass
class Running:
    server: Server
    engine: ScriptedEngine
    channel: grpc.aio.Channel
    stub: inference_service_pb2_grpc.InferenceServiceStub

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.server.port}"


@contextlib.asynccontextmanager
async def serving(
    engine: ScriptedEngine,
    *,
    limits: Limits | None = None,
    ready=True,
    context_length=4096,
    metrics_port: int | None = None,
    access: AccessConfig | None = None,
):
    tokenizer = PieceTokenizer()
    pipeline = Pipeline(tokenizer, None, engine, info_for(tokenizer, context_length))
    server = await serve(pipeline, port=0, metrics_port=metrics_port, limits=limits, access=access)
    if ready:
        await server.ready()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            yield Running(server, engine, channel, inference_service_pb2_grpc.InferenceServiceStub(channel))
    finally:
        await server.stop()


def quiet_port() -> int:
    """A free port that nobody gets by chance, to be bound later or twice. One of the ephemeral range may be
    another's by then: whoever asks for any port, and whoever connects, is given one of those."""
    file = Path("/proc/sys/net/ipv4/ip_local_port_range")
    first, last = map(int, (file.read_text() if file.exists() else "32768 65535").split())
    ports = [port for port in range(20_000, 65_536) if not first <= port <= last]
    for port in [*random.SystemRandom().sample(ports, len(ports)), 0]:
        with contextlib.suppress(OSError), socket.socket() as bound:
            bound.bind(("127.0.0.1", port))
            return bound.getsockname()[1]
    raise AssertionError("no port is free")


def ask(text="hi", **sampling) -> generate_pb2.GenerateRequest:
    request = generate_pb2.GenerateRequest(text=text)
    request.sampling.SetInParent()
    for name, value in sampling.items():
        if isinstance(value, list | tuple):
            getattr(request.sampling, name).extend(value)
        else:
            setattr(request.sampling, name, value)
    return request


async def refusal(call) -> grpc.aio.AioRpcError:
    """The error of a unary call, or of a stream read to its end."""
    try:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return error
    raise AssertionError("the call succeeded")


def details(error: grpc.aio.AioRpcError) -> dict:
    """google.rpc details by their type's name, checked against the status itself."""
    raw = dict(error.trailing_metadata())["grpc-status-details-bin"]
    status = status_pb2.Status.FromString(raw)
    assert status.code == error.code().value[0]
    assert status.message == error.details()
    found = {}
    for packed in status.details:
        kind = next(kind for kind in DETAILS if packed.Is(kind.DESCRIPTOR))
        found[kind.__name__] = kind.FromString(packed.value)
    return found


def bad_field(error: grpc.aio.AioRpcError) -> str:
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, error
    (violation,) = details(error)["BadRequest"].field_violations
    assert violation.description
    return violation.field
