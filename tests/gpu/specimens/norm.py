from __future__ import annotations

from dataclasses import replace

from kernels.gpu.norm import add_norm_kernel, block_of, warps_of
from tests.gpu.specimens import Specimen


def specimens() -> list[Specimen]:
    everywhere = [_specimen(8192, 8), _specimen(32768, 16)]
    return [*everywhere, replace(_specimen(8192, 1), architectures=(90,))]


def _specimen(width: int, count: int) -> Specimen:
    return Specimen(
        f"add_norm, {width} wide, {count} sums",
        add_norm_kernel,
        {
            "residual_ptr": "*fp32",
            "partials_ptr": "*fp32",
            "weight_ptr": "*fp32",
            "out_ptr": "*fp16",
            "stride": "i32",
            "eps": "fp32",
        },
        {"S": count, "H": width, "BLOCK": block_of(width), "NORM": True, "OVERLAP": False},
        warps=warps_of(width),
    )
