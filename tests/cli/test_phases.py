"""The ready line says when each phase of the start began."""

from __future__ import annotations

import subprocess
import sys
import time
from itertools import pairwise

from runtime.commands.phases import Phases, process_start
from tests.cli.command import environment


def test_the_first_time_counts():
    phases = Phases()
    for name in ("joining", "loading", "joining"):
        phases.begin(name)
    begun = phases.begun()
    assert [each["phase"] for each in begun] == ["process", "command", "joining", "loading"]
    assert all(a["at"] <= b["at"] for a, b in pairwise(begun)) and begun[-1]["at"] <= time.time() + 0.001


def test_a_process_starts_after_it_was_asked_for_and_before_it_says_so():
    code = (
        "from runtime.commands.phases import process_start; import time; print(process_start(), time.time())"
    )
    before = time.time()
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    start, said = map(float, done.stdout.split())
    assert before - 0.03 <= start <= said <= time.time()


def test_a_server_tells_its_phases_in_order(server):
    begun = server["phases"]
    assert [each["phase"] for each in begun] == [
        "process", "command", "importing torch", "loading weights", "gateway", "serving",
    ]  # fmt: skip
    assert all(a["at"] <= b["at"] for a, b in pairwise(begun))
    # It is this process's, however long ago that was; times are rounded to a millisecond.
    assert process_start() - 0.03 < begun[0]["at"] < begun[-1]["at"] <= time.time() + 0.001
