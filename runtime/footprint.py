"""How much of a GPU's memory a rank's weights take and how much of it every step reads, by a header alone.

Follows what the loader and `kernels.gpu.planar.prepare` make of each tensor: planes padded to 128 columns,
sub-scales of 8 bits, words of d and m. Knows no GPU and no torch; a test holds it against real shards.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd

from runtime.model.header import OpenModel
from runtime.model.layout import RunShare, shard_slices, times
from runtime.model.units import Span
from runtime.weights.blocks import SPECS
from runtime.weights.formats import TensorInfo, TensorType
from runtime.weights.packed import MAX_GROUP, PackedInfo
from runtime.weights.plan import INT4_GROUP, Slice, is_quantizable

BLOCK = 128  # columns of one turn of the kernel's loop
_MINIMA = {TensorType.Q4_1, TensorType.Q5_1, TensorType.Q2_K, TensorType.Q4_K, TensorType.Q5_K}
_SUB_SCALES = {TensorType.Q2_K, TensorType.Q3_K, TensorType.Q4_K, TensorType.Q5_K, TensorType.Q6_K}
_SUB_MINIMA = {TensorType.Q4_K, TensorType.Q5_K}  # Q2_K keeps both in one byte


@dataclass(frozen=True, slots=True)
class Footprint:
    """Of one rank. `streamed` leaves out the embedding, of which a step reads a few rows; `weights` are the
    numbers that a token is multiplied with."""

    held: int
    streamed: int
    weights: int


@dataclass(frozen=True, slots=True)
class _Form:
    """A quantised slice as it is loaded; as in `weights.planar.Planar`."""

    bits: tuple[int, ...]
    group: int
    super_group: int
    minimum: bool
    sub_scales: bool = False
    sub_minima: bool = False

    def cut(self, start: int, stop: int) -> _Form:
        return replace(
            self, group=gcd(self.group, start, stop), super_group=gcd(self.super_group, start, stop)
        )


def rank_footprint(opened: OpenModel, run: Span, layers: Span | None = None) -> Footprint:
    """What the rank that holds units `run` of `layers` (None: of all) keeps on its GPU."""
    spec, mine = opened.spec, opened.units[run[0] : run[1]]
    first_layer, last_layer = layers or (0, spec.layers)
    embeds, ends = first_layer == 0, last_layer == spec.layers
    heads = [times(unit.heads, spec.head_dim) for unit in mine]
    first = times(RunShare.of(mine).heads, spec.head_dim)[0]
    held = embedding = weights = 0
    for wanted in shard_slices(spec, opened.units, run, layers):
        info = opened.checkpoint.tensors[wanted.name]
        rows = wanted.rows[1] - wanted.rows[0]
        form = _form(info, wanted, opened.quantize)
        if wanted.name == "token_embd.weight":
            if embeds:
                embedding = _loaded_bytes(info, form, rows, spec.hidden)
                held += embedding
            if not (spec.tied_head and ends):
                continue
        elif info.rows == 1:
            held += 4 * info.cols  # norms and rope factors, in fp32
            continue
        if wanted.name.endswith("attn_output.weight"):
            pieces = [(start - first, stop - first) for start, stop in heads]
        else:
            pieces = [(0, wanted.cols[1] - wanted.cols[0])]
        for start, stop in pieces:
            cut = form.cut(start, stop) if form else None
            held += _prepared_bytes(cut, rows, stop - start)
            weights += rows * (stop - start)
    return Footprint(held, held - embedding, weights)


def _form(info: TensorInfo | PackedInfo, wanted: Slice, quantize: str | None) -> _Form | None:
    """None for what stays dense."""
    start, stop = wanted.cols
    if isinstance(info, PackedInfo):
        format = info.type
        group = gcd(MAX_GROUP, format.block, start, stop)
        free = not format.symmetric
        return _Form((format.bits,), group, group, minimum=free, sub_minima=free)
    if quantize is not None and is_quantizable(info):
        return _Form((4,), INT4_GROUP, INT4_GROUP, minimum=True).cut(start, stop)
    if info.type not in SPECS:
        return None
    spec = SPECS[info.type]
    return _Form(
        spec.bits,
        spec.group,
        spec.super_group,
        minimum=info.type in _MINIMA,
        sub_scales=info.type in _SUB_SCALES,
        sub_minima=info.type in _SUB_MINIMA,
    ).cut(start, stop)


def _planes(form: _Form, rows: int, cols: int) -> int:
    return rows * -(-cols // BLOCK) * BLOCK * sum(form.bits) // 8


def _loaded_bytes(info: TensorInfo | PackedInfo, form: _Form | None, rows: int, cols: int) -> int:
    """As the loader hands it out, which is how the embedding stays."""
    if form is None:
        return rows * cols * info.type.block_bytes
    scales = 2 * (cols // form.super_group) * (1 + form.minimum)
    scales += (cols // form.group) * (form.sub_scales + form.sub_minima)
    return _planes(form, rows, cols) + rows * scales


def _prepared_bytes(form: _Form | None, rows: int, cols: int) -> int:
    """As the kernel reads it: scales in words of 32 bits, as many as whole blocks take."""
    if form is None:
        return rows * -(-cols // BLOCK) * BLOCK * 2
    if form.sub_scales:
        plain = form.group in (16, 32) and form.super_group % BLOCK == 0
    else:
        plain = not form.sub_minima and (form.group % BLOCK == 0 or form.group in (32, 64))
    if not plain:  # scale and offset a group, computed once
        group = form.group if form.group % BLOCK == 0 or form.group in (16, 32, 64) else 16
        return _planes(form, rows, cols) + 4 * rows * _padded(cols // group, max(1, BLOCK // group))
    words = cols // form.super_group
    words = _padded(words if form.minimum else -(-words // 2))
    groups = _padded(-(-(cols // form.group) // 8) * 2)
    words += groups * (form.sub_scales + form.sub_minima)
    return _planes(form, rows, cols) + 4 * rows * words


def _padded(words: int, block: int = 4) -> int:
    """`kernels.gpu.planar._columns`: to whole blocks, of four words where those are whole already."""
    return words + (-words % block or -words % 4)
