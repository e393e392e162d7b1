"""What the GPU benchmarks share: ceilings of the run itself, medians over graph replays, and the report."""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import sys
from collections.abc import Callable

import torch
import triton

Call = Callable[[], object]


def require_gpu(script: str) -> None:
    """Leave with one line and status 2 where there is nothing to time."""
    if not torch.cuda.is_available():
        print(f"{script}: torch sees no CUDA device; nothing was timed", file=sys.stderr)
        raise SystemExit(2)


def captured(calls: list[Call]) -> Call:
    """All calls as one graph; they have run once before, so that nothing compiles during the capture."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def median_ms(run: Call, repeats: int) -> float:
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def copy_bandwidth(repeats: int = 20) -> float:
    """Bytes a second of torch's own copy, read and written counted."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    run = captured([lambda: target.copy_(source)])
    return 2 * source.nbytes / (median_ms(run, repeats) * 1e-3)


def matmul_rate(dtype: torch.dtype, repeats: int = 20, size: int = 8192) -> float:
    """Floating-point operations a second of torch's own product of two random matrices."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.float32).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    run = captured([lambda: torch.mm(a, b, out=out)])
    return 2 * size**3 / (median_ms(run, repeats) * 1e-3)


def report(results: list[dict], **ceilings: float) -> dict:
    return {
        "command": " ".join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
        },
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **ceilings,
        "results": results,
    }


def show(found: dict) -> None:
    """The report on standard output; a table of its results on standard error."""
    print(json.dumps(found, indent=1))
    rows = found["results"]
    if rows:
        names = list(dict.fromkeys(key for row in rows for key in row))
        lines = [names, ["---"] * len(names), *([str(row.get(name, "")) for name in names] for row in rows)]
        print("\n".join(f"| {' | '.join(line)} |" for line in lines), file=sys.stderr)
