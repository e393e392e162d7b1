"""Plans Hugging Face folders of Llama and Mistral safetensors: config, shards, and where tensors lie. Dense
ones, and those whose linear layers are GPTQ or AWQ.

Format: the safetensors README (8 bytes little-endian header length, JSON header, data), and the
`model.safetensors.index.json` that Hugging Face writes beside shards. Tensors appear under the names GGUF
gives them. Reads no tensor data, save one g_idx where the config speaks of act-order; holds every header for
hostile until checked.
"""

from __future__ import annotations

import json
import os
import re
import stat
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from runtime.errors import BadModelFile, NotFound, UnsupportedModel
from runtime.weights.formats import TensorInfo, TensorType, WordType, check_layout, make_tensor_info
from runtime.weights.gptq import check_whole_order
from runtime.weights.packed import PARTS, PackedFormat, PackedInfo, packed_info
from runtime.weights.packed_config import packed_format, quantization_method, says_act_order

MAX_HEADER = 1 << 25  # bytes; a tensor takes some 120
MAX_JSON = 1 << 25  # bytes of config and index
MAX_NAME = 1 << 10  # characters

_FLOATS = {"F32": TensorType.F32, "F16": TensorType.F16, "BF16": TensorType.BF16}
_DTYPES = {**_FLOATS, "I32": WordType.I32}
_KNOWN_DTYPES = {
    "BOOL", "U8", "I8", "I16", "U16", "U32", "I64", "U64", "F64",
    "F4", "F6_E2M3", "F6_E3M2", "F8_E5M2", "F8_E4M3", "F8_E8M0", "C64",
}  # fmt: skip

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,5})\.(.+)\.(weight|bias)")
_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*\.safetensors")
_DERIVED = re.compile(r"(model\.layers\.[0-9]+\.self_attn|model)\.rotary_emb\.inv_freq")


@dataclass(frozen=True, slots=True)
class SafetensorsFolder:
    """`config` is config.json as it stands; `tensors` are keyed and named as GGUF names them
    ("blk.3.attn_q.weight"), with q and k rows in Hugging Face's order. `files` are the shards' paths.
    `packed` is the format of the layers that are GPTQ or AWQ, None where none is."""

    path: str
    config: dict[str, Any]
    tensors: dict[str, TensorInfo | PackedInfo]
    files: tuple[str, ...]
    packed: PackedFormat | None = None


def read_safetensors_folder(path: str | os.PathLike[str]) -> SafetensorsFolder:
    """Reads config.json and the headers of model.safetensors, or of the shards that
    model.safetensors.index.json names.

    Raises NotFound, BadModelFile (file and tensor named), or UnsupportedModel for a dtype or tensor that
    a dense Llama or Mistral does not have."""
    folder = os.fspath(path)
    config = _read_json(os.path.join(folder, "config.json"))
    quantization_method(os.path.join(folder, "config.json"), config)  # others have tensors of other names
    index = os.path.join(folder, "model.safetensors.index.json")
    single = os.path.join(folder, "model.safetensors")
    if os.path.exists(index):
        shards = _read_index(index)
    elif os.path.exists(single):
        shards = {single: None}
    else:
        raise NotFound("file", single, "nor is there a model.safetensors.index.json")
    found: dict[str, TensorInfo] = {}
    for file, promised in shards.items():
        held = _read_header(file)
        for name in promised or ():
            if name not in held:
                raise BadModelFile(file, name, "missing, though the index places it here")
        for name, info in held.items():
            if promised is not None and name not in promised:
                raise BadModelFile(file, name, "the index does not place it here")
            if name in found:
                raise BadModelFile(file, name, f"also in {found[name].file}")
            found[name] = info
    layers = _take_packed(found)
    tensors: dict[str, TensorInfo | PackedInfo] = {}
    for name, info in found.items():
        if canonical := canonical_name(name, info.file):
            tensors[canonical] = replace(info, name=canonical)
    format = _add_packed(folder, config, layers, tensors) if layers else None
    return SafetensorsFolder(folder, config, tensors, tuple(shards), format)


def _take_packed(found: dict[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """Takes the tensors of packed layers out of `found`: stem -> part -> tensor. Old GPTQ writers gave every
    such layer a bias."""
    layers: dict[str, dict[str, TensorInfo]] = {}
    for name in list(found):
        stem, _, part = name.rpartition(".")
        if part in PARTS:
            layers.setdefault(stem, {})[part] = found.pop(name)
    for stem, parts in layers.items():
        if f"{stem}.bias" in found:
            parts["bias"] = found.pop(f"{stem}.bias")
    for info in found.values():
        if info.type is WordType.I32:
            raise _not_served(info.file, info.name, info.type)
    return layers


def _add_packed(
    folder: str,
    config: dict[str, Any],
    layers: dict[str, dict[str, TensorInfo]],
    tensors: dict[str, TensorInfo | PackedInfo],
) -> PackedFormat:
    """Adds packed layers to `tensors` under GGUF's names."""
    said, format = _packing(folder, config)
    ordered = format.method == "gptq" and format.group > 0 and says_act_order(said)
    for stem, parts in layers.items():
        file = next(iter(parts.values())).file
        name = canonical_name(f"{stem}.weight", file)
        if name in tensors:
            raise BadModelFile(file, f"{stem}.weight", "the layer is there both packed and dense")
        tensors[name] = layer = packed_info(name, stem, parts, format)
        if ordered:
            check_whole_order(layer)  # says it early; others are checked as they are read
            ordered = False
    return format


def _packing(folder: str, config: dict[str, Any]) -> tuple[dict[str, Any], PackedFormat]:
    """The quantisation config of a folder that has packed layers, and what it means."""
    if said := config.get("quantization_config"):
        file = os.path.join(folder, "config.json: quantization_config")
        return said, packed_format(file, said)
    for name, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
        file = os.path.join(folder, name)
        if os.path.exists(file):
            said = _read_json(file)
            return said, packed_format(file, said, method)
    raise BadModelFile(
        os.path.join(folder, "config.json"), "quantization_config", "missing, though layers are packed"
    )


def canonical_name(name: str, file: str) -> str:
    """GGUF's name of a Hugging Face tensor; "" for one that is computed anyway (rotary frequencies)."""
    if match := _LAYER.fullmatch(name):
        if match[2] in _LAYER_NAMES:
            return f"blk.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"
    else:
        stem, _, kind = name.rpartition(".")
        if stem in _NAMES and kind in ("weight", "bias"):
            return f"{_NAMES[stem]}.{kind}"
    if _DERIVED.fullmatch(name):
        return ""
    raise UnsupportedModel(f"{file}: {name}: a dense Llama or Mistral has no such tensor")


def _read_index(path: str) -> dict[str, set[str]]:
    """Shard path -> names of the tensors it must hold, shards in the order of their names."""
    weights = _read_json(path).get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise BadModelFile(path, "weight_map", "missing, empty or not an object")
    shards: dict[str, set[str]] = {}
    for name, shard in weights.items():
        _check_name(path, name)
        if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
            raise BadModelFile(path, name, f"not the name of a safetensors file: {shard!a:.80}")
        shards.setdefault(os.path.join(os.path.dirname(path), shard), set()).add(name)
    return {shard: shards[shard] for shard in sorted(shards)}


def _read_header(path: str) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file under their own names."""
    raw, size = _read_start(path, MAX_HEADER)
    entries = _parse_json(path, raw)
    start = 8 + len(raw)
    tensors: dict[str, TensorInfo] = {}
    for name, entry in entries.items():
        _check_name(path, name)
        if name == "__metadata__":
            continue
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise BadModelFile(path, name, "not an object of dtype, shape and data_offsets")
        tensors[name] = _tensor(path, name, entry, start)
    check_layout(list(tensors.values()), path, size)
    held = sum(info.nbytes for info in tensors.values())
    if start + held != size:  # as the safetensors library does: no holes, nothing after the last tensor
        raise BadModelFile(path, "", f"{size - start - held} bytes belong to no tensor")
    return tensors


def _tensor(path: str, name: str, entry: dict[str, Any], start: int) -> TensorInfo:
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        if isinstance(dtype, str) and dtype in _KNOWN_DTYPES:
            raise _not_served(path, name, dtype)
        raise BadModelFile(path, name, f"unknown dtype {dtype!a:.40}")
    if not _counts(shape) or not 1 <= len(shape) <= 4:
        raise BadModelFile(path, name, f"not a shape: {shape!a:.80}")
    if not _counts(offsets) or len(offsets) != 2:
        raise BadModelFile(path, name, f"not data offsets: {offsets!a:.80}")
    info = make_tensor_info(name, _DTYPES[dtype], tuple(shape), path, start + offsets[0])
    if offsets[1] - offsets[0] != info.nbytes:
        raise BadModelFile(
            path, name, f"offsets span {offsets[1] - offsets[0]} bytes; the shape takes {info.nbytes}"
        )
    return info


def _not_served(path: str, name: str, dtype: str) -> UnsupportedModel:
    return UnsupportedModel(f"{path}: {name}: dtype {dtype} is not served; {', '.join(_FLOATS)} are")


def _check_name(path: str, name: str) -> None:
    """Errors print names, so they must be fit for that."""
    if not name or not name.isprintable() or len(name) > MAX_NAME:
        raise BadModelFile(path, "", f"not a printable tensor name: {name!a:.80}")


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _read_start(path: str, limit: int) -> tuple[bytes, int]:
    """The JSON header's bytes and the file's size."""
    try:
        with Path(path).open("rb") as file:
            size = _regular_size(path, file.fileno())
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise BadModelFile(path, "", f"a header of {length} bytes in a file of {size}")
            if length > limit:
                raise BadModelFile(path, "", f"a header of {length} bytes; at most {limit} are possible")
            return file.read(length), size
    except FileNotFoundError:
        raise BadModelFile(path, "", "missing") from None
    except OSError as error:
        raise BadModelFile(path, "", f"cannot be read: {error.strerror or error}") from None


def _read_json(path: str) -> dict[str, Any]:
    try:
        with Path(path).open("rb") as file:
            size = _regular_size(path, file.fileno())
            if size > MAX_JSON:
                raise BadModelFile(path, "", f"{size} bytes; at most {MAX_JSON} are possible")
            return _parse_json(path, file.read(size))
    except FileNotFoundError:
        raise NotFound("file", path) from None
    except OSError as error:
        raise BadModelFile(path, "", f"cannot be read: {error.strerror or error}") from None


def _regular_size(path: str, descriptor: int) -> int:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise BadModelFile(path, "", "not a regular file")
    return status.st_size


def _parse_json(path: str, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise BadModelFile(path, f"{key!a:.80}", "the key stands twice")
            found[key] = value
        return found

    try:
        value = json.loads(raw.decode(), object_pairs_hook=unique)
    except UnicodeDecodeError:
        raise BadModelFile(path, "", "not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise BadModelFile(path, "", f"not JSON that can be read: {error!s:.80}") from None
    if not isinstance(value, dict):
        raise BadModelFile(path, "", "not a JSON object")
    return value
