"""The prompts of a comparison: a file of them, as tokens that are the same for both models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from runtime.commands.divergence import first_difference
from runtime.errors import InvalidArgument, NotFound
from runtime.tokenizer import Tokenizer


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file: a line each or, in a .jsonl, a JSON string or an object with "text" a line;
    blank lines are skipped. Raises NotFound, InvalidArgument naming the line.

    A line ends with \\n or \\r\\n alone: U+2028, U+0085, a form feed or a lone \\r are part of a prompt."""
    try:
        lines = path.read_bytes().decode().split("\n")
    except FileNotFoundError:
        raise NotFound("file of prompts", str(path), "no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument("prompts", f"{path} cannot be read: {error}") from None
    found: list[str] = []
    for number, line in enumerate(lines, start=1):
        line = line.removesuffix("\r")
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            found.append(line)
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise InvalidArgument("prompts", f"line {number} of {path} is not JSON: {error}") from None
        text = value.get("text") if isinstance(value, dict) else value
        if not isinstance(text, str):
            raise InvalidArgument("prompts", f'line {number} of {path}: neither a string nor {{"text": ...}}')
        found.append(text)
    if not found:
        raise InvalidArgument("prompts", f"{path} holds none")
    return found


def check_vocabularies(a: Tokenizer, b: Tokenizer) -> None:
    """Refuse two vocabularies that are not the same, saying where they first differ."""
    differ = [
        token
        for token in range(min(a.vocab_size, b.vocab_size))
        if a.token_bytes(token) != b.token_bytes(token) or a.is_special(token) != b.is_special(token)
    ]
    if not differ and a.vocab_size == b.vocab_size:
        return
    words = [
        f"{token} is {a.token_bytes(token)!r} in A and {b.token_bytes(token)!r} in B" for token in differ[:3]
    ]
    if a.vocab_size != b.vocab_size:
        words.append(f"A has {a.vocab_size} tokens and B {b.vocab_size}")
    if differ:
        words.insert(0, f"{len(differ)} ids differ")
    raise InvalidArgument("vocabulary", "the models have different ones: " + "; ".join(words))


def encode_alike(a: Tokenizer, b: Tokenizer, texts: Sequence[str]) -> list[tuple[int, ...]]:
    """The tokens of each text, which must be the same for both. Raises InvalidArgument."""
    prompts: list[tuple[int, ...]] = []
    for number, text in enumerate(texts, start=1):
        tokens, other = a.encode(text), b.encode(text)
        at = first_difference(tokens, other)
        if at is not None:
            raise InvalidArgument(
                "prompts", f"the models cut prompt {number} into other tokens from token {at} on"
            )
        if len(tokens) < 2:
            raise InvalidArgument(
                "prompts", f"prompt {number} is a single token; only those after it are compared"
            )
        prompts.append(tuple(tokens))
    return prompts
