"""The forward pass of one rank on a GPU: tokens in, logits of chosen rows out. A rank of one stage among
several takes the residual stream in the place of tokens, or gives it in the place of logits.

Per layer: norm, q k v, rotate and store, attention, its output, norm, gate and up, down. Products hand
partial sums to whoever comes next, who adds them in the tree's order. Everything follows from shapes and from
tensors on the device, so a step can be captured in a CUDA graph and replayed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch

from kernels.gpu.attention import paged_attention, workspace_floats
from kernels.gpu.embedding import embed
from kernels.gpu.linear import gated_linear, linear, linear_pair
from kernels.gpu.norm import add_norm
from kernels.gpu.planar import PlanarWeight
from kernels.gpu.rope import rope_store
from kernels.gpu.tree import merges
from runtime.model.communicator import Communicator
from runtime.model.forward import rope_table
from runtime.model.gpu.shard import DTYPE, GpuShard, RowParallel
from runtime.model.reduce import UnitSum
from runtime.model.units import fold, rank_units


@dataclass(frozen=True, slots=True)
class GpuBatch:
    """One step's rows, flattened over B sequences; all int32 on the device. Padding rows have slot -1,
    padding sequences no rows and context 0."""

    tokens: torch.Tensor  # [M]
    positions: torch.Tensor  # [M]
    slots: torch.Tensor  # [M]: where each row's K and V go, block * block_size + offset
    block_table: torch.Tensor  # [B, most blocks]
    query_start: torch.Tensor  # [B + 1]
    context_len: torch.Tensor  # [B]: positions after this step
    sampled: torch.Tensor  # [S]: rows whose logits are wanted
    longest: int  # rows of the longest sequence
    split_rows: int = 1  # rows up to which a sequence's attention is shared out over many programs


class GpuForward:
    """A shard bound to its KV cache and its group."""

    def __init__(
        self,
        shard: GpuShard,
        cache: torch.Tensor,
        comm: Communicator,
        max_positions: int,
        scales: torch.Tensor | None = None,
    ):
        """cache [layers held, blocks, 2, KV heads held, block_size, D]; scales, of an fp8 cache: fp32 of the
        same shape without D."""
        self.shard = shard
        self.cache = cache
        self.scales = scales
        self.workspace: torch.Tensor | None = None  # of attention, fp32; None: each step takes its own
        self.comm = comm
        spec = shard.spec
        cos, sin = rope_table(spec, shard.rope_factors, max_positions)
        half = spec.head_dim // 2
        self.cos = cos[:, 0, :half].contiguous().to(shard.device)
        self.sin = sin[:, 0, half:].contiguous().to(shard.device)  # the table's first half is negated
        held = shard.units[shard.run[0] : shard.run[1]]
        self.kv_heads = held[-1].kv_heads[1] - held[0].kv_heads[0]
        self.heads = held[-1].heads[1] - held[0].heads[0]
        self.ffn = held[-1].ffn[1] - held[0].ffn[0]
        vocab = [shard.units[start].vocab[0] for start, _ in rank_units(len(shard.units), comm.size)]
        self.vocab_widths = [b - a for a, b in pairwise([*vocab, spec.vocab])]
        no_ffn = [u.ffn[0] == u.ffn[1] for u in shard.units]
        self.sum_attention = UnitSum([False] * len(shard.units), comm, torch.float32, shard.device)
        self.sum_ffn = UnitSum(no_ffn, comm, torch.float32, shard.device)

    def logits(self, batch: GpuBatch) -> torch.Tensor | None:
        """Run a model that is all here; the KV cache is written. fp32 [S, V] at rank 0, None elsewhere."""
        return self.head(self.layers(self.embed(batch.tokens), batch), batch)

    def layers(self, residual: torch.Tensor, batch: GpuBatch) -> torch.Tensor:
        """The residual stream fp32 [M, H] before the layers held here -> the same after them, whole: the last
        layer's sums are added by the operation that adds them before a norm, to the same bits. Writes the KV
        cache, and into `residual`."""
        shard, spec = self.shard, self.shard.spec
        m, new = batch.tokens.shape[0], self._new
        h, q = new(m, spec.hidden), new(m, self.heads, spec.head_dim)
        attended, inner = new(m, self.heads, spec.head_dim), new(m, self.ffn)
        capacity = batch.block_table.shape[1] * self.cache.shape[4]
        workspace = self.workspace
        if workspace is None:
            scratch = workspace_floats(
                batch.block_table.shape[0], self.heads, spec.head_dim, capacity, split_rows=batch.split_rows
            )
            workspace = new(scratch, dtype=torch.float32)
        partials = None
        each_scales = [None] * len(shard.layers) if self.scales is None else self.scales
        for layer, cache, scales in zip(shard.layers, self.cache, each_scales, strict=True):
            add_norm(residual, partials, layer.attention_norm, spec.norm_eps, h)
            rope_store(
                side_by_side(h, layer.qkv), batch.positions, batch.slots, self.cos, self.sin, q, cache,
                heads=self.heads, kv_heads=self.kv_heads, head_dim=spec.head_dim, scales=scales,
            )  # fmt: skip
            paged_attention(
                q, cache, batch.block_table, batch.query_start, batch.context_len, attended, workspace,
                scale=spec.head_dim**-0.5, window=spec.sliding_window, longest=batch.longest,
                split_rows=batch.split_rows, scales=scales,
            )  # fmt: skip
            partials = self._product(attended.view(m, -1), layer.attention_output, self.sum_attention)
            add_norm(residual, partials, layer.ffn_norm, spec.norm_eps, h)
            if layer.gate is not None:
                gated_linear(h, layer.gate, layer.up, inner)
            partials = self._product(inner, layer.down, self.sum_ffn)
        add_norm(residual, partials, None, spec.norm_eps, None)
        return residual

    def head(self, residual: torch.Tensor, batch: GpuBatch) -> torch.Tensor | None:
        """The residual stream after the last layer -> fp32 [S, V] at rank 0, None elsewhere."""
        shard, spec = self.shard, self.shard.spec
        if not len(batch.sampled):  # a prompt's piece, or tokens that a draft model follows
            return self._new(0, spec.vocab, dtype=torch.float32) if self.comm.rank == 0 else None
        chosen = residual.index_select(0, batch.sampled)
        out = self._new(*chosen.shape)
        add_norm(chosen, None, shard.output_norm, spec.norm_eps, out)
        share = folded(linear(out, shard.head))
        if self.comm.size == 1:
            return share
        sizes = [out.shape[0] * width * 4 for width in self.vocab_widths]
        gathered = self.comm.gather(share.contiguous().view(-1).view(torch.uint8), sizes)
        if gathered is None:
            return None
        return torch.cat([g.view(torch.float32).view(out.shape[0], -1) for g in gathered], dim=1)

    def _new(self, *shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.shard.device)

    def _product(self, x: torch.Tensor, weights: RowParallel, reduce: UnitSum) -> torch.Tensor:
        """Partial sums fp32 [S, M, H] over all units, of all ranks."""
        m, width = x.shape[0], self.shard.spec.hidden
        spans = reduce.spans[self.comm.rank]
        sums = dict(zip(weights.subtrees, zip(weights.weights, weights.columns, strict=True), strict=True))
        if self.comm.size == 1 and len(sums[spans[0]][0]) == 1:
            return linear(x, sums[spans[0]][0][0])
        mine = [_subtree_sum(x, span, *sums[span]) for span in spans]
        whole = mine[0] if self.comm.size == 1 else reduce.exchange(mine, m, width)
        return whole.view(1, m, width)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """fp32 [M, H], in the first stage. Every rank gives the rows it holds and zeros for the rest; exactly
        one is not zero."""
        shape = (tokens.shape[0], self.shard.spec.hidden)
        rows = torch.empty(shape, dtype=torch.float32, device=self.shard.device)
        embed(self.shard.embedding, tokens, rows, self.shard.vocab[0])
        if self.comm.size == 1:
            return rows
        parts = self.comm.all_gather(rows.view(-1).view(torch.uint8), [rows.nbytes] * self.comm.size)
        total = torch.zeros_like(rows)
        for part in parts:
            total += part.view(torch.float32).view(shape)
        return total


def side_by_side(x: torch.Tensor, weights: tuple[PlanarWeight, ...]) -> torch.Tensor:
    """Products of x with weights of up to three formats: fp32 partial sums [S, M, all rows]."""
    if len(weights) == 1:
        return linear(x, weights[0])
    if len(weights) == 2:
        return linear_pair(x, *weights)
    # Each may come in splits of its own number, so they are folded before they are joined.
    parts = (linear_pair(x, *weights[:2]), *(linear(x, w) for w in weights[2:]))
    return torch.cat([folded(part) for part in parts], dim=1)[None]


def folded(partials: torch.Tensor) -> torch.Tensor:
    """fp32 [S, M, N] added in the tree's order -> [M, N]."""
    pending: list[torch.Tensor] = []
    for part, additions in zip(partials, merges(len(partials)), strict=True):
        pending.append(part)
        for _ in range(additions):
            right = pending.pop()
            pending.append(pending.pop() + right)
    return pending[0]


def _subtree_sum(x, span, weights, columns) -> torch.Tensor:
    """fp32 [M, H]: what the units of `span` give, folded; units that own nothing are skipped."""
    add: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = torch.add
    sums = [
        None if weight is None else folded(linear(x[:, start:stop].contiguous(), weight))
        for weight, (start, stop) in zip(weights, columns, strict=True)
    ]
    if len(sums) == 1:
        return sums[0]
    return fold({(u, u + 1): one for u, one in zip(range(*span), sums, strict=True)}, span, add)
