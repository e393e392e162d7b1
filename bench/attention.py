"""Attention over paged KV on a CPU: what is compiled here against torch's operator, by turns.

    python bench/attention.py > attention.json          SmolLM2's shape, some seconds
    python bench/attention.py --kv-heads 8 --group 8 --dim 128 --layers 4       a 70B's, four layers of it

A figure is milliseconds for `--layers` layers of one step, each with a KV cache of its own, the median of
`--rounds` turns. That the two compute the same but for rounding is checked. JSON on standard output, a table
on standard error.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.report import about, show
from kernels import attention
from kernels.attention import AttentionCall, Tiles

BLOCK = 64
WORK = {  # name -> (sequences, first position, tokens of each)
    "1 stream at 100": (1, 100, 1),
    "1 stream at 1000": (1, 1000, 1),
    "16 streams at 100": (16, 100, 1),
    "16 streams at 500": (16, 500, 1),
    "16 streams at 1500": (16, 1500, 1),
    "prompt of 512": (1, 0, 512),
    "512 more at 1536": (1, 1536, 512),
}


def torchs_calls(
    tables: list[list[int]], start: int, tokens: int, group: int, dim: int
) -> list[AttentionCall]:
    """As a batch has them where torch's operator serves."""
    tiles = attention.tile_sizes(group, dim, torch.bfloat16)
    shape = {"block_size": BLOCK, "window": None, "dtype": torch.bfloat16}
    if tokens > 1:
        (table,) = tables
        return attention.chunk_calls(
            0, start, tokens, torch.tensor(table), group=group, tile=tiles.run, **shape
        )
    count = attention.padded_blocks(start + 1, BLOCK, torch.bfloat16)
    blocks = torch.tensor([table + [0] * (count - len(table)) for table in tables])
    run = attention.block_run(tables[0], count) if len(tables) == 1 else None
    at = torch.full((len(tables),), start)
    return [attention.decode_call(None, at, run or blocks, tile=tiles.single, **shape)]


def compare(
    work: tuple[int, int, int], kv_heads: int, group: int, dim: int, layers: int, rounds: int
) -> dict[str, float]:
    sequences, start, tokens = work
    blocks = -(-(start + tokens) // BLOCK)
    tables = [list(range(i * blocks, (i + 1) * blocks)) for i in range(sequences)]
    room = sequences * blocks + attention.padded_blocks(1, BLOCK, torch.bfloat16)
    caches = [torch.randn(room, BLOCK, 2, kv_heads, dim).bfloat16() for _ in range(layers)]
    rows = sequences * tokens
    q = torch.randn(rows, kv_heads, group, dim).bfloat16()
    outs = {
        name: torch.empty(rows, kv_heads * group * dim, dtype=torch.bfloat16) for name in ("ours", "torch")
    }
    runs = [(i * tokens, start, tokens, table) for i, table in enumerate(tables)]
    calls: dict[str, Tiles | list[AttentionCall]] = {
        "ours": attention.lay_out(runs, block_size=BLOCK, group=group, window=None),
        "torch": torchs_calls(tables, start, tokens, group, dim),
    }
    buffers = {name: attention.tile_buffers(of, q.shape, torch.bfloat16) for name, of in calls.items()}

    def step(name: str) -> Callable[[], None]:
        def run() -> None:
            for cache in caches:
                attention.paged_attention(q, cache, calls[name], buffers[name], dim**-0.5, outs[name])

        return run

    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name in ("ours", "torch") if number % 2 else ("torch", "ours"):
            began = time.perf_counter()
            step(name)()
            if number:
                seconds[name].append(time.perf_counter() - began)
    apart = (outs["ours"].float() - outs["torch"].float()).abs().max().item()
    if not apart <= 2**-5:
        raise SystemExit(f"the two differ by {apart}: not the same function")
    ours, torchs = (1e3 * statistics.median(seconds[name]) for name in ("ours", "torch"))
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["torch"], strict=True)]
    return {"ours_ms": ours, "torch_ms": torchs, "gain": statistics.median(ratios), "apart": apart}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--group", type=int, default=3, help="query heads a KV head")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="two layers, one round: shows that it works")
    args = parser.parse_args()
    if args.quick:
        args.layers, args.rounds = 2, 1
    if not attention.native_takes(args.dim, torch.bfloat16):
        raise SystemExit("no AMX, no compiler for it, or --dim is no multiple of 32 up to 256")
    shape = (args.kv_heads, args.group, args.dim, args.layers, args.rounds)
    found = {name: compare(work, *shape) for name, work in WORK.items()}
    result = about() | {
        "kv_heads": args.kv_heads,
        "group": args.group,
        "dim": args.dim,
        "layers": args.layers,
        "threads": torch.get_num_threads(),
        "work": {name: {key: round(value, 4) for key, value in of.items()} for name, of in found.items()},
    }
    rows = [
        [name, f"{of['ours_ms']:.2f}", f"{of['torch_ms']:.2f}", f"{of['gain']:.2f}x"]
        for name, of in found.items()
    ]
    show(result, ["", "ours, ms", "torch's, ms", "gain"], rows)


if __name__ == "__main__":
    main()
