"""What commands that talk to a running server share: a client whose failures read as one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import tramontane
from runtime.errors import InvalidArgument, TramontaneError, Unavailable


def check_target(target: str) -> None:
    """Refuse what is not HOST:PORT; gRPC would look for such a name for a long time."""
    host, colon, port = target.rpartition(":")
    if not (colon and host and port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise InvalidArgument("target", f"{target[:80]!r} is not of the form HOST:PORT")


@contextmanager
def one_line(target: str) -> Iterator[None]:
    """Turn a client's errors into TramontaneErrors."""
    try:
        yield
    except tramontane.Unavailable as error:
        if "connect" not in error.message and "resolution" not in error.message:
            raise Unavailable(error.message) from error
        raise Unavailable(f"no server answers at {target}; start one with: tramontane serve MODEL") from error
    except tramontane.Error as error:
        raise TramontaneError(error.message.splitlines()[0][:600]) from error
