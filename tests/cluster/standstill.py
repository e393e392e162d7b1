"""Has processes of a host stand still where a test wants them, for as long as a file lies there: so what is
to happen amid a start or a reply does, however late the test looks and however fast the host is.

Imported by every Python of the host as it starts; see hosts.py.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

START, STEPS = "hold-start", "hold-steps"  # files in the host's folder


def wait_while(path: Path) -> None:
    while path.exists():
        time.sleep(0.05)


class Finder:
    """Asked for every module that is imported; finds none, but knows by them how far a process has come."""

    def __init__(self, folder: Path):
        self._folder = folder

    def find_spec(self, name: str, path=None, target=None) -> None:
        if name == "runtime.cluster.mesh":  # by a rank's actor, before it says that it is there
            wait_while(self._folder / START)
        elif name == "runtime.cluster.rank_loop":  # before it takes its first step
            hold_steps(self._folder / STEPS)


def hold_steps(path: Path) -> None:
    """Once the file is there, ranks of stages take as many more steps as it says, and no others."""
    from runtime.model.stage_runner import StageRunner

    execute, taken = StageRunner.execute, 0

    def held(self, plan):
        nonlocal taken
        try:
            most = int(path.read_text())
        except FileNotFoundError:
            taken = 0
        else:
            taken += 1
            if taken > most:
                wait_while(path)
        return execute(self, plan)

    StageRunner.execute = held


def install() -> None:
    sys.meta_path.insert(0, Finder(Path(os.environ["TMPDIR"])))
