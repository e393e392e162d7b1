"""Changed copies of GGUF models."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from tests.weights.tiny import write


def with_tensor(source: Path, target: Path, name: str, values: np.ndarray) -> Path:
    """A copy of a model with one float tensor more."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama")
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        kind = field.types[0]
        sub_type = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), kind, sub_type=sub_type)
    for tensor in reader.tensors:
        plain = tensor.tensor_type in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=None if plain else tensor.tensor_type)
    writer.add_tensor(name, values)
    write(writer)
    return target
