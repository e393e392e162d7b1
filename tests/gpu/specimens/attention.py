"""Paged attention at the flagship's shape (64 heads, 8 KV heads, D 128) and at its smallest and widest heads,
with the launch shapes that each generation gets."""

from __future__ import annotations

from kernels.gpu.attention import tuning_for
from kernels.gpu.attention_fold import SEGMENT, TILE, fold_segments
from kernels.gpu.attention_kernel import attend
from tests.gpu.specimens import Specimen

_INTEGERS = {name: "i32" for name in ("batch", "max_blocks", "split_rows", "segments")}
_POINTERS = {name: "*i32" for name in ("block_table", "query_start", "context_len")}
_POINTERS |= {name: "*fp32" for name in ("peaks", "totals", "partials")}


def _attend(
    split: bool,
    generation: int,
    most: float,
    *,
    dim: int = 128,
    fp8: bool = False,
    scaled: bool = False,
    block: int = 16,
    window: int = 0,
) -> Specimen:
    """`most`: lane-instructions an element of KV. A turn of the loop takes a tile of keys and one of values,
    2 x 64 x D elements, for a tile's width of query rows; its branches, which few turns take, are counted
    too: the mask, and the close of a segment where streamed."""
    tuning = tuning_for(dim, fp8, (generation // 10, generation % 10))
    padded = 1 << (dim - 1).bit_length()
    kind = "split" if split else "streamed"
    kv = ("*u8" if generation < 89 else "*fp8e4nv") if fp8 else "*fp16"
    return Specimen(
        name=f"{kind} D{dim} {kv[1:]} block {block}" + " scaled" * scaled + " window" * bool(window),
        kernel=attend,
        signature={
            "q": "*fp16", "cache": kv, "scales": "*fp32", "out": "*fp16", "exponent_scale": "fp32",
            **_POINTERS, **_INTEGERS,
        },
        constants={
            "HEADS": 64, "KV_HEADS": 8, "D": dim, "PADDED": padded, "VALUES": min(padded, 128),
            "BLOCK": block, "WINDOW": window, "TILES": SEGMENT // TILE.value, "SCALED": scaled,
            "SPLIT": split, "OVERLAP": False, "WIDTH": tuning.split_width if split else tuning.stream_width,
        },
        warps=tuning.split_warps if split else tuning.stream_warps,
        stages=tuning.split_stages if split else tuning.stream_stages,
        matrix=True,
        weights=2 * TILE.value * dim,
        per_weight=most,
        architectures=(generation,),
        unaligned=tuple(_INTEGERS),
    )  # fmt: skip


def specimens() -> list[Specimen]:
    found = [_fold()]
    for generation in (80, 90, 100):
        found.append(_attend(True, generation, 5.3))
        found.append(_attend(True, generation, 5.1, fp8=True, block=64))
        found.append(_attend(False, generation, 14.0))
        found.append(_attend(False, generation, 13.5, fp8=True, block=64))
    found.append(_attend(False, 89, 0, dim=256, fp8=True, scaled=True))
    found.append(_attend(False, 120, 0, dim=256))
    found.append(_attend(True, 120, 0, fp8=True, scaled=True))
    found.append(_attend(True, 90, 5.3, block=64))
    found.append(_attend(True, 90, 8.1, dim=64))
    found.append(_attend(True, 90, 7.0, dim=256))
    found.append(_attend(True, 90, 6.1, fp8=True, scaled=True))
    found.append(_attend(True, 90, 6.3, window=4096))
    found.append(_attend(False, 90, 14.0, block=64))
    found.append(_attend(False, 90, 20.0, dim=64))
    found.append(_attend(False, 90, 8.6, dim=256))
    found.append(_attend(False, 90, 15.5, fp8=True, scaled=True))
    found.append(_attend(False, 90, 15.2, window=4096))
    return found


def _fold() -> Specimen:
    return Specimen(
        name="fold of segments",
        kernel=fold_segments,
        signature={
            "peaks": "*fp32", "totals": "*fp32", "partials": "*fp32", "query_start": "*i32",
            "context_len": "*i32", "out": "*fp16", "segments": "i32", "split_rows": "i32",
        },
        constants={
            "HEADS": 64, "KV_HEADS": 8, "D": 128, "PADDED": 128, "WINDOW": 0, "SPAN": SEGMENT,
            "OVERLAP": False,
        },
        warps=1,
        stages=4,
        unaligned=("segments", "split_rows"),
    )  # fmt: skip
