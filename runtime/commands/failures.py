"""How a command that fails says so: one line on standard error and an exit status."""

import sys

from runtime.errors import TramontaneError


class Failed(Exception):
    """A command failed; its text is the line to show."""


class Terminated(BaseException):
    """SIGTERM came where nothing of its own handles it."""


def terminate(*_: object) -> None:
    """A signal handler: unwind as Ctrl-C does, so that what was started is stopped."""
    raise Terminated


def line_of(error: Exception) -> str:
    """An error as one line. What is not a TramontaneError is the machine's refusal, or a defect."""
    text = " ".join(str(error).split())
    if isinstance(error, TramontaneError):
        return text
    if isinstance(error, OSError):
        return f"{error.strerror or text}: {error.filename}" if error.filename else text
    if isinstance(error, MemoryError):
        return "out of memory"
    return f"internal error: {type(error).__name__}: {text[:300]} (--debug shows where)"


def fail(line: str, status: int) -> int:
    print(f"error: {' '.join(line.split())}", file=sys.stderr)
    return status
