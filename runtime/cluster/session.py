"""Ray in this process: started for us alone, or joined; once, whatever number of Clusters stand on it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import ray
from ray._private import worker

from runtime.errors import Unavailable

NAMESPACE = "tramontane"
OBJECT_STORE = 80 << 20  # Ray's smallest: nothing of ours goes through the object store


def start_ray(address: str | None) -> bool:
    """Start Ray, or join it at an address. False if this process has one already, which is used then.

    Raises Unavailable."""
    if ray.is_initialized():
        return False
    options = {"log_to_driver": False, "namespace": NAMESPACE, "logging_level": "ERROR"}
    # Ray reports usage over the network unless it is told not to; whoever wants that sets the variable.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address is None:
        options |= {
            "address": "local",
            "include_dashboard": False,
            "num_cpus": max(2, os.cpu_count() or 1),
            "object_store_memory": OBJECT_STORE,
        }
    else:
        options["address"] = address
    # On standard output Ray tells each driver of nodes that it takes for dead; there is no option for it, and
    # that place is for results.
    worker.print_to_stdstream = lambda *args, **more: None
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = "locally" if address is None else f"at {address}"
        raise Unavailable(f"Ray cannot be reached {where}: {str(error).splitlines()[0]}") from error
    return True


@contextlib.contextmanager
def lasting_ray() -> Iterator[None]:
    """For Clusters that come and go, and leave Ray to others: what one of them has started ends with this."""
    before = ray.is_initialized()
    try:
        yield
    finally:
        if not before and ray.is_initialized():
            ray.shutdown()


def hosts() -> int:
    """Nodes of the running Ray that live."""
    return sum(bool(node["Alive"]) for node in ray.nodes())
