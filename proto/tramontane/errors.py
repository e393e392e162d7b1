"""What a call can fail with. Each reads as one line."""

import grpc


class Error(Exception):
    """A call failed. `code` is the gRPC status, None where no call was made."""

    def __init__(self, message: str, code: grpc.StatusCode | None = None):
        super().__init__(message)
        self.message = message
        self.code = code


class InvalidRequest(Error):
    """The request cannot be served as it is; the message names the field."""


class ModelNotFound(Error):
    """The server does not serve this model."""


class Overloaded(Error):
    """The server takes no more now. `retry_after` is in seconds, None where the server gave no time."""

    def __init__(self, message: str, code: grpc.StatusCode | None = None, retry_after: float | None = None):
        super().__init__(message, code)
        self.retry_after = retry_after


class Unavailable(Error):
    """No server answers there, it shuts down, or its engine is gone. Trying again may help."""


class Unauthenticated(Error):
    """The server wants a token, or another one."""


class DeadlineExceeded(Error):
    """The call's timeout passed."""


class Cancelled(Error):
    """The call was cancelled."""


_KINDS: dict[grpc.StatusCode, type[Error]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: ModelNotFound,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
}


def from_rpc(error: grpc.RpcError) -> Error:
    """The exception for a failed call, of either of grpcio's interfaces."""
    code = error.code()
    message = error.details() or code.name
    if code is not grpc.StatusCode.RESOURCE_EXHAUSTED:
        return _KINDS.get(code, Error)(message, code)
    pushback = dict(error.trailing_metadata() or ()).get("grpc-retry-pushback-ms")
    return Overloaded(message, code, int(pushback) / 1000 if pushback else None)
