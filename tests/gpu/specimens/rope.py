from __future__ import annotations

from dataclasses import replace

from kernels.gpu.rope import rope_store_kernel
from tests.gpu.specimens import Specimen


def specimens() -> list[Specimen]:
    return [
        _specimen("fp16 cache, 8 sums", 8, fp8=False, scaled=False),
        replace(_specimen("fp8 cache", 8, fp8=True, scaled=False), architectures=(90,)),
        _specimen("fp8 cache, scaled", 8, fp8=True, scaled=True),
    ]


def _specimen(name: str, count: int, fp8: bool, scaled: bool) -> Specimen:
    return Specimen(
        f"rope_store, {name}",
        rope_store_kernel,
        {
            "partials_ptr": "*fp32",
            "positions_ptr": "*i32",
            "slots_ptr": "*i64",
            "cos_ptr": "*fp32",
            "sin_ptr": "*fp32",
            "q_ptr": "*fp16",
            "cache_ptr": "*u8" if fp8 else "*fp16",
            "scales_ptr": "*fp32" if scaled else "*fp16",
            "stride": "i32",
            "table": "i32",
            "capacity": "i32",
        },
        {
            "S": count, "HEADS": 64, "KV_HEADS": 8, "HALF": 64, "PAGE": 32, "TILE_HEADS": 8, "TILE_HALF": 64,
            "FP8": fp8, "SCALED": scaled, "OVERLAP": False,
        },
    )  # fmt: skip
