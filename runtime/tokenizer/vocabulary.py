"""A vocabulary as plain data, and how it is read, with suspicion, from GGUF metadata.

Format: ggml's docs/gguf.md ("Tokenizer"), token types as in sentencepiece's ModelProto.SentencePiece.Type.
Knows nothing of how text is cut into tokens.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

from runtime.errors import BadModelFile

__all__ = ["MAX_PIECES", "Kind", "Vocabulary", "byte_alphabet", "check_unique", "gguf_vocabulary"]

MAX_PIECES = 1 << 21  # the largest real vocabularies have 2**18

MAX_SCORE = (2 - 2**-23) * 2.0**127  # the largest 32-bit float

KEY = "tokenizer.ggml."
SPACE = "▁"  # sentencepiece's visible space, U+2581

# Pieces that end a turn or a document in the models that carry them as control tokens. A chat model that
# names only one of them in its metadata still ends with another now and then.
END_PIECES = (
    "</s>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>",
    "<end_of_turn>", "<|return|>", "<|end_of_turn|>", "<｜end▁of▁sentence｜>", "<EOT>",
)  # fmt: skip


class Kind(enum.IntEnum):
    """What a piece is; the numbers are GGUF's and sentencepiece's."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3  # no text of its own; found in text only where the caller asks for it
    USER_DEFINED = 4  # always one token wherever its text occurs
    UNUSED = 5
    BYTE = 6  # spelled <0xNN>


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """`pieces[id]` is spelled in GPT-2's byte alphabet where `byte_level`, else sentencepiece's way.

    `kinds[id]` is a Kind. `space_prefix`: encoding puts a space before the text, so that decoding from the
    beginning takes one away."""

    pieces: list[str]
    kinds: bytes
    byte_level: bool
    bos_id: int | None
    eos_ids: tuple[int, ...]  # the file's end-of-sequence token first
    add_bos: bool
    space_prefix: bool

    def ids_of(self, *kinds: Kind) -> dict[str, int]:
        """Text -> id of the pieces of these kinds."""
        return {self.pieces[i]: i for i, kind in enumerate(self.kinds) if kind in kinds and self.pieces[i]}


def byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 stands for itself, the other 68 bytes, in order, for
    U+0100 and up (Radford et al. 2019, `bytes_to_unicode`)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    alphabet = {chr(0x100 + position): byte for position, byte in enumerate(others)}
    return alphabet | {chr(byte): byte for byte in printable}


def end_ids(named: list[int | None], pieces: list[str], kinds: bytes) -> tuple[int, ...]:
    """The tokens that end a reply: those the file names, then known end pieces that are control tokens."""
    found = [token for token in named if token is not None]
    known = set(END_PIECES)
    found += [i for i, kind in enumerate(kinds) if kind == Kind.CONTROL and pieces[i] in known]
    return tuple(dict.fromkeys(found))


def gguf_vocabulary(metadata: dict[str, Any], file: str) -> Vocabulary:
    """Reads and checks `tokenizer.ggml.*`. Raises BadModelFile naming the key."""
    spm = metadata.get(KEY + "model") == "llama"
    pieces = _pieces(metadata, file)
    kinds = _kinds(metadata, file, len(pieces), required=spm)
    named = {
        name: _token_id(metadata, f"{name}_token_id", len(pieces), file)
        for name in ("bos", "eos", "eot", "eom", "unknown")
    }
    if KEY + "token_type" not in metadata:
        marked = bytearray(kinds)
        for token in named.values():
            if token is not None:
                marked[token] = Kind.CONTROL
        kinds = bytes(marked)
    if spm:
        kinds = _spm_kinds(pieces, kinds, named["unknown"], file)
        named["bos"] = _or_control(named["bos"], "<s>", pieces, kinds)
        named["eos"] = _or_control(named["eos"], "</s>", pieces, kinds)
    check_unique(pieces, kinds, file, KEY + "tokens")
    add_bos = _flag(metadata, "add_bos_token", None, file)
    if add_bos and named["bos"] is None:
        raise BadModelFile(file, KEY + "add_bos_token", "a BOS is wanted, but bos_token_id is missing")
    if add_bos is None:
        add_bos = named["bos"] is not None and (spm or adds_bos_by_default(metadata))
    return Vocabulary(
        pieces=pieces,
        kinds=kinds,
        byte_level=not spm,
        bos_id=named["bos"],
        eos_ids=end_ids([named["eos"], named["eot"], named["eom"]], pieces, kinds),
        add_bos=add_bos,
        space_prefix=spm and bool(_flag(metadata, "add_space_prefix", True, file)),
    )


def adds_bos_by_default(metadata: dict[str, Any]) -> bool:
    """Llama 3's and Mistral's byte-level vocabularies want a BOS though converters often leave it unsaid."""
    return metadata.get(KEY + "pre") in ("llama3", "llama-v3", "llama-bpe", "tekken", "mistral")


def gguf_scores(metadata: dict[str, Any], count: int, file: str) -> list[float]:
    """One finite score a piece (SPM). Raises BadModelFile."""
    scores = _list(metadata, "scores", file)
    if len(scores) != count:
        raise BadModelFile(file, KEY + "scores", f"{len(scores)} scores for {count} tokens")
    if not all(isinstance(score, (int, float)) and abs(score) <= MAX_SCORE for score in scores):  # nor NaN
        raise BadModelFile(file, KEY + "scores", "not all are finite 32-bit numbers")
    return scores


def gguf_merges(metadata: dict[str, Any], known: dict[str, int], file: str) -> list[tuple[str, str]]:
    """Byte-pair merges in rank order; both parts and the whole must be pieces. Raises BadModelFile."""
    merges = []
    for rank, merge in enumerate(_list(metadata, "merges", file)):
        # A merge is "left right"; byte-level pieces hold no space, so the first one parts them.
        left, space, right = merge.partition(" ") if isinstance(merge, str) else ("", "", "")
        if not (space and left in known and right in known and left + right in known):
            raise BadModelFile(file, KEY + "merges", f"merge {rank} ({merge!r:.60}) is not of two pieces")
        merges.append((left, right))
    return merges


def check_unique(pieces: list[str], kinds: bytes, file: str, where: str) -> None:
    """No two pieces that text can become may be spelled alike or be empty: their ids could not be told
    apart. Unused ones may."""
    seen: dict[str, int] = {}
    for token, (piece, kind) in enumerate(zip(pieces, kinds, strict=True)):
        if kind == Kind.UNUSED:
            continue
        if not piece:
            raise BadModelFile(file, where, f"token {token} is empty")
        if (first := seen.setdefault(piece, token)) != token:
            raise BadModelFile(file, where, f"token {token} repeats token {first} ({piece!r:.60})")


def byte_value(piece: str) -> int | None:
    """0xNN of "<0xNN>", None of anything else."""
    digits = piece[3:5]
    plain = len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")
    return int(digits, 16) if plain and all(c in "0123456789ABCDEF" for c in digits) else None


def _pieces(metadata: dict[str, Any], file: str) -> list[str]:
    pieces = _list(metadata, "tokens", file)
    if not 1 <= len(pieces) <= MAX_PIECES:
        raise BadModelFile(file, KEY + "tokens", f"{len(pieces)} tokens; 1 to {MAX_PIECES} are possible")
    for token, piece in enumerate(pieces):
        if not isinstance(piece, str):
            raise BadModelFile(file, KEY + "tokens", f"token {token} is not a string")
    try:
        "".join(pieces).encode()
    except UnicodeEncodeError as error:
        found = next(i for i, piece in enumerate(pieces) if error.object[error.start] in piece)
        raise BadModelFile(file, KEY + "tokens", f"token {found} is not valid Unicode") from None
    return pieces


def _kinds(metadata: dict[str, Any], file: str, count: int, *, required: bool) -> bytes:
    if KEY + "token_type" not in metadata and not required:
        return bytes([Kind.NORMAL]) * count
    types = _list(metadata, "token_type", file)
    if len(types) != count:
        raise BadModelFile(file, KEY + "token_type", f"{len(types)} types for {count} tokens")
    for token, kind in enumerate(types):
        if type(kind) is not int or not 1 <= kind <= 6:
            raise BadModelFile(file, KEY + "token_type", f"token {token} has the unknown type {kind!r:.40}")
    return bytes(types)


def _spm_kinds(pieces: list[str], kinds: bytes, unknown: int | None, file: str) -> bytes:
    """Checks bytes, and finds the one unknown piece that sentencepiece needs."""
    where = KEY + "token_type"
    for token, (piece, kind) in enumerate(zip(pieces, kinds, strict=True)):
        if kind == Kind.BYTE and byte_value(piece) is None:
            raise BadModelFile(file, where, f"token {token} ({piece!r:.40}) is no byte such as <0x0A>")
        if "\0" in piece:  # sentencepiece's index ends a piece at its first NUL
            raise BadModelFile(file, KEY + "tokens", f"token {token} holds a NUL character")
    if kinds.count(Kind.BYTE) not in (0, 256):
        raise BadModelFile(
            file, where, f"{kinds.count(Kind.BYTE)} byte tokens where 256 or none are possible"
        )
    if kinds.count(Kind.UNKNOWN) > 1:
        raise BadModelFile(file, where, "more than one token is of the unknown type")
    if Kind.UNKNOWN not in kinds:
        if unknown is None:
            unknown = pieces.index("<unk>") if "<unk>" in pieces else None
        if unknown is None or kinds[unknown] not in (Kind.NORMAL, Kind.CONTROL):
            raise BadModelFile(file, where, "no token is of the unknown type")
        kinds = kinds[:unknown] + bytes([Kind.UNKNOWN]) + kinds[unknown + 1 :]
    return kinds


def _or_control(token: int | None, piece: str, pieces: list[str], kinds: bytes) -> int | None:
    if token is None and piece in pieces and kinds[pieces.index(piece)] == Kind.CONTROL:
        return pieces.index(piece)
    return token


def _token_id(metadata: dict[str, Any], name: str, count: int, file: str) -> int | None:
    value = metadata.get(KEY + name)
    if value is None:
        return None
    if type(value) is not int or not 0 <= value < count:
        raise BadModelFile(file, KEY + name, f"{value!r:.40} is not a token id below {count}")
    return value


def _flag(metadata: dict[str, Any], name: str, default: bool | None, file: str) -> bool | None:
    value = metadata.get(KEY + name, default)
    if value is not None and not isinstance(value, bool):
        raise BadModelFile(file, KEY + name, f"{value!r:.40} is not true or false")
    return value


def _list(metadata: dict[str, Any], name: str, file: str) -> list:
    value = metadata.get(KEY + name)
    if not isinstance(value, list):
        raise BadModelFile(file, KEY + name, "missing" if value is None else "not an array")
    return value
