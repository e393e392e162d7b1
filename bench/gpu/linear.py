"""Times the planar GEMM at the flagship's four shapes, or tunes it: needs a CUDA device.

    python bench/gpu/linear.py > linear.json            decode and prefill, every format, peers beside it
    python bench/gpu/linear.py --tune Q4_K_M            finds tilings, into kernels/gpu/tuned/GPU.json

Medians over graph replays that go through enough copies of the weights to miss the cache; shares are of the
run's own copy bandwidth (decode) and of its own bf16 product (prefill). "Free order" is the same kernel
without the rule's chunks and trees. Peers are measured where they are installed (peers.py says which, and how
to bring them), and bf16 torch.mm; "against_best_peer" is the quickest peer's time over ours, up to 32 rows.
Needs torch, triton and numpy alone.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.gpu import peers, shapes
from bench.gpu.peers import Peer
from bench.gpu.shapes import FFN, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, UNITS, random_weight
from bench.gpu.timing import captured, copy_bandwidth, matmul_rate, median_ms, report, require_gpu, show
from bench.gpu.tune import COLD, MIXES, ROWS, Dims, Found, products, tune
from kernels.gpu import chunks
from kernels.gpu.linear import gated_linear, linear
from kernels.gpu.tuning import Tiling, save, saved, tiling_for

DECODE, PREFILL = (1, 8, 16, 32, 64), (256, 2048)


@dataclass(frozen=True)
class Shape:
    name: str
    rows: int
    width: int
    units: int = 1
    gated: bool = False


SHAPES = (
    Shape("q k v", (HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN),
    Shape("attention output", HIDDEN, HIDDEN // UNITS, UNITS),
    Shape("gate and up", FFN, HIDDEN, gated=True),
    Shape("down", HIDDEN, FFN // UNITS, UNITS),
)


def call_of(shape: Shape, kind: str, x: torch.Tensor, tiling: Tiling | None) -> tuple[Callable, tuple]:
    """One call on weights of its own, and those weights."""
    weights = tuple(random_weight(kind, shape.rows, shape.width, shape.units) for _ in range(1 + shape.gated))
    product = gated_linear if shape.gated else linear
    return (lambda: product(x, *weights, tiling=tiling)), weights


def inputs(shape: Shape, tokens: int) -> torch.Tensor:
    return torch.randn(tokens, shape.width * shape.units, device="cuda").half()


def timed(
    shape: Shape, kind: str, tokens: int, tiling: Tiling | None, repeats: int
) -> tuple[float, int, tuple]:
    """Median ms a call, bytes of weights a call, the weights."""
    x = inputs(shape, tokens)
    call, weights = call_of(shape, kind, x, tiling)
    size = sum(weight.nbytes for weight in weights)
    copies = min(32, max(1, COLD // size)) if tokens <= 64 else 1
    calls = [call, *(call_of(shape, kind, x, tiling)[0] for _ in range(copies - 1))]
    return median_ms(captured(calls), repeats) / copies, size, weights


def measure(kinds: list[str], repeats: int) -> Iterator[dict]:
    copy, matmul = copy_bandwidth(), matmul_rate(torch.bfloat16)
    others = peers.available(kinds)
    yield {"copy_gb_s": round(copy / 1e9, 1), "bf16_tflops": round(matmul / 1e12, 1)}
    for shape, kind, tokens in itertools.product(SHAPES, kinds, DECODE + PREFILL):
        ms, size, weights = timed(shape, kind, tokens, None, repeats)
        flops = 2 * tokens * shape.rows * shape.width * shape.units * (1 + shape.gated)
        moved = size + tokens * (2 * shape.width * shape.units + 4 * shape.rows)
        tiling = tiling_for(tokens, weights, shape.gated, torch.device("cuda"))
        row = {"shape": shape.name, "weights": kind, "rows": tokens, "us": round(ms * 1e3, 1)}
        if tokens <= 64:
            row["share_of_copy"] = round(moved / (ms * 1e-3) / copy, 3)
        row["share_of_bf16"] = round(flops / (ms * 1e-3) / matmul, 3)
        row["tiling"] = f"{tiling.weights}x{tiling.tokens} w{tiling.warps} s{tiling.stages} /{tiling.split}"
        if tokens in (16, 2048):
            with free_order():
                row["free_order_us"] = round(timed(shape, kind, tokens, tiling, repeats)[0] * 1e3, 1)
        row |= beside(shape, kind, tokens, repeats, others)
        if tokens <= 32:
            row |= peers.against("against_best_peer", row, peers.DISTRIBUTIONS)
        print(row, file=sys.stderr, flush=True)
        yield row
        del weights
        torch.cuda.empty_cache()


@contextlib.contextmanager
def free_order() -> Iterator[None]:
    """Without the rule, for its cost: K in one run, units one after another, other bits."""
    kept = chunks.CHUNK, chunks.merges
    chunks.CHUNK, chunks.merges = 1 << 30, lambda n: (0,) + (1,) * (n - 1)
    chunks.schedule.cache_clear()
    try:
        yield
    finally:
        chunks.CHUNK, chunks.merges = kept
        chunks.schedule.cache_clear()


def beside(shape: Shape, kind: str, tokens: int, repeats: int, others: list[Peer]) -> dict[str, float]:
    """us of the peers in the same format, and of bf16, on the same sizes (gate and up as one matrix)."""
    n, k = shape.rows * (1 + shape.gated), shape.width * shape.units
    copies = min(32, max(1, 2 * COLD // (n * k))) if tokens <= 64 else 1
    columns = peers.beside(others, kind, n, k, tokens, copies, repeats)
    if kind == "int4 g128":
        columns["bf16_us"] = round(bf16(n, k, tokens, repeats) * 1e3, 1)
    return columns


def bf16(n: int, k: int, tokens: int, repeats: int) -> float:
    """Median ms of torch's own product with dense weights."""
    x = torch.randn(tokens, k, device="cuda", dtype=torch.bfloat16)
    copies = max(1, COLD // (2 * n * k))
    dense = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
    return median_ms(captured([lambda w=w: torch.mm(x, w.t()) for w in dense]), repeats) / copies


def tuned(mixes: list[str], rows: list[int], repeats: int, minutes: float) -> int:
    """Saves what is found after each product, so that what is cut off goes on where it was. Returns the exit
    status: 1 if a tiling gave other bits than the default."""
    gpu = torch.cuda.get_device_name()
    wanted = [one for mix in mixes for one in products(MIXES[mix], Dims())]
    found = Found()
    for found in tune(wanted, rows, repeats, seconds=60 * minutes, known=saved(gpu)):
        print(save(gpu, found.tilings), f"{len(found.tilings)} found", file=sys.stderr, flush=True)
    if found.left:
        print(f"{found.left} are left for want of time: run this again", file=sys.stderr)
    for line in found.refused:
        print(f"error: gives other bits than the default: {line}", file=sys.stderr)
    return 1 if found.refused else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tune", nargs="+", choices=list(MIXES), metavar="MIX",
        help=f"find tilings of a 70B's products, of the types of these files: {', '.join(MIXES)}",
    )  # fmt: skip
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS), help="to tune for")
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="begin no other product to tune after these"
    )
    parser.add_argument(
        "--formats", nargs="*", default=["Q4_K", "int4 g128", "Q6_K"], choices=list(shapes.FORMATS)
    )
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    require_gpu("bench/gpu/linear.py")
    torch.manual_seed(0)
    if args.tune:
        raise SystemExit(tuned(args.tune, args.rows, max(5, args.repeats // 4), args.minutes))
    ceilings, *rows = measure(args.formats, args.repeats)
    found = report(rows, **ceilings)
    found["versions"] = peers.versions(rows, peers.DISTRIBUTIONS) | found["versions"]
    show(found)


if __name__ == "__main__":
    main()
