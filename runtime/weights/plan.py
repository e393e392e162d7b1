"""Turns slices of tensors into the byte ranges that hold them, before anything is read. No torch, no I/O.

A slice is read on quant-block boundaries: the blocks that its columns touch, of its rows; of a packed layer
(GPTQ, AWQ) the words, scales and zero points that do. Ranges that would run into each other are one; nothing
else is read, save gaps of at most a twentieth of what is wanted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from runtime.weights.checkpoint import Checkpoint
from runtime.weights.formats import TensorInfo
from runtime.weights.packed import PackedInfo

INT4_GROUP = 32  # columns that int4 quantises together, counted from the tensor's first
_OVER_READ = 20  # a gap is read along where it costs at most 1 byte in 20


@dataclass(frozen=True, slots=True)
class Slice:
    """Rows and columns (start, stop) of a tensor, absolute. A vector is one row."""

    name: str
    rows: tuple[int, int]
    cols: tuple[int, int]


@dataclass(frozen=True, slots=True)
class ByteRange:
    """`count` runs of `nbytes` bytes, the first at `offset` of `file`, each `stride` bytes after the last.
    `total` bytes are read."""

    file: str
    offset: int
    nbytes: int
    count: int = 1
    stride: int = 0

    @property
    def total(self) -> int:
        return self.nbytes * self.count


@dataclass(frozen=True, slots=True)
class Read:
    """How a rectangle of one stored tensor is read: `gap` bytes follow each row's `row_bytes` wanted ones in
    what is read, where a contiguous read carries them along."""

    rows: int
    row_bytes: int
    gap: int
    range: ByteRange


@dataclass(frozen=True, slots=True)
class SlicePlan:
    """How one slice is read: `reads` are keyed by the parts of a packed layer, or "" for a plain tensor.
    `cols` are the columns that whole blocks (or quantisation groups) cover; `quantize` says that dense
    weights become int4."""

    slice: Slice
    info: TensorInfo | PackedInfo
    cols: tuple[int, int]
    reads: dict[str, Read]
    quantize: bool

    @property
    def total(self) -> int:
        """Bytes that are read."""
        return sum(read.range.total for read in self.reads.values())


def plan_slice(checkpoint: Checkpoint, wanted: Slice, quantize: str | None = None) -> SlicePlan:
    """ValueError if the tensor is not there or the slice leaves it."""
    info = checkpoint.tensors.get(wanted.name)
    if info is None:
        raise ValueError(f"{checkpoint.path} has no tensor {wanted.name}")
    (row, row_stop), (col, col_stop) = wanted.rows, wanted.cols
    if not (0 <= row < row_stop <= info.rows and 0 <= col < col_stop <= info.cols):
        raise ValueError(f"{wanted} leaves the tensor of {info.rows} x {info.cols}")
    if isinstance(info, PackedInfo):
        return SlicePlan(wanted, info, wanted.cols, packed_reads(info, wanted.rows, wanted.cols), False)
    to_int4 = quantize is not None and is_quantizable(info)
    block = INT4_GROUP if to_int4 else info.type.block
    cols = col // block * block, min(-(-col_stop // block) * block, info.cols)
    return SlicePlan(wanted, info, cols, {"": _rectangle(info, wanted.rows, cols)}, to_int4)


def packed_reads(info: PackedInfo, rows: tuple[int, int], cols: tuple[int, int]) -> dict[str, Read]:
    """What holds rows x cols of a packed layer, by part (layouts: see `packed`)."""
    format = info.type
    groups = _whole(cols, format.columns_a_scale(info.cols))
    row_words = _whole(rows, format.per_word)
    if format.method == "gptq":
        words = _whole(cols, format.per_word), rows
    else:
        words = cols, row_words
    reads = {
        "qweight": _rectangle(info.qweight, *words),
        "qzeros": _rectangle(info.qzeros, groups, row_words),
        "scales": _rectangle(info.scales, groups, rows),
    }
    if info.g_idx is not None:
        reads["g_idx"] = _rectangle(info.g_idx, (0, 1), cols)
    if info.bias is not None:
        reads["bias"] = _rectangle(info.bias, (0, 1), rows)
    return reads


def _whole(span: tuple[int, int], block: int) -> tuple[int, int]:
    """The blocks that a span touches."""
    return span[0] // block, -(-span[1] // block)


def _rectangle(info: TensorInfo, rows: tuple[int, int], cols: tuple[int, int]) -> Read:
    """`cols` stand on the boundaries of the type's blocks."""
    (row, row_stop), (first, last) = rows, cols
    before = first // info.type.block * info.type.block_bytes
    row_bytes = (last - first) // info.type.block * info.type.block_bytes
    count, gap = row_stop - row, info.row_bytes - row_bytes
    offset = info.offset + row * info.row_bytes + before
    if count == 1:
        gap = 0
    if gap * _OVER_READ <= row_bytes:
        joined = ByteRange(info.file, offset, count * (row_bytes + gap) - gap)
    else:
        joined, gap = ByteRange(info.file, offset, row_bytes, count, info.row_bytes), 0
    return Read(count, row_bytes, gap, joined)


def plan_reads(
    checkpoint: Checkpoint, slices: Iterable[Slice], quantize: str | None = None
) -> list[ByteRange]:
    """The byte ranges that `load` reads for these slices, one for each and for each part of a packed layer
    (their runs are strided where columns are cut). The sum of `total` is what it will count as read."""
    plans = (plan_slice(checkpoint, wanted, quantize) for wanted in slices)
    return [read.range for plan in plans for read in plan.reads.values()]


def is_quantizable(info: TensorInfo | PackedInfo) -> bool:
    """Whether --quantize applies: dense matrices of the layers. Embedding, head, norms, biases and routers
    keep their type, as they decide more than they weigh."""
    return (
        not info.type.quantized
        and len(info.shape) > 1
        and info.name.startswith("blk.")
        and not info.name.endswith("ffn_gate_inp.weight")
    )
