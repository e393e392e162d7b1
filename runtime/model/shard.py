"""What one rank holds of a model: the ranges that `layout` plans, turned into the operators' own weights.

Which operator serves which weight is part of the model's numerics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from kernels.embedding import RowTable
from kernels.head import HeadShare, head_share, merged
from kernels.linear import Weight
from runtime.model.layout import RunShare
from runtime.model.packing import Columns, Loaded, Packer, row_count, select, select_cols
from runtime.model.spec import ModelSpec
from runtime.model.units import Span, Unit
from runtime.weights.plan import Slice
from runtime.weights.planar import Planar


@dataclass(frozen=True, slots=True)
class FeedForward:
    """The FFN of those units held here that own channels of it, side by side."""

    gate_up: Columns  # [gate of all units | up]
    down: tuple[Weight, ...]  # for `linear_parts`


@dataclass(frozen=True, slots=True)
class Layer:
    """What is held of one layer, units in the rank's order."""

    attention_norm: torch.Tensor  # fp32 [H]
    qkv: Columns  # [q of all units | k | v]
    attention_output: tuple[Weight, ...]  # for `linear_parts`
    ffn_norm: torch.Tensor
    ffn: FeedForward | None  # None where no unit held here owns channels


@dataclass(frozen=True, slots=True)
class Shard:
    spec: ModelSpec
    units: tuple[Unit, ...]  # of the whole model
    run: Span  # the units held here
    stage: Span  # the layers held here
    dtype: torch.dtype  # of activations and KV
    embedding: RowTable | None  # rows of the vocabulary held here; in the first stage alone
    vocab: Span
    layers: tuple[Layer, ...]
    output_norm: torch.Tensor | None  # in the last stage alone
    heads: tuple[HeadShare, ...]  # covering `vocab` in order; in the last stage alone
    rope_factors: torch.Tensor | None

    @property
    def first(self) -> bool:
        """Whether tokens come in here, not the residual stream."""
        return self.stage[0] == 0

    @property
    def last(self) -> bool:
        """Whether logits come out here, not the residual stream."""
        return self.stage[1] == self.spec.layers

    @property
    def nbytes(self) -> int:
        """Bytes of all weights as they are held."""
        seen = {id(self.embedding): self.embedding.nbytes} if self.embedding is not None else {}
        for head in self.heads:
            seen |= {id(part): part.nbytes for part in (head.weight, head.table) if part is not None}
        for layer in self.layers:
            weights = [*layer.qkv.parts, *layer.attention_output]
            if layer.ffn is not None:
                weights += [*layer.ffn.gate_up.parts, *layer.ffn.down]
            seen |= {id(weight): weight.nbytes for weight in weights}
        return sum(seen.values())


def build_shard(
    spec: ModelSpec,
    units: tuple[Unit, ...],
    run: Span,
    loaded: Iterator[tuple[Slice, Loaded]],
    *,
    dtype: torch.dtype,
    dense: frozenset[str],
    layers: Span | None = None,
) -> Shard:
    """Build a rank's weights from its slices, taken in the order of `shard_slices`. `layers`: None is all.

    `dense` names the roles (see `header.ROLES`) that stay bf16 even where codes would do. Each file tensor is
    dropped as soon as it is packed.
    """
    mine = units[run[0] : run[1]]
    stage = layers or (0, spec.layers)
    embeds, ends = stage[0] == 0, stage[1] == spec.layers
    share = RunShare.of(mine)
    pack = Packer(dtype, dense)

    def take(name: str) -> Loaded:
        where, value = next(loaded)
        if where.name != name:
            raise ValueError(f"{where.name} arrived where {name} was planned")
        return value

    def vector(name: str) -> torch.Tensor:
        value = take(name)
        return (value.dequantize() if isinstance(value, Planar) else value.float()).reshape(-1).contiguous()

    embedding = _row_table(take("token_embd.weight")) if embeds or (ends and spec.tied_head) else None
    output_norm, heads = None, ()
    if ends:
        output_norm = vector("output_norm.weight")
        table = embedding if spec.tied_head else _row_table(take("output.weight"))
        heads = merged([head_share(table, *within(u.vocab, share.vocab, 1), dtype) for u in mine])
        table = None  # shares that read it keep it
        if not embeds:
            embedding = None
    factors = vector("rope_freqs.weight") if spec.rope_factors else None
    held = []
    for i in range(*stage):
        name = f"blk.{i}.{{}}.weight".format
        attention_norm = vector(name("attn_norm"))
        order = None if spec.half_split_rope else half_split_order(spec.head_dim)
        q = reorder(take(name("attn_q")), order)
        k = reorder(take(name("attn_k")), order)
        q_spans = [within(u.heads, share.heads, spec.head_dim) for u in mine]
        kv_spans = [within(u.kv_heads, share.kv_heads, spec.head_dim) for u in mine]
        qkv = pack.columns([(q, q_spans), (k, kv_spans), (take(name("attn_v")), kv_spans)], "qkv")
        whole = take(name("attn_output"))
        output = pack.inputs([select_cols(whole, span) for span in q_spans], "attention_output")
        ffn_norm = vector(name("ffn_norm"))
        ffn = None
        if spans := [within(u.ffn, share.ffn, 1) for u in mine if u.ffn[0] < u.ffn[1]]:
            gate, up = take(name("ffn_gate")), take(name("ffn_up"))
            gate_up = pack.columns([(gate, spans), (up, spans)], "gate_up")
            ffn = FeedForward(gate_up, pack.inputs([take(name("ffn_down")) for _ in spans], "down"))
        held.append(Layer(attention_norm, qkv, output, ffn_norm, ffn))
    if next(loaded, None) is not None:
        raise ValueError("more slices arrived than were planned")
    return Shard(
        spec, units, run, stage, dtype, embedding, share.vocab, tuple(held), output_norm, heads, factors
    )


def within(part: Span, whole: Span, factor: int) -> Span:
    """`part` counted from the start of `whole`, in units of 1 / factor."""
    return (part[0] - whole[0]) * factor, (part[1] - whole[0]) * factor


def half_split_order(head_dim: int) -> Callable[[int], torch.Tensor]:
    """Row order that turns heads of interleaved pairs (2j, 2j + 1) into halves (j, j + D/2)."""
    order_within = torch.cat((torch.arange(0, head_dim, 2), torch.arange(1, head_dim, 2)))

    def order(rows: int) -> torch.Tensor:
        heads = torch.arange(0, rows, head_dim)
        return (heads[:, None] + order_within).reshape(-1)

    return order


def reorder(value: Loaded, order: Callable[[int], torch.Tensor] | None) -> Loaded:
    if order is None:
        return value
    return select(value, order(row_count(value)))


def _row_table(value: Loaded) -> RowTable:
    if not isinstance(value, Planar):
        return RowTable(value.contiguous(), None, None, 0)
    scales, offsets = value.scales().contiguous(), value.offsets()
    if value.zero_point == 0 and value.m is None:
        return RowTable(value.codes().clone(), scales, None, value.group)  # codes may view a wider plane
    if value.zero_point and value.m is None:
        signed = value.codes().to(torch.int16).sub_(value.zero_point).to(torch.int8)
        return RowTable(signed, scales, None, value.group)
    return RowTable(value.codes(), scales, offsets.contiguous(), value.group)
