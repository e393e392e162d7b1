"""Where on Ray the ranks go: those of a stage together in one node, stages on nodes of their own if possible.

Says what is missing while it waits, and refuses in the end rather than hang.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from runtime.config import ParallelConfig
from runtime.errors import NotEnough

PLACE_SECONDS = 60.0
NOTICE_SECONDS = 70.0  # a node that says nothing any more Ray gives up after 64 s, unless told otherwise
LOOK_SECONDS = 0.5
SHARE = 0.001  # CPUs an actor: ranks divide the cores by threads; whole-core bundles would not place


@dataclass(frozen=True, slots=True)
class Room:
    """What Ray has: free and in all, and in each node that lives."""

    free_gpus: int
    free_cpus: float
    node_gpus: Sequence[int]

    @staticmethod
    def now() -> Room:
        free = ray.available_resources()
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        return Room(
            int(free.get("GPU", 0)), free.get("CPU", 0.0), [int(node.get("GPU", 0)) for node in nodes]
        )


def place(
    parallel: ParallelConfig, say: Callable[[str], None], *, seconds: float = PLACE_SECONDS
) -> PlacementGroup:
    """A bundle for each stage, with room for its ranks; the first has room for the engine beside them.

    Raises NotEnough that says what is missing, having given back what was asked for.
    """
    _await_answers(say)
    group = placement_group(_bundles(parallel), strategy="SPREAD" if parallel.pp > 1 else "STRICT_PACK")
    try:
        end = time.monotonic() + seconds
        said = ""
        while not group.wait(min(1.0, seconds)):
            lacking = shortage(parallel, Room.now())
            if time.monotonic() >= end:
                raise NotEnough(f"Ray found no room in {seconds:.0f} s: {lacking}; see `ray status`")
            if lacking != said:
                said = lacking
                say(f"waiting for Ray: {lacking}")
    except BaseException:
        remove_placement_group(group)
        raise
    return group


def _await_answers(say: Callable[[str], None]) -> None:
    """Wait until all nodes that Ray believes in can be reached: it would place ranks on one that is gone, and
    not take them back even after it has noticed."""
    end = time.monotonic() + NOTICE_SECONDS
    said: list[str] = []
    while (silent := unreachable(ray.nodes())) and time.monotonic() < end:
        if silent != said:
            said = silent
            say(f"waiting for Ray: {', '.join(silent)} cannot be reached, which Ray has yet to notice")
        time.sleep(LOOK_SECONDS)


def unreachable(nodes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Addresses of nodes (as ray.nodes() has them) that offer something, are taken to live, and cannot be
    dialled."""
    silent = []
    for node in nodes:
        if node["Alive"] and any(node["Resources"].get(kind) for kind in ("CPU", "GPU")):
            address = node["NodeManagerAddress"]
            try:
                socket.create_connection((address, node["NodeManagerPort"]), timeout=LOOK_SECONDS).close()
            except OSError:
                silent.append(address)
    return silent


def shortage(parallel: ParallelConfig, room: Room) -> str:
    """Why the ranks have no place, in words for people."""
    tp, ranks = parallel.tp, parallel.tp * parallel.pp
    nodes = f"{len(room.node_gpus)} node{'s' if len(room.node_gpus) != 1 else ''}"
    if parallel.device == "cuda":
        if room.free_gpus < ranks:
            more = ranks - room.free_gpus
            return f"needs {more} more GPU{'s' if more > 1 else ''}: {room.free_gpus} of {ranks} free"
        places = sum(gpus // tp for gpus in room.node_gpus)
        if places < parallel.pp:
            have = ", ".join(str(gpus) for gpus in room.node_gpus)
            return f"needs {parallel.pp} times {tp} GPUs in one node: its nodes have {have}"
        return f"needs {tp} free GPUs in one node: {room.free_gpus} are free in {nodes}"
    needs = SHARE * (ranks + 1)
    if room.free_cpus < needs:
        return f"needs a share of {needs:.3g} CPUs: {room.free_cpus:.3g} free in {nodes}"
    return f"needs nodes with room for {tp} each: {room.free_cpus:.3g} CPUs are free in {nodes}"


def _bundles(parallel: ParallelConfig) -> list[dict[str, float]]:
    gpus = {"GPU": float(parallel.tp)} if parallel.device == "cuda" else {}
    return [
        {"CPU": round(SHARE * (parallel.tp + (1 if stage == 0 else 0)), 4), **gpus}
        for stage in range(parallel.pp)
    ]
