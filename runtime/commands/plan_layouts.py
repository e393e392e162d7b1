"""Layouts of a model over GPUs: what each rank of one keeps, how much KV has room, how fast it could be.

A layout is a degree of tensor parallelism inside a node, a number of stages, and as many replicas of that as
the nodes have room for, users shared evenly among them. Whether it can run today, the code that would run it
is asked. Knows nothing of how layouts are shown.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from runtime.capacity import GPU_SPARE
from runtime.config import EngineConfig, ModelConfig, ParallelConfig
from runtime.errors import InvalidArgument
from runtime.footprint import rank_footprint
from runtime.gpus import GPUS, NETWORK_LATENCY, OTHER_NAMES, Gpu
from runtime.model.draft import open_draft
from runtime.model.header import OpenModel
from runtime.model.layout import RunShare, shard_slices
from runtime.model.stages import cut_layers, model_bytes, stage_layers
from runtime.model.units import Span, rank_units
from runtime.roofline import Link, Rank, Round, Shape, Stage, decode, prefill
from runtime.weights.plan import plan_reads

CONTEXT_BYTES = 1_000_000_000  # of a GPU, for the driver's context and the libraries' own buffers
MAX_NODES = 1024
MOST_NODES = 16  # that one replica is cut over
BLOCK_SIZE = EngineConfig().block_size  # positions


@dataclass(frozen=True, slots=True)
class Machines:
    nodes: int
    gpus: int  # a node
    gpu: Gpu
    network: float  # bits a second from a node to another

    def __str__(self) -> str:
        one = f"{self.gpus}x{self.gpu.name}"
        return one if self.nodes == 1 else f"{self.nodes} nodes of {one}"

    @property
    def link(self) -> Link:
        """From a stage to the next: on a node of their own each, as Ray spreads them where it can."""
        if self.nodes == 1:
            return Link(self.gpu.link.value, self.gpu.exchange.value)
        return Link(self.network / 8, NETWORK_LATENCY.value)


@dataclass(frozen=True, slots=True)
class Layout:
    """One degree and number of stages. Lists are of a replica's ranks, stage by stage. KV blocks are as many
    as the fullest rank can hold."""

    tp: int
    stages: tuple[Span, ...]  # the layers of each
    replicas: int
    file_bytes: list[int]  # a rank
    gpu_bytes: list[int]  # a rank, a draft model's among them
    kv_bytes: int  # a position, on the rank that holds most
    kv_blocks: int  # a replica; negative: not even the weights fit
    sequences: int  # of the whole context, a replica
    users: int  # a replica has to hold, where they do not divide evenly
    asked: int  # users, over all replicas
    alone: Round
    full: Round
    prefill: float
    exchanges: int  # of a token on its way through all stages
    refused: str | None  # what serve says to it today

    @property
    def pp(self) -> int:
        return len(self.stages)

    @property
    def gpus(self) -> int:
        """All that it takes."""
        return self.tp * self.pp * self.replicas

    @property
    def fits(self) -> bool:
        return self.sequences >= self.users

    @property
    def tokens_per_second(self) -> float:
        """Of all replicas, every user decoding."""
        return self.asked / self.full.seconds

    @property
    def options(self) -> str:
        return f"--tp {self.tp}" + (f" --pp {self.pp}" if self.pp > 1 else "")


def parse_machines(text: str, nodes: int, network: float = 100.0) -> Machines:
    """ "8xH200" or "H200"; `network` is in Gbit/s. Raises InvalidArgument."""
    match = re.fullmatch(r"(?:(\d{1,4})[xX*])?([A-Za-z][\w-]*)", text.strip(), re.ASCII)
    name = match[2].upper() if match else ""
    gpu = GPUS.get(OTHER_NAMES.get(name, name))
    if gpu is None:
        raise InvalidArgument("gpus", f"{text[:40]!r} is not COUNTxNAME; names are {', '.join(GPUS)}")
    count = int(match[1] or 1)
    if count < 1:
        raise InvalidArgument("gpus", "a node needs at least one")
    if not 1 <= nodes <= MAX_NODES:
        raise InvalidArgument("nodes", f"must be from 1 to {MAX_NODES}, not {nodes}")
    if not 0.001 <= network <= 1e6:
        raise InvalidArgument("network", f"must be from 0.001 to 1000000 Gbit/s, not {network}")
    return Machines(nodes, count, gpu, network * 1e9)


def stage_counts(machines: Machines, units: int, layers: int, tp: int) -> list[int]:
    """How many stages of `tp` ranks are worth a look: a node each, for one node, two, four and so on up to
    all of them; and where a node has more GPUs than the model has units, so that no degree uses them all, as
    many as find room in so many nodes."""
    nodes = {1 << n for n in range(10)} | {machines.nodes}
    nodes = {n for n in nodes if n <= min(machines.nodes, MOST_NODES)}
    within = machines.gpus // tp if machines.gpus > units else 1
    return sorted(n for n in nodes | {n * within for n in nodes} if n <= layers)


def make_layouts(
    opened: OpenModel, machines: Machines, context: int, users: int, draft: str | None = None
) -> list[Layout]:
    """By degree, from 1 to the model's units or the node's GPUs, and by stages. With `draft`, the path of a
    draft model, those that it can guess for. `opened` was opened for "cuda". Raises InvalidArgument for a
    draft model that no layout can have."""
    return Layouts(opened, draft).on(machines, context, users)


class Layouts:
    """Of one model. Bytes are counted once, for whatever machines, context and users are asked about."""

    def __init__(self, opened: OpenModel, draft: str | None = None):
        self._opened = opened
        self._config = ModelConfig(opened.checkpoint.path, draft=draft)
        self._draft = open_draft(self._config, opened, ParallelConfig())
        self._counted: dict[tuple[int, int], _Counted] = {}
        self._refused: dict[tuple[int, int], str | None] = {}  # asking reads the draft model's header

    def on(self, machines: Machines, context: int, users: int) -> list[Layout]:
        units = len(self._opened.units)
        return [
            self._layout(machines, tp, pp, context, users)
            for tp in range(1, min(units, machines.gpus) + 1)
            for pp in stage_counts(machines, units, self._opened.spec.layers, tp)
            if self._draft is None or self.draft_refused(tp, pp) is None
        ]

    def left_out(self, machines: Machines) -> list[str]:
        """A line for each reason why the draft model leaves layouts out: too many ranks, or stages."""
        if self._draft is None:
            return []
        units = len(self._opened.units)
        degrees = range(1, min(units, machines.gpus) + 1)
        counts = stage_counts(machines, units, self._opened.spec.layers, 1)
        said = [[self.draft_refused(tp, 1) for tp in degrees], [self.draft_refused(1, pp) for pp in counts]]
        return [f"left out: {next(filter(None, each))}" for each in said if any(each)]

    def draft_refused(self, tp: int, pp: int) -> str | None:
        """Why a layout cannot have the draft model, in the words of the code that opens it for serve."""
        if (tp, pp) not in self._refused:
            parallel = ParallelConfig(tp=tp, pp=pp)
            self._refused[tp, pp] = _refusal(lambda: open_draft(self._config, self._opened, parallel))
        return self._refused[tp, pp]

    def _layout(self, machines: Machines, tp: int, pp: int, context: int, users: int) -> Layout:
        spec, gpu = self._opened.spec, machines.gpu
        counted = self._counted.get((tp, pp))
        if counted is None:
            counted = self._counted[tp, pp] = _count(self._opened, self._draft, tp, pp)
        replicas = machines.nodes * (machines.gpus // tp) // pp
        here = -(-users // replicas)
        # As runtime.capacity counts, but for the workspace and logits of a step, up to some 1 GiB, which are
        # known with Triton alone: blocks of the largest share, as many as the fullest rank has room for.
        room = int(gpu.memory.value) - CONTEXT_BYTES - GPU_SPARE - max(counted.gpu_bytes)
        blocks = room // (counted.kv_bytes * BLOCK_SIZE)
        shape = Shape(spec.hidden, spec.head_dim, spec.vocab)
        link = machines.link if pp > 1 else None
        return Layout(
            tp=tp,
            stages=counted.spans,
            replicas=replicas,
            file_bytes=counted.file_bytes,
            gpu_bytes=counted.gpu_bytes,
            kv_bytes=counted.kv_bytes,
            kv_blocks=blocks,
            sequences=max(0, blocks // -(-context // BLOCK_SIZE)),
            users=here,
            asked=users,
            alone=decode(gpu, shape, counted.stages, 1, context, link),
            full=decode(gpu, shape, counted.stages, here, context, link),
            prefill=prefill(gpu, shape, counted.stages, context, link),
            exchanges=sum(stage.exchanges for stage in counted.stages),
            refused=_refusal(lambda: stage_layers(self._opened, pp)),
        )


@dataclass(frozen=True, slots=True)
class _Counted:
    """What a layout takes on any machines; fields as a Layout's."""

    spans: tuple[Span, ...]
    stages: tuple[Stage, ...]
    file_bytes: list[int]
    gpu_bytes: list[int]
    kv_bytes: int


def _count(opened: OpenModel, draft: OpenModel | None, tp: int, pp: int) -> _Counted:
    units = len(opened.units)
    runs, spans = rank_units(units, tp), cut_layers(*model_bytes(opened), pp)
    share = opened.kv_bytes_per_position // (units * opened.spec.layers)  # of one unit in one layer
    stages, reads, held = [], [], []
    for span in spans:
        ranks, layers = [], span[1] - span[0]
        # Equal runs do not hold equal bytes: units cut the FFN and the vocabulary unevenly.
        for rank, run in enumerate(runs):
            footprint = rank_footprint(opened, run, span)
            heads = RunShare.of(opened.units[run[0] : run[1]]).heads
            kv_bytes = share * (run[1] - run[0]) * layers
            ranks.append(Rank(footprint.streamed, footprint.weights, kv_bytes, heads[1] - heads[0]))
            read, kept = _read(opened, run, span), footprint.held
            if draft is not None:
                own = rank_units(len(draft.units), tp)[rank]
                read, kept = read + _read(draft, own), kept + rank_footprint(draft, own).held
            reads.append(read)
            held.append(kept)
        stages.append(Stage(layers, tuple(ranks), last=span == spans[-1]))
    kv_bytes = share * -(-units // tp) * max(stop - start for start, stop in spans)
    if draft is not None:
        kv_bytes += draft.kv_bytes_per_position * -(-len(draft.units) // tp) // len(draft.units)
    return _Counted(spans, tuple(stages), reads, held, kv_bytes)


def _refusal(ask: Callable[[], object]) -> str | None:
    try:
        ask()
    except InvalidArgument as error:
        return str(error)
    return None


def _read(opened: OpenModel, run: Span, layers: Span | None = None) -> int:
    """Bytes of the file."""
    slices = shard_slices(opened.spec, opened.units, run, layers)
    return sum(read.total for read in plan_reads(opened.checkpoint, slices, opened.quantize))


def preference(layout: Layout) -> tuple[bool, int, float, int]:
    """The largest is recommended: what runs today, then the fewest stages, then the most tokens a second,
    then the fewest GPUs."""
    return layout.refused is None, -layout.pp, layout.tokens_per_second, -layout.gpus


def enough_nodes(layouts: Layouts, machines: Machines, context: int, users: int) -> tuple[int, Layout] | None:
    """Twice as many nodes, or four times, and so on up to MOST_NODES times: the least on which a layout fits,
    and the one to recommend there."""
    for factor in (1 << n for n in range(1, MOST_NODES.bit_length())):
        nodes = machines.nodes * factor
        if nodes > MAX_NODES:
            return None
        fitting = [
            layout for layout in layouts.on(replace(machines, nodes=nodes), context, users) if layout.fits
        ]
        if fitting:
            return nodes, max(fitting, key=preference)
    return None
