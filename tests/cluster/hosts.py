"""Two hosts made of network namespaces, each with addresses, temporary files and processes of its own, and
Ray on them as people start it: `ray start` on each.

    this machine -- (198.18.x.1/30, 198.18.x.2) -- one -- (10.77.0.1, 10.77.0.2) -- two

Each has an interface that its peer cannot reach: the first one's leads to this machine, for clients; the
second one's leads nowhere. Root alone may make them; all that is made goes away again, whatever happens.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.cluster.standstill import START, STEPS
from tests.deploy.cluster import STARTED, environment, wait_until
from tests.support import REPOSITORY

RAY_PORT = 6379
OURS = ("ray::RankActor", "ray::EngineActor", "runtime.cli", "template_worker")


@dataclass(frozen=True)
class Host:
    name: str  # of its namespace
    address: str  # where the other host reaches it
    front: str  # where clients on this machine reach it; the second host's leads nowhere
    folder: Path  # its temporary files
    packages: Path  # what is installed here alone, on the path of every Python
    environment: dict[str, str]

    def start(self, *command: str, env: dict[str, str] | None = None, **options) -> subprocess.Popen:
        """A process of this host, in a session of its own."""
        options = {"env": self.environment | (env or {}), "start_new_session": True} | options
        return subprocess.Popen(["ip", "netns", "exec", self.name, *command], **options)

    def run(self, *command: str, timeout: float = 120) -> subprocess.CompletedProcess:
        process = self.start(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def processes(self, *fragments: str) -> list[psutil.Process]:
        """Those that run here and whose command line or title holds one of the fragments; all without."""
        found = []
        for pid in _ip("netns", "pids", self.name).stdout.split():
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(int(pid))
                line = " ".join(process.cmdline())
                if process.status() != psutil.STATUS_ZOMBIE and any(f in line for f in fragments or ("",)):
                    found.append(process)
        return found

    @contextlib.contextmanager
    def starts_held(self) -> Iterator[None]:
        """Ranks that start here do not come to be ready."""
        with self._standstill(START, ""):
            yield

    @contextlib.contextmanager
    def steps_held(self, after: int) -> Iterator[None]:
        """Ranks of stages here take so many more steps and then stand still, but for their heartbeats."""
        with self._standstill(STEPS, str(after)):
            yield

    @contextlib.contextmanager
    def _standstill(self, name: str, text: str) -> Iterator[None]:
        written = self.folder / f"{name}.new"
        written.write_text(text)
        written.rename(self.folder / name)  # never seen half written
        try:
            yield
        finally:
            (self.folder / name).unlink()

    def power_off(self) -> None:
        """Every process here ends at once, none having been asked."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def cable(self, state: str) -> None:
        """up or down: the link to the other host."""
        _ip("-n", self.name, "link", "set", "peer", state)

    @property
    def cut(self) -> bool:
        return "state UP" not in _ip("-n", self.name, "link", "show", "peer").stdout


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Skips the test, saying why, where they cannot be made."""
    if shutil.which("ip") is None:
        pytest.skip("two hosts are made by `ip netns`, which is not installed (Debian, Ubuntu: iproute2)")
    mine = f"tr{os.getpid()}"
    names = [f"{mine}a", f"{mine}b"]
    net = f"198.18.{os.getpid() % 256}"
    folder = Path(tempfile.mkdtemp(prefix="tr", dir="/tmp"))  # short: the paths of sockets are limited
    hosts = []
    try:
        try:
            _make(*names, net)
        except subprocess.CalledProcessError as error:
            pytest.skip(
                f"two hosts are made of network namespaces, which cannot be had: {error.stderr.strip()}"
            )
        for index, name in enumerate(names):
            own = folder / "ab"[index]
            own.mkdir()
            packages = own / "packages"
            packages.mkdir()
            text = "import tests.cluster.standstill\n\ntests.cluster.standstill.install()\n"
            (packages / "sitecustomize.py").write_text(text)
            front = f"{net}.2" if index == 0 else "203.0.113.1"
            variables = environment(own, REPOSITORY) | {"TMPDIR": str(own), "NO_PROXY": "*"}
            variables["PYTHONPATH"] = os.pathsep.join([str(packages), variables["PYTHONPATH"]])
            hosts.append(Host(name, f"10.77.0.{index + 1}", front, own, packages, variables))
        yield hosts[0], hosts[1]
    finally:
        for host in hosts:
            host.power_off()
        _ip("link", "del", names[0], check=False)  # its other end goes with it
        for name in names:
            _ip("netns", "del", name, check=False)  # unless it was not made
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def raylet(host: Host, head: Host, cpus: int = 1, env: dict[str, str] | None = None) -> Iterator[None]:
    """Ray on a host, until the block ends or the host does; a cluster's head where both are the same."""
    place = ["--address", f"{head.address}:{RAY_PORT}"]
    if host is head:
        place = ["--head", "--port", str(RAY_PORT), "--include-dashboard=false", "--no-monitor"]
    log = host.folder / "ray.log"
    with log.open("w") as out:
        process = host.start(
            "ray", "start", "--block", *place, "--node-ip-address", host.address, "--num-cpus", str(cpus),
            "--object-store-memory", str(80 << 20), "--temp-dir", str(host.folder / "ray"),
            "--include-log-monitor=false",
            env=env, stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        wait_until(lambda: STARTED in log.read_text() or process.poll() is not None, 150)
        assert process.poll() is None, log.read_text()
        yield
    finally:
        host.power_off()  # in order it takes half a minute where nodes have been lost
        process.wait()


def nothing_left(*hosts: Host, seconds: float = 40.0) -> float:
    """Wait until no process and no file of ours is left on the hosts; the seconds it took. Those that do not
    leave by themselves Ray ends after a minute."""
    begun = time.monotonic()

    def left() -> list[str]:
        lines = [f"{host.name}: {p.pid}" for host in hosts for p in host.processes(*OURS)]
        return lines + [str(path) for host in hosts for path in host.folder.rglob("tramontane-*")]

    while found := left():
        assert time.monotonic() - begun < seconds, found
        time.sleep(0.05)
    return time.monotonic() - begun


def _make(one: str, two: str, net: str) -> None:
    for name in (one, two):
        _ip("netns", "add", name)
        _ip("netns", "exec", name, "true")
    # The interfaces that lead elsewhere come first: whoever takes the first one takes the wrong one.
    for text in (
        f"link add {one} type veth peer name front netns {one}",
        f"-n {two} link add front type veth peer name nowhere",
        f"-n {one} link add peer type veth peer name peer netns {two}",
        f"addr add {net}.1/30 dev {one}",
        f"link set {one} up",
        f"-n {one} addr add {net}.2/30 dev front",
        f"-n {two} addr add 203.0.113.1/24 dev front",
        f"-n {one} addr add 10.77.0.1/24 dev peer",
        f"-n {two} addr add 10.77.0.2/24 dev peer",
        *(f"-n {name} link set {device} up" for name in (one, two) for device in ("lo", "front", "peer")),
    ):
        _ip(*text.split())


def _ip(*arguments: str, check: bool = True) -> subprocess.CompletedProcess:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=check, timeout=20)
