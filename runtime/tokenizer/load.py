"""Picks and builds the tokenizer of a model: from GGUF metadata, or from a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from runtime.errors import BadModelFile, UnsupportedModel
from runtime.tokenizer.bounds import gguf_cover
from runtime.tokenizer.bpe import bpe_encoder
from runtime.tokenizer.chat import default_template
from runtime.tokenizer.huggingface import load_folder
from runtime.tokenizer.spm import load_processor, model_proto, spm_encoder
from runtime.tokenizer.tokenizer import Tokenizer
from runtime.tokenizer.vocabulary import KEY, gguf_scores, gguf_vocabulary

__all__ = ["load_tokenizer"]


def load_tokenizer(metadata: dict[str, Any], *, folder: Path | None = None, file: str = "") -> Tokenizer:
    """The tokenizer that `metadata` (a GGUF's) describes, or the files of `folder` where one is given.

    `file` names the model in errors. Raises BadModelFile (file and key named), and UnsupportedModel for a
    kind of vocabulary or pre-tokenizer that is not served."""
    if folder is not None:
        return load_folder(Path(folder))
    model = metadata.get(KEY + "model")
    if model is None:
        raise BadModelFile(file, KEY + "model", "missing: the file has no vocabulary")
    if model not in ("llama", "gpt2"):
        raise UnsupportedModel(f"{file}: {KEY}model: {model!r:.60} is not served; llama and gpt2 are")
    vocabulary = gguf_vocabulary(metadata, file)
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise BadModelFile(file, "tokenizer.chat_template", "not a string")
    template, cover = default_template(metadata), gguf_cover(vocabulary)
    if model == "gpt2":
        encode = bpe_encoder(metadata, vocabulary, file)
        return Tokenizer(vocabulary, encode, chat_template=template, file=file, cover=cover)
    scores = gguf_scores(metadata, len(vocabulary.pieces), file)
    processor = load_processor(model_proto(vocabulary, scores), file, KEY + "tokens")
    encode = spm_encoder(processor, vocabulary.space_prefix)
    return Tokenizer(
        vocabulary, encode, chat_template=template, file=file, inner_user_defined=True, cover=cover
    )
