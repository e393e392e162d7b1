"""What a step takes at least: bytes over bandwidth, operations over rate, exchanges times their latency.

Pure arithmetic. A bound and no measurement: kernels reach a share of it, and the gaps between them, sampling
and the host are left out. How the terms add up:

    step = max(weights, matrix) + kv + exchange        seconds, of the slowest rank

    weights   bytes of weights a rank reads / bandwidth
    matrix    2 * weights of a rank * rows / operations a second
    kv        users * context * bytes of a position's KV on a rank / bandwidth
    exchange  2 a layer, and one each for embedding and logits: latency + bytes over the link
"""

from __future__ import annotations

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
    """What every rank shares."""

    layers: int
    hidden: int
    head_dim: int
    vocab: int


@dataclass(frozen=True, slots=True)
class Step:
    """A decode step of `users` sequences, each at `context` positions. Seconds."""

    users: int
    context: int
    weights: float
    matrix: float
    kv: float
    exchange: float

    @property
    def seconds(self) -> float:
        return max(self.weights, self.matrix) + self.kv + self.exchange

    @property
    def bound(self) -> str:
        """The largest of the terms that add up."""
        product = "matrix" if self.matrix > self.weights else "weights"
        return max((product, "kv", "exchange"), key=lambda name: getattr(self, name))


def decode(gpu: Gpu, shape: Shape, ranks: list[Rank], users: int, context: int) -> Step:
    """The step of the slowest rank."""
    exchange = _exchange(gpu, shape, len(ranks), users, users)

    def of(rank: Rank) -> Step:
        return Step(
            users,
            context,
            rank.streamed / gpu.bandwidth.value,
            2 * rank.weights * users / gpu.flops.value,
            users * context * rank.kv_bytes / gpu.bandwidth.value,
            exchange,
        )

    return max((of(rank) for rank in ranks), key=lambda step: step.seconds)


def prefill(gpu: Gpu, shape: Shape, ranks: list[Rank], context: int) -> float:
    """Seconds from a prompt of `context` tokens to its first token, alone on its server, in steps of
    STEP_ROWS rows. Attention is causal: half of all pairs."""
    steps = -(-context // STEP_ROWS)

    def of(rank: Rank) -> float:
        product = max(
            2 * rank.weights * context / gpu.flops.value, steps * rank.streamed / gpu.bandwidth.value
        )
        attention = 2 * rank.heads * shape.head_dim * context**2 * shape.layers / gpu.flops.value
        return product + attention

    return max(map(of, ranks)) + steps * _exchange(gpu, shape, len(ranks), min(context, STEP_ROWS), 1)


def exchanges(shape: Shape, ranks: int) -> int:
    """How often ranks wait for each other in a step."""
    return 0 if ranks == 1 else 2 * shape.layers + 2


def _exchange(gpu: Gpu, shape: Shape, ranks: int, rows: int, sampled: int) -> float:
    """Seconds. Partial sums are fp32 rows: gathered whole from all others, or by slices and back, whichever
    is less; the embedding likewise gathered, the logits gathered at one rank."""
    if ranks == 1:
        return 0.0
    row = 4 * shape.hidden
    others = ranks - 1
    sums = rows * row * min(others, 2 * others / ranks)
    total = 2 * shape.layers * sums + rows * row * others + sampled * 4 * shape.vocab * others / ranks
    return exchanges(shape, ranks) * gpu.exchange.value + total / gpu.link.value
