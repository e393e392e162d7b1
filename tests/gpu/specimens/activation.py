from __future__ import annotations

from kernels.gpu.activation import silu_mul_fold_kernel
from tests.gpu.specimens import Specimen


def specimens() -> list[Specimen]:
    return [_specimen(count) for count in (4, 16)]


def _specimen(count: int) -> Specimen:
    return Specimen(
        f"silu_mul_fold, {count} sums",
        silu_mul_fold_kernel,
        {"partials_ptr": "*fp32", "out_ptr": "*fp16", "stride": "i32"},
        {"F": 28672, "S": count, "BLOCK": 1024},
    )
