"""Planar weights are the file's weights, bit for bit, whole or cut."""

from __future__ import annotations

import itertools
from dataclasses import fields

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.weights import bitplanes, planar
from runtime.weights.bitplanes import empty_planes, pack, unpack
from runtime.weights.blocks import SPECS, Parts, QuantSpec
from runtime.weights.checkpoint import open_checkpoint
from runtime.weights.formats import TensorType
from runtime.weights.loader import Slice, load
from runtime.weights.planar import Planar, cut_parts, from_gguf_bytes, planar_of_parts
from tests.support import fixture_path

TYPES = list(SPECS)
HALVES = {  # bytes of a block that hold fp16 numbers
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82),
    "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip


def random_rows(type: TensorType, rows: int, blocks: int, seed: int) -> np.ndarray:
    """Random bytes [rows, blocks, bytes a block], fp16 fields finite: any sign, subnormals and zeros too."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (rows, blocks, type.block_bytes), dtype=np.uint8)
    for at in HALVES[type]:
        halves = rng.integers(0, 1 << 16, (rows, blocks), dtype=np.uint16)
        halves[rng.random(halves.shape) < 0.25] &= 0x83FF  # a zero exponent: subnormal, or zero
        halves = np.where(halves & 0x7C00 == 0x7C00, halves & 0x83FF, halves).astype("<u2")
        raw[..., at : at + 2] = halves[..., None].view(np.uint8)
    return raw


def oracle(raw: np.ndarray, type: TensorType) -> np.ndarray:
    rows = np.ascontiguousarray(raw).reshape(raw.shape[0], -1)
    return gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[type.name])


def assert_same_bits(found: torch.Tensor, expected: np.ndarray) -> None:
    assert found.dtype == torch.float32 and tuple(found.shape) == expected.shape
    np.testing.assert_array_equal(found.contiguous().numpy().view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("type", TYPES)
def test_random_bytes_dequantise_to_the_oracles_bits(type):
    raw = random_rows(type, 67, 1024 // type.block, seed=1)
    planar = from_gguf_bytes(raw, type, 67, 1024)
    assert_same_bits(planar.dequantize(), oracle(raw, type))
    assert (planar.group, planar.super_group) == (SPECS[type].group, SPECS[type].super_group)


@pytest.mark.parametrize("type", TYPES)
def test_every_code_of_a_type_survives(type):
    codes = from_gguf_bytes(random_rows(type, 64, 4, seed=2), type, 64, 4 * type.block).codes()
    low, high = (-128, 127) if type == "Q8_0" else (0, 2 ** sum(SPECS[type].bits) - 1)
    assert codes.dtype == (torch.int8 if type == "Q8_0" else torch.uint8)
    assert (codes.min(), codes.max()) == (low, high)


@pytest.mark.parametrize("type", TYPES)
def test_codes_scales_and_offsets_give_the_weights_in_the_stated_order(type):
    raw = random_rows(type, 5, 512 // type.block, seed=3)
    planar = from_gguf_bytes(raw, type, 5, 512)
    codes = planar.codes().float().view(5, -1, planar.group)
    scaled = (codes - planar.zero_point) * planar.scales()[..., None]
    assert_same_bits((scaled + planar.offsets()[..., None]).view(5, 512), oracle(raw, type))


@settings(max_examples=120, deadline=None)
@given(type=st.sampled_from(TYPES), data=st.data())
def test_a_cut_anywhere_is_the_cut_of_the_whole(type, data):
    cols = data.draw(st.integers(1, 1024 // type.block)) * type.block
    start = data.draw(st.integers(0, cols - 1))
    stop = data.draw(st.integers(start + 1, cols))
    raw = random_rows(type, 3, cols // type.block, seed=cols)
    expected = oracle(raw, type)[:, start:stop]
    touched = raw[:, start // type.block : -(-stop // type.block)]
    planar = from_gguf_bytes(torch.from_numpy(touched.copy()), type, 3, cols, start, stop)
    assert planar.cols == stop - start and planar.cols % planar.super_group == 0
    assert planar.super_group % planar.group == 0
    assert_same_bits(planar.dequantize(), expected)
    again = data.draw(st.integers(0, planar.cols - 1))
    assert_same_bits(planar.select_cols(again, planar.cols).dequantize(), expected[:, again:])


def test_a_cut_keeps_the_largest_group_that_still_fits():
    raw = random_rows(TensorType.Q4_K, 2, 2, seed=4)
    assert from_gguf_bytes(raw[:, :1], "Q4_K", 2, 512, 0, 256).group == 32
    inside = from_gguf_bytes(raw, "Q4_K", 2, 512, 48, 304)
    assert (inside.group, inside.super_group) == (16, 16)
    unit = from_gguf_bytes(raw[:, :1], "Q4_K", 2, 512, 64, 192)
    assert (unit.group, unit.super_group) == (32, 64)


@pytest.mark.parametrize("type", TYPES)
def test_rows_are_picked_and_stacked(type):
    raw = random_rows(type, 9, 256 // type.block, seed=5)
    planar, expected = from_gguf_bytes(raw, type, 9, 256), oracle(raw, type)
    index = torch.tensor([7, 0, 3, 3])
    picked = planar.select_rows(index)
    assert picked.rows == 4
    assert_same_bits(picked.dequantize(), expected[index.numpy()])
    stacked = Planar.cat_rows([planar.select_rows(slice(4, 9)), picked])
    assert stacked.rows == 9
    assert_same_bits(stacked.dequantize(), np.concatenate([expected[4:], expected[index.numpy()]]))


def test_different_kinds_do_not_stack():
    first = from_gguf_bytes(random_rows(TensorType.Q4_0, 2, 2, 6), "Q4_0", 2, 64)
    for other in (
        from_gguf_bytes(random_rows(TensorType.Q4_1, 2, 2, 6), "Q4_1", 2, 64),
        from_gguf_bytes(random_rows(TensorType.Q4_0, 2, 3, 6), "Q4_0", 2, 96),
    ):
        with pytest.raises(ValueError, match="stack"):
            Planar.cat_rows([first, other])


@pytest.mark.parametrize("bits", [(4,), (2,), (4, 1), (2, 1), (4, 2)])
def test_bit_planes_lie_as_documented(bits):
    rng = np.random.default_rng(7)
    codes = rng.integers(0, 1 << sum(bits), (3, 300), dtype=np.uint8)
    planes = empty_planes(3, 300, bits)
    pack(codes, bits, planes)
    padded, shift = np.zeros((3, 384), np.int64), 0
    padded[:, :300] = codes
    for width, plane in zip(bits, planes, strict=True):
        words, mask = 8 * width, (1 << width) - 1
        assert plane.dtype == np.int16 and plane.shape == (3, 384 // 128 * words)
        for block in range(3):
            for word in range(words):
                for field in range(16 // width):
                    value = plane[:, block * words + word].astype(np.int64) >> (width * field)
                    column = padded[:, block * 128 + words * field + word] >> shift
                    np.testing.assert_array_equal(value & mask, column & mask)
        shift += width
    found = unpack([torch.from_numpy(plane) for plane in planes], bits, 300)
    np.testing.assert_array_equal(found.numpy(), codes)


def test_bytes_are_counted_and_near_the_files():
    for type in TYPES:
        raw = random_rows(type, 16, 1024 // type.block, 8)
        planar = from_gguf_bytes(raw, type, 16, 1024)
        tensors = [*planar.planes, planar.d, planar.m, planar.sub_scales, planar.sub_mins]
        assert planar.nbytes == sum(t.nbytes for t in tensors if t is not None)
        assert planar.nbytes <= 1.04 * raw.nbytes
    six = from_gguf_bytes(random_rows(TensorType.Q6_K, 16, 4, 8), "Q6_K", 16, 1024)
    assert six.nbytes * 8 / (16 * 1024) == 6.5625


def test_the_result_keeps_nothing_of_the_bytes_it_came_from():
    for type in TYPES:
        raw = random_rows(type, 2, 1, seed=9)
        expected = oracle(raw, type)
        planar = from_gguf_bytes(raw, type, 2, type.block)
        raw[:] = 0
        assert_same_bits(planar.dequantize(), expected)


def test_sizes_that_do_not_fit_are_refused():
    raw = random_rows(TensorType.Q4_K, 2, 2, seed=10)
    for rows, cols, start, stop in [(2, 512, 0, 256), (3, 512, 0, 512), (2, 512, 512, 512), (2, 500, 0, 500)]:
        with pytest.raises(ValueError):
            from_gguf_bytes(raw, "Q4_K", rows, cols, start, stop)
    with pytest.raises(ValueError, match="not quantised"):
        from_gguf_bytes(raw, "F16", 2, 512)


def test_other_types_round_from_the_exact_weights():
    raw = random_rows(TensorType.Q5_K, 8, 4, seed=11)
    planar = from_gguf_bytes(raw, "Q5_K", 8, 1024)
    assert torch.equal(planar.dequantize(torch.bfloat16), planar.dequantize().to(torch.bfloat16))


@pytest.mark.parametrize("name", ["Q2_K", "Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0"])
def test_real_files_dequantise_to_the_oracles_bits(name):
    path = fixture_path(f"stories260K/stories260K-pad256.{name}.gguf")
    checkpoint = open_checkpoint(path)
    whole = [Slice(n, (0, i.rows), (0, i.cols)) for n, i in checkpoint.tensors.items()]
    found = {part.name: weights for part, weights in load(checkpoint, whole)}
    for tensor in gguf.GGUFReader(path).tensors:
        weights = found.pop(tensor.name)
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert_same_bits(weights.dequantize() if isinstance(weights, Planar) else weights, expected)
    assert not found


def cut_by_parts(planar: Planar, start: int, stop: int) -> Planar:
    """What `select_cols` is defined by: all codes unpacked, cut with their scales, and packed again."""
    scales = (planar.d, planar.m, planar.sub_scales, planar.sub_mins)
    parts = Parts(planar.codes().numpy(), *(None if t is None else t.numpy() for t in scales))
    spec = QuantSpec(planar.bits, planar.zero_point, planar.group, planar.super_group, planar.paired)
    parts, spec = cut_parts(parts, spec, start, stop)
    return planar_of_parts(planar.type, spec, parts)


def assert_same_planar(found: Planar, expected: Planar) -> None:
    for field in fields(Planar):
        pairs = getattr(found, field.name), getattr(expected, field.name)
        if field.name == "planes":
            for a, b in zip(*pairs, strict=True):
                assert a.is_contiguous() and a.dtype == b.dtype and torch.equal(a, b)
        elif isinstance(pairs[0], torch.Tensor):
            assert pairs[0].dtype == pairs[1].dtype and torch.equal(*pairs), field.name
        else:
            assert pairs[0] == pairs[1], field.name


@settings(max_examples=100, deadline=None)
@given(
    type=st.sampled_from(TYPES),
    blocks=st.integers(1, 5),
    edges=st.lists(st.one_of(st.integers(0, 10).map(lambda i: 128 * i), st.integers(0, 1280)), min_size=2),
)
def test_columns_are_cut_as_their_parts_are(type, blocks, edges):
    """On the edges of blocks of planes, where words are copied, and anywhere else."""
    cols = blocks * 256
    whole = from_gguf_bytes(random_rows(type, 3, cols // type.block, seed=blocks), type, 3, cols)
    spans = [(a, b) for a, b in itertools.pairwise(sorted({min(edge, cols) for edge in edges})) if a < b]
    for start, stop in spans:
        cut = whole.select_cols(start, stop)
        assert_same_planar(cut, cut_by_parts(whole, start, stop))
        if cut.cols > 3:
            assert_same_planar(cut.select_cols(1, cut.cols - 1), cut_by_parts(cut, 1, cut.cols - 1))


@pytest.mark.parametrize("type", TYPES)
def test_a_cut_costs_what_it_keeps(type, monkeypatch):
    """Cutting all units out of a tensor unpacks it once, not once a unit."""
    counted = []

    def counting(planes, bits, cols):
        codes = unpack(planes, bits, cols)
        counted.append(codes.shape[1])
        return codes

    monkeypatch.setattr(bitplanes, "unpack", counting)
    monkeypatch.setattr(planar, "unpack", counting)
    whole = from_gguf_bytes(random_rows(type, 2, 2048 // type.block, seed=9), type, 2, 2048)
    for start in range(0, 2048, 256):
        whole.select_cols(start, start + 256)
    assert not counted, "blocks of planes are copied as they are"
    for start in range(64, 1984, 192):
        part = whole.select_cols(start, start + 192)
        assert part.planes[0].untyped_storage().nbytes() < whole.planes[0].nbytes / 2, "a copy of its own"
    assert counted and sum(counted) <= 10 * (192 + 128)


def test_a_cut_on_the_edges_of_blocks_shares_nothing():
    whole = from_gguf_bytes(random_rows(TensorType.Q4_0, 1, 8, seed=10), "Q4_0", 1, 256)
    cut = whole.select_cols(0, 128)
    kept = [tensor.clone() for tensor in (*cut.planes, cut.d)]
    for tensor in (*whole.planes, whole.d):
        tensor.fill_(1)
    assert all(map(torch.equal, kept, (*cut.planes, cut.d)))
