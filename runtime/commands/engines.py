"""Brings up what a command needs of a model: the tokenizer before it, and an engine local or on Ray."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

from runtime.commands.output import loading, log_line, working
from runtime.commands.supervisor import Built, Say, Supervised
from runtime.config import ModelConfig, ServeConfig
from runtime.errors import InvalidArgument, Unavailable
from runtime.model.draft import open_draft
from runtime.model.header import OpenModel, header_device, open_model
from runtime.model.stages import stage_layers
from runtime.model.units import rank_units
from runtime.server.engine_client import EngineClient
from runtime.server.pipeline import Pipeline
from runtime.tokenizer import ChatTemplate, Tokenizer, load_tokenizer
from runtime.types import EngineInfo, Finished, FinishReason, Request, SamplingParams
from runtime.weights.checkpoint import open_checkpoint


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


def open_front(model: ModelConfig, *, chat: bool, device: str = "auto") -> Front:
    """Read the header, build the tokenizer and, for `chat`, the template. Raises TramontaneError."""
    with working("reading the model's header"):
        opened = open_model(model, header_device(model, device))
        checkpoint = opened.checkpoint
        tokenizer = _tokenizer(opened)
        source = model.chat_template or tokenizer.chat_template
        template = None
        if chat and source is not None:
            template = ChatTemplate(
                source, bos=tokenizer.bos_token, eos=tokenizer.eos_token, file=checkpoint.path
            )
    return Front(opened, tokenizer, template)


def _tokenizer(opened: OpenModel) -> Tokenizer:
    checkpoint = opened.checkpoint
    folder = Path(checkpoint.path) if checkpoint.kind == "safetensors" else None
    tokenizer = load_tokenizer(checkpoint.metadata, folder=folder, file=checkpoint.path)
    tokenizer.check_fits(opened.spec.vocab, checkpoint.path)
    return tokenizer


def _check_draft(front: Front, config: ServeConfig) -> None:
    """Refuse a draft model that cannot guess for the model: with another vocabulary, above all."""
    draft = open_draft(config.model, front.opened, config.parallel)
    if draft is None:
        return
    ours, theirs = front.tokenizer, _tokenizer(draft)
    for token in range(min(ours.vocab_size, theirs.vocab_size)):
        if ours.token_bytes(token) != theirs.token_bytes(token):
            raise InvalidArgument(
                "draft",
                f"token {token} is {theirs.token_bytes(token)!r} in {draft.spec.name} and "
                f"{ours.token_bytes(token)!r} in {front.opened.spec.name}: the vocabulary must be the same",
            )


def preview(front: Front, config: ServeConfig) -> EngineInfo:
    """Refuse what can be refused before weights are read; what the engine will be like, as far as known."""
    rank_units(len(front.opened.units), config.parallel.tp)
    stage_layers(front.opened, config.parallel.pp)
    _check_draft(front, config)
    if config.parallel.replicas < 1:
        raise InvalidArgument("replicas", f"must be at least 1, not {config.parallel.replicas}")
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
        pp=config.parallel.pp,
    )


@contextmanager
def start_engine(
    config: ServeConfig,
    *,
    local: bool,
    ray_address: str | None = None,
    rebuilds: int = 0,
    hear: Say = lambda text: None,
) -> Iterator[Engine]:
    """An engine with its weights loaded, in this process or on Ray: all replicas of it behind one client.
    One that is lost is built again, at most `rebuilds` times in a row. `hear` is told, on any
    thread, what is shown to whoever watches, whether or not anyone does. Raises TramontaneError."""
    replicas = config.parallel.replicas

    def make(build: Callable[[Say], Built], say: Say) -> Built:
        if replicas == 1 and not rebuilds:
            return build(say)
        build = _same_files(config.model, build)
        return Supervised(build, replicas, rebuilds=rebuilds, say=say, together=not local)

    with ExitStack() as stack:
        if local:
            hear("importing torch")
            with working("importing torch"):
                import runtime.local  # noqa: F401
            config = _divided(config, 1)
            hear("loading weights")
            with loading("loading weights") as bar:
                engine = make(partial(_build_local, config, bar), lambda text: None)
        else:
            with working("importing Ray") as show:

                def say(text: str) -> None:
                    show(text)
                    hear(text)

                hear("importing Ray")
                from runtime.cluster import session

                stack.enter_context(session.lasting_ray())
                if ray_address is not None:
                    say(f"joining Ray at {ray_address}")
                    session.start_ray(ray_address)
                    hear("joined Ray")
                config = _divided(config, 1 if ray_address is None else session.hosts())
                engine = make(partial(_build_remote, config, ray_address), say)
        stack.callback(engine.close)
        yield engine


def _same_files(model: ModelConfig, build: Callable[[Say], Built]) -> Callable[[Say], Built]:
    """A build that refuses files which are not those of its first time: a reply that goes on must not change
    its model. They are told apart by size and time."""
    known: list[dict[str, tuple[int, int]]] = []

    def checked(say: Say) -> Built:
        stats = {file: os.stat(file) for file in open_checkpoint(model.path).files}
        known.append({file: (stat.st_size, stat.st_mtime_ns) for file, stat in stats.items()})
        if known[-1] != known[0]:
            raise Unavailable("the model's files are not those that are served any more: start it anew")
        return build(say)

    return checked


def _divided(config: ServeConfig, hosts: int) -> ServeConfig:
    """With the cores of a host divided among the replicas that it is likely to have, and their ranks."""
    parallel = config.parallel
    if parallel.replicas == 1 or parallel.threads is not None:
        return config
    ranks = parallel.tp * parallel.pp * parallel.replicas
    threads = max(1, (os.cpu_count() or 1) * hosts // ranks)
    return replace(config, parallel=replace(parallel, threads=threads))


def _build_local(config: ServeConfig, bar: Callable[[int, int], None], say: Say) -> _Local:
    from runtime.local import LocalEngine

    def progress(done: int, total: int) -> None:
        bar(done, total)
        say("loading weights")

    engine = LocalEngine(config.model, config.engine, config.parallel, progress=progress)
    try:
        asyncio.run(_prove(engine.client))
        return _Local(engine)
    except BaseException:
        engine.close()
        raise


def _build_remote(config: ServeConfig, ray_address: str | None, say: Say) -> _Remote:
    from runtime.cluster.launch import Cluster

    def waiting(text: str) -> None:
        say(text)
        log_line(text)  # it may take long, and whoever reads a log is to know why

    return _Remote(Cluster(config, ray_address=ray_address, progress=say, waiting=waiting, leaves_ray=True))


async def _prove(client: EngineClient) -> None:
    """One token through scheduler, ranks and sampling. Raises Unavailable if it does not come out."""
    request = Request("first-step", (0,), SamplingParams(max_tokens=1, temperature=0.0, seed=0))
    async for output in client.generate(request):
        if isinstance(output, Finished) and output.reason is not FinishReason.LENGTH:
            raise Unavailable(f"the first forward step failed: {output.detail}")


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

        self._engine.loop.when_lost(tell)
        return await detail

    def close(self) -> None:
        self._engine.close()


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
        why = await client.wait_lost()
        self._cluster.lost = True
        return why

    def close(self) -> None:
        self._cluster.close()
