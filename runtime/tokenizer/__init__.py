"""Vocabularies from GGUF or Hugging Face files, incremental detokenising, chat templates."""

from runtime.tokenizer.chat import default_template, render_chat
from runtime.tokenizer.load import load_tokenizer
from runtime.tokenizer.stream import StreamDecoder
from runtime.tokenizer.template import ChatTemplate
from runtime.tokenizer.tokenizer import Tokenizer

__all__ = [
    "ChatTemplate",
    "StreamDecoder",
    "Tokenizer",
    "default_template",
    "load_tokenizer",
    "render_chat",
]
