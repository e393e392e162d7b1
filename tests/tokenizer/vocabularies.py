"""Tiny vocabularies as GGUF metadata, and where the real ones lie."""

from functools import cache
from pathlib import Path
from typing import Any

from runtime.tokenizer import Tokenizer, load_tokenizer
from runtime.tokenizer.vocabulary import byte_alphabet
from runtime.weights.gguf import read_gguf

KEY = "tokenizer.ggml."
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def spm_metadata(**changes: Any) -> dict[str, Any]:
    """A sentencepiece vocabulary of 280 or so tokens; `changes` replace keys (None drops one)."""
    entries = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    entries += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    merged = ["▁t", "he", "▁the", "▁▁", "in", "▁[", "ee", "éé"]
    entries += [(piece, -float(rank), NORMAL) for rank, piece in enumerate(merged)]
    entries += [(piece, -100.0 - rank, NORMAL) for rank, piece in enumerate("▁theinr[]é日ab")]
    entries += [("<tool>", 0.0, USER), ("<pad>", 0.0, UNUSED)]
    return _changed(
        {
            KEY + "model": "llama",
            KEY + "tokens": [piece for piece, _, _ in entries],
            KEY + "scores": [score for _, score, _ in entries],
            KEY + "token_type": [kind for _, _, kind in entries],
            KEY + "bos_token_id": 1,
            KEY + "eos_token_id": 2,
        },
        changes,
    )


def bpe_metadata(**changes: Any) -> dict[str, Any]:
    """A byte-level vocabulary: every byte, some merges, ChatML's control tokens."""
    alphabet = [character for character, _ in sorted(byte_alphabet().items(), key=lambda item: item[1])]
    merges = ["Ġ t", "h e", "Ġt he", "i n", "Ġ Ġ", "Ã ©", "l l"]
    pieces = alphabet + [merge.replace(" ", "") for merge in merges]
    kinds = [NORMAL] * len(pieces)
    for piece, kind in (("<|endoftext|>", CONTROL), ("<|im_start|>", CONTROL), ("<|im_end|>", CONTROL),
                        ("<tool>", USER), ("[PAD]", UNUSED)):  # fmt: skip
        pieces.append(piece)
        kinds.append(kind)
    return _changed(
        {
            KEY + "model": "gpt2",
            KEY + "pre": "smollm",
            KEY + "tokens": pieces,
            KEY + "token_type": kinds,
            KEY + "merges": merges,
            KEY + "bos_token_id": pieces.index("<|endoftext|>"),
            KEY + "eos_token_id": pieces.index("<|im_end|>"),
            "tokenizer.chat_template": CHATML,
        },
        changes,
    )


def _changed(metadata: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    metadata |= {KEY + name: value for name, value in changes.items()}
    return {key: value for key, value in metadata.items() if value is not None}


@cache
def tiny_spm() -> Tokenizer:
    return load_tokenizer(spm_metadata(), file="tiny-spm.gguf")


@cache
def tiny_bpe() -> Tokenizer:
    return load_tokenizer(bpe_metadata(), file="tiny-bpe.gguf")


@cache
def from_gguf(path: Path) -> Tokenizer:
    return load_tokenizer(read_gguf(path).metadata, file=str(path))
