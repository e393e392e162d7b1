"""Paged KV for tests: sequences laid into a cache full of traps, and what attention over them should give."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.gpu.attention import FP8, AttentionTuning, paged_attention, workspace_floats
from tests.gpu.device import DEVICE, ON_GPU

TILE = 64


@dataclass(frozen=True)
class Shape:
    heads: int = 4
    kv_heads: int = 2
    dim: int = 64
    block: int = 16
    dtype: torch.dtype = torch.float16
    kv_dtype: torch.dtype | None = None  # None: dtype
    scaled: bool = False


@dataclass
class Sequence:
    """q: [rows, heads, D]; keys, values: [context, kv_heads, D] of the cache's type; the rows stand last."""

    q: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    scales: torch.Tensor  # fp32 [2, context, kv_heads]

    def last(self, rows: int) -> Sequence:
        """The last `rows` rows alone, as decode or a later chunk of a prompt has them."""
        return Sequence(self.q[len(self.q) - rows :], self.keys, self.values, self.scales)

    def first(self, rows: int) -> Sequence:
        """The first `rows` rows, as an earlier chunk has them."""
        n = len(self.keys) - len(self.q) + rows
        return Sequence(self.q[:rows], self.keys[:n], self.values[:n], self.scales[:, :n])


def sequence(shape: Shape, context: int, rows: int, seed: int, *, sparse: bool = False) -> Sequence:
    """Random KV, or `sparse`: every matrix product is exact, in whatever order it is summed, so that bits can
    be compared where products are numpy's. A key holds one number, and so does a column of values in a tile.
    What still rounds are the sums over tiles and segments, and these cancel: keys repeat with a period of
    three tiles, with the values' sign turned, and values end before the rows. So a result is nothing but the
    rounding of its sums, and any other order of them shows, though results are narrower than the sums."""
    g = torch.Generator().manual_seed(seed)
    kv = shape.kv_dtype or shape.dtype
    q = torch.randn(rows, shape.heads, shape.dim, generator=g)
    keys = torch.randn(context, shape.kv_heads, shape.dim, generator=g)
    values = torch.randn(context, shape.kv_heads, shape.dim, generator=g)
    if sparse:
        at, column = torch.arange(context)[:, None, None], torch.arange(shape.dim)
        period, turn = at.flatten() % (3 * TILE), 1 - at // (3 * TILE) % 2 * 2
        chosen = torch.randint(shape.dim, (context, 1, 1), generator=g)
        keys = torch.where(column == chosen, keys * 24, 0.0)[period]
        values = torch.where(column % TILE == at % TILE, values.clamp(-1.9, 1.9), 0.0)[period]
        values *= turn * (at < (context - rows) // (6 * TILE) * (6 * TILE)) * (200 if kv == FP8 else 2**15)
    scales = torch.ones(2, context, shape.kv_heads)
    if shape.scaled:
        scales = torch.rand(2, context, shape.kv_heads, generator=g) * 2 + 0.1
    return Sequence(q.to(shape.dtype), keys.to(kv), values.to(kv), scales)


def expected(shape: Shape, s: Sequence, scale: float, window: int | None) -> torch.Tensor:
    """float64 [rows, heads, D], by the definition."""
    rows, context = len(s.q), len(s.keys)
    group = shape.heads // shape.kv_heads
    keys = (s.keys.double() * s.scales[0].double()[..., None]).repeat_interleave(group, 1)
    values = (s.values.double() * s.scales[1].double()[..., None]).repeat_interleave(group, 1)
    score = torch.einsum("qhd,phd->hqp", s.q.double(), keys) * scale
    at = torch.arange(context)
    mine = torch.arange(context - rows, context)[:, None]
    hidden = (at > mine) | (at <= mine - window if window else torch.zeros(1, dtype=torch.bool))
    weight = score.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hqp,phd->qhd", weight, values)


def attend(
    shape: Shape,
    sequences: list[Sequence | None],
    *,
    window: int | None = None,
    scale: float | None = None,
    seed: int = 0,
    padding: int = 3,
    **options,
) -> list[torch.Tensor]:
    """One call over a batch (None: a padding sequence); the rows of each. Every place that must not be read
    holds NaN or a block number far outside, and what must not be written is looked at afterwards."""
    g = torch.Generator().manual_seed(seed)
    kv, block = shape.kv_dtype or shape.dtype, shape.block
    present = [s for s in sequences if s is not None]
    most = max((-(-len(s.keys) // block) for s in present), default=0) + 2
    blocks = sum(-(-len(s.keys) // block) for s in present) + 3
    cache = torch.full((blocks, 2, shape.kv_heads, block, shape.dim), float("nan"))
    scales = torch.full((blocks, 2, shape.kv_heads, block), float("nan"))
    free = torch.randperm(blocks, generator=g).tolist()
    table = torch.full((len(sequences), most), 1 << 30, dtype=torch.int32)
    for b, s in enumerate(sequences):
        lost = 0  # positions no row sees any more: their blocks may be anyone's
        if s is not None and window is not None:
            lost = max(0, len(s.keys) - len(s.q) - window + 1)
        for i in range(-(-len(s.keys) // block) if s else 0):
            begin, end = i * block, min(len(s.keys), i * block + block)
            if end <= lost:
                continue
            table[b, i] = at = free.pop()
            begin = max(begin, lost)
            where = slice(begin - i * block, end - i * block)
            cache[at, 0, :, where] = s.keys[begin:end].float().transpose(0, 1)
            cache[at, 1, :, where] = s.values[begin:end].float().transpose(0, 1)
            scales[at, :, :, where] = s.scales[:, begin:end].transpose(1, 2)
    rows = [0 if s is None else len(s.q) for s in sequences]
    start = torch.tensor([0, *rows]).cumsum(0).to(torch.int32)
    context = torch.tensor([0 if s is None else len(s.keys) for s in sequences], dtype=torch.int32)
    q = torch.cat(
        [s.q for s in present] + [torch.full((padding, shape.heads, shape.dim), torch.nan, dtype=shape.dtype)]
    )
    out = torch.full_like(q, torch.nan)
    split_rows = options.get("split_rows", 1)
    floats = workspace_floats(len(rows), shape.heads, shape.dim, most * block, split_rows=split_rows)
    workspace = torch.full((floats + 5,), torch.nan)
    out, workspace = out.to(DEVICE), workspace.to(DEVICE)
    paged_attention(
        q.to(DEVICE), cache.to(kv).to(DEVICE), table.to(DEVICE), start.to(DEVICE), context.to(DEVICE), out,
        workspace, scale=scale or shape.dim**-0.5, window=window,
        scales=scales.to(DEVICE) if shape.scaled else None, **options,
    )  # fmt: skip
    out = out.cpu()
    assert out[sum(rows) :].isnan().all(), "rows of padding were written"
    assert workspace[floats:].isnan().all(), "wrote past the workspace"
    pieces = out[: sum(rows)].split(rows)
    assert all(not piece.isnan().any() for piece in pieces), "NaN leaked, or a row was left out"
    return list(pieces)


def narrow(width: int, **options) -> AttentionTuning:
    """Tiles of `width` query rows, or the narrowest the GPU has."""
    least = 64 if ON_GPU and torch.cuda.get_device_capability() >= (9, 0) else 16
    return AttentionTuning(split_width=max(width, least), stream_width=max(width, least), **options)


__all__ = ["FP8", "Sequence", "Shape", "attend", "expected", "narrow", "sequence"]
