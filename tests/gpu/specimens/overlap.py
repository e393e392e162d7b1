"""The kernels of a decode step, each as it runs beside the end of the one before."""

from __future__ import annotations

from dataclasses import replace

from tests.gpu.specimens import Specimen, attention, embedding, linear, norm, rope

# Loads of spans and leaves, which say where a tile's weights begin.
_LOADS = {"linear": 3, "linear, pair": 5, "linear, gated": 3}


def specimens() -> list[Specimen]:
    steps = {
        "embed": embedding.specimens()[1],
        "embed, dense": embedding.specimens()[0],
        "norm": norm.specimens()[0],
        "rope": rope.specimens()[0],
        "rope, fp8": rope.specimens()[2],
        "fold": attention._fold(),
        "attend": attention._attend(True, 90, 5.3, block=64),
        "attend, fp8": attention._attend(True, 90, 6.1, fp8=True, scaled=True),
        "linear": linear.specimen("Q4_K, decode", linear.Q4_K, weights=128),
        "linear, pair": linear.specimen("Q4_K and Q6_K", linear.Q4_K, linear.Q6_K, pair=1, weights=128),
        "linear, gated": linear.specimen("Q4_K, gate and up", linear.Q4_K, pair=2),
    }
    return [
        replace(
            specimen,
            name=f"{specimen.name}, overlapping",
            constants={**specimen.constants, "OVERLAP": True},
            overlaps=_LOADS.get(name, 0),
            architectures=(90,) if specimen.matrix else (90, 100),
        )
        for name, specimen in steps.items()
    ]
