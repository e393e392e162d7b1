"""The forward pass of one rank: tokens in, normalised hidden states of chosen rows out.

A rank of one stage among several takes the residual stream in the place of tokens, or gives it in the place
of hidden states. Residual stream in fp32, everything between in the shard's type. Rows are independent of
each other; the ranks of a stage meet after the attention output, after the down projection, and for the
embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kernels.activation import gate
from kernels.attention import AttentionCall, Tiles, paged_attention, tile_buffers
from kernels.embedding import rows
from kernels.head import head_logits
from kernels.linear import TILE, Bf16Weight, Fp32Weight, linear, linear_parts
from kernels.norm import add_norm, rms_norm
from kernels.rope import rotate_and_store
from runtime.model.communicator import Communicator
from runtime.model.packing import Columns
from runtime.model.reduce import UnitSum
from runtime.model.shard import Layer, Shard
from runtime.model.spec import ModelSpec
from runtime.model.units import rank_units


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's rows, flattened over sequences."""

    tokens: torch.Tensor  # int64 [M]
    positions: torch.Tensor  # int64 [M]
    cache_rows: torch.Tensor  # int64 [M]: where each row's K and V go, block * block_size + offset
    calls: Sequence[AttentionCall] | Tiles
    sampled: torch.Tensor  # int64 [S]: rows whose logits are wanted


def rope_table(
    spec: ModelSpec, factors: torch.Tensor | None, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and signed sin, fp32 [length, 1, D], for `kernels.rope`, computed in float64 on one thread.

    Llama-3 scaling as Meta published it: wavelengths beyond original_context / low_freq_factor are
    stretched by `factor`, those under original_context / high_freq_factor kept, between them blended.
    """
    half = spec.head_dim // 2
    inverse = spec.rope_theta ** (-np.arange(half, dtype=np.float64) / half)
    if factors is not None:
        inverse = inverse / factors.numpy().astype(np.float64)
    if spec.rope_llama3 is not None:
        scaling = spec.rope_llama3
        turns = scaling.original_context * inverse / (2 * np.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
        inverse = inverse * (smooth + (1 - smooth) / scaling.factor)
    angles = np.arange(length, dtype=np.float64)[:, None] / spec.rope_linear * inverse
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    both = np.concatenate((cos, cos), axis=1), np.concatenate((-sin, sin), axis=1)
    return torch.from_numpy(both[0])[:, None], torch.from_numpy(both[1])[:, None]


def new_cache(shard: Shard, total_blocks: int, block_size: int) -> torch.Tensor:
    """[layers, blocks, block_size, 2, KV heads held, D]. Zeros, not garbage: masked positions are multiplied
    by exact zeros, which a NaN would survive."""
    held = shard.units[shard.run[0] : shard.run[1]]
    kv_heads = held[-1].kv_heads[1] - held[0].kv_heads[0]
    shape = (len(shard.layers), total_blocks, block_size, 2, kv_heads, shard.spec.head_dim)
    return torch.zeros(shape, dtype=shard.dtype)


class Forward:
    """A shard bound to its KV cache and its group."""

    def __init__(self, shard: Shard, cache: torch.Tensor, comm: Communicator, max_positions: int):
        """cache [layers held, blocks, block_size, 2, KV heads held, D], zero where never written."""
        self.shard = shard
        self.cache = cache
        self.layer_caches = list(cache)  # [blocks, block_size, 2, KV heads, D] each
        self.cache_rows = [layer.view(-1, layer[0, 0].numel()) for layer in self.layer_caches]
        self.comm = comm
        spec = shard.spec
        self.cos, self.sin = rope_table(spec, shard.rope_factors, max_positions)
        held = shard.units[shard.run[0] : shard.run[1]]
        self.kv_heads = held[-1].kv_heads[1] - held[0].kv_heads[0]
        self.heads = held[-1].heads[1] - held[0].heads[0]
        self.scale = spec.head_dim**-0.5
        no_ffn = [u.ffn[0] == u.ffn[1] for u in shard.units]
        self.sum_attention = UnitSum([False] * len(shard.units), comm, shard.dtype)
        self.sum_ffn = UnitSum(no_ffn, comm, shard.dtype)
        # Dense products take whole tiles: the FFN's rows are then padded once, for all its products.
        weights = [w for layer in shard.layers if layer.ffn for w in layer.ffn.gate_up.parts]
        self.pads_ffn = all(isinstance(w, Bf16Weight | Fp32Weight) for w in weights)
        runs = rank_units(len(shard.units), comm.size)
        self.vocab_at = [shard.units[start].vocab[0] for start, _ in runs] + [spec.vocab]

    def hidden(self, batch: Batch) -> torch.Tensor:
        """Run all layers over a batch; the KV cache is written. Returns normalised fp32 [S, H] of the
        sampled rows."""
        return self.normalised(self.layers(self.embed(batch.tokens), batch), batch)

    def layers(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The residual stream fp32 [M, H] before the layers held here -> the same after them. Writes the KV
        cache, and into x."""
        shard, spec = self.shard, self.shard.spec
        m = batch.tokens.shape[0]
        if not 0 <= batch.cache_rows.min() <= batch.cache_rows.max() < self.cache_rows[0].shape[0]:
            raise ValueError(f"a plan names KV blocks outside the {self.cache.shape[1]} there are")
        cos = self.cos.index_select(0, batch.positions)
        sin = self.sin.index_select(0, batch.positions)
        q_shape = (m, self.kv_heads, spec.heads // spec.kv_heads, spec.head_dim)
        buffers = tile_buffers(batch.calls, q_shape, shard.dtype)
        attended = torch.empty(m, self.heads * spec.head_dim, dtype=shard.dtype)
        ffn_rows = -(-m // TILE) * TILE if self.pads_ffn else m
        h = rms_norm(x, shard.layers[0].attention_norm, spec.norm_eps, shard.dtype)
        for index, layer in enumerate(shard.layers):
            qkv = columns(h, layer.qkv)
            rotate_and_store(
                qkv, cos, sin, self.heads, self.kv_heads, self.cache_rows[index], batch.cache_rows
            )
            q = qkv[:, : self.heads * spec.head_dim].view(q_shape)
            paged_attention(q, self.layer_caches[index], batch.calls, buffers, self.scale, attended)
            partials = linear_parts(attended, layer.attention_output)
            h = self._take_up(x, self.sum_attention, partials, layer.ffn_norm, ffn_rows)
            partials = self._feed_forward(h, layer, m)
            if index + 1 < len(shard.layers):
                h = self._take_up(x, self.sum_ffn, partials, shard.layers[index + 1].attention_norm, m)
        x += self.sum_ffn(partials, m, spec.hidden)
        return x

    def normalised(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The residual stream after the last layer -> normalised fp32 [S, H] of the sampled rows."""
        chosen, shard = x.index_select(0, batch.sampled), self.shard
        return rms_norm(chosen, shard.output_norm, shard.spec.norm_eps, torch.float32)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """hidden fp32 [S, H] -> fp32 logits [S, V] at rank 0, None elsewhere."""
        start, stop = self.shard.vocab
        share, at = torch.empty(hidden.shape[0], stop - start), 0
        for head in self.shard.heads:
            head_logits(hidden, head, share[:, at : at + head.size])
            at += head.size
        if self.comm.size == 1:
            return share
        widths = [b - a for a, b in zip(self.vocab_at, self.vocab_at[1:], strict=False)]
        rows_ = hidden.shape[0]
        gathered = self.comm.gather(share.view(-1).view(torch.uint8), [rows_ * width * 4 for width in widths])
        if gathered is None:
            return None
        parts = [g.view(torch.float32).view(rows_, -1) for g in gathered]
        return torch.cat(parts, dim=1)

    def _take_up(
        self, x: torch.Tensor, unit_sum: UnitSum, partials: torch.Tensor, norm: torch.Tensor, rows_: int
    ) -> torch.Tensor:
        """x [M, H] += the sum over all units of what `partials` [units held here that have some, M, H] is a
        share of -> x normalised, zero rows up to `rows_`."""
        m, hidden = x.shape
        if self.comm.size == 1:
            order = unit_sum.order
        else:
            partials, order = unit_sum(partials, m, hidden)[None], ()
        if rows_ == m:
            h = mine = torch.empty(m, hidden, dtype=self.shard.dtype)
        else:
            h = torch.zeros(rows_, hidden, dtype=self.shard.dtype)
            mine = h[:m]
        add_norm(x, partials, order, norm, self.shard.spec.norm_eps, mine)
        return h

    def _feed_forward(self, h: torch.Tensor, layer: Layer, m: int) -> torch.Tensor:
        """Partial results of the FFN [units held here that own channels, M, H]; rows of h past `m` are
        padding."""
        if layer.ffn is None:
            return h.new_empty(0, m, self.shard.spec.hidden)
        both = columns(h, layer.ffn.gate_up)
        inner = torch.empty(m, both.shape[1] // 2, dtype=self.shard.dtype)
        gate(both if both.shape[0] == m else both[:m], inner)
        return linear_parts(inner, layer.ffn.down)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """int64 [M] -> fp32 [M, H], in the first stage. A rank looks up the tokens of its share of the
        vocabulary; ranks swap the rows."""
        if self.comm.size == 1:
            return rows(self.shard.embedding, tokens)
        owner = torch.bucketize(tokens, torch.tensor(self.vocab_at[1:-1]), right=True)
        mine = rows(self.shard.embedding, tokens[owner == self.comm.rank] - self.shard.vocab[0])
        width = self.shard.spec.hidden
        counts = torch.bincount(owner, minlength=self.comm.size).tolist()
        payloads = self.comm.all_gather(
            mine.reshape(-1).view(torch.uint8), [count * width * 4 for count in counts]
        )
        x = torch.empty(tokens.shape[0], width)
        for rank, payload in enumerate(payloads):
            if counts[rank]:
                x[owner == rank] = payload.view(torch.float32).view(-1, width)
        return x


def columns(x: torch.Tensor, weights: Columns) -> torch.Tensor:
    """x [M, K] through weights side by side -> [M, width]."""
    if len(weights.parts) == 1:
        return linear(x, weights.parts[0])
    out, at = x.new_empty(x.shape[0], weights.width), 0
    for part in weights.parts:
        linear(x, part, out[:, at : at + part.out_features])
        at += part.out_features
    return out
