"""AsyncClient with Client's face, so that a test runs on both."""

import asyncio
import functools

from tramontane import AsyncClient


class Twin:
    """Its methods wait for what AsyncClient's return, in the loop where the server runs."""

    def __init__(self, target, loop, **options):
        self._loop = loop
        self._client = self._wait(_made(AsyncClient, target, **options))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._wait(self._client.close())

    def _wait(self, awaitable):
        return asyncio.run_coroutine_threadsafe(_awaited(awaitable), self._loop).result(120)

    def __getattr__(self, name):
        method = getattr(self._client, name)
        if name.startswith("stream_"):
            return functools.partial(self._stream, method)
        return lambda *args, **options: self._wait(method(*args, **options))

    def _stream(self, method, *args, **options):
        return TwinStream(self._wait(_made(method, *args, **options)), self._wait)


class TwinStream:
    def __init__(self, stream, wait):
        self._stream, self._wait = stream, wait

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._wait(self._stream.__aexit__(None, None, None))

    def __iter__(self):
        return self

    def __next__(self):
        try:
            return self._wait(anext(self._stream))
        except _EndError:
            raise StopIteration from None

    def result(self):
        return self._wait(self._stream.result())

    def cancel(self):
        self._wait(_made(self._stream.cancel))

    reply = property(lambda self: self._stream.reply)
    resume = property(lambda self: self._stream.resume)


async def _made(make, *args, **options):
    """Call a plain function within the loop."""
    return make(*args, **options)


async def _awaited(awaitable):
    try:
        return await awaitable
    except StopAsyncIteration:
        raise _EndError from None


class _EndError(Exception):
    pass
