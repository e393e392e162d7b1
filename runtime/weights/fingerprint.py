"""Tells the weights of one model from those of another, without reading them all.

A digest of what the header says of every tensor, of a sample of each one's bytes, and of the vocabulary,
which says where replies end. Two files that differ in a tensor's type or shape, or anywhere in a sample, have
other digests: so have fine-tunes, merges and quantisations, which change every row of some tensor at least. A
file that was changed in single places between the samples has not; this guards against mistakes, not against
an adversary. Knows no model.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import ExitStack

from runtime.errors import BadModelFile
from runtime.weights.checkpoint import Checkpoint, open_to_read
from runtime.weights.formats import TensorInfo
from runtime.weights.packed import PackedInfo
from runtime.weights.vocabulary import vocabulary_digest

SAMPLE = 4096  # bytes from the middle of each tensor, or all of a shorter one


def fingerprint(checkpoint: Checkpoint, also: str = "") -> str:
    """32 bits in hexadecimal, whatever the file is called and wherever it lies; `also` is what else tells
    models apart. Reads some 4 KiB a tensor, and a folder's tokenizer files.

    Raises BadModelFile, naming the file, and the tensor that it no longer holds whole."""
    digest = hashlib.sha256(also.encode() + vocabulary_digest(checkpoint))
    with ExitStack() as stack:
        opened: dict[str, int] = {}
        for name, info in sorted(checkpoint.tensors.items()):
            digest.update(f"{name} {info.type!r} {info.rows} {info.cols}\n".encode())
            for part in _stored(info):
                if part.file not in opened:
                    opened[part.file] = open_to_read(part.file, stack)
                digest.update(_sample(part, opened[part.file]))
    return digest.hexdigest()[:8]


def _stored(info: TensorInfo | PackedInfo) -> Iterator[TensorInfo]:
    if isinstance(info, TensorInfo):
        yield info
        return
    parts = (info.qweight, info.qzeros, info.scales, info.g_idx, info.bias)
    yield from (part for part in parts if part is not None)


def _sample(info: TensorInfo, descriptor: int) -> bytes:
    size = min(SAMPLE, info.nbytes)
    try:
        sample = os.pread(descriptor, size, info.offset + (info.nbytes - size) // 2)
    except OSError as error:
        raise BadModelFile(info.file, info.name, f"cannot be read: {error.strerror or error}") from None
    if len(sample) != size:
        raise BadModelFile(info.file, info.name, "the file ends within it: it shrank after opening")
    return sample
