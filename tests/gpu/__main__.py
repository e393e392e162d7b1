"""Runs the tests of this folder, several files at once, in processes of their own: `python -m tests.gpu`.

On a GPU most of their time is Triton compiling, on one core a process, so the files that compile most are cut
into shares. Needs nothing but pytest beside what the tests need. More arguments go to pytest. Prints what a
process printed as it ends, then a line in all; the exit status is 1 if any failed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tests.gpu.conftest import SHARE

HERE = Path(__file__).parent
AT_ONCE = 8  # processes: each has a CUDA context, half a GiB of the GPU's memory
ELSEWHERE = {"test_machine_code.py"}  # compiles for GPUs that are not there; the same on any machine
SHARES = {"test_linear.py": 4, "test_attention.py": 4, "test_real.py": 4, "test_model.py": 2}  # else 1
NOTHING_RUN = 5  # pytest's exit status where no test was chosen


def run(file: Path, share: int, of: int, arguments: list[str]) -> tuple[int, str]:
    command = [sys.executable, "-m", "pytest", str(file), "-q", *arguments]
    environment = os.environ | {SHARE: f"{share}/{of}"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parents[1], env=environment)
    return done.returncode, done.stdout + done.stderr


def counts(output: str) -> Counter[str]:
    """Of pytest's last line: {"passed": 3, "skipped": 1}."""
    lines = [line for line in output.splitlines() if re.search(r" in [\d.]+s", line)]
    found = re.findall(r"(\d+) (passed|failed|skipped|errors?|deselected)", lines[-1]) if lines else []
    return Counter({kind.rstrip("s") if kind == "errors" else kind: int(n) for n, kind in found})


def main(arguments: list[str]) -> int:
    files = sorted(path for path in HERE.glob("test_*.py") if path.name not in ELSEWHERE)
    files.sort(key=lambda path: -SHARES.get(path.name, 1))  # the longest first
    began, total, failed = time.monotonic(), Counter(), set()
    with ThreadPoolExecutor(min(AT_ONCE, os.cpu_count() or 1)) as pool:
        futures = {}
        for file in files:
            of = SHARES.get(file.name, 1)
            for share in range(of):
                futures[pool.submit(run, file, share, of, arguments)] = file.name
        for future in as_completed(futures):
            status, output = future.result()
            print(f"==== {futures[future]}\n{output}", flush=True)
            total += counts(output)
            if status not in (0, NOTHING_RUN):
                failed.add(futures[future])
    said = ", ".join(f"{number} {kind}" for kind, number in total.items())
    print(f"{len(files)} files: {said} in {time.monotonic() - began:.0f} s")
    if failed:
        print(f"failed: {', '.join(sorted(failed))}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
