"""What a Hugging Face folder says of its quantisation: `quantization_config` of config.json, or, of older
folders, quantize_config.json (AutoGPTQ) and quant_config.json (AutoAWQ). Says nothing of tensors.

Keys: those that transformers' GPTQConfig and AwqConfig, AutoGPTQ, GPTQModel and AutoAWQ write.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runtime.errors import BadModelFile, UnsupportedModel
from runtime.weights.packed import PackedFormat

GROUP_STEP = 16  # groups are multiples of it, as those of every other type are
MAX_GROUP_SIZE = 1 << 24


def quantization_method(file: str, config: Mapping[str, Any]) -> str | None:
    """ "gptq", "awq", or None where config.json speaks of no quantisation. UnsupportedModel for others."""
    said = config.get("quantization_config")
    if not said:
        return None
    method = said.get("quant_method") if isinstance(said, Mapping) else None
    if method not in ("gptq", "awq"):
        raise UnsupportedModel(
            f"{file}: quantization_config: quant_method {_shown(method)} is not served; gptq and awq are"
        )
    return method


def packed_format(file: str, said: Mapping[str, Any], method: str | None = None) -> PackedFormat:
    """Reads a quantisation config. `method` holds where the config itself names none.

    Raises UnsupportedModel, naming file and key, for bits, layouts and options that are not served, and
    BadModelFile for values that make no sense."""
    method = said.get("quant_method") or method
    if method == "gptq":
        return _gptq(file, said)
    if method == "awq":
        return _awq(file, said)
    raise UnsupportedModel(f"{file}: quant_method: {_shown(method)} is not served; gptq and awq are")


def says_act_order(said: Mapping[str, Any]) -> bool:
    """Whether input channels may stand in another order than that of their groups."""
    return bool(said.get("desc_act"))


def _gptq(file: str, said: Mapping[str, Any]) -> PackedFormat:
    bits = _integer(file, said, ("bits",), "GPTQ", (4, 8))
    layout = _text(file, said, ("checkpoint_format", "format"), "gptq")
    if layout not in ("gptq", "gptq_v2"):
        raise UnsupportedModel(
            f"{file}: checkpoint_format: {_shown(layout)} is not served; gptq and gptq_v2 are"
        )
    if _text(file, said, ("pack_dtype",), "int32") != "int32":
        raise UnsupportedModel(f"{file}: pack_dtype: {_shown(said['pack_dtype'])} is not served; int32 is")
    dynamic = said.get("dynamic") or {}
    if not isinstance(dynamic, Mapping):
        raise BadModelFile(file, "dynamic", "is not an object")
    for pattern, settings in dynamic.items():
        if settings and not pattern.startswith("-:"):  # the others only leave layers dense
            raise UnsupportedModel(
                f"{file}: dynamic: settings of its own for {_shown(pattern)} are not served"
            )
    symmetric = _flag(file, said, "sym", False)
    return PackedFormat("gptq", bits, _group(file, said), symmetric, 1 if layout == "gptq" else 0)


def _awq(file: str, said: Mapping[str, Any]) -> PackedFormat:
    bits = _integer(file, said, ("bits", "w_bit"), "AWQ", (4,))
    layout = _text(file, said, ("version", "checkpoint_format", "format"), "gemm")
    if layout != "gemm":
        raise UnsupportedModel(f"{file}: version: {_shown(layout)} is not served; gemm is")
    return PackedFormat("awq", bits, _group(file, said), not _flag(file, said, "zero_point", True), 0)


def _group(file: str, said: Mapping[str, Any]) -> int:
    key = next((key for key in ("group_size", "q_group_size") if said.get(key) is not None), None)
    if key is None:
        raise BadModelFile(file, "group_size", "is missing")
    value = said[key]
    if type(value) is not int or not (value == -1 or 0 < value <= MAX_GROUP_SIZE):
        raise BadModelFile(file, key, f"{_shown(value)} is neither -1 nor a number of input channels")
    if value > 0 and value % GROUP_STEP:
        raise UnsupportedModel(
            f"{file}: {key}: groups of {value} are not served; multiples of {GROUP_STEP} are"
        )
    return value


def _integer(
    file: str, said: Mapping[str, Any], keys: tuple[str, ...], what: str, served: tuple[int, ...]
) -> int:
    key = next((key for key in keys if said.get(key) is not None), None)
    if key is None:
        raise BadModelFile(file, keys[0], "is missing")
    value = said[key]
    if type(value) is not int:
        raise BadModelFile(file, key, f"{_shown(value)} is not a whole number")
    if value not in served:
        raise UnsupportedModel(
            f"{file}: {key}: {what} of {value} bits is not served; {' and '.join(map(str, served))} bits are"
        )
    return value


def _text(file: str, said: Mapping[str, Any], keys: tuple[str, ...], default: str) -> str:
    key = next((key for key in keys if said.get(key) is not None), None)
    value = default if key is None else said[key]
    if not isinstance(value, str):
        raise BadModelFile(file, key or keys[0], f"{_shown(value)} is not a string")
    return value.lower()


def _flag(file: str, said: Mapping[str, Any], key: str, default: bool) -> bool:
    value = said.get(key)
    if value is not None and not isinstance(value, bool):
        raise BadModelFile(file, key, f"{_shown(value)} is neither true nor false")
    return default if value is None else value


def _shown(value: Any) -> str:
    return f"{value!a:.60}"
