"""What Ray lacks is said while it is waited for, and refused in the end; nodes that differ are named."""

from __future__ import annotations

import socket
import time

import pytest

from runtime.cluster import placement
from runtime.cluster.placement import Room, place, shortage, unreachable
from runtime.cluster.versions import check_alike, installed
from runtime.config import ParallelConfig
from runtime.errors import NotEnough, Unavailable

pytestmark = pytest.mark.cluster


@pytest.mark.parametrize(
    ("tp", "pp", "room", "said"),
    [
        (4, 2, Room(6, 8.0, [4, 2]), "needs 2 more GPUs: 6 of 8 free"),
        (2, 1, Room(1, 8.0, [1]), "needs 1 more GPU: 1 of 2 free"),
        (4, 2, Room(8, 8.0, [6, 2]), "needs 2 times 4 GPUs in one node: its nodes have 6, 2"),
        (4, 2, Room(9, 8.0, [8, 4]), "needs 4 free GPUs in one node: 9 are free in 2 nodes"),
    ],
)
def test_what_is_missing_is_said_in_numbers(tp, pp, room, said):
    assert shortage(ParallelConfig(tp=tp, pp=pp, device="cuda"), room) == said


def test_a_cluster_without_free_cpus_says_so():
    said = shortage(ParallelConfig(tp=2, pp=2, device="cpu"), Room(0, 0.002, [0]))
    assert said == "needs a share of 0.005 CPUs: 0.002 free in 1 node"


def test_nodes_that_are_only_believed_to_live_are_found(monkeypatch):
    monkeypatch.setattr(placement, "LOOK_SECONDS", 30.0)  # a loaded machine may be slow to dial itself
    with socket.create_server(("127.0.0.1", 0)) as there:
        port = there.getsockname()[1]
        here = {
            "Alive": True,
            "NodeManagerAddress": "127.0.0.1",
            "NodeManagerPort": port,
            "Resources": {"CPU": 1.0},
        }
        gone = here | {"NodeManagerAddress": "127.0.0.2"}
        others = [gone | {"Alive": False}, gone | {"Resources": {"memory": 1.0}}]
        assert unreachable([here, gone, *others]) == ["127.0.0.2"]


def test_gpus_that_do_not_come_are_waited_for_and_then_refused(local_ray):
    from ray.util import placement_group_table

    said: list[str] = []
    before = set(placement_group_table())
    started = time.monotonic()
    with pytest.raises(NotEnough, match=r"^Ray found no room in 2 s: needs 4 more GPUs: 0 of 4 free; see"):
        place(ParallelConfig(tp=2, pp=2, device="cuda"), said.append, seconds=2)
    assert time.monotonic() - started < 50  # where nobody says how long, it is a minute
    assert said == ["waiting for Ray: needs 4 more GPUs: 0 of 4 free"]
    groups = placement_group_table()
    mine = set(groups) - before
    assert mine and all(groups[name]["state"] == "REMOVED" for name in mine)


def test_versions_that_differ_are_told_apart():
    mine = installed()
    assert {"torch", "ray"} <= set(mine) and all(mine.values())
    check_alike(["a", "b"], [mine, dict(mine)])
    with pytest.raises(Unavailable, match=r"^torch is .* on a and 1\.0 on b: install the same"):
        check_alike(["a", "a", "b"], [mine, mine, {**mine, "torch": "1.0"}])
