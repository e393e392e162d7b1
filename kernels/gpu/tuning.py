"""What was found fast, one JSON file a GPU; made by `bench/gpu/linear.py --tune MIX` and `step.py --tune`.

A file maps "shape" to the fields of a `Tiling`, where the shape names the formats, rows, width, units, how
two weights are combined, and the rows of x up to the next power of two; "overlap" says whether captured
steps run faster with kernels that overlap (`overlap`). None of it can change a bit: a missing file or entry
costs time, not agreement.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch

from kernels.gpu.launch import INTERPRETED, next_power_of_2
from kernels.gpu.planar import Format, PlanarWeight

FOLDER = Path(__file__).parent / "tuned"
_WIDE_TILE = 192 << 10  # bytes of shared memory that 128 x 128 takes at the most, of fp16 weights


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a launch shares out its work; free of influence on the result.

    weights: rows of w a tile (at least 64, which keeps to one family of matrix instructions); tokens: rows of
    x a tile (at least 16); split: cuts of the tree of sums; blocks: thread blocks a multiprocessor, where
    they go through several tiles."""

    weights: int = 64
    tokens: int = 16
    warps: int = 4
    stages: int = 3
    split: int = 0
    blocks: int = 4


@dataclass(frozen=True, slots=True)
class Gpu:
    """What a default depends on. generation: the compute capability; shared: bytes of shared memory that one
    thread block may ask for."""

    generation: tuple[int, int]
    shared: int


HOPPER = Gpu((9, 0), 227 << 10)


def default_tiling(rows: int, formats: tuple[Format, ...], gated: bool, gpu: Gpu) -> Tiling:
    """A tiling that suits `rows` rows of x where none was tuned: the largest that fits the shared memory and
    spills no registers, by what cross-compiling shows (docs/gpu/linear.md)."""
    tokens = min(64, max(16, next_power_of_2(rows)))
    roomy = gpu.generation >= (9, 0) and gpu.shared >= _WIDE_TILE
    after_hopper = gpu.generation >= (10, 0)
    if gated:  # two sums a tile, and the codes of two weights
        heavy = any(f.low == 8 or (f.high and not after_hopper) for f in formats)
    else:
        heavy = len(formats) > 1 and gpu.generation < (8, 6)
    if heavy or (gated and not roomy):
        tokens = min(tokens, 32)
    if rows <= 64:
        return Tiling(64, tokens, 4, 3, 0, 4)
    if roomy and len(formats) == 1 and not (after_hopper and formats[0].low == 16):
        return Tiling(128, 128, 8, 3, 0, 1)
    return Tiling(64, tokens, 4, 3, 0, 2)


def tiling_for(rows: int, weights: tuple[PlanarWeight, ...], gated: bool, device: torch.device) -> Tiling:
    """What was tuned for this GPU and shape, else the default."""
    if not INTERPRETED:
        fields = _tuned(file_name(torch.cuda.get_device_name(device))).get(shape_name(rows, weights, gated))
        if fields is not None:
            return Tiling(**fields)
    return default_tiling(rows, tuple(weight.format for weight in weights), gated, _gpu(device))


def shape_name(rows: int, weights: tuple[PlanarWeight, ...], gated: bool) -> str:
    """For example "16: 4.0.32.256.1m 57344x8192x1 gated"."""
    first = weights[0]
    formats = "+".join(_format_name(weight.format) for weight in weights)
    sizes = "+".join(str(weight.rows) for weight in weights)
    tokens = min(4096, max(16, next_power_of_2(rows)))
    return f"{tokens}: {formats} {sizes}x{first.width}x{first.units}{' gated' if gated else ''}"


def file_name(gpu: str) -> str:
    return "_".join(gpu.lower().replace("nvidia", "").split()) + ".json"


def overlap_pays(device: torch.device) -> bool:
    """Whether kernels of a step were found to run faster overlapping on this GPU; not where nobody tried."""
    if INTERPRETED or device.type != "cuda":
        return False
    return bool(_tuned(file_name(torch.cuda.get_device_name(device))).get("overlap", False))


def saved(gpu: str) -> dict:
    """What the GPU's file holds now."""
    path = FOLDER / file_name(gpu)
    return json.loads(path.read_text()) if path.exists() else {}


def save(gpu: str, found: dict[str, Tiling | bool]) -> Path:
    """Merge `found` into the GPU's file; returns its path."""
    path = FOLDER / file_name(gpu)
    known = saved(gpu)
    known |= {name: one if isinstance(one, bool) else asdict(one) for name, one in found.items()}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")
    return path


def _format_name(f: Format) -> str:
    return f"{f.low}.{f.high}.{f.group}.{f.span}.{f.sub}{'m' if f.minimum else ''}"


@cache
def _tuned(name: str) -> dict:
    path = FOLDER / name
    return json.loads(path.read_text()) if path.exists() else {}


@cache
def _gpu(device: torch.device) -> Gpu:
    if INTERPRETED:
        return HOPPER
    properties = torch.cuda.get_device_properties(device)
    return Gpu((properties.major, properties.minor), properties.shared_memory_per_block_optin)
