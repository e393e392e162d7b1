"""Text to tokens and back, whatever the vocabulary's kind. Reads no files and renders no templates."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from runtime.errors import BadModelFile, InvalidArgument
from runtime.tokenizer.bounds import Cover
from runtime.tokenizer.spm import EncodeText
from runtime.tokenizer.stream import MAX_PADDING, Spelling, StreamDecoder
from runtime.tokenizer.vocabulary import Kind, Vocabulary

__all__ = ["Tokenizer"]

_STRETCH = 1 << 16  # characters that are searched for names at once: milliseconds


class Tokenizer:
    """A vocabulary with its encoder. Immutable; any number of threads may use one.

    `chat_template` is the Jinja source that came with the vocabulary or that its family goes by, if there is
    one; `file` is where all came from. `bos_token` and `eos_token` are the pieces' texts ("" where there is
    none)."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        encode_text: EncodeText,
        *,
        chat_template: str | None = None,
        file: str = "",
        inner_user_defined: bool = False,
        strips: dict[int, tuple[bool, bool]] | None = None,
        cover: Cover | None = None,
    ):
        """`inner_user_defined`: `encode_text` itself finds the user-defined pieces in its text. `strips`:
        control tokens that swallow the white space (before, after) them. `cover`: how much text a token
        stands for, where that is known."""
        self._vocabulary, self._encode_text, self._cover = vocabulary, encode_text, cover
        self._spelling = Spelling(vocabulary)
        self.vocab_size = len(vocabulary.pieces)
        self.bos_id = vocabulary.bos_id
        self.eos_ids = vocabulary.eos_ids
        self.add_bos = vocabulary.add_bos
        self.bos_token = "" if self.bos_id is None else vocabulary.pieces[self.bos_id]
        self.eos_token = vocabulary.pieces[self.eos_ids[0]] if self.eos_ids else ""
        self.chat_template = chat_template
        self.file = file
        self.control_tokens = vocabulary.ids_of(Kind.CONTROL)
        always = {} if inner_user_defined else vocabulary.ids_of(Kind.USER_DEFINED)
        self._always, self._any = _matcher(always), _matcher(always | self.control_tokens)
        self._strips = strips or {}

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """The tokens of `text`.

        `add_special` puts a BOS first where the model wants one and `text` does not render it itself.
        `parse_special` turns the names of control tokens, such as <|im_start|>, into these: for text that a
        template wrote, never for a user's. Raises InvalidArgument for text with lone surrogates."""
        return self.encode_parts(self.split(text) if parse_special else [text], add_special=add_special)

    def fewest_tokens(self, text: str) -> int:
        """A lower bound, soon found, on the tokens of `text` as `encode` has them without `parse_special`; 0
        where nothing is known. Raises UnicodeEncodeError for text with lone surrogates."""
        return 0 if self._cover is None else self._cover.fewest(text)

    def encode_parts(self, parts: list[str | int], *, add_special: bool = True) -> list[int]:
        """Encodes plain texts with control tokens (ids) between them."""
        ids: list[int] = []
        after_control = False
        for part in parts:
            if isinstance(part, int):
                ids.append(part)
                after_control = True
                continue
            try:
                part.encode()
            except UnicodeEncodeError as error:
                raise InvalidArgument("text", f"not valid Unicode at character {error.start}") from None
            for piece in _split(self._always, part):
                if isinstance(piece, int):
                    ids.append(piece)
                else:
                    ids += self._encode_text(piece, after_control)
                after_control = False
        if add_special and self.add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def split(self, text: str) -> list[str | int]:
        """`text` cut at the names of control tokens, which become their ids. No part is empty."""
        parts: list[str | int] = []
        for part in _split(self._any, text):
            if isinstance(part, int) and self._vocabulary.kinds[part] != Kind.CONTROL:
                part = self._vocabulary.pieces[part]
            if isinstance(part, str) and parts and isinstance(parts[-1], str):
                parts[-1] += part
            else:
                parts.append(part)
        return self._stripped(parts) if self._strips else parts

    def _stripped(self, parts: list[str | int]) -> list[str | int]:
        for index, part in enumerate(parts):
            if not isinstance(part, int):
                continue
            before, after = self._strips.get(part, (False, False))
            if before and index and isinstance(text := parts[index - 1], str):
                parts[index - 1] = text.rstrip()
            if after and index + 1 < len(parts) and isinstance(text := parts[index + 1], str):
                parts[index + 1] = text.lstrip()
        return [part for part in parts if part != ""]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True, prompt_ids: Iterable[int] = ()) -> str:
        """The text of `ids`; control tokens show their names unless `skip_special`. See StreamDecoder for
        invalid bytes and leading spaces. Raises InvalidArgument for ids out of range."""
        stream = self.stream(skip_special, prompt_ids)
        return "".join([stream.push(token) for token in ids]) + stream.finish()

    def stream(self, skip_special: bool = True, prompt_ids: Iterable[int] = ()) -> StreamDecoder:
        """A decoder for tokens that come one by one after `prompt_ids`, the text before them. With no
        prompt, or one of control tokens alone, the text starts with them."""
        prefix = self._vocabulary.space_prefix
        return StreamDecoder(
            self._spelling, skip_special=skip_special, space_prefix=prefix, prompt=prompt_ids
        )

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token as it stands inside a text; of a control token its name."""
        return self._spelling.bytes_of(token)

    def is_special(self, token: int) -> bool:
        """Whether a token has no text of its own (control, unknown)."""
        return self._spelling.is_special(token)

    def check_fits(self, vocab_rows: int, file: str) -> None:
        """Raises BadModelFile unless an embedding of `vocab_rows` rows goes with this vocabulary: a row for
        each token, and at most MAX_PADDING more."""
        if not self.vocab_size <= vocab_rows <= self.vocab_size + MAX_PADDING:
            raise BadModelFile(
                file, "tokenizer", f"{self.vocab_size} tokens do not fit an embedding of {vocab_rows} rows"
            )


class _Matcher(NamedTuple):
    """Finds any of the names, the longest where several begin at one place."""

    pattern: re.Pattern[str] | None
    ids: dict[str, int]
    longest: int  # characters of a name


def _matcher(ids: dict[str, int]) -> _Matcher:
    names = sorted(ids, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, names))) if names else None
    return _Matcher(pattern, ids, max(map(len, names), default=0))


def _matches(matcher: _Matcher, text: str) -> Iterator[re.Match[str]]:
    """As `finditer`, a stretch of the text at a time: no other thread has its turn during a search, and one
    through megabytes of what looks like names takes seconds."""
    position = 0
    while matcher.pattern is not None and position < len(text):
        end = position + _STRETCH
        match = matcher.pattern.search(text, position, end + matcher.longest)
        if match is None or match.start() >= end:  # what begins later may be cut off
            position = end
        else:
            yield match
            position = match.end()


def _split(matcher: _Matcher, text: str) -> list[str | int]:
    ids = matcher.ids
    parts: list[str | int] = []
    position = 0
    for match in _matches(matcher, text):
        if match.start() > position:
            parts.append(text[position : match.start()])
        parts.append(ids[match.group()])
        position = match.end()
    if position < len(text):
        parts.append(text[position:])
    return parts
