"""Sentencepiece vocabularies: a ModelProto written from a GGUF's pieces, and the encoder on top of it.

The few protobuf fields are encoded by hand (proto2 wire format; field numbers of sentencepiece_model.proto),
because the generated module in the sentencepiece package wants one protobuf runtime and gRPC another.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import sentencepiece

from runtime.errors import BadModelFile
from runtime.tokenizer.vocabulary import SPACE, Kind, Vocabulary

__all__ = ["EncodeText", "load_processor", "model_proto", "spm_encoder"]

# (text, whether a control token stands right before it) -> ids. `text` holds no control tokens.
EncodeText = Callable[[str, bool], list[int]]

_BPE = 2  # TrainerSpec.ModelType


def model_proto(vocabulary: Vocabulary, scores: list[float]) -> bytes:
    """A serialised sentencepiece ModelProto of the BPE kind with the identity normaliser.

    Unused pieces get made-up spellings, because they may repeat and sentencepiece wants all unlike."""
    taken = set(vocabulary.pieces)
    parts = []
    for token, (piece, kind) in enumerate(zip(vocabulary.pieces, vocabulary.kinds, strict=True)):
        if kind == Kind.UNUSED:
            piece = f"<unused {token}>"
            while piece in taken:
                piece += ">"
        elif kind == Kind.USER_DEFINED and " " in piece:
            # Converters spell these as text; sentencepiece compares after it has made spaces visible.
            shown = piece.replace(" ", SPACE)
            piece = piece if shown in taken else shown
        body = _field(1, piece.encode()) + b"\x15" + struct.pack("<f", scores[token]) + _number(3, kind)
        parts.append(_field(1, body))
    trainer = _number(3, _BPE) + _number(35, Kind.BYTE in vocabulary.kinds)  # byte_fallback
    # add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces
    normalizer = _field(1, b"identity") + _number(3, vocabulary.space_prefix) + _number(4, 0) + _number(5, 1)
    return b"".join(parts) + _field(2, trainer) + _field(3, normalizer)


def load_processor(proto: bytes, file: str, where: str) -> sentencepiece.SentencePieceProcessor:
    """Raises BadModelFile with sentencepiece's own reason."""
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(proto)
    except (RuntimeError, ValueError) as error:
        raise BadModelFile(file, where, f"sentencepiece refuses it: {error}") from None
    return processor


def spm_encoder(processor: sentencepiece.SentencePieceProcessor, space_prefix: bool) -> EncodeText:
    """Where the vocabulary wants a space before the text, it gets one at the start and after each control
    token. A text after a control token that brings its own keeps just that one: "<s>[INST]" and
    "<s> [INST]" are written for the same tokens."""

    def encode(text: str, after_control: bool) -> list[int]:
        if space_prefix and after_control and text.startswith(" ") and text.strip(" "):
            text = text[1:]
        return processor.encode(text)

    return encode


def _varint(value: int) -> bytes:
    data = bytearray()
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    data.append(value)
    return bytes(data)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(int(value))


def _field(field: int, data: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(data)) + data
