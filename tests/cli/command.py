"""Running the command line, in this process where it ends by itself, as a process where it serves."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from runtime.cli import main
from tests.support import REPOSITORY


@dataclass(frozen=True)
class Result:
    status: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        assert self.status == 0, self.err
        return json.loads(self.out)


def run(*arguments: str) -> Result:
    """`tramontane ARGUMENTS` in this process."""
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")
    before = signal.getsignal(signal.SIGTERM)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()) as err:
            status = main(arguments)
    finally:
        signal.signal(signal.SIGTERM, before)
    out.flush()
    return Result(status, out.buffer.getvalue().decode(), err.getvalue())


def refused(result: Result, *fragments: str, status: int = 1) -> None:
    """A failure: nothing printed, one line on standard error that holds all fragments."""
    assert result.status == status, result
    assert result.out == ""
    lines = result.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.err
    for fragment in fragments:
        assert fragment in lines[0], lines[0]


def environment(**extra: str) -> dict[str, str]:
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "proto")])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | extra


def spawn(*arguments: str, code: tuple[str, ...] = (), **options) -> subprocess.Popen:
    """`tramontane ARGUMENTS` as a process, its streams piped as text. `code`: Python to run in its place,
    with words that it is given before the others."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    command = [sys.executable, *(["-c", *code] if code else ["-m", "runtime.cli"]), *arguments]
    return subprocess.Popen(command, **({"env": environment()} | options))


def finish(process: subprocess.Popen, timeout: float = 240, input: str | None = None) -> Result:
    """Wait for a process to end."""
    out, err = process.communicate(input, timeout=timeout)
    return Result(process.returncode, out or "", err or "")


@contextlib.contextmanager
def serving(
    model: Path | str, *arguments: str, code: tuple[str, ...] = ()
) -> Iterator[tuple[subprocess.Popen, dict]]:
    """A `tramontane serve --json` process and its ready line; killed at the end if it still runs. `code`: as
    for `spawn`."""
    process = spawn("serve", str(model), "--port", "0", "--json", *arguments, code=code)
    try:
        line = process.stdout.readline()
        assert line, finish(process).err
        yield process, json.loads(line)
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
