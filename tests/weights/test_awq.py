"""AWQ folders: what is loaded is what the format defines, to the bit; what is refused, and how."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import BadModelFile, UnsupportedModel
from runtime.weights.awq import ORDER
from runtime.weights.checkpoint import open_checkpoint
from runtime.weights.loader import Slice, load, plan_reads
from runtime.weights.planar import Planar
from tests.weights.tiny_packed import (
    AWQ_ORDER,
    awq_parts,
    config_of,
    naive,
    pack_words,
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


def layer(tmp_path, *, group=32, symmetric=False, rows=16, cols=128, seed=0, **changes):
    """A folder of one layer, and its weights by the definition. `changes` replace parts (None drops one)."""
    rng = np.random.default_rng(seed)
    q = random_quantised(rng, rows, -(-cols // group) if group > 0 else 1, cols, 4)
    q.zeros[:] = 8 if symmetric else rng.integers(0, 16, q.zeros.shape)  # zero is a zero point like any
    parts = awq_parts(q)
    expected = naive(parts, "awq", 4, 0, group)
    assert np.array_equal(expected, q.dense(group))
    parts = {part: array for part, array in (parts | changes).items() if array is not None}
    said = config_of("awq", 4, group, symmetric=symmetric, v2=False)
    return write_layer(tmp_path / "m", parts, said), expected


def config(folder, **changes):
    path = folder / "config.json"
    held = json.loads(path.read_text())
    held["quantization_config"] |= changes
    path.write_text(json.dumps(held))
    return folder


def test_the_order_of_fields():
    """A word that says which field each of its codes came from."""
    assert ORDER == AWQ_ORDER
    [word] = pack_words(np.arange(8), 4, AWQ_ORDER).view(np.uint32)
    assert f"{word:08x}" == "75316420"


@pytest.mark.parametrize("group", [32, 64, 128, 256, -1])
@pytest.mark.parametrize("symmetric", [False, True])
def test_every_kind_is_exact(tmp_path, group, symmetric):
    folder, expected = layer(tmp_path, group=group, symmetric=symmetric, cols=256)
    planar = load_part(folder)
    assert planar.bits == (4,) and planar.group == (min(group, 128) if group > 0 else 128)
    assert np.array_equal(planar.dequantize().numpy().astype(np.float64), expected)
    assert (planar.m is None) == symmetric


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    return layer(tmp_path_factory.mktemp("cut"), group=64, rows=40, cols=352)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_part_is_the_part_of_the_whole(cut, data):
    folder, expected = cut
    row, col = data.draw(st.integers(0, 39)), data.draw(st.integers(0, 351))
    rows = row, data.draw(st.integers(row + 1, 40))
    cols = col, data.draw(st.integers(col + 1, 352))
    found = load_part(folder, rows, cols).dequantize().numpy().astype(np.float64)
    assert np.array_equal(found, expected[slice(*rows), slice(*cols)])
    planned = sum(read.total for read in plan_reads(open_checkpoint(folder), [Slice(NAME, rows, cols)]))
    words, groups = -(-rows[1] // 8) - rows[0] // 8, -(-cols[1] // 64) - cols[0] // 64
    share = 4 * words * (cols[1] - cols[0]) + groups * (2 * (rows[1] - rows[0]) + 4 * words)
    assert planned <= 1.05 * share


def test_older_folders_have_a_file_of_their_own(tmp_path):
    folder, expected = layer(tmp_path)
    (folder / "config.json").write_text("{}")
    said = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    (folder / "quant_config.json").write_text(json.dumps(said))
    assert np.array_equal(load_part(folder).dequantize().numpy(), expected)


@pytest.mark.parametrize(
    ("changes", "match", "error"),
    [
        ({"qzeros": None}, "qzeros: missing beside", BadModelFile),
        ({"scales": None}, "scales: missing beside", BadModelFile),
        ({"qweight": np.zeros((128, 3), np.int32)}, r"scales: shape \[4, 16\] .*24", BadModelFile),
        ({"qweight": np.zeros((16, 16), np.int32)}, r"scales: shape \[4, 16\]", BadModelFile),  # GPTQ's shape
        ({"qzeros": np.zeros((4, 3), np.int32)}, r"qzeros: shape \[4, 3\] .* \[4, 2\]", BadModelFile),
        ({"scales": np.zeros((2, 16), np.float16)}, r"scales: shape \[2, 16\]", BadModelFile),
        ({"g_idx": np.zeros(128, np.int32)}, "g_idx: AWQ has no such tensor", BadModelFile),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, changes, match, error):
    folder, _ = layer(tmp_path, **changes)
    with pytest.raises(error, match=rf"model.safetensors: {STEM}.{match}"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("changes", "match", "error"),
    [
        ({"bits": 8}, "bits: AWQ of 8 bits is not served; 4 bits are", UnsupportedModel),
        ({"version": "gemv"}, "version: 'gemv' is not served; gemm is", UnsupportedModel),
        ({"version": 1}, "version: 1 is not a string", BadModelFile),
        ({"zero_point": 1}, "zero_point: 1 is neither", BadModelFile),
        ({"group_size": 100}, "group_size: groups of 100", UnsupportedModel),
    ],
)
def test_configs_that_are_not_served(tmp_path, changes, match, error):
    folder = config(layer(tmp_path)[0], **changes)
    with pytest.raises(error, match=rf"config.json: quantization_config: {match}"):
        open_checkpoint(folder)


def test_zero_points_that_are_not_symmetric(tmp_path):
    folder = config(layer(tmp_path)[0], zero_point=False)
    with pytest.raises(BadModelFile, match=rf"{STEM}.qzeros: holds other zero points than 8"):
        load_part(folder)
