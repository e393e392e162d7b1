from __future__ import annotations

from dataclasses import replace

from kernels.gpu.embedding import embed_dense_kernel, embed_planar_kernel
from tests.gpu.specimens import Specimen

# Of runtime.weights.blocks.SPECS: widths of the planes, zero point, group, super-group; then what is there.
_TYPES = {
    "Q4_K": ((4, 0, 0, 32, 256), {"SUB_SCALES": True, "OFFSETS": True, "SUB_MINS": True, "PAIRED": False}),
    "Q6_K": ((4, 2, 32, 16, 256), {"SUB_SCALES": True, "OFFSETS": False, "SUB_MINS": False, "PAIRED": False}),
    "Q2_K": ((2, 0, 0, 16, 256), {"SUB_SCALES": True, "OFFSETS": True, "SUB_MINS": False, "PAIRED": True}),
    "Q8_0": ((8, 0, 0, 32, 32), {"SUB_SCALES": False, "OFFSETS": False, "SUB_MINS": False, "PAIRED": False}),
}


def specimens() -> list[Specimen]:
    dense = Specimen(
        "embed, fp16",
        embed_dense_kernel,
        {"table_ptr": "*fp16", "tokens_ptr": "*i32", "out_ptr": "*fp32", "first": "i32", "rows": "i32"},
        {"H": 8192, "BLOCK": 1024, "OVERLAP": False},
    )
    planar = [_planar(name, *of) for name, of in _TYPES.items()]
    return [dense, planar[0], *(replace(p, architectures=(90,)) for p in planar[1:])]


def _planar(name: str, numbers: tuple[int, ...], present: dict[str, bool]) -> Specimen:
    plane = "*i8" if numbers[0] == 8 else "*i16"
    names = ("LOW", "HIGH", "ZERO_POINT", "GROUP", "SUPER_GROUP")
    return Specimen(
        f"embed, {name}",
        embed_planar_kernel,
        {
            "low_ptr": plane,
            "high_ptr": plane,
            "d_ptr": "*fp16",
            "m_ptr": "*fp16",
            "sub_scales_ptr": "*i8" if name == "Q6_K" else "*u8",
            "sub_mins_ptr": "*u8",
            "tokens_ptr": "*i32",
            "out_ptr": "*fp32",
            "first": "i32",
            "rows": "i32",
        },
        {**dict(zip(names, numbers, strict=True)), **present, "H": 8192, "BLOCK": 1024, "OVERLAP": False},
    )
