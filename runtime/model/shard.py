"""What one rank holds of a model: the ranges that `layout` plans, turned into the operators' own weights.

Which operator serves which weight is part of the model's numerics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from kernels.embedding import RowTable, rows
from kernels.head import HeadShare
from kernels.linear import Weight, int4_takes, pack_bf16, pack_fp32, pack_int4
from runtime.model.layout import RunShare, times
from runtime.model.spec import ModelSpec
from runtime.model.units import Span, Unit
from runtime.weights.plan import Slice
from runtime.weights.planar import Planar

Loaded = torch.Tensor | Planar


@dataclass(frozen=True, slots=True)
class Columns:
    """Column-parallel weights side by side: outputs of the parts concatenate to `width` columns."""

    parts: tuple[Weight, ...]
    width: int


@dataclass(frozen=True, slots=True)
class Layer:
    """Per-unit entries are in the order of the rank's units; None where a unit owns no FFN channels."""

    attention_norm: torch.Tensor  # fp32 [H]
    qkv: Columns  # [q of all units | k | v]
    attention_output: tuple[Weight, ...]
    ffn_norm: torch.Tensor
    gate_up: tuple[Columns | None, ...]  # a unit's [gate | up]
    down: tuple[Weight | None, ...]


@dataclass(frozen=True, slots=True)
class Shard:
    spec: ModelSpec
    units: tuple[Unit, ...]  # of the whole model
    run: Span  # the units held here
    dtype: torch.dtype  # of activations and KV
    embedding: RowTable  # rows of the vocabulary held here
    vocab: Span
    layers: tuple[Layer, ...]
    output_norm: torch.Tensor
    heads: tuple[HeadShare, ...]
    rope_factors: torch.Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of all weights as they are held."""
        seen = {id(self.embedding): self.embedding.nbytes}
        for head in self.heads:
            seen[id(head.weight)] = head.weight.nbytes
            if head.table is not None:
                seen[id(head.table)] = head.table.nbytes
        for layer in self.layers:
            columns = [layer.qkv, *(c for c in layer.gate_up if c)]
            weights = [w for c in columns for w in c.parts] + list(layer.attention_output)
            for weight in weights + [w for w in layer.down if w]:
                seen[id(weight)] = weight.nbytes
        return sum(seen.values())


def build_shard(
    spec: ModelSpec,
    units: tuple[Unit, ...],
    run: Span,
    loaded: Iterator[tuple[Slice, Loaded]],
    *,
    dtype: torch.dtype,
    dense_ffn: bool,
) -> Shard:
    """Build a rank's weights from its slices, taken in the order of `shard_slices`.

    `dense_ffn` keeps the gate and up projections in bf16 even where int4 would do: on a CPU with AMX
    sixteen rows then cost what one does. Each file tensor is dropped as soon as it is packed.
    """
    mine = units[run[0] : run[1]]
    share = RunShare.of(mine)
    pack = _Packer(dtype)

    def take(name: str) -> Loaded:
        where, value = next(loaded)
        if where.name != name:
            raise ValueError(f"{where.name} arrived where {name} was planned")
        return value

    def vector(name: str) -> torch.Tensor:
        value = take(name)
        return (value.dequantize() if isinstance(value, Planar) else value.float()).reshape(-1).contiguous()

    embedding = _row_table(take("token_embd.weight"))
    output_norm = vector("output_norm.weight")
    table = embedding if spec.tied_head else _row_table(take("output.weight"))
    heads = tuple(_head_share(table, u.vocab, share.vocab[0], dtype) for u in mine)
    if not spec.tied_head and dtype == torch.float32:
        table = None
    factors = vector("rope_freqs.weight") if spec.rope_factors else None
    layers = []
    for i in range(spec.layers):
        name = f"blk.{i}.{{}}.weight".format
        attention_norm = vector(name("attn_norm"))
        order = None if spec.half_split_rope else _half_split_order(spec.head_dim)
        qkv = pack.columns(
            [
                (_reorder(take(name("attn_q")), order), [times(u.heads, spec.head_dim) for u in mine]),
                (_reorder(take(name("attn_k")), order), [times(u.kv_heads, spec.head_dim) for u in mine]),
                (take(name("attn_v")), [times(u.kv_heads, spec.head_dim) for u in mine]),
            ],
            dense=False,
            fuse=False,
        )
        output = tuple(pack.weight(take(name("attn_output")), dense=False) for _ in mine)
        ffn_norm = vector(name("ffn_norm"))
        gate_up: list[Columns | None] = [None] * len(mine)
        down: list[Weight | None] = [None] * len(mine)
        if share.ffn[0] < share.ffn[1]:
            gate, up = take(name("ffn_gate")), take(name("ffn_up"))
            for n, u in enumerate(mine):
                if u.ffn[0] == u.ffn[1]:
                    continue
                rows = slice(u.ffn[0] - share.ffn[0], u.ffn[1] - share.ffn[0])
                span = (0, u.ffn[1] - u.ffn[0])
                pair = [(_select(gate, rows), [span]), (_select(up, rows), [span])]
                gate_up[n] = pack.columns(pair, dense=dense_ffn, fuse=True)
                down[n] = pack.weight(take(name("ffn_down")), dense=False)
        layers.append(Layer(attention_norm, qkv, output, ffn_norm, tuple(gate_up), tuple(down)))
    if next(loaded, None) is not None:
        raise ValueError("more slices arrived than were planned")
    return Shard(spec, units, run, dtype, embedding, share.vocab, tuple(layers), output_norm, heads, factors)


class _Packer:
    """Chooses the operator of each weight. The choice looks at the type in the file and at shapes of units,
    never at a rank's share."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def weight(self, value: Loaded, *, dense: bool) -> Weight:
        if self.dtype == torch.float32:
            return pack_fp32(_dense(value, torch.float32))
        if not dense and _int4(value, value_rows(value)):
            return pack_int4(*_int4_parts(value))
        return pack_bf16(_dense(value, torch.bfloat16))

    def columns(self, parts: list[tuple[Loaded, list[Span]]], *, dense: bool, fuse: bool) -> Columns:
        """Tensors that share an input, each with the output ranges of its units.

        int4 columns do not depend on each other, so all of them go into one call where one group size
        allows it. Dense ones go a call a unit, or one call for all tensors of a unit with `fuse`, for which
        `parts` must be those of a single unit: a call's shape never follows from a rank's share."""
        width = sum(value_rows(value) for value, _ in parts)
        if self.dtype == torch.bfloat16 and not dense:
            packed = self._int4_columns(parts)
            if packed is not None:
                return Columns(packed, width)
        if fuse:
            whole = torch.cat([_dense(value, self.dtype) for value, _ in parts])
            return Columns((pack_fp32(whole) if self.dtype == torch.float32 else pack_bf16(whole),), width)
        weights = []
        for value, units in parts:
            base = units[0][0]
            for start, stop in units:
                weights.append(self.weight(_select(value, slice(start - base, stop - base)), dense=dense))
        return Columns(tuple(weights), width)

    def _int4_columns(self, parts: list[tuple[Loaded, list[Span]]]) -> tuple[Weight, ...] | None:
        for value, units in parts:
            if not all(_int4(value, stop - start) for start, stop in units):
                return None
        if len({value.group for value, _ in parts}) != 1:
            return None
        pieces = [_int4_parts(value) for value, _ in parts]
        joined = [torch.cat([piece[n] for piece in pieces]) for n in range(3)]
        return (pack_int4(*joined, pieces[0][3]),)


def value_rows(value: Loaded) -> int:
    return value.rows if isinstance(value, Planar) else value.shape[0]


def _int4(value: Loaded, rows: int) -> bool:
    """Whether the int4 operator serves `rows` rows (a unit's) of this tensor."""
    return isinstance(value, Planar) and sum(value.bits) == 4 and int4_takes(rows, value.cols, value.group)


def _int4_parts(value: Planar) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    scales = value.scales()
    return value.codes(), scales, value.offsets() - value.zero_point * scales, value.group


def _dense(value: Loaded, dtype: torch.dtype) -> torch.Tensor:
    return value.dequantize(dtype) if isinstance(value, Planar) else value.to(dtype)


def _select(value: Loaded, rows: slice) -> Loaded:
    return value.select_rows(rows) if isinstance(value, Planar) else value[rows]


def _half_split_order(head_dim: int) -> Callable[[int], torch.Tensor]:
    """Row order that turns heads of interleaved pairs (2j, 2j + 1) into halves (j, j + D/2)."""
    within = torch.cat((torch.arange(0, head_dim, 2), torch.arange(1, head_dim, 2)))

    def order(rows: int) -> torch.Tensor:
        heads = torch.arange(0, rows, head_dim)
        return (heads[:, None] + within).reshape(-1)

    return order


def _reorder(value: Loaded, order: Callable[[int], torch.Tensor] | None) -> Loaded:
    if order is None:
        return value
    index = order(value_rows(value))
    return value.select_rows(index) if isinstance(value, Planar) else value.index_select(0, index)


def _row_table(value: Loaded) -> RowTable:
    if not isinstance(value, Planar):
        return RowTable(value.contiguous(), None, None, 0)
    scales, offsets = value.scales().contiguous(), value.offsets()
    if value.zero_point == 0 and value.m is None:
        return RowTable(value.codes(), scales, None, value.group)
    if value.zero_point and value.m is None:
        signed = value.codes().to(torch.int16).sub_(value.zero_point).to(torch.int8)
        return RowTable(signed, scales, None, value.group)
    return RowTable(value.codes(), scales, offsets.contiguous(), value.group)


def _head_share(table: RowTable, vocab: Span, base: int, dtype: torch.dtype) -> HeadShare:
    index = torch.arange(vocab[0] - base, vocab[1] - base)
    exact = _table_rows(table, index, dtype)
    if dtype == torch.float32:
        return HeadShare(pack_fp32(exact), None, 0)
    return HeadShare(pack_bf16(exact), table, vocab[0] - base)


def _table_rows(table: RowTable, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    step = 4096  # bounds the fp32 copy
    return torch.cat([rows(table, part).to(dtype) for part in index.split(step)])
