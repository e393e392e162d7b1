"""tramontane.v1.InferenceService on a Pipeline: one method a call of the contract.

Raises TramontaneErrors; guard.py makes statuses of them. Knows nothing of ports and processes.
"""

import asyncio
import enum
import secrets
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import grpc
from google.protobuf.message import Message

from runtime.errors import InvalidArgument, ModelFailed, NotFound, QueueFull, Unavailable
from runtime.server import convert
from runtime.server.aside import Aside
from runtime.server.backlog import Backlog
from runtime.server.engine_metrics import LoadReader
from runtime.server.metrics import Metrics, StreamMeter
from runtime.server.pipeline import Completion, Pipeline
from runtime.server.reply import Final, Piece
from runtime.server.statuses import Cancelled, DeadlineExceeded, ended_by
from runtime.types import FinishReason
from tramontane.v1 import inference_service_pb2 as pb
from tramontane.v1 import inference_service_pb2_grpc

# How replies are counted whose call ended before they did.
_BROKEN = {
    grpc.StatusCode.CANCELLED: FinishReason.CANCELLED,
    grpc.StatusCode.DEADLINE_EXCEEDED: FinishReason.DEADLINE,
}


class Admission(enum.Enum):
    """Whether new replies may begin. The value tells a client why not."""

    STARTING = "the model is not ready yet"
    OPEN = ""
    DRAINING = "the server is shutting down"


class InferenceService(inference_service_pb2_grpc.InferenceServiceServicer):
    """`admission`, `wait_idle`, `cut_off` and `close` are for the server that owns this."""

    def __init__(
        self,
        pipeline: Pipeline,
        metrics: Metrics,
        loads: LoadReader,
        *,
        max_streams: int,
        max_lag: int,
        max_scores: int,
        max_aside: int,
    ):
        """`max_streams`: replies that may be open at once. `max_lag`: tokens that a reply's reader may be
        behind before it loses the stream. `max_scores`: tokens and alternatives that may be scored at once,
        since they all wait here for readers that do not read. `max_aside`: texts that may be encoded or
        decoded at once, apart from replies."""
        self.admission = Admission.STARTING
        self._open: set[Backlog] = set()  # one a stream
        self._idle = asyncio.Event()
        self._idle.set()
        self._pipeline = pipeline
        self._metrics = metrics
        self._loads = loads
        self._aside = Aside(max_aside)
        self._max_streams = max_streams
        self._max_lag = max_lag
        self._max_scores = max_scores
        self._scored = 0

    async def Generate(self, request, context: grpc.aio.ServicerContext) -> None:
        self._admit(request.model)
        request_id = secrets.token_hex(8)
        completion = convert.completion(request, request_id, context.time_remaining())
        resumed = completion.resume is not None and completion.resume.has_tokens
        meter = self._metrics.stream(replies=True, resumed=resumed)
        try:
            await self._stream(self._pipeline.run(completion), convert.response, request_id, context, meter)
        except InvalidArgument as error:
            raise convert.contract_field(error) from None

    async def Score(self, request, context: grpc.aio.ServicerContext) -> None:
        self._admit(request.model)
        request_id = secrets.token_hex(8)
        completion = convert.scoring(request, request_id, context.time_remaining())
        meter = self._metrics.stream(replies=False)
        pieces = self._scores(completion)
        await self._stream(pieces, convert.score_response, request_id, context, meter, waits=True)

    async def _scores(self, completion: Completion) -> AsyncGenerator[Piece, None]:
        """The pieces of a text that is scored. Raises QueueFull where too much is scored already."""
        request = await self._pipeline.prepare_score(completion)
        size = len(request.prompt) * (1 + request.params.logprobs)
        if self._scored and self._scored + size > self._max_scores:
            raise QueueFull(1.0, f"{self._scored} tokens and alternatives are being scored")
        self._scored += size
        try:
            async with aclosing(self._pipeline.scores(request)) as pieces:
                async for piece in pieces:
                    yield piece
        finally:
            self._scored -= size

    async def Tokenize(self, request, context):
        self._check_model(request.model)
        form = request.WhichOneof("input")
        if form is None:
            raise InvalidArgument("input", "send one of text and messages")
        if form == "messages":
            ids = await self._aside.run(self._pipeline.encode_chat, convert.messages(request.messages))
        else:
            ids = await self._aside.run(
                self._pipeline.encode_text,
                request.text,
                add_special=request.add_special if request.HasField("add_special") else True,
                parse_special=request.parse_special,
            )
        return pb.TokenizeResponse(token_ids=ids)

    async def Detokenize(self, request, context):
        self._check_model(request.model)
        skip_special = request.skip_special if request.HasField("skip_special") else True
        text = await self._aside.run(
            self._pipeline.decode, tuple(request.token_ids), skip_special=skip_special
        )
        return pb.DetokenizeResponse(text=text)

    async def GetModel(self, request, context):
        self._check_model(request.model)
        return pb.GetModelResponse(model=self._model())

    async def ListModels(self, request, context):
        return pb.ListModelsResponse(models=[self._model()])

    async def GetLoad(self, request, context):
        return convert.load(await self._loads.ask(), self.open_streams)

    @property
    def open_streams(self) -> int:
        return len(self._open)

    async def wait_idle(self) -> None:
        """Return when no stream is open."""
        await self._idle.wait()

    def cut_off(self) -> None:
        """End all open streams with UNAVAILABLE, after what they have got so far."""
        for backlog in self._open:
            backlog.close(Unavailable("the server shut down before the reply was complete"))

    def close(self) -> None:
        """No call will come any more."""
        self._aside.close()

    async def _stream(
        self,
        pieces: AsyncGenerator[Piece, None],
        message: Callable[[Piece, str, str], Message],
        request_id: str,
        context: grpc.aio.ServicerContext,
        meter: StreamMeter,
        waits: bool = False,
    ) -> None:
        """Write pieces as messages. They are read by a task of its own, so that a client that does not read
        holds up its own stream alone. `waits`: they come no sooner than it reads."""
        backlog = Backlog(self._max_lag)
        self._open.add(backlog)
        self._idle.clear()
        pump = asyncio.create_task(_pump(pieces, backlog, meter, waits))
        # However this ends, the request must not live on in the engine; depending on where the handler
        # waits, a cancelled call shows as different exceptions, and the callback needs none of them.
        context.add_done_callback(lambda _: pump.cancel())
        model = self._pipeline.info.model
        finals: list[Final] = []
        try:
            while (piece := await backlog.take()) is not None:
                await context.write(message(piece, request_id, model))
                if piece.final is not None:
                    finals.append(piece.final)
            for final in finals:
                _raise_unless_complete(final)
        except BaseException as error:
            meter.cut_off(_BROKEN.get(ended_by(error, context), FinishReason.ERROR))
            raise
        finally:
            pump.cancel()
            await asyncio.wait([pump])
            self._open.remove(backlog)
            if not self._open:
                self._idle.set()

    def _admit(self, model: str) -> None:
        self._check_model(model)
        if self.admission is not Admission.OPEN:
            raise Unavailable(self.admission.value)
        if self.open_streams >= self._max_streams:
            raise QueueFull(1.0, f"{self.open_streams} streams are open, the most this server takes")

    def _check_model(self, name: str) -> None:
        served = self._pipeline.info.model
        if name not in ("", served):
            raise NotFound("model", name, f"this server serves {served!r}")

    def _model(self) -> pb.Model:
        tokenizer = self._pipeline.tokenizer
        return convert.model(self._pipeline.info, tokenizer.bos_id, tuple(tokenizer.eos_ids))


async def _pump(
    pieces: AsyncGenerator[Piece, None], backlog: Backlog, meter: StreamMeter, waits: bool
) -> None:
    """Move pieces into the backlog as they come, or as they are taken. Errors go to the backlog's reader."""
    try:
        async with aclosing(pieces):
            async for piece in pieces:
                meter.piece(piece)
                await (backlog.emptied() if waits else backlog.room(piece))
                backlog.put(piece)
    except BaseException as error:
        backlog.close(error)
        if not isinstance(error, Exception):
            raise
    else:
        backlog.close()


def _raise_unless_complete(final: Final) -> None:
    """After the last messages of a reply that was cut off, the stream ends with the status of why."""
    match final.finish_reason:
        case FinishReason.CANCELLED:
            raise Cancelled("the request was cancelled on the server")
        case FinishReason.DEADLINE:
            raise DeadlineExceeded("the request's deadline passed")
        case FinishReason.FAILED:
            raise ModelFailed(final.detail)
        case FinishReason.ERROR:
            raise Unavailable(final.detail or "the engine failed; the same seed gives the same reply again")
