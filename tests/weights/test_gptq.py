"""GPTQ folders: what is loaded is what the format defines, to the bit; what is refused, and how."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from runtime.errors import BadModelFile, UnsupportedModel
from runtime.weights.checkpoint import open_checkpoint
from runtime.weights.loader import Slice, load, plan_reads
from runtime.weights.planar import Planar
from tests.weights.test_fuzz import damaged
from tests.weights.tiny_packed import (
    config_of,
    gptq_parts,
    naive,
    pack_words,
    quantise,
    random_quantised,
    write_layer,
)

NAME = "blk.0.ffn_down.weight"
STEM = "model.layers.0.mlp.down_proj"


def load_part(folder, rows=None, cols=None) -> Planar:
    checkpoint = open_checkpoint(folder)
    info = checkpoint.tensors[NAME]
    [(_, planar)] = load(checkpoint, [Slice(NAME, rows or (0, info.rows), cols or (0, info.cols))])
    return planar


def layer(tmp_path, *, bits=4, group=32, symmetric=False, v2=False, rows=16, cols=128, seed=0, **changes):
    """A folder of one layer, and its weights by the definition. `changes` replace parts (None drops one)."""
    rng = np.random.default_rng(seed)
    q = random_quantised(rng, rows, -(-cols // group) if group > 0 else 1, cols, bits)
    if symmetric:
        q.zeros[:] = 1 << (bits - 1)
    elif not v2:
        q.zeros[:] = np.minimum(q.zeros, (1 << bits) - 1)
    parts = gptq_parts(q, bits, 0 if v2 else 1, group)
    expected = naive(parts, "gptq", bits, 0 if v2 else 1, group)
    assert np.array_equal(expected, q.dense(group))
    parts = {part: array for part, array in (parts | changes).items() if array is not None}
    config = config_of("gptq", bits, group, symmetric=symmetric, v2=v2)
    return write_layer(tmp_path / "m", parts, config), expected


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [16, 32, 64, 128, 256, -1])
@pytest.mark.parametrize("kind", ["symmetric", "v1", "v2"])
def test_every_kind_is_exact(tmp_path, bits, group, kind):
    folder, expected = layer(
        tmp_path, bits=bits, group=group, symmetric=kind == "symmetric", v2=kind == "v2", cols=256
    )
    planar = load_part(folder)
    assert planar.bits == (bits,) and planar.group == planar.super_group == (
        min(group, 128) if group > 0 else 128
    )
    assert np.array_equal(planar.dequantize().numpy().astype(np.float64), expected)
    assert (planar.m is None) == (kind == "symmetric")
    assert open_checkpoint(folder).packed == open_checkpoint(folder).tensors[NAME].type


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """A layer whose last group is short: 5 groups of 64 and one of 32."""
    return {
        bits: layer(tmp_path_factory.mktemp("cut"), bits=bits, group=64, rows=40, cols=352, v2=True)
        for bits in (4, 8)
    }


@settings(max_examples=60, deadline=None)
@given(data=st.data(), bits=st.sampled_from([4, 8]))
def test_a_part_is_the_part_of_the_whole(cut, data, bits):
    folder, expected = cut[bits]
    row, col = data.draw(st.integers(0, 39)), data.draw(st.integers(0, 351))
    rows = row, data.draw(st.integers(row + 1, 40))
    cols = col, data.draw(st.integers(col + 1, 352))
    planar = load_part(folder, rows, cols)
    found = planar.dequantize().numpy().astype(np.float64)
    assert np.array_equal(found, expected[slice(*rows), slice(*cols)])
    height, width = rows[1] - rows[0], cols[1] - cols[0]
    planned = sum(read.total for read in plan_reads(open_checkpoint(folder), [Slice(NAME, rows, cols)]))
    words = -(-cols[1] // (32 // bits)) - cols[0] // (32 // bits)
    groups, row_words = -(-cols[1] // 64) - cols[0] // 64, -(-rows[1] * bits // 32) - rows[0] * bits // 32
    assert planned <= 1.05 * (4 * words * height + groups * (2 * height + 4 * row_words) + 4 * width)


def test_rows_and_columns_may_be_taken_later(cut):
    folder, expected = cut[4]
    planar = load_part(folder).select_rows(slice(3, 30)).select_cols(70, 300)
    assert np.array_equal(planar.dequantize().numpy().astype(np.float64), expected[3:30, 70:300])
    assert np.array_equal(planar.to("cpu").codes().shape, (27, 230))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scales_of_other_types_that_fp16_holds(tmp_path, dtype):
    q = quantise(np.random.default_rng(0).standard_normal((8, 64)), 4, 32, True)
    scales = torch.from_numpy(q.scales).to(torch.bfloat16)
    q.scales[:] = scales.to(torch.float16).numpy()  # what all three types hold
    parts = gptq_parts(q, 4, 1, 32)
    config = config_of("gptq", 4, 32, symmetric=True, v2=False)
    folder = write_layer(tmp_path / "m", parts, config)
    expected = load_part(folder).dequantize()
    tensors = {f"{STEM}.{part}": torch.from_numpy(array) for part, array in parts.items()}
    tensors[f"{STEM}.scales"] = scales.t().contiguous().to(dtype)
    save_file(tensors, folder / "model.safetensors")
    assert torch.equal(load_part(folder).dequantize(), expected)
    tensors[f"{STEM}.scales"][0, 0] = 3e-8  # half of fp16's smallest
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UnsupportedModel, match=rf"model.safetensors: {STEM}.scales: .* not exact in fp16"):
        load_part(folder)


def test_symmetric_zero_points_stored_as_v2_does(tmp_path):
    """GPTQModel has written zero points of 8 under checkpoint_format "gptq": symmetric ones can be told."""
    _, expected = layer(tmp_path / "a", symmetric=True)
    for stored in (7, 8):
        zeros = pack_words(np.full((4, 16), stored), 4)
        folder, _ = layer(tmp_path / str(stored), symmetric=True, qzeros=zeros)
        assert np.array_equal(load_part(folder).dequantize().numpy(), expected)


def test_older_folders_have_a_file_of_their_own(tmp_path):
    folder, expected = layer(tmp_path)
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    (folder / "config.json").write_text("{}")
    with pytest.raises(
        BadModelFile, match=r"config.json: quantization_config: missing, though layers are pac"
    ):
        open_checkpoint(folder)
    del said["quant_method"], said["checkpoint_format"]
    (folder / "quantize_config.json").write_text(json.dumps(said))
    assert np.array_equal(load_part(folder).dequantize().numpy(), expected)


def test_biases_of_zeros_are_what_old_writers_add(tmp_path):
    folder, expected = layer(tmp_path, bias=np.zeros(16, np.float16))
    assert np.array_equal(load_part(folder).dequantize().numpy(), expected)
    bias = np.zeros(16, np.float16)
    bias[9] = 0.5
    folder, _ = layer(tmp_path / "b", bias=bias)
    assert load_part(folder, rows=(0, 8)).rows == 8
    with pytest.raises(UnsupportedModel, match=rf"{STEM}.bias: biases are not served"):
        load_part(folder, rows=(8, 16))


def test_without_g_idx_groups_are_in_order(tmp_path):
    folder, expected = layer(tmp_path, g_idx=None)
    assert np.array_equal(load_part(folder).dequantize().numpy(), expected)


# ---- what is refused -------------------------------------------------------------------------------


def config(folder, **changes):
    path = folder / "config.json"
    held = json.loads(path.read_text())
    held["quantization_config"] |= changes
    path.write_text(json.dumps(held))
    return folder


def test_act_order_is_refused_where_it_is_found(tmp_path):
    order = np.random.default_rng(1).permutation(np.arange(128) // 32).astype(np.int32)
    folder, _ = layer(tmp_path, g_idx=order)
    with pytest.raises(UnsupportedModel, match=rf"{STEM}.g_idx: .*act-order.*desc_act false"):
        load_part(folder)
    with pytest.raises(UnsupportedModel, match=rf"{STEM}.g_idx: .*act-order.*desc_act false"):
        open_checkpoint(config(folder, desc_act=True))  # said: found before anything is loaded


def test_act_order_that_orders_nothing_is_served(tmp_path):
    folder, expected = layer(tmp_path)
    assert np.array_equal(load_part(config(folder, desc_act=True)).dequantize().numpy(), expected)
    folder, expected = layer(tmp_path / "whole", group=-1)
    assert np.array_equal(load_part(config(folder, desc_act=True)).dequantize().numpy(), expected)
    folder, _ = layer(tmp_path / "none", g_idx=None)
    with pytest.raises(BadModelFile, match=rf"{STEM}.g_idx: missing, though desc_act"):
        open_checkpoint(config(folder, desc_act=True))


@pytest.mark.parametrize("group", [-1, 4, 1 << 30])
def test_groups_that_are_not_there(tmp_path, group):
    order = (np.arange(128) // 32).astype(np.int32)
    order[100] = group
    folder, _ = layer(tmp_path, g_idx=order)
    with pytest.raises(BadModelFile, match=rf"model.safetensors: {STEM}.g_idx: names group {group} where"):
        load_part(folder)
    assert load_part(folder, cols=(0, 96)).cols == 96


@pytest.mark.parametrize(
    ("changes", "match", "error"),
    [
        ({"qzeros": None}, "qzeros: missing beside", BadModelFile),
        ({"scales": None}, "scales: missing beside", BadModelFile),
        ({"qweight": None}, "qweight: missing beside", BadModelFile),
        ({"qweight": np.zeros((17, 16), np.int32)}, r"shape \[4, 16\] where .* of 16 x 136", BadModelFile),
        ({"qweight": np.zeros((16, 12), np.int32)}, "qweight: 12 outputs do not fill words", BadModelFile),
        ({"qweight": np.zeros(16, np.int32)}, "qweight: .*not a matrix", BadModelFile),
        ({"qweight": np.zeros((16, 16), np.float16)}, "qweight: dtype F16, not I32", BadModelFile),
        ({"qzeros": np.zeros((4, 16), np.int32)}, r"qzeros: shape \[4, 16\] .* \[4, 2\]", BadModelFile),
        ({"qzeros": np.zeros((4, 2), np.float32)}, "qzeros: dtype F32, not I32", BadModelFile),
        ({"scales": np.zeros((8, 16), np.float16)}, r"scales: shape \[8, 16\] .* \[4, 16\]", BadModelFile),
        ({"scales": np.zeros((4, 16), np.int32)}, "scales: dtype I32, not F16", BadModelFile),
        ({"g_idx": np.zeros(64, np.int32)}, r"g_idx: shape \[64\] where .* needs \[128\]", BadModelFile),
        ({"g_idx": np.zeros((1, 128), np.int32)}, "g_idx: shape", BadModelFile),
        ({"bias": np.zeros(8, np.float16)}, r"bias: shape \[8\]", BadModelFile),
        ({"weight": np.zeros((16, 128), np.float16)}, "weight: the layer is there both", BadModelFile),
        ({"g_idx": np.zeros(128, np.int64)}, "g_idx: dtype I64 is not served", UnsupportedModel),
        ({"zeros": np.zeros(4, np.float16)}, "zeros: a dense Llama or Mistral has no", UnsupportedModel),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(tmp_path, changes, match, error):
    folder, _ = layer(tmp_path, **changes)
    with pytest.raises(error, match=match) as caught:
        open_checkpoint(folder)
    said = str(caught.value)
    assert said.startswith(f"{folder}/model.safetensors: {STEM}.") and "\n" not in said


@pytest.mark.parametrize(
    ("changes", "match", "error"),
    [
        ({"scales": np.full((4, 16), np.nan, np.float16)}, "scales: a scale is not a finite", BadModelFile),
        ({"scales": np.full((4, 16), 7e4, np.float32)}, "scales: a scale is not a finite", BadModelFile),
        ({"scales": np.full((4, 16), 0.1, np.float32)}, "scales: .* not exact in fp16", UnsupportedModel),
        ({"qzeros": np.full((4, 2), -1, np.int32)}, "qzeros: a stored zero point of 15", UnsupportedModel),
    ],
)  # fmt: skip
def test_numbers_that_cannot_be_held_are_named(tmp_path, changes, match, error):
    folder, _ = layer(tmp_path, **changes)
    with pytest.raises(error, match=rf"model.safetensors: {STEM}.{match}"):
        load_part(folder)


@pytest.mark.parametrize("stored", [6, 9, 0x88888887])
def test_zero_points_that_are_not_symmetric(tmp_path, stored):
    word = stored if stored > 15 else stored * 0x11111111
    zeros = np.full((4, 2), word, np.uint32).view(np.int32)
    folder, _ = layer(tmp_path, symmetric=True, qzeros=zeros)
    with pytest.raises(BadModelFile, match=rf"{STEM}.qzeros: holds other zero points than 8"):
        load_part(folder)


def test_symmetric_v2_has_no_zero_point_of_seven(tmp_path):
    folder, _ = layer(tmp_path, symmetric=True, v2=True, qzeros=pack_words(np.full((4, 16), 7), 4))
    with pytest.raises(BadModelFile, match=rf"{STEM}.qzeros: holds other zero points than 8"):
        load_part(folder)


@pytest.mark.parametrize(
    ("changes", "match", "error"),
    [
        ({"bits": 3}, "bits: GPTQ of 3 bits is not served; 4 and 8 bits are", UnsupportedModel),
        ({"bits": 2}, "bits: GPTQ of 2 bits", UnsupportedModel),
        ({"bits": None}, "bits: is missing", BadModelFile),
        ({"bits": "4"}, "bits: '4' is not a whole", BadModelFile),
        ({"bits": True}, "bits: True is not a whole", BadModelFile),
        ({"bits": 8}, "g_idx: shape|scales: shape", BadModelFile),
        ({"group_size": None}, "group_size: is missing", BadModelFile),
        ({"group_size": 0}, "group_size: 0 is neither -1", BadModelFile),
        ({"group_size": -2}, "group_size: -2", BadModelFile),
        ({"group_size": 1 << 60}, "group_size: ", BadModelFile),
        ({"group_size": 64.0}, "group_size: 64.0", BadModelFile),
        ({"group_size": 24}, "group_size: groups of 24", UnsupportedModel),
        ({"group_size": 64}, "scales: shape", BadModelFile),
        ({"checkpoint_format": "marlin"}, "checkpoint_format: 'marlin' is not served", UnsupportedModel),
        ({"checkpoint_format": 2}, "checkpoint_format: 2 is not a string", BadModelFile),
        ({"pack_dtype": "int64"}, "pack_dtype: 'int64'", UnsupportedModel),
        ({"sym": "yes"}, "sym: 'yes' is neither", BadModelFile),
        ({"dynamic": {"+:.*down.*": {"bits": 8}}}, "dynamic: settings of its own for '", UnsupportedModel),
        ({"dynamic": [1]}, "dynamic: is not an object", BadModelFile),
        ({"quant_method": "bitsandbytes"}, "quant_method 'bitsandbytes' is not served", UnsupportedModel),
        ({"quant_method": None}, "quant_method None is not served", UnsupportedModel),
        ({"quant_method": ["gptq"]}, "quant_method .* is not served", UnsupportedModel),
    ],
)
def test_configs_that_are_not_served(tmp_path, changes, match, error):
    folder = config(layer(tmp_path)[0], **changes)
    with pytest.raises(error, match=match) as caught:
        open_checkpoint(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_config_that_leaves_layers_dense_needs_no_words(tmp_path):
    folder, expected = layer(tmp_path)
    config(folder, dynamic={"-:.*lm_head.*": {}})
    assert np.array_equal(load_part(folder).dequantize().numpy(), expected)


FUZZED = gptq_parts(random_quantised(np.random.default_rng(0), 8, 2, 64, 4), 4, 0, 32)
FUZZED_CONFIG = config_of("gptq", 4, 32, symmetric=False, v2=True)


def opens_or_refuses(folder):
    """Loads whatever a folder holds, if it opens; any error but a refusal is a failure."""
    with suppress(BadModelFile, UnsupportedModel):
        checkpoint = open_checkpoint(folder)
        everything = [Slice(name, (0, i.rows), (0, i.cols)) for name, i in checkpoint.tensors.items()]
        for part, weights in load(checkpoint, everything, threads=1):
            dense = weights.dequantize() if isinstance(weights, Planar) else weights
            assert dense.shape[-1] == part.cols[1]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damaged_files(data):
    with TemporaryDirectory() as name:
        folder = write_layer(Path(name), FUZZED, FUZZED_CONFIG)
        file = folder / "model.safetensors"
        file.write_bytes(data.draw(damaged(file.read_bytes())))
        opens_or_refuses(folder)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["gptq", "awq"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None)
@given(changes=st.dictionaries(st.sampled_from([*FUZZED_CONFIG, "dynamic", "pack_dtype", "version"]), JSON))
def test_damaged_configs(changes):
    with TemporaryDirectory() as name:
        opens_or_refuses(write_layer(Path(name), FUZZED, FUZZED_CONFIG | changes))


@settings(max_examples=50, deadline=None)
@given(said=JSON)
def test_damaged_quantization_config(said):
    with TemporaryDirectory() as name:
        opens_or_refuses(write_layer(Path(name), FUZZED, said))


def test_a_file_cut_short_is_refused(tmp_path):
    folder, _ = layer(tmp_path)
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    for size in (len(raw) - 1, len(raw) // 2, 100, 4):
        file.write_bytes(raw[:size])
        with pytest.raises(BadModelFile, match=r"model\.safetensors: "):
            open_checkpoint(folder)
    file.write_bytes(raw)
    checkpoint = open_checkpoint(folder)
    file.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(BadModelFile, match=r"model\.safetensors: ends at byte .* it shrank"):
        list(load(checkpoint, [Slice(NAME, (0, 16), (0, 128))]))
