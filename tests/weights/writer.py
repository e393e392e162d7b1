"""Writes GGUF and safetensors bytes field by field, true or lying, for tests of the readers."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCALARS = {"u8": (0, "<B"), "i8": (1, "<b"), "u16": (2, "<H"), "i16": (3, "<h"), "u32": (4, "<I"),
           "i32": (5, "<i"), "f32": (6, "<f"), "bool": (7, "<B"), "u64": (10, "<Q"), "i64": (11, "<q"),
           "f64": (12, "<d")}  # fmt: skip


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def value(kind: str, content: Any) -> bytes:
    """A typed value: kind is a scalar's name, "str", or "[" + the items' kind for an array of them."""
    return struct.pack("<I", type_id(kind)) + body(kind, content)


def type_id(kind: str) -> int:
    return 9 if kind[0] == "[" else 8 if kind == "str" else SCALARS[kind][0]


def body(kind: str, content: Any) -> bytes:
    if kind == "str":
        return string(content)
    if kind[0] == "[":
        items = b"".join(body(kind[1:], item) for item in content)
        return struct.pack("<IQ", type_id(kind[1:]), len(content)) + items
    return struct.pack(SCALARS[kind][1], content)


@dataclass(frozen=True)
class Entry:
    """A tensor's header entry; `data` goes where `offset` says (None: the next aligned place)."""

    name: str
    ne: tuple[int, ...]  # GGUF's order: contiguous dimension first
    type: int = 0
    data: bytes = b""
    offset: int | None = None


def gguf_bytes(
    keys: Sequence[tuple[str, str, Any]] = (),
    tensors: Sequence[Entry] = (),
    *,
    version: int = 3,
    alignment: int = 32,
    tensor_count: int | None = None,
    key_count: int | None = None,
) -> bytes:
    """A GGUF file. Counts say the truth unless given."""
    header = b"GGUF" + struct.pack("<I", version)
    header += struct.pack("<Q", len(tensors) if tensor_count is None else tensor_count)
    header += struct.pack("<Q", len(keys) if key_count is None else key_count)
    for key, kind, content in keys:
        header += string(key) + value(kind, content)
    data = bytearray()
    for entry in tensors:
        offset = -(-len(data) // alignment) * alignment if entry.offset is None else entry.offset
        header += string(entry.name) + struct.pack("<I", len(entry.ne))
        header += struct.pack(f"<{len(entry.ne)}Q", *entry.ne) + struct.pack("<IQ", entry.type, offset)
        if offset <= 1 << 20:  # else it lies, and its data are nowhere
            data += bytes(max(0, offset + len(entry.data) - len(data)))
            data[offset : offset + len(entry.data)] = entry.data
    return header + bytes(-len(header) % alignment) + bytes(data)


def safetensors_bytes(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file: `header` is JSON to be, or its very bytes; `length` may lie about it."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def write_folder(path: Path, files: dict[str, bytes | Any]) -> Path:
    """Writes files into a folder: bytes as they are, anything else as JSON."""
    path.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (path / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path
