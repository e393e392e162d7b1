"""Parses protobuf requests, and says which field is at fault where that fails.

The protobuf library reports only that parsing failed. The wire format is read a second time here, after
a failure, to name the field: https://protobuf.dev/programming-guides/encoding/. Knows nothing of gRPC.
"""

from collections.abc import Callable
from typing import NamedTuple

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message

_VARINT, _FIXED64, _LENGTH, _GROUP, _END_GROUP, _FIXED32 = range(6)
_DEPTH = 100  # protobuf's own limit on nesting


class Malformed(NamedTuple):
    """Stands in for a request that could not be parsed. `field` is a path such as `sampling.stop`, or ""
    where the message itself is cut or garbled."""

    field: str
    reason: str


def tolerant(
    parse: Callable[[bytes], Message], descriptor: Descriptor
) -> Callable[[bytes], Message | Malformed]:
    """A deserialiser that returns Malformed where `parse`, for messages of `descriptor`, raises."""

    def deserialise(data: bytes) -> Message | Malformed:
        try:
            return parse(data)
        except DecodeError:
            return explain(data, descriptor)

    return deserialise


def explain(data: bytes, descriptor: Descriptor) -> Malformed:
    """What is wrong with `data`, which failed to parse as a message of `descriptor`."""
    return _explain(data, descriptor, "", 0) or Malformed("", "is not a valid protobuf message")


def _explain(data: bytes, descriptor: Descriptor, prefix: str, depth: int) -> Malformed | None:
    here = prefix.removesuffix(".")
    if depth > _DEPTH:
        return Malformed(here, "is nested too deeply")
    at = 0
    while at < len(data):
        try:
            tag, at = _varint(data, at)
            field = descriptor.fields_by_number.get(tag >> 3)
            value, at = _value(data, at, tag & 7)
        except (IndexError, ValueError):
            return Malformed(here, f"is cut short or garbled at byte {at}")
        if field is None or tag & 7 != _LENGTH:
            continue
        name = prefix + field.name
        if field.type == FieldDescriptor.TYPE_STRING:
            try:
                value.decode()
            except UnicodeDecodeError as error:
                return Malformed(name, f"is not valid UTF-8 at byte {error.start}")
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            found = _explain(value, field.message_type, name + ".", depth + 1)
            if found is not None:
                return found
    return None


def _value(data: bytes, at: int, wire_type: int) -> tuple[bytes, int]:
    """The payload at `at` and where it ends. Raises IndexError or ValueError on garbled input."""
    if wire_type == _VARINT:
        return b"", _varint(data, at)[1]
    if wire_type == _LENGTH:
        length, at = _varint(data, at)
    elif wire_type in (_FIXED64, _FIXED32):
        length = 8 if wire_type == _FIXED64 else 4
    else:
        raise ValueError("groups are not used here")
    if at + length > len(data):
        raise IndexError(at)
    return data[at : at + length], at + length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
    raise ValueError("a varint has at most ten bytes")
