"""Brings up what a command needs of a model: the tokenizer before it, and an engine local or on Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from runtime.commands.output import loading, working
from runtime.config import ModelConfig, ServeConfig
from runtime.errors import InvalidArgument
from runtime.model.header import OpenModel, open_model
from runtime.model.units import rank_units
from runtime.server.engine_client import EngineClient
from runtime.server.pipeline import Pipeline
from runtime.tokenizer import ChatTemplate, Tokenizer, load_tokenizer
from runtime.types import EngineInfo


@dataclass(frozen=True, slots=True)
class Front:
    """What stands before an engine, made from a model's header alone."""

    opened: OpenModel
    tokenizer: Tokenizer
    template: ChatTemplate | None

    def pipeline(self, client: EngineClient | None, info: EngineInfo) -> Pipeline:
        return Pipeline(self.tokenizer, self.template, client, info)


class Engine(Protocol):
    """An engine that has loaded its weights."""

    info: EngineInfo

    def connect(self) -> AbstractAsyncContextManager[EngineClient]:
        """`async with` it for a client in the running loop."""
        ...

    async def lost(self, client: EngineClient) -> str:
        """Return, with one line that says why, when the engine has lost its ranks."""
        ...


def open_front(model: ModelConfig, *, chat: bool) -> Front:
    """Read the header, build the tokenizer and, for `chat`, the template. Raises TramontaneError."""
    with working("reading the model's header"):
        opened = open_model(model)
        checkpoint = opened.checkpoint
        folder = Path(checkpoint.path) if checkpoint.kind == "safetensors" else None
        tokenizer = load_tokenizer(checkpoint.metadata, folder=folder, file=checkpoint.path)
        tokenizer.check_fits(opened.spec.vocab, checkpoint.path)
        source = model.chat_template or tokenizer.chat_template
        template = None
        if chat and source is not None:
            template = ChatTemplate(
                source, bos=tokenizer.bos_token, eos=tokenizer.eos_token, file=checkpoint.path
            )
    return Front(opened, tokenizer, template)


def preview(front: Front, config: ServeConfig) -> EngineInfo:
    """Refuse what can be refused before weights are read; what the engine will be like, as far as known."""
    rank_units(len(front.opened.units), config.parallel.tp)
    context = front.opened.spec.context_length
    wanted = config.model.max_model_len
    if wanted is not None and not 1 <= wanted <= context:
        raise InvalidArgument("max-model-len", f"{wanted} is not within 1 to {context}, the model's")
    return EngineInfo(
        model=config.model.name or front.opened.spec.name,
        numerics="",
        context_length=wanted or context,
        vocab_size=front.opened.spec.vocab,
        tp=config.parallel.tp,
        units=len(front.opened.units),
        block_size=config.engine.block_size,
        total_blocks=0,
        max_num_seqs=config.engine.max_num_seqs,
    )


@contextmanager
def start_engine(config: ServeConfig, *, local: bool, ray_address: str | None = None) -> Iterator[Engine]:
    """An engine with its weights loaded, in this process or on Ray. Raises TramontaneError."""
    if local:
        with working("importing torch"):
            from runtime.local import LocalEngine
        with loading("loading weights") as progress:
            engine = LocalEngine(config.model, config.engine, config.parallel, progress=progress)
        try:
            yield _Local(engine)
        finally:
            engine.close()
    else:
        with working("importing Ray") as say:
            from runtime.cluster.launch import Cluster

            cluster = Cluster(config, ray_address=ray_address, progress=say)
        try:
            yield _Remote(cluster)
        finally:
            cluster.close()


class _Local:
    def __init__(self, engine):
        self._engine = engine
        self.info = asyncio.run(engine.client.info())

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[EngineClient]:
        yield self._engine.client

    async def lost(self, client: EngineClient) -> str:
        here = asyncio.get_running_loop()
        detail: asyncio.Future[str] = here.create_future()

        def tell(text: str) -> None:
            if not here.is_closed():  # an engine that is closed last tells so too
                here.call_soon_threadsafe(lambda: detail.done() or detail.set_result(text))

        self._engine.loop.on_lost = tell
        return await detail


class _Remote:
    def __init__(self, cluster):
        self._cluster = cluster
        self.info = cluster.info

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[EngineClient]:
        client = await self._cluster.connect()
        try:
            yield client
        finally:
            await client.close()

    async def lost(self, client: EngineClient) -> str:
        return await client.wait_lost()
