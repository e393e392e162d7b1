"""Models whose layers are GPTQ or AWQ: their logits, on any ranks, and what a rank reads of them."""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from runtime.errors import BadModelFile, InvalidArgument, UnsupportedModel
from runtime.weights.safetensors import canonical_name
from tests.bits import same_bits
from tests.model.driver import logits, opened
from tests.model.reference import Reference, divergence
from tests.model.test_logits import agree
from tests.model.test_shares import check
from tests.weights.tiny_hf import STEMS
from tests.weights.tiny_packed import Quantised, gptq_parts, naive, write_tiny_packed

TOKENS = np.random.default_rng(0).integers(0, 384, 100).tolist()
SHAPE = {"hidden": 128, "heads": 6, "kv_heads": 3, "head_dim": 32, "ffn": 384, "layers": 2}
KINDS = {
    "gptq symmetric": {"method": "gptq", "symmetric": True},
    "gptq v1": {"method": "gptq"},
    "gptq v2": {"method": "gptq", "v2": True},
    "gptq 8-bit": {"method": "gptq", "bits": 8, "v2": True},
    "gptq 8-bit symmetric": {"method": "gptq", "bits": 8, "symmetric": True, "group": 64},
    "gptq g64": {"method": "gptq", "group": 64, "v2": True},
    "gptq g128": {"method": "gptq", "group": 128, "symmetric": True},
    "gptq whole columns": {"method": "gptq", "group": -1},
    "awq": {"method": "awq"},
    "awq g128": {"method": "awq", "group": 128},
    "awq symmetric": {"method": "awq", "group": 64, "symmetric": True},
}


def reference(path, folder) -> Reference:
    """The oracle of `path`, with the weights that `folder` holds."""
    found = Reference(path)
    config = json.loads((folder / "config.json").read_text())
    said, head_dim = config["quantization_config"], config["head_dim"]
    method, bits = said["quant_method"], said["bits"]
    shift = int(said.get("checkpoint_format") == "gptq")
    tensors = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    stems = {name.rpartition(".")[0] for name in tensors}
    for stem in stems:
        if f"{stem}.qweight" in tensors:
            parts = {part: tensors[f"{stem}.{part}"].numpy() for part in ("qweight", "qzeros", "scales")}
            dense = torch.from_numpy(naive(parts, method, bits, shift, said["group_size"]))
        else:
            dense = tensors[f"{stem}.weight"].double()
        name = canonical_name(f"{stem}.weight", "")
        if ".attn_q." in name or ".attn_k." in name:  # the oracle wants interleaved pairs
            dense = dense.view(-1, 2, head_dim // 2, dense.shape[1]).transpose(1, 2).reshape(dense.shape)
        assert found.weights[name].shape == dense.shape
        found.weights[name] = dense
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_logits_agree_with_the_definition_on_any_ranks(tiny, tmp_path, kind):
    path = tiny(**SHAPE)
    folder = write_tiny_packed(tmp_path / "m", path, **KINDS[kind])
    want = reference(path, folder).logits(TOKENS)
    exact = opened(folder, dtype="fp32")
    agree(logits(exact, TOKENS), want, "fp32")
    assert same_bits(logits(exact, TOKENS, tp=2), logits(exact, TOKENS))
    model = opened(folder)
    assert model.dtype == "bf16" and len(model.units) == 3
    got = logits(model, TOKENS)
    agree(got, want, "bf16")
    for tp in (2, 3):
        assert same_bits(logits(model, TOKENS, tp=tp), got), tp
    assert same_bits(logits(model, TOKENS, tp=3, chunks=[31, 69]), got)


@pytest.mark.parametrize(("bits", "type"), [(4, "Q4_0"), (8, "Q8_0")])
def test_the_bits_of_a_gguf_that_holds_the_same_numbers(tiny, tmp_path, bits, type):
    """Symmetric groups of 32 are Q4_0 (codes less 8) and Q8_0: the same codes and scales, the same logits."""
    path = tiny(types={"*": type, "token_embd": "F16", "output": "F16"}, **SHAPE)
    folder = write_tiny_packed(tmp_path / "m", path, "gptq", bits=bits, symmetric=True)
    _take_scales_of_gguf(folder, path, bits)
    for dtype in ("bf16", "fp32"):
        want = logits(opened(path, dtype=dtype), TOKENS)
        assert same_bits(logits(opened(folder, dtype=dtype), TOKENS), want)


def _take_scales_of_gguf(folder, path, bits) -> None:
    """Replaces what rounding made of codes and scales by those of the GGUF's blocks."""
    tensors = load_file(folder / "model.safetensors")
    for tensor in gguf.GGUFReader(path).tensors:
        _, layer, stem, _ = f"..{tensor.name}".split(".")[-4:]
        if "norm" in stem:  # F32 there, and fp16 in the folder
            name = f"model.layers.{layer}.{STEMS[stem]}" if layer else STEMS[stem]
            tensors[f"{name}.weight"] = torch.from_numpy(tensor.data.copy())
        if "norm" in stem or not layer:
            continue
        blocks = tensor.data.reshape(tensor.data.shape[0], -1, 18 if bits == 4 else 34)
        scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
        held = blocks[..., 2:]
        codes = np.concatenate((held & 15, held >> 4), -1) if bits == 4 else held ^ np.uint8(128)
        codes = codes.reshape(len(codes), -1)
        if "attn_q" in tensor.name or "attn_k" in tensor.name:
            turn = np.arange(len(codes)).reshape(-1, SHAPE["head_dim"] // 2, 2).transpose(0, 2, 1).reshape(-1)
            codes, scales = codes[turn], scales[turn]
        q = Quantised(codes, np.full(scales.shape, 1 << (bits - 1)), scales)
        for part, array in gptq_parts(q, bits, 1, 32).items():
            name = f"model.layers.{layer}.{STEMS[stem]}.{part}"
            assert tensors[name].shape == array.shape
            tensors[name] = torch.from_numpy(array)
    save_file(tensors, folder / "model.safetensors")


def test_layouts_of_the_same_numbers_give_the_same_bits(tiny, tmp_path):
    """AWQ, GPTQ with zero points less one, and as they are; in one file or in several; with zero biases."""
    path = tiny(**SHAPE)
    folders = [
        write_tiny_packed(tmp_path / "awq", path, "awq", group=64),
        write_tiny_packed(tmp_path / "v1", path, "gptq", group=64, biases=True),
        write_tiny_packed(tmp_path / "v2", path, "gptq", group=64, v2=True, shards=3),
    ]
    first, *others = [logits(opened(folder), TOKENS) for folder in folders]
    for other in others:
        assert same_bits(other, first)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_head_and_layers_left_dense(tiny, tmp_path, method, symmetric):
    path = tiny(**SHAPE)
    folder = write_tiny_packed(
        tmp_path / "m",
        path,
        method,
        symmetric=symmetric,
        lm_head=True,
        dense=("down", "k_proj", "layers.1.mlp"),
    )
    model, want = opened(folder), reference(path, folder).logits(TOKENS)
    assert model.checkpoint.tensors["output.weight"].type is model.checkpoint.packed
    got = logits(model, TOKENS)
    agree(got, want, "bf16")
    assert same_bits(logits(model, TOKENS, tp=3), got)


@pytest.mark.parametrize("bits", [4, 8])
def test_an_eight_bit_head(tiny, tmp_path, bits):
    path = tiny(**SHAPE)
    folder = write_tiny_packed(tmp_path / "m", path, "gptq", bits=bits, v2=True, lm_head=True)
    agree(logits(opened(folder), TOKENS), reference(path, folder).logits(TOKENS), "bf16")


def test_the_order_of_rows_matters(tiny, tmp_path):
    """What the agreement rests on: q and k rows in the other order are another model."""
    path = tiny(**SHAPE)
    folder = write_tiny_packed(tmp_path / "m", path, "gptq", symmetric=True)
    want = reference(path, folder)
    good = want.logits(TOKENS)
    d = SHAPE["head_dim"]
    for name, held in want.weights.items():
        if ".attn_q." in name or ".attn_k." in name:
            want.weights[name] = held.view(-1, d // 2, 2, held.shape[1]).transpose(1, 2).reshape(held.shape)
    assert divergence(good, want.logits(TOKENS)).max() > 0.05


SHARES = {"hidden": 1024, "heads": 16, "kv_heads": 8, "head_dim": 64, "ffn": 2048, "vocab": 4096, "layers": 1}


@pytest.mark.parametrize("kind", ["gptq g128", "gptq 8-bit", "awq g128", "gptq whole columns"])
def test_a_rank_reads_its_share(tiny, tmp_path, kind):
    path = tiny(types={"*": "Q8_0"}, **SHARES)
    check(opened(write_tiny_packed(tmp_path / "m", path, **KINDS[kind])))


def test_groups_cut_inside_a_unit(tiny, tmp_path):
    """Units of 96 columns over groups of 128: the attention output's groups shrink to 32, scales repeat."""
    path = tiny(hidden=128, heads=12, kv_heads=4, head_dim=32, ffn=640, layers=2)
    for method in ("gptq", "awq"):
        folder = write_tiny_packed(tmp_path / method, path, method, group=128)
        model, want = opened(folder), reference(path, folder).logits(TOKENS)
        assert [u.ffn for u in model.units] == [(0, 128), (128, 256), (256, 384), (384, 640)]
        got = logits(model, TOKENS)
        agree(got, want, "bf16")
        for tp in (2, 3, 4):
            assert same_bits(logits(model, TOKENS, tp=tp), got)


# ---- what is refused -------------------------------------------------------------------------------


def test_a_quantised_model_is_not_quantised_again(tiny, tmp_path):
    folder = write_tiny_packed(tmp_path / "m", tiny(**SHAPE), "awq")
    with pytest.raises(InvalidArgument, match="quantize: the model is quantised already: AWQ 4-bit g32"):
        opened(folder, quantize="int4")


def test_a_layer_that_does_not_fit_the_model(tiny, tmp_path):
    folder = write_tiny_packed(tmp_path / "m", tiny(**SHAPE), "gptq")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 256}))
    with pytest.raises(BadModelFile, match=r"model.safetensors: blk.0.ffn_gate.weight: is 384 x 128 where"):
        opened(folder)


def test_act_order_is_refused_when_the_model_is_opened(tiny, tmp_path):
    folder = write_tiny_packed(tmp_path / "m", tiny(**SHAPE), "gptq")
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if name.endswith("g_idx"):
            tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["desc_act"] = True
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match=r"g_idx: .*act-order"):
        opened(folder)
