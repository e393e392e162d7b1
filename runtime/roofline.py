"""What a step takes at least: bytes over bandwidth, operations over rate, exchanges times their latency.

Pure arithmetic. A bound and no measurement: kernels reach a share of it, and the gaps between them, sampling
and the host are left out. How the terms of a stage add up:

    step = max(weights, matrix) + kv + exchange + transfer        seconds, of the slowest rank

    weights   bytes of weights a rank reads / bandwidth
    matrix    2 * weights of a rank * rows / operations a second
    kv        users * context * bytes of a position's KV on a rank / bandwidth
    exchange  2 a layer, and one each for what comes in and for the logits: latency + bytes over the link
    transfer  where stages are several: latency + bytes of fp32 rows over the link to the next one; the last
              stage sends tokens back, which cost the latency alone

A token passes all stages. Users are spread over as many microbatches as stages; a stage runs them one by one,
so a round, in which every user gets a token, is as many of the slowest stage's steps, or the way of one
microbatch through all stages where that is longer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runtime.gpus import Gpu

STEP_ROWS = 512  # rows of a prefill step, as EngineConfig.max_step_tokens has it


@dataclass(frozen=True, slots=True)
class Rank:
    """What one rank does. Bytes are of GPU memory; `heads` are its query heads."""

    streamed: int  # bytes of weights a step
    weights: int  # numbers a row is multiplied with
    kv_bytes: int  # a position
    heads: int


@dataclass(frozen=True, slots=True)
class Shape:
    """What every stage shares."""

    hidden: int
    head_dim: int
    vocab: int


@dataclass(frozen=True, slots=True)
class Stage:
    """A run of layers, and what each of its ranks does. A model that is not cut is one stage."""

    layers: int
    ranks: tuple[Rank, ...]
    last: bool = True

    @property
    def exchanges(self) -> int:
        """How often its ranks wait for each other in a step."""
        return 0 if len(self.ranks) == 1 else 2 * self.layers + 1 + self.last


@dataclass(frozen=True, slots=True)
class Link:
    """From a stage to the next. Bytes a second, and seconds."""

    bandwidth: float
    latency: float


@dataclass(frozen=True, slots=True)
class Step:
    """A decode step of one stage, of `users` sequences, each at `context` positions. Seconds."""

    users: int
    context: int
    weights: float
    matrix: float
    kv: float
    exchange: float
    transfer: float = 0.0

    @property
    def seconds(self) -> float:
        return max(self.weights, self.matrix) + self.kv + self.exchange + self.transfer


@dataclass(frozen=True, slots=True)
class Round:
    """In which each of `users` gets a token: every stage's step of one microbatch, and how many of them are
    on their way."""

    users: int
    context: int
    stages: tuple[Step, ...]
    microbatches: int

    @property
    def seconds(self) -> float:
        return max(self._way, self._slowest)

    @property
    def bound(self) -> str:
        """The largest of the terms that add up."""
        product = "matrix" if self.term("matrix") > self.term("weights") else "weights"
        return max((product, "kv", "exchange", "transfer"), key=self.term)

    def term(self, name: str) -> float:
        """Seconds of a round that one of the terms takes: in the slowest stage, or along the way."""
        times = [getattr(stage, name) for stage in self.stages]
        if self._way > self._slowest:
            return sum(times)
        seconds = [stage.seconds for stage in self.stages]
        return self.microbatches * times[seconds.index(max(seconds))]

    @property
    def _way(self) -> float:
        """Of one microbatch through all stages."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def _slowest(self) -> float:
        """All microbatches, one by one, in the stage that takes longest."""
        return self.microbatches * max(stage.seconds for stage in self.stages)


def decode(
    gpu: Gpu, shape: Shape, stages: Sequence[Stage], users: int, context: int, link: Link | None = None
) -> Round:
    """A round of `users`, over as many microbatches as stages. `link` is needed where stages are several."""
    microbatches = min(len(stages), users)
    rows = -(-users // microbatches)

    def step(stage: Stage) -> Step:
        exchange = _exchange(gpu, shape, stage, rows, rows)
        transfer = _transfer(shape, stage, rows, link)

        def of(rank: Rank) -> Step:
            return Step(
                rows,
                context,
                rank.streamed / gpu.bandwidth.value,
                2 * rank.weights * rows / gpu.flops.value,
                rows * context * rank.kv_bytes / gpu.bandwidth.value,
                exchange,
                transfer,
            )

        return max(map(of, stage.ranks), key=lambda one: one.seconds)

    return Round(users, context, tuple(map(step, stages)), microbatches)


def prefill(gpu: Gpu, shape: Shape, stages: Sequence[Stage], context: int, link: Link | None = None) -> float:
    """Seconds from a prompt of `context` tokens to its first token, alone on its replica, in steps of
    STEP_ROWS rows: one passes all stages, the others follow it through the slowest. Attention is causal: half
    of all pairs."""
    steps = -(-context // STEP_ROWS)
    rows = min(context, STEP_ROWS)

    def of(stage: Stage, rank: Rank, rows: int, steps: int) -> float:
        product = max(2 * rank.weights * rows / gpu.flops.value, steps * rank.streamed / gpu.bandwidth.value)
        return product + 2 * rank.heads * shape.head_dim * context * rows * stage.layers / gpu.flops.value

    def time(stage: Stage, rows_in_all: int, steps: int) -> float:
        wait = _exchange(gpu, shape, stage, rows, 1) + _transfer(shape, stage, rows, link)
        return max(of(stage, rank, rows_in_all, steps) for rank in stage.ranks) + steps * wait

    whole = [time(stage, context, steps) for stage in stages]
    first = [time(stage, rows, 1) for stage in stages]
    return sum(first) + max(a - b for a, b in zip(whole, first, strict=True))


def _exchange(gpu: Gpu, shape: Shape, stage: Stage, rows: int, sampled: int) -> float:
    """Seconds. Partial sums are fp32 rows: gathered whole from all others, or by slices and back, whichever
    is less; the embedding, or the shares that came from the stage before, likewise gathered; the logits
    gathered at one rank."""
    ranks = len(stage.ranks)
    if ranks == 1:
        return 0.0
    row = 4 * shape.hidden
    others = ranks - 1
    sums = rows * row * min(others, 2 * others / ranks)
    total = 2 * stage.layers * sums + rows * row * others
    if stage.last:
        total += sampled * 4 * shape.vocab * others / ranks
    return stage.exchanges * gpu.exchange.value + total / gpu.link.value


def _transfer(shape: Shape, stage: Stage, rows: int, link: Link | None) -> float:
    if link is None:
        return 0.0
    return link.latency + (0 if stage.last else rows * 4 * shape.hidden / link.bandwidth)
