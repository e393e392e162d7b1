"""Stages: runs of neighbouring layers, cut so that the largest takes as little memory as it can.

The first stage holds the embedding too, the last the final norm and the head; where those share a table and
the stages are several, both hold it. Pure arithmetic over a header: knows nothing of ranks, and no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from runtime.errors import InvalidArgument
from runtime.model.units import Span
from runtime.weights.plan import INT4_GROUP, is_quantizable

if TYPE_CHECKING:
    from runtime.model.header import OpenModel


def stage_layers(opened: OpenModel, pp: int) -> tuple[Span, ...]:
    """The layers of each of `pp` stages. Raises InvalidArgument unless there is one for each."""
    layers = opened.spec.layers
    if not 1 <= pp <= layers:
        raise InvalidArgument("pp", f"{pp} is not possible: this model has {layers} layers, so 1 to {layers}")
    return cut_layers(*model_bytes(opened), pp)


def model_bytes(opened: OpenModel) -> tuple[list[int], int, int]:
    """Bytes of each layer's weights; what the first stage holds beside them; and what the last does."""
    each = [0] * opened.spec.layers
    for name, info in opened.checkpoint.tensors.items():
        if name.startswith("blk."):
            size = info.nbytes
            if opened.quantize and is_quantizable(info):
                size = info.rows * (info.cols // 2 + -(-info.cols // INT4_GROUP) * 4)
            each[int(name.split(".")[1])] += size
    table = opened.checkpoint.tensors["token_embd.weight"].nbytes
    head = table if opened.spec.tied_head else opened.checkpoint.tensors["output.weight"].nbytes
    return each, table, head


def cut_layers(layers: Sequence[int], before: int, after: int, count: int) -> tuple[Span, ...]:
    """Cut layers of the given sizes into `count` runs, none empty. `before` weighs on the first run, `after`
    on the last.

    The largest run is as small as it can be; among the cuts for which that holds, the one whose sizes have
    the least sum of squares is taken, and of equals the one with the earliest cuts. Raises ValueError if
    there are fewer layers than runs.
    """
    if not 1 <= count <= len(layers):
        raise ValueError(f"{len(layers)} layers do not make {count} runs")
    upto = [0, *accumulate(layers)]

    def size(start: int, stop: int) -> int:
        own = upto[stop] - upto[start]
        return own + (before if start == 0 else 0) + (after if stop == len(layers) else 0)

    # largest[stop]: the least possible largest run when layers [0, stop) make so many runs.
    largest: dict[int, int] = {0: 0}
    for run in range(1, count + 1):
        largest = {
            stop: min(max(largest[start], size(start, stop)) for start in largest if start < stop)
            for stop in _ends(run, count, len(layers))
        }
    limit = largest[len(layers)]
    # best[stop]: the least sum of squares within that limit, and the cuts that give it.
    best: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, (0,))}
    for run in range(1, count + 1):
        found = {}
        for stop in _ends(run, count, len(layers)):
            ways = [
                (squares + size(start, stop) ** 2, (*cuts, stop))
                for start, (squares, cuts) in best.items()
                if start < stop and size(start, stop) <= limit
            ]
            if ways:
                found[stop] = min(ways)
        best = found
    cuts = best[len(layers)][1]
    return tuple(pairwise(cuts))


def _ends(run: int, count: int, layers: int) -> range:
    """Where the `run`-th of `count` runs may end, so that each has a layer."""
    return range(run, layers - (count - run) + 1) if run < count else range(layers, layers + 1)
