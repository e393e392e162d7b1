"""A fingerprint is the weights', whatever their file is called, and of nothing else."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil

import pytest

from runtime.errors import BadModelFile
from runtime.weights.checkpoint import Checkpoint, open_checkpoint
from runtime.weights.fingerprint import SAMPLE, fingerprint
from runtime.weights.packed import PackedInfo
from tests.weights.tiny import write_tiny_llama
from tests.weights.tiny_packed import write_tiny_packed


@pytest.fixture
def model(tmp_path) -> Checkpoint:
    return open_checkpoint(write_tiny_llama(tmp_path / "model.gguf", types="Q8_0", ffn=256))


def changed(model: Checkpoint, tensor: str, at: int) -> Checkpoint:
    """The model with one byte of a tensor turned round, in a file of its own."""
    path = model.path + ".changed.gguf"
    shutil.copy(model.path, path)
    with open(path, "r+b") as file:
        file.seek(model.tensors[tensor].offset + at)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0xFF]))
    return open_checkpoint(path)


def test_a_copy_elsewhere_has_it_too(model, tmp_path):
    other = tmp_path / "of another name.gguf"
    shutil.copy(model.path, other)
    assert fingerprint(open_checkpoint(other)) == fingerprint(model)
    assert len(fingerprint(model)) == 8 and int(fingerprint(model), 16) >= 0
    assert fingerprint(model, also="another rope") != fingerprint(model)


def test_metadata_are_not_weights(model, tmp_path):
    other = write_tiny_llama(
        tmp_path / "b.gguf", types="Q8_0", ffn=256, metadata={"general.name": "another name, and longer"}
    )
    assert fingerprint(open_checkpoint(other)) == fingerprint(model)


def test_every_tensor_counts(model):
    """Its middle, and all of it if it is short."""
    seen = {fingerprint(model)}
    for name, info in model.tensors.items():
        seen.add(fingerprint(changed(model, name, info.nbytes // 2)))
    assert len(seen) == 1 + len(model.tensors)
    short = next(name for name, info in model.tensors.items() if info.nbytes <= SAMPLE)
    for at in (0, model.tensors[short].nbytes - 1):
        assert fingerprint(changed(model, short, at)) not in seen


def test_names_types_and_shapes_count(model):
    seen = {fingerprint(model)}
    first, *rest = model.tensors.items()
    name, info = first
    for other in (
        {"another": info},
        {name: dataclasses.replace(info, type=type(info.type).F16)},
        {name: dataclasses.replace(info, rows=info.cols, cols=info.rows)},
    ):
        seen.add(fingerprint(dataclasses.replace(model, tensors=other | dict(rest))))
    assert len(seen) == 4


def test_seeds_and_quantisations_differ(tmp_path):
    models = [
        write_tiny_llama(tmp_path / f"{seed} {kind}.gguf", seed=seed, types=kind)
        for seed in (0, 1)
        for kind in ("F32", "Q8_0")
    ]
    assert len({fingerprint(open_checkpoint(model)) for model in models}) == 4


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales"])
def test_all_parts_of_a_packed_layer_count(tmp_path, part):
    source = write_tiny_llama(tmp_path / "model.gguf", ffn=256)
    folder = write_tiny_packed(tmp_path / "model", source, "gptq")
    model = open_checkpoint(folder)
    before = fingerprint(model)
    info = getattr(next(i for i in model.tensors.values() if isinstance(i, PackedInfo)), part)
    with open(info.file, "r+b") as file:
        file.seek(info.offset + info.nbytes // 2)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0xFF]))
    assert fingerprint(open_checkpoint(folder)) != before


def test_how_a_packed_layer_is_read_counts(tmp_path):
    """Zero points stored less one, or as they are: the same bytes are other weights."""
    source = write_tiny_llama(tmp_path / "model.gguf", ffn=256)
    folder = write_tiny_packed(tmp_path / "model", source, "gptq")
    before = fingerprint(open_checkpoint(folder))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = "gptq_v2"
    (folder / "config.json").write_text(json.dumps(config))
    assert fingerprint(open_checkpoint(folder)) != before


def test_a_file_that_shrank_or_went_is_named(model):
    last = max(model.tensors.values(), key=lambda info: info.offset)
    os.truncate(model.path, last.offset)
    with pytest.raises(BadModelFile, match=f"{last.name}.*shrank"):
        fingerprint(model)
    os.unlink(model.path)
    with pytest.raises(BadModelFile, match="cannot be read"):
        fingerprint(model)
