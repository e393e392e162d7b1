"""Byte-level BPE vocabularies: how each family cuts text into words, and the encoder on top of `tokenizers`.

Bytes that a vocabulary lacks (SmolLM2 has none for most ASCII control characters) are dropped, as the
models' own tokenizers do.
"""

from __future__ import annotations

from typing import Any

import tokenizers
from tokenizers import models, pre_tokenizers

from runtime.errors import BadModelFile, UnsupportedModel
from runtime.tokenizer.spm import EncodeText
from runtime.tokenizer.vocabulary import KEY, Kind, Vocabulary, gguf_merges

__all__ = ["PRE_TOKENIZERS", "bpe_encoder", "library_ids", "pre_tokenizer"]

# Contractions, words, numbers, other signs and white space, each with the space before it. Source: GPT-2.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_NEWLINES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
# Source: Llama 3's tokenizer.json; numbers in groups of three.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _NEWLINES
)
# Source: Qwen2's tokenizer.json; as Llama 3, digits one by one.
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
# Source: Mistral's tekken.json; words part where lower case turns to upper.
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _NEWLINES
)
# What ggml means by "default": punctuation apart, numbers in threes, GPT-2's words.
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")

# `tokenizer.ggml.pre` -> (patterns, applied one after the other; whether a word that is a piece is taken
# whole, without replaying its merges).
PRE_TOKENIZERS: dict[str, tuple[tuple[str, ...], bool]] = {
    "default": (_DEFAULT, False),
    "gpt2": ((_GPT2,), False),
    "gpt-2": ((_GPT2,), False),
    "smollm": ((r"\p{N}", _GPT2), False),
    "llama3": ((_LLAMA3,), True),
    "llama-v3": ((_LLAMA3,), True),
    "llama-bpe": ((_LLAMA3,), True),
    "qwen2": ((_QWEN2,), False),
    "deepseek-r1-qwen": ((_QWEN2,), False),
    "mistral": ((_TEKKEN,), True),
    "tekken": ((_TEKKEN,), True),
}


def bpe_encoder(metadata: dict[str, Any], vocabulary: Vocabulary, file: str) -> EncodeText:
    """The encoder of plain text. Raises UnsupportedModel for an unknown `tokenizer.ggml.pre`, BadModelFile
    for merges that do not fit the pieces."""
    pre = metadata.get(KEY + "pre", "default")
    if not isinstance(pre, str) or pre not in PRE_TOKENIZERS:
        raise UnsupportedModel(
            f"{file}: {KEY}pre: the pre-tokenizer {pre!r:.60} is not known; known are "
            + ", ".join(sorted(PRE_TOKENIZERS))
        )
    whole_words = PRE_TOKENIZERS[pre][1]
    known = vocabulary.ids_of(Kind.NORMAL)
    merges = gguf_merges(metadata, known, file)
    try:
        tokenizer = tokenizers.Tokenizer(models.BPE(vocab=known, merges=merges, ignore_merges=whole_words))
    except Exception as error:  # the library raises plain Exception
        raise BadModelFile(file, KEY + "merges", f"tokenizers refuses it: {error}") from None
    tokenizer.pre_tokenizer = pre_tokenizer(pre)

    return lambda text, after_control: library_ids(tokenizer, text)


def library_ids(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    """The tokens of a plain text. The library lets other threads go on while it encodes a batch, be it of one
    text, and not while it encodes a text alone: a prompt of some megabytes takes it seconds."""
    return tokenizer.encode_batch([text], add_special_tokens=False)[0].ids


def pre_tokenizer(pre: str) -> pre_tokenizers.PreTokenizer:
    """Cuts text into words as the family `pre` (a key of PRE_TOKENIZERS) does, and spells their bytes."""
    splits = [
        pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS[pre][0]
    ]
    return pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
