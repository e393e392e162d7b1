"""The HTTP port of metrics and probes: what it answers, what it refuses, and where it can be."""

import asyncio
import contextlib
import logging
import socket

import pytest

from runtime.errors import InvalidArgument, NotEnough
from runtime.server import watch_port
from runtime.server.lifecycle import serve
from tests.server.harness import ask, quiet_port, serving
from tests.server.scrape import ask_http, get, parse
from tests.server.scripted import ScriptedEngine
from tests.server.test_lifecycle import is_draining, pipeline
from tests.server.test_streams import until


def visiting(visit, engine=None, **options):
    """What `visit(running, port)` returns."""

    async def go():
        async with serving(engine or ScriptedEngine(), metrics_port=0, **options) as running:
            return await visit(running, running.server.metrics_port)

    return asyncio.run(go())


def test_no_port_unless_asked():
    async def go():
        async with serving(ScriptedEngine()) as running:
            return running.server.metrics_port

    assert asyncio.run(go()) is None


def test_alive_at_once_and_ready_when_told():
    async def visit(running, port):
        async def state():
            ready = await get(port, "/readyz")
            return (await get(port, "/healthz")).status, ready.status, ready.body

        assert await state() == (200, 503, "the model is not ready yet\n")
        await running.server.ready()
        assert await state() == (200, 200, "ready\n")
        await running.server.not_ready()
        assert (await state())[:2] == (200, 503)

    visiting(visit, ready=False)


def test_a_server_that_drains_is_alive_and_still_counts():
    async def visit(running, port):
        call = running.stub.Generate(ask())
        await call.read()
        draining = asyncio.create_task(running.server.drain(250))
        await until(lambda: is_draining(running.server))
        assert (await get(port, "/healthz")).status == 200
        ready = await get(port, "/readyz")
        assert (ready.status, ready.body) == (503, "the server is shutting down\n")
        seen = parse((await get(port, "/metrics")).body)
        assert seen("tramontane_ready") == 0 and seen("tramontane_open_streams") == 1
        call.cancel()
        await draining
        with pytest.raises(OSError):
            await get(port, "/healthz")

    visiting(visit, ScriptedEngine(b"a", hang=True))


def test_metrics_come_in_the_form_that_is_asked_for():
    async def visit(running, port):
        plain = await get(port, "/metrics")
        assert plain.headers["Content-Type"].startswith("text/plain")
        assert plain.headers["Connection"] == "close"
        assert int(plain.headers["Content-Length"]) == len(plain.body)
        opened = await get(port, "/metrics", "application/openmetrics-text;version=1.0.0,text/plain;q=0.5")
        assert opened.headers["Content-Type"].startswith("application/openmetrics-text")
        both = parse(plain.body), parse(opened.body, openmetrics=True)
        assert both[0].names == both[1].names
        for accept in ("", "application/openmetrics-text;version=x.y", ";;,=", "\x7f"):
            assert (await get(port, "/metrics", accept)).status == 200
        assert (await get(port, "/metrics?name[]=x")).status == 200

    visiting(visit)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        ("GET / HTTP/1.1\r\n\r\n", 404),
        ("GET /metrics/ HTTP/1.1\r\n\r\n", 404),
        ("POST /metrics HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", 405),
        ("HEAD /healthz HTTP/1.0\r\n\r\n", 200),
        ("GET /healthz\r\n\r\n", 400),
        ("GET /healthz HTTP/2.0\r\n\r\n", 400),
        (b"\x16\x03\x01 not HTTP \xff\r\n\r\n", 400),
        ("\r\n\r\n", 400),
        ("GET /healthz HTTP/1.1\r\nX: " + "x" * 20000 + "\r\n\r\n", 431),
    ],
)
def test_what_it_answers(request_, status):
    async def visit(running, port):
        answer = await ask_http(port, request_)
        assert answer.status == status
        if status == 404:
            assert answer.body == "Not Found; there are /metrics, /healthz, /readyz\n"
        if status == 405:
            assert answer.headers["Allow"] == "GET, HEAD"
        if str(request_).startswith("HEAD"):
            assert answer.body == "" and answer.headers["Content-Length"] == "6"
        assert (await get(port, "/healthz")).status == 200

    visiting(visit)


def test_a_silent_client_holds_up_nobody_and_is_let_go(monkeypatch, caplog):

    async def visit(running, port):
        _, silent = await asyncio.open_connection("127.0.0.1", port)
        silent.write(b"GET /heal")
        assert (await get(port, "/healthz")).status == 200
        # What comes while patience is short has to be there at once, on a machine that stalls too.
        with monkeypatch.context() as short:
            short.setattr(watch_port, "PATIENCE", 0.1)
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /heal")
            with contextlib.suppress(ConnectionResetError):  # if it was let go before it said a word
                assert await asyncio.wait_for(reader.read(), 60) == b""
            writer.close()
        silent.close()
        # Nor one that goes in the middle.
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET")
        writer.transport.abort()
        await asyncio.sleep(0.02)
        assert (await get(port, "/healthz")).status == 200

    with caplog.at_level(logging.WARNING):
        visiting(visit)
    assert not caplog.records


def test_a_defect_is_logged_and_told_without_its_cause(caplog):
    class Defective(ScriptedEngine):
        async def load(self):
            raise ZeroDivisionError("secret")

    async def visit(running, port):
        answer = await get(port, "/metrics")
        assert (answer.status, answer.body) == (500, "Internal Server Error\n")
        assert (await get(port, "/readyz")).status == 200

    visiting(visit, Defective())
    assert "secret" in caplog.text


def test_a_busy_port_is_refused():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(NotEnough, match=rf"^port {port} on 127\.0\.0\.1 is busy; .*choose another"):
            asyncio.run(serve(pipeline(), port=0, metrics_port=port))


@pytest.mark.parametrize(
    ("port", "metrics_port", "fragment"),
    [(0, 65536, "0 to 65535"), (0, -1, "0 to 65535"), (None, None, "the port of gRPC")],
)
def test_a_port_that_cannot_be_is_named(port, metrics_port, fragment):
    if port is None:
        port = metrics_port = quiet_port()
    with pytest.raises(InvalidArgument, match=fragment) as caught:
        asyncio.run(serve(pipeline(), port=port, metrics_port=metrics_port))
    assert caught.value.field == "metrics-port"
