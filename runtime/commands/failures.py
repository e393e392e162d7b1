"""How a command that fails says so: one line on standard error and an exit status."""

import functools
import inspect
import sys
import traceback
from collections.abc import Callable
from typing import Annotated

import typer

from runtime.errors import TramontaneError


class Failed(Exception):
    """A command failed, and this is how it says so."""

    def __init__(self, line: str, status: int):
        super().__init__(line)
        self.line = line
        self.status = status


class Terminated(BaseException):
    """SIGTERM came where nothing of its own handles it."""


def terminate(*_: object) -> None:
    """A signal handler: unwind as Ctrl-C does, so that what was started is stopped."""
    raise Terminated


def explained(function: Callable[..., None]) -> Callable[..., None]:
    """A command whose errors become Failed, and that has one more option: --debug shows their traceback."""
    debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of a failure.")]
    signature = inspect.signature(function)
    extra = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=debug)

    @functools.wraps(function)
    def run(*, debug: bool, **arguments: object) -> None:
        try:
            function(**arguments)
        except BrokenPipeError:  # whoever read the output has gone: typer ends quietly
            raise
        except (KeyboardInterrupt, Terminated, Exception) as error:
            if debug:
                traceback.print_exc()
            raise Failed(*line_and_status(error)) from error

    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), extra])
    return run


def line_and_status(error: BaseException) -> tuple[str, int]:
    """What a command ended with, as one line and an exit status."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if isinstance(error, Terminated):
        return "terminated", 143
    return _line(error), 1


def _line(error: BaseException) -> str:
    """What is not a TramontaneError is the machine's refusal, or a defect."""
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
