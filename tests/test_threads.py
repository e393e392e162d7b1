"""How many threads compute, and environments that would keep some of them back."""

import json
import os
import subprocess
import sys

import pytest

from runtime.errors import NotEnough
from runtime.threads import threads_for
from tests.support import REPOSITORY


@pytest.mark.parametrize(
    "asked, ranks, environment, count",
    [
        (None, 1, {}, 8),
        (None, 3, {}, 2),
        (None, 9, {}, 1),
        (5, 9, {}, 5),
        (None, 1, {"OMP_DYNAMIC": "false", "OMP_NUM_THREADS": "1"}, 8),
        (None, 1, {"OMP_DYNAMIC": "1"}, 8),  # which libgomp does not take
        (1, 1, {"OMP_DYNAMIC": "true"}, 1),
        (None, 8, {"OMP_THREAD_LIMIT": "1"}, 1),
        (None, 1, {"OMP_THREAD_LIMIT": "3"}, 3),
        (16, 1, {"OMP_THREAD_LIMIT": "16"}, 16),
        (16, 1, {"OMP_THREAD_LIMIT": "0"}, 16),
        (None, 1, {"OMP_THREAD_LIMIT": " ", "OMP_MAX_ACTIVE_LEVELS": "x"}, 8),
        (None, 1, {"OMP_THREAD_LIMIT": "\u00b2", "OMP_MAX_ACTIVE_LEVELS": "1"}, 8),
    ],
)
def test_how_many_of_eight_cores(asked, ranks, environment, count):
    assert threads_for(asked, ranks, 8, environment) == count


@pytest.mark.parametrize(
    "variable, value", [("OMP_DYNAMIC", "TRUE"), ("OMP_THREAD_LIMIT", "7"), ("OMP_MAX_ACTIVE_LEVELS", "0")]
)
def test_what_keeps_threads_back_is_named(variable, value):
    with pytest.raises(NotEnough, match=variable):
        threads_for(8, 1, 8, {variable: value})


def generate(path, *options, **environment):
    command = ["generate", str(path), "--prompt", "hi", "--max-tokens", "8", "--local", "--json", *options]
    return subprocess.run(
        [sys.executable, "-m", "runtime.cli", *command],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=os.environ | environment | {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'proto'}"},
    )


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one thread is all that this machine has")
def test_a_command_says_so(tiny):
    """In one line, where the reply would hold no number, or a wrong one."""
    done = generate(tiny(), OMP_DYNAMIC="true")
    assert done.returncode == 1, done.stderr
    assert "OMP_DYNAMIC" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_one_thread_where_several_would_show(tiny):
    """MKL's code for processors without AVX-512 adds up otherwise by two threads, which one rank would have
    here, and each of two ranks would not."""
    model = tiny(types="F32", hidden=192, ffn=172)
    one, two, other = (
        generate(model, "--temperature", "1", "--seed", "7", "--logprobs", "3", "--tp", tp, **environment)
        for tp, environment in (
            ("1", {"MKL_ENABLE_INSTRUCTIONS": "AVX2"}),
            ("2", {"MKL_ENABLE_INSTRUCTIONS": "AVX2"}),
            ("1", {}),
        )
    )
    assert one.returncode == two.returncode == other.returncode == 0, one.stderr + two.stderr + other.stderr
    one, two, other = (json.loads(done.stdout) for done in (one, two, other))
    if one["numerics"] == other["numerics"]:
        pytest.skip("MKL has no other code on this machine with that variable")
    assert one == two
