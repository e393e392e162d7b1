"""Clients of a Tramontane server, blocking and asynchronous.

    from tramontane import Client

    with Client("127.0.0.1:50051") as client:
        print(client.generate("Once upon a time", max_tokens=50, seed=7).text)
        with client.stream_chat([{"role": "user", "content": "Hello!"}]) as stream:
            for chunk in stream:
                print(chunk.text, end="", flush=True)
        print(stream.reply.usage)

Each asks for a reply in two ways: `generate` and `chat` return it whole, `stream_generate` and
`stream_chat` as it grows. Where a server goes away meanwhile, the reply is taken up where it was, by itself,
from whatever server the target then leads to. Options are those of messages.Options; all failures are
errors.Error. Needs grpcio and protobuf alone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Unpack

import grpc

from tramontane import access
from tramontane import messages as make
from tramontane.errors import from_rpc
from tramontane.gathered import GatheredScore
from tramontane.messages import Messages, Options, Prompt
from tramontane.retry import RESUMES, Retry
from tramontane.secret_files import PathLike
from tramontane.streams import AsyncStream, Stream
from tramontane.types import Load, Model, Reply, Score
from tramontane.v1 import inference_service_pb2 as pb

# A stream may be silent for minutes while it waits or prefills; pings keep what lies between from
# cutting it, and find out when the server is gone.
_CHANNEL = [
    ("grpc.max_receive_message_length", 16 << 20),
    ("grpc.max_send_message_length", 16 << 20),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
    # A server that comes back is found soon; gRPC's own waits grow to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
]


class Client:
    """A blocking client; any number of threads may share it. `target` is HOST:PORT, or any other name that
    gRPC resolves: `ipv4:10.0.0.1:50051,10.0.0.2:50051` or `dns:///gateways:50051` for several servers.

    `timeout` of every call is in seconds, None for no limit; it covers waits and further calls. `resumes` is
    how often in a row, without anything new arriving, a reply is asked for again after UNAVAILABLE; 0 is
    never.

    `tls_ca` is a file of certificates (PEM): the channel is encrypted, and the server must have a certificate
    of one of them for the target's name (`ipv4:` with several addresses has none: use `dns:///`). `tls_cert`
    and `tls_key` are shown to a server that asks for a client's. `token` goes with every call, resumed ones
    too, encrypted or not. Files are read once, here. Raises errors.Error.
    """

    def __init__(
        self,
        target: str,
        *,
        resumes: int = RESUMES,
        tls_ca: PathLike | None = None,
        tls_cert: PathLike | None = None,
        tls_key: PathLike | None = None,
        token: str | None = None,
    ):
        self._resumes = resumes
        credentials = access.credentials(tls_ca, tls_cert, tls_key)
        if credentials is None:
            self._channel = grpc.insecure_channel(target, options=_CHANNEL)
        else:
            self._channel = grpc.secure_channel(target, credentials, options=_CHANNEL)
        self._stub = access.stub(self._channel, token)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; running calls are cancelled."""
        self._channel.close()

    def generate(self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[Options]) -> Reply:
        """Continue `prompt`, a text or token ids."""
        return self.stream_generate(prompt, timeout=timeout, **options).result()

    def chat(self, messages: Messages, *, timeout: float | None = None, **options: Unpack[Options]) -> Reply:
        """Answer a conversation: messages with "role" and "content", oldest first."""
        return self.stream_chat(messages, timeout=timeout, **options).result()

    def stream_generate(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[Options]
    ) -> Stream:
        """As `generate`, while the reply grows."""
        request = make.prompt_request(prompt, options)
        return Stream(self._stub.Generate, request, timeout, self._resumes)

    def stream_chat(
        self, messages: Messages, *, timeout: float | None = None, **options: Unpack[Options]
    ) -> Stream:
        """As `chat`, while the reply grows."""
        request = make.chat_request(messages, options)
        return Stream(self._stub.Generate, request, timeout, self._resumes)

    def score(
        self,
        prompt: Prompt,
        *,
        top: int | None = None,
        model: str = "",
        priority: int | None = None,
        cache_salt: str = "",
        timeout: float | None = None,
    ) -> Score:
        """What the model thinks of the tokens of `prompt`, a text or token ids; `top`: how many of the most
        likely tokens to name at each place. Asked again after UNAVAILABLE as replies are, from the start."""
        request = make.score_request(prompt, top, model, priority, cache_salt)
        retry = Retry(self._resumes, timeout)
        while True:
            gathered = GatheredScore()
            try:
                for message in self._stub.Score(request, timeout=retry.remaining()):
                    gathered.add(message)
                return gathered.score()
            except grpc.RpcError as error:
                failure = from_rpc(error)
            time.sleep(retry.wait(failure))

    def tokenize(
        self,
        text_or_messages: str | Messages,
        *,
        model: str = "",
        add_special: bool = True,
        parse_special: bool = False,
        timeout: float | None = None,
    ) -> list[int]:
        """Tokens of a text, or of the prompt that a conversation makes."""
        request = make.tokenize_request(text_or_messages, model, add_special, parse_special)
        return list(self._call(self._stub.Tokenize, request, timeout).token_ids)

    def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        model: str = "",
        skip_special: bool = True,
        timeout: float | None = None,
    ) -> str:
        """Text of tokens."""
        request = make.detokenize_request(token_ids, model, skip_special)
        return self._call(self._stub.Detokenize, request, timeout).text

    def model(self, name: str = "", *, timeout: float | None = None) -> Model:
        """What is known of a model; "" is the one that is served."""
        return make.model(self._call(self._stub.GetModel, pb.GetModelRequest(model=name), timeout).model)

    def models(self, *, timeout: float | None = None) -> list[Model]:
        """The models that are served."""
        reply = self._call(self._stub.ListModels, pb.ListModelsRequest(), timeout)
        return [make.model(message) for message in reply.models]

    def load(self, *, timeout: float | None = None) -> Load:
        """How busy the engine is."""
        return make.load(self._call(self._stub.GetLoad, pb.GetLoadRequest(), timeout))

    @staticmethod
    def _call(method, request, timeout: float | None):
        try:
            return method(request, timeout=timeout)
        except grpc.RpcError as error:
            raise from_rpc(error) from None


class AsyncClient:
    """The same for asyncio: make it and use it within one event loop. See Client."""

    def __init__(
        self,
        target: str,
        *,
        resumes: int = RESUMES,
        tls_ca: PathLike | None = None,
        tls_cert: PathLike | None = None,
        tls_key: PathLike | None = None,
        token: str | None = None,
    ):
        self._resumes = resumes
        credentials = access.credentials(tls_ca, tls_cert, tls_key)
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(target, options=_CHANNEL)
        else:
            self._channel = grpc.aio.secure_channel(target, credentials, options=_CHANNEL)
        self._stub = access.stub(self._channel, token)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """As Client.close."""
        await self._channel.close()

    async def generate(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[Options]
    ) -> Reply:
        """As Client.generate. Cancelling the task cancels the request."""
        async with self.stream_generate(prompt, timeout=timeout, **options) as stream:
            return await stream.result()

    async def chat(
        self, messages: Messages, *, timeout: float | None = None, **options: Unpack[Options]
    ) -> Reply:
        """As Client.chat. Cancelling the task cancels the request."""
        async with self.stream_chat(messages, timeout=timeout, **options) as stream:
            return await stream.result()

    def stream_generate(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[Options]
    ) -> AsyncStream:
        """As Client.stream_generate."""
        request = make.prompt_request(prompt, options)
        return AsyncStream(self._stub.Generate, request, timeout, self._resumes)

    def stream_chat(
        self, messages: Messages, *, timeout: float | None = None, **options: Unpack[Options]
    ) -> AsyncStream:
        """As Client.stream_chat."""
        request = make.chat_request(messages, options)
        return AsyncStream(self._stub.Generate, request, timeout, self._resumes)

    async def score(
        self,
        prompt: Prompt,
        *,
        top: int | None = None,
        model: str = "",
        priority: int | None = None,
        cache_salt: str = "",
        timeout: float | None = None,
    ) -> Score:
        """As Client.score."""
        request = make.score_request(prompt, top, model, priority, cache_salt)
        retry = Retry(self._resumes, timeout)
        while True:
            gathered = GatheredScore()
            call = self._stub.Score(request, timeout=retry.remaining())
            try:
                async for message in call:
                    gathered.add(message)
                return gathered.score()
            except grpc.aio.AioRpcError as error:
                failure = from_rpc(error)
            finally:
                call.cancel()
            await asyncio.sleep(retry.wait(failure))

    async def tokenize(
        self,
        text_or_messages: str | Messages,
        *,
        model: str = "",
        add_special: bool = True,
        parse_special: bool = False,
        timeout: float | None = None,
    ) -> list[int]:
        """As Client.tokenize."""
        request = make.tokenize_request(text_or_messages, model, add_special, parse_special)
        return list((await self._call(self._stub.Tokenize, request, timeout)).token_ids)

    async def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        model: str = "",
        skip_special: bool = True,
        timeout: float | None = None,
    ) -> str:
        """As Client.detokenize."""
        request = make.detokenize_request(token_ids, model, skip_special)
        return (await self._call(self._stub.Detokenize, request, timeout)).text

    async def model(self, name: str = "", *, timeout: float | None = None) -> Model:
        """As Client.model."""
        reply = await self._call(self._stub.GetModel, pb.GetModelRequest(model=name), timeout)
        return make.model(reply.model)

    async def models(self, *, timeout: float | None = None) -> list[Model]:
        """As Client.models."""
        reply = await self._call(self._stub.ListModels, pb.ListModelsRequest(), timeout)
        return [make.model(message) for message in reply.models]

    async def load(self, *, timeout: float | None = None) -> Load:
        """As Client.load."""
        return make.load(await self._call(self._stub.GetLoad, pb.GetLoadRequest(), timeout))

    @staticmethod
    async def _call(method, request, timeout: float | None):
        try:
            return await method(request, timeout=timeout)
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error) from None
