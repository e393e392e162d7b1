"""Opens a model wherever it lies, GGUF or Hugging Face folder, and says where its tensors are.

Reads headers only. Does not know what an architecture needs: `check_tensor` is how a model asks for it.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

from runtime.errors import BadModelFile, NotFound
from runtime.weights.formats import TensorInfo
from runtime.weights.gguf import read_gguf
from runtime.weights.packed import PackedFormat, PackedInfo
from runtime.weights.safetensors import read_safetensors_folder


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """`metadata` holds a GGUF's keys and is empty for a folder, whose config.json is `config` (empty for
    GGUF). `tensors` are keyed by GGUF's names in both; a GPTQ or AWQ layer is one of them, and `packed`
    says which format a folder's are in, if it has any.

    `half_split_rope`: q and k rows stand in Hugging Face's order, where RoPE pairs row i of a head with row
    i + head_dim / 2. GGUF files of the llama architecture hold them permuted, so that rows 2i and 2i + 1
    pair."""

    kind: Literal["gguf", "safetensors"]
    path: str
    tensors: dict[str, TensorInfo | PackedInfo]
    files: tuple[str, ...]
    metadata: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    half_split_rope: bool = False
    packed: PackedFormat | None = None


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """`path`: a GGUF file (any part of a split one), a Hugging Face folder, or a folder that holds exactly
    one GGUF model. Raises NotFound, BadModelFile or UnsupportedModel."""
    path = os.fspath(path)
    if not os.path.exists(path):
        raise NotFound("model", path, "no such file or folder")
    if os.path.isdir(path):
        if os.path.exists(os.path.join(path, "config.json")):
            folder = read_safetensors_folder(path)
            return Checkpoint(
                "safetensors",
                path,
                folder.tensors,
                folder.files,
                config=folder.config,
                half_split_rope=True,
                packed=folder.packed,
            )
        path = _only_gguf(path)
    if os.path.basename(path).endswith(".safetensors"):
        raise BadModelFile(path, "", "a lone safetensors file; give the folder that has its config.json")
    model = read_gguf(path)
    return Checkpoint("gguf", path, model.tensors, model.files, metadata=model.metadata)


def open_to_read(file: str, stack: ExitStack) -> int:
    """A descriptor, closed with the stack. Raises BadModelFile."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise BadModelFile(file, "", f"cannot be read: {error.strerror or error}") from None
    stack.callback(os.close, descriptor)
    return descriptor


def _only_gguf(folder: str) -> str:
    names = sorted(name for name in os.listdir(folder) if name.endswith(".gguf"))
    if not names:
        raise NotFound("model", folder, "the folder holds neither a config.json nor a .gguf file")
    first = os.path.join(folder, names[0])
    if len(names) > 1 and set(names) != {os.path.basename(file) for file in read_gguf(first).files}:
        raise BadModelFile(folder, "", f"holds several models ({', '.join(names[:4])}...); name one of them")
    return first


def check_tensor(checkpoint: Checkpoint, name: str, rows: int, cols: int) -> TensorInfo | PackedInfo:
    """The tensor, if it is there and is rows x cols (a vector is 1 x its length). BadModelFile otherwise."""
    info = checkpoint.tensors.get(name)
    if info is None:
        raise BadModelFile(checkpoint.path, name, "the tensor is missing")
    if (info.rows, info.cols) != (rows, cols):
        raise BadModelFile(
            info.file, name, f"is {info.rows} x {info.cols} where the model needs {rows} x {cols}"
        )
    return info
