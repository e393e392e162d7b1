"""What stands before every handler: requests that do not parse are refused, errors become statuses, and each
call is counted by the one it ended with.

Handlers raise TramontaneErrors and never see a malformed request. Anything else that a handler raises is
a defect: it is logged with its traceback, and the client is told INTERNAL and nothing more.
"""

import logging
from collections.abc import Awaitable, Callable

import grpc
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import Descriptor

from runtime.errors import InvalidArgument, TramontaneError
from runtime.server import statuses
from runtime.server.malformed import Malformed, tolerant
from runtime.server.metrics import Metrics

log = logging.getLogger(__name__)


class Guard(grpc.aio.ServerInterceptor):
    """Wraps handlers that take one request. Streaming handlers must write by `context.write`."""

    def __init__(self, metrics: Metrics):
        self._metrics = metrics

    async def intercept_service(self, continuation, handler_call_details):
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming:
            return handler
        deserialise = handler.request_deserializer
        request_type = _request_type(handler_call_details.method)
        if request_type is not None:
            deserialise = tolerant(deserialise, request_type)
        if handler.response_streaming:
            make, behaviour = grpc.unary_stream_rpc_method_handler, handler.unary_stream
        else:
            make, behaviour = grpc.unary_unary_rpc_method_handler, handler.unary_unary
        return make(
            _guarded(behaviour, lambda: self._metrics.call(handler_call_details.method)),
            request_deserializer=deserialise,
            response_serializer=handler.response_serializer,
        )


def _guarded(
    behaviour: Callable[..., Awaitable], begin: Callable[[], Callable[[str], None]]
) -> Callable[..., Awaitable]:
    """`begin` is called when a request has arrived, and what it returns with the name of the status."""

    async def guarded(request, context: grpc.aio.ServicerContext):
        ended = begin()
        code = grpc.StatusCode.OK
        try:
            if isinstance(request, Malformed):
                raise InvalidArgument(request.field or "request", request.reason)
            return await behaviour(request, context)
        except BaseException as error:
            code = statuses.ended_by(error, context)
            if isinstance(error, TramontaneError):
                await context.abort(*statuses.of(error))
            if code is not grpc.StatusCode.INTERNAL:
                raise
            log.exception("a request failed by a defect")
            await context.abort(code, "internal error; the server's log has the cause")
        finally:
            ended(code.name)

    return guarded


def _request_type(method: str) -> Descriptor | None:
    """The request message of a method named "/package.Service/Method"."""
    service, _, name = method.removeprefix("/").partition("/")
    try:
        return descriptor_pool.Default().FindServiceByName(service).methods_by_name[name].input_type
    except KeyError:
        return None
