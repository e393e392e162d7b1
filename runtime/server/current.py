"""What files say now: read again when they have changed, so that certificates and tokens are rotated without
a restart.

Whoever writes them may be in the middle of it, or wrong: what cannot be used is logged once, and what was
read before stays in force until something better is there.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from runtime.errors import TramontaneError

log = logging.getLogger(__name__)

Value = TypeVar("Value")
# A file may change again within a tick of the clock that stamps it, unseen. What was stamped this lately is
# read again the next time.
_TICK_NS = 50_000_000

Stamp = tuple[int, ...] | None


class Current(Generic[Value]):
    """`read()` of some files. Looking costs a `stat` a file; any thread may do it."""

    def __init__(self, files: Sequence[str], read: Callable[[], Value]):
        """Reads once. Raises what `read` does."""
        self._files = files
        self._read = read
        self._lock = threading.Lock()
        self._complaint = ""
        self._stamps = self._look()
        self._value = read()

    def __call__(self) -> Value:
        """What the files say, or said when they last could be used."""
        with self._lock:
            stamps = self._look()
            if stamps != self._stamps or None in stamps:
                self._stamps = stamps  # taken before reading: a change meanwhile shows the next time
                self._read_again()
            return self._value

    def _read_again(self) -> None:
        try:
            self._value = self._read()
        except TramontaneError as error:
            if str(error) != self._complaint:
                log.warning("%s; what was there before stays in force", error)
            self._complaint = str(error)
        else:
            self._complaint = ""

    def _look(self) -> tuple[Stamp, ...]:
        return tuple(_stamp(file) for file in self._files)


def _stamp(file: str) -> Stamp:
    """What differs when a file has changed; None if that cannot be told."""
    try:
        found = os.stat(file)  # of what links lead to: Kubernetes turns a link to put new Secrets in place
    except OSError:
        return None
    if found.st_mtime_ns > time.time_ns() - _TICK_NS:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
