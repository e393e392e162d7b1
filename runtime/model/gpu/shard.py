"""What one rank holds of a model on a GPU: planar weights, as `kernels.gpu` reads them.

No dense copy of quantised weights is made. Which bytes a rank reads is `layout`'s business, as on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from kernels.gpu.planar import PlanarWeight, prepare, prepare_dense
from runtime.model.layout import RunShare
from runtime.model.packing import Loaded, select_cols
from runtime.model.shard import half_split_order, reorder, within
from runtime.model.spec import ModelSpec
from runtime.model.units import Span, Unit, subtrees
from runtime.weights.plan import Slice
from runtime.weights.planar import Planar

DTYPE = torch.float16  # of activations, and of KV unless it is FP8
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True, slots=True)
class RowParallel:
    """Weights of a product whose K is cut by units: for each subtree of the sum over units that this rank
    holds whole, the weights of its units and the columns of the input that they take. A subtree's weight is
    one, where its units are alike; else one a unit, None for a unit that owns nothing."""

    subtrees: tuple[Span, ...]
    weights: tuple[tuple[PlanarWeight | None, ...], ...]
    columns: tuple[tuple[Span, ...], ...]  # of the rank's own input, one a weight


@dataclass(frozen=True, slots=True)
class GpuLayer:
    attention_norm: torch.Tensor  # fp32 [H]
    qkv: tuple[PlanarWeight, ...]  # rows of q, k and v in order, neighbours of one type in one weight
    attention_output: RowParallel
    ffn_norm: torch.Tensor
    gate: PlanarWeight | None  # None where the rank owns no FFN channels
    up: PlanarWeight | None
    down: RowParallel


@dataclass(frozen=True, slots=True)
class GpuShard:
    spec: ModelSpec
    units: tuple[Unit, ...]  # of the whole model
    run: Span  # the units held here
    stage: Span  # the layers held here
    device: torch.device
    embedding: Loaded | None  # in the first stage alone
    vocab: Span  # rows of the vocabulary held here
    layers: tuple[GpuLayer, ...]
    output_norm: torch.Tensor | None  # in the last stage alone
    head: PlanarWeight | None  # in the last stage alone
    rope_factors: torch.Tensor | None
    kv_dtype: torch.dtype = DTYPE  # of keys and values; FP8 with a scale a token and head

    @property
    def nbytes(self) -> int:
        """Bytes of all weights as they are held."""
        total = sum(table.nbytes for table in (self.head, self.embedding) if table is not None)
        for layer in self.layers:
            rows = [w for r in (layer.attention_output, layer.down) for ws in r.weights for w in ws]
            total += sum(w.nbytes for w in (*layer.qkv, layer.gate, layer.up, *rows) if w is not None)
        return total


class Refused(ValueError):
    """A tensor that a kernel does not take: a number beyond fp16, or NaN, where a scale should be."""

    def __init__(self, tensor: str, reason: str):
        super().__init__(f"{tensor}: {reason}")
        self.tensor = tensor
        self.reason = reason


def build_gpu_shard(
    spec: ModelSpec,
    units: tuple[Unit, ...],
    run: Span,
    loaded: Iterator[tuple[Slice, Loaded]],
    *,
    device: torch.device | str,
    layers: Span | None = None,
    kv_dtype: torch.dtype = DTYPE,
) -> GpuShard:
    """Build a rank's weights from its slices, taken in the order of `shard_slices`. Each goes to the device
    as it arrives. `layers`: None is all. Raises Refused for a tensor that a kernel does not take."""
    device = torch.device(device)
    stage = layers or (0, spec.layers)
    embeds, ends = stage[0] == 0, stage[1] == spec.layers
    mine = units[run[0] : run[1]]
    share = RunShare.of(mine)
    taken = ""

    def take(name: str) -> Loaded:
        nonlocal taken
        where, value = next(loaded)
        if where.name != name:
            raise ValueError(f"{where.name} arrived where {name} was planned")
        taken = name
        return value.to(device)

    def vector(name: str) -> torch.Tensor:
        value = take(name)
        return (value.dequantize() if isinstance(value, Planar) else value.float()).reshape(-1).contiguous()

    def build() -> GpuShard:
        nonlocal taken
        embedding = output_norm = head = None
        if embeds or (ends and spec.tied_head):
            embedding = take("token_embd.weight").contiguous()
        if ends:
            output_norm = vector("output_norm.weight")
            table = embedding if spec.tied_head else take("output.weight")
            taken = "token_embd.weight" if spec.tied_head else taken
            head = _prepared([table])
        factors = vector("rope_freqs.weight").cpu() if spec.rope_factors else None
        return GpuShard(
            spec,
            units,
            run,
            stage,
            device,
            embedding if embeds else None,
            share.vocab,
            tuple(layer(i) for i in range(*stage)),
            output_norm,
            head,
            factors,
            kv_dtype,
        )

    def layer(index: int) -> GpuLayer:
        nonlocal taken
        name = f"blk.{index}.{{}}.weight".format
        attention_norm = vector(name("attn_norm"))
        order = None if spec.half_split_rope else half_split_order(spec.head_dim)
        q, k = (reorder(take(name(role)), order) for role in ("attn_q", "attn_k"))
        v = take(name("attn_v"))
        taken = f"{name('attn_q')}, attn_k or attn_v"
        qkv = _side_by_side([q, k, v])
        whole = take(name("attn_output"))
        spans = [within(u.heads, share.heads, spec.head_dim) for u in mine]
        output = _row_parallel([select_cols(whole, span) for span in spans], spans, run, len(units))
        ffn_norm = vector(name("ffn_norm"))
        gate = up = None
        parts: list[Loaded | None] = [None] * len(mine)
        spans = [within(u.ffn, share.ffn, 1) for u in mine]
        if share.ffn[0] < share.ffn[1]:
            gate, up = (_prepared([take(name(role))]) for role in ("ffn_gate", "ffn_up"))
            parts = [take(name("ffn_down")) if start < stop else None for start, stop in spans]
        down = _row_parallel(parts, spans, run, len(units))
        return GpuLayer(attention_norm, qkv, output, ffn_norm, gate, up, down)

    try:
        shard = build()
    except ValueError as error:
        raise Refused(taken, str(error).removeprefix("linear: ")) from error
    if next(loaded, None) is not None:
        raise ValueError("more slices arrived than were planned")
    return shard


def _prepared(parts: Sequence[Loaded]) -> PlanarWeight:
    planar = [part for part in parts if isinstance(part, Planar)]
    dense = [part for part in parts if isinstance(part, torch.Tensor)]
    return prepare(planar) if planar else prepare_dense(dense)


def _alike(a: Loaded, b: Loaded) -> bool:
    """Whether two tensors can share a weight."""
    if isinstance(a, Planar) and isinstance(b, Planar):
        same = ("type", "bits", "zero_point", "group", "super_group", "cols", "paired")
        return all(getattr(a, name) == getattr(b, name) for name in same)
    return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)


def _side_by_side(parts: Sequence[Loaded]) -> tuple[PlanarWeight, ...]:
    """Rows of all parts in order; neighbours that are alike in one weight."""
    groups: list[list[Loaded]] = []
    for part in parts:
        if groups and _alike(groups[-1][0], part):
            groups[-1].append(part)
        else:
            groups.append([part])
    stacked = []
    for group in groups:
        planar = [part for part in group if isinstance(part, Planar)]
        dense = [part for part in group if isinstance(part, torch.Tensor)]
        stacked.append(Planar.cat_rows(planar) if planar else torch.cat(dense))
    return tuple(_prepared([part]) for part in stacked)


def _row_parallel(
    parts: Sequence[Loaded | None], spans: Sequence[Span], run: Span, units: int
) -> RowParallel:
    """parts[i] is what unit run[0] + i owns of the weight, and spans[i] its columns of the rank's input."""
    trees = subtrees(run, units)
    weights, columns = [], []
    for start, stop in trees:
        own = range(start - run[0], stop - run[0])
        held = [part for part in (parts[i] for i in own) if part is not None]
        first = held[0] if held else None
        whole = len(held) == len(own) and all(
            _alike(first, part) and _width(first) == _width(part) for part in held
        )
        if whole:
            weights.append((_prepared(held),))
            columns.append(((spans[own[0]][0], spans[own[-1]][1]),))
        else:
            weights.append(tuple(None if parts[i] is None else _prepared([parts[i]]) for i in own))
            columns.append(tuple(spans[i] for i in own))
    return RowParallel(trees, tuple(weights), tuple(columns))


def _width(part: Loaded) -> int:
    return part.cols if isinstance(part, Planar) else part.shape[1]
