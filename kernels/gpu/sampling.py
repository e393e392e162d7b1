"""Chooses the next token of each row of logits on the device, so that a step can stay in flight.

A row's choice is a pure function of its logits and its settings: temperature, filters (filters.py), then
Gumbel-max with noise keyed by seed, position, choice and token id (noise.py). Four kernels, no host between
them: what each tile of the vocabulary holds, the filters' threshold, the best of each tile, the best of all.
Largest values and lowest ids do not depend on the order they are sought in; the sums for logprobs, float64,
have one. z and the noise are float64, as on the host: both choose alike but for a tie within float64's
rounding, or where top_p's mass falls within fp32's rounding of its bound. Knows no penalties and no sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.gpu.filters import WARPS as FILTER_WARPS
from kernels.gpu.filters import inverse_temperature, order, threshold
from kernels.gpu.fold import check_aligned
from kernels.gpu.launch import check, launch, next_power_of_2, same_device
from kernels.gpu.noise import BLOCK, gumbel

TILE = 1024  # ids a program; with _WARPS, fixes the order of the sums for logprobs: part of `numerics`
MOST_TOKENS = 1 << 20
_WARPS = 4
_BLOCKS = TILE // BLOCK
_NOTHING = tl.constexpr(float("-inf"))


@dataclass(frozen=True, slots=True, eq=False)
class Settings:
    """How each row is sampled; tensors [M] on the device.

    temperature: float64, 0 takes the largest logit. top_k: int32, 0 for all. top_p: float64, 1 for all.
    min_p: float64, 0 for all. seed: int64, the 64 bits of an unsigned seed. position: int64 below 2**32, the
    absolute position of the token to be sampled. choice: int32, 0 for a request's only reply."""

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seed: torch.Tensor
    position: torch.Tensor
    choice: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Workspace:
    """What the kernels hand each other, [rows, tiles] or [rows]; `make` says how large."""

    peaks: torch.Tensor  # fp32: a tile's largest logit
    tops: torch.Tensor  # int32: the lowest id that has it; -1 where the tile holds NaN or +inf
    raw_peaks: torch.Tensor  # fp32: the largest of the untouched logits
    sums: torch.Tensor  # float64: their exp(x - raw peak), added up
    best: torch.Tensor  # float64: the largest z + noise
    chosen: torch.Tensor  # int32: the lowest id that has it
    edges: torch.Tensor  # int64, a row
    limits: torch.Tensor  # int32, a row

    @staticmethod
    def make(rows: int, vocabulary: int, device: torch.device | str) -> Workspace:
        """For up to `rows` rows of `vocabulary` logits. 32 bytes a row and tile of 1024 ids."""
        tiles = -(-vocabulary // TILE)

        def empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        return Workspace(
            peaks=empty(torch.float32, rows, tiles),
            tops=empty(torch.int32, rows, tiles),
            raw_peaks=empty(torch.float32, rows, tiles),
            sums=empty(torch.float64, rows, tiles),
            best=empty(torch.float64, rows, tiles),
            chosen=empty(torch.int32, rows, tiles),
            edges=empty(torch.int64, rows),
            limits=empty(torch.int32, rows),
        )


@triton.jit
def tiles_kernel(
    logits_ptr, raw_ptr, peaks_ptr, tops_ptr, raw_peaks_ptr, sums_ptr,
    V: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr, RAW: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """RAW: raw_ptr holds other numbers than logits_ptr. SUMS: logprobs are wanted."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    at = tile * TILE + tl.arange(0, TILE)
    mask = at < V
    x = tl.load(logits_ptr + row * V + at, mask=mask, other=_NOTHING)
    wrong = tl.max(((x != x) | (x == float("inf"))).to(tl.int32), axis=0)
    peak = tl.max(tl.where(x == x, x, _NOTHING), axis=0)
    top = tl.min(tl.where((x == peak) & mask, at, V), axis=0)
    tl.store(peaks_ptr + row * TILES + tile, peak)
    tl.store(tops_ptr + row * TILES + tile, tl.where(wrong > 0, -1, top))
    if SUMS:
        if RAW:
            x = tl.load(raw_ptr + row * V + at, mask=mask, other=_NOTHING)
            peak = tl.max(x, axis=0)
        shifted = tl.where(x == _NOTHING, _NOTHING, x - peak)  # a tile of nothing but -inf has no peak
        tl.store(raw_peaks_ptr + row * TILES + tile, peak)
        tl.store(sums_ptr + row * TILES + tile, tl.sum(tl.exp(shifted.to(tl.float64)), axis=0))


@triton.jit
def _top(peaks_ptr, tops_ptr, row, TILES: tl.constexpr, MANY: tl.constexpr):
    """A row's largest logit and the lowest id that has it; -1 where the row cannot be sampled."""
    tile = tl.arange(0, MANY)
    peaks = tl.load(peaks_ptr + row * TILES + tile, mask=tile < TILES, other=_NOTHING)
    tops = tl.load(tops_ptr + row * TILES + tile, mask=tile < TILES, other=0)
    peak = tl.max(peaks, axis=0)
    top = tl.min(tl.where((peaks == peak) & (tile < TILES), tops, 2147483647), axis=0)
    wrong = (tl.min(tops, axis=0) < 0) | (peak == _NOTHING)
    return peak, tl.where(wrong, -1, top)


@triton.jit
def filter_kernel(
    logits_ptr, peaks_ptr, tops_ptr, temperature_ptr, top_k_ptr, top_p_ptr, edges_ptr, limits_ptr,
    V: tl.constexpr, TILES: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    peak, top = _top(peaks_ptr, tops_ptr, row, TILES, MANY)
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    edge = tl.full((), -(2**31), tl.int64)
    limit = tl.full((), 0, tl.int32)
    filtered = ((top_k > 0) & (top_k < V)) | (top_p < 1.0)
    if filtered & (temperature > 0.0) & (top >= 0):
        edge, limit = threshold(logits_ptr + row * V, peak, temperature, top_k, top_p, V)
    tl.store(edges_ptr + row, edge)
    tl.store(limits_ptr + row, limit)


@triton.jit
def draw_kernel(
    logits_ptr, peaks_ptr, tops_ptr, edges_ptr, limits_ptr, temperature_ptr, min_p_ptr, seed_ptr,
    position_ptr, choice_ptr, best_ptr, chosen_ptr,
    V: tl.constexpr, TILES: tl.constexpr, MANY: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The best of one tile: BLOCKS blocks of noise, BLOCK ids each."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    temperature = tl.load(temperature_ptr + row)
    peak, top = _top(peaks_ptr, tops_ptr, row, TILES, MANY)
    best = tl.full((), _NOTHING, tl.float64)
    chosen = tl.full((), V, tl.int32)
    if (temperature > 0.0) & (top >= 0):
        block = tile * BLOCKS + tl.arange(0, BLOCKS)
        inside = tl.arange(0, BLOCK)
        ids = block[:, None] * BLOCK + inside[None, :]
        x = tl.load(logits_ptr + row * V + ids, mask=ids < V, other=_NOTHING)
        key = order(x).to(tl.int64)
        edge = tl.load(edges_ptr + row)
        stays = (key > edge) | ((key == edge) & (ids < tl.load(limits_ptr + row)))
        z = (x.to(tl.float64) - peak.to(tl.float64)) * inverse_temperature(temperature)
        min_p = tl.load(min_p_ptr + row)
        stays &= z >= tl.log(min_p)  # of 0: -inf
        stays &= x > _NOTHING
        if tl.max(tl.max(stays.to(tl.int32), axis=1), axis=0) > 0:
            position = tl.load(position_ptr + row)
            noise = gumbel(block, inside, position, tl.load(choice_ptr + row), tl.load(seed_ptr + row))
            reached = tl.where(stays, z + noise, _NOTHING)
            best = tl.max(tl.max(reached, axis=1), axis=0)
            winners = tl.where(stays & (reached == best), ids, V)
            chosen = tl.min(tl.min(winners, axis=1), axis=0)
    tl.store(best_ptr + row * TILES + tile, best)
    tl.store(chosen_ptr + row * TILES + tile, chosen)


@triton.jit
def finish_kernel(
    raw_ptr, peaks_ptr, tops_ptr, raw_peaks_ptr, sums_ptr, best_ptr, chosen_ptr, temperature_ptr, tokens_ptr,
    logprobs_ptr,
    V: tl.constexpr, TILES: tl.constexpr, MANY: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    _, token = _top(peaks_ptr, tops_ptr, row, TILES, MANY)
    tile = tl.arange(0, MANY)
    mask = tile < TILES
    if (tl.load(temperature_ptr + row) > 0.0) & (token >= 0):
        best = tl.load(best_ptr + row * TILES + tile, mask=mask, other=_NOTHING)
        chosen = tl.load(chosen_ptr + row * TILES + tile, mask=mask, other=V)
        token = tl.min(tl.where(best == tl.max(best, axis=0), chosen, V), axis=0)
    tl.store(tokens_ptr + row, token.to(tokens_ptr.dtype.element_ty))
    if SUMS:
        logprob = tl.full((), float("nan"), tl.float64)
        if token >= 0:
            peaks = tl.load(raw_peaks_ptr + row * TILES + tile, mask=mask, other=_NOTHING).to(tl.float64)
            sums = tl.load(sums_ptr + row * TILES + tile, mask=mask, other=0.0)
            peak = tl.max(peaks, axis=0)
            total = tl.sum(sums * tl.exp(peaks - peak), axis=0)
            logprob = tl.load(raw_ptr + row * V + token).to(tl.float64) - (peak + tl.log(total))
        tl.store(logprobs_ptr + row, logprob.to(tl.float32))


def sample(
    logits: torch.Tensor,
    settings: Settings,
    workspace: Workspace,
    tokens: torch.Tensor,
    logprobs: torch.Tensor | None = None,
    raw: torch.Tensor | None = None,
) -> None:
    """tokens[i] = the token that row i of `logits` [M, V] fp32 gives; logits are not changed.

    tokens: int32 or int64 [M], overwritten; -1 for a row that holds NaN or +inf, or nothing but -inf.
    logprobs: fp32 [M], overwritten: the chosen token's log-probability by `raw` fp32 [M, V], the logits
    before bias, penalties and temperature (None: `logits`), NaN beside a token of -1; or None.
    workspace: of at least M rows and just V tokens; V at most 2**20. logits and raw start on a multiple of
    16 bytes. Raises ValueError naming what does not fit; values (a temperature below 0, say) are the
    caller's to check.
    """
    check("sample", "logits", logits, torch.float32, -1, -1)
    rows, vocabulary = logits.shape
    if not 1 <= vocabulary <= MOST_TOKENS:
        raise ValueError(f"sample: logits of {vocabulary} tokens, not 1 to {MOST_TOKENS}")
    check("sample", "tokens", tokens, (torch.int32, torch.int64), rows)
    for name, dtype in _SETTINGS.items():
        check("sample", name, getattr(settings, name), dtype, rows)
    if logprobs is not None:
        check("sample", "logprobs", logprobs, torch.float32, rows)
    if raw is not None:
        check("sample", "raw", raw, torch.float32, rows, vocabulary)
    tiles = -(-vocabulary // TILE)
    w, s = workspace, settings
    check("sample", "workspace", w.peaks, torch.float32, -1, tiles)
    if len(w.peaks) < rows:
        raise ValueError(f"sample: workspace is for {len(w.peaks)} rows, not {rows}")
    tensors = {name: getattr(s, name) for name in _SETTINGS}
    tensors |= {"tokens": tokens, "logprobs": logprobs, "raw": raw, "workspace": w.peaks}
    same_device("sample", logits=logits, **tensors)
    check_aligned("sample", logits=logits, raw=raw)
    sizes = {"V": vocabulary, "TILES": tiles, "MANY": next_power_of_2(tiles)}
    wanted, other = logprobs is not None, logits if raw is None else raw
    launch(
        tiles_kernel, (rows, tiles), logits, other, w.peaks, w.tops, w.raw_peaks, w.sums,
        warps=_WARPS, V=vocabulary, TILES=tiles, TILE=TILE, RAW=raw is not None, SUMS=wanted,
    )  # fmt: skip
    launch(
        filter_kernel, (rows,), logits, w.peaks, w.tops, s.temperature, s.top_k, s.top_p, w.edges, w.limits,
        warps=FILTER_WARPS, **sizes,
    )  # fmt: skip
    launch(
        draw_kernel, (rows, tiles), logits, w.peaks, w.tops, w.edges, w.limits, s.temperature, s.min_p,
        s.seed, s.position, s.choice, w.best, w.chosen,
        warps=_WARPS, BLOCKS=_BLOCKS, BLOCK=BLOCK, **sizes,
    )  # fmt: skip
    launch(
        finish_kernel, (rows,), other, w.peaks, w.tops, w.raw_peaks, w.sums, w.best, w.chosen, s.temperature,
        tokens, logprobs if wanted else logits, warps=_WARPS, SUMS=wanted, **sizes,
    )  # fmt: skip


_SETTINGS = {
    "temperature": torch.float64,
    "top_k": torch.int32,
    "top_p": torch.float64,
    "min_p": torch.float64,
    "seed": torch.int64,
    "position": torch.int64,
    "choice": torch.int32,
}
