"""Which tensors a model has, and which ranges of them a rank reads: some units of some layers. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.model.spec import ModelSpec
from runtime.model.units import Span, Unit
from runtime.weights.plan import Slice


@dataclass(frozen=True, slots=True)
class RunShare:
    """The ranges of a run of units, contiguous over the whole model."""

    heads: Span
    kv_heads: Span
    ffn: Span
    vocab: Span

    @staticmethod
    def of(units: tuple[Unit, ...]) -> RunShare:
        def span(name: str) -> Span:
            return getattr(units[0], name)[0], getattr(units[-1], name)[1]

        return RunShare(span("heads"), span("kv_heads"), span("ffn"), span("vocab"))


def times(span: Span, factor: int) -> Span:
    return span[0] * factor, span[1] * factor


def expected_shapes(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """(rows, cols) of every tensor a file of this model must have; vectors have one row."""
    h, d = spec.hidden, spec.head_dim
    shapes = {"token_embd.weight": (spec.vocab, h), "output_norm.weight": (1, h)}
    if not spec.tied_head:
        shapes["output.weight"] = (spec.vocab, h)
    if spec.rope_factors:
        shapes["rope_freqs.weight"] = (1, d // 2)
    for i in range(spec.layers):
        shapes |= {
            f"blk.{i}.attn_norm.weight": (1, h),
            f"blk.{i}.attn_q.weight": (spec.heads * d, h),
            f"blk.{i}.attn_k.weight": (spec.kv_heads * d, h),
            f"blk.{i}.attn_v.weight": (spec.kv_heads * d, h),
            f"blk.{i}.attn_output.weight": (h, spec.heads * d),
            f"blk.{i}.ffn_norm.weight": (1, h),
            f"blk.{i}.ffn_gate.weight": (spec.ffn, h),
            f"blk.{i}.ffn_up.weight": (spec.ffn, h),
            f"blk.{i}.ffn_down.weight": (h, spec.ffn),
        }
    return shapes


def shard_slices(
    spec: ModelSpec, units: tuple[Unit, ...], run: Span, layers: Span | None = None
) -> list[Slice]:
    """The ranges a rank that holds units `run` of `layers` (None: of all) reads, in the order `build_shard`
    takes them."""
    first, last = layers or (0, spec.layers)
    embeds, ends = first == 0, last == spec.layers
    mine = units[run[0] : run[1]]
    share = RunShare.of(mine)
    h, d = spec.hidden, spec.head_dim
    slices = []
    if embeds or (ends and spec.tied_head):
        slices.append(Slice("token_embd.weight", share.vocab, (0, h)))
    if ends:
        slices.append(Slice("output_norm.weight", (0, 1), (0, h)))
        if not spec.tied_head:
            slices.append(Slice("output.weight", share.vocab, (0, h)))
    if spec.rope_factors:
        slices.append(Slice("rope_freqs.weight", (0, 1), (0, d // 2)))
    for i in range(first, last):
        slices += [
            Slice(f"blk.{i}.attn_norm.weight", (0, 1), (0, h)),
            Slice(f"blk.{i}.attn_q.weight", times(share.heads, d), (0, h)),
            Slice(f"blk.{i}.attn_k.weight", times(share.kv_heads, d), (0, h)),
            Slice(f"blk.{i}.attn_v.weight", times(share.kv_heads, d), (0, h)),
            Slice(f"blk.{i}.attn_output.weight", (0, h), times(share.heads, d)),
            Slice(f"blk.{i}.ffn_norm.weight", (0, 1), (0, h)),
        ]
        if share.ffn[0] < share.ffn[1]:
            slices += [
                Slice(f"blk.{i}.ffn_gate.weight", share.ffn, (0, h)),
                Slice(f"blk.{i}.ffn_up.weight", share.ffn, (0, h)),
                *(Slice(f"blk.{i}.ffn_down.weight", (0, h), u.ffn) for u in mine if u.ffn[0] < u.ffn[1]),
            ]
    return slices
