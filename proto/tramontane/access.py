"""How a client gets at a server: its channel's credentials, and the token that goes with every call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc

from tramontane.errors import Error
from tramontane.secret_files import PathLike, is_token, read_authorities, read_pair
from tramontane.v1.inference_service_pb2_grpc import InferenceServiceStub


def credentials(
    tls_ca: PathLike | None, tls_cert: PathLike | None, tls_key: PathLike | None
) -> grpc.ChannelCredentials | None:
    """Of a channel; None is one without TLS. Files are read now. Raises BadFile, Error."""
    if (tls_cert is None) != (tls_key is None):
        given, missing = ("tls_cert", "tls_key") if tls_key is None else ("tls_key", "tls_cert")
        raise Error(f"{missing}: is missing; {given} goes with it")
    if tls_ca is None:
        if tls_cert is not None:
            raise Error("tls_ca: is missing; without it there is no TLS to show tls_cert in")
        return None
    roots = read_authorities("tls_ca", tls_ca)
    if tls_cert is None or tls_key is None:
        return grpc.ssl_channel_credentials(roots)
    chain, key = read_pair("tls_cert", tls_cert, "tls_key", tls_key)
    return grpc.ssl_channel_credentials(roots, key, chain)


def stub(channel: grpc.Channel | grpc.aio.Channel, token: str | None) -> InferenceServiceStub:
    """The calls of a channel, each with the token. Raises Error for what cannot be one."""
    made = InferenceServiceStub(channel)
    if token is None:
        return made
    if not is_token(token):
        raise Error("token: is no bearer token: letters, digits and -._~+/ are, = at its end")
    # Not as gRPC's call credentials: those do not go without TLS, on a connection of this host too.
    metadata = (("authorization", f"Bearer {token}"),)
    for name, method in list(vars(made).items()):
        setattr(made, name, _with_metadata(method, metadata))
    return made


def _with_metadata(method: Callable[..., Any], metadata: tuple[tuple[str, str], ...]) -> Callable[..., Any]:
    def call(request: Any, *, timeout: float | None = None) -> Any:
        return method(request, timeout=timeout, metadata=metadata)

    return call
