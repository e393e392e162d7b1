"""The narrated traces in traces/*.txt still tell what the engine does.

`TRAMONTANE_RENARRATE=1` rewrites them; read the difference before committing it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.engine.narrator import renarrate

TRACES = sorted((Path(__file__).parent / "traces").glob("*.txt"))


@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.stem)
def test_trace(path: Path) -> None:
    told = path.read_text(encoding="utf-8")
    now = renarrate(told)
    if os.environ.get("TRAMONTANE_RENARRATE") == "1":
        path.write_text(now, encoding="utf-8")
        return
    assert now.splitlines() == told.splitlines()


def test_there_are_traces() -> None:
    assert len(TRACES) >= 10
