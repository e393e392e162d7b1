"""Fixtures that several tests of the gateway use."""

import asyncio
import functools

import pytest

from runtime.server import watch_port
from tests.server.harness import serving
from tests.server.twin import Twin
from tramontane import Client


@pytest.fixture(autouse=True)
def unhurried(monkeypatch):
    """A page that is asked for is answered, however long this machine stands still meanwhile."""
    monkeypatch.setattr(watch_port, "PATIENCE", 120.0)


@pytest.fixture(params=["blocking", "asyncio"])
def talk(request):
    """talk(engine, conversation): run `conversation(client)` against a server over `engine`. `client` are
    options of the client, the rest of the server."""

    def run(engine, conversation, resumes=0, client=None, **options):
        async def go():
            async with serving(engine, **options) as running:
                loop = asyncio.get_running_loop()

                def visit():
                    make = Client if request.param == "blocking" else functools.partial(Twin, loop=loop)
                    with make(running.target, resumes=resumes, **client or {}) as talker:
                        return conversation(talker)

                return await asyncio.to_thread(visit)

        return asyncio.run(go())

    return run
