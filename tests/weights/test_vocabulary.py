"""What files say of a vocabulary, and of where replies end, is in the fingerprint; templates are not."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from runtime.errors import BadModelFile
from runtime.tokenizer import load_tokenizer
from runtime.weights import vocabulary
from runtime.weights.checkpoint import Checkpoint, open_checkpoint
from runtime.weights.fingerprint import fingerprint
from runtime.weights.vocabulary import vocabulary_digest
from tests.weights.tiny import write_tiny_llama
from tests.weights.tiny_hf import write_tiny_hf

KEY = "tokenizer.ggml."


@pytest.fixture
def model(tmp_path) -> Checkpoint:
    return open_checkpoint(write_tiny_llama(tmp_path / "model.gguf"))


@pytest.fixture
def folder(tmp_path, model):
    return write_tiny_hf(tmp_path / "folder", model.path)


def saying(model: Checkpoint, key: str, value) -> Checkpoint:
    return dataclasses.replace(model, metadata=model.metadata | {key: value})


def ends(model: Checkpoint) -> tuple[int, ...]:
    return load_tokenizer(model.metadata).eos_ids


def test_another_end_token_is_another_model(model, tmp_path):
    other = open_checkpoint(write_tiny_llama(tmp_path / "b.gguf", metadata={KEY + "eos_token_id": 77}))
    assert ends(model) != ends(other)
    assert fingerprint(model) != fingerprint(other)


def test_whatever_makes_an_end_counts(model):
    """By id, by a piece's text, and by its type."""
    tokens, kinds = model.metadata[KEY + "tokens"], model.metadata[KEY + "token_type"]
    named = saying(model, KEY + "tokens", [*tokens[:300], "<|im_end|>", *tokens[301:]])
    marked = saying(named, KEY + "token_type", [*kinds[:300], 3, *kinds[301:]])
    others = [saying(model, KEY + name, 77) for name in ("eos_token_id", "eot_token_id", "eom_token_id")]
    assert len({ends(each) for each in (model, marked, *others)}) == 5 - 1  # eot and eom end alike
    assert ends(named) == ends(model)  # no more than a text yet
    assert len({vocabulary_digest(each) for each in (model, named, marked, *others)}) == 6


def test_every_key_of_the_vocabulary_counts_and_no_other(model):
    before = vocabulary_digest(model)
    for key, value in model.metadata.items():
        changed = [*value[:-1], value[0]] if isinstance(value, list) else "another"
        assert (vocabulary_digest(saying(model, key, changed)) != before) == key.startswith(KEY), key
    assert vocabulary_digest(saying(model, "tokenizer.chat_template", "{{ messages }}")) == before
    assert vocabulary_digest(saying(model, "tokenizer.chat_template.tools", "{{ tools }}")) == before


def test_values_are_told_apart_by_type_and_place(model):
    values = [
        1, 1.0, True, "1", [1], [1.0], [True], ["1"], [1, 1.0], [], [[]], [[1], [2]], [[1, 2]], ["a", "b"],
        ["ab"], ["", "ab"], ["a\0b"], ["a\0b", "c"], ["a", "b\0c"], [2**63], [-(2**63)], [2**64 - 1],
        [math.inf], [math.nan], [0.0], [-0.0], None,
    ]  # fmt: skip
    digests = {vocabulary_digest(saying(model, KEY + "x", value)) for value in values}
    assert len(digests) == len(values)
    many = [f"piece {i}" for i in range(1000)]
    assert vocabulary_digest(saying(model, KEY + "x", many)) == vocabulary_digest(
        saying(model, KEY + "x", list(many))
    )


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("config.json", "eos_token_id"),
        ("generation_config.json", "eos_token_id"),
        ("tokenizer_config.json", "eos_token"),
        ("tokenizer_config.json", "added_tokens_decoder"),
        ("tokenizer_config.json", "tokenizer_class"),
        ("special_tokens_map.json", "eos_token"),
        ("added_tokens.json", "<|im_end|>"),
    ],
)
def test_what_a_folder_says_of_tokens_counts(folder, file, key):
    seen = {fingerprint(open_checkpoint(folder))}
    path = folder / file
    said = json.loads(path.read_text()) if path.exists() else {}
    for value in (7, 8):
        path.write_text(json.dumps(said | {key: value}))
        seen.add(fingerprint(open_checkpoint(folder)))
    assert len(seen) == 3


def test_the_file_that_is_read_counts(folder):
    """tokenizer.json where there is one, tokenizer.model otherwise."""
    seen = [fingerprint(open_checkpoint(folder))]
    for name, text in (
        ("tokenizer.model", "a"), ("tokenizer.model", "b"), ("tokenizer.json", "a"), ("tokenizer.json", "c"),
    ):  # fmt: skip
        (folder / name).write_text(text)
        seen.append(fingerprint(open_checkpoint(folder)))
    assert len(set(seen)) == 5
    (folder / "tokenizer.model").write_text("not read")
    assert fingerprint(open_checkpoint(folder)) == seen[-1]


def test_templates_and_other_settings_of_a_folder_do_not_count(folder):
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    before = fingerprint(open_checkpoint(folder))
    (folder / "tokenizer_config.json").write_text('{ "chat_template": "{{ a }}", "eos_token" :"</s>"}')
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": [2, 5]}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "README.md").write_text("words")
    assert fingerprint(open_checkpoint(folder)) == before


def test_settings_that_are_no_json_are_another_module_s_to_refuse(folder):
    (folder / "tokenizer_config.json").write_text("{")
    one = fingerprint(open_checkpoint(folder))
    (folder / "tokenizer_config.json").write_text("[" * 100_000)
    assert fingerprint(open_checkpoint(folder)) != one


def test_files_that_cannot_be_read_are_named(folder, monkeypatch):
    (folder / "tokenizer.json").mkdir()
    with pytest.raises(BadModelFile, match=r"tokenizer\.json"):
        fingerprint(open_checkpoint(folder))
    (folder / "tokenizer.json").rmdir()
    (folder / "tokenizer.json").write_text("{}" * 9)
    monkeypatch.setattr(vocabulary, "MAX_FILE", 8)
    with pytest.raises(BadModelFile, match=r"tokenizer\.json.*larger than 8"):
        fingerprint(open_checkpoint(folder))


def test_the_tokenizer_reads_no_other_file(folder, monkeypatch):
    """What a folder's tokenizer is made of is what is digested: any other name would be a hole."""
    from runtime.tokenizer import huggingface

    read = set()
    real = huggingface._read
    monkeypatch.setattr(huggingface, "_read", lambda path: read.add(path.name) or real(path))
    known = {*vocabulary.SETTINGS, vocabulary.ADDED, *vocabulary.PIECES, "chat_template.jinja"}
    for name in (*known, "vocab.json", "merges.txt", "tokenizer_config.yaml"):
        if not (folder / name).exists():
            (folder / name).write_text("{}")
    with pytest.raises(BadModelFile):
        load_tokenizer({}, folder=folder)  # an empty tokenizer.json
    assert read - known == set() and len(read) >= len(vocabulary.SETTINGS)
