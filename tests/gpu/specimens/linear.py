"""The GEMM at the shapes of a 70B model: decode and prefill, every family of formats."""

from __future__ import annotations

from kernels.gpu import linear
from kernels.gpu.chunks import FIELDS
from kernels.gpu.codes import assembly
from kernels.gpu.planar import Format
from kernels.gpu.tuning import Gpu, default_tiling
from tests.gpu.specimens import SHARED, Specimen

Q4_K = Format(4, 0, 0, 32, 256, 1, True)
Q5_K = Format(4, 1, 0, 32, 256, 1, True)
Q6_K = Format(4, 2, 32, 16, 256, 2, False)
Q3_K = Format(2, 1, 4, 16, 256, 2, False)
Q2_K = Format(2, 0, 0, 16, 256, 3, True)
Q8_0 = Format(8, 0, 0, 32, 32, 0, False)
DENSE = Format(16, 0, 0, 128, 128, 0, False)
INT4 = Format(4, 0, 0, 128, 128, 0, True)  # GPTQ, AWQ
_NAMES = {
    Q4_K: "Q4_K", Q5_K: "Q5_K", Q6_K: "Q6_K", Q3_K: "Q3_K", Q2_K: "Q2_K", Q8_0: "Q8_0", DENSE: "dense",
    INT4: "int4",
}  # fmt: skip

# Lane-instructions a weight that leave the memory the limit on one H200: 128 lanes x 132 multiprocessors x
# 1.98 GHz against 4.3 TB/s, by bits a weight.
BUDGET = {INT4: 4.0, Q4_K: 4.5, Q5_K: 5.5, Q6_K: 6.4}


def specimen(
    name: str,
    first: Format,
    second: Format | None = None,
    *,
    pair: int = 0,
    width: int = 8192,
    weights: int = 64,
    tokens: int = 16,
    warps: int = 4,
    stages: int = 3,
    depth: int = 0,
    splits: int = 1,
    architectures: tuple[int, ...] = (80, 90, 100),
) -> Specimen:
    second = second or first
    signature = {"x": "*fp16", "leaves": "*i32", "spans": "*i32", "pending": "*fp32"}
    signature["out"] = "*fp16" if pair == 2 else "*fp32"
    signature |= {k: "i32" for k in ("M", "N", "stride", "work", "tiles_first")}
    constants: dict[str, object] = {
        "WIDTH": width, "SPLITS": splits, "DEPTH": depth, "PAIR": pair,
        "BN": weights, "BM": tokens, "FIELDS": FIELDS, "OVERLAP": False,
    }  # fmt: skip
    for side, f in zip("AB", (first, second), strict=True):
        plane = {8: "*i8", 16: "*fp16"}.get(f.low, "*i16")
        signature |= {f"low_{side}": plane, f"high_{side}": plane}
        signature |= {f"{k}_{side}": "*i32" for k in ("d", "sub", "mins", "shifts")}
        signature |= {f"{k}_{side}": "i32" for k in ("rows", "d_words", "sub_words", "min_words")}
        constants |= {f"{k}_{side}": v for k, v in linear._constants(f).items()}
        constants[f"ASSEMBLY_{side}"] = None if f.low >= 8 else assembly(f.low, f.high, f.zero)
    return Specimen(
        name,
        linear._kernel,
        signature,
        constants,
        warps=warps,
        stages=stages,
        matrix=True,
        weights=weights * 128 * (2 if pair == 2 else 1),
        per_weight=max(BUDGET.get(first, 8.0), BUDGET.get(second, 8.0)) if tokens == 16 else 12.0,
        unaligned=("M", "work", "tiles_first"),
        architectures=architectures,
    )


def shipped(
    architecture: int, rows: int, first: Format, second: Format | None = None, *, gated: bool = False
) -> Specimen:
    """As a model of hidden size 8192 runs there where nothing was tuned: `default_tiling` itself."""
    gpu = Gpu((architecture // 10, architecture % 10), SHARED[architecture])
    formats = (first, second or first) if gated or second else (first,)
    tiling = default_tiling(rows, formats, gated, gpu)
    names = " and ".join(_NAMES[f] for f in dict.fromkeys(formats))
    return specimen(
        f"{names}{', gate and up' if gated else ''}, {rows} rows, default",
        first,
        second,
        pair=2 if gated else 1 if second else 0,
        weights=tiling.weights,
        tokens=tiling.tokens,
        warps=tiling.warps,
        stages=tiling.stages,
        depth=1,
        architectures=(architecture,),
    )


def specimens() -> list[Specimen]:
    """The defaults, those of formats that take the most registers and the most shared memory; and decode as
    tuning may find it, in tiles of 128 weights, which the budget is held against."""
    found = [
        specimen(f"{_NAMES[f]}, decode", f, weights=128, architectures=(90,))
        for f in (INT4, Q4_K, Q5_K, Q6_K, Q3_K, Q2_K, DENSE, Q8_0)
    ]
    found += [
        specimen("Q4_K and Q6_K side by side, decode", Q4_K, Q6_K, pair=1, weights=128, architectures=(90,)),
        specimen(
            "Q4_K, gate and up, decode, wide", Q4_K, pair=2, weights=128, warps=8, architectures=(90, 100)
        ),
        specimen(
            "Q6_K, units, prefill", Q6_K, width=3584, weights=128, tokens=128, warps=8, depth=3,
            architectures=(90,),
        ),
        shipped(90, 16, Q4_K, gated=True),
    ]  # fmt: skip
    for architecture in (80, 89, 90, 100, 120):
        found += [
            shipped(architecture, 2048, Q6_K),
            shipped(architecture, 2048, Q4_K, Q6_K),
            shipped(architecture, 2048, Q6_K, gated=True),
        ]
    found += [shipped(architecture, 2048, Q4_K) for architecture in (80, 90)]
    found += [shipped(architecture, 2048, Q4_K, gated=True) for architecture in (80, 90, 120)]
    found += [shipped(architecture, 2048, DENSE) for architecture in (89, 90, 100)]
    found += [shipped(80, 2048, Q5_K, gated=True), shipped(90, 2048, DENSE, gated=True)]
    found += [shipped(100, 2048, Q8_0, gated=True)]
    return found
