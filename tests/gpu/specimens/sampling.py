from __future__ import annotations

from dataclasses import replace

from kernels.gpu.filters import WARPS
from kernels.gpu.penalties import adjust_kernel, remember_kernel
from kernels.gpu.sampling import draw_kernel, filter_kernel, finish_kernel, tiles_kernel
from tests.gpu.specimens import Specimen

_TYPES = {
    **{n: "*fp32" for n in ("logits_ptr", "raw_ptr", "peaks_ptr", "raw_peaks_ptr", "logprobs_ptr")},
    **{n: "*fp64" for n in ("sums_ptr", "best_ptr", "temperature_ptr", "top_p_ptr", "min_p_ptr", "bias_ptr")},
    **{n: "*fp64" for n in ("repetition_ptr", "presence_ptr", "frequency_ptr")},
    **{n: "*i64" for n in ("edges_ptr", "seed_ptr", "position_ptr")},
    **{n: "*i32" for n in ("tops_ptr", "limits_ptr", "chosen_ptr", "tokens_ptr", "top_k_ptr", "choice_ptr")},
    **{n: "*i32" for n in ("ids_ptr", "counts_ptr", "stop_ids_ptr", "missing_ptr", "states_ptr")},
    "in_text_ptr": "*i8",
    "states": "i32",
}


def specimens() -> list[Specimen]:
    small, large = {"V": 32000, "TILES": 32, "MANY": 32}, {"V": 128256, "TILES": 126, "MANY": 128}
    tiles = {"V": 32000, "TILES": 32, "TILE": 1024, "RAW": True, "SUMS": True}
    table = {"ENTRIES": 4096, "BLOCK": 1024}
    return [
        _specimen("tiles", tiles_kernel, tiles),
        _specimen("filter", filter_kernel, small, WARPS),
        replace(_specimen("filter, large vocabulary", filter_kernel, large, WARPS), architectures=(90,)),
        _specimen("draw", draw_kernel, {**small, "BLOCKS": 4, "BLOCK": 256}),
        _specimen("finish", finish_kernel, {**large, "SUMS": True}),
        _specimen("adjust", adjust_kernel, {**table, "V": 32000, "STOPS": 8}),
        _specimen("remember", remember_kernel, table),
    ]


def _specimen(name: str, kernel, constants: dict[str, object], warps: int = 4) -> Specimen:
    signature = {n: _TYPES[n] for n in kernel.arg_names if n in _TYPES}
    return Specimen(f"sample, {name}", kernel, signature, constants, warps=warps)
