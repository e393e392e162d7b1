"""Times paged attention at 70B shape (64 heads, 8 KV heads, D 128): needs a CUDA device.

    python bench/gpu/attention.py > attention.json      decode, prefill, the cost of the rule, peers beside it
    python bench/gpu/attention.py --tune                the same calls under other launch shapes

Medians over graph replays, decode going through enough sequences' KV to miss the cache; its share is of KV's
bytes alone against the run's own copy bandwidth, a prompt's of the run's own fp16 product. Peers, where they
are installed: torch's SDPA for prefill, flashinfer. Each is timed on the very operands, and only if its
results are ours within fp16's rounding; "against_..." is its time over ours. Needs torch, triton and numpy
alone.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.gpu.peers import against, figure, versions
from bench.gpu.shapes import HEAD_DIM, HEADS, KV_HEADS
from bench.gpu.timing import captured, copy_bandwidth, matmul_rate, median_ms, report, require_gpu, show
from kernels.gpu import attention
from kernels.gpu.attention import FP8, AttentionTuning, paged_attention, workspace_floats

COLD = 512 << 20  # bytes of KV in one graph: several times any cache of today
SCALE = HEAD_DIM**-0.5
DECODE = ((1024, 1), (1024, 8), (1024, 32), (8192, 1), (8192, 8), (8192, 32))  # context, sequences
PREFILL = 8192
ONE_SEGMENT = 1 << 24  # positions
DISTRIBUTIONS = {"sdpa_us": "torch", "flashinfer_us": "flashinfer-python"}


@dataclass
class Paged:
    """One call's operands: `sequences` of `rows` rows each over `context` positions in shuffled blocks."""

    q: torch.Tensor
    cache: torch.Tensor
    table: torch.Tensor
    start: torch.Tensor
    context: torch.Tensor
    out: torch.Tensor
    workspace: torch.Tensor
    longest: int

    def __call__(self, tuning: AttentionTuning | None = None) -> None:
        paged_attention(
            self.q, self.cache, self.table, self.start, self.context, self.out, self.workspace,
            scale=SCALE, longest=self.longest, tuning=tuning,
        )  # fmt: skip


def operands(sequences: int, rows: int, context: int, kv: torch.dtype, block: int) -> Paged:
    blocks = context // block
    total = sequences * blocks
    cache = torch.randn(total, 2, KV_HEADS, block, HEAD_DIM, device="cuda", dtype=torch.float16).to(kv)
    q = torch.randn(sequences * rows, HEADS, HEAD_DIM, device="cuda", dtype=torch.float16)
    floats = workspace_floats(sequences, HEADS, HEAD_DIM, context)
    return Paged(
        q=q,
        cache=cache,
        table=torch.randperm(total, device="cuda").to(torch.int32).view(sequences, blocks),
        start=torch.arange(0, sequences + 1, device="cuda", dtype=torch.int32) * rows,
        context=torch.full((sequences,), context, device="cuda", dtype=torch.int32),
        out=torch.empty_like(q),
        workspace=torch.empty(floats, device="cuda"),
        longest=rows,
    )


def cold_set(sequences: int, context: int, kv: torch.dtype, block: int) -> list[Paged]:
    first = operands(sequences, 1, context, kv, block)
    copies = min(64, max(1, COLD // first.cache.nbytes))
    return [first, *(operands(sequences, 1, context, kv, block) for _ in range(copies - 1))]


def decode(context: int, sequences: int, kv: torch.dtype, block: int, copy: float, repeats: int) -> dict:
    calls = cold_set(sequences, context, kv, block)
    ms = median_ms(captured(list(calls)), repeats) / len(calls)
    row = {
        "what": "decode", "context": context, "sequences": sequences, "kv": str(kv).removeprefix("torch."),
        "block": block, "us": round(ms * 1e3, 1),
        "share_of_copy": round(calls[0].cache.nbytes / (ms * 1e-3) / copy, 3),
    }  # fmt: skip
    if kv == torch.float16:
        row |= figure("flashinfer_us", lambda: flashinfer_decode(calls, block, repeats))
        row |= against("against_best_peer", row, DISTRIBUTIONS)
    return row


def prefill(context: int, kv: torch.dtype, block: int, matmul: float, repeats: int) -> Iterator[dict]:
    """The whole prompt at once; with segments, and with one segment for all, which is what the rule costs."""
    paged = operands(1, context, context, kv, block)
    flops = 2 * HEADS * HEAD_DIM * context * context  # two products over half of the square
    named = {"what": "prefill", "context": context, "kv": str(kv).removeprefix("torch."), "block": block}

    def timed(what: str) -> dict:
        ms = median_ms(captured([paged]), repeats)
        rate = flops / (ms * 1e-3)
        found = {"us": round(ms * 1e3, 1), "tflops": round(rate / 1e12, 1)}
        return named | {"what": what} | found | {"share_of_fp16": round(rate / matmul, 3)}

    row = timed("prefill")
    if kv == torch.float16:
        row |= figure("sdpa_us", lambda: sdpa(paged, repeats))
        row |= figure("flashinfer_us", lambda: flashinfer_prefill(paged, repeats))
        row |= against("against_sdpa", row, ["sdpa_us"]) | against("against_best_peer", row, DISTRIBUTIONS)
    yield row
    attention.SEGMENT, kept = ONE_SEGMENT, attention.SEGMENT
    try:
        yield timed("prefill, one segment")
    finally:
        attention.SEGMENT = kept


def contiguous(paged: Paged) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [KV heads, context, D] of the one sequence."""
    kv = paged.cache[paged.table[0].long()].permute(1, 2, 0, 3, 4)
    return tuple(kv.reshape(2, KV_HEADS, -1, HEAD_DIM))


def same(paged: Paged, peer: torch.Tensor) -> None:
    """AssertionError unless a peer's [rows, heads, D] are ours."""
    paged()
    torch.testing.assert_close(paged.out, peer, rtol=2e-2, atol=2e-3)


def sdpa(paged: Paged, repeats: int) -> float:
    """torch's own, over contiguous KV."""
    keys, values = (x[None] for x in contiguous(paged))
    q = paged.q.transpose(0, 1)[None].contiguous()

    def call() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            q, keys, values, is_causal=True, scale=SCALE, enable_gqa=True
        )

    same(paged, call()[0].transpose(0, 1))
    return median_ms(captured([call]), repeats)


def flashinfer_decode(calls: list[Paged], block: int, repeats: int) -> float:
    import flashinfer

    runs = []
    for paged in calls:
        n, blocks = paged.table.shape
        buffer = torch.empty(128 << 20, device="cuda", dtype=torch.uint8)
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(buffer, "HND", use_tensor_cores=True)
        wrapper.plan(
            torch.arange(n + 1, dtype=torch.int32) * blocks, paged.table.flatten(),
            torch.full((n,), block, dtype=torch.int32), HEADS, KV_HEADS, HEAD_DIM, block,
            q_data_type=torch.float16, kv_data_type=torch.float16, sm_scale=SCALE,
        )  # fmt: skip
        runs.append(lambda wrapper=wrapper, paged=paged: wrapper.run(paged.q, paged.cache))
    same(calls[0], runs[0]())
    return median_ms(captured(runs), repeats) / len(runs)


def flashinfer_prefill(paged: Paged, repeats: int) -> float:
    import flashinfer

    # Positions before heads: its own order, unless told otherwise.
    keys, values = (x.transpose(0, 1).contiguous() for x in contiguous(paged))

    def call() -> torch.Tensor:
        return flashinfer.single_prefill_with_kv_cache(
            paged.q, keys, values, causal=True, kv_layout="NHD", sm_scale=SCALE
        )

    same(paged, call())
    return median_ms(captured([call]), repeats)


def candidates() -> Iterator[AttentionTuning]:
    for stages, programs, (width, warps) in itertools.product(
        (2, 3, 5, 7), (512, 2048, 8192), ((64, 4), (128, 8))
    ):
        yield AttentionTuning(width, warps, stages, programs)


def stream_candidates() -> Iterator[AttentionTuning]:
    for stages, (width, warps) in itertools.product((1, 2, 3), ((64, 4), (128, 8), (128, 4))):
        yield AttentionTuning(stream_width=width, stream_warps=warps, stream_stages=stages)


def tune(block: int, repeats: int) -> Iterator[dict]:
    """Every candidate at a few shapes. One that does not fit is passed over; all must give the same bits."""
    for kv in (torch.float16, FP8):
        sets = [(f"decode {n} x {c}", cold_set(n, c, kv, block), candidates()) for c, n in DECODE]
        sets.append(("prefill", [operands(1, PREFILL, PREFILL, kv, block)], stream_candidates()))
        for name, calls, tunings in sets:
            calls[0]()
            wanted, found = calls[0].out.clone(), []
            for tuning in tunings:
                try:
                    run = captured([lambda paged=paged, t=tuning: paged(t) for paged in calls])
                    ms = median_ms(run, repeats) / len(calls)
                except Exception as error:  # too much shared memory: not a candidate
                    print(f"{name} {tuning}: {str(error).splitlines()[0]}", file=sys.stderr)
                    continue
                same = torch.equal(calls[0].out, wanted)
                found.append({"what": name, "kv": str(kv), "us": round(ms * 1e3, 1), "same_bits": same})
                found[-1]["tuning"] = str(tuning).removeprefix("AttentionTuning")
            yield from sorted(found, key=lambda row: row["us"])


def measure(block: int, copy: float, matmul: float, repeats: int) -> Iterator[dict]:
    for kv, (context, sequences) in itertools.product((torch.float16, FP8), DECODE):
        yield decode(context, sequences, kv, block, copy, repeats)
        torch.cuda.empty_cache()
    for kv in (torch.float16, FP8):
        yield from prefill(PREFILL, kv, block, matmul, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tune", action="store_true", help="try other launch shapes")
    parser.add_argument("--block", type=int, default=32, help="positions a KV block")
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    require_gpu("bench/gpu/attention.py")
    torch.manual_seed(0)
    copy, matmul = copy_bandwidth(), matmul_rate(torch.float16)
    rows = []
    for row in (
        tune(args.block, args.repeats) if args.tune else measure(args.block, copy, matmul, args.repeats)
    ):
        print(row, file=sys.stderr, flush=True)
        rows.append(row)
    found = report(rows, copy_gb_s=round(copy / 1e9, 1), fp16_tflops=round(matmul / 1e12, 1))
    found["versions"] = versions(rows, DISTRIBUTIONS) | found["versions"]
    show(found)


if __name__ == "__main__":
    main()
