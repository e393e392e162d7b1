"""Where the time goes from `ray job submit` to the first token, phase by phase.

    python bench/ray_job.py MODEL --tp 2 --runs 3 > ray-job.json

Starts a Ray head with the dashboard's job server and token authentication, in a folder and on ports of its
own, so that it neither finds nor disturbs another Ray. Submits `tramontane serve MODEL --json` as
deploy/ray/serve.sh does, reads from its ready line when each phase began, and asks for one token as a client
does. Each run is a job of its own on that head, which uploads the working directory in the first one only.
Stops each job and, at the end, the head. JSON on standard output, a table of medians on standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "proto"))

from bench.report import about, show
from tramontane import Client

REPOSITORY = Path(__file__).resolve().parents[1]
HEAD_SECONDS = 120.0  # for the head to start
JOB_SECONDS = 300.0  # for a job to serve
STOP_SECONDS = 60.0
# What ends each phase: events of this process and, where they begin with its words, of the server's.
PHASES = (
    ("submission accepted", "accepted"),
    ("job's process started", "process"),
    ("command imported", "command"),
    ("model's header read, Ray imported", "joining Ray"),
    ("Ray joined", "joined Ray"),
    ("actors placed", "starting"),
    ("actors' processes started", "loading weights"),
    ("weights loaded, ranks joined", "first forward step"),
    ("first forward step", "gateway"),
    ("gateway serves", "serving"),
    ("ready line read by the submitter", "read"),
    ("first token at a client", "token"),
)


@dataclass(frozen=True)
class Head:
    environment: dict[str, str]  # with the token, the job server's address, `ray` and `python`

    def ray(self, *arguments: str) -> list[str]:
        return [sys.executable, "-P", "-m", "ray.scripts.scripts", *arguments]


@contextlib.contextmanager
def ray_head(cpus: int) -> Iterator[Head]:
    """A head that lives as long as the block. Raises SystemExit with its log if it does not start."""
    folder = Path(tempfile.mkdtemp(prefix="tr", dir="/tmp"))  # short: the paths of sockets are limited
    log = folder / "head.log"
    port, dashboard, agent, client, metrics = free_ports(5)
    (folder / "bin").mkdir()
    python = folder / "bin" / "python"  # jobs run the python of this benchmark
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    head = Head(
        kept
        | {
            "PATH": os.pathsep.join([str(folder / "bin"), os.environ.get("PATH", os.defpath)]),
            "PYTHONUNBUFFERED": "1",
            "HOME": str(folder),
            "RAY_TMPDIR": str(folder),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        }
    )
    command = head.ray(
        "start", "--head", "--block", "--num-cpus", str(cpus), "--object-store-memory", str(80 << 20),
        "--port", str(port), "--dashboard-port", str(dashboard), "--dashboard-agent-listen-port", str(agent),
        "--ray-client-server-port", str(client), "--metrics-export-port", str(metrics),
    )  # fmt: skip
    with log.open("w") as out:
        process = subprocess.Popen(
            command, env=head.environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        end = time.monotonic() + HEAD_SECONDS
        while "Ray runtime started" not in log.read_text():
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"the Ray head did not start:\n{log.read_text()}")
            time.sleep(0.1)
        yield head
    finally:
        stop(process)
        shutil.rmtree(folder, ignore_errors=True)


def stop(process: subprocess.Popen) -> None:
    """SIGTERM, and SIGKILL to its session where that does not help."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def measure(head: Head, model: str, options: Sequence[str], name: str) -> dict[str, float]:
    """When each event was, in seconds since 1970, of one job. Raises SystemExit with what the job said."""
    command = head.ray(
        "job", "submit", "--submission-id", name, "--working-dir", str(REPOSITORY),
        "--runtime-env", str(REPOSITORY / "deploy/ray/checkout.yaml"),
        "--", "python", "-m", "runtime.cli", "serve", model, *options,
        "--ray-address", "auto", "--host", "127.0.0.1", "--port", "0", "--json",
    )  # fmt: skip
    events = {"submitted": time.time()}
    submit = subprocess.Popen(
        command,
        env=head.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        ready = follow(submit, events)
        events["read"] = time.time()
        with Client(f"127.0.0.1:{ready['port']}") as client:
            stream = client.stream_generate("In an age", max_tokens=1, temperature=0.0, ignore_eos=True)
            with stream:
                next(iter(stream))
                events["token"] = time.time()
        return events | {each["phase"]: each["at"] for each in ready["phases"]}
    finally:
        ended = subprocess.run(
            head.ray("job", "stop", name),
            env=head.environment,
            capture_output=True,
            text=True,
            timeout=3 * STOP_SECONDS,
            check=False,
        )
        if ended.returncode:
            print(ended.stdout + ended.stderr, file=sys.stderr)
        stop(submit)


def follow(submit: subprocess.Popen, events: dict[str, float]) -> dict:
    """Read a job's log until its ready line, which is returned."""
    said, end = [], time.monotonic() + JOB_SECONDS
    for line in submit.stdout:
        if "submitted successfully" in line:
            events["accepted"] = time.time()
        if line.startswith('{"address"'):
            return json.loads(line)
        said.append(line)
        if time.monotonic() > end:
            break
    raise SystemExit("the job did not serve:\n" + "".join(said))


def durations(events: dict[str, float]) -> dict[str, float]:
    """Seconds of each phase; together they are the time from the command to the first token."""
    found, before = {}, events["submitted"]
    for phase, event in PHASES:
        at = next(at for name, at in events.items() if name.startswith(event))
        found[phase] = at - before
        before = at
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.runs < 1:
        parser.error("takes one run at least")
    options = ["--tp", str(arguments.tp), "--pp", str(arguments.pp), "--device", "cpu"]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is stopped then, too
    facts = about(("ray", "torch"))
    runs, loads = [], []
    with ray_head(max(2, os.cpu_count() or 1)) as head:
        for number in range(arguments.runs):
            loads.append(round(os.getloadavg()[0], 2))
            events = measure(head, str(arguments.model.resolve()), options, f"bench-{number}")
            runs.append({name: round(seconds, 3) for name, seconds in durations(events).items()})
            print(f"run {number + 1} of {arguments.runs}: {sum(runs[-1].values()):.1f} s", file=sys.stderr)
    medians = {phase: round(statistics.median(run[phase] for run in runs), 3) for phase, _ in PHASES}
    totals = [round(sum(run.values()), 3) for run in runs]
    result = facts | {
        "model": arguments.model.name,
        "tp": arguments.tp,
        "pp": arguments.pp,
        "load_average_of_each_run": loads,  # of the minute before it: above the cores, others were at work
        "median_s": medians,
        "total_s": totals,
        "runs": runs,
    }
    rows: list[list[object]] = [[phase, f"{seconds:.2f}"] for phase, seconds in medians.items()]
    show(result, ["phase", "s"], [*rows, ["in all (median)", f"{statistics.median(totals):.2f}"]])


if __name__ == "__main__":
    main()
