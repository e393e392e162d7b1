"""The gate that needs no GPU: every kernel compiles for three generations and those that users have beside
them, uses Hopper's matrix instructions where it should, keeps its registers, fits into shared memory, and
stays within its budget of instructions a weight."""

from __future__ import annotations

import json
import os
import pkgutil
import subprocess
import sys

import pytest
import triton

from tests.gpu import specimens
from tests.support import REPOSITORY

GATED = "3.9"  # the Triton whose code the budgets are for, of constraints.txt; docs/gpu has 3.6's figures
MODULES = sorted(m.name for m in pkgutil.iter_modules(specimens.__path__))
# Of those with many: where Triton's cache is empty, one takes seconds, and ten times as long on a machine
# that has other things to do. All of a module in one test could take more than a test may.
SHARES = {"attention": 5, "linear": 6, "overlap": 2, "sampling": 2}
PARTS = [f"{name}:{i}/{SHARES.get(name, 1)}" for name in MODULES for i in range(SHARES.get(name, 1))]


@pytest.mark.skipif(
    triton.__version__.rpartition(".")[0] != GATED,
    reason=f"registers and instructions are counted for Triton {GATED}, this is {triton.__version__}",
)
@pytest.mark.parametrize("part", PARTS)
def test_machine_code(part: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.cross_compile", part],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert found, "no specimens"
    for fact in found:
        assert fact["spills"] == 0, fact
        assert fact["shared"] <= specimens.SHARED[fact["architecture"]], fact
        if fact["overlaps"] is None:
            assert fact["waits"] == fact["lets_go"] == 0, fact
        else:
            assert fact["waits"] == fact["lets_go"] == 1, fact
            assert set(fact["too_early"]) <= {"LDG"}, fact
            assert len(fact["too_early"]) <= fact["overlaps"], fact
        if fact["architecture"] == 90:
            assert bool(fact["hgmma"]) == fact["matrix"], fact
            assert fact["per_weight"] <= fact["budget"], fact
