"""Turns slices of tensors into the byte ranges that hold them, before anything is read. No torch, no I/O.

A slice is read on quant-block boundaries: the blocks that its columns touch, of its rows. Ranges that would
run into each other are one; nothing else is read, save gaps of at most a twentieth of what is wanted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from runtime.weights.checkpoint import Checkpoint
from runtime.weights.formats import TensorInfo

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
class SlicePlan:
    """How one slice is read. `cols` are the columns that whole blocks (or quantisation groups) cover;
    `quantize` says that dense weights become int4. `gap` bytes follow each row's `row_bytes` wanted ones
    in what is read, where a contiguous read carries them along."""

    slice: Slice
    info: TensorInfo
    cols: tuple[int, int]
    row_bytes: int
    gap: int
    range: ByteRange
    quantize: bool


def plan_slice(checkpoint: Checkpoint, wanted: Slice, quantize: str | None = None) -> SlicePlan:
    """ValueError if the tensor is not there or the slice leaves it."""
    info = checkpoint.tensors.get(wanted.name)
    if info is None:
        raise ValueError(f"{checkpoint.path} has no tensor {wanted.name}")
    (row, row_stop), (col, col_stop) = wanted.rows, wanted.cols
    if not (0 <= row < row_stop <= info.rows and 0 <= col < col_stop <= info.cols):
        raise ValueError(f"{wanted} leaves the tensor of {info.rows} x {info.cols}")
    to_int4 = quantize is not None and is_quantizable(info)
    block = INT4_GROUP if to_int4 else info.type.block
    first, last = col // block * block, min(-(-col_stop // block) * block, info.cols)
    before = first // info.type.block * info.type.block_bytes
    row_bytes = (last - first) // info.type.block * info.type.block_bytes
    rows, gap = row_stop - row, info.row_bytes - row_bytes
    offset = info.offset + row * info.row_bytes + before
    if rows == 1:
        gap = 0
    if gap * _OVER_READ <= row_bytes:
        joined = ByteRange(info.file, offset, rows * (row_bytes + gap) - gap)
    else:
        joined, gap = ByteRange(info.file, offset, row_bytes, rows, info.row_bytes), 0
    return SlicePlan(wanted, info, (first, last), row_bytes, gap, joined, to_int4)


def plan_reads(
    checkpoint: Checkpoint, slices: Iterable[Slice], quantize: str | None = None
) -> list[ByteRange]:
    """The byte ranges that `load` reads for these slices, one for each (its runs are strided where columns
    are cut). The sum of `total` is what it will count as read."""
    return [plan_slice(checkpoint, wanted, quantize).range for wanted in slices]


def is_quantizable(info: TensorInfo) -> bool:
    """Whether --quantize applies: dense matrices of the layers. Embedding, head, norms, biases and routers
    keep their type, as they decide more than they weigh."""
    return (
        not info.type.quantized
        and len(info.shape) > 1
        and info.name.startswith("blk.")
        and not info.name.endswith("ffn_gate_inp.weight")
    )
