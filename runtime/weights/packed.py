"""Linear layers of GPTQ and AWQ safetensors: which tensors make one, and whether their shapes agree.

Both hold a weight of N outputs and K inputs transposed, in 32-bit words of codes beside fp16 scales:

    qweight  int32  GPTQ [K / codes a word, N], AWQ [K, N / codes a word]
    scales   float  [groups, N], groups = ceil(K / group size)
    qzeros   int32  [groups, N / codes a word], zero points packed along N
    g_idx    int32  [K], GPTQ only and optional: the group of each input channel
    bias     float  [N], optional

and mean w[n, k] = (code - zero point) * scale. Where a code lies within a word is said in `gptq` and `awq`;
here only headers are looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd
from typing import Literal

from runtime.errors import BadModelFile
from runtime.weights.formats import TensorInfo, TensorType, WordType

PARTS = ("qweight", "qzeros", "scales", "g_idx")
MAX_GROUP = 128  # columns that share a scale in memory: a longer group is held as several of this


@dataclass(frozen=True, slots=True)
class PackedFormat:
    """What the numbers of a checkpoint's packed layers mean.

    group: input channels a scale; -1 is all of them. symmetric: every zero point is 2**(bits - 1).
    zero_shift: what is added to a zero point as stored: 1 in GPTQ's older format, else 0."""

    method: Literal["gptq", "awq"]
    bits: int
    group: int
    symmetric: bool
    zero_shift: int

    @property
    def quantized(self) -> bool:
        return True

    @property
    def block(self) -> int:
        """Columns that share a scale in memory: units cut the FFN on multiples of it."""
        return gcd(self.group, MAX_GROUP) if self.group > 0 else MAX_GROUP

    @property
    def per_word(self) -> int:
        """Codes in a 32-bit word."""
        return 32 // self.bits

    def columns_a_scale(self, cols: int) -> int:
        return self.group if self.group > 0 else cols

    def __str__(self) -> str:
        group = f"g{self.group}" if self.group > 0 else "whole columns"
        return f"{self.method.upper()} {self.bits}-bit {group}{' symmetric' if self.symmetric else ''}"


@dataclass(frozen=True, slots=True)
class PackedInfo:
    """A packed weight [rows, cols] = [N, K], as `TensorInfo` is a plain one. Its parts may lie in different
    files; they keep the names that they have there."""

    name: str
    type: PackedFormat
    rows: int
    cols: int
    qweight: TensorInfo
    qzeros: TensorInfo
    scales: TensorInfo
    g_idx: TensorInfo | None = None
    bias: TensorInfo | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.cols

    @property
    def file(self) -> str:
        return self.qweight.file

    @property
    def nbytes(self) -> int:
        parts = (self.qweight, self.qzeros, self.scales, self.g_idx, self.bias)
        return sum(part.nbytes for part in parts if part is not None)


def packed_info(name: str, stem: str, parts: Mapping[str, TensorInfo], format: PackedFormat) -> PackedInfo:
    """Puts together the tensors `stem`.qweight and so on as the weight `name`.

    Raises BadModelFile, naming file and tensor, for one that is missing, has another type, or has a shape
    that does not follow from qweight's and the format."""
    somewhere = next(iter(parts.values())).file
    for part in ("qweight", "qzeros", "scales"):
        if part not in parts:
            raise BadModelFile(somewhere, f"{stem}.{part}", "missing beside the layer's other tensors")
    qweight = parts["qweight"]
    _check_type(qweight, words=True)
    if len(qweight.shape) != 2:
        raise BadModelFile(qweight.file, qweight.name, f"shape {list(qweight.shape)} is not a matrix")
    held, per_word = qweight.shape, format.per_word
    cols, rows = (held[0] * per_word, held[1]) if format.method == "gptq" else (held[0], held[1] * per_word)
    groups = -(-cols // format.columns_a_scale(cols))
    if rows % per_word:
        raise BadModelFile(
            qweight.file, qweight.name, f"{rows} outputs do not fill words of {per_word} zero points"
        )
    what = f"{format} of {rows} x {cols}"
    _check(parts["scales"], (groups, rows), what, words=False)
    _check(parts["qzeros"], (groups, rows // per_word), what, words=True)
    if "g_idx" in parts:
        if format.method != "gptq":
            raise BadModelFile(parts["g_idx"].file, parts["g_idx"].name, "AWQ has no such tensor")
        _check(parts["g_idx"], (cols,), what, words=True)
    if "bias" in parts:
        _check(parts["bias"], (rows,), what, words=False)
    return PackedInfo(name, format, rows, cols, **parts)


def _check(info: TensorInfo, shape: tuple[int, ...], what: str, *, words: bool) -> None:
    _check_type(info, words=words)
    if info.shape != shape:
        raise BadModelFile(info.file, info.name, f"shape {list(info.shape)} where {what} needs {list(shape)}")


def _check_type(info: TensorInfo, *, words: bool) -> None:
    if words != (info.type is WordType.I32):
        wanted = "I32" if words else ", ".join((TensorType.F16, TensorType.BF16, TensorType.F32))
        raise BadModelFile(info.file, info.name, f"dtype {info.type}, not {wanted}")
