"""What the cross-compile gate compiles: one module an operation, each with `specimens() -> list[Specimen]`.

A specimen is one kernel at one shape of interest, and what its machine code must show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# Bytes of shared memory that a thread block may ask for, by compute capability: "Technical Specifications per
# Compute Capability" in NVIDIA's CUDA C++ Programming Guide.
SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}


@dataclass(frozen=True, slots=True)
class Specimen:
    """`signature` gives the type of each argument that is not a constant ("*fp16", "i32", ...), in order.

    weights: quantised weights (or KV elements) that one turn of the hot loop consumes, for `per_weight`, the
    most lane-instructions one may cost on sm_90 (the largest loop that holds an HGMMA is the hot one).
    matrix: whether sm_90 code must use warp-group matrix instructions (HGMMA). overlaps: how many loads, of
    what no kernel writes, may stand before the wait for the kernel before; None: it does not wait."""

    name: str
    kernel: object
    signature: Mapping[str, str]
    constants: Mapping[str, object]
    warps: int = 4
    stages: int = 1
    matrix: bool = False
    weights: int = 0
    per_weight: float = 0.0
    architectures: tuple[int, ...] = (80, 90, 100)
    overlaps: int | None = None
    unaligned: tuple[str, ...] = field(default=())  # integers not known to be multiples of 16
