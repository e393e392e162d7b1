"""What commands show: results on standard output, progress and errors on standard error.

Progress is for people: nothing of it is written where standard error is not a terminal.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# A model may write anything; a terminal would obey escape sequences in it.
_CONTROL = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160))}
_CONTROL = {code: mark for code, mark in _CONTROL.items() if chr(code) not in "\n\t"}


def write_text(text: str) -> None:
    """Part of a reply, at once, without control characters where a terminal reads it."""
    sys.stdout.write(text.translate(_CONTROL) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def write_line(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def write_json(value: object) -> None:
    """One line of JSON."""
    write_line(json.dumps(value, ensure_ascii=False, allow_nan=False))


def note(text: str) -> None:
    """An aside for a person who watches; silent where no one does."""
    if sys.stderr.isatty():
        from rich.console import Console

        Console(stderr=True, highlight=False).print(text, style="dim", markup=False, soft_wrap=True)


def log_line(text: str) -> None:
    """What an operator must be able to read afterwards, watched or not."""
    print(f"tramontane: {' '.join(text.split())}", file=sys.stderr, flush=True)


def watched() -> bool:
    """Whether someone sees progress bars."""
    return sys.stderr.isatty()


@contextmanager
def working(text: str) -> Iterator[Callable[[str], None]]:
    """A spinner while the block runs; the function given changes its text."""
    if not watched():
        yield lambda text: None
        return
    from rich.console import Console

    with Console(stderr=True).status(text) as status:
        yield status.update


@contextmanager
def loading(text: str) -> Iterator[Callable[[int, int], None]]:
    """A bar over bytes while the block runs; the function given takes bytes done and bytes in all."""
    if not watched():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(text, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
