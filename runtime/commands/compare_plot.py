"""The file of a comparison's plot: refused before the work where it cannot be written, filled after it."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from runtime.errors import InvalidArgument, NotEnough, NotFound


@contextmanager
def plot_file(path: Path) -> Iterator[Callable[[str], None]]:
    """Open a file for the block; the function given makes a text all that it holds, or raises NotEnough.
    Without that, a file that was there stays as it was, and one that was not is gone again. Raises NotFound,
    InvalidArgument."""
    if not path.parent.is_dir():
        raise NotFound("folder", str(path.parent), "it is to hold the plot")
    new = not os.path.lexists(path)
    try:
        file = path.open("ab", buffering=0)  # to append: what is there stands until there is something better
    except OSError as error:
        raise InvalidArgument("plot", f"{path} cannot be written: {error.strerror}") from None
    written = False

    def write(text: str) -> None:
        nonlocal written
        left = memoryview(text.encode())
        try:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # a pipe has nothing to take away
                file.truncate(0)
            while left:
                left = left[file.write(left) :]
        except OSError as error:
            raise NotEnough(f"the plot {path} cannot be written: {error.strerror}") from error
        written = True

    try:
        yield write
    finally:
        file.close()
        if new and not written:
            path.unlink(missing_ok=True)
