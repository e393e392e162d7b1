"""Brings a model up on Ray: places the actors, loads the weights, proves it with a forward step."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import psutil
import ray
from ray.util.placement_group import remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from runtime.capacity import kv_blocks
from runtime.cluster.actors import EngineActor, RankActor, RankHello, RankReport
from runtime.cluster.placement import place
from runtime.cluster.session import start_ray
from runtime.cluster.versions import check_alike
from runtime.config import ParallelConfig, ServeConfig
from runtime.errors import NotEnough, TramontaneError, Unavailable
from runtime.model.device import resolve_device
from runtime.model.draft import open_draft
from runtime.model.header import header_device, open_model
from runtime.model.stages import stage_layers
from runtime.model.units import rank_units
from runtime.types import EngineInfo, Finished, FinishReason, Request, SamplingParams
from runtime.wire.gateway_channel import EngineChannel

MOST_SAID = 200  # characters of an error of Ray's
START_SECONDS = 120.0  # for an actor's process to start and import what it needs


class Cluster:
    """One replica on Ray. Synchronous; `client` is for use within an asyncio loop. Close it when done."""

    def __init__(
        self,
        config: ServeConfig,
        *,
        ray_address: str | None = None,
        progress: Callable[[str], None] | None = None,
        waiting: Callable[[str], None] | None = None,
        leaves_ray: bool = False,
    ):
        """Raises TramontaneError, and leaves nothing behind, if the model cannot be brought up; with
        `leaves_ray` nothing but Ray itself, which others of this process use too. `waiting` hears of what
        Ray lacks (None: as of any other progress)."""
        say = progress or (lambda text: None)
        self.reports: list[RankReport] = []
        self.lost = False  # for whoever has heard that it is: nobody is asked to end in order any more
        if ray_address is None:
            config = _on(config, resolve_device(config.parallel.device))
        wanted = header_device(config.model, config.parallel.device)
        if wanted == "cuda":  # nothing else will do, whatever the cluster has free just now
            config = _on(config, wanted)
        opened = open_model(config.model, wanted)
        rank_units(len(opened.units), config.parallel.tp)
        stage_layers(opened, config.parallel.pp)
        draft = open_draft(config.model, opened, config.parallel)
        if config.parallel.device == "cpu" and ray_address is None:
            # This host's memory is the ranks'; elsewhere, and on GPUs, they judge by their own.
            length = config.model.max_model_len
            kv_blocks(opened, config.engine, config.parallel, length, draft=draft, unloaded=True)
        self._started_ray = False
        self._group = None
        self._engine = None
        self._ranks: list = []
        self._runs: list[ray.ObjectRef] = []
        self._token = secrets.token_hex(32)
        try:
            say("starting Ray" if ray_address is None else f"joining Ray at {ray_address}")
            self._started_ray = start_ray(ray_address) and not leaves_ray
            config = _on(config, _device_of_cluster(config.parallel, waits=ray_address is not None))
            host = "127.0.0.1" if ray_address is None else None
            self._group = place(config.parallel, waiting or say)
            say(f"starting {config.parallel.tp * config.parallel.pp} rank(s)")
            hellos = self._start(config.parallel, host)
            check_alike([hello.node for hello in hellos], [hello.versions for hello in hellos])
            say("loading weights")
            self.reports = self._load(config, [hello.address for hello in hellos])
            # What every rank's host can hold.
            blocks = min(report.config.total_blocks for report in self.reports)
            length = min(report.config.max_model_len for report in self.reports)
            settled = replace(self.reports[0].config, total_blocks=blocks, max_model_len=length)
            nodes = tuple(f"rank {r.rank} on {r.node}, pid {r.pid}" for r in self.reports)
            alike = {"total_blocks": blocks, "context_length": length, "rank_nodes": nodes}
            infos = [replace(report.info, **alike) for report in self.reports]
            self.info = _agreed(infos, [report.node for report in self.reports])
            self._runs = [rank.run.remote(settled, *self._address) for rank in self._ranks]
            self._wait_joined(self._engine.serve.remote(settled, self.info))
            say("first forward step")
            asyncio.run(self._prove())
        except BaseException as error:
            self.close()
            cause = getattr(error, "cause", None)
            if isinstance(cause, TramontaneError):
                raise cause from None
            if isinstance(error, ray.exceptions.RayError):
                raise Unavailable(
                    f"a rank or the engine died, or its node left: {_short(error)}; "
                    "`ray status` shows the nodes, then start again"
                ) from error
            raise

    async def connect(self) -> EngineChannel:
        """An `EngineClient` of this replica, for the asyncio loop it is called in."""
        return await EngineChannel.connect(*self._address, self._token)

    def memory(self) -> list[dict[str, int]]:
        """Each rank's own account of its memory, in bytes."""
        return ray.get([rank.memory.remote() for rank in self._ranks])

    def check(self) -> str | None:
        """What the engine's integrity check finds wrong, if anything."""
        return ray.get(self._engine.check.remote())

    @property
    def rank_pids(self) -> list[int]:
        return [report.pid for report in self.reports]

    def close(self) -> None:
        """Stop the actors, and Ray if it was started here for them alone."""
        if ray.is_initialized():
            if self._engine is not None and not self.lost:
                with contextlib.suppress(ray.exceptions.RayError):  # gone already is what was wanted
                    ray.get(self._engine.stop.remote(), timeout=2)
                    if self._runs:  # ranks that leave by themselves take their files along
                        ray.wait(self._runs, num_returns=len(self._runs), timeout=2)
            here = ray.util.get_node_ip_address()
            for actor in [*self._ranks, self._engine]:
                if actor is not None:
                    ray.kill(actor, no_restart=True)
            if self._group is not None:
                remove_placement_group(self._group)
            _wait_for_end([report.pid for report in self.reports if report.node == here])
        self._ranks, self._runs, self._engine, self._group = [], [], None, None
        if self._started_ray:
            ray.shutdown()
            self._started_ray = False

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _start(self, parallel: ParallelConfig, host: str | None) -> list[RankHello]:
        """The actors, each in its place: a stage's ranks in one node, the engine beside the first stage's."""
        gpus, ranks = 1 if parallel.device == "cuda" else 0, parallel.tp * parallel.pp

        def at(stage: int) -> PlacementGroupSchedulingStrategy:
            return PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=stage)

        self._ranks = [
            RankActor.options(scheduling_strategy=at(rank // parallel.tp), num_gpus=gpus).remote(
                rank, host, self._token
            )
            for rank in range(ranks)
        ]
        self._engine = EngineActor.options(scheduling_strategy=at(0)).remote(host, self._token, ranks)
        try:
            *hellos, self._address = ray.get(
                [*(rank.hello.remote() for rank in self._ranks), self._engine.address.remote()],
                timeout=START_SECONDS,
            )
        except ray.exceptions.GetTimeoutError:
            raise Unavailable(
                f"not all of {ranks} ranks and the engine started within {START_SECONDS:.0f} s: "
                "see `ray status` for nodes that have left, and start again"
            ) from None
        return hellos

    def _load(self, config: ServeConfig, addresses: list) -> list[RankReport]:
        loads = [
            rank.load.remote(config.model, config.engine, config.parallel, addresses) for rank in self._ranks
        ]
        reports: dict[ray.ObjectRef, RankReport] = {}
        pending = loads
        while pending:
            done, pending = ray.wait(pending, num_returns=1)
            try:
                reports[done[0]] = ray.get(done[0])
            except (ray.exceptions.RayError, TramontaneError):
                for load in pending:  # errors that nobody fetches, Ray prints by itself
                    with contextlib.suppress(ray.exceptions.RayError, TramontaneError):
                        ray.get(load, timeout=2)
                raise
        return [reports[load] for load in loads]

    def _wait_joined(self, serving: ray.ObjectRef) -> None:
        """Wait until the engine has all its ranks, or one of them has ended instead."""
        done, _ = ray.wait([serving, *self._runs], num_returns=1)
        reason = ray.get(done[0])
        if done[0] != serving:
            raise Unavailable(f"a rank ended before it served: {reason}")

    async def _prove(self) -> None:
        """One token through gateway channel, engine and every rank."""
        channel = await self.connect()
        try:
            params = SamplingParams(max_tokens=1, temperature=0.0, seed=0)
            request = Request(f"first-step-{time.monotonic_ns()}", (0,), params)
            async for output in channel.generate(request):
                if isinstance(output, Finished) and output.reason is not FinishReason.LENGTH:
                    raise Unavailable(f"the first forward step failed: {output.detail}")
        finally:
            await channel.close()


def _short(error: Exception) -> str:
    """The last line of what Ray says, which can be long, cut to one that can be read."""
    text = str(error).strip().splitlines()[-1]
    return text if len(text) <= MOST_SAID else text[:MOST_SAID].rsplit(" ", 1)[0] + " ..."


def _on(config: ServeConfig, device: str) -> ServeConfig:
    return replace(config, parallel=replace(config.parallel, device=device))


def _device_of_cluster(parallel: ParallelConfig, *, waits: bool) -> str:
    """Where the ranks compute, by what Ray has. Raises NotEnough where GPUs are asked for and missing, unless
    more may come (`waits`)."""
    gpus, ranks = int(ray.cluster_resources().get("GPU", 0)), parallel.tp * parallel.pp
    if parallel.device == "cuda" and gpus < ranks and not waits:
        raise NotEnough(f"{ranks} ranks on GPUs need {ranks}, and Ray has {gpus}: see `ray status`")
    if parallel.device == "auto":
        return "cuda" if gpus >= ranks else "cpu"
    return parallel.device


def _agreed(infos: Sequence[EngineInfo], nodes: Sequence[str]) -> EngineInfo:
    """What all ranks say alike. They differ where hosts or GPUs differ, and then bits would."""
    for info, node in zip(infos, nodes, strict=True):
        if info != infos[0]:
            raise Unavailable(
                f"the ranks do not compute alike: {infos[0].numerics} on {nodes[0]} and "
                f"{info.numerics} on {node}: "
                "use hosts and GPUs of one kind, with the same versions and the same model files, tokenizer "
                "included"
            )
    return infos[0]


def _wait_for_end(pids: Sequence[int]) -> None:
    """Until ranks of this host have given their memory back, which whoever comes next may need: a second for
    tens of gigabytes."""
    with contextlib.suppress(psutil.Error):
        psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=5)
