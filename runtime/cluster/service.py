"""Services that outlive the command that started them: a detached actor each, found again by its name.

The actor's process does what it is given to do; whatever actors and placements it makes for that, Ray clears
away when it ends, however it ends. Knows nothing of what a service does.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from runtime.cluster.session import NAMESPACE, start_ray
from runtime.errors import InvalidArgument, NotFound, TramontaneError, Unavailable

PREFIX = "service:"  # of the actors' names
LOOK_SECONDS = 2.0  # between looks at whether one is ready
GONE_SECONDS = 15.0  # for Ray to forget the name of one that has ended

Facts = Mapping[str, Any]
"""What a service says of itself, as its ready line has it."""


class Work(Protocol):
    """What a service does, in a thread of its actor's process. Ray sends it there: of a class that can be
    imported."""

    def __call__(self, ready: Callable[[Facts], None], stop: threading.Event) -> None:
        """Calls `ready` once it serves, and returns soon after `stop` is set. Raises TramontaneError."""
        ...


@ray.remote(num_cpus=0.001, max_restarts=0, max_concurrency=4)
class ServiceActor:
    def __init__(self, work: Work):
        self._work = work
        self._stop = threading.Event()
        self._settled = threading.Event()  # it serves, or has failed to
        self._ended = threading.Event()
        self._facts: Facts | None = None
        self._error: TramontaneError | None = None
        # A thread, not a call: calls belong to whoever made them, and that one leaves.
        threading.Thread(target=self._run, name="service", daemon=True).start()

    def _run(self) -> None:
        try:
            self._work(self._ready, self._stop)
        except TramontaneError as error:
            self._error = error
        except BaseException as error:  # a defect, but one that its starter must hear of
            self._error = Unavailable(f"the service failed: {type(error).__name__}: {error}")
        self._ended.set()
        if self._settled.is_set() and not self._stop.is_set():
            print(f"error: {self._error}", file=sys.stderr, flush=True)
            os._exit(1)  # nobody waits for it, and its name is to be free again
        self._settled.set()

    def _ready(self, facts: Facts) -> None:
        self._facts = facts
        self._settled.set()

    def facts(self, seconds: float) -> Facts | None:
        """What it says of itself; None if it is not ready in so many seconds. Raises what it failed of."""
        if not self._settled.wait(seconds):
            return None
        if self._error is not None:
            raise self._error
        return self._facts

    def stop(self, seconds: float) -> bool:
        """Let it end; whether it did within so many seconds."""
        self._stop.set()
        return self._ended.wait(seconds)


def start_service(name: str, work: Work, address: str) -> Facts:
    """Start a service on this node of a Ray that runs, and wait until it serves.

    Raises InvalidArgument if there is one of that name, Unavailable, and what the service fails of; nothing
    of it is left then, nor if the wait is interrupted."""
    start_ray(address)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"name": PREFIX + name, "namespace": NAMESPACE, "lifetime": "detached"}
    try:
        actor = ServiceActor.options(scheduling_strategy=here, **options).remote(work)
    except ValueError:
        raise InvalidArgument(
            "name", f"a service {name!r} runs already; end it with: tramontane stop {name}"
        ) from None
    try:
        while (facts := ray.get(actor.facts.remote(LOOK_SECONDS))) is None:
            pass
        return facts
    except BaseException as error:
        _end(name, actor, 10.0)
        cause = getattr(error, "cause", None)
        if isinstance(cause, TramontaneError):
            raise cause from None
        if isinstance(error, ray.exceptions.RayError):
            raise Unavailable(f"the service died: {str(error).strip().splitlines()[-1]}") from error
        raise


def stop_service(name: str, address: str, seconds: float) -> bool:
    """End a service and wait until nothing of it is left. False if it had to be killed, after `seconds`.

    Raises NotFound, Unavailable."""
    start_ray(address)
    return _end(name, _find(name), seconds)


def services(address: str) -> dict[str, Facts | None]:
    """All services of a Ray by name, with what they say of themselves: None if they are not ready."""
    start_ray(address)
    found: dict[str, Facts | None] = {}
    for entry in ray.util.list_named_actors(all_namespaces=True):
        if entry["namespace"] == NAMESPACE and entry["name"].startswith(PREFIX):
            name = entry["name"].removeprefix(PREFIX)
            found[name] = None
            with contextlib.suppress(ray.exceptions.RayError, TramontaneError):
                found[name] = ray.get(_find(name).facts.remote(0.0), timeout=LOOK_SECONDS)
    return found


def _find(name: str):
    try:
        return ray.get_actor(PREFIX + name, namespace=NAMESPACE)
    except ValueError:
        raise NotFound("service", name, "tramontane services lists those that run") from None


def _end(name: str, actor, seconds: float) -> bool:
    """Whether it ended by itself. Returns when its name is free."""
    stopped = False
    with contextlib.suppress(ray.exceptions.RayError):  # gone already, or it does not answer
        stopped = ray.get(actor.stop.remote(seconds), timeout=seconds + LOOK_SECONDS)
    ray.kill(actor, no_restart=True)
    end = time.monotonic() + GONE_SECONDS
    while time.monotonic() < end:
        try:
            ray.get_actor(PREFIX + name, namespace=NAMESPACE)
        except ValueError:
            break
        time.sleep(0.1)
    return stopped
