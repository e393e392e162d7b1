"""Logits of tiny models of every kind agree with the independent reference."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from kernels.native import machine
from runtime.model.load import numerics
from tests.bits import same_bits
from tests.model.driver import logits, opened
from tests.model.reference import Reference, divergence, llama3_frequencies
from tests.model.variants import with_tensor
from tests.weights.tiny_hf import write_tiny_hf

TYPES = [
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
]  # fmt: skip
# What a Q4_K_M file mixes, and worse: a fused projection whose tensors have three types.
MIXED = {
    "*": "Q4_K",
    "attn_v": "Q6_K",
    "attn_k": "Q3_K",
    "ffn_down": "Q5_K",
    "output": "Q6_K",
    "ffn_up": "Q2_K",
}
TOKENS = np.random.default_rng(0).integers(0, 384, 150).tolist()


def agree(got: torch.Tensor, want: torch.Tensor, dtype: str) -> None:
    """fp32: equal but for sums. bf16: what activations of 8 bits cost, far below what a wrong layer does."""
    kl = divergence(want, got)
    if dtype == "fp32":
        assert (got.double() - want).abs().max() < 1e-4
        assert kl.max() < 1e-8
    else:
        assert kl.mean() < 1e-3 and kl.max() < 1e-2
        assert (got.argmax(1) == want.argmax(1)).double().mean() > 0.9


@pytest.mark.parametrize("types", [*TYPES, MIXED], ids=str)
def test_every_quant_type(tiny, types):
    path = tiny(types=types, hidden=256, ffn=512)
    want = Reference(path).logits(TOKENS)
    for dtype in ("bf16", "fp32"):
        agree(logits(opened(path, dtype=dtype), TOKENS), want, dtype)


def test_torch_serves_where_nothing_is_compiled(tiny, monkeypatch):
    """As good, under another name."""
    path = tiny(types=MIXED, hidden=256, ffn=512)
    model, want = opened(path, dtype="bf16"), Reference(path).logits(TOKENS)
    here = numerics(model), machine.supported()
    monkeypatch.setattr(machine, "supported", lambda: False)
    agree(logits(model, TOKENS), want, "bf16")
    assert same_bits(logits(model, TOKENS, tp=2), logits(model, TOKENS, chunks=[1, 16, 133]))
    assert (numerics(model) != here[0]) == here[1]


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(
    "shape",
    [
        {"tied": True},
        {"heads": 6, "kv_heads": 1, "head_dim": 8, "hidden": 32, "ffn": 32},
        {"heads": 5, "kv_heads": 5, "head_dim": 16, "hidden": 96, "ffn": 96, "vocab": 259},
        {"heads": 32, "kv_heads": 2, "head_dim": 16, "hidden": 128, "ffn": 128, "layers": 1},
        {"heads": 34, "kv_heads": 2, "head_dim": 8, "hidden": 128, "ffn": 32, "layers": 1},
        {"layers": 5, "rope_base": 1e6, "eps": 1e-3},
        {"metadata": {"llama.attention.sliding_window": 20}},
        {"metadata": {"llama.attention.sliding_window": 1}},
        {"metadata": {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}},
    ],
    ids=str,
)
def test_every_shape_and_option(tiny, shape, dtype):
    path = tiny(types="F32", **shape)
    tokens = [token % shape.get("vocab", 384) for token in TOKENS]
    agree(logits(opened(path, dtype=dtype), tokens), Reference(path).logits(tokens), dtype)


@pytest.mark.parametrize("option", ["window", "linear", "theta"])
def test_an_option_changes_the_answer(tiny, option):
    """What the agreement above rests on: each option moves the logits far beyond its tolerance."""
    changed = {
        "window": {"metadata": {"llama.attention.sliding_window": 20}},
        "linear": {"metadata": {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}},
        "theta": {"rope_base": 1e6},
    }[option]
    kl = divergence(
        logits(opened(tiny(types="F32")), TOKENS), logits(opened(tiny(types="F32", **changed)), TOKENS)
    )
    assert kl.max() > 0.05


def test_frequency_factors_of_a_file(tiny, tmp_path):
    factors = np.linspace(1, 8, 8).astype(np.float32)
    path = with_tensor(tiny(), tmp_path / "factors.gguf", "rope_freqs.weight", factors)
    got = logits(opened(path), TOKENS)
    agree(got, Reference(path).logits(TOKENS), "fp32")
    assert divergence(logits(opened(tiny()), TOKENS), got).max() > 0.05


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("types", ["F32", "F16", "BF16"])
def test_a_folder_is_the_same_model(tiny, tmp_path, types, shards):
    """Rotate-half rows against interleaved ones, and one or several files: the same bits."""
    path = tiny(types=types)
    folder = write_tiny_hf(tmp_path / "hf", path, shards=shards)
    want = logits(opened(path), TOKENS)
    assert same_bits(logits(opened(folder), TOKENS), want)
    agree(want, Reference(path).logits(TOKENS), "bf16" if types == "BF16" else "fp32")


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_llama3_scaling(tiny, tmp_path, spelling):
    path = tiny(rope_base=5e5)
    folder = write_tiny_hf(tmp_path / "hf", path)
    config = json.loads((folder / "config.json").read_text())
    config[spelling] = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    if spelling == "rope_parameters":
        config[spelling]["rope_theta"] = config.pop("rope_theta")
    (folder / "config.json").write_text(json.dumps(config))
    frequencies = llama3_frequencies(16, 5e5, 8.0, 1.0, 4.0, 64)
    plain = Reference(path)
    bands = torch.unique((plain.inverse / frequencies).round(decimals=6))
    assert bands[0] == 1 and bands[-1] == 8 and len(bands) > 2  # kept, blended and stretched ones
    want = Reference(path, inverse_frequencies=frequencies).logits(TOKENS)
    agree(logits(opened(folder), TOKENS), want, "fp32")
    assert divergence(want, plain.logits(TOKENS)).max() > 1e-3


def test_a_folder_quantised_on_load(tiny, tmp_path):
    """int4 in groups of 32 of the layers' matrices: near the dense model, and the same on any ranks."""
    path = tiny(hidden=128, heads=8, kv_heads=4, ffn=256)
    folder = write_tiny_hf(tmp_path / "hf", path, dtype=torch.bfloat16)
    model = opened(folder, quantize="int4")
    got = logits(model, TOKENS)
    kl = divergence(Reference(path).logits(TOKENS), got)
    assert 1e-4 < kl.mean() < 0.5  # 4 bits lose something, and not the model
    for tp in (2, 3, 4):
        assert same_bits(logits(model, TOKENS, tp=tp), got)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_logits_are_bit_equal_for_any_ranks_and_chunks(tiny, dtype):
    """Block cuts inside units: 8 units of 40 columns over blocks of 256, and units with no FFN channels."""
    types = {"*": "Q4_K", "attn_v": "Q6_K", "ffn_down": "Q3_K", "ffn_gate": "Q8_0"}
    path = tiny(types=types, hidden=256, heads=16, kv_heads=8, head_dim=32, ffn=1280, vocab=389, layers=2)
    model = opened(path, dtype=dtype)
    assert len(model.units) == 8 and any(u.ffn[0] == u.ffn[1] for u in model.units)
    want = logits(model, TOKENS)
    agree(want, Reference(path).logits(TOKENS), dtype)
    for chunks in ([7] * 21 + [3], [64, 64, 22], [1] * 150, [149, 1]):
        assert same_bits(logits(model, TOKENS, chunks=chunks), want)
    for tp in (2, 3, 5, 7, 8):
        assert same_bits(logits(model, TOKENS, tp=tp), want), tp
    assert same_bits(logits(model, TOKENS, tp=3, chunks=[31, 119]), want)
