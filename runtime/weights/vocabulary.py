"""Tells a model's vocabulary and end tokens from another's, without building a tokenizer.

Which tokens end a reply follows from the pieces and from what stands beside them, by rules that are a
tokenizer's. Those want libraries that a rank has not, so the facts are digested as they are: all that a GGUF
says under `tokenizer.ggml.`; of a folder the vocabulary's file, and what the settings beside it say of
tokens. Chat templates are left out: they make prompts, and a prompt is given.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np

from runtime.errors import BadModelFile
from runtime.weights.checkpoint import Checkpoint, open_to_read

MAX_FILE = 1 << 27  # bytes, as in `runtime/tokenizer/huggingface.py`
KEY = "tokenizer.ggml."
# What `runtime/tokenizer/huggingface.py` reads: the first of these files that is there, ...
PIECES = ("tokenizer.json", "tokenizer.model")
# ... of these the keys that speak of tokens (eos_token, eos_token_id, tokenizer_class and so on), ...
SETTINGS = (
    "config.json", "generation_config.json", "special_tokens_map.json", "chat_template.json",
    "tokenizer_config.json",
)  # fmt: skip
# ... and all of this one, whose keys are pieces.
ADDED = "added_tokens.json"


def vocabulary_digest(checkpoint: Checkpoint) -> bytes:
    """32 bytes, of a model without a vocabulary too. A tenth of a second for 256 thousand pieces.

    Raises BadModelFile, naming the file, for one that cannot be read; what is wrong inside is a tokenizer's
    to tell."""
    digest = hashlib.sha256()
    facts = _of_metadata(checkpoint) if checkpoint.kind == "gguf" else _of_folder(checkpoint.path)
    for name, value in facts:
        digest.update(f"{name} {len(value)}\n".encode())
        digest.update(value)
    return digest.digest()


def _of_metadata(checkpoint: Checkpoint) -> Iterator[tuple[str, bytes]]:
    for key, value in sorted(checkpoint.metadata.items()):
        if key.startswith(KEY):
            yield key, _plain(value)


def _plain(value: Any) -> bytes:
    """As `repr` tells values apart, and several times as fast on long lists."""
    kinds = set(map(type, value)) if isinstance(value, list) else set()
    if kinds == {str}:
        joined = "\0".join(value)
        if joined.count("\0") == len(value) - 1:
            return b"texts " + joined.encode()
    elif kinds == {float}:
        return b"numbers " + np.array(value, "<f8").tobytes()
    elif kinds == {int} and -(2**63) <= min(value) <= max(value) < 2**63:
        return b"whole numbers " + np.array(value, "<i8").tobytes()
    return repr(value).encode()


def _of_folder(folder: str) -> Iterator[tuple[str, bytes]]:
    there = [name for name in PIECES if os.path.exists(os.path.join(folder, name))]
    for name in there[:1]:
        yield name, _read(folder, name)
    for name in (*SETTINGS, ADDED):
        if not os.path.exists(os.path.join(folder, name)):
            continue
        raw = _read(folder, name)
        try:
            said = json.loads(raw)
            if isinstance(said, dict):
                every = {key: value for key, value in said.items() if value is not None}
                kept = {key: value for key, value in every.items() if name == ADDED or "token" in key}
                raw = json.dumps(kept, sort_keys=True).encode() if kept else b""
        except (ValueError, RecursionError):  # a tokenizer will say so
            pass
        if raw:
            yield name, raw


def _read(folder: str, name: str) -> bytes:
    file = os.path.join(folder, name)
    with ExitStack() as stack:
        descriptor = open_to_read(file, stack)
        try:
            if os.fstat(descriptor).st_size > MAX_FILE:
                raise BadModelFile(file, "", f"larger than {MAX_FILE} bytes")
            with open(descriptor, "rb", closefd=False) as opened:
                return opened.read(MAX_FILE)
        except OSError as error:
            raise BadModelFile(file, "", f"cannot be read: {error.strerror or error}") from None
