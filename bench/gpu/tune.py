"""Finds tilings of the planar GEMM for the products that a model's steps run, as the runtime names them.

A product is tuned for as many rows as steps have, up to powers of two, by trying a few candidates; a tiling
that gives other bits than the default is refused and told. Knows nothing of where what it finds is kept.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch

from bench.gpu.shapes import FFN, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, UNITS, VOCAB, random_weight
from bench.gpu.timing import captured, median_ms
from kernels.gpu.linear import gated_linear, linear, linear_pair
from kernels.gpu.planar import PlanarWeight
from kernels.gpu.tuning import Tiling, shape_name, tiling_for
from runtime.model.gpu.forward import folded

COLD = 512 << 20  # bytes of weights in one graph: several times any cache of today
ROWS = (16, 32, 64, 128, 256, 512)  # up to a step's budget of tokens, unless --max-step-tokens is more


@dataclass(frozen=True, slots=True)
class Mix:
    """The types of a file's tensors. v and down: in some layers and in the others."""

    most: str  # of q, k, gate and up
    output: str
    v: tuple[str, ...]
    down: tuple[str, ...]
    head: str


MIXES = {
    "Q2_K": Mix("Q2_K", "Q3_K", ("Q5_K",), ("Q3_K",), "Q6_K"),
    "Q4_K_M": Mix("Q4_K", "Q4_K", ("Q6_K", "Q5_K"), ("Q6_K", "Q4_K"), "Q6_K"),
    "Q5_K_M": Mix("Q5_K", "Q5_K", ("Q6_K", "Q5_K"), ("Q6_K", "Q5_K"), "Q6_K"),
    "int4 g128": Mix("int4 g128", "int4 g128", ("int4 g128",), ("int4 g128",), "fp16"),
}


@dataclass(frozen=True, slots=True)
class Dims:
    """Of a model that is whole on one GPU."""

    hidden: int = HIDDEN
    ffn: int = FFN
    heads: int = HEADS
    kv_heads: int = KV_HEADS
    head_dim: int = HEAD_DIM
    vocab: int = VOCAB
    units: int = UNITS


@dataclass(frozen=True, slots=True)
class Product:
    """Weights of (type, rows) that meet one x in one launch."""

    name: str
    weights: tuple[tuple[str, int], ...]
    width: int
    units: int = 1
    gated: bool = False

    def make(self, device: str) -> tuple[PlanarWeight, ...]:
        return tuple(random_weight(kind, n, self.width, self.units, device) for kind, n in self.weights)

    def run(
        self, x: torch.Tensor, weights: tuple[PlanarWeight, ...], tiling: Tiling | None = None
    ) -> torch.Tensor:
        """fp16 [M, N] of gate and up, else fp32 partial sums."""
        call = gated_linear if self.gated else linear_pair if len(weights) == 2 else linear
        return call(x, *weights, tiling=tiling)


def products(mix: Mix, dims: Dims) -> list[Product]:
    """All that a layer of any kind and the head launch; q, k and v of one type are one weight, and v of
    another goes beside them (runtime/model/gpu/shard.py)."""
    kv = dims.kv_heads * dims.head_dim
    q_k = dims.heads * dims.head_dim + kv
    found = [
        Product(
            "q k v",
            ((mix.most, q_k + kv),) if v == mix.most else ((mix.most, q_k), (v, kv)),
            dims.hidden,
        )
        for v in mix.v
    ]
    width = dims.heads * dims.head_dim // dims.units
    found.append(Product("attention output", ((mix.output, dims.hidden),), width, dims.units))
    found.append(Product("gate and up", ((mix.most, dims.ffn),) * 2, dims.hidden, gated=True))
    found += [
        Product("down", ((down, dims.hidden),), dims.ffn // dims.units, dims.units) for down in mix.down
    ]
    found.append(Product("head", ((mix.head, dims.vocab),), dims.hidden))
    return list(dict.fromkeys(found))


def candidates(product: Product, rows: int) -> list[Tiling]:
    """A few, since each is compiled for each product: what the rows do not change is compiled once."""
    found = []
    if rows <= 64:
        for weights, stages, split in itertools.product((64, 128), (3, 4), (0,) if product.gated else (0, 2)):
            found.append(Tiling(weights, max(16, rows), 4, stages, split))
    else:
        found += [Tiling(64, 32, 4, 3, 0, 2), Tiling(64, 64, 4, 3, 0, 2), Tiling(128, 64, 8, 3, 0, 1)]
        found += [Tiling(64, 128, 4, 3, 0, 1), Tiling(128, 128, 8, 3, 0, 1)]
    return found


@dataclass(slots=True)
class Found:
    tilings: dict[str, Tiling] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)  # what gave other bits
    left: int = 0  # products and rows that time did not allow


def tune(
    wanted: Iterable[Product],
    rows: Iterable[int],
    repeats: int,
    *,
    seconds: float,
    device: str = "cuda",
    tries: Callable[[Product, int], list[Tiling]] = candidates,
    known: Iterable[str] = (),
) -> Iterator[Found]:
    """The quickest tiling of each product and number of rows, the default among those tried; what was found
    so far after each. No other is begun once `seconds` have passed. Names in `known` are passed over, and so
    is a tiling that the GPU has not the memory or the registers for."""
    found, known, began = Found(), set(known), time.monotonic()
    for product, count in itertools.product(wanted, rows):
        if time.monotonic() - began > seconds:
            found.left += 1
            continue
        x = torch.randn(count, product.width * product.units, device=device).half()
        weights = [product.make(device)]
        name = shape_name(count, weights[0], product.gated)
        if name in known or name in found.tilings:
            continue
        if count <= 64:
            size = sum(weight.nbytes for weight in weights[0])
            weights += [product.make(device) for _ in range(min(32, COLD // size) - 1)]
        default = tiling_for(count, weights[0], product.gated, x.device)
        bits = _bits(product, x, weights[0], default)
        best: tuple[float, Tiling] | None = None
        for tiling in dict.fromkeys((default, *tries(product, count))):
            try:
                same = torch.equal(_bits(product, x, weights[0], tiling), bits)
                calls = [partial(product.run, x, w, tiling) for w in weights]
                ms = median_ms(captured(calls), repeats) / len(weights) if same else 0.0
            except Exception as error:  # out of shared memory or registers: not a candidate
                _say(f"{name}: {tiling}: {str(error).splitlines()[0] if str(error) else repr(error)}")
                continue
            if not same:
                found.refused.append(f"{name}: {tiling}")
                _say(f"{name}: {tiling} gives other bits than {default}: refused")
            elif best is None or ms < best[0]:
                best = ms, tiling
        if best is not None:
            found.tilings[name] = best[1]
            _say(f"{name}: {best[0] * 1e3:.1f} us {best[1]}")
        yield found
    yield found


def _bits(product: Product, x: torch.Tensor, weights: tuple[PlanarWeight, ...], tiling: Tiling):
    """The sums as whole numbers, so that equal means equal to the last bit."""
    out = product.run(x, weights, tiling)
    return out.view(torch.int16) if product.gated else folded(out).view(torch.int32)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
