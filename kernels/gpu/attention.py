"""Attention over a paged KV cache: prefill, decode, and both in one batch, with the same bits either way.

The query heads that read one KV head are packed into the rows of one tile (tokens x group), which meets that
head's KV in tiles of 64 positions. Queries are the M of the matrix instructions, always in multiples of the
same one, so how many share a tile shows in no row. A sequence of few rows (decode, a draft to be verified) is
shared out over programs by segments of 512 positions, which leave partial results that a second kernel folds;
a longer one is streamed, all its segments in one program. kernels/gpu/attention_fold.py has what fixes bits,
and docs/gpu/attention.md why it is built so. Knows nothing of how KV got into the cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kernels.gpu.attention_fold import SEGMENT, TILE, fold_segments
from kernels.gpu.attention_kernel import attend
from kernels.gpu.launch import INTERPRETED, check, launch, next_power_of_2, same_device
from kernels.gpu.overlap import overlapping

FP8 = torch.float8_e4m3fn
_NAME = "paged_attention"


@dataclass(frozen=True, slots=True)
class AttentionTuning:
    """Launch shapes, none of which can change a bit. Widths are query rows (tokens x group) a program takes:
    a power of two, at least 64 where matrix instructions are warp-group wide (sm_90 and up), else 16."""

    split_width: int = 64
    split_warps: int = 4
    split_stages: int = 3
    split_programs: int = 2048  # about as many programs share the segments; more exit early, empty
    stream_width: int = 128
    stream_warps: int = 8
    stream_stages: int = 2


def workspace_floats(batch: int, heads: int, head_dim: int, positions: int, *, split_rows: int = 1) -> int:
    """fp32 elements of workspace that `paged_attention` needs for a batch of so many sequences, of up to
    `positions` positions each (max_blocks x block_size)."""
    return batch * split_rows * heads * -(-positions // SEGMENT) * (head_dim + 2)


def tuning_for(head_dim: int, fp8: bool, generation: tuple[int, int]) -> AttentionTuning:
    """Launch shapes for a GPU by its compute capability, such as stay in registers. None is timed yet."""
    if generation >= (10, 0):
        few = fp8 and generation < (12, 0)  # which has no tensor memory to hold sums
        return AttentionTuning(
            split_warps=4 if few else 8, split_stages=2, stream_width=64, stream_stages=1 if fp8 else 2
        )
    if generation >= (9, 0):
        if head_dim > 128:
            return AttentionTuning(split_width=128, split_warps=8, split_stages=2)
        return AttentionTuning(split_stages=5)
    stages = 1 if fp8 and head_dim > 128 else 2
    return AttentionTuning(split_width=16, stream_width=64, stream_stages=stages)


def paged_attention(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start: torch.Tensor,
    context_len: torch.Tensor,
    out: torch.Tensor,
    workspace: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    scales: torch.Tensor | None = None,
    split_rows: int = 1,
    longest: int | None = None,
    tuning: AttentionTuning | None = None,
) -> None:
    """Causal attention of a step's rows over their sequences' KV; what a row gets depends on it alone.

    q: fp16 or bf16 [M, heads, D], D a multiple of 8 up to 256. cache: [blocks, 2, KV heads, block_size,
    D], keys then values, of q's type or float8_e4m3fn; `scales`, fp32 [blocks, 2, KV heads, block_size],
    multiply an fp8 cache, a token and head each. block_table: int32 [B, max_blocks]; query_start: int32
    [B + 1], sequence b's rows are query_start[b] .. query_start[b + 1] - 1; context_len: int32 [B], positions
    after this step, so that row i of n stands at context_len[b] - n + i; 0 for a padding sequence. What
    block_table holds past a sequence's end, and the cache outside its positions, is not looked at; all keys
    and values inside must be finite. out: as q; rows of no sequence are left alone.

    A row sees positions up to its own, the last `window` of them if given. `scale` multiplies q . k.
    Sequences of up to `split_rows` rows share their segments out over programs, through `workspace` (fp32,
    `workspace_floats`); longer ones are streamed. `longest` bounds the rows of any sequence, if the caller
    knows better than M: up to split_rows, nothing is launched for longer ones. Grids follow from shapes and
    these numbers alone, so a call can be captured in a CUDA graph.

    Raises ValueError naming the tensor or setting that does not fit."""
    group = _check(q, cache, block_table, query_start, context_len, out, scales, scale, window)
    rows, heads, dim = q.shape
    kv_heads, block_size = cache.shape[2:4]
    batch, max_blocks = block_table.shape
    generation = _generation(q.device)
    tuning = tuning or tuning_for(dim, cache.dtype == FP8, generation)
    longest = rows if longest is None else longest
    if split_rows < 0 or longest < 0:
        raise ValueError(f"{_NAME}: split_rows is {split_rows}, longest {longest}; neither may be negative")
    least = max(64 if generation >= (9, 0) and not INTERPRETED else 16, group)
    for name in ("split_width", "stream_width"):
        width = getattr(tuning, name)
        if width < least or width & (width - 1):
            raise ValueError(f"{_NAME}: {name} is {width}, not a power of two from {least} on")
    check(_NAME, "workspace", workspace, torch.float32, -1)
    needed = workspace_floats(batch, heads, dim, max_blocks * block_size, split_rows=split_rows)
    if workspace.numel() < needed:
        raise ValueError(f"{_NAME}: workspace has {workspace.numel()} elements, not {needed}")
    same_device(
        _NAME, q=q, cache=cache, block_table=block_table, query_start=query_start, context_len=context_len,
        out=out, workspace=workspace, scales=scales,
    )  # fmt: skip

    segments = -(-max_blocks * block_size // SEGMENT)
    slots = batch * split_rows * heads * segments
    partials = workspace[: slots * dim]
    peaks = workspace[slots * dim :]
    totals = workspace[slots * (dim + 1) :]
    if cache.dtype == FP8 and generation < (8, 9):
        cache = cache.view(torch.uint8)
    pointers = (q, cache, scales, block_table, query_start, context_len, out, peaks, totals, partials)
    numbers = (scale * math.log2(math.e), batch, max_blocks, split_rows, segments)
    padded = max(16, next_power_of_2(dim))  # 16: the least of a matrix instruction
    values = min(padded, 128)  # columns of V a program takes: more leave no room for registers
    parts = padded // values
    overlap = overlapping(q.device)
    shape = {
        "HEADS": heads, "KV_HEADS": kv_heads, "BLOCK": block_size, "D": dim, "PADDED": padded,
        "VALUES": values, "WINDOW": window or 0, "TILES": SEGMENT // TILE.value, "SCALED": scales is not None,
        "OVERLAP": overlap,
    }  # fmt: skip
    if split_rows:
        width = tuning.split_width
        tiles = -(-min(split_rows, longest) // (width // group))
        lanes = min(segments, -(-tuning.split_programs // max(1, kv_heads * batch * tiles)))
        grid = (lanes * parts, kv_heads, batch * tiles)
        launch(
            attend, grid, *pointers, *numbers, **shape, WIDTH=width, SPLIT=True,
            warps=tuning.split_warps, stages=tuning.split_stages,
        )  # fmt: skip
        grid = (batch * split_rows, heads)
        launch(
            fold_segments, grid, peaks, totals, partials, query_start, context_len, out, segments, split_rows,
            HEADS=heads, KV_HEADS=kv_heads, D=dim, PADDED=padded, WINDOW=window or 0, SPAN=SEGMENT,
            OVERLAP=overlap, warps=1, stages=4,
        )  # fmt: skip
    if longest > split_rows:
        width = tuning.stream_width
        grid = ((rows // (width // group) + batch) * parts, kv_heads)
        launch(
            attend, grid, *pointers, *numbers, **shape, WIDTH=width, SPLIT=False,
            warps=tuning.stream_warps, stages=tuning.stream_stages,
        )  # fmt: skip


def _generation(device: torch.device | str) -> tuple[int, int]:
    return (9, 0) if INTERPRETED else torch.cuda.get_device_capability(device)


def _check(q, cache, block_table, query_start, context_len, out, scales, scale, window) -> int:
    """Refuse what the kernels do not take; the query heads that read one KV head."""
    check(_NAME, "q", q, (torch.float16, torch.bfloat16), -1, -1, -1)
    rows, heads, dim = q.shape
    if dim % 8 or not 8 <= dim <= 256:
        raise ValueError(f"{_NAME}: head dimension {dim} is not a multiple of 8 up to 256")
    check(_NAME, "cache", cache, (q.dtype, FP8), -1, 2, -1, -1, dim)
    kv_heads, block_size = cache.shape[2:4]
    if block_size & (block_size - 1) or not 16 <= block_size <= 128:
        raise ValueError(f"{_NAME}: block size {block_size} is not a power of two from 16 to 128")
    if kv_heads < 1 or heads % kv_heads or not 1 <= heads // kv_heads <= 64:
        raise ValueError(f"{_NAME}: {heads} heads do not share {kv_heads} KV heads, 1 to 64 each")
    check(_NAME, "block_table", block_table, torch.int32, -1, -1)
    check(_NAME, "query_start", query_start, torch.int32, block_table.shape[0] + 1)
    check(_NAME, "context_len", context_len, torch.int32, block_table.shape[0])
    check(_NAME, "out", out, q.dtype, rows, heads, dim)
    if scales is not None:
        if cache.dtype != FP8:
            raise ValueError(f"{_NAME}: scales belong to an fp8 cache, and this one is {cache.dtype}")
        check(_NAME, "scales", scales, torch.float32, cache.shape[0], 2, kv_heads, block_size)
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"{_NAME}: scale is {scale}, not a positive number")
    if window is not None and window < 1:
        raise ValueError(f"{_NAME}: window is {window}, not a positive number of positions")
    return heads // kv_heads
