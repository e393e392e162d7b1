"""How few tokens a text can have, known long before it is encoded.

Every byte of a text is in some token's bytes, and no token has more than the longest piece; so bytes over
that length is a bound. It holds only where encoding drops or folds no text that is not accounted for here:
of GGUF vocabularies that can be said, of Hugging Face's files, which may bring any normaliser, not.
"""

from __future__ import annotations

from dataclasses import dataclass

from runtime.tokenizer.vocabulary import SPACE, Kind, Vocabulary, byte_alphabet

__all__ = ["Cover", "gguf_cover"]


@dataclass(frozen=True, slots=True)
class Cover:
    """`longest`: most bytes of a text that one token stands for. `dropped`: bytes that encoding may drop."""

    longest: int
    dropped: bytes = b""

    def fewest(self, text: str) -> int:
        """A lower bound on the tokens of a text without names of control tokens that are to be found in it.
        The text holds no lone surrogates."""
        data = text.encode()
        return -(-len(data.translate(None, self.dropped)) // self.longest)


def gguf_cover(vocabulary: Vocabulary) -> Cover | None:
    """The cover of a vocabulary that is encoded as load.py has it, None where nothing can be said."""
    if vocabulary.byte_level:
        # bpe.py has no normaliser, drops a byte that has no piece, and finds user-defined pieces as they are.
        known = vocabulary.ids_of(Kind.NORMAL)
        dropped = bytes(byte for character, byte in byte_alphabet().items() if character not in known)
        longest = max(map(len, known), default=1)
        named = max((len(piece.encode()) for piece in vocabulary.ids_of(Kind.USER_DEFINED)), default=1)
        return Cover(max(longest, named), dropped)
    if Kind.BYTE not in vocabulary.kinds:
        return None  # sentencepiece makes one unknown token of a run of any length
    # spm.py has the identity normaliser, which makes spaces visible; what has no piece becomes its bytes.
    known = vocabulary.ids_of(Kind.NORMAL, Kind.USER_DEFINED, Kind.UNKNOWN)
    return Cover(max(len(piece.replace(" ", SPACE).encode()) for piece in known))
