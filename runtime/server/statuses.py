"""Errors as gRPC statuses with google.rpc details. The table of the service's contract, in code."""

import asyncio
from collections.abc import Sequence

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from runtime.errors import InvalidArgument, ModelFailed, NotFound, QueueFull, TramontaneError, Unavailable

DOMAIN = "tramontane"
# Statuses travel in HTTP/2 headers, of which clients take 8 KiB by default; texts of users appear in
# them thrice: as the message, where a byte beyond ASCII is written as three, and twice in base64.
_LONGEST_TEXT = 600  # bytes of UTF-8
# A call's deadline passes at its client first: it travels as the time that is left, rounded up, and counts
# from its arrival here. So a call that a deadline ended may have this many seconds yet.
_ABOUT_NOW = 0.05


class SlowReader(TramontaneError):
    """A stream's reader fell further behind than a server can remember."""


class Unauthenticated(TramontaneError):
    """A call brought no token, or a wrong one."""


class Cancelled(TramontaneError):
    """The engine ended the request because it was cancelled."""


class DeadlineExceeded(TramontaneError):
    """The engine ended the request because its deadline passed."""


def of(error: TramontaneError) -> tuple[grpc.StatusCode, str, tuple]:
    """Status code, message and trailing metadata of an error, as `ServicerContext.abort` takes them."""
    code, reason, details, trailers = _classify(error)
    message = _short(str(error))
    info = error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN)
    status = status_pb2.Status(code=code.value[0], message=message, details=_packed([info, *details]))
    return code, message, (*rpc_status.to_status(status).trailing_metadata, *trailers)


def ended_by(error: BaseException, context: grpc.aio.ServicerContext) -> grpc.StatusCode:
    """The status of a call whose handler raised `error`: INTERNAL only for a defect, and for a
    model that gives no number.

    A client that leaves, or whose deadline passes, shows as a cancellation where the handler waits and as
    some failure of a write where it writes."""
    if isinstance(error, TramontaneError):
        return of(error)[0]
    gone = (grpc.RpcError, grpc.aio.AbortError, asyncio.CancelledError)
    if isinstance(error, gone) or not isinstance(error, Exception) or context.done():
        left = context.time_remaining()
        late = left is not None and left < _ABOUT_NOW
        return grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED
    return grpc.StatusCode.INTERNAL


def _classify(error: TramontaneError) -> tuple[grpc.StatusCode, str, list[Message], list[tuple[str, str]]]:
    match error:
        case InvalidArgument(field=field, reason=reason):
            violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=_short(reason))
            details = [error_details_pb2.BadRequest(field_violations=[violation])]
            return grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", details, []
        case NotFound(kind=kind, name=name):
            resource = error_details_pb2.ResourceInfo(resource_type=kind, resource_name=_short(name))
            return grpc.StatusCode.NOT_FOUND, "NOT_FOUND", [resource], []
        case QueueFull(retry_after=seconds):
            milliseconds = max(1, round(seconds * 1000))
            delay = duration_pb2.Duration()
            delay.FromMilliseconds(milliseconds)
            trailers = [("grpc-retry-pushback-ms", str(milliseconds))]
            details = [error_details_pb2.RetryInfo(retry_delay=delay)]
            return grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", details, trailers
        case SlowReader():
            return grpc.StatusCode.RESOURCE_EXHAUSTED, "SLOW_READER", [], []
        case ModelFailed():  # a client that asked again would get the same
            return grpc.StatusCode.INTERNAL, "MODEL_FAILED", [], []
        case Unavailable():
            return grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE", [], []
        case Unauthenticated():
            return grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED", [], []
        case Cancelled():
            return grpc.StatusCode.CANCELLED, "CANCELLED", [], []
        case DeadlineExceeded():
            return grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", [], []
        case _:
            return grpc.StatusCode.INTERNAL, "INTERNAL", [], []


def _packed(details: Sequence[Message]) -> list[any_pb2.Any]:
    packed = []
    for detail in details:
        packed.append(any_pb2.Any())
        packed[-1].Pack(detail)
    return packed


def _short(text: str) -> str:
    data = text.encode("utf-8", "replace")  # a lone surrogate cannot be sent
    if len(data) <= _LONGEST_TEXT:
        return data.decode()
    return data[: _LONGEST_TEXT - 3].decode("utf-8", "ignore") + "..."  # half a character is left out
