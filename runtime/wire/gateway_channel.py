"""Between gateway and engine: the engine's side serves connections, the gateway's side is an EngineClient."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator
from dataclasses import replace

from runtime.errors import InvalidArgument, TramontaneError, Unavailable
from runtime.loop import EngineLoop
from runtime.types import (
    EngineInfo,
    Finished,
    FinishReason,
    Load,
    Output,
    Request,
    ScoreOutput,
    TokenOutput,
)
from runtime.wire.connection import LENGTH, MAX_FRAME, Connection, give_up_on_writes, prepare
from runtime.wire.messages import (
    Abort,
    Hello,
    Refused,
    WireError,
    decode,
    encode,
    refusal,
    refusal_error,
)
from runtime.wire.outbox import Outbox

WELCOME_SECONDS = 20.0  # that a gateway which comes before the engine serves is kept waiting
CONNECT_SECONDS = WELCOME_SECONDS + 10.0
# That a gateway may read nothing: longer than ranks may be silent, for it may be held up by work of its own,
# and all its streams would end.
STALLED_SECONDS = 10.0
# That may wait for a gateway. The most an engine says is scores with 100 alternatives a token, 2 KB each: of
# 2,048 tokens a step 40 MB a second, of which a gateway may then miss six; of common streams, many minutes.
OUTBOX_BYTES = 256 << 20

_CONNECTIONS = itertools.count()


def serve_gateway(connection: Connection, outbox: Outbox, loop: EngineLoop, info: EngineInfo) -> None:
    """Serve one gateway until it hangs up, its host vanishes, or it reads so little that its outbox hangs up;
    then everything it had asked for is aborted. Blocks."""
    connection.expect_reader(STALLED_SECONDS)
    mine: set[str] = set()
    prefix = f"{next(_CONNECTIONS)}/"  # gateways choose ids by themselves; within the engine they must differ

    def deliver_to(request_id: str):
        def deliver(output: Output | TramontaneError) -> None:
            if isinstance(output, TokenOutput | ScoreOutput):
                kind = "token" if isinstance(output, TokenOutput) else "scored"
                outbox.put(encode(kind, replace(output, request_id=request_id)))
                return
            if isinstance(output, Finished):
                if output.last:
                    mine.discard(request_id)
                outbox.put(encode("finished", replace(output, request_id=request_id)))
            else:
                mine.discard(request_id)
                outbox.put(encode("refused", refusal(request_id, output)))

        return deliver

    outbox.put(encode("welcome", info))
    try:
        while True:
            kind, body = connection.receive()
            if kind == "add" and isinstance(body, Request):
                if body.request_id in mine:
                    raise WireError(f"request {body.request_id!r} is sent twice")
                mine.add(body.request_id)
                loop.add(replace(body, request_id=prefix + body.request_id), deliver_to(body.request_id))
            elif kind == "abort" and isinstance(body, Abort):
                if body.request_id in mine:  # a gateway ends its own requests only
                    loop.abort(prefix + body.request_id, body.reason, body.keep, body.choice)
            elif kind == "get_load" and isinstance(body, int):
                loop.load(lambda load, number=body: outbox.put(_load_frame(number, load)))
            else:
                raise WireError(f"a gateway does not send {kind!r}")
    except WireError:
        pass  # it hung up, or is not a gateway: either way its requests end
    finally:
        outbox.close()
        for request_id in list(mine):
            loop.abort(prefix + request_id)


def _load_frame(number: int, load: Load | TramontaneError) -> bytes:
    if isinstance(load, TramontaneError):
        return encode("lost", str(load))
    return encode("load", (number, load))


class EngineChannel:
    """The `EngineClient` of an engine at the other end of a TCP connection. Belongs to one asyncio loop."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, info: EngineInfo):
        self._reader = reader
        self._writer = writer
        self._info = info
        self._inboxes: dict[str, asyncio.Queue[Output | TramontaneError]] = {}
        self._loads: dict[int, asyncio.Future[Load]] = {}
        self._numbers = itertools.count()
        self._gone: str | None = None
        self._lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._receive())

    @staticmethod
    async def connect(host: str, port: int, token: str, *, timeout: float = CONNECT_SECONDS) -> EngineChannel:
        """Raises Unavailable if nobody answers within `timeout` seconds, as when the engine's process is
        stopped, or the engine does not know the token."""
        where = f"{host}:{port}"
        try:
            async with asyncio.timeout(timeout):
                reader, writer = await asyncio.open_connection(host, port)
                try:
                    sock = writer.get_extra_info("socket")
                    prepare(sock)
                    give_up_on_writes(sock)
                    _write(writer, "hello", Hello("gateway", token))
                    kind, info = await _read(reader)
                    if kind != "welcome" or not isinstance(info, EngineInfo):
                        raise Unavailable(f"what answers at {where} is not an engine")
                except BaseException:
                    writer.transport.abort()
                    raise
        except TimeoutError as error:  # ours, which says nothing, or the network's
            why = f": {error}" if str(error) else f" within {timeout:g} s"
            raise Unavailable(f"the engine at {where} does not answer{why}") from None
        except (OSError, asyncio.IncompleteReadError, WireError) as error:
            raise Unavailable(f"the engine at {where} does not answer: {error}") from None
        return EngineChannel(reader, writer, info)

    async def info(self) -> EngineInfo:
        self._check()
        return self._info

    async def generate(self, request: Request) -> AsyncGenerator[Output, None]:
        self._check()
        if request.request_id in self._inboxes:
            raise InvalidArgument("request_id", f"{request.request_id!r} is running already")
        inbox: asyncio.Queue[Output | TramontaneError] = asyncio.Queue()
        self._inboxes[request.request_id] = inbox
        ended = False
        try:
            self._send("add", request)
            while not ended:
                output = await inbox.get()
                if isinstance(output, TramontaneError):
                    ended = True
                    raise output
                ended = isinstance(output, Finished) and output.last
                yield output
        finally:
            del self._inboxes[request.request_id]
            if not ended and self._gone is None:
                self._send("abort", Abort(request.request_id, FinishReason.CANCELLED))

    async def stop_at(self, request_id: str, keep: int, choice: int = 0) -> None:
        self._check()
        self._send("abort", Abort(request_id, FinishReason.STOP, keep, choice))

    async def load(self) -> Load:
        self._check()
        number = next(self._numbers)
        self._loads[number] = asyncio.get_running_loop().create_future()
        self._send("get_load", number)
        try:
            return await self._loads[number]
        finally:  # whoever asked may have gone: the answer is nobody's then
            self._loads.pop(number, None)

    async def wait_lost(self) -> str:
        """Returns, with one line saying why, when the engine or its ranks are gone."""
        return await asyncio.shield(self._lost)

    async def close(self) -> None:
        self._fail("the channel was closed")
        self._task.cancel()
        self._writer.close()

    def _check(self) -> None:
        if self._gone is not None:
            raise Unavailable(self._gone)

    def _send(self, kind: str, body: object) -> None:
        _write(self._writer, kind, body)

    async def _receive(self) -> None:
        try:
            while True:
                kind, body = await _read(self._reader)
                if isinstance(body, TokenOutput | ScoreOutput | Finished):
                    if inbox := self._inboxes.get(body.request_id):
                        inbox.put_nowait(body)
                elif isinstance(body, Refused):
                    if inbox := self._inboxes.get(body.request_id):
                        inbox.put_nowait(refusal_error(body))
                elif kind == "load" and isinstance(body, tuple):
                    number, load = body
                    answer = self._loads.get(number)
                    if answer is not None and not answer.done():
                        answer.set_result(load)
                elif kind == "lost" and isinstance(body, str):
                    self._fail(body)
                    return
        except (OSError, asyncio.IncompleteReadError, WireError) as error:
            self._fail(f"the engine is gone: {error}")

    def _fail(self, reason: str) -> None:
        """Everyone who waits, now or later, learns that the engine is gone."""
        if self._gone is not None:
            return
        self._gone = reason
        for inbox in self._inboxes.values():
            inbox.put_nowait(Unavailable(reason))
        for answer in self._loads.values():
            if not answer.done():
                answer.set_exception(Unavailable(reason))
        self._loads.clear()
        if not self._lost.done():
            self._lost.set_result(reason)


def _write(writer: asyncio.StreamWriter, kind: str, body: object) -> None:
    frame = encode(kind, body)
    writer.write(LENGTH.pack(len(frame)) + frame)


async def _read(reader: asyncio.StreamReader) -> tuple[str, object]:
    (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
    if length > MAX_FRAME:
        raise WireError(f"a message of {length} bytes was announced")
    return decode(await reader.readexactly(length))
