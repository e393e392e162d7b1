"""What commands that talk to a running server share: a client whose failures read as one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tramontane
from runtime.errors import InvalidArgument, TramontaneError, Unavailable
from tramontane.secret_files import read_authorities, read_pair, read_tokens

# What gRPC says of a connection that TLS was the end of, and what that means.
_TLS_FAILURES = {
    "CERTIFICATE_VERIFY_FAILED": "its certificate is of none of --tls-ca, or has expired",
    "Hostname Verification": "its certificate is for another name",
    "WRONG_VERSION_NUMBER": "it speaks no TLS",
    "Socket closed": "it closes the connection; it may want TLS (--tls-ca) or a certificate (--tls-cert)",
}


@dataclass(frozen=True)
class Credentials:
    """Files that say who asks, and whom to believe."""

    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    token_file: Path | None = None

    def unused(self) -> None:
        """For a command that asks no server. Raises InvalidArgument if certificates are named; a token's file
        may be the environment's."""
        for name in ("tls_ca", "tls_cert", "tls_key"):
            if getattr(self, name) is not None:
                raise InvalidArgument(name.replace("_", "-"), "is for a running server: give its --target")

    def read(self) -> dict[str, Any]:
        """As options of a tramontane.Client. Raises InvalidArgument naming the option and its file."""
        if (self.tls_cert is None) != (self.tls_key is None):
            given, missing = ("cert", "key") if self.tls_key is None else ("key", "cert")
            raise InvalidArgument(f"tls-{missing}", f"is missing; --tls-{given} goes with it")
        if self.tls_ca is None and self.tls_cert is not None:
            raise InvalidArgument("tls-ca", "is missing; without it there is no TLS")
        try:
            if self.tls_ca is not None:
                read_authorities("tls-ca", self.tls_ca)
            if self.tls_cert is not None and self.tls_key is not None:
                read_pair("tls-cert", self.tls_cert, "tls-key", self.tls_key)
            # The first: a server's own file does as well, whose others are on their way out.
            token = None if self.token_file is None else read_tokens("token-file", self.token_file)[0]
        except tramontane.BadFile as error:
            raise InvalidArgument(error.field, error.reason) from None
        return {"tls_ca": self.tls_ca, "tls_cert": self.tls_cert, "tls_key": self.tls_key, "token": token}


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
        for sign, meaning in _TLS_FAILURES.items():
            if sign in error.message:
                raise Unavailable(f"no connection to the server at {target}: {meaning}") from error
        raise Unavailable(f"no server answers at {target}; start one with: tramontane serve MODEL") from error
    except tramontane.Unauthenticated as error:
        raise TramontaneError(f"{error.message}; --token-file names a file with one") from error
    except tramontane.Error as error:
        raise TramontaneError(error.message.splitlines()[0][:600]) from error
