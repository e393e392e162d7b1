"""Everything in one process: ranks as threads, the engine loop, and a client for it. No Ray, no sockets."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncGenerator, Callable
from functools import partial

from runtime.capacity import kv_blocks
from runtime.config import EngineConfig, ModelConfig, ParallelConfig
from runtime.errors import TramontaneError
from runtime.loop import EngineLoop
from runtime.model.communicator import Alone, Communicator, Threads
from runtime.model.device import resolve_device
from runtime.model.draft import open_draft
from runtime.model.gpu.limits import check_block_size
from runtime.model.header import open_model
from runtime.model.load import engine_info, load_shard
from runtime.model.pipe import ThreadPipe
from runtime.model.runner import Watch
from runtime.model.runners import StepRunner, answers, make_runner
from runtime.model.stages import stage_layers
from runtime.model.units import rank_units
from runtime.threads import use_threads
from runtime.types import EngineInfo, Finished, FinishReason, Load, Output, Request, StepPlan, StepResult

Progress = Callable[[int, int], None]


class LocalRanks:
    """The ranks of all stages as threads of this process."""

    def __init__(self, runners: list[StepRunner]):
        self._runners = runners
        self._queues: list[queue.SimpleQueue[StepPlan | None]] = [queue.SimpleQueue() for _ in runners]
        self._threads: list[threading.Thread] = []

    def start(self, on_result: Callable[[StepResult], None], on_lost: Callable[[str], None]) -> None:
        def work(rank: int) -> None:
            runner, plans = self._runners[rank], self._queues[rank]
            replies = answers(runner)
            try:
                while (plan := plans.get()) is not None:
                    result = runner.execute(plan)
                    if replies:
                        on_result(result)
            except TramontaneError as error:
                on_lost(f"rank {rank}: {error}")
            except Exception as error:  # a defect in a step ends the group, never silently
                on_lost(f"rank {rank}: {type(error).__name__}: {error}")
            finally:
                for shared in (runner.comm, getattr(runner, "pipe", None)):
                    if isinstance(shared, Threads | ThreadPipe):
                        shared.close()

        self._threads = [
            threading.Thread(target=work, args=(rank,), name=f"rank-{rank}", daemon=True)
            for rank in range(len(self._runners))
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, plan: StepPlan) -> None:
        for plans in self._queues:
            plans.put(plan)

    def close(self) -> None:
        for plans in self._queues:
            plans.put(None)
        for thread in self._threads:
            thread.join(timeout=10)


def local_runners(
    shards: list, tp: int, config: EngineConfig, max_positions: int, drafts: list | None = None
) -> list[StepRunner]:
    """Runners that are to be threads of this process, for shards of whole stages of `tp` ranks, in order;
    `drafts` are their shards of a draft model, None without one."""
    pp = len(shards) // tp
    comms: list[Communicator] = []
    for _ in range(pp):
        comms += Threads.group(tp) if tp > 1 else [Alone()]
    pipes = [ThreadPipe.group(pp) for _ in range(tp)] if pp > 1 else []
    return [
        make_runner(
            shard,
            comm,
            total_blocks=config.total_blocks,
            block_size=config.block_size,
            max_positions=max_positions,
            pipe=pipes[rank % tp][rank // tp] if pipes else None,
            draft=drafts[rank] if drafts else None,
        )
        for rank, (shard, comm) in enumerate(zip(shards, comms, strict=True))
    ]


class LocalClient:
    """The `EngineClient` of a loop in this process."""

    def __init__(self, loop: EngineLoop, info: EngineInfo):
        self._loop = loop
        self._info = info

    async def info(self) -> EngineInfo:
        return self._info

    async def generate(self, request: Request) -> AsyncGenerator[Output, None]:
        here = asyncio.get_running_loop()
        arrived: asyncio.Queue[Output | TramontaneError] = asyncio.Queue()

        def deliver(output: Output | TramontaneError) -> None:
            here.call_soon_threadsafe(arrived.put_nowait, output)

        self._loop.add(request, deliver)
        ended = False
        try:
            while not ended:
                output = await arrived.get()
                if isinstance(output, TramontaneError):
                    ended = True
                    raise output
                ended = isinstance(output, Finished) and output.last
                yield output
        finally:
            if not ended:
                self._loop.abort(request.request_id)

    async def stop_at(self, request_id: str, keep: int, choice: int = 0) -> None:
        self._loop.abort(request_id, FinishReason.STOP, keep, choice)

    async def load(self) -> Load:
        here = asyncio.get_running_loop()
        answer: asyncio.Future[Load | TramontaneError] = here.create_future()

        def settle(load: Load | TramontaneError) -> None:
            if not answer.done():  # whoever asked may have left
                answer.set_result(load)

        def deliver(load: Load | TramontaneError) -> None:
            with contextlib.suppress(RuntimeError):  # their event loop may have closed
                here.call_soon_threadsafe(settle, load)

        self._loop.load(deliver)
        load = await answer
        if isinstance(load, TramontaneError):
            raise load
        return load


class LocalEngine:
    """A model, its ranks and its loop in this process; `client` talks to it. Close it when done."""

    def __init__(
        self,
        model: ModelConfig,
        engine: EngineConfig | None = None,
        parallel: ParallelConfig | None = None,
        *,
        progress: Progress | None = None,
        watch: Watch | None = None,
    ):
        """Loads the weights; raises TramontaneError for a model or setting that cannot be served. `watch` is
        called on the thread of the rank that samples."""
        parallel = parallel or ParallelConfig()
        device = resolve_device(parallel.device)
        opened = open_model(model, device)
        rank_units(len(opened.units), parallel.tp)  # a wrong tp or pp is refused before anything is loaded
        stage_layers(opened, parallel.pp)
        draft = open_draft(model, opened, parallel)
        if device == "cuda":
            check_block_size((engine or EngineConfig()).block_size)
        ranks = parallel.tp * parallel.pp
        use_threads(parallel.threads, ranks, device)
        room = partial(
            kv_blocks, opened, engine or EngineConfig(), parallel, model.max_model_len, draft=draft
        )
        config = (
            room(unloaded=True) if device == "cpu" else None
        )  # on a GPU once the weights have taken theirs
        shards = [
            load_shard(opened, rank, parallel.tp, pp=parallel.pp, progress=progress if rank == 0 else None)[0]
            for rank in range(ranks)
        ]
        drafts = [load_shard(draft, rank, parallel.tp)[0] if draft else None for rank in range(ranks)]
        config = config or room(sharers=ranks)
        runners = local_runners(shards, parallel.tp, config, config.max_model_len, drafts)
        for runner in runners:
            if answers(runner):
                runner.watch = watch
        self.model = opened
        self.config = config
        self.loop = EngineLoop(config, LocalRanks(runners), opened.spec.vocab)
        self.loop.start()
        self.client = LocalClient(self.loop, engine_info(opened, model, config, parallel.tp, pp=parallel.pp))

    def close(self) -> None:
        self.loop.close()
