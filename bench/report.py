"""What a figure has to say of itself (command, date, machine, versions), and a Markdown table of figures."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil


def about(packages: Sequence[str] = ("torch", "numpy", "triton")) -> dict[str, Any]:
    """Where and when a benchmark runs. `load_average` is that of the minute before: it should be near 0."""
    return {
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "machine": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30),
            "load_average": round(os.getloadavg()[0], 2),
        },
        "versions": {name: _version(name) for name in packages} | {"python": platform.python_version()},
    }


def cpu_name() -> str:
    """What the processor calls itself."""
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def show(result: Mapping[str, Any], columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """`result` as JSON on standard output, the table on standard error."""
    print(json.dumps(result, indent=1))
    lines = [columns, ["---"] * len(columns), *([str(cell) for cell in row] for row in rows)]
    print("\n".join(f"| {' | '.join(line)} |" for line in lines), file=sys.stderr)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
