"""The timeline of stages: what counts as idle, and that a real one shows stages at work at once."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from bench.pipeline import Span, all_busy_share, drawn, idle_share
from tests.support import REPOSITORY

STAGES = [
    [Span(1, 0.0, 2.0), Span(2, 2.0, 3.0), Span(3, 7.0, 12.0)],
    [Span(1, 2.5, 4.0), Span(2, 4.0, 9.0)],
]


def test_idle_is_what_is_left_of_the_time_between():
    assert idle_share(STAGES[0], 0.0, 10.0) == pytest.approx(0.4)
    assert idle_share(STAGES[1], 0.0, 10.0) == pytest.approx(0.35)
    assert idle_share(STAGES[1], 3.0, 8.0) == 0.0


def test_all_are_busy_where_every_stage_works():
    assert all_busy_share(STAGES, 0.0, 10.0) == pytest.approx(0.25)  # 2.5 to 3 and 7 to 9
    assert all_busy_share(STAGES, 3.0, 7.0) == 0.0
    assert all_busy_share(STAGES[:1], 0.0, 10.0) == pytest.approx(0.6)


def test_a_drawing_names_the_step_of_each_moment():
    first, second = drawn(STAGES, 0.0, 10.0)
    assert first == "1" * 20 + "2" * 10 + "." * 40 + "3" * 30
    assert second == "." * 25 + "1" * 15 + "2" * 50 + "." * 10


@pytest.mark.slow
def test_a_timeline_of_two_processes(tiny, tmp_path):
    path, out = tiny(layers=4, types="Q8_0", hidden=256, ffn=512), tmp_path / "timeline.json"
    sizes = ["--streams", "6", "--tokens", "12", "--prompt", "8", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "bench/pipeline.py"), str(path), "--pp", "2", *sizes],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    alone, shared = json.loads(done.stdout)["runs"]
    assert (alone["microbatches"], shared["microbatches"]) == (1, 2)
    assert all(0 <= share <= 1 for run in (alone, shared) for share in run["idle_share"])
    for run in json.loads(out.read_text())["runs"]:
        # That is while all streams decode as their reader sees it: no time, where it is held up. Of the
        # whole time, every stage works some.
        stages = [[Span(*span) for span in spans] for spans in run["spans"]]
        began = min(span.began for spans in stages for span in spans)
        ended = max(span.ended for spans in stages for span in spans)
        assert all(0 <= idle_share(spans, began, ended) + 1e-9 < 1 for spans in stages)
        first, second = ({span.step: (span.began, span.ended) for span in spans} for spans in stages)
        assert first.keys() == second.keys()
        assert all(first[step][0] < second[step][1] for step in first)
    # With two microbatches, a step begins while the one before it is still at work further on.
    assert any(step - 1 in second and first[step][0] < second[step - 1][1] for step in first)
