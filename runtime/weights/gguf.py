"""Reads the header of GGUF files (versions 2 and 3, split or whole): metadata and where tensors lie.

Format: ggml's docs/gguf.md. Reads no tensor data and knows no model. A file is hostile until checked: every
count and length is held against what is left of the file before anything is allocated for it, so memory
stays proportional to the header that is really there.
"""

from __future__ import annotations

import os
import re
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from runtime.errors import BadModelFile, NotFound, UnsupportedModel
from runtime.weights.formats import TensorInfo, check_layout, make_tensor_info, type_by_id

__all__ = ["GGUFFile", "TensorInfo", "read_gguf"]

MAX_HEADER = 1 << 27  # bytes; the largest real ones (256k tokens, merges) are some 20 MB
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 20
MAX_NAME = 1 << 10  # bytes of a key or a tensor's name; ggml itself keeps 64 of a tensor's
MAX_NESTING = 4  # arrays of arrays
MAX_SPLITS = 1 << 16
MAX_ALIGNMENT = 1 << 20

_SCALARS = {
    0: struct.Struct("<B"), 1: struct.Struct("<b"), 2: struct.Struct("<H"), 3: struct.Struct("<h"),
    4: struct.Struct("<I"), 5: struct.Struct("<i"), 6: struct.Struct("<f"), 7: struct.Struct("<?"),
    10: struct.Struct("<Q"), 11: struct.Struct("<q"), 12: struct.Struct("<d"),
}  # fmt: skip
_ARRAYS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_BOOL, _STRING, _ARRAY = 7, 8, 9
_SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """A GGUF model. `metadata` maps keys to int, float, bool, str or lists of these (of a split model: the
    first part's). `tensors` keeps the files' order. `files` are the parts' paths."""

    path: str
    version: int
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    files: tuple[str, ...]


def read_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Reads a GGUF file, or all parts of a split one given any of them.

    Raises NotFound, BadModelFile (file and key or tensor named), or UnsupportedModel for a tensor type or
    version that is not served."""
    path = os.fspath(path)
    version, metadata, tensors = _read_part(path)
    count = _split_value(path, metadata, "split.count", 1)
    match = _SPLIT_NAME.fullmatch(os.path.basename(path))
    if count <= 1:
        if match and int(match[3]) > 1:
            raise BadModelFile(
                path, "split.count", f"missing or {count} where the name says {match[3]} parts"
            )
        return GGUFFile(path, version, metadata, tensors, (path,))
    if not match:
        raise BadModelFile(
            path, "split.count", f"one of {count} parts, but not named NAME-00001-of-{count:05d}.gguf"
        )
    return _join_parts(path, match, count, (version, metadata, tensors))


def _join_parts(path: str, match: re.Match[str], count: int, given: tuple) -> GGUFFile:
    if int(match[3]) != count:
        raise BadModelFile(path, "split.count", f"{count} where the name says {match[3]}")
    folder = os.path.dirname(path)
    files, joined, first = [], {}, None
    for index in range(count):
        file = os.path.join(folder, f"{match[1]}-{index + 1:05d}-of-{match[3]}.gguf")
        if int(match[2]) == index + 1:
            file, part = path, given
        elif os.path.exists(file):
            part = _read_part(file)
        else:
            raise BadModelFile(file, "", f"part {index + 1} of {count} is missing beside {path}")
        version, metadata, tensors = part
        if _split_value(file, metadata, "split.count", 1) != count:
            raise BadModelFile(file, "split.count", f"not {count} as in {path}")
        if _split_value(file, metadata, "split.no", -1) != index:
            raise BadModelFile(file, "split.no", f"not {index} as the name says")
        for name, info in tensors.items():
            if name in joined:
                raise BadModelFile(file, name, f"also in {joined[name].file}")
            joined[name] = info
        first = first or (version, metadata)
        files.append(file)
    expected = _split_value(files[0], first[1], "split.tensors.count", len(joined))
    if expected != len(joined):
        raise BadModelFile(files[0], "split.tensors.count", f"{expected}, but the parts hold {len(joined)}")
    return GGUFFile(files[0], *first, joined, tuple(files))


def _split_value(file: str, metadata: dict[str, Any], key: str, default: int) -> int:
    value = metadata.get(key, default)
    if type(value) is not int or (value > MAX_SPLITS and key != "split.tensors.count"):
        raise BadModelFile(file, key, f"not a sensible count: {value!r:.40}")
    return value


def _read_part(path: str) -> tuple[int, dict[str, Any], dict[str, TensorInfo]]:
    try:
        with Path(path).open("rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BadModelFile(path, "", "not a regular file")
            return _parse(_Header(path, file, status.st_size))
    except FileNotFoundError:
        raise NotFound("file", path) from None
    except OSError as error:
        raise BadModelFile(path, "", f"cannot be read: {error.strerror or error}") from None


def _parse(header: _Header) -> tuple[int, dict[str, Any], dict[str, TensorInfo]]:
    path = header.path
    if header.take(4) != b"GGUF":
        raise BadModelFile(path, "", "not a GGUF file (the magic is missing)")
    version = header.scalar(4)
    if version not in (2, 3):
        if version in (2 << 24, 3 << 24):
            raise UnsupportedModel(f"{path}: big-endian GGUF is not served")
        raise UnsupportedModel(f"{path}: GGUF version {version} is not served; versions 2 and 3 are")
    tensor_count, key_count = header.scalar(10), header.scalar(10)
    # A tensor takes at least 32 bytes (name length, dimensions, one size, type, offset), a key 13.
    header.check_count(tensor_count, 32, MAX_TENSORS, "tensors")
    header.check_count(key_count, 13, MAX_KEYS, "metadata keys")
    metadata: dict[str, Any] = {}
    for index in range(key_count):
        header.where = f"metadata key {index}"
        key = header.name()
        if key in metadata:
            raise header.bad("the key stands twice", key)
        header.where = key
        metadata[key] = header.value(header.scalar(4), 0)
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 8 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise header.bad(f"not a power of two from 8 up: {alignment!r:.40}", "general.alignment")
    entries = []
    for index in range(tensor_count):
        header.where = f"tensor {index}"
        name = header.where = header.name()
        dimensions = header.scalar(4)
        if not 1 <= dimensions <= 4:
            raise header.bad(f"{dimensions} dimensions; 1 to 4 are possible")
        sizes = [header.scalar(10) for _ in range(dimensions)]
        entries.append((name, tuple(reversed(sizes)), header.scalar(4), header.scalar(10)))
    return version, metadata, _place(entries, path, header.position, alignment, header.size)


def _place(
    entries: list[tuple], path: str, position: int, alignment: int, size: int
) -> dict[str, TensorInfo]:
    start = -(-position // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for name, shape, type_id, offset in entries:
        if name in tensors:
            raise BadModelFile(path, name, "the tensor stands twice")
        if offset % alignment:
            raise BadModelFile(path, name, f"offset {offset} is not a multiple of the alignment {alignment}")
        tensors[name] = make_tensor_info(name, type_by_id(type_id, path, name), shape, path, start + offset)
    check_layout(list(tensors.values()), path, size)
    return tensors


class _Header:
    """A cursor over the front of a file. Holds what was read of it, growing as it is needed."""

    def __init__(self, path: str, file: BinaryIO, size: int):
        self.path, self.size, self.where, self.position = path, size, "", 0
        self._file, self._data = file, bytearray()

    def bad(self, reason: str, where: str | None = None) -> BadModelFile:
        return BadModelFile(self.path, self.where if where is None else where, reason)

    def need(self, count: int) -> None:
        """Makes `count` bytes from the position on available, or raises: the file ends, or is all header."""
        end = self.position + count
        if end <= len(self._data):
            return
        if end > self.size:
            raise self.bad(f"the file is cut short: {count} bytes at {self.position} of {self.size}")
        if end > MAX_HEADER:
            raise self.bad(f"the header is longer than {MAX_HEADER} bytes")
        more = min(max(end - len(self._data), len(self._data), 1 << 16), self.size - len(self._data))
        self._data += self._file.read(more)
        if end > len(self._data):
            raise self.bad("the file is cut short: it shrank while it was read")

    def check_count(self, count: int, least: int, limit: int, what: str) -> None:
        """`count` things of at least `least` bytes can still follow, and are no more than `limit`."""
        if count > limit or count * least > self.size - self.position:
            raise self.bad(f"says it holds {count} {what}, more than can be")

    def take(self, count: int) -> bytes:
        self.need(count)
        self.position += count
        return bytes(self._data[self.position - count : self.position])

    def scalar(self, type_id: int) -> Any:
        form = _SCALARS[type_id]
        self.need(form.size)
        if type_id == _BOOL and self._data[self.position] > 1:
            raise self.bad(f"a boolean is {self._data[self.position]}")
        value = form.unpack_from(self._data, self.position)[0]
        self.position += form.size
        return value

    def string(self, limit: int = MAX_HEADER) -> str:
        length = self.scalar(10)
        if length > limit:
            raise self.bad(f"a string of {length} bytes; at most {limit} are possible")
        raw = self.take(length)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.bad(f"not UTF-8: {raw[:24]!r}") from None

    def name(self) -> str:
        """A key or a tensor's name: errors print it, so it must be fit for that."""
        name = self.string(MAX_NAME)
        if not name or not name.isprintable():
            raise self.bad(f"not a printable name: {name!a:.80}")
        return name

    def value(self, type_id: int, depth: int) -> Any:
        if type_id == _STRING:
            return self.string()
        if type_id in _SCALARS:
            return self.scalar(type_id)
        if type_id != _ARRAY:
            raise self.bad(f"unknown value type {type_id}")
        if depth == MAX_NESTING:
            raise self.bad(f"arrays nest deeper than {MAX_NESTING}")
        return self._array(depth)

    def _array(self, depth: int) -> list[Any]:
        item, count = self.scalar(4), self.scalar(10)
        if item == _STRING:
            self.check_count(count, 8, MAX_HEADER, "strings")
            return self._strings(count)
        if item == _ARRAY:
            self.check_count(count, 12, MAX_HEADER, "arrays")
            return [self.value(_ARRAY, depth + 1) for _ in range(count)]
        if item not in _SCALARS:
            raise self.bad(f"unknown array item type {item}")
        self.check_count(count, _SCALARS[item].size, MAX_HEADER, "items")
        raw = self.take(count * _SCALARS[item].size)
        if item == _BOOL:
            if raw.translate(None, b"\0\1"):
                raise self.bad("a boolean is neither 0 nor 1")
            return [byte == 1 for byte in raw]
        return np.frombuffer(raw, _ARRAYS[item]).tolist()

    def _strings(self, count: int) -> list[str]:
        """A vocabulary has a few hundred thousand: one flat loop, refilling when the buffer runs out."""
        length_at, data, position = struct.Struct("<Q").unpack_from, self._data, self.position
        strings: list[str] = []
        try:
            while len(strings) < count:
                if position + 8 > len(data):
                    self.position = position
                    self.need(8)
                end = position + 8 + length_at(data, position)[0]
                if end > len(data):
                    self.position = position
                    self.need(end - position)
                strings.append(data[position + 8 : end].decode())
                position = end
        except UnicodeDecodeError:
            raise self.bad(
                f"string {len(strings)} is not UTF-8: {bytes(data[position + 8 : end])[:24]!r}"
            ) from None
        self.position = position
        return strings
