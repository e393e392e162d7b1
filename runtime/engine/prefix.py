"""Names for block contents: a SHA-256 chain over the salt and the tokens of block after block.

A block's key stands for every token up to its end, so equal keys mean equal KV whatever computed it.
Keys are salted, and cannot be made to collide by choosing prompts. Knows nothing of block ids.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence


def root_key(salt: str) -> bytes:
    """The key that stands before the first block, 32 bytes."""
    return hashlib.sha256(b"kv prefix\0" + salt.encode("utf-8", "surrogatepass")).digest()


def next_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The key of the block that holds `tokens` after the block of `parent`; 8 bytes a token are hashed."""
    return hashlib.sha256(parent + array("q", tokens).tobytes()).digest()
