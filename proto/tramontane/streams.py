"""Replies that grow, blocking and asynchronous, and that go on by themselves where their server goes away."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator

import grpc

from tramontane.errors import Cancelled, Error, Unavailable, from_rpc
from tramontane.gathered import Gathered
from tramontane.retry import Retry
from tramontane.types import Chunk, Reply, Resume
from tramontane.v1 import generate_pb2


class Stream:
    """A reply that grows: iterate for its chunks. Leaving its `with` block early cancels it."""

    def __init__(
        self,
        method: Callable[..., grpc.Call],
        request: generate_pb2.GenerateRequest,
        timeout: float | None,
        resumes: int,
    ):
        self._method = method
        self._gathered = Gathered(request)
        self._retry = Retry(resumes, timeout)
        self._cancelled = threading.Event()
        self._call = method(request, timeout=timeout)

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        while True:
            try:
                message = next(self._call)
            except grpc.RpcError as error:
                failure = from_rpc(error)
            else:
                if self._gathered.advances(message):
                    self._retry.arrived()
                chunk = self._gathered.add(message)
                if chunk is None:
                    continue
                return chunk
            if self._cancelled.is_set():
                raise _after_cancel(failure)
            if self._gathered.whole and isinstance(failure, Unavailable):
                raise StopIteration  # it broke before its status, which says nothing more
            if self._cancelled.wait(self._retry.wait(failure)):
                raise _cancelled()
            self._call = self._method(self._gathered.request(), timeout=self._retry.remaining())
            if self._cancelled.is_set():  # while the call was made
                self._call.cancel()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    @property
    def reply(self) -> Reply | None:
        """The whole reply once the last chunk has come, else None. Stands even where the stream then
        failed: its finish_reason and counts say how far it got."""
        return self._gathered.reply(self._retry.resumed)

    @property
    def resume(self) -> Resume | None:
        """What has come so far, in the form that the option `resume` takes: whoever keeps it can ask for the
        rest later, from another process. None before the first message."""
        return self._gathered.resume()

    def result(self) -> Reply:
        """Read to the end; the whole reply."""
        for _ in self:
            pass
        return _whole(self.reply)

    def cancel(self) -> None:
        """Stop the reply and free what it holds on the server. Does nothing to one that has ended."""
        self._cancelled.set()
        self._call.cancel()


class AsyncStream:
    """A reply that grows: iterate with `async for`. Leaving its `async with` block early cancels it."""

    def __init__(
        self,
        method: Callable[..., grpc.aio.UnaryStreamCall],
        request: generate_pb2.GenerateRequest,
        timeout: float | None,
        resumes: int,
    ):
        self._method = method
        self._gathered = Gathered(request)
        self._retry = Retry(resumes, timeout)
        self._cancelled = asyncio.Event()
        self._call = method(request, timeout=timeout)

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        while True:
            try:
                message = await self._call.read()
            except grpc.aio.AioRpcError as error:
                failure = from_rpc(error)
            except asyncio.CancelledError:
                # grpcio raises this both where the awaiting task was cancelled and where the call was.
                if not self._cancelled.is_set():
                    raise
                raise _cancelled() from None
            else:
                if message is grpc.aio.EOF:
                    raise StopAsyncIteration
                if self._gathered.advances(message):
                    self._retry.arrived()
                chunk = self._gathered.add(message)
                if chunk is None:
                    continue
                return chunk
            if self._cancelled.is_set():
                raise _after_cancel(failure)
            if self._gathered.whole and isinstance(failure, Unavailable):
                raise StopAsyncIteration  # it broke before its status, which says nothing more
            wait = self._retry.wait(failure)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._cancelled.wait(), wait)
                raise _cancelled()
            self._call = self._method(self._gathered.request(), timeout=self._retry.remaining())

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()

    @property
    def reply(self) -> Reply | None:
        """As Stream.reply."""
        return self._gathered.reply(self._retry.resumed)

    @property
    def resume(self) -> Resume | None:
        """As Stream.resume."""
        return self._gathered.resume()

    async def result(self) -> Reply:
        """Read to the end; the whole reply."""
        async for _ in self:
            pass
        return _whole(self.reply)

    def cancel(self) -> None:
        """As Stream.cancel."""
        self._cancelled.set()
        self._call.cancel()


def _cancelled() -> Cancelled:
    return Cancelled("the call was cancelled", grpc.StatusCode.CANCELLED)


def _after_cancel(failure: Error) -> Error:
    """What is told of a call that its user has cancelled. One that broke just before would have been made
    again but for that; any other failure came first, and stands."""
    return _cancelled() if isinstance(failure, Unavailable) else failure


def _whole(reply: Reply | None) -> Reply:
    if reply is None:
        raise Error("the server ended the stream without its last message")
    return reply
