"""Tokenizers of Hugging Face folders: tokenizer.json, else tokenizer.model, with the files beside them.

Read are tokenizer_config.json, special_tokens_map.json, added_tokens.json, generation_config.json,
config.json, chat_template.jinja and chat_template.json. Knows nothing of weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers

from runtime.errors import BadModelFile, NotFound, UnsupportedModel
from runtime.tokenizer.bpe import library_ids
from runtime.tokenizer.chat import MISTRAL_TEMPLATE
from runtime.tokenizer.spm import load_processor, spm_encoder
from runtime.tokenizer.tokenizer import Tokenizer
from runtime.tokenizer.vocabulary import MAX_PIECES, Kind, Vocabulary, byte_value, check_unique, end_ids

__all__ = ["load_folder"]

MAX_FILE = 1 << 27  # bytes; the largest real tokenizer.json have some 30 MB


def load_folder(folder: Path) -> Tokenizer:
    """Raises NotFound where there is no tokenizer, BadModelFile (file and key named), UnsupportedModel."""
    settings = _settings(folder)
    if (folder / "tokenizer.json").exists():
        return _from_json(folder, settings)
    if (folder / "tokenizer.model").exists():
        return _from_model(folder, settings)
    raise NotFound("tokenizer", str(folder), "the folder has neither tokenizer.json nor tokenizer.model")


def _from_json(folder: Path, settings: dict[str, Any]) -> Tokenizer:
    path = folder / "tokenizer.json"
    data = _read_json(path)
    first = _library_tokenizer(data, path)
    later = _library_tokenizer(later_data, path) if (later_data := _without_first_prefix(data)) else first
    known = first.get_vocab(with_added_tokens=True)
    pieces = _listed(known, path)
    kinds = _json_kinds(data, first, pieces, path)
    byte_level, space_prefix = _decoding(data.get("decoder"), path)
    bos, named_ends = _named(settings, known, folder)
    add_bos = settings.get("add_bos_token")
    if not isinstance(add_bos, bool):
        # The post-processor tells: what it puts around no text at all.
        around = first.encode("", add_special_tokens=True).ids
        add_bos = bos is not None and around[:1] == [bos]
    vocabulary = Vocabulary(
        pieces, kinds, byte_level, bos, end_ids(named_ends, pieces, kinds), add_bos and bos is not None,
        space_prefix,
    )  # fmt: skip

    def encode(text: str, after_control: bool) -> list[int]:
        return library_ids(later if after_control else first, text)

    strips = {
        token: (added.lstrip, added.rstrip)
        for token, added in first.get_added_tokens_decoder().items()
        if added.special and (added.lstrip or added.rstrip)
    }
    template = _template(settings, folder, spm=not byte_level)
    return Tokenizer(
        vocabulary, encode, chat_template=template, file=str(path), inner_user_defined=True, strips=strips
    )


def _library_tokenizer(data: dict[str, Any], path: Path) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(data))
    except Exception as error:  # the library raises plain Exception
        raise BadModelFile(str(path), "", f"tokenizers refuses it: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # special tokens' names in a text are text
    return tokenizer


def _without_first_prefix(data: dict[str, Any]) -> dict[str, Any] | None:
    """The same tokenizer for text after a control token, where a space prefix is for the start alone."""
    scheme, never = '"prepend_scheme": "first"', '"prepend_scheme": "never"'
    before = json.dumps(data.get("pre_tokenizer"))
    return data | {"pre_tokenizer": json.loads(before.replace(scheme, never))} if scheme in before else None


def _json_kinds(data: dict, tokenizer: tokenizers.Tokenizer, pieces: list[str], path: Path) -> bytes:
    kinds = bytearray(Kind.NORMAL if piece else Kind.UNUSED for piece in pieces)
    model = data.get("model", {})
    if model.get("byte_fallback"):
        for token, piece in enumerate(pieces):
            if byte_value(piece) is not None:
                kinds[token] = Kind.BYTE
    for token, added in tokenizer.get_added_tokens_decoder().items():
        kinds[token] = Kind.CONTROL if added.special else Kind.USER_DEFINED
    unknown = model.get("unk_token")
    if isinstance(unknown, str) and (token := tokenizer.token_to_id(unknown)) is not None:
        kinds[token] = Kind.UNKNOWN
    return bytes(kinds)


def _decoding(decoder: Any, path: Path) -> tuple[bool, bool]:
    """(whether pieces are spelled byte-level, whether decoding takes away a leading space)."""
    steps = decoder.get("decoders", [decoder]) if isinstance(decoder, dict) else []
    kinds = [step.get("type") for step in steps if isinstance(step, dict)]
    if kinds == ["ByteLevel"]:
        return True, False
    if kinds and set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        for step in steps:
            if step["type"] == "Strip" and step.get("start"):
                return False, True
            if step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never":
                return False, bool(step.get("add_prefix_space", True))
        return False, False
    raise UnsupportedModel(f"{path}: decoder: {kinds or decoder!r} is not served")


def _from_model(folder: Path, settings: dict[str, Any]) -> Tokenizer:
    path = folder / "tokenizer.model"
    processor = load_processor(_read(path), str(path), "")
    count = processor.vocab_size()
    known = {processor.id_to_piece(token): token for token in range(count)}
    kinds = bytearray(Kind.NORMAL for _ in range(count))
    for token in range(count):
        if processor.is_unknown(token):
            kinds[token] = Kind.UNKNOWN
        elif processor.is_control(token):
            kinds[token] = Kind.CONTROL
        elif processor.is_byte(token):
            kinds[token] = Kind.BYTE
        elif processor.is_unused(token):
            kinds[token] = Kind.UNUSED
    added = _added_tokens(settings, folder)
    for content, (token, _) in added.items():
        if known.setdefault(content, token) != token:
            raise BadModelFile(str(folder), "added_tokens", f"{content!r:.60} is token {known[content]} too")
    pieces = _listed(known, path)
    kinds += bytes(Kind.NORMAL if piece else Kind.UNUSED for piece in pieces[count:])
    for token, special in added.values():
        if token >= count:
            kinds[token] = Kind.CONTROL if special else Kind.USER_DEFINED
        elif special and kinds[token] == Kind.NORMAL:
            kinds[token] = Kind.CONTROL
    bos, named_ends = _named(settings, known, folder)
    prefix = processor.normalize("x") != "x"  # the normaliser puts a visible space before it
    vocabulary = Vocabulary(
        pieces, bytes(kinds), False, bos, end_ids(named_ends, pieces, bytes(kinds)),
        bos is not None and settings.get("add_bos_token") is not False, prefix,
    )  # fmt: skip
    check_unique(pieces, bytes(kinds), str(path), "")
    template = _template(settings, folder, spm=True)
    return Tokenizer(vocabulary, spm_encoder(processor, prefix), chat_template=template, file=str(path))


def _listed(known: dict[str, int], path: Path) -> list[str]:
    """Pieces by id; "" where the ids leave a gap."""
    if not known or not 0 <= min(known.values()) <= max(known.values()) < MAX_PIECES:
        raise BadModelFile(str(path), "vocab", f"token ids are not within 0 to {MAX_PIECES - 1}")
    pieces = [""] * (max(known.values()) + 1)
    for piece, token in known.items():
        pieces[token] = piece
    return pieces


def _settings(folder: Path) -> dict[str, Any]:
    """What the small files beside the vocabulary say, the tokenizer's own before the model's."""
    settings: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json", "special_tokens_map.json", "chat_template.json",
                 "tokenizer_config.json"):  # fmt: skip
        if (folder / name).exists():
            settings |= {key: value for key, value in _read_json(folder / name).items() if value is not None}
    if (folder / "chat_template.jinja").exists():
        try:
            settings["chat_template"] = _read(folder / "chat_template.jinja").decode()
        except UnicodeDecodeError:
            raise BadModelFile(str(folder / "chat_template.jinja"), "", "not UTF-8") from None
    return settings


def _template(settings: dict[str, Any], folder: Path, *, spm: bool) -> str | None:
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        for number, entry in enumerate(template):
            texts = [entry.get(key) for key in ("name", "template")] if isinstance(entry, dict) else [None]
            if not all(isinstance(text, str) for text in texts):
                raise BadModelFile(
                    str(folder), "chat_template", f"entry {number} is not a name and a template"
                )
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if not isinstance(template, str | None):
        raise BadModelFile(str(folder), "chat_template", "neither a text nor a list of named ones")
    return MISTRAL_TEMPLATE if template is None and spm else template


def _named(
    settings: dict[str, Any], known: dict[str, int], folder: Path
) -> tuple[int | None, list[int | None]]:
    """The BOS and the end tokens that the settings name, by text or by id."""

    def by_text(key: str) -> int | None:
        value = settings.get(key)
        text = value.get("content") if isinstance(value, dict) else value
        if not isinstance(text, str) or not text:
            return None
        if text not in known:
            raise BadModelFile(str(folder), key, f"{text!r:.60} is not in the vocabulary")
        return known[text]

    def by_id(key: str) -> list[int]:
        value = settings.get(key)
        tokens = value if isinstance(value, list) else [] if value is None else [value]
        limit = max(known.values())
        for token in tokens:
            if type(token) is not int or not 0 <= token <= limit:
                raise BadModelFile(str(folder), key, f"{token!r:.40} is not a token id up to {limit}")
        return tokens

    # A tokenizer_config.json without a BOS means none (Qwen2), whatever id the model's config keeps.
    bos = by_text("bos_token")
    if bos is None and "tokenizer_class" not in settings and (ids := by_id("bos_token_id")):
        bos = ids[0]
    return bos, [by_text("eos_token"), *by_id("eos_token_id")]


def _added_tokens(settings: dict[str, Any], folder: Path) -> dict[str, tuple[int, bool]]:
    """Text -> (id, whether it is special) of the tokens added to a tokenizer.model."""
    added: dict[str, tuple[int, bool]] = {}
    path = folder / "added_tokens.json"
    for content, token in (_read_json(path) if path.exists() else {}).items():
        added[content] = (token, True)
    decoder = settings.get("added_tokens_decoder")
    for token, entry in decoder.items() if isinstance(decoder, dict) else ():
        known = isinstance(entry, dict) and isinstance(entry.get("content"), str)
        if not known or not token.isdecimal() or len(token) > 9:
            raise BadModelFile(str(folder), "added_tokens_decoder", f"entry {token!r:.40} is no added token")
        added[entry["content"]] = (int(token), bool(entry.get("special")))
    for content, (token, _) in added.items():
        if type(token) is not int or not 0 <= token < MAX_PIECES:
            raise BadModelFile(str(folder), "added_tokens", f"{content!r:.60} has the id {token!r:.40}")
    return added


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_FILE:
            raise BadModelFile(str(path), "", f"larger than {MAX_FILE} bytes")
        return path.read_bytes()
    except OSError as error:
        raise BadModelFile(str(path), "", f"cannot be read: {error.strerror or error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise BadModelFile(str(path), "", f"not JSON: {error}") from None
    if not isinstance(data, dict):
        raise BadModelFile(str(path), "", "not a JSON object")
    return data
