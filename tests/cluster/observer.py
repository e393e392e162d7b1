"""A driver that stands by on a node: says what there is on its Ray, and holds CPUs that others then lack.

    python -m tests.cluster.observer HOST:PORT

Answers each line of JSON with one. {"hold": {ADDRESS: CPUs}}: of these nodes, and no longer what was held
before. The answer: nodes that live, CPUs that are free, placement groups of others.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping

import ray
from ray.util import placement_group_table
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group


class Observer:
    """The other end of one that runs as a process, its streams piped as text."""

    def __init__(self, process: subprocess.Popen):
        self._process = process

    def look(self, hold: Mapping[str, float] | None = None) -> dict:
        self._process.stdin.write(json.dumps({} if hold is None else {"hold": hold}) + "\n")
        self._process.stdin.flush()
        while not (line := self._process.stdout.readline()).startswith("{"):  # Ray has its say there too
            assert line, "the observer has ended"
        return json.loads(line)


def main() -> None:
    ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR")
    held: PlacementGroup | None = None
    for line in sys.stdin:
        if (wanted := json.loads(line).get("hold")) is not None:
            if held is not None:
                remove_placement_group(held)
            held = placement_group(
                [{"CPU": cpus, f"node:{node}": 0.001} for node, cpus in wanted.items()] or [{"CPU": 0.001}]
            )
            assert held.wait(120), "there are not so many CPUs"
        groups = [each for each in placement_group_table().values() if each["state"] != "REMOVED"]
        found = {
            "nodes": sum(node["Alive"] for node in ray.nodes()),
            "free": ray.available_resources().get("CPU", 0.0),
            "groups": len(groups) - (held is not None),
        }
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
