"""Times the small GPU operations at 70B shape: `python bench/gpu/small.py > small.json`. Needs a CUDA device.

Prints one JSON object: command, device, versions, date, the run's own copy bandwidth, and for each operation
and number of rows the median over graph replays, the bytes it must move and their share of that bandwidth. A
graph holds calls on copies of the operands in turn, so that together they do not fit the cache; in a step the
producer has just left them there, so that small ones are read faster. Needs torch and triton alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.gpu.timing import captured, copy_bandwidth, median_ms, report, require_gpu, show
from kernels.gpu.activation import silu_mul_fold
from kernels.gpu.embedding import embed
from kernels.gpu.norm import add_norm
from kernels.gpu.penalties import Penalties, adjust
from kernels.gpu.rope import rope_store
from kernels.gpu.sampling import Settings, Workspace, sample

ROWS = (1, 16, 32, 64, 2048)
H, F, HEADS, KV_HEADS, D = 8192, 28672, 64, 8, 128
PAGE = 32
COLD = 256 << 20  # bytes of operands in one graph: several times any cache of today
CALLS = 64  # of one graph, at most

# A case makes, from a number of rows, one call on operands of its own and the bytes that it must move.
Call = tuple[Callable[[], None], int]
Case = Callable[[int], Call]


def partial_sums(rows: int) -> int:
    """A unit's each in decode; prefill folds them in registers."""
    return 8 if rows <= 64 else 1


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def norm_case(rows: int) -> Call:
    sums, weight = partial_sums(rows), normal(H)
    residual, partials = normal(rows, H), normal(sums, rows, H)
    out = torch.empty(rows, H, dtype=torch.float16, device="cuda")
    return lambda: add_norm(residual, partials, weight, 1e-5, out), rows * H * (4 * sums + 4 + 4 + 2) + 4 * H


def rope_case(cache_dtype: torch.dtype, scaled: bool) -> Case:
    def make(rows: int) -> Call:
        sums, blocks, wide = partial_sums(rows), rows // PAGE + 1, (HEADS + 2 * KV_HEADS) * D
        partials, cos, sin = normal(sums, rows, wide), normal(8192, D // 2), normal(8192, D // 2)
        positions = torch.randint(0, 8192, (rows,), device="cuda")
        slots = torch.randperm(blocks * PAGE, device="cuda")[:rows]
        q = torch.empty(rows, HEADS, D, dtype=torch.float16, device="cuda")
        cache = torch.zeros(blocks, 2, KV_HEADS, PAGE, D, device="cuda").to(cache_dtype)
        scales = torch.zeros(blocks, 2, KV_HEADS, PAGE, device="cuda") if scaled else None
        kv = 2 * KV_HEADS * (D * cache.element_size() + 4 * scaled)
        shape = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": D, "scales": scales}
        moved = rows * (4 * sums * wide + 2 * HEADS * D + kv + 4 * D + 16)
        return lambda: rope_store(partials, positions, slots, cos, sin, q, cache, **shape), moved

    return make


def activation_case(rows: int) -> Call:
    sums = partial_sums(rows)
    partials, out = normal(sums, rows, 2 * F), torch.empty(rows, F, dtype=torch.float16, device="cuda")
    return lambda: silu_mul_fold(partials, out), rows * F * (8 * sums + 2)


def q4_k_table(vocabulary: int) -> SimpleNamespace:
    """Random weights of Q4_K's planar form."""

    def random(dtype: torch.dtype, cols: int) -> torch.Tensor:
        return torch.randint(0, 100, (vocabulary, cols), dtype=dtype, device="cuda")

    return SimpleNamespace(
        rows=vocabulary, cols=H, bits=(4,), zero_point=0, group=32, super_group=256, paired=False,
        planes=(random(torch.int16, H // 4),), d=normal(vocabulary, H // 256).half(),
        m=normal(vocabulary, H // 256).half(), sub_scales=random(torch.uint8, H // 32),
        sub_mins=random(torch.uint8, H // 32),
    )  # fmt: skip


def embed_case(table, bytes_a_row: float, vocabulary: int) -> Case:
    def make(rows: int) -> Call:
        tokens = torch.randint(0, vocabulary, (rows,), device="cuda")
        out = torch.empty(rows, H, device="cuda")
        return lambda: embed(table, tokens, out), int(rows * (bytes_a_row + 4 * H + 8))

    return make


def sample_case(vocabulary: int, temperature: float, top_k: int, top_p: float, logprob: bool) -> Case:
    """Bytes: the logits once; what a filter reads more often is its own cost."""

    def make(rows: int) -> Call:
        logits = normal(rows, vocabulary) * 2.5
        logits[:, :40] += torch.rand(rows, 40, device="cuda") * 8 + 8  # a handful holds most of the mass

        def full(value: float, dtype: torch.dtype) -> torch.Tensor:
            return torch.full((rows,), value, dtype=dtype, device="cuda")

        settings = Settings(
            full(temperature, torch.float64), full(top_k, torch.int32), full(top_p, torch.float64),
            full(0.0, torch.float64), torch.arange(rows, device="cuda"), full(17, torch.int64),
            full(0, torch.int32),
        )  # fmt: skip
        work, tokens = Workspace.make(rows, vocabulary, "cuda"), full(0, torch.int64)
        logprobs = full(0.0, torch.float32) if logprob else None
        return lambda: sample(logits, settings, work, tokens, logprobs), rows * vocabulary * 4

    return make


def adjust_case(rows: int) -> Call:
    """1,024 tokens touched in each row."""
    logits, table = normal(rows, 32000), Penalties.empty(rows, 1024, 4, "cuda")
    table.ids.copy_(torch.stack([torch.randperm(32000)[:1024] for _ in range(rows)]))
    table.presence.fill_(0.5)
    states = torch.arange(rows, device="cuda")
    return lambda: adjust(logits, table, states), rows * 1024 * (4 + 8 + 1 + 4 + 4 + 4)


def cases() -> Iterator[tuple[str, Case]]:
    yield "add_norm, fp16 out", norm_case
    yield "rope_store, fp16 cache", rope_case(torch.float16, False)
    yield "rope_store, fp8 cache", rope_case(torch.float8_e4m3fn, False)
    yield "rope_store, fp8 cache, scaled", rope_case(torch.float8_e4m3fn, True)
    yield "silu_mul_fold", activation_case
    yield "embed, fp16", embed_case(normal(32000, H, dtype=torch.float16), 2 * H, 32000)
    yield "embed, Q4_K", embed_case(q4_k_table(32000), H * (0.5 + 2 / 32 + 4 / 256), 32000)
    yield "adjust, 1024 tokens", adjust_case
    for vocabulary in (32000, 128256):
        for name, settings in {
            "greedy": (0.0, 0, 1.0, False),
            "greedy, logprob": (0.0, 0, 1.0, True),
            "temperature": (0.8, 0, 1.0, False),
            "top_k 40": (0.8, 40, 1.0, False),
            "top_p 0.95": (0.8, 0, 0.95, False),
            "top_k 40, top_p 0.95": (0.8, 40, 0.95, False),
        }.items():
            yield f"sample {vocabulary}, {name}", sample_case(vocabulary, *settings)


def measured(case: Case, rows: int, repeats: int) -> tuple[float, int]:
    """Median microseconds a call, and bytes a call."""
    first = case(rows)
    copies = max(1, min(CALLS, COLD // max(1, first[1])))
    calls = [first[0], *(case(rows)[0] for _ in range(copies - 1))]
    return 1e3 * median_ms(captured(calls), repeats) / copies, first[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--only", default="", help="operations whose name holds this")
    arguments = parser.parse_args()
    require_gpu("bench/gpu/small.py")
    torch.manual_seed(0)
    ceiling = copy_bandwidth(arguments.repeats)
    results = []
    for name, case in cases():
        if arguments.only not in name:
            continue
        for rows in ROWS:
            if rows > 64 and name.startswith("sample 128256"):
                continue
            us, moved = measured(case, rows, arguments.repeats)
            results.append(
                {
                    "operation": name,
                    "rows": rows,
                    "us": round(us, 2),
                    "bytes": moved,
                    "gb_s": round(moved / us * 1e-3, 1),
                    "share_of_copy": round(moved / us * 1e6 / ceiling, 3),
                }
            )
            print(f"{name}, {rows} rows: {us:.1f} us", file=sys.stderr, flush=True)
            torch.cuda.empty_cache()
    show(report(results, copy_gb_s=round(ceiling * 1e-9, 1)))


if __name__ == "__main__":
    main()
