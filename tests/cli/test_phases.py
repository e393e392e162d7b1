"""The ready line says when each phase of the start began."""

from __future__ import annotations

import time
from itertools import pairwise

import psutil

from runtime.commands.phases import Phases


def test_the_first_time_counts():
    phases = Phases()
    for name in ("joining", "loading", "joining"):
        phases.begin(name)
    begun = phases.begun()
    assert [each["phase"] for each in begun] == ["process", "command", "joining", "loading"]
    assert begun[0]["at"] == round(psutil.Process().create_time(), 3)
    assert all(a["at"] <= b["at"] for a, b in pairwise(begun)) and begun[-1]["at"] <= time.time() + 0.001


def test_a_server_tells_its_phases_in_order(server):
    begun = server["phases"]
    assert [each["phase"] for each in begun] == [
        "process", "command", "importing torch", "loading weights", "gateway", "serving",
    ]  # fmt: skip
    assert all(a["at"] <= b["at"] for a, b in pairwise(begun))
    assert time.time() - 3600 < begun[0]["at"] < begun[-1]["at"] <= time.time()
