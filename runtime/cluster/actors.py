"""The Ray actors: a rank, which holds a shard, and the engine, which holds none.

Each opens its listener first and learns the others' addresses later, so no port is ever guessed.
"""

from __future__ import annotations

import gc
import os
import threading
from dataclasses import dataclass
from functools import partial

import psutil
import ray

from runtime.cluster.versions import installed
from runtime.config import EngineConfig, ModelConfig, ParallelConfig
from runtime.types import EngineInfo

LEAVE_SECONDS = 0.5  # for the last answers to reach whoever asked


@dataclass(frozen=True, slots=True)
class RankHello:
    """What a rank says of itself as soon as it lives."""

    address: object  # a `mesh.PeerAddress`: where its peers reach it
    node: str
    versions: dict[str, str]


@dataclass(frozen=True, slots=True)
class RankReport:
    """What a rank says of itself once its weights are loaded. Bytes and seconds."""

    rank: int
    node: str
    pid: int
    bytes_read: int
    load_seconds: float
    bytes_per_second: float
    weight_bytes: int
    config: EngineConfig  # with the KV blocks that this rank's host can hold
    info: EngineInfo


@ray.remote(num_cpus=0.001, max_restarts=0, max_concurrency=4)
class RankActor:
    """One rank. `run` is one long call; its reference says when the rank has ended."""

    def __init__(self, rank: int, host: str | None, token: str):
        from runtime.cluster.mesh import PeerListener

        self._rank = rank
        self._token = token
        self._listener = PeerListener(host or ray.util.get_node_ip_address(), token)

    def hello(self) -> RankHello:
        return RankHello(self._listener.address, ray.util.get_node_ip_address(), installed())

    def load(
        self, model: ModelConfig, engine: EngineConfig, parallel: ParallelConfig, addresses: list
    ) -> RankReport:
        """Meet the other ranks and load this one's share of the weights."""
        from runtime.capacity import kv_blocks
        from runtime.cluster.gpu_peers import GpuCommunicator
        from runtime.cluster.mesh import Mesh
        from runtime.cluster.peers import SocketCommunicator
        from runtime.cluster.stage_pipe import StagePipe
        from runtime.model.communicator import Alone
        from runtime.model.draft import open_draft
        from runtime.model.gpu.limits import check_block_size
        from runtime.model.header import open_model
        from runtime.model.load import engine_info, load_shard
        from runtime.threads import use_threads

        here = sum(address.host == addresses[self._rank].host for address in addresses)
        opened = open_model(model, parallel.device)
        self._threads = use_threads(parallel.threads, here, opened.device)
        sharers = here if opened.device == "cpu" else 1
        draft = open_draft(model, opened, parallel)
        if opened.device == "cuda":
            check_block_size(engine.block_size)
        room = partial(kv_blocks, opened, engine, parallel, model.max_model_len, sharers=sharers, draft=draft)
        config = room() if opened.device == "cpu" else None  # on a GPU once the weights have taken theirs
        self._comm, self._pipe, self._mesh = Alone(), None, None
        tp = parallel.tp
        if len(addresses) > 1:
            self._mesh = Mesh(self._rank, addresses, self._listener, self._token)
        if tp > 1:
            self._comm = SocketCommunicator(self._mesh, self._rank // tp * tp, tp)
            if opened.device == "cuda":
                self._comm = GpuCommunicator(self._comm)
        if parallel.pp > 1:
            self._pipe = StagePipe(self._mesh, tp)
        self._shard, read = load_shard(opened, self._rank, tp, pp=parallel.pp)
        self._draft = load_shard(draft, self._rank, tp)[0] if draft else None
        config = config or room()
        return RankReport(
            self._rank,
            ray.util.get_node_ip_address(),
            os.getpid(),
            read.bytes_read,
            read.seconds,
            read.bytes_per_second,
            self._shard.nbytes + (self._draft.nbytes if self._draft else 0),
            config,
            engine_info(opened, model, config, tp, pp=parallel.pp),
        )

    def run(self, config: EngineConfig, host: str, port: int) -> str:
        """Execute the engine's plans until it hangs up; returns why it ended."""
        import torch

        from runtime.cluster.rank_loop import run_rank
        from runtime.model.runners import make_runner

        torch.set_num_threads(self._threads)  # the setting belongs to the calling thread
        if self._mesh is not None:
            self._mesh.settled()  # all ranks have loaded by now, and so joined
        runner = make_runner(
            self._shard,
            self._comm,
            total_blocks=config.total_blocks,
            block_size=config.block_size,
            max_positions=config.max_model_len,
            pipe=self._pipe,
            draft=self._draft,
        )
        self._cache_bytes = runner.cache_bytes
        _spare_the_collector()
        try:
            return run_rank(runner, self._rank, host, port, self._token, _leave)
        finally:
            if self._mesh is not None:
                self._mesh.close()
            _leave()

    def memory(self) -> dict[str, int]:
        """Bytes of weights and KV, and of the whole process."""
        return {
            "weights": self._shard.nbytes + (self._draft.nbytes if self._draft else 0),
            "kv": getattr(self, "_cache_bytes", 0),
            "resident": psutil.Process().memory_info().rss,
        }


@ray.remote(num_cpus=0.001, max_restarts=0, max_concurrency=4)
class EngineActor:
    """The scheduler of one replica, the ranks' step channel, and the door for gateways."""

    def __init__(self, host: str | None, token: str, ranks: int):
        from runtime.cluster.step_channel import TcpRanks
        from runtime.wire.connection import Listener

        self._ranks = TcpRanks(ranks)
        self._serving = threading.Event()
        self._outboxes: set = set()  # of the gateways
        self._listener = Listener(host or ray.util.get_node_ip_address(), token, self._greet)

    def address(self) -> tuple[str, int]:
        return self._listener.host, self._listener.port

    def serve(self, config: EngineConfig, info) -> None:
        """Wait for the ranks and start scheduling."""
        from runtime.loop import EngineLoop

        self._ranks.wait_joined()
        self._info = info
        self._loop = EngineLoop(config, self._ranks, info.vocab_size)
        self._loop.on_lost = self._tell_lost
        self._loop.start()
        _spare_the_collector()
        self._serving.set()

    def stop(self) -> None:
        """End all requests and let the ranks go."""
        if self._serving.is_set():
            self._loop.close()
        self._listener.close()

    def check(self) -> str | None:
        """What the engine's integrity check finds wrong, if anything."""
        answer: list[Exception | None] = []
        done = threading.Event()
        self._loop.check(lambda error: (answer.append(error), done.set()))
        if not done.wait(10):
            return "the engine did not answer"
        return str(answer[0]) if answer[0] else None

    def _greet(self, hello, connection) -> None:
        from runtime.wire.gateway_channel import OUTBOX_BYTES, WELCOME_SECONDS, serve_gateway
        from runtime.wire.outbox import Outbox

        if hello.role == "rank":
            self._ranks.join(hello, connection)
        elif hello.role == "gateway" and self._serving.wait(WELCOME_SECONDS):
            outbox = Outbox(connection, OUTBOX_BYTES)
            self._outboxes.add(outbox)
            try:
                serve_gateway(connection, outbox, self._loop, self._info)
            finally:
                self._outboxes.discard(outbox)
        else:
            connection.close()

    def _tell_lost(self, detail: str) -> None:
        from runtime.wire.messages import encode

        try:
            frame = encode("lost", detail)
            for outbox in list(self._outboxes):
                outbox.put(frame)  # behind the last outputs of its requests
        finally:
            _leave()


def _leave() -> None:
    """End this process in a moment. Ray does so too when the driver has ended; but on a node that was cut off
    it hears of that a minute later, and the memory would be held for nothing."""
    leaving = threading.Timer(LEAVE_SECONDS, os._exit, (0,))
    leaving.daemon = True
    leaving.start()


def _spare_the_collector() -> None:
    """Take what lives as long as the process out of garbage collection, which else walks it again and again:
    a full collection of an engine with many requests takes a hundred milliseconds."""
    gc.collect()
    gc.freeze()
