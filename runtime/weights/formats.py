"""The tensor types a checkpoint may hold, and where a tensor lies. Knows neither torch nor any file.

Ids and block layouts are those of ggml (ggml/include/ggml.h, ggml/src/ggml-common.h); a block is the unit
in which a type is stored: `block` consecutive elements of a row in `block_bytes` bytes.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from runtime.errors import BadModelFile, UnsupportedModel


class TensorType(enum.StrEnum):
    """A tensor type that this runtime serves. Equal to its name as a string."""

    id: int  # ggml's number
    block: int  # elements a block
    block_bytes: int  # bytes a block
    quantized: bool  # False for plain floats

    def __new__(cls, name: str, id: int, block: int, block_bytes: int) -> TensorType:
        member = str.__new__(cls, name)
        member._value_ = name
        member.id, member.block, member.block_bytes = id, block, block_bytes
        member.quantized = block > 1
        return member

    F32 = "F32", 0, 1, 4
    F16 = "F16", 1, 1, 2
    BF16 = "BF16", 30, 1, 2
    Q4_0 = "Q4_0", 2, 32, 18
    Q4_1 = "Q4_1", 3, 32, 20
    Q5_0 = "Q5_0", 6, 32, 22
    Q5_1 = "Q5_1", 7, 32, 24
    Q8_0 = "Q8_0", 8, 32, 34
    Q2_K = "Q2_K", 10, 256, 84
    Q3_K = "Q3_K", 11, 256, 110
    Q4_K = "Q4_K", 12, 256, 144
    Q5_K = "Q5_K", 13, 256, 176
    Q6_K = "Q6_K", 14, 256, 210


class WordType(enum.StrEnum):
    """What a tensor's elements are where they are no weights, but words that hold packed ones."""

    I32 = "I32"

    @property
    def block(self) -> int:
        return 1

    @property
    def block_bytes(self) -> int:
        return 4

    @property
    def quantized(self) -> bool:
        return False


BY_ID = {member.id: member for member in TensorType}

# Types that sound files hold and that are not served, so that the refusal can say which it is.
_REFUSED = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
    22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M",
    34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip


def type_by_id(id: int, file: str, tensor: str) -> TensorType:
    """The type that ggml numbers `id`. UnsupportedModel for one that is known and not served, BadModelFile
    for one that does not exist."""
    if id in BY_ID:
        return BY_ID[id]
    if id in _REFUSED:
        raise UnsupportedModel(
            f"{file}: {tensor}: tensor type {_REFUSED[id]} is not served; "
            f"convert the model to one of {', '.join(TensorType)}"
        )
    raise BadModelFile(file, tensor, f"unknown tensor type {id}")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor and where its bytes lie: rows x cols elements, row after row, `cols` contiguous.

    `shape` is outermost first (the reverse of GGUF's order); shape[-1] == cols and the product of the
    others is rows (1 for a vector). `offset` is absolute in `file`. `nbytes` counts whole blocks."""

    name: str
    type: TensorType | WordType
    rows: int
    cols: int
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int

    @property
    def row_bytes(self) -> int:
        return self.cols // self.type.block * self.type.block_bytes


MAX_ELEMENTS = 1 << 48  # far above any model, far below where 64-bit byte counts overflow


def make_tensor_info(
    name: str, type: TensorType | WordType, shape: tuple[int, ...], file: str, offset: int
) -> TensorInfo:
    """Checks the shape (each dimension at least 1, whole blocks a row, no absurd product) and counts bytes.
    Raises BadModelFile naming file and tensor."""
    elements = 1
    for size in shape:
        if size < 1:
            raise BadModelFile(file, name, f"shape {list(shape)} has an empty dimension")
        elements *= size
        if elements > MAX_ELEMENTS:
            raise BadModelFile(file, name, f"shape {list(shape)} has more than {MAX_ELEMENTS} elements")
    cols = shape[-1] if shape else 1
    if cols % type.block:
        raise BadModelFile(file, name, f"a row of {cols} is not a multiple of {type}'s block of {type.block}")
    nbytes = elements // type.block * type.block_bytes
    return TensorInfo(name, type, elements // cols, cols, shape, file, offset, nbytes)


def check_layout(tensors: list[TensorInfo], file: str, size: int) -> None:
    """All bytes of `tensors` lie inside a file of `size` bytes and no two tensors share one.
    Raises BadModelFile naming the tensor."""
    end, previous = 0, ""
    for info in sorted(tensors, key=lambda info: info.offset):
        if info.offset + info.nbytes > size:
            raise BadModelFile(
                file, info.name, f"ends at byte {info.offset + info.nbytes} of a file of {size} bytes"
            )
        if info.offset < end:
            raise BadModelFile(file, info.name, f"overlaps tensor {previous!r}")
        end, previous = info.offset + info.nbytes, info.name
