"""What stands before every handler: requests that do not parse are refused, errors become statuses.

Handlers raise TramontaneErrors and never see a malformed request. Anything else that a handler raises is
a defect: it is logged with its traceback, and the client is told INTERNAL and nothing more.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable

import grpc
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import Descriptor

from runtime.errors import InvalidArgument, TramontaneError
from runtime.server import statuses
from runtime.server.malformed import Malformed, tolerant

log = logging.getLogger(__name__)


class Guard(grpc.aio.ServerInterceptor):
    """Wraps handlers that take one request. Streaming handlers must write by `context.write`."""

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
            _guarded(behaviour),
            request_deserializer=deserialise,
            response_serializer=handler.response_serializer,
        )


def _guarded(behaviour: Callable[..., Awaitable]) -> Callable[..., Awaitable]:
    async def guarded(request, context: grpc.aio.ServicerContext):
        try:
            if isinstance(request, Malformed):
                raise InvalidArgument(request.field or "request", request.reason)
            return await behaviour(request, context)
        except TramontaneError as error:
            await context.abort(*statuses.of(error))
        except (grpc.RpcError, grpc.aio.AbortError, asyncio.CancelledError):
            raise
        except Exception:
            if context.done():  # a write that failed because the client has gone
                raise
            log.exception("a request failed by a defect")
            await context.abort(grpc.StatusCode.INTERNAL, "internal error; the server's log has the cause")

    return guarded


def _request_type(method: str) -> Descriptor | None:
    """The request message of a method named "/package.Service/Method"."""
    service, _, name = method.removeprefix("/").partition("/")
    try:
        return descriptor_pool.Default().FindServiceByName(service).methods_by_name[name].input_type
    except KeyError:
        return None
