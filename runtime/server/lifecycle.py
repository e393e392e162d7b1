"""The gRPC server from bind to drain.

    serve()  binds and answers; health of the service is NOT_SERVING, replies are refused
    ready()  a real forward step has passed: SERVING
    drain()  NOT_SERVING, new replies refused, running ones finish, then the server stops
    stop()   now

Health of "" is SERVING as long as the process answers at all: a process that drains is not a dead one.
"""

import asyncio
import errno
import http
import logging
import signal
import socket
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from runtime.config import AccessConfig
from runtime.errors import InvalidArgument, NotEnough
from runtime.server.access import Gate, open_access
from runtime.server.engine_metrics import LoadReader
from runtime.server.grpc_service import Admission, InferenceService
from runtime.server.guard import Guard
from runtime.server.metrics import Metrics
from runtime.server.pipeline import Pipeline
from runtime.server.reflection import add_reflection
from runtime.server.watch_port import Page, Pages, WatchPort
from tramontane.v1 import inference_service_pb2, inference_service_pb2_grpc

log = logging.getLogger(__name__)

SERVICE = inference_service_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
# Statuses of replies that ended and calls that are not replies still need a moment to get out.
_LAST_CALLS = 1.0


@dataclass(frozen=True, slots=True)
class Limits:
    """What one gateway takes upon itself."""

    max_message_bytes: int = 8 << 20  # of a request; a prompt of 10^6 tokens is about 4 MB
    max_streams: int = 1024  # replies open at once; more are refused with QueueFull
    max_lag: int = 1 << 16  # tokens a reply's reader may be behind, alternatives an eighth each: about 8 MB
    max_aside: int = 64  # texts encoded or decoded at once, apart from replies
    max_scores: int = 1 << 23  # tokens and alternatives scored at once: 800 MB where no reader reads


async def serve(
    pipeline: Pipeline,
    *,
    host: str = "127.0.0.1",
    port: int = 50051,
    metrics_port: int | None = None,
    limits: Limits | None = None,
    access: AccessConfig | None = None,
) -> "Server":
    """Start a server; port 0 takes any free one. With `metrics_port`, /metrics, /healthz and /readyz answer
    there through HTTP, whatever `access` asks of gRPC's clients.

    Raises NotEnough for a port that cannot be had, InvalidArgument for a host that is not of this machine and
    for files of `access` that cannot be used.
    """
    limits, config = limits or Limits(), access or AccessConfig()
    check_addresses(host, port, metrics_port)
    may = open_access(config)
    metrics = Metrics(pipeline.info)
    guards = [Guard(metrics)] if may.tokens is None else [Gate(may.tokens, metrics), Guard(metrics)]
    server = grpc.aio.server(interceptors=guards, options=channel_options(limits))
    loads = LoadReader(pipeline.client)
    service = InferenceService(
        pipeline,
        metrics,
        loads,
        max_streams=limits.max_streams,
        max_lag=limits.max_lag,
        max_scores=limits.max_scores,
        max_aside=limits.max_aside,
    )
    inference_service_pb2_grpc.add_InferenceServiceServicer_to_server(service, server)
    healths = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(healths, server)
    add_reflection(server, [SERVICE, health.SERVICE_NAME])
    try:
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        if may.tls is None:
            bound = server.add_insecure_port(address)
        else:
            bound = server.add_secure_port(address, may.tls)
    except RuntimeError:
        if may.tls is not None:
            check_addresses(host, port)  # else it is the certificate: gRPC knows fewer kinds than OpenSSL
            raise InvalidArgument("tls-cert", f"{config.tls_cert}: gRPC does not take it") from None
        raise _busy(host, port) from None
    watch = None
    if metrics_port is not None:
        pages = _pages(metrics, service, loads)
        watch = await WatchPort.open(_bind(host, metrics_port, "metrics-port"), pages)
    await server.start()
    running = Server(host, bound, server, service, healths, watch)
    await running.not_ready()
    return running


class Server:
    """A running server. `port` is the one it is bound to, `metrics_port` that of HTTP, if it has one."""

    def __init__(
        self,
        host: str,
        port: int,
        server: grpc.aio.Server,
        service: InferenceService,
        healths: health.aio.HealthServicer,
        watch: WatchPort | None,
    ):
        self.host = host
        self.port = port
        self.metrics_port = watch and watch.port
        self._server = server
        self._service = service
        self._healths = healths
        self._watch = watch

    async def ready(self) -> None:
        """Take requests: the engine has passed a real forward step."""
        if self._service.admission is not Admission.DRAINING:
            self._service.admission = Admission.OPEN
            await self._report(health_pb2.HealthCheckResponse.SERVING)

    async def not_ready(self) -> None:
        """Refuse new replies until `ready` is called again: the engine is starting, or rebuilt."""
        if self._service.admission is not Admission.DRAINING:
            self._service.admission = Admission.STARTING
            await self._report(health_pb2.HealthCheckResponse.NOT_SERVING)

    async def drain(self, grace: float) -> None:
        """Refuse new replies, let running ones finish for up to `grace` seconds, then stop."""
        self._service.admission = Admission.DRAINING
        await self._report(health_pb2.HealthCheckResponse.NOT_SERVING)
        try:
            await asyncio.wait_for(self._service.wait_idle(), grace)
        except TimeoutError:
            log.warning("%d streams did not finish within %g s", self._service.open_streams, grace)
            await self.stop()
        else:
            await self._end()

    async def stop(self) -> None:
        """Stop now: replies that run end with UNAVAILABLE, and their requests are aborted."""
        self._service.admission = Admission.DRAINING
        self._service.cut_off()
        await self._end()

    async def _end(self) -> None:
        await self._server.stop(_LAST_CALLS)
        self._service.close()
        if self._watch is not None:
            self._watch.close()

    async def run_until_signal(self, grace: float) -> None:
        """Serve until SIGTERM or SIGINT, then drain; a second signal stops at once."""
        loop = asyncio.get_running_loop()
        signals: asyncio.Queue[int] = asyncio.Queue()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, signals.put_nowait, number)
        try:
            await signals.get()
            draining = asyncio.create_task(self.drain(grace))
            again = asyncio.create_task(signals.get())
            await asyncio.wait([draining, again], return_when=asyncio.FIRST_COMPLETED)
            again.cancel()
            if draining.done():
                await draining
            else:
                draining.cancel()
                await self.stop()
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    async def _report(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        await self._healths.set(SERVICE, status)


def channel_options(limits: Limits) -> list[tuple[str, int]]:
    """Arguments of the server's channels. gRPC ignores a name it does not know; a test checks these.

    A prefill or a queue may leave a stream silent for minutes. Both ends ping then, and the server must
    never take a client's pings for abuse ("too_many_pings"), which gRPC does by default.
    """
    return [
        ("grpc.max_receive_message_length", limits.max_message_bytes),
        ("grpc.max_send_message_length", limits.max_message_bytes),
        ("grpc.max_concurrent_streams", limits.max_streams + 100),  # of a connection, any calls
        ("grpc.so_reuseport", 0),  # two servers on one port would share its connections silently
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ]


def _pages(metrics: Metrics, service: InferenceService, loads: LoadReader) -> Pages:
    """What the metrics' port answers."""

    async def everything(accept: str) -> Page:
        seen = await loads.read()
        ready = service.admission is Admission.OPEN
        content_type, text = metrics.render(
            seen, ready=ready, open_streams=service.open_streams, accept=accept
        )
        return Page(text, content_type)

    async def alive(accept: str) -> Page:
        return Page(b"alive\n")

    async def ready(accept: str) -> Page:
        if service.admission is Admission.OPEN:
            return Page(b"ready\n")
        return Page(f"{service.admission.value}\n".encode(), status=http.HTTPStatus.SERVICE_UNAVAILABLE)

    return {"/metrics": everything, "/healthz": alive, "/readyz": ready}


def check_addresses(host: str, port: int, metrics_port: int | None = None) -> None:
    """Say what is wrong with addresses to bind, where gRPC would only log and fail.

    `serve` does this itself; callers with slow work before it may want to know first. Raises as it does.
    """
    with _bind(host, port, "port"):
        if metrics_port is not None:
            if metrics_port == port != 0:
                raise InvalidArgument("metrics-port", f"{port} is the port of gRPC; choose another")
            _bind(host, metrics_port, "metrics-port").close()


def _bind(host: str, port: int, name: str) -> socket.socket:
    """A listening socket. Errors call the port `name`."""
    if not 0 <= port <= 65535:
        raise InvalidArgument(name, f"must be from 0 to 65535, not {port}")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError:
        raise InvalidArgument("host", f"{host!r} is not an address of this machine") from None
    family, kind, protocol, _, address = found[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen()
    except OSError as error:
        bound.close()
        if isinstance(error, PermissionError):
            raise NotEnough(f"port {port} needs more rights; use one above 1023") from None
        if error.errno == errno.EADDRNOTAVAIL:
            raise InvalidArgument("host", f"{host!r} is not an address of this machine") from None
        raise _busy(host, port) from None
    return bound


def _busy(host: str, port: int) -> NotEnough:
    return NotEnough(f"port {port} on {host} is busy; stop what uses it, or choose another (0 takes any)")
