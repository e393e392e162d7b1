"""What a Llama-family model is, read from GGUF metadata or a Hugging Face config. No tensors here.

Formats: the `llama.*` keys of the GGUF specification; `config.json` of LlamaForCausalLM and
MistralForCausalLM.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runtime.errors import BadModelFile, UnsupportedModel
from runtime.model.units import Unit, cut_units
from runtime.weights.packed_config import quantization_method

MAX_DIMENSION = 1 << 24


@dataclass(frozen=True, slots=True)
class Llama3Rope:
    """Frequency scaling of Llama 3.1 and later."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True, slots=True)
class ModelSpec:
    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    norm_eps: float
    rope_theta: float
    rope_linear: float  # positions are divided by it; 1 is none
    rope_llama3: Llama3Rope | None
    context_length: int
    sliding_window: int | None  # positions a query sees, itself included; None is all
    tied_head: bool
    half_split_rope: bool  # q and k rows of the file are in rotate-half order, else in interleaved pairs
    rope_factors: bool  # the file has a rope_freqs.weight tensor of per-frequency divisors

    def units(self, ffn_block: int) -> tuple[Unit, ...]:
        return cut_units(
            heads=self.heads, kv_heads=self.kv_heads, ffn=self.ffn, ffn_block=ffn_block, vocab=self.vocab
        )


class _Fields:
    """Typed reads from untrusted key-value data; errors name the key."""

    def __init__(self, file: str, values: Mapping[str, Any]):
        self.file = file
        self.values = values

    def fail(self, key: str, reason: str) -> BadModelFile:
        return BadModelFile(self.file, key, reason)

    def integer(
        self, key: str, default: int | None = None, *, low: int = 1, high: int = MAX_DIMENSION
    ) -> int:
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise self.fail(key, "is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.fail(key, f"is {str(value)[:40]!r}, not a whole number")
        if not low <= value <= high:
            raise self.fail(key, f"is {value}, outside {low} to {high}")
        return value

    def real(self, key: str, default: float | None = None, *, low: float, high: float) -> float:
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise self.fail(key, "is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fail(key, f"is {str(value)[:40]!r}, not a number")
        if not (math.isfinite(value) and low <= value <= high):
            raise self.fail(key, f"is {value}, outside {low} to {high}")
        return float(value)


def spec_from_gguf(
    file: str, metadata: Mapping[str, Any], tensors: Mapping[str, Any], *, vocab_rows: int
) -> ModelSpec:
    """Read a spec from GGUF metadata. `vocab_rows` is the row count of token_embd.weight.

    Raises UnsupportedModel for another architecture or a feature this runtime does not compute, and
    BadModelFile, naming the key, for values that make no sense.
    """
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise UnsupportedModel(
            f"{file}: general.architecture is {str(architecture)[:60]!r}; this runtime serves 'llama' "
            "(Llama, Mistral, miqu, SmolLM2 and the like)"
        )
    get = _Fields(file, metadata)
    if get.integer("llama.expert_count", 0, low=0) > 0:
        raise UnsupportedModel(f"{file}: llama.expert_count: mixture-of-experts models are not served")
    hidden = get.integer("llama.embedding_length")
    heads = get.integer("llama.attention.head_count", high=1024)
    kv_heads = get.integer("llama.attention.head_count_kv", heads, high=1024)
    head_dim = get.integer("llama.attention.key_length", hidden // heads or None, high=1024)
    if get.integer("llama.attention.value_length", head_dim) != head_dim:
        raise UnsupportedModel(f"{file}: llama.attention.value_length differs from key_length")
    if get.integer("llama.rope.dimension_count", head_dim) != head_dim:
        raise UnsupportedModel(f"{file}: llama.rope.dimension_count: partial rotary embedding is not served")
    linear = 1.0
    scaling = metadata.get("llama.rope.scaling.type", "none")
    if scaling == "linear":
        linear = get.real("llama.rope.scaling.factor", low=1e-3, high=1e6)
    elif scaling == "none" and "llama.rope.scale_linear" in metadata:
        linear = get.real("llama.rope.scale_linear", low=1e-3, high=1e6)
    elif scaling != "none":
        raise UnsupportedModel(f"{file}: llama.rope.scaling.type {str(scaling)[:40]!r} is not served")
    window = get.integer("llama.attention.sliding_window", 0, low=0, high=1 << 31)
    spec = ModelSpec(
        name=str(metadata.get("general.name") or "model")[:200],
        layers=get.integer("llama.block_count", high=1024),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=get.integer("llama.feed_forward_length"),
        vocab=vocab_rows,
        norm_eps=get.real("llama.attention.layer_norm_rms_epsilon", low=0.0, high=1.0),
        rope_theta=get.real("llama.rope.freq_base", 10000.0, low=1.0, high=1e12),
        rope_linear=linear,
        rope_llama3=None,
        context_length=get.integer("llama.context_length", high=1 << 31),
        sliding_window=window or None,
        tied_head="output.weight" not in tensors,
        half_split_rope=False,
        rope_factors="rope_freqs.weight" in tensors,
    )
    _check(file, spec, "llama.attention.head_count")
    return spec


def spec_from_hf(file: str, config: Mapping[str, Any], tensors: Mapping[str, Any], name: str) -> ModelSpec:
    """Read a spec from a Hugging Face config.json; errors as for `spec_from_gguf`."""
    architectures = config.get("architectures") or []
    architecture = architectures[0] if isinstance(architectures, list) and architectures else None
    if architecture not in ("LlamaForCausalLM", "MistralForCausalLM"):
        raise UnsupportedModel(
            f"{file}: architectures is {str(architecture)[:60]!r}; this runtime serves LlamaForCausalLM and "
            "MistralForCausalLM"
        )
    get = _Fields(file, config)
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise UnsupportedModel(f"{file}: {key}: biases are not served")
    quantization_method(file, config)  # refuses those that are not served
    if config.get("hidden_act", "silu") != "silu":
        raise UnsupportedModel(f"{file}: hidden_act {str(config['hidden_act'])[:40]!r} is not served")
    hidden = get.integer("hidden_size")
    heads = get.integer("num_attention_heads", high=1024)
    theta, linear, llama3 = _hf_rope(file, get, config)
    window = get.integer("sliding_window", 0, low=0, high=1 << 31)
    spec = ModelSpec(
        name=name,
        layers=get.integer("num_hidden_layers", high=1024),
        hidden=hidden,
        heads=heads,
        kv_heads=get.integer("num_key_value_heads", heads, high=1024),
        head_dim=get.integer("head_dim", hidden // heads or None, high=1024),
        ffn=get.integer("intermediate_size"),
        vocab=get.integer("vocab_size"),
        norm_eps=get.real("rms_norm_eps", 1e-6, low=0.0, high=1.0),
        rope_theta=theta,
        rope_linear=linear,
        rope_llama3=llama3,
        context_length=get.integer("max_position_embeddings", 2048, high=1 << 31),
        sliding_window=window or None,
        tied_head=bool(config.get("tie_word_embeddings", False)),
        half_split_rope=True,
        rope_factors=False,
    )
    _check(file, spec, "num_attention_heads")
    return spec


def _hf_rope(file: str, get: _Fields, config: Mapping[str, Any]) -> tuple[float, float, Llama3Rope | None]:
    """theta, linear factor and Llama-3 scaling; both the older `rope_scaling` and the newer
    `rope_parameters` spelling."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping):
        raise get.fail("rope_scaling", "is not an object")
    part = _Fields(file, scaling)
    theta = part.real("rope_theta", get.real("rope_theta", 10000.0, low=1.0, high=1e12), low=1.0, high=1e12)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return theta, 1.0, None
    if kind == "linear":
        return theta, part.real("factor", low=1e-3, high=1e6), None
    if kind == "llama3":
        low = part.real("low_freq_factor", low=1e-3, high=1e6)
        if part.real("high_freq_factor", low=1e-3, high=1e6) <= low:
            raise get.fail("rope_scaling.high_freq_factor", "is not above low_freq_factor")
        return (
            theta,
            1.0,
            Llama3Rope(
                factor=part.real("factor", low=1e-3, high=1e6),
                low_freq_factor=part.real("low_freq_factor", low=1e-3, high=1e6),
                high_freq_factor=part.real("high_freq_factor", low=1e-3, high=1e6),
                original_context=part.integer("original_max_position_embeddings", high=1 << 31),
            ),
        )
    raise UnsupportedModel(f"{file}: rope_scaling type {str(kind)[:40]!r} is not served")


def _check(file: str, spec: ModelSpec, key: str) -> None:
    if spec.heads % spec.kv_heads:
        raise BadModelFile(file, key, f"{spec.heads} heads do not divide among {spec.kv_heads} KV heads")
    if spec.head_dim % 2:
        raise BadModelFile(file, key, f"head dimension {spec.head_dim} is odd")
