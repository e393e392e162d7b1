"""Files that hold certificates, private keys and tokens: read, and held against each other.

What is wrong with one is said without a word of what is in it. Knows nothing of gRPC.
"""

from __future__ import annotations

import os
import re
import ssl
from pathlib import Path

from tramontane.errors import Error

LARGEST = 1 << 20  # bytes; a bundle of all public authorities is about 220 kB
# RFC 6750, 2.1 says which characters a bearer token has.
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")

PathLike = str | os.PathLike[str]


class BadFile(Error):
    """A file of certificates, keys or tokens cannot be used. `field` is the option that named it."""

    def __init__(self, field: str, file: PathLike, reason: str):
        super().__init__(f"{field}: {os.fspath(file)}: {reason}")
        self.field = field
        self.reason = f"{os.fspath(file)}: {reason}"


def read_authorities(field: str, file: PathLike) -> bytes:
    """The certificates (PEM) in a file. Raises BadFile."""
    pem = _read(field, file)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=pem.decode("ascii", "ignore"))
    except (ssl.SSLError, ValueError):  # the latter where there is nothing at all
        raise BadFile(field, file, "holds no certificate in PEM") from None
    return pem


def read_pair(cert_field: str, cert: PathLike, key_field: str, key: PathLike) -> tuple[bytes, bytes]:
    """A certificate with those between it and its authority, and its private key: both PEM.

    Raises BadFile, also where the key is another certificate's."""
    chain, private = read_authorities(cert_field, cert), _read(key_field, key)
    _check_pair(cert, key_field, key)
    # The check opens the files by itself: what it saw must be what is returned.
    if (chain, private) != (_read(cert_field, cert), _read(key_field, key)):
        raise BadFile(cert_field, cert, "changed while it was read")
    return chain, private


def _check_pair(cert: PathLike, key_field: str, key: PathLike) -> None:
    locked = False

    def no_password() -> bytes:
        nonlocal locked
        locked = True
        return b""

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, no_password)
    except ssl.SSLError as error:
        if locked:
            raise BadFile(key_field, key, "is encrypted; give the key without a password") from None
        if error.reason == "KEY_VALUES_MISMATCH":
            raise BadFile(key_field, key, f"is not the key of {os.fspath(cert)}") from None
        if error.reason is not None:  # the certificate's key is too short for this machine's rules, say
            words = error.reason.lower().replace("_", " ")
            raise BadFile(key_field, key, f"does not do with {os.fspath(cert)}: {words}") from None
        raise BadFile(key_field, key, "holds no private key in PEM") from None
    except OSError as error:
        raise BadFile(key_field, key, error.strerror or str(error)) from None


def read_tokens(field: str, file: PathLike) -> list[str]:
    """The bearer tokens in a file, one a line; empty lines do not count. At least one. Raises BadFile."""
    try:
        lines = _read(field, file).decode("ascii").splitlines()
    except UnicodeDecodeError:
        raise BadFile(field, file, "is no file of tokens: it is not ASCII") from None
    tokens = []
    for number, line in enumerate(lines, 1):
        if token := line.strip():
            if not is_token(token):
                raise BadFile(
                    field, file, f"line {number} is no token: letters, digits and -._~+/ are, = at its end"
                )
            tokens.append(token)
    if not tokens:
        raise BadFile(field, file, "holds no token; it wants one a line")
    return tokens


def is_token(text: str) -> bool:
    """Whether a text can be sent as a bearer token."""
    return _TOKEN.fullmatch(text) is not None


def _read(field: str, file: PathLike) -> bytes:
    try:
        with Path(file).open("rb") as opened:
            content = opened.read(LARGEST + 1)
    except OSError as error:
        raise BadFile(field, file, error.strerror or str(error)) from None
    if len(content) > LARGEST:
        raise BadFile(field, file, f"is larger than {LARGEST >> 20} MiB")
    return content
