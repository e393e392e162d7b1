"""Who answers the requests of a batch: an engine's pipeline, or a server through the client library.

Both take a line's request as the gRPC contract's message and give the client library's reply, so that a batch
gets from an engine of its own what a server would have said.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing

import tramontane
from runtime.commands.batch_lines import Ask, Failure, refusal
from runtime.errors import InvalidArgument, ModelFailed, NotFound, QueueFull, TramontaneError, Unavailable
from runtime.server import convert
from runtime.server.pipeline import Pipeline
from runtime.types import FinishReason
from tramontane import messages as make
from tramontane.gathered import Gathered
from tramontane.types import Reply

Answer = Callable[[Ask], Awaitable[Reply]]
"""Raises Unavailable (either library's) where nobody is left to ask, tramontane.Unauthenticated where nobody
listens; other errors are the request's own."""
Answerers = Callable[[], AbstractAsyncContextManager[Sequence[Answer]]]


def by_pipeline(pipeline: Pipeline) -> Answer:
    """As the gRPC service does it, without the wire."""

    async def answer(ask: Ask) -> Reply:
        if ask.messages is not None:
            request = make.chat_request(ask.messages, ask.options)
        else:
            request = make.prompt_request(ask.prompt, ask.options)
        served = pipeline.info.model
        if request.model not in ("", served):
            raise NotFound("model", request.model, f"this engine serves {served!r}")
        name = secrets.token_hex(8)
        gathered = Gathered(request)
        async with aclosing(pipeline.run(convert.completion(request, name, None))) as pieces:
            async for piece in pieces:
                gathered.add(convert.response(piece, name, served))
                if piece.final and piece.final.finish_reason is FinishReason.FAILED:
                    raise ModelFailed(piece.final.detail)
                if piece.final and piece.final.finish_reason not in (FinishReason.STOP, FinishReason.LENGTH):
                    raise Unavailable(piece.final.detail or "the engine failed")
        reply = gathered.reply(0)
        if reply is None:
            raise Unavailable("the engine ended a reply without saying so")
        return reply

    return answer


def by_client(client: tramontane.AsyncClient) -> Answer:
    async def answer(ask: Ask) -> Reply:
        if ask.messages is not None:
            return await client.chat(ask.messages, **ask.options)
        return await client.generate(ask.prompt, **ask.options)

    return answer


def retry_after(error: Exception) -> float | None:
    """Seconds after which a request may be made again; None where that would change nothing."""
    if isinstance(error, Unavailable | tramontane.Unavailable | tramontane.Unauthenticated):
        raise error
    if isinstance(error, QueueFull | tramontane.Overloaded):
        return error.retry_after
    return None


def failure_of(error: Exception) -> Failure:
    match error:
        case InvalidArgument() | tramontane.InvalidRequest():
            return refusal(str(error))
        case NotFound() | tramontane.ModelNotFound():
            return Failure(404, "model_not_found", str(error), "model")
        case tramontane.DeadlineExceeded():
            return Failure(504, "timeout", str(error))
        case _:
            return Failure(500, "server_error", " ".join(str(error).split())[:600])


def as_ours(ended: BaseException | None) -> BaseException | None:
    if isinstance(ended, tramontane.Unauthenticated):
        return TramontaneError(f"{ended.message}; --token-file names a file with one")
    return Unavailable(ended.message) if isinstance(ended, tramontane.Unavailable) else ended
