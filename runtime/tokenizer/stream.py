"""Tokens back to text, one at a time.

A token may end inside a UTF-8 character; only whole characters are handed out. Knows nothing of requests
or stop strings.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from runtime.errors import InvalidArgument
from runtime.tokenizer.vocabulary import SPACE, Kind, Vocabulary, byte_alphabet, byte_value

__all__ = ["MAX_PADDING", "Spelling", "StreamDecoder"]

# Models pad their embedding to a round number of rows. So many ids past the vocabulary are taken for such
# rows: they have no text.
MAX_PADDING = 1024


class Spelling:
    """Bytes of each token of a vocabulary."""

    def __init__(self, vocabulary: Vocabulary):
        self._pieces, self._kinds = vocabulary.pieces, vocabulary.kinds
        self._alphabet = byte_alphabet() if vocabulary.byte_level else None

    def is_special(self, token: int) -> bool:
        """Whether a token has no text of its own: control, unknown, or a padding row."""
        self._check(token)
        return token >= len(self._kinds) or self._kinds[token] in (Kind.CONTROL, Kind.UNKNOWN)

    def is_byte(self, token: int) -> bool:
        return token < len(self._kinds) and self._kinds[token] == Kind.BYTE

    def bytes_of(self, token: int) -> bytes:
        """The UTF-8 bytes of a token's text, not always whole characters; of a control token its name.

        Raises InvalidArgument for an id that is not in the vocabulary."""
        self._check(token)
        if token >= len(self._kinds):
            return b""
        piece, kind = self._pieces[token], self._kinds[token]
        if kind in (Kind.CONTROL, Kind.UNKNOWN):
            return piece.encode()
        if kind == Kind.BYTE and (value := byte_value(piece)) is not None:
            return bytes([value])
        if self._alphabet is None:
            return piece.replace(SPACE, " ").encode()
        # Added tokens are plain text; so is a piece that is not of the alphabet throughout.
        if kind == Kind.NORMAL and all(character in self._alphabet for character in piece):
            return bytes(self._alphabet[character] for character in piece)
        return piece.encode()

    def _check(self, token: int) -> None:
        if not 0 <= token < len(self._kinds) + MAX_PADDING:
            raise InvalidArgument("token_ids", f"{token} is not one of {len(self._kinds)} tokens")


class StreamDecoder:
    """Decodes a sequence of tokens as it grows.

    All `push`es and the `finish` together are exactly what `Tokenizer.decode` gives for all the ids. Bytes
    that are not UTF-8 become U+FFFD, as in Python's decoder with errors="replace". Where the vocabulary
    puts a space before every text, the space of the text's first token is taken away: so it is from BOS or
    nothing, while a reply that continues a prompt (`begun`) keeps its leading space."""

    def __init__(self, spelling: Spelling, *, skip_special: bool, space_prefix: bool, prompt: Iterable[int]):
        self._spelling, self._skip_special = spelling, skip_special
        self._strip = space_prefix and all(spelling.is_special(token) for token in prompt)
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that `token` completes, perhaps "". Raises InvalidArgument for an id out of range."""
        if self._spelling.is_special(token):
            return "" if self._skip_special else self._utf8.decode(self._spelling.bytes_of(token))
        data = self._spelling.bytes_of(token)
        if self._strip:
            self._strip = False
            if not self._spelling.is_byte(token):  # the space put before a text is never a byte's token
                data = data.removeprefix(b" ")
        return self._utf8.decode(data)

    def finish(self) -> str:
        """What is left: U+FFFD for a character that never came to its end."""
        return self._utf8.decode(b"", True)
