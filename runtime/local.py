"""Everything in one process: ranks as threads, the engine loop, and a client for it. No Ray, no sockets."""

from __future__ import annotations

import asyncio
import os
import queue
import threading
from collections.abc import AsyncGenerator, Callable
from functools import partial

import torch

from runtime.capacity import kv_blocks
from runtime.config import EngineConfig, ModelConfig, ParallelConfig
from runtime.errors import TramontaneError
from runtime.loop import EngineLoop
from runtime.model.communicator import Alone, Communicator, Threads
from runtime.model.device import resolve_device
from runtime.model.header import open_model
from runtime.model.load import engine_info, load_shard
from runtime.model.runner import Watch
from runtime.model.runners import StepRunner, make_runner
from runtime.model.units import rank_units
from runtime.types import EngineInfo, Finished, FinishReason, Load, Output, Request, StepPlan, StepResult

Progress = Callable[[int, int], None]


class LocalRanks:
    """A tensor-parallel group whose ranks are threads of this process."""

    def __init__(self, runners: list[StepRunner]):
        self._runners = runners
        self._queues: list[queue.SimpleQueue[StepPlan | None]] = [queue.SimpleQueue() for _ in runners]
        self._threads: list[threading.Thread] = []

    def start(self, on_result: Callable[[StepResult], None], on_lost: Callable[[str], None]) -> None:
        def work(rank: int) -> None:
            runner, plans = self._runners[rank], self._queues[rank]
            try:
                while (plan := plans.get()) is not None:
                    result = runner.execute(plan)
                    if rank == 0:
                        on_result(result)
            except TramontaneError as error:
                on_lost(f"rank {rank}: {error}")
            except Exception as error:  # a defect in a step ends the group, never silently
                on_lost(f"rank {rank}: {type(error).__name__}: {error}")
            finally:
                if isinstance(runner.comm, Threads):
                    runner.comm.close()

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
        self._loop.load(lambda load: here.call_soon_threadsafe(answer.set_result, load))
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
        called on the thread of rank 0."""
        parallel = parallel or ParallelConfig()
        device = resolve_device(parallel.device)
        opened = open_model(model, device)
        rank_units(len(opened.units), parallel.tp)  # a wrong tp is refused before anything is loaded
        torch.set_num_threads(parallel.threads or max(1, (os.cpu_count() or 1) // parallel.tp))
        room = partial(kv_blocks, opened, engine or EngineConfig(), parallel, model.max_model_len)
        config = room() if device == "cpu" else None  # on a GPU once the weights have taken theirs
        comms: list[Communicator] = list(Threads.group(parallel.tp)) if parallel.tp > 1 else [Alone()]
        shards = [
            load_shard(opened, rank, parallel.tp, progress=progress if rank == 0 else None)[0]
            for rank in range(parallel.tp)
        ]
        config = config or room(sharers=parallel.tp)
        runners = [
            make_runner(
                shard,
                comm,
                total_blocks=config.total_blocks,
                block_size=config.block_size,
                max_positions=config.max_model_len,
            )
            for shard, comm in zip(shards, comms, strict=True)
        ]
        runners[0].watch = watch
        self.model = opened
        self.config = config
        self.loop = EngineLoop(config, LocalRanks(runners), opened.spec.vocab)
        self.loop.start()
        self.client = LocalClient(self.loop, engine_info(opened, model, config, parallel.tp))

    def close(self) -> None:
        self.loop.close()
