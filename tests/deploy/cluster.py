"""A Ray head as a person would start it, token and job server included, with folders and ports of its own, so
that it neither finds nor disturbs another Ray on the machine."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

TOKEN = "0123456789abcdef" * 4
STARTED = "Ray runtime started"


@dataclass(frozen=True)
class Head:
    address: str  # HOST:PORT of the head
    folder: Path  # where it keeps its sockets and logs
    environment: dict[str, str]  # with the token, the job server's address, `ray` and `tramontane`

    def ray(self, *arguments: str, timeout: float = 60) -> subprocess.CompletedProcess:
        return self.run("ray", *arguments, timeout=timeout)

    def run(self, *command: str, timeout: float = 120) -> subprocess.CompletedProcess:
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=timeout, check=False
        )

    def processes(self, *fragments: str) -> list[psutil.Process]:
        """Processes of this cluster whose command line or title holds one of the fragments."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                line = " ".join(process.cmdline())
                if any(fragment in line for fragment in fragments) and (
                    str(self.folder) in line or process.environ().get("RAY_TMPDIR", "") == str(self.folder)
                ):
                    found.append(process)
        return found


@contextlib.contextmanager
def ray_head(repository: Path, cpus: int = 2) -> Iterator[Head]:
    folder = Path(tempfile.mkdtemp(prefix="tr", dir="/tmp"))  # short: the paths of sockets are limited
    log = folder / "head.log"
    port, dashboard, agent, client, metrics = free_ports(5)
    variables = environment(folder, repository) | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    command = [
        "ray", "start", "--head", "--block", "--num-cpus", str(cpus), "--object-store-memory", str(80 << 20),
        "--port", str(port), "--dashboard-port", str(dashboard), "--dashboard-agent-listen-port", str(agent),
        "--ray-client-server-port", str(client), "--metrics-export-port", str(metrics),
    ]  # fmt: skip
    with log.open("w") as out:
        process = subprocess.Popen(
            command, env=variables, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        wait_until(lambda: STARTED in log.read_text() or process.poll() is not None, 120)
        assert process.poll() is None, log.read_text()
        yield Head(f"127.0.0.1:{port}", folder, variables)
    finally:
        stop(process)
        shutil.rmtree(folder, ignore_errors=True)


def stop(process: subprocess.Popen, seconds: float = 90) -> int:
    """SIGTERM, and SIGKILL to its session where that does not help."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return process.returncode


def wait_until(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"did not happen within {seconds} s"
        time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago, and that nobody is given who asks for any: Ray does so dozens of
    times before it binds these. Its workers' own lie from 10002 to 19999."""
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    choice = range(20_000, lowest) if lowest > 22_000 else range(7_000, 10_000)
    found: list[int] = []
    for port in random.SystemRandom().sample(choice, len(choice)):
        with socket.socket() as tried, contextlib.suppress(OSError):
            tried.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise AssertionError("no ports are free")


def environment(folder: Path, repository: Path) -> dict[str, str]:
    """`ray`, `tramontane` and `python` are those of this Python, installed or not."""
    programs = folder / "bin"
    programs.mkdir()
    for name, options in {
        "python": "",
        "ray": "-P -m ray.scripts.scripts",
        "tramontane": "-P -m runtime.cli",
    }.items():
        program = programs / name
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" {options} "$@"\n')
        program.chmod(0o755)
    paths = [str(programs), str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return kept | {
        "PATH": os.pathsep.join(paths),
        "PYTHONPATH": os.pathsep.join([str(repository), str(repository / "proto")]),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
        "HOME": str(folder),
        "RAY_TMPDIR": str(folder),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_USAGE_STATS_ENABLED": "0",
    }
