"""Hypothesis strategies for any value of the types that cross the wire."""

from __future__ import annotations

import dataclasses
import enum
import types
import typing

from hypothesis import strategies as st


def values(kind: type) -> st.SearchStrategy:
    """Values of int, float, str, bool, enums, dataclasses, named tuples, optional and tuple types of them."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return st.one_of(*(values(argument) for argument in arguments))
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return st.lists(values(arguments[0]), max_size=4).map(tuple)
        return st.tuples(*(values(argument) for argument in arguments))
    if kind is type(None):
        return st.none()
    if dataclasses.is_dataclass(kind) or hasattr(kind, "_fields"):
        hints = typing.get_type_hints(kind)
        return st.builds(kind, **{name: values(hint) for name, hint in hints.items()})
    if issubclass(kind, enum.Enum):
        return st.sampled_from(list(kind))
    simple = {
        bool: st.booleans(),
        int: st.integers(-(2**63), 2**64 - 1),
        float: st.floats(allow_nan=False),
        str: st.text(max_size=20),
    }
    return simple[kind]
