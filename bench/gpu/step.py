"""Times whole decode steps of a 70B model on one GPU: random weights of Q4_K_M's mix, all 80 layers.

    python bench/gpu/step.py > step.json          batches of 1 to 32 at 1k and 8k; needs 48 GiB and more
    python bench/gpu/step.py --tune > step.json   also notes for later whether overlapping kernels pay

Each is timed with kernels one after another and overlapping (`kernels/gpu/overlap.py`), by turns; both must
give the same bits. A step is what the engine runs: embedding, layers, head, captured in one CUDA graph;
sampling is timed apart (bench/gpu/small.py). The floor is the bytes that a step must read (weights, and the
keys and values of its context) over the run's own copy bandwidth. Needs torch, triton and numpy alone.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.gpu import shapes
from bench.gpu.shapes import random_weight
from bench.gpu.timing import captured, copy_bandwidth, median_ms, report, require_gpu, show
from kernels.gpu.overlap import OLDEST, overlap
from kernels.gpu.tuning import save
from runtime.model.communicator import Alone
from runtime.model.gpu.forward import GpuBatch, GpuForward
from runtime.model.gpu.shard import DTYPE, FP8, GpuLayer, GpuShard, RowParallel
from runtime.model.spec import ModelSpec

BLOCK = 64
LEAST_GAIN = 1.005  # below which overlapping kernels are not worth noting: it may be noise
CASES = ((1, 1024), (8, 1024), (32, 1024), (1, 8192), (32, 8192))  # sequences, positions of each


def flagship(layers: int = shapes.LAYERS) -> ModelSpec:
    """Llama-2-70B's shape with miqu's context."""
    return ModelSpec(
        name="70b", layers=layers, hidden=shapes.HIDDEN, heads=shapes.HEADS, kv_heads=shapes.KV_HEADS,
        head_dim=shapes.HEAD_DIM, ffn=shapes.FFN, vocab=shapes.VOCAB, norm_eps=1e-5, rope_theta=1e6,
        rope_linear=1.0, rope_llama3=None, context_length=32764, sliding_window=None, tied_head=False,
        half_split_rope=True, rope_factors=False,
    )  # fmt: skip


def random_shard(spec: ModelSpec, device: str = "cuda") -> GpuShard:
    """Q4_K_M's mix: Q6_K for the head and for half of the layers' v and down, Q5_K for the other half's v."""
    units = spec.units(256)
    count = len(units)
    q_k = (spec.heads + spec.kv_heads) * spec.head_dim
    whole = ((0, count),)

    def ones() -> torch.Tensor:
        return torch.ones(spec.hidden, device=device)

    def cut(kind: str, width: int) -> RowParallel:
        weight = random_weight(kind, spec.hidden, width // count, count, device)
        return RowParallel(whole, ((weight,),), (((0, width),),))

    def layer(index: int) -> GpuLayer:
        more = index % 2 == 0
        qkv = (
            random_weight("Q4_K", q_k, spec.hidden, 1, device),
            random_weight("Q6_K" if more else "Q5_K", spec.kv_heads * spec.head_dim, spec.hidden, 1, device),
        )
        gate, up = (random_weight("Q4_K", spec.ffn, spec.hidden, 1, device) for _ in range(2))
        output = cut("Q4_K", spec.heads * spec.head_dim)
        return GpuLayer(ones(), qkv, output, ones(), gate, up, cut("Q6_K" if more else "Q4_K", spec.ffn))

    return GpuShard(
        spec,
        units,
        (0, count),
        (0, spec.layers),
        torch.device(device),
        torch.randn(spec.vocab, spec.hidden, device=device).half(),
        (0, spec.vocab),
        tuple(layer(i) for i in range(spec.layers)),
        ones(),
        random_weight("Q6_K", spec.vocab, spec.hidden, 1, device),
        None,
    )


def decode_batch(sequences: int, positions: int, vocab: int, device: str = "cuda") -> GpuBatch:
    """One new token a sequence, whose blocks lie scattered over the cache."""

    def ints(values: torch.Tensor) -> torch.Tensor:
        return values.to(device=device, dtype=torch.int32)

    blocks = -(-positions // BLOCK)
    table = torch.randperm(sequences * blocks).view(sequences, blocks)
    at = torch.full((sequences,), positions - 1)
    rows = torch.arange(sequences)
    return GpuBatch(
        ints(torch.randint(0, vocab, (sequences,))),
        ints(at),
        ints(table[:, -1] * BLOCK + (positions - 1) % BLOCK),
        ints(table),
        ints(torch.arange(sequences + 1)),
        ints(at + 1),
        ints(rows),
        1,
    )


def kv_cache(
    spec: ModelSpec, sequences: int, positions: int, device: str = "cuda", dtype: torch.dtype = DTYPE
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Keys and values, and of fp8 ones their scales."""
    blocks = sequences * -(-positions // BLOCK)
    shape = (spec.layers, blocks, 2, spec.kv_heads, BLOCK, spec.head_dim)
    if dtype == DTYPE:
        return torch.randn(shape, device=device, dtype=dtype), None
    cache = torch.empty(shape, device=device, dtype=dtype)
    for layer in cache:  # a layer at a time: the whole in fp16 would be twice as large
        layer.copy_(torch.randn(shape[1:], device=device, dtype=torch.float16) * 100)
    return cache, torch.full(shape[:-1], 0.01, device=device)


def both_ways(forward: GpuForward, batch: GpuBatch, repeats: int) -> tuple[float, float | None]:
    """Median ms of the captured step, kernels one after another and overlapping; None where the GPU cannot.
    Raises SystemExit if the two differ in a bit."""
    ways = [False, *([True] if torch.cuda.get_device_capability() >= OLDEST else [])]
    runs, outputs = [], []
    with torch.inference_mode():
        for way in ways:
            with overlap(way):
                out: list[torch.Tensor] = []
                runs.append(captured([lambda out=out: out.append(forward.logits(batch))]))
                outputs.append(out[-1])  # of the captured call: what a replay writes
        for run, out in zip(runs, outputs, strict=True):
            run()
            torch.cuda.synchronize()
            if not torch.equal(outputs[0].view(torch.int32), out.view(torch.int32)):
                raise SystemExit("error: a step with overlapping kernels gives other bits")
        times = [[median_ms(run, max(1, repeats // 3)) for run in runs] for _ in range(3)]
    plain, *rest = (statistics.median(column) for column in zip(*times, strict=True))
    return plain, rest[0] if rest else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=shapes.LAYERS)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--kv-dtype", choices=("fp16", "fp8"), default="fp16")
    parser.add_argument("--tune", action="store_true", help="note in kernels/gpu/tuned whether overlap pays")
    args = parser.parse_args()
    if args.tune and args.layers != shapes.LAYERS:
        parser.error("--tune wants the whole model, not --layers")
    require_gpu("bench/gpu/step.py")
    torch.manual_seed(0)
    copy, spec = copy_bandwidth(), flagship(args.layers)
    dtype = FP8 if args.kv_dtype == "fp8" else DTYPE
    shard = random_shard(spec)
    results, gains = [], []
    for sequences, positions in CASES:
        torch.cuda.empty_cache()
        one = spec.head_dim + 4 if dtype == FP8 else 2 * spec.head_dim
        cache_bytes = 2 * spec.layers * spec.kv_heads * one * sequences * positions
        if cache_bytes > torch.cuda.mem_get_info()[0] * 0.9:
            print(f"{sequences} x {positions}: the KV cache does not fit", file=sys.stderr)
            continue
        cache, scales = kv_cache(spec, sequences, positions, dtype=dtype)
        forward = GpuForward(shard, cache, Alone(), positions, scales)
        batch = decode_batch(sequences, positions, spec.vocab)
        ms, overlapping = both_ways(forward, batch, args.repeats)
        if overlapping:
            gains.append(ms / overlapping)
        floor = (shard.nbytes - shard.embedding.nbytes + cache_bytes) / copy * 1e3
        results.append(
            {
                "sequences": sequences,
                "positions": positions,
                "kv": args.kv_dtype,
                "ms": round(ms, 3),
                "tokens_per_s": round(sequences / ms * 1e3, 1),
                "floor_ms": round(floor, 3),
                "share_of_floor": round(floor / ms, 3),
                "overlapping_ms": round(overlapping, 3) if overlapping else "",
            }
        )
        print(results[-1], file=sys.stderr, flush=True)
        del forward, batch, cache, scales
    if args.tune and gains:
        pays = statistics.median(gains) > LEAST_GAIN
        print(save(torch.cuda.get_device_name(), {"overlap": pays}), file=sys.stderr)
    peak = torch.cuda.max_memory_allocated() / 2**30
    show(report(results, copy_gb_s=round(copy / 1e9, 1), layers=spec.layers, peak_gib=round(peak, 1)))


if __name__ == "__main__":
    main()
