"""What `python -m tests.gpu` makes of pytest's words."""

from __future__ import annotations

import pytest

from tests.gpu.__main__ import counts


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("3 passed in 0.12s", {"passed": 3}),
        (
            "1 failed, 30 passed, 2 skipped, 4 warnings in 75.20s (0:01:15)",
            {"failed": 1, "passed": 30, "skipped": 2},
        ),
        ("2 errors in 0.12s", {"error": 2}),
        ("no tests ran in 0.01s", {}),
        ("", {}),
    ],
)
def test_its_last_line_is_counted(line: str, found: dict[str, int]) -> None:
    assert counts(f"...\ntook 5 in 3.00s\n{line}\n" if line else "") == found
