"""`tramontane serve --detach`, `services` and `stop`: servers that live on a Ray cluster by themselves."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass

from runtime.cluster import service
from runtime.cluster.session import lasting_ray
from runtime.commands.engines import preview, start_engine
from runtime.commands.output import note, working, write_json, write_line
from runtime.commands.serve import DRAIN_SECONDS, announce, check, serve_until, warn
from runtime.config import AccessConfig, ServeConfig
from runtime.errors import InvalidArgument
from runtime.server.lifecycle import Server

ADDRESS = "auto"  # the Ray that this machine, or this job, belongs to
STOP_SECONDS = DRAIN_SECONDS + 30.0  # replies that run, then ranks that end


@dataclass(frozen=True)
class Serving:
    """The work of a service: all that `tramontane serve` does."""

    config: ServeConfig
    rebuilds: int

    def __call__(self, ready: Callable[[service.Facts], None], stop: threading.Event) -> None:
        front = check(self.config, self.rebuilds)

        async def until(server: Server) -> None:
            while not stop.is_set():
                await asyncio.sleep(0.1)
            await server.drain(DRAIN_SECONDS)

        with start_engine(self.config, local=False, ray_address=ADDRESS, rebuilds=self.rebuilds) as engine:
            asyncio.run(serve_until(front, engine, self.config, ready, until))


def detach(config: ServeConfig, *, ray_address: str, rebuilds: int, as_json: bool) -> None:
    """Start a service named as its model is, print its address once it serves, and leave it running.

    Raises TramontaneError: as `serve` does, and where one of that name runs."""
    config = dataclasses.replace(config, access=_from_anywhere(config.access))
    front = check(config, rebuilds)
    name = preview(front, config).model
    if not name.isprintable() or len(name) > 200:
        raise InvalidArgument("name", f"{name[:40]!r} is not a name for a service: give another with --name")
    warn(config)
    with lasting_ray(), working(f"starting the service {name}"):
        facts = service.start_service(name, Serving(config, rebuilds), ray_address)
    announce(facts, as_json)
    note(f"it goes on by itself; end it with: tramontane stop {name}")


def _from_anywhere(access: AccessConfig) -> AccessConfig:
    """The same files as a process finds them that works in another folder."""
    files = dataclasses.asdict(access)
    return AccessConfig(**{name: file and os.path.abspath(file) for name, file in files.items()})


def stop(name: str, *, ray_address: str) -> None:
    """End a service: running replies may finish. Raises NotFound, Unavailable."""
    with lasting_ray(), working(f"stopping {name}: replies that run may finish"):
        ended = service.stop_service(name, ray_address, STOP_SECONDS)
    write_line(f"tramontane: {name} is stopped" + ("" if ended else ", by force"))


def services(*, ray_address: str, as_json: bool) -> None:
    """Print the services of a Ray cluster, a line each. Raises Unavailable."""
    with lasting_ray():
        found = service.services(ray_address)
    if as_json:
        write_json({name: facts and dict(facts) for name, facts in found.items()})
        return
    for name, facts in sorted(found.items()):
        if facts is None:
            write_line(f"{name}  is not ready")
        else:
            write_line(f"{name}  {facts['address']}  tp {facts['tp']}, {facts['replicas']} replica(s)")
    if not found:
        note("no services run there")
