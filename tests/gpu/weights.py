"""Random planar weights of every type, for the tests of GPU kernels."""

from __future__ import annotations

import numpy as np

from runtime.weights.blocks import SPECS, Parts, QuantSpec
from runtime.weights.formats import TensorType
from runtime.weights.planar import Planar, planar_of_parts

TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "GPTQ64", "GPTQ128")
_WITH_MINIMA = ("Q2_K", "Q4_K", "Q5_K", "Q4_1", "Q5_1")


def random_planar(type: str, rows: int, cols: int, seed: int = 0) -> Planar:
    """Any codes, any sub-scales; d and m of a size that makes weights of a model's size."""
    draw = np.random.default_rng(seed)
    if type.startswith("GPTQ"):
        spec = QuantSpec((4,), 0, int(type[4:]), int(type[4:]), False)
    else:
        spec = SPECS[TensorType(type)]

    def integers(columns: int, low: int, high: int, dtype: type) -> np.ndarray:
        return draw.integers(low, high, (rows, cols // columns)).astype(dtype)

    codes = (
        integers(1, -127, 128, np.int8)
        if spec.bits == (8,)
        else integers(1, 0, 1 << sum(spec.bits), np.uint8)
    )
    size = 2e-2 / (1 << sum(spec.bits)) / (32 if type.endswith("_K") else 1)
    d = (size * (0.5 + draw.random((rows, cols // spec.super_group)))).astype(np.float16)
    m = -d if type in _WITH_MINIMA or type.startswith("GPTQ") else None
    sub = mins = None
    if type.startswith("GPTQ"):
        mins = integers(spec.group, 0, 16, np.uint8)
    elif spec.paired:
        sub = integers(spec.group, 0, 256, np.uint8)
    elif type in ("Q3_K", "Q6_K"):
        sub = integers(spec.group, -32, 32, np.int8)
    elif type.endswith("_K"):
        sub, mins = integers(spec.group, 0, 64, np.uint8), integers(spec.group, 0, 64, np.uint8)
    return planar_of_parts(type, spec, Parts(codes, d, m, sub, mins))
