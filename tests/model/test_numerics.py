"""Names of models that differ in where replies end alone."""

from __future__ import annotations

import json

from runtime.config import ModelConfig
from runtime.model.header import open_model
from runtime.model.load import numerics
from tests.weights.tiny import write_tiny_llama
from tests.weights.tiny_hf import write_tiny_hf


def parts(path) -> list[str]:
    return numerics(open_model(ModelConfig(str(path)))).split("/")


def test_other_end_tokens_make_another_name(tmp_path):
    """min_tokens keeps end tokens from being chosen: with others, other tokens come of the same weights."""
    plain = write_tiny_llama(tmp_path / "plain.gguf")
    same = write_tiny_llama(tmp_path / "same.gguf", metadata={"tokenizer.chat_template": "{{ bos_token }}"})
    other = write_tiny_llama(tmp_path / "other.gguf", metadata={"tokenizer.ggml.eos_token_id": 77})
    assert parts(plain) == parts(same)
    assert parts(plain)[:-1] == parts(other)[:-1] and parts(plain)[-1] != parts(other)[-1]


def test_in_a_folder_too(tmp_path):
    folder = write_tiny_hf(tmp_path / "folder", write_tiny_llama(tmp_path / "plain.gguf"))
    before = parts(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 77]}))
    after = parts(folder)
    assert before[:-1] == after[:-1] and before[-1] != after[-1]
