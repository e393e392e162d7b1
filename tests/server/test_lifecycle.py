"""The server from bind to drain, in this process and as one that gets signals."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from runtime.errors import InvalidArgument, NotEnough
from runtime.server import lifecycle
from runtime.server.grpc_service import Admission
from runtime.server.lifecycle import SERVICE, Server, serve
from runtime.server.pipeline import Pipeline
from tests.server.harness import ask, refusal, serving
from tests.server.scripted import PieceTokenizer, ScriptedEngine, info_for
from tests.server.test_streams import until
from tests.support import REPOSITORY

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def health(running, service: str) -> int:
    stub = health_pb2_grpc.HealthStub(running.channel)
    return (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status


def is_draining(server: Server) -> bool:
    return server._service.admission is Admission.DRAINING


def pipeline(engine=None) -> Pipeline:
    tokenizer = PieceTokenizer()
    return Pipeline(tokenizer, None, engine or ScriptedEngine(), info_for(tokenizer))


def test_alive_at_once_and_ready_when_told():
    async def go():
        async with serving(ScriptedEngine(b"a"), ready=False) as running:
            assert (await health(running, ""), await health(running, SERVICE)) == (SERVING, NOT_SERVING)
            error = await refusal(running.stub.Generate(ask()))
            assert error.code() is grpc.StatusCode.UNAVAILABLE and "not ready" in error.details()
            await running.server.ready()
            assert await health(running, SERVICE) == SERVING
            assert [message async for message in running.stub.Generate(ask())]
            await running.server.not_ready()
            assert (await health(running, ""), await health(running, SERVICE)) == (SERVING, NOT_SERVING)

    asyncio.run(go())


def test_health_can_be_watched_and_unknown_services_are_not_found():
    async def go():
        async with serving(ScriptedEngine(), ready=False) as running:
            stub = health_pb2_grpc.HealthStub(running.channel)
            watch = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
            assert (await watch.read()).status == NOT_SERVING
            await running.server.ready()
            assert (await watch.read()).status == SERVING
            watch.cancel()
            request = health_pb2.HealthCheckRequest(service="nobody")
            assert (await refusal(stub.Check(request))).code() is grpc.StatusCode.NOT_FOUND

    asyncio.run(go())


def test_a_drain_refuses_new_replies_and_finishes_running_ones():
    async def go():
        engine = ScriptedEngine(b"a" * 50, gate=asyncio.Event())
        async with serving(engine) as running:
            call = running.stub.Generate(ask())
            messages = aiter(call)
            text = (await anext(messages)).text
            draining = asyncio.create_task(running.server.drain(250))
            await until(lambda: is_draining(running.server))
            assert (await health(running, ""), await health(running, SERVICE)) == (SERVING, NOT_SERVING)
            error = await refusal(running.stub.Generate(ask()))
            assert error.code() is grpc.StatusCode.UNAVAILABLE and "shutting down" in error.details()
            assert not draining.done()
            engine.gate.set()
            text += "".join([message.text async for message in messages])
            assert text == "a" * 50 and await call.code() is grpc.StatusCode.OK
            await asyncio.wait_for(draining, 120)  # and not when its grace ends

    asyncio.run(go())


def test_a_drain_ends_when_its_grace_does(monkeypatch):
    monkeypatch.setattr(lifecycle, "_LAST_CALLS", 60.0)  # time to say why, on a machine that stalls too

    async def go():
        engine = ScriptedEngine(b"a", hang=True)
        async with serving(engine) as running:
            call = running.stub.Generate(ask())
            ending = asyncio.create_task(refusal(call))
            await until(lambda: engine.running == 1)
            start = time.monotonic()
            await running.server.drain(0.2)
            assert time.monotonic() - start >= 0.2
            assert engine.running == 0 and len(engine.aborted) == 1
            error = await ending
            assert error.code() is grpc.StatusCode.UNAVAILABLE and "shut down" in error.details()

    asyncio.run(go())


def test_nothing_makes_a_draining_server_ready_again():
    async def go():
        async with serving(ScriptedEngine(b"a", hang=True)) as running:
            call = running.stub.Generate(ask())
            await call.read()
            draining = asyncio.create_task(running.server.drain(250))
            await until(lambda: is_draining(running.server))
            await running.server.ready()
            assert await health(running, SERVICE) == NOT_SERVING
            call.cancel()
            await draining

    asyncio.run(go())


def test_a_busy_port_says_what_to_do():
    async def go(port):
        await serve(pipeline(), port=port)

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(NotEnough, match=rf"^port {port} on 127\.0\.0\.1 is busy; .*choose another"):
            asyncio.run(go(port))


def test_two_servers_do_not_share_a_port():
    async def go():
        async with serving(ScriptedEngine()) as running:
            with pytest.raises(NotEnough):
                await serve(pipeline(), port=running.server.port)

    asyncio.run(go())


@pytest.mark.parametrize(
    ("field", "address"),
    [
        ("host", {"host": "192.0.2.1"}),
        ("host", {"host": "no such host"}),
        ("port", {"port": 65536}),
        ("port", {"port": -1}),
    ],
)
def test_an_address_that_cannot_be_is_named(field, address):
    with pytest.raises(InvalidArgument) as caught:
        asyncio.run(serve(pipeline(), **{"port": 0, **address}))
    assert caught.value.field == field


def test_ipv6_and_names_work_as_hosts():
    async def go(host):
        server = await serve(pipeline(), host=host, port=0)
        try:
            shown = f"[{host}]" if ":" in host else host
            async with grpc.aio.insecure_channel(f"{shown}:{server.port}") as channel:
                stub = health_pb2_grpc.HealthStub(channel)
                return (await stub.Check(health_pb2.HealthCheckRequest(), timeout=60)).status
        finally:
            await server.stop()

    assert asyncio.run(go("localhost")) == SERVING
    if socket.has_ipv6 and os.path.exists("/proc/net/if_inet6"):
        with open("/proc/net/if_inet6") as table:
            if " lo\n" in table.read():
                assert asyncio.run(go("::1")) == SERVING


# A reply has one token until the server drains, and then the others, or none at all.
PROCESS = """
import asyncio
import sys
from runtime.server.lifecycle import serve
from tests.server.test_lifecycle import is_draining, pipeline
from tests.server.scripted import ScriptedEngine

async def main():
    gate = asyncio.Event()
    server = await serve(pipeline(ScriptedEngine(b"a" * 100, gate=gate)), port=0)
    await server.ready()

    async def go_on():
        while not is_draining(server):
            await asyncio.sleep(0.01)
        gate.set()

    going_on = asyncio.create_task(go_on()) if sys.argv[1] == "goes on" else None
    print(server.port, flush=True)
    await server.run_until_signal(grace=250)

asyncio.run(main())
"""


@pytest.fixture
def process(request):
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "proto")])
    started = subprocess.Popen(
        [sys.executable, "-c", PROCESS, request.param],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    yield started, int(started.stdout.readline())
    started.kill()
    started.communicate()


def _generate(port, after_first):
    from tramontane.v1.inference_service_pb2_grpc import InferenceServiceStub

    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = InferenceServiceStub(channel).Generate(ask())
        text = next(call).text
        after_first(channel)
        for message in call:
            text += message.text
    return text


@pytest.mark.parametrize("process", ["goes on"], indirect=True)
def test_sigterm_drains(process):
    server, port = process
    assert _generate(port, lambda _: server.send_signal(signal.SIGTERM)) == "a" * 100
    assert server.wait(120) == 0  # and not when its grace ends
    assert server.stderr.read() == ""


@pytest.mark.parametrize("process", ["stays"], indirect=True)
def test_a_second_signal_stops_at_once(process):
    server, port = process

    def twice(channel):
        server.send_signal(signal.SIGTERM)
        check = health_pb2_grpc.HealthStub(channel).Check
        while check(health_pb2.HealthCheckRequest(service=SERVICE)).status == SERVING:
            time.sleep(0.01)  # two signals that come together may be one
        server.send_signal(signal.SIGTERM)

    with pytest.raises(grpc.RpcError):
        _generate(port, twice)
    assert server.wait(120) == 0


def test_stop_frees_what_runs():
    async def go():
        engine = ScriptedEngine(b"a", hang=True)
        async with serving(engine) as running:
            call = running.stub.Generate(ask())
            await call.read()
            await running.server.stop()
            await until(lambda: engine.running == 0)

    asyncio.run(go())
