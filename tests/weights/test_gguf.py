"""The GGUF reader: what sound files say, and that nothing else gets through."""

from __future__ import annotations

import subprocess
import sys

import gguf
import numpy as np
import pytest

from runtime.errors import BadModelFile, NotFound, UnsupportedModel
from runtime.weights.gguf import read_gguf
from tests.support import fixture_path
from tests.weights.tiny import spm_vocabulary, write_tiny_llama
from tests.weights.writer import Entry, gguf_bytes

F32 = bytes(4)


def write(tmp_path, raw: bytes, name: str = "m.gguf"):
    path = tmp_path / name
    path.write_bytes(raw)
    return path


def refused(tmp_path, raw: bytes, match: str, error=BadModelFile) -> Exception:
    path = write(tmp_path, raw)
    with pytest.raises(error, match=match) as caught:
        read_gguf(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return caught.value


KEYS = [
    ("a.u8", "u8", 200), ("a.i8", "i8", -5), ("a.u16", "u16", 65535), ("a.i16", "i16", -300),
    ("a.u32", "u32", 1 << 31), ("a.i32", "i32", -(1 << 31)), ("a.f32", "f32", 0.5), ("a.bool", "bool", 1),
    ("a.str", "str", "größe \n"), ("a.u64", "u64", 1 << 63), ("a.i64", "i64", -(1 << 62)),
    ("a.f64", "f64", 0.1), ("l.str", "[str", ["", "a", "▁the"]), ("l.f32", "[f32", [1.0, -0.25]),
    ("l.bool", "[bool", [1, 0]), ("l.i8", "[i8", [-1, 2]), ("l.u64", "[u64", [1 << 63]),
    ("l.none", "[str", []), ("l.l", "[[u16", [[1, 2], [], [3]]),
]  # fmt: skip


@pytest.mark.parametrize("version", [2, 3])
def test_every_kind_of_value(tmp_path, version):
    read = read_gguf(write(tmp_path, gguf_bytes(KEYS, version=version)))
    assert read.version == version
    assert list(read.metadata) == [key for key, _, _ in KEYS]
    for key, _, content in KEYS:
        assert read.metadata[key] == content and type(read.metadata[key]) is not np.ndarray
    assert read.metadata["a.bool"] is True and read.metadata["l.bool"] == [True, False]


@pytest.mark.parametrize("alignment", [8, 32, 256])
def test_where_tensors_lie(tmp_path, alignment):
    entries = [
        Entry("v", (5,), 0, bytes(range(20))),
        Entry("m", (32, 3), 2, b"q" * 54),
        Entry("e", (2, 3, 4), 1, b"h" * 48),
    ]
    path = write(
        tmp_path, gguf_bytes([("general.alignment", "u32", alignment)], entries, alignment=alignment)
    )
    tensors = read_gguf(path).tensors
    assert [(t.name, t.type, t.shape, t.rows, t.cols, t.nbytes) for t in tensors.values()] == [
        ("v", "F32", (5,), 1, 5, 20),
        ("m", "Q4_0", (3, 32), 3, 32, 54),
        ("e", "F16", (4, 3, 2), 12, 2, 48),
    ]
    raw = path.read_bytes()
    for entry in entries:
        info = tensors[entry.name]
        assert info.file == str(path) and info.offset % alignment == 0
        assert raw[info.offset : info.offset + info.nbytes] == entry.data


def test_agrees_with_the_gguf_package(tmp_path):
    path = write_tiny_llama(tmp_path / "m.gguf", types={"ffn_up": "Q5_1", "*": "Q8_0"})
    ours, theirs = read_gguf(path), gguf.GGUFReader(path)
    assert {t.name: (t.tensor_type.name, t.data_offset, t.n_bytes) for t in theirs.tensors} == {
        name: (t.type.name, t.offset, t.nbytes) for name, t in ours.tensors.items()
    }
    fields = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert fields == ours.metadata
    assert ours.metadata["tokenizer.ggml.tokens"] == spm_vocabulary(384)[0]


@pytest.mark.parametrize("name", ["stories260K/stories260K.f32.gguf", "tokenizers/ggml-vocab-llama-spm.gguf"])
def test_real_files_agree_with_the_gguf_package(name):
    path = fixture_path(name)
    ours, theirs = read_gguf(path), gguf.GGUFReader(path)
    assert [t.name for t in theirs.tensors] == list(ours.tensors)
    assert {t.name: (t.data_offset, t.n_bytes) for t in theirs.tensors} == {
        name: (t.offset, t.nbytes) for name, t in ours.tensors.items()
    }
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "general.architecture"):
        assert ours.metadata[key] == theirs.fields[key].contents()


def test_a_large_vocabulary_parses(tmp_path):
    tokens = [f"▁piece{i}" for i in range(128_000)]
    raw = gguf_bytes([("tokens", "[str", tokens), ("scores", "[f32", [0.5] * len(tokens))])
    path = write(tmp_path, raw)
    assert read_gguf(path).metadata["tokens"] == tokens


def test_torch_is_not_imported():
    code = "import sys, runtime.weights.gguf, runtime.weights.checkpoint, runtime.weights.plan; "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ---- split files -----------------------------------------------------------------------------------


def parts(count: int, **changes) -> list[bytes]:
    """A model of a tensor a part, each with its own data."""
    found = []
    for index in range(count):
        keys = [
            ("split.count", "u16", count),
            ("split.no", "u16", index),
            ("split.tensors.count", "i32", count),
        ]
        keys += [("general.name", "str", "split")] if index == 0 else []
        keys = [(k, kind, changes.get(f"{k}:{index}", v)) for k, kind, v in keys]
        name = changes.get(f"name:{index}", f"t{index}")
        found.append(gguf_bytes(keys, [Entry(name, (4,), 0, bytes([index] * 16))]))
    return found


def write_parts(tmp_path, raws: list[bytes], stem: str = "model") -> list:
    return [write(tmp_path, raw, f"{stem}-{i:05d}-of-{len(raws):05d}.gguf") for i, raw in enumerate(raws, 1)]


def test_a_split_model_is_read_from_any_part(tmp_path):
    paths = write_parts(tmp_path, parts(3), "odd-name-00001")
    for path in paths:
        read = read_gguf(path)
        assert read.metadata["general.name"] == "split" and list(read.tensors) == ["t0", "t1", "t2"]
        assert list(read.files) == [str(p) for p in paths] and read.path == str(paths[0])
        for index, info in enumerate(read.tensors.values()):
            assert info.file == str(paths[index])
            assert paths[index].read_bytes()[info.offset : info.offset + 16] == bytes([index] * 16)


def test_one_of_one_is_a_whole_model(tmp_path):
    assert list(read_gguf(write_parts(tmp_path, parts(1))[0]).tensors) == ["t0"]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"split.count:1": 4}, "00002-of-00003.gguf: split.count"),
        ({"split.no:1": 2}, "00002-of-00003.gguf: split.no"),
        ({"split.tensors.count:0": 4}, "split.tensors.count: 4, but the parts hold 3"),
        ({"name:2": "t0"}, "00003-of-00003.gguf: t0: also in"),
    ],
)
def test_parts_that_do_not_belong_together(tmp_path, changes, match):
    with pytest.raises(BadModelFile, match=match):
        read_gguf(write_parts(tmp_path, parts(3, **changes))[0])


def test_a_missing_part_is_named(tmp_path):
    paths = write_parts(tmp_path, parts(3))
    paths[1].unlink()
    with pytest.raises(BadModelFile, match=r"model-00002-of-00003.gguf: part 2 of 3 is missing"):
        read_gguf(paths[2])


def test_a_part_under_another_name(tmp_path):
    refused(tmp_path, parts(3)[0], "split.count: one of 3 parts, but not named")
    path = write(tmp_path, gguf_bytes(), "m-00001-of-00002.gguf")
    with pytest.raises(BadModelFile, match=r"split.count: missing"):
        read_gguf(path)


# ---- hostile files ---------------------------------------------------------------------------------

HUGE = (1 << 64) - 1


def test_what_is_no_file(tmp_path):
    with pytest.raises(NotFound, match="nowhere"):
        read_gguf(tmp_path / "nowhere.gguf")
    with pytest.raises(BadModelFile):
        read_gguf(tmp_path)


def test_what_is_no_gguf(tmp_path):
    refused(tmp_path, b"", "cut short")
    refused(tmp_path, b"PK\3\4" + bytes(100), "not a GGUF file")


@pytest.mark.parametrize("version", [0, 1, 4, 3 << 24])
def test_other_versions(tmp_path, version):
    refused(tmp_path, gguf_bytes(version=version), "version|big-endian", UnsupportedModel)


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ([("k", "u8", 1), ("k", "u8", 1)], "k: the key stands twice"),
        ([("", "u8", 1)], "metadata key 0: not a printable name"),
        ([("bad\nkey", "u8", 1)], "metadata key 0: not a printable name"),
        ([("k" * 2000, "u8", 1)], "metadata key 0: a string of 2000 bytes"),
        ([(b"\xff\xfe", "u8", 1)], "metadata key 0: not UTF-8"),
        ([("k", "str", b"\xc3")], "k: not UTF-8"),
        ([("k", "[str", ["fine", b"\xed\xa0\x80"])], "k: string 1 is not UTF-8"),
        ([("k", "bool", 2)], "k: a boolean is 2"),
        ([("k", "[bool", [0, 1, 7])], "k: a boolean"),
        ([("k", "[[[[[u8", [[[[[1]]]]])], "k: arrays nest deeper"),
        ([("general.alignment", "u32", 0)], "general.alignment: not a power of two"),
        ([("general.alignment", "u32", 24)], "general.alignment: not a power of two"),
        ([("general.alignment", "str", "32")], "general.alignment: not a power of two"),
        ([("split.count", "str", "2")], "split.count: not a sensible count"),
    ],
)
def test_metadata_that_lies(tmp_path, keys, match):
    refused(tmp_path, gguf_bytes(keys), match)


def test_counts_and_lengths_that_lie(tmp_path):
    refused(tmp_path, gguf_bytes(key_count=HUGE), "metadata keys, more than can be")
    refused(tmp_path, gguf_bytes(tensor_count=HUGE), "tensors, more than can be")
    refused(tmp_path, gguf_bytes([("k", "u8", 1)], key_count=2) + bytes(40), "metadata key 1")
    honest = gguf_bytes([("k", "[str", ["abc"])])
    at = honest.index(b"abc")
    for position, match in ((at - 16, "k: says it holds"), (at - 8, "k: the file is cut short")):
        lying = honest[:position] + HUGE.to_bytes(8, "little") + honest[position + 8 :]
        refused(tmp_path, lying, match)
    few = honest[: at - 16] + (50).to_bytes(8, "little") + honest[at - 8 :]
    refused(tmp_path, few, "k: says it holds 50 strings, more than can be")
    kinds = gguf_bytes([("k", "u8", 1)]).replace(b"k\0\0\0\0", b"k\x63\0\0\0")
    refused(tmp_path, kinds, "k: unknown value type 99")


def entry(**changes) -> Entry:
    fields = {"name": "t", "ne": (32, 2), "type": 2, "data": bytes(36), **changes}
    return Entry(**fields)


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ([entry(), entry()], "t: the tensor stands twice"),
        ([entry(name="")], "tensor 0: not a printable name"),
        ([entry(ne=())], "t: 0 dimensions"),
        ([entry(ne=(1,) * 5)], "t: 5 dimensions"),
        ([entry(ne=(32, 0))], "t: shape .* empty dimension"),
        ([entry(ne=(33, 2))], "t: a row of 33 is not a multiple of Q4_0's block of 32"),
        ([entry(ne=(1 << 40, 1 << 40))], "t: shape .* more than"),
        ([entry(ne=(HUGE, HUGE, HUGE, HUGE))], "t: shape .* more than"),
        ([entry(ne=(1 << 32, 1 << 31, 2, 1), type=0)], "t: shape .* more than"),
        ([entry(type=4)], "t: unknown tensor type 4"),
        ([entry(type=1 << 31)], "t: unknown tensor type"),
        ([entry(offset=16)], "t: offset 16 is not a multiple of the alignment 32"),
        ([entry(offset=HUGE - 31)], "t: ends at byte"),
        ([entry(data=bytes(35))], "t: ends at byte"),
        ([entry(), entry(name="u", offset=32)], "u: overlaps tensor 't'"),
        ([entry(), entry(name="u", offset=0)], "overlaps tensor"),
    ],
)
def test_tensors_that_lie(tmp_path, entries, match):
    refused(tmp_path, gguf_bytes(tensors=entries), match)


@pytest.mark.parametrize(("number", "name"), [(9, "Q8_1"), (16, "IQ2_XXS"), (26, "I32"), (39, "MXFP4")])
def test_types_that_are_not_served_are_named(tmp_path, number, name):
    refused(tmp_path, gguf_bytes(tensors=[entry(type=number)]), f"t: tensor type {name} is", UnsupportedModel)


def test_every_truncation_is_refused(tmp_path):
    raw = gguf_bytes(KEYS, [entry(), Entry("v", (3,), 0, bytes(12))])
    assert len(read_gguf(write(tmp_path, raw)).tensors) == 2
    for length in range(len(raw)):
        with pytest.raises(BadModelFile):
            read_gguf(write(tmp_path, raw[:length]))
