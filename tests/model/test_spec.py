"""What a model is, read from its header: right values, and one clear refusal for each wrong one."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from runtime.config import ModelConfig
from runtime.errors import BadModelFile, InvalidArgument, UnsupportedModel
from runtime.model.header import model_spec, open_model
from runtime.model.layout import expected_shapes
from runtime.model.spec import Llama3Rope, spec_from_gguf, spec_from_hf
from runtime.weights.checkpoint import open_checkpoint
from tests.weights.tiny_hf import write_tiny_hf

GGUF = {
    "general.architecture": "llama",
    "general.name": "a model",
    "llama.context_length": 4096,
    "llama.embedding_length": 768,
    "llama.block_count": 30,
    "llama.feed_forward_length": 2048,
    "llama.attention.head_count": 12,
    "llama.attention.head_count_kv": 4,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 1e5,
}
HF = {
    "architectures": ["MistralForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "sliding_window": 4096,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
TENSORS = {"output.weight": None, "token_embd.weight": None}


def gguf(changes: dict, tensors=TENSORS):
    keys = {key: value for key, value in {**GGUF, **changes}.items() if value is not None}
    return spec_from_gguf("m.gguf", keys, tensors, vocab_rows=1000)


def hf(changes: dict, tensors=TENSORS):
    return spec_from_hf("c/config.json", {**HF, **changes}, tensors, "c")


def test_gguf_values_are_read():
    spec = gguf({"llama.attention.sliding_window": 512})
    assert (spec.name, spec.layers, spec.hidden, spec.heads, spec.kv_heads) == ("a model", 30, 768, 12, 4)
    assert (spec.head_dim, spec.ffn, spec.vocab, spec.context_length) == (64, 2048, 1000, 4096)
    assert (spec.norm_eps, spec.rope_theta, spec.rope_linear, spec.sliding_window) == (1e-5, 1e5, 1.0, 512)
    assert not spec.tied_head and not spec.half_split_rope and not spec.rope_factors
    assert len(spec.units(256)) == 4


def test_gguf_defaults():
    spec = gguf({"llama.attention.head_count_kv": None, "llama.rope.freq_base": None, "general.name": None})
    assert (spec.kv_heads, spec.rope_theta, spec.sliding_window, spec.rope_linear) == (12, 10000.0, None, 1.0)
    assert gguf({}, {"token_embd.weight": None}).tied_head
    assert gguf({}, {**TENSORS, "rope_freqs.weight": None}).rope_factors
    assert gguf({"llama.attention.sliding_window": 0}).sliding_window is None


def test_gguf_head_dimension_may_be_its_own():
    spec = gguf({"llama.attention.key_length": 128, "llama.attention.value_length": 128})
    assert spec.head_dim == 128
    assert expected_shapes(spec)["blk.0.attn_output.weight"] == (768, 12 * 128)


@pytest.mark.parametrize(
    "keys",
    [
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        {"llama.rope.scale_linear": 4.0},
    ],
)
def test_gguf_linear_scaling(keys):
    assert gguf(keys).rope_linear == 4.0


@pytest.mark.parametrize("required", [key for key in GGUF if key.startswith("llama.")])
def test_a_missing_gguf_key_is_named_or_has_a_default(required):
    if required in ("llama.attention.head_count_kv", "llama.rope.freq_base"):
        gguf({required: None})
        return
    with pytest.raises(BadModelFile) as caught:
        gguf({required: None})
    assert caught.value.where == required and "missing" in str(caught.value)
    assert str(caught.value).startswith(f"m.gguf: {required}: ")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.block_count", 0),
        ("llama.block_count", -1),
        ("llama.block_count", 1 << 40),
        ("llama.block_count", "30"),
        ("llama.block_count", 30.0),
        ("llama.block_count", True),
        ("llama.block_count", [30]),
        ("llama.embedding_length", 0),
        ("llama.embedding_length", 1 << 62),
        ("llama.feed_forward_length", [2048, 2048]),
        ("llama.feed_forward_length", -5),
        ("llama.attention.head_count", 0),
        ("llama.attention.head_count", 13),
        ("llama.attention.head_count", 1 << 31),
        ("llama.attention.head_count_kv", 5),
        ("llama.attention.head_count_kv", 0),
        ("llama.attention.key_length", 0),
        ("llama.attention.key_length", 63),
        ("llama.attention.key_length", 1 << 20),
        ("llama.context_length", 0),
        ("llama.context_length", "long"),
        ("llama.attention.layer_norm_rms_epsilon", math.nan),
        ("llama.attention.layer_norm_rms_epsilon", -1.0),
        ("llama.attention.layer_norm_rms_epsilon", "tiny"),
        ("llama.rope.freq_base", 0.0),
        ("llama.rope.freq_base", math.inf),
        ("llama.rope.freq_base", -10000.0),
        ("llama.rope.scale_linear", 0.0),
        ("llama.rope.scale_linear", math.nan),
        ("llama.attention.sliding_window", -1),
        ("llama.attention.sliding_window", 1.5),
    ],
)
def test_a_gguf_value_that_makes_no_sense_names_its_key(key, value):
    with pytest.raises(BadModelFile) as caught:
        gguf({key: value})
    # What does not divide is blamed on the count of heads, whichever of the two was changed.
    assert caught.value.where in (key, "llama.attention.head_count")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"general.architecture": "gemma2"}, "gemma2"),
        ({"general.architecture": None}, "general.architecture"),
        ({"general.architecture": "x" * 10_000}, "general.architecture"),
        ({"llama.expert_count": 8}, "llama.expert_count"),
        ({"llama.attention.value_length": 32}, "value_length"),
        ({"llama.rope.dimension_count": 32}, "llama.rope.dimension_count"),
        ({"llama.rope.scaling.type": "yarn"}, "yarn"),
        ({"llama.rope.scaling.type": 7}, "llama.rope.scaling.type"),
    ],
)
def test_what_is_not_served_is_said(changes, named):
    with pytest.raises(UnsupportedModel, match=named) as caught:
        gguf(changes)
    assert str(caught.value).startswith("m.gguf: ") and len(str(caught.value)) < 250


def test_linear_scaling_without_a_factor_names_it():
    with pytest.raises(BadModelFile, match=r"llama\.rope\.scaling\.factor: is missing"):
        gguf({"llama.rope.scaling.type": "linear"})


def test_hf_values_are_read():
    spec = hf({})
    assert (spec.layers, spec.hidden, spec.heads, spec.kv_heads, spec.head_dim) == (32, 4096, 32, 8, 128)
    assert (spec.ffn, spec.vocab, spec.context_length, spec.sliding_window) == (14336, 32000, 32768, 4096)
    assert (spec.norm_eps, spec.rope_theta, spec.name) == (1e-5, 1e6, "c")
    assert spec.half_split_rope and not spec.tied_head
    assert hf({"tie_word_embeddings": True}).tied_head
    assert hf({"sliding_window": None}).sliding_window is None
    assert hf({"head_dim": 64}).head_dim == 64 and hf({"head_dim": None}).head_dim == 128


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_hf_rope_in_either_spelling():
    want = Llama3Rope(8.0, 1.0, 4.0, 8192)
    assert hf({"rope_scaling": LLAMA3}).rope_llama3 == want
    newer = hf({"rope_theta": None, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}})
    assert newer.rope_llama3 == want and newer.rope_theta == 5e5
    assert hf({"rope_scaling": {"type": "linear", "factor": 2.0}}).rope_linear == 2.0
    assert hf({"rope_scaling": None}).rope_llama3 is None
    assert hf({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}).rope_theta == 1e4


@pytest.mark.parametrize(
    ("changes", "named", "error"),
    [
        ({"architectures": ["Qwen2ForCausalLM"]}, "Qwen2ForCausalLM", UnsupportedModel),
        ({"architectures": []}, "architectures", UnsupportedModel),
        ({"architectures": None}, "architectures", UnsupportedModel),
        ({"architectures": "LlamaForCausalLM"}, "architectures", UnsupportedModel),
        ({"architectures": {"a": 1}}, "architectures", UnsupportedModel),
        ({"attention_bias": True}, "attention_bias", UnsupportedModel),
        ({"mlp_bias": True}, "mlp_bias", UnsupportedModel),
        ({"quantization_config": {"bits": 4}}, "quantization_config", UnsupportedModel),
        ({"hidden_act": "gelu"}, "gelu", UnsupportedModel),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn", UnsupportedModel),
        ({"rope_scaling": "linear"}, "rope_scaling", BadModelFile),
        ({"rope_scaling": {"type": "linear"}}, "factor", BadModelFile),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": None}}, "low_freq_factor", BadModelFile),
        ({"rope_scaling": {**LLAMA3, "factor": math.inf}}, "factor", BadModelFile),
        ({"hidden_size": None}, "hidden_size", BadModelFile),
        ({"hidden_size": "4096"}, "hidden_size", BadModelFile),
        ({"num_attention_heads": 0}, "num_attention_heads", BadModelFile),
        ({"num_key_value_heads": 5}, "num_attention_heads", BadModelFile),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers", BadModelFile),
        ({"intermediate_size": -1}, "intermediate_size", BadModelFile),
        ({"vocab_size": None}, "vocab_size", BadModelFile),
        ({"vocab_size": 1.5}, "vocab_size", BadModelFile),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps", BadModelFile),
        ({"rope_theta": 0}, "rope_theta", BadModelFile),
        ({"head_dim": 7}, "head dimension 7 is odd", BadModelFile),
        ({"sliding_window": -3}, "sliding_window", BadModelFile),
        ({"max_position_embeddings": 0}, "max_position_embeddings", BadModelFile),
    ],
)
def test_an_hf_config_that_cannot_be_served_is_refused(changes, named, error):
    with pytest.raises(error, match=named) as caught:
        hf(changes)
    assert str(caught.value).startswith("c/config.json: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("low", [4.0, 5.0])
def test_llama3_factors_that_leave_no_band_are_refused(low):
    with pytest.raises(BadModelFile, match="freq_factor"):
        hf({"rope_scaling": {**LLAMA3, "low_freq_factor": low}})


@pytest.mark.parametrize("tied", [True, False])
def test_a_missing_or_misshapen_tensor_is_named(tiny, tied):
    checkpoint = open_checkpoint(tiny(tied=tied, layers=2))
    spec = model_spec(checkpoint)
    needed = expected_shapes(spec)
    assert set(needed) == set(checkpoint.tensors)
    for name, info in checkpoint.tensors.items():
        others = {key: value for key, value in checkpoint.tensors.items() if key != name}
        if name == "output.weight":
            assert model_spec(dataclasses.replace(checkpoint, tensors=others)).tied_head
        else:
            with pytest.raises(BadModelFile) as caught:
                model_spec(dataclasses.replace(checkpoint, tensors=others))
            assert caught.value.where == name
        for rows, cols in [(info.rows, info.cols + 32), (info.rows + 1, info.cols), (info.cols, info.rows)]:
            if (rows, cols) == (info.rows, info.cols):
                continue
            shape = (rows, cols) if len(info.shape) > 1 else (cols,)
            if name == "token_embd.weight" and cols == info.cols and tied:
                continue  # the vocabulary's size is read from it
            if len(info.shape) == 1 and rows != 1:
                shape = (rows, cols)
            wrong = dataclasses.replace(info, rows=rows, cols=cols, shape=shape)
            with pytest.raises(BadModelFile) as caught:
                model_spec(dataclasses.replace(checkpoint, tensors={**others, name: wrong}))
            assert caught.value.where in (name, "output.weight"), (name, shape)


def test_a_tensor_that_a_llama_model_has_not_is_refused(tiny):
    checkpoint = open_checkpoint(tiny(layers=2))
    stranger = dataclasses.replace(checkpoint.tensors["blk.0.attn_q.weight"], name="blk.0.attn_q.bias")
    changed = dataclasses.replace(checkpoint, tensors={**checkpoint.tensors, stranger.name: stranger})
    with pytest.raises(UnsupportedModel, match=r"blk\.0\.attn_q\.bias"):
        model_spec(changed)


def test_fewer_layers_than_tensors_is_refused(tiny):
    """A block_count below the truth would answer from half a model."""
    checkpoint = open_checkpoint(tiny(layers=2))
    metadata = {**checkpoint.metadata, "llama.block_count": 1}
    with pytest.raises(UnsupportedModel, match=r"blk\.1\."):
        model_spec(dataclasses.replace(checkpoint, metadata=metadata))


def test_an_untied_folder_without_a_head_is_refused(tiny, tmp_path):
    folder = write_tiny_hf(tmp_path / "hf", tiny(tied=True))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    with pytest.raises(BadModelFile, match=r"output\.weight|lm_head\.weight"):
        open_model(ModelConfig(str(folder)))


@pytest.mark.parametrize(
    ("settings", "field"), [({"dtype": "fp16"}, "dtype"), ({"quantize": "int8"}, "quantize")]
)
def test_settings_that_cannot_be(tiny, settings, field):
    with pytest.raises(InvalidArgument) as caught:
        open_model(ModelConfig(str(tiny()), **settings))
    assert caught.value.field == field


def test_quantising_what_is_quantised_is_refused(tiny):
    with pytest.raises(InvalidArgument, match="quantize: a GGUF file"):
        open_model(ModelConfig(str(tiny(types="Q4_0")), quantize="int4"))


@pytest.mark.parametrize(
    ("types", "dtype"),
    [
        ("F32", "fp32"),
        ("F16", "fp32"),
        ("BF16", "bf16"),
        ("Q8_0", "bf16"),
        ({"*": "Q4_0", "output": "F16"}, "fp32"),
    ],
    ids=str,
)
def test_activations_are_as_exact_as_the_file(tiny, types, dtype):
    assert open_model(ModelConfig(str(tiny(types=types)))).dtype == dtype
    assert open_model(ModelConfig(str(tiny(types=types)), dtype="bf16")).dtype == "bf16"
