"""The files of a batch: requests read as a stream, results appended so that an interruption loses none.

A result is one line, written whole and made durable before it counts. What a killed run left of a last line
is dropped by the next; every other line stands. Kept in memory: a digest and a flag a line, no texts.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from runtime.commands.batch_lines import has_failed, read_line
from runtime.errors import InvalidArgument, NotEnough, NotFound

MAX_LINE = 32 << 20  # bytes of a request
_STARTS = (b'{"custom_id": "', b'{"id": "batch_req_')


def key(custom_id: str) -> bytes:
    """What is remembered of a custom_id."""
    return hashlib.blake2b(custom_id.encode("utf-8", "surrogatepass"), digest_size=16).digest()


class Requests:
    """The file of requests."""

    def __init__(self, path: Path):
        """Raises NotFound, InvalidArgument."""
        self.path = path
        try:
            self._file = path.open("rb")
        except FileNotFoundError:
            raise NotFound("file of requests", str(path), "no such file") from None
        except OSError as error:
            raise InvalidArgument("in", f"{path} cannot be read: {error.strerror}") from None
        if not stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
            self._file.close()
            raise InvalidArgument("in", f"{path} is not a file; it is read twice")

    def close(self) -> None:
        self._file.close()

    def check(self) -> set[bytes]:
        """Read all of it; the keys of its requests. Raises InvalidArgument naming the first line that no
        result could be written for, or that repeats a custom_id."""
        found: set[bytes] = set()
        for number, value in self._values():
            name = key(value["custom_id"])
            if name in found:
                raise self._wrong(number, f"repeats custom_id {value['custom_id'][:80]!r}")
            found.add(name)
        return found

    def without(self, done: set[bytes]) -> Iterator[dict[str, Any]]:
        """The lines, but for those whose key is in `done`, to which each is added as it is handed out."""
        for _, value in self._values():
            name = key(value["custom_id"])
            if name not in done:
                done.add(name)
                yield value

    def _values(self) -> Iterator[tuple[int, dict[str, Any]]]:
        self._file.seek(0)
        for number, line in _lines(self._file, MAX_LINE + 1):
            if len(line) > MAX_LINE:
                raise self._wrong(number, f"is longer than {MAX_LINE} bytes")
            if line.strip():
                try:
                    yield number, read_line(line)
                except ValueError as error:
                    raise self._wrong(number, str(error)) from None

    def _wrong(self, number: int, reason: str) -> InvalidArgument:
        return InvalidArgument("in", f"line {number} of {self.path} {reason}")


class Results:
    """The file of results. `done`: for each key, whether its request failed. `torn`: bytes of a last line
    that were dropped."""

    def __init__(self, path: Path):
        """Open or make it, and read what is there. Raises InvalidArgument where it is not the results of
        a batch, NotEnough where another process is writing it; the file is then as it was."""
        self.path = path
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise InvalidArgument("out", f"{path} cannot be written: {error.strerror}") from None
        self._file = os.fdopen(descriptor, "r+b")
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise InvalidArgument("out", f"{path} is not a file")
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise NotEnough(f"{path} is being written by another batch") from None
            self.done: dict[bytes, bool] = {}
            self.torn = 0
            self._end = 0
            self._recover()
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        self._file.close()

    def append(self, values: Sequence[dict[str, Any]]) -> None:
        """Write lines and make them durable. Where that fails (NotEnough), the file ends where it did."""
        # ASCII alone: no reader can take a character of a reply for the end of a line.
        data = b"".join(json.dumps(value, allow_nan=False).encode() + b"\n" for value in values)
        try:
            self._write(data)
        except OSError as error:
            os.ftruncate(self._file.fileno(), self._end)
            raise NotEnough(
                f"{self.path} cannot be written: {error.strerror}; what it holds stands"
            ) from error
        self._end += len(data)
        for value in values:
            self.done[key(value["custom_id"])] = has_failed(value)

    def _write(self, data: bytes) -> None:
        at, view = self._end, memoryview(data)
        while view:
            written = os.pwrite(self._file.fileno(), view, at)
            at, view = at + written, view[written:]
        os.fsync(self._file.fileno())

    def _recover(self) -> None:
        whole = 0  # bytes up to the end of the last whole line
        for number, line in _lines(self._file):
            complete = line.endswith(b"\n")
            try:
                value = read_line(line) if line.strip() else None
            except ValueError as error:
                if not complete and _may_be_torn(line):
                    self.torn = os.fstat(self._file.fileno()).st_size - whole
                    break
                raise InvalidArgument("out", f"line {number} of {self.path} {error}") from None
            if value is not None:
                name = key(value["custom_id"])
                if name in self.done:
                    raise InvalidArgument(
                        "out", f"line {number} of {self.path} repeats custom_id {value['custom_id'][:80]!r}"
                    )
                if "error" not in value:
                    raise InvalidArgument("out", f"line {number} of {self.path} is not a result of a batch")
                self.done[name] = has_failed(value)
            whole += len(line)
        else:
            if whole and not complete:  # a whole object that lost its line's end, and nothing else
                self._end = whole
                self._write(b"\n")
                whole += 1
        if self.torn:
            os.ftruncate(self._file.fileno(), whole)
        self._end = whole
        _sync_folder(self.path)


def _lines(file: BinaryIO, most: int = -1) -> Iterator[tuple[int, bytes]]:
    """Numbered from 1; longer ones than `most` bytes come in pieces."""
    number = 0
    while line := file.readline(most):
        number += 1
        yield number, line


def _may_be_torn(line: bytes) -> bool:
    """Whether this is the beginning of a line of ours, or a hole that a file system left in its place.
    Nothing else is ever dropped."""
    return not line.strip(b"\0") or any(start.startswith(line[: len(start)]) for start in _STARTS)


def _sync_folder(path: Path) -> None:
    """So that the name of a new file survives what its lines survive."""
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
