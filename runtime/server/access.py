"""Who may talk to the gateway: TLS, clients' certificates, bearer tokens.

All of it stands in files, which are read again when they change. Tokens are kept as hashes alone, so nothing
that is logged or raised can show one.
"""

import hashlib
import hmac
import ipaddress
import socket
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc
from grpc_health.v1 import health

from runtime.config import AccessConfig
from runtime.errors import InvalidArgument
from runtime.server import statuses
from runtime.server.current import Current
from runtime.server.metrics import Metrics
from tramontane.secret_files import BadFile, read_authorities, read_pair, read_tokens

# Probes ask for health, and know no tokens. All else is closed, what the server says of itself too.
_OPEN = f"/{health.SERVICE_NAME}/"


@dataclass(frozen=True, slots=True)
class Access:
    """What a server needs to know; None is what it does not ask for."""

    tls: grpc.ServerCredentials | None
    tokens: Current[tuple[bytes, ...]] | None  # SHA-256 of each


def open_access(config: AccessConfig) -> Access:
    """Read and check all files. Raises InvalidArgument naming the option and the file at fault."""
    return Access(_tls(config), _tokens(config.auth_token_file))


def exposure(host: str, config: AccessConfig) -> str | None:
    """What should trouble whoever serves on `host`, in a line; None if nothing does."""
    if _is_loopback(host):
        return None
    encrypted, known = config.tls_cert, config.auth_token_file or config.tls_client_ca
    if encrypted and known:
        return None
    if encrypted:
        return f"on {host} anyone may ask; --auth-token-file or --tls-client-ca says who may"
    if known:
        return f"on {host} tokens and replies can be read on their way; --tls-cert and --tls-key encrypt them"
    return f"on {host} anyone may ask, and nothing is encrypted; see --auth-token-file and --tls-cert"


def _is_loopback(host: str) -> bool:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError:
        return True  # whoever binds it says what is wrong with it
    return all(ipaddress.ip_address(address[0].partition("%")[0]).is_loopback for *_, address in found)


# ---- TLS ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Pems:
    chain: bytes
    key: bytes = field(repr=False)
    client_ca: bytes | None

    def configuration(self) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([(self.key, self.chain)], self.client_ca)


def _tls(config: AccessConfig) -> grpc.ServerCredentials | None:
    cert, key, client_ca = config.tls_cert, config.tls_key, config.tls_client_ca
    if cert is None or key is None:
        if cert is not None:
            raise InvalidArgument("tls-key", f"is missing: the private key of {cert}")
        if key is not None:
            raise InvalidArgument("tls-cert", f"is missing: the certificate that {key} belongs to")
        if client_ca is not None:
            raise InvalidArgument("tls-client-ca", f"{client_ca}: needs --tls-cert and --tls-key too")
        return None

    def read() -> _Pems:
        chain, private = _checked(read_pair, "tls-cert", cert, "tls-key", key)
        clients = None if client_ca is None else _checked(read_authorities, "tls-client-ca", client_ca)
        return _Pems(chain, private, clients)

    current = Current([file for file in (cert, key, client_ca) if file is not None], read)
    used: _Pems = current()
    lasting = [used]

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        """Asked by gRPC at each handshake; None is for no change."""
        now = current()
        if now == lasting[0]:
            return None
        lasting[0] = now
        return now.configuration()

    return grpc.dynamic_ssl_server_credentials(used.configuration(), fetch, client_ca is not None)


# ---- tokens ---------------------------------------------------------------------------------------------


def _tokens(file: str | None) -> Current[tuple[bytes, ...]] | None:
    if file is None:
        return None

    def read() -> tuple[bytes, ...]:
        return tuple(_digest(token) for token in _checked(read_tokens, "auth-token-file", file))

    return Current([file], read)


class Gate(grpc.aio.ServerInterceptor):
    """Lets calls through that bring a token; others end with UNAUTHENTICATED before their request is read."""

    def __init__(self, tokens: Current[tuple[bytes, ...]], metrics: Metrics):
        self._tokens = tokens
        self._metrics = metrics

    async def intercept_service(self, continuation, handler_call_details):
        method = handler_call_details.method
        reason = None if method.startswith(_OPEN) else self._refusal(handler_call_details)
        if reason is None:
            return await continuation(handler_call_details)

        async def refuse(requests, context: grpc.aio.ServicerContext) -> None:
            self._metrics.call(method)(grpc.StatusCode.UNAUTHENTICATED.name)
            await context.abort(*statuses.of(statuses.Unauthenticated(reason)))

        # As of a call whose requests stream in, whatever it is: such a handler starts before they are there.
        return grpc.stream_stream_rpc_method_handler(refuse)

    def _refusal(self, details: grpc.HandlerCallDetails) -> str | None:
        """Why a call may not pass. Says nothing of what it brought."""
        found = [value for name, value in details.invocation_metadata or () if name == "authorization"]
        if not found:
            return "this server wants a token: send the metadata authorization: Bearer TOKEN"
        scheme, _, token = found[0].strip().partition(" ")
        if len(found) > 1 or scheme.lower() != "bearer" or not token.strip():
            return "the metadata authorization is not of the form: Bearer TOKEN"
        if not _one_of(_digest(token.strip()), self._tokens()):
            return "the token is none that this server knows"
        return None


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def _one_of(digest: bytes, known: tuple[bytes, ...]) -> bool:
    """In a time that depends on how many are known, and on nothing else."""
    found = False
    for each in known:
        found |= hmac.compare_digest(digest, each)
    return found


def _checked(read: Callable, *arguments: str):
    try:
        return read(*arguments)
    except BadFile as error:
        raise InvalidArgument(error.field, error.reason) from None
