"""The phases from `ray job submit` to the first token: they follow each other, and nothing is left out."""

from __future__ import annotations

import io
import subprocess
from types import SimpleNamespace

import pytest

from bench.ray_job import PHASES, durations, follow

EVENTS = {
    "submitted": 100.0,
    "accepted": 103.0,
    "read": 117.0,
    "token": 117.5,
    "process": 104.0,
    "command": 106.0,
    "importing Ray": 106.5,
    "joining Ray at auto": 107.0,
    "joined Ray": 108.0,
    "starting 2 rank(s)": 108.5,
    "loading weights": 112.0,
    "first forward step": 114.0,
    "gateway": 115.0,
    "serving": 115.5,
}


def test_phases_make_up_the_whole_time():
    found = durations(EVENTS)
    assert list(found) == [phase for phase, _ in PHASES]
    assert sum(found.values()) == pytest.approx(17.5)
    assert found["actors' processes started"] == pytest.approx(3.5)
    assert found["model's header read, Ray imported"] == pytest.approx(1.0)
    assert all(seconds >= 0 for seconds in found.values())


def said(text: str) -> subprocess.Popen:
    return SimpleNamespace(stdout=io.StringIO(text))


def test_a_jobs_log_is_read_until_its_ready_line():
    events: dict[str, float] = {}
    lines = [
        "Job 'bench-0' submitted successfully",
        "tramontane: waiting",
        '{"address": "a:1", "port": 1}',
        "x",
    ]
    job = said("\n".join(lines))
    assert follow(job, events) == {"address": "a:1", "port": 1}
    assert set(events) == {"accepted"} and job.stdout.read() == "x"


def test_a_job_that_does_not_serve_says_why():
    with pytest.raises(SystemExit, match="error: tp: 9"):
        follow(said("Job 'bench-0' submitted successfully\nerror: tp: 9 is not possible\n"), {})
