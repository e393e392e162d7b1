"""The safetensors reader: Hugging Face folders as they are, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from runtime.errors import BadModelFile, NotFound, UnsupportedModel
from runtime.weights.checkpoint import check_tensor, open_checkpoint
from runtime.weights.loader import Slice, load
from runtime.weights.safetensors import canonical_name, read_safetensors_folder
from tests.support import fixture_path
from tests.weights.tiny import write_tiny_llama
from tests.weights.writer import safetensors_bytes, write_folder

NORM = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def refused(tmp_path, header, match, data=bytes(8), error=BadModelFile, **kwargs):
    files = {"config.json": {}, "model.safetensors": safetensors_bytes(header, data, **kwargs)}
    folder = write_folder(tmp_path / "m", files)
    with pytest.raises(error, match=match) as caught:
        read_safetensors_folder(folder)
    assert str(folder / "model.safetensors") in str(caught.value) and "\n" not in str(caught.value)


def whole(checkpoint):
    wanted = [Slice(name, (0, info.rows), (0, info.cols)) for name, info in checkpoint.tensors.items()]
    return {part.name: weights for part, weights in load(checkpoint, wanted)}


def test_names_are_ggufs():
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "lm_head.weight": "output.weight",
        "model.norm.weight": "output_norm.weight",
        "model.layers.0.input_layernorm.weight": "blk.0.attn_norm.weight",
        "model.layers.11.self_attn.q_proj.weight": "blk.11.attn_q.weight",
        "model.layers.11.self_attn.k_proj.bias": "blk.11.attn_k.bias",
        "model.layers.79.self_attn.v_proj.weight": "blk.79.attn_v.weight",
        "model.layers.1.self_attn.o_proj.weight": "blk.1.attn_output.weight",
        "model.layers.1.post_attention_layernorm.weight": "blk.1.ffn_norm.weight",
        "model.layers.1.mlp.gate_proj.weight": "blk.1.ffn_gate.weight",
        "model.layers.1.mlp.up_proj.weight": "blk.1.ffn_up.weight",
        "model.layers.1.mlp.down_proj.weight": "blk.1.ffn_down.weight",
        "model.layers.1.self_attn.rotary_emb.inv_freq": "",
    }
    assert {name: canonical_name(name, "f") for name in names} == names
    for name in ("model.layers.0.self_attn.q_proj.qweight", "model.layers.x.mlp.up_proj.weight",
                 "model.layers.0.self_attn.q_norm.weight", "model.layers.00.mlp.up_proj.weight", "weight",
                 "model.layers.0.block_sparse_moe.gate.weight", "lm_head.scale"):  # fmt: skip
        with pytest.raises(UnsupportedModel, match="f: "):
            canonical_name(name, "f")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_agrees_with_the_safetensors_package(tmp_path, dtype):
    tensors = {
        "model.embed_tokens.weight": torch.randn(5, 3).to(dtype),
        "model.layers.0.mlp.up_proj.weight": torch.randn(4, 7).to(dtype),
        "model.norm.weight": torch.randn(3).to(dtype),
    }
    folder = write_folder(tmp_path / "m", {"config.json": {"model_type": "llama"}})
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.kind, checkpoint.half_split_rope) == ("safetensors", True)
    assert checkpoint.config == {"model_type": "llama"} and checkpoint.metadata == {}
    found = whole(checkpoint)
    for name, expected in tensors.items():
        weights = found.pop(canonical_name(name, ""))
        assert weights.dtype == dtype and torch.equal(weights, expected)
    assert not found
    assert check_tensor(checkpoint, "output_norm.weight", 1, 3).shape == (3,)


def test_shards_are_joined_by_the_index(tmp_path):
    folder = write_folder(tmp_path / "m", {"config.json": {}})
    shards = {
        "model-00001-of-00002.safetensors": {"model.norm.weight": torch.ones(3)},
        "model-00002-of-00002.safetensors": {"lm_head.weight": torch.full((2, 3), 7.0)},
    }
    weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    for shard, tensors in shards.items():
        save_file(tensors, folder / shard)
    write_folder(folder, {"model.safetensors.index.json": {"metadata": {}, "weight_map": weight_map}})
    checkpoint = open_checkpoint(folder)
    assert checkpoint.files == tuple(str(folder / shard) for shard in shards)
    found = whole(checkpoint)
    assert torch.equal(found["output.weight"], torch.full((2, 3), 7.0))
    assert torch.equal(found["output_norm.weight"], torch.ones(3))


def index_refused(tmp_path, weight_map, match, error=BadModelFile):
    files = {
        "config.json": {},
        "model.safetensors.index.json": {"weight_map": weight_map},
        "a.safetensors": safetensors_bytes({"model.norm.weight": NORM}, bytes(8)),
        "b.safetensors": safetensors_bytes({"model.norm.weight": NORM}, bytes(8)),
    }
    with pytest.raises(error, match=match):
        read_safetensors_folder(write_folder(tmp_path / "m", files))


@pytest.mark.parametrize(
    "shard", ["../a.safetensors", "/etc/a.safetensors", "x/a.safetensors", "..", "", 7, "a.safetensors\n"]
)
def test_an_index_cannot_leave_its_folder(tmp_path, shard):
    index_refused(tmp_path, {"model.norm.weight": shard}, "index.json: model.norm.weight: not the name of")


@pytest.mark.parametrize(
    ("weight_map", "match"),
    [
        ({}, "index.json: weight_map: missing, empty"),
        ([], "index.json: weight_map: missing, empty"),
        ({"model.norm.weight": "c.safetensors"}, "c.safetensors: missing"),
        ({"lm_head.weight": "a.safetensors"}, "a.safetensors: lm_head.weight: missing, though the index"),
        ({"model.norm.weight": "a.safetensors", "\n": "b.safetensors"}, "not a printable tensor name"),
    ],
)
def test_an_index_that_lies(tmp_path, weight_map, match):
    index_refused(tmp_path, weight_map, match)


def test_a_shard_that_holds_more_than_the_index_says(tmp_path):
    second = {"model.norm.weight": NORM, "lm_head.bias": {**NORM, "data_offsets": [8, 16]}}
    files = {
        "config.json": {},
        "model.safetensors.index.json": {"weight_map": {"model.norm.weight": "a.safetensors"}},
        "a.safetensors": safetensors_bytes(second, bytes(16)),
    }
    with pytest.raises(BadModelFile, match=r"a.safetensors: lm_head.bias: the index does not place it"):
        read_safetensors_folder(write_folder(tmp_path / "m", files))


def test_folders_that_lack_files(tmp_path):
    with pytest.raises(NotFound, match=r"config.json"):
        read_safetensors_folder(write_folder(tmp_path / "a", {}))
    with pytest.raises(NotFound, match=r"model.safetensors"):
        read_safetensors_folder(write_folder(tmp_path / "b", {"config.json": {}}))
    with pytest.raises(BadModelFile, match=r"config.json: not a JSON object"):
        read_safetensors_folder(write_folder(tmp_path / "c", {"config.json": []}))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"shape": [3]}, "offsets span 8 bytes; the shape takes 12"),
        ({"shape": [2, 0]}, "empty dimension"),
        ({"shape": []}, "not a shape"),
        ({"shape": [1, 1, 1, 1, 2]}, "not a shape"),
        ({"shape": [-2]}, "not a shape"),
        ({"shape": [2.0]}, "not a shape"),
        ({"shape": [True, 2]}, "not a shape"),
        ({"shape": "2"}, "not a shape"),
        ({"shape": [1 << 40, 1 << 40]}, "elements"),
        ({"shape": [1 << 64]}, "not a shape"),
        ({"data_offsets": [8, 0]}, "offsets span"),
        ({"data_offsets": [0]}, "not data offsets"),
        ({"data_offsets": [0, 8, 16]}, "not data offsets"),
        ({"data_offsets": [-8, 0]}, "not data offsets"),
        ({"data_offsets": [8, 16]}, "ends at byte"),
        ({"data_offsets": [1 << 62, (1 << 62) + 8]}, "ends at byte"),
        ({"dtype": "F31"}, "unknown dtype"),
        ({"dtype": ["F32"]}, "unknown dtype"),
        ({"extra": 1}, "not an object of"),
    ],
)
def test_entries_that_lie(tmp_path, changes, match):
    refused(tmp_path, {"model.norm.weight": {**NORM, **changes}}, f"model.norm.weight: .*{match}")


@pytest.mark.parametrize("dtype", ["F64", "I64", "F8_E4M3"])
def test_dtypes_that_are_not_served_are_named(tmp_path, dtype):
    header = {"model.norm.weight": {**NORM, "dtype": dtype}}
    refused(tmp_path, header, f"model.norm.weight: dtype {dtype} is not", error=UnsupportedModel)


def test_headers_that_lie(tmp_path):
    good = {"model.norm.weight": NORM}
    refused(tmp_path, good, "a header of", length=1 << 63)
    refused(tmp_path, good, "not JSON", length=20)
    refused(tmp_path, b"\xff\xfe", "not UTF-8")
    refused(tmp_path, [], "not a JSON object")
    refused(tmp_path, b'{"a":1,"a":2}', "'a': the key stands twice")
    refused(tmp_path, b"[" * 200_000, "not JSON that can be read")
    refused(tmp_path, {"model.norm.weight": [1]}, "not an object of")
    refused(tmp_path, good, "4 bytes belong to no tensor", data=bytes(12))
    refused(tmp_path, {**good, "lm_head.weight": NORM}, "overlaps tensor")
    refused(tmp_path, {"model\n": NORM}, "not a printable tensor name")
    with pytest.raises(BadModelFile, match="a header of"):
        folder = write_folder(tmp_path / "short", {"config.json": {}, "model.safetensors": b"123"})
        read_safetensors_folder(folder)


def test_every_truncation_is_refused(tmp_path):
    raw = safetensors_bytes({"model.norm.weight": NORM}, bytes(8))
    for length in range(len(raw)):
        with pytest.raises(BadModelFile):
            read_safetensors_folder(
                write_folder(tmp_path / "m", {"config.json": {}, "model.safetensors": raw[:length]})
            )


# ---- either kind of checkpoint ---------------------------------------------------------------------


def test_a_folder_with_one_gguf_is_that_model(tmp_path):
    path = write_tiny_llama(tmp_path / "m.gguf")
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.kind, checkpoint.path, checkpoint.half_split_rope) == ("gguf", str(path), False)
    assert checkpoint.metadata["general.architecture"] == "llama"
    write_tiny_llama(tmp_path / "n.gguf")
    with pytest.raises(BadModelFile, match=r"several models \(m.gguf, n.gguf"):
        open_checkpoint(tmp_path)


def test_what_is_no_model(tmp_path):
    with pytest.raises(NotFound, match="no such file or folder"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(NotFound, match=r"neither a config.json nor a .gguf"):
        open_checkpoint(tmp_path)


def test_a_tensor_is_missing_or_has_another_shape(tmp_path):
    checkpoint = open_checkpoint(write_tiny_llama(tmp_path / "m.gguf", hidden=64, ffn=160))
    assert check_tensor(checkpoint, "blk.1.ffn_up.weight", 160, 64).name == "blk.1.ffn_up.weight"
    with pytest.raises(BadModelFile, match=r"m.gguf: blk.2.ffn_up.weight: the tensor is missing"):
        check_tensor(checkpoint, "blk.2.ffn_up.weight", 160, 64)
    with pytest.raises(BadModelFile, match=r"ffn_up.weight: is 160 x 64 where the model needs 64 x 160"):
        check_tensor(checkpoint, "blk.1.ffn_up.weight", 64, 160)


def test_the_real_folder_holds_the_real_file():
    hf = fixture_path("stories260K/hf")
    ours, direct = whole(open_checkpoint(hf)), load_file(hf / "model.safetensors")
    assert len(ours) == len(direct)
    for name, expected in direct.items():
        assert torch.equal(ours[canonical_name(name, "")], expected)
    gguf = whole(open_checkpoint(fixture_path("stories260K/stories260K.f32.gguf")))
    assert set(gguf) == set(ours)
    for name in gguf:
        if ".attn_q." in name or ".attn_k." in name:  # the same rows in the two orders of half_split_rope
            heads = gguf[name].shape[0] // 8
            pairs = ours[name].view(heads, 2, 4, -1).transpose(1, 2).reshape(gguf[name].shape)
            np.testing.assert_array_equal(pairs, gguf[name])
        else:
            assert torch.equal(ours[name], gguf[name])
