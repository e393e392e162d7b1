"""Writes GPTQ and AWQ folders of tiny models, and takes such layers apart by the formats' definitions, one
number at a time in int64 and float64: shares no code with the readers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests.weights.tiny_hf import write_tiny_hf

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
Parts = dict[str, np.ndarray]


@dataclass(frozen=True)
class Quantised:
    """codes [N, K]; zeros and scales (fp16) [N, groups]."""

    codes: np.ndarray
    zeros: np.ndarray
    scales: np.ndarray

    def dense(self, group: int) -> np.ndarray:
        """float64 [N, K]: (code - zero) * scale."""
        index = np.arange(self.codes.shape[1]) // (group if group > 0 else self.codes.shape[1])
        zeros, scales = self.zeros.astype(np.int64)[:, index], self.scales.astype(np.float64)[:, index]
        return (self.codes.astype(np.int64) - zeros) * scales


def quantise(weight: np.ndarray, bits: int, group: int, symmetric: bool) -> Quantised:
    """Round to nearest; the last group may be short."""
    rows, cols = weight.shape
    group, top = group if group > 0 else cols, (1 << bits) - 1
    codes = np.empty((rows, cols), np.uint8)
    zeros, scales = [], []
    for start in range(0, cols, group):
        part = weight[:, start : start + group].astype(np.float64)
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        if symmetric:
            scale, zero = 2 * np.maximum(-low, high) / top, np.full(rows, (top + 1) // 2)
        else:
            scale = (high - low) / top
            zero = np.clip(np.rint(-low / np.maximum(scale, 1e-9)), 1, top)
        scale = np.maximum(scale, 1e-6).astype(np.float16)
        codes[:, start : start + group] = np.clip(np.rint(part / scale[:, None]) + zero[:, None], 0, top)
        zeros.append(zero.astype(np.int64))
        scales.append(scale)
    return Quantised(codes, np.stack(zeros, 1), np.stack(scales, 1))


def random_quantised(rng: np.random.Generator, rows: int, groups: int, cols: int, bits: int) -> Quantised:
    """Codes and zero points of every value (1 to the top), scales of either sign."""
    top = (1 << bits) - 1
    return Quantised(
        rng.integers(0, top + 1, (rows, cols)).astype(np.uint8),
        rng.integers(1, top + 1, (rows, groups)),
        rng.standard_normal((rows, groups)).astype(np.float16),
    )


def pack_words(values: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """Values [..., n] -> int32 [..., n * bits / 32]; field i of a word takes value order[i] of its own."""
    per_word = 32 // bits
    words = np.zeros((*values.shape[:-1], values.shape[-1] // per_word), np.uint32)
    for field in range(per_word):
        source = order[field] if order else field
        words |= (values[..., source::per_word].astype(np.uint32)) << np.uint32(bits * field)
    return words.view(np.int32)


def gptq_parts(q: Quantised, bits: int, shift: int, group: int) -> Parts:
    """`shift`: 1 for checkpoint_format gptq, 0 for gptq_v2."""
    cols = q.codes.shape[1]
    return {
        "qweight": np.ascontiguousarray(pack_words(q.codes, bits).T),
        "qzeros": pack_words(q.zeros.T - shift, bits),
        "scales": np.ascontiguousarray(q.scales.T),
        "g_idx": (np.arange(cols) // (group if group > 0 else cols)).astype(np.int32),
    }


def awq_parts(q: Quantised) -> Parts:
    return {
        "qweight": pack_words(q.codes.T, 4, AWQ_ORDER),
        "qzeros": pack_words(q.zeros.T, 4, AWQ_ORDER),
        "scales": np.ascontiguousarray(q.scales.T),
    }


def naive(parts: Parts, method: str, bits: int, shift: int, group: int) -> np.ndarray:
    """float64 [N, K], number by number as the format defines it."""
    qweight, qzeros = (parts[part].astype(np.int64) & 0xFFFFFFFF for part in ("qweight", "qzeros"))
    scales, per_word, top = parts["scales"].astype(np.float64), 32 // bits, (1 << bits) - 1
    rows = scales.shape[1]
    cols = qweight.shape[0] * (per_word if method == "gptq" else 1)
    field_of = {output: field for field, output in enumerate(AWQ_ORDER)}
    out = np.empty((rows, cols))
    for n in range(rows):
        place = n % per_word if method == "gptq" else field_of[n % 8]
        for k in range(cols):
            g = k // group if group > 0 else 0
            zero = (qzeros[g, n // per_word] >> bits * place & top) + shift
            if method == "gptq":
                code = qweight[k // per_word, n] >> bits * (k % per_word) & top
            else:
                code = qweight[k, n // 8] >> 4 * place & top
            out[n, k] = (code - zero) * scales[g, n]
    return out


def config_of(method: str, bits: int, group: int, *, symmetric: bool, v2: bool) -> dict[str, Any]:
    if method == "awq":
        return {
            "quant_method": "awq", "bits": bits, "group_size": group, "version": "gemm",
            "zero_point": not symmetric, "modules_to_not_convert": None,
        }  # fmt: skip
    return {
        "quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False, "sym": symmetric,
        "checkpoint_format": "gptq_v2" if v2 else "gptq", "lm_head": False, "true_sequential": True,
    }  # fmt: skip


def write_layer(folder: Path, parts: Parts, config: dict[str, Any], extra: Parts | None = None) -> Path:
    """A folder that holds layer 0's down projection alone."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    named = {f"model.layers.0.mlp.down_proj.{part}": array for part, array in (parts | (extra or {})).items()}
    tensors = {n: torch.from_numpy(np.ascontiguousarray(array)) for n, array in named.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def write_tiny_packed(
    folder: Path,
    model: Path,
    method: str,
    *,
    bits: int = 4,
    group: int = 32,
    symmetric: bool = False,
    v2: bool = False,
    shards: int = 1,
    lm_head: bool = False,
    dense: tuple[str, ...] = (),
    biases: bool = False,
) -> Path:
    """Turns a GGUF that `write_tiny_llama` wrote into a folder whose layers' matrices are GPTQ or AWQ, save
    those with a name in `dense`; what stays dense is fp16."""
    write_tiny_hf(folder, model, dtype=torch.float16)
    tensors = load_file(folder / "model.safetensors")
    for name in list(tensors):
        stem = name.removesuffix(".weight")
        linear = stem.endswith("_proj") or (lm_head and stem == "lm_head")
        if not linear or any(part in stem for part in dense):
            continue
        q = quantise(tensors.pop(name).float().numpy(), bits, group, symmetric)
        parts = awq_parts(q) if method == "awq" else gptq_parts(q, bits, 0 if v2 else 1, group)
        if biases:
            parts["bias"] = np.zeros(q.codes.shape[0], np.float16)
        tensors |= {f"{stem}.{part}": torch.from_numpy(array) for part, array in parts.items()}
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = config_of(method, bits, group, symmetric=symmetric, v2=v2)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names, weight_map = sorted(tensors), {}
    for index in range(shards):  # every layer's parts end up in different files
        part = {name: tensors[name] for name in names[index::shards]}
        save_file(part, folder / f"model-{index}.safetensors")
        weight_map |= dict.fromkeys(part, f"model-{index}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder
