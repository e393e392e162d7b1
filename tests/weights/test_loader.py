"""The loader reads what was planned, no more, and hands out what the whole tensor holds there."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import runtime.weights.loader as loader_module
from runtime.errors import BadModelFile
from runtime.weights.blocks import SPECS
from runtime.weights.checkpoint import Checkpoint, open_checkpoint
from runtime.weights.loader import Slice, load, plan_reads
from runtime.weights.planar import Planar
from runtime.weights.quantize import quantize_int4
from tests.weights.tiny import write_tiny_llama
from tests.weights.writer import safetensors_bytes, write_folder

TYPES = ["F32", "F16", "BF16", *SPECS]


@pytest.fixture(scope="module", params=TYPES)
def model(request, tmp_path_factory) -> Checkpoint:
    path = tmp_path_factory.mktemp("model") / "m.gguf"
    write_tiny_llama(path, types=request.param, hidden=256, ffn=512, heads=4, layers=1, vocab=300)
    return open_checkpoint(path)


def dense(weights: torch.Tensor | Planar) -> torch.Tensor:
    return weights.dequantize() if isinstance(weights, Planar) else weights


def load_one(checkpoint: Checkpoint, wanted: Slice, **options):
    [(part, weights)] = load(checkpoint, [wanted], **options)
    assert part == wanted
    return weights


def whole(checkpoint: Checkpoint) -> list[Slice]:
    return [Slice(name, (0, info.rows), (0, info.cols)) for name, info in checkpoint.tensors.items()]


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_part_is_the_part_of_the_whole(model, data):
    name = data.draw(st.sampled_from(sorted(model.tensors)))
    info = model.tensors[name]
    row = data.draw(st.integers(0, info.rows - 1))
    col = data.draw(st.integers(0, info.cols - 1))
    row_stop = data.draw(st.integers(row + 1, info.rows))
    col_stop = data.draw(st.integers(col + 1, info.cols))
    wanted = Slice(name, (row, row_stop), (col, col_stop))
    expected = dense(load_one(model, Slice(name, (0, info.rows), (0, info.cols))))
    if len(info.shape) == 1:
        expected = expected[None]
    found = dense(load_one(model, wanted))
    assert found.dtype == expected.dtype
    found = found[None] if len(info.shape) == 1 else found
    assert torch.equal(found, expected[row:row_stop, col:col_stop])
    # Bytes: the blocks touched, and a twentieth at most for gaps that were read along.
    block = info.type.block
    blocks = -(-col_stop // block) - col // block
    share = (row_stop - row) * blocks * info.type.block_bytes
    planned = sum(part.total for part in plan_reads(model, [wanted]))
    assert share <= planned <= 1.05 * share


def test_vectors_come_as_vectors(model):
    assert load_one(model, Slice("output_norm.weight", (0, 1), (8, 40))).shape == (32,)


def counted(monkeypatch) -> list[tuple[int, int]]:
    """Every read that reaches the system: (offset, bytes)."""
    reads, lock, preadv = [], threading.Lock(), loader_module.os.preadv

    def spy(descriptor, buffers, offset):
        got = preadv(descriptor, buffers, offset)
        with lock:
            reads.append((offset, got))
        return got

    monkeypatch.setattr(loader_module.os, "preadv", spy)
    return reads


def test_the_report_counts_what_was_read(tmp_path, monkeypatch):
    path = write_tiny_llama(tmp_path / "m.gguf", types="Q8_0", hidden=256, ffn=512)
    checkpoint = open_checkpoint(path)
    reads, progress = counted(monkeypatch), []
    wanted = [
        Slice("blk.0.ffn_down.weight", (0, 256), (128, 320)),  # one run a row
        Slice("blk.1.ffn_up.weight", (100, 300), (0, 256)),  # one run
        Slice("output_norm.weight", (0, 1), (0, 256)),
    ]
    loader = load(checkpoint, wanted, threads=3, progress=lambda done, total: progress.append((done, total)))
    assert loader.report is None
    assert [part for part, _ in loader] == wanted
    expected = 256 * 6 * 34 + 200 * 8 * 34 + 1024
    assert sum(got for _, got in reads) == expected == loader.report.bytes_read
    assert sum(part.total for part in plan_reads(checkpoint, wanted)) == expected
    assert progress[-1] == (expected, expected) and len(progress) == 3
    assert loader.report.seconds > 0 and loader.report.bytes_per_second > 0


def test_halves_of_every_matrix_are_half_the_bytes(model):
    slices = []
    for name, info in model.tensors.items():
        by_column = ".ffn_down" in name  # two blocks wide in every type
        rows, cols = (info.rows, info.cols // 2) if by_column else (info.rows // 2, info.cols)
        slices.append(Slice(name, (0, max(rows, 1)), (0, cols)))
    total = sum(part.total for part in plan_reads(model, slices))
    norms = sum(info.nbytes for info in model.tensors.values() if len(info.shape) == 1)
    everything = sum(info.nbytes for info in model.tensors.values())
    assert total - norms <= 1.01 * (everything - norms) / 2


def test_small_gaps_are_read_along_and_cut(tmp_path, monkeypatch):
    checkpoint = open_checkpoint(write_tiny_llama(tmp_path / "m.gguf", hidden=256, ffn=512))
    wanted = Slice("blk.0.ffn_down.weight", (3, 200), (5, 500))
    expected = load_one(checkpoint, Slice(wanted.name, (0, 256), (0, 512)))[3:200, 5:500]
    reads = counted(monkeypatch)
    assert torch.equal(load_one(checkpoint, wanted), expected)
    assert len(reads) == 1 and reads[0][1] <= 1.05 * expected.nbytes


def test_slices_larger_than_a_task_and_more_than_the_read_ahead(tmp_path, monkeypatch):
    monkeypatch.setattr(loader_module, "READ_BYTES", 1000)
    monkeypatch.setattr(loader_module, "READ_AHEAD", 5000)
    path = write_tiny_llama(tmp_path / "m.gguf", types="Q4_K", hidden=256, ffn=512)
    checkpoint = open_checkpoint(path)
    small = {part.name: dense(weights) for part, weights in load(checkpoint, whole(checkpoint), threads=5)}
    monkeypatch.undo()
    for part, weights in load(checkpoint, whole(checkpoint), threads=1):
        assert torch.equal(small.pop(part.name), dense(weights))
    assert not small


def test_reads_that_come_short_are_finished(tmp_path, monkeypatch):
    checkpoint = open_checkpoint(write_tiny_llama(tmp_path / "m.gguf"))
    wanted = Slice("blk.0.ffn_down.weight", (0, 64), (0, 100))
    expected, preadv = load_one(checkpoint, wanted), loader_module.os.preadv
    monkeypatch.setattr(loader_module.os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:7]], at))
    assert torch.equal(load_one(checkpoint, wanted), expected)


def test_a_loader_may_be_left_early(tmp_path):
    checkpoint = open_checkpoint(write_tiny_llama(tmp_path / "m.gguf"))
    before = {*threading.enumerate()}  # not their number: one that an earlier test left behind may end now
    loader = iter(load(checkpoint, whole(checkpoint)))
    next(loader)
    assert {*threading.enumerate()} - before
    loader.close()
    assert not {*threading.enumerate()} - before


def test_a_file_that_shrank_is_named(tmp_path):
    path = write_tiny_llama(tmp_path / "m.gguf")
    checkpoint = open_checkpoint(path)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(BadModelFile, match=r"m\.gguf: ends at byte .* it shrank"):
        list(load(checkpoint, whole(checkpoint)))


@pytest.mark.parametrize(
    ("name", "rows", "cols"),
    [
        ("nothing", (0, 1), (0, 1)),
        ("output.weight", (0, 385), (0, 64)),
        ("output.weight", (5, 5), (0, 64)),
        ("output.weight", (-1, 5), (0, 64)),
        ("output.weight", (0, 5), (0, 65)),
    ],
)
def test_slices_outside_a_tensor_are_refused_before_reading(tmp_path, name, rows, cols):
    checkpoint = open_checkpoint(write_tiny_llama(tmp_path / "m.gguf"))
    with pytest.raises(ValueError):
        load(checkpoint, [Slice(name, rows, cols)])
    with pytest.raises(ValueError):
        plan_reads(checkpoint, [Slice(name, rows, cols)])


# ---- int4 on load ----------------------------------------------------------------------------------


@pytest.mark.parametrize("types", ["F32", "F16", "BF16"])
def test_int4_takes_the_layers_matrices_alone(tmp_path, types):
    checkpoint = open_checkpoint(write_tiny_llama(tmp_path / "m.gguf", types=types))
    plain = {part.name: weights for part, weights in load(checkpoint, whole(checkpoint))}
    for part, weights in load(checkpoint, whole(checkpoint), quantize="int4"):
        if part.name.startswith("blk.") and "norm" not in part.name:
            assert weights.type == "INT4"
            assert torch.equal(weights.dequantize(), quantize_int4(plain[part.name]).dequantize())
        else:
            assert torch.equal(weights, plain[part.name])


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_int4_does_not_depend_on_the_cut(ragged, data):
    info = ragged.tensors["blk.0.ffn_down.weight"]
    start = data.draw(st.integers(0, info.cols - 1))
    stop = data.draw(st.integers(start + 1, info.cols))
    wanted = Slice(info.name, (2, 7), (start, stop))
    expected = load_one(ragged, Slice(info.name, (0, 9), (0, info.cols)), quantize="int4").dequantize()
    found = load_one(ragged, wanted, quantize="int4")
    assert torch.equal(found.dequantize(), expected[2:7, start:stop])
    read = sum(part.total for part in plan_reads(ragged, [wanted], "int4"))
    assert read <= 1.05 * 5 * 4 * min(stop - start + 62, info.cols)


@pytest.fixture(scope="module")
def ragged(tmp_path_factory) -> Checkpoint:
    """A matrix of 172 columns: five groups of 32 and one of 12."""
    weight = torch.randn((9, 172), generator=torch.Generator().manual_seed(0))
    entry = {"dtype": "F32", "shape": [9, 172], "data_offsets": [0, weight.nbytes]}
    raw = safetensors_bytes({"model.layers.0.mlp.down_proj.weight": entry}, weight.numpy().tobytes())
    folder = tmp_path_factory.mktemp("hf")
    return open_checkpoint(write_folder(folder, {"config.json": {}, "model.safetensors": raw}))


def test_int4_of_weights_it_cannot_hold_names_the_tensor(tmp_path):
    weight = torch.ones(2, 32)
    weight[1, 1] = torch.inf
    entry = {"dtype": "F32", "shape": [2, 32], "data_offsets": [0, weight.nbytes]}
    raw = safetensors_bytes({"model.layers.0.mlp.up_proj.weight": entry}, weight.numpy().tobytes())
    checkpoint = open_checkpoint(write_folder(tmp_path, {"config.json": {}, "model.safetensors": raw}))
    with pytest.raises(BadModelFile, match=r"model.safetensors: blk.0.ffn_up.weight: .*int4"):
        load_one(checkpoint, Slice("blk.0.ffn_up.weight", (0, 2), (0, 32)), quantize="int4")
    with pytest.raises(ValueError, match="int8"):
        load(checkpoint, [], quantize="int8")
