"""Environments that would keep threads back from torch's operations."""

import os
import subprocess
import sys

import pytest

from runtime.errors import NotEnough
from runtime.threads import check_openmp
from tests.support import REPOSITORY


@pytest.mark.parametrize(
    "environment, threads",
    [
        ({}, 64),
        ({"OMP_DYNAMIC": "false", "OMP_NUM_THREADS": "1"}, 8),
        ({"OMP_DYNAMIC": "true"}, 1),
        ({"OMP_THREAD_LIMIT": "8"}, 8),
        ({"OMP_THREAD_LIMIT": " "}, 8),
    ],
)
def test_what_keeps_no_thread_back(environment, threads):
    check_openmp(environment, threads)


@pytest.mark.parametrize("variable, value", [("OMP_DYNAMIC", "TRUE"), ("OMP_THREAD_LIMIT", "7")])
def test_what_does_is_named(variable, value):
    with pytest.raises(NotEnough, match=variable):
        check_openmp({variable: value}, 8)


@pytest.mark.slow
@pytest.mark.parametrize("variable, value", [("OMP_DYNAMIC", "true"), ("OMP_THREAD_LIMIT", "1")])
def test_a_command_says_so(tiny, variable, value):
    """In one line, where the reply would hold no number, or a wrong one."""
    command = ["generate", str(tiny()), "--prompt", "hi", "--max-tokens", "2", "--local", "--tp", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "runtime.cli", *command],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, variable: value, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'proto'}"},
    )
    assert done.returncode == 1, done.stderr
    assert variable in done.stderr and len(done.stderr.splitlines()) == 1
