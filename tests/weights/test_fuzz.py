"""Damaged headers raise nothing but a refusal, and take no memory that the file does not justify."""

from __future__ import annotations

import json
import struct
import tracemalloc
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import example, given, settings
from hypothesis import strategies as st

from runtime.errors import BadModelFile, UnsupportedModel
from runtime.weights.gguf import read_gguf
from runtime.weights.safetensors import read_safetensors_folder
from tests.weights.test_gguf import KEYS
from tests.weights.writer import Entry, gguf_bytes, safetensors_bytes, write_folder

# A list of strings takes more than its file: 8 bytes in the list and some 60 of string for 10 in the file.
PER_BYTE, CONSTANT = 12, 1 << 19

GGUF = gguf_bytes(KEYS, [Entry("t", (32, 2), 2, bytes(36)), Entry("v", (3,), 0, bytes(12))])
INTERESTING = [0, 1, 4, 8, 9, 12, 30, 255, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 63, (1 << 64) - 1]


@st.composite
def damaged(draw, raw: bytes) -> bytes:
    """`raw` with bits flipped, integers replaced, pieces dropped, doubled or made noise, or cut short."""
    data = bytearray(raw)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        how = draw(st.sampled_from(["flip", "u32", "u64", "drop", "double", "noise", "cut"]))
        if how == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif how in ("u32", "u64"):
            number = draw(st.sampled_from(INTERESTING))
            form = "<I" if how == "u32" else "<Q"
            piece = struct.pack(form, number % (1 << 8 * struct.calcsize(form)))
            data[at : at + len(piece)] = piece
        elif how == "drop":
            del data[at : at + draw(st.integers(1, 40))]
        elif how == "double":
            data[at:at] = data[at : at + draw(st.integers(1, 200))]
        elif how == "noise":
            piece = draw(st.binary(min_size=1, max_size=16))
            data[at : at + len(piece)] = piece
        elif how == "cut":
            del data[at:]
    return bytes(data)


def peak_of(read, path) -> int:
    tracemalloc.start()
    try:
        with suppress(BadModelFile, UnsupportedModel):
            read(path)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def no_more_than_justified(read, path, size: int) -> None:
    assert peak_of(read, path) <= PER_BYTE * size + CONSTANT


@settings(max_examples=600, deadline=None)
@given(raw=damaged(GGUF))
@example(raw=gguf_bytes(tensor_count=1 << 19))
@example(raw=gguf_bytes(key_count=1 << 15))
def test_damaged_gguf(raw):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "m.gguf"
        path.write_bytes(raw)
        no_more_than_justified(read_gguf, path, len(raw))


def test_densest_metadata_stays_in_proportion(tmp_path):
    for kind, content in (("[str", ["ab"] * 50_000), ("[u8", [7] * 300_000), ("[[u8", [[]] * 50_000)):
        raw = gguf_bytes([("k", kind, content)])
        path = tmp_path / "m.gguf"
        path.write_bytes(raw)
        no_more_than_justified(read_gguf, path, len(raw))


HEADER = {
    "__metadata__": {"format": "pt"},
    "lm_head.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "model.layers.0.mlp.up_proj.weight": {"dtype": "BF16", "shape": [4, 2], "data_offsets": [24, 40]},
}
FILE = safetensors_bytes(HEADER, bytes(40))
INDEX = json.dumps({"weight_map": {"lm_head.weight": "a.safetensors", "model.norm.weight": "b.safetensors"}})
NORM = {"model.norm.weight": {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]}}


@settings(max_examples=300, deadline=None)
@given(raw=damaged(FILE))
@example(raw=safetensors_bytes(b"[" * 100_000))
@example(raw=safetensors_bytes(b'{"a":' + b"9" * 10_000 + b"}"))
@example(raw=safetensors_bytes({**HEADER, "\ud800": 1}))
def test_damaged_safetensors(raw):
    with TemporaryDirectory() as folder:
        path = write_folder(Path(folder), {"config.json": {}, "model.safetensors": raw})
        no_more_than_justified(read_safetensors_folder, path, len(raw))


@settings(max_examples=150, deadline=None)
@given(raw=damaged(INDEX.encode()))
def test_damaged_index(raw):
    with TemporaryDirectory() as folder:
        files = {
            "config.json": {},
            "model.safetensors.index.json": raw,
            "a.safetensors": safetensors_bytes({"lm_head.weight": HEADER["lm_head.weight"]}, bytes(24)),
            "b.safetensors": safetensors_bytes(NORM, bytes(4)),
        }
        no_more_than_justified(read_safetensors_folder, write_folder(Path(folder), files), len(raw) + 400)
