"""Writes tiny random Llama models, as GGUF, for any test that needs one, afresh from a seed.

Weights are zero-mean with a deviation near 1 / sqrt(fan-in), so activations stay near 1 and greedy replies
vary. Quantised types are made by `gguf.quants` where it can; K-quants are random bytes whose scales give the
same deviation (see `random_blocks`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

K_QUANTS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


def write_tiny_llama(
    path: str | Path,
    *,
    seed: int = 0,
    types: str | Mapping[str, str] = "F32",
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    ffn: int = 160,
    vocab: int = 384,
    context: int = 256,
    rope_base: float = 10000.0,
    eps: float = 1e-5,
    tied: bool = False,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a Llama GGUF to `path` and returns it.

    types: one type for every matrix, or a mapping from "attn_q", "ffn_down", "token_embd", "output", ... to
    a type, with "*" for those not named (F32 without one). Norms are F32. A type's block must divide the
    matrix's columns (256 for K-quants). `metadata` adds or replaces keys (int, float, bool or str; None
    removes one); its ints are written as uint32."""
    path, head_dim = Path(path), head_dim or hidden // heads
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    keys: dict[str, Any] = {
        "general.name": "tiny",
        "llama.vocab_size": vocab,
        "llama.context_length": context,
        "llama.embedding_length": hidden,
        "llama.block_count": layers,
        "llama.feed_forward_length": ffn,
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": kv_heads,
        "llama.attention.key_length": head_dim,
        "llama.attention.value_length": head_dim,
        "llama.attention.layer_norm_rms_epsilon": eps,
        "llama.rope.dimension_count": head_dim,
        "llama.rope.freq_base": rope_base,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        **(metadata or {}),
    }
    for key, value in keys.items():
        if value is not None:
            add_key(writer, key, value)
    add_spm_vocabulary(writer, vocab)
    for name, rows, cols, scale in _matrices(
        hidden, layers, heads * head_dim, kv_heads * head_dim, ffn, vocab
    ):
        if name == "output.weight" and tied:
            continue
        kind = name.removesuffix(".weight").rpartition(".")[2]
        type = types if isinstance(types, str) else types.get(kind, types.get("*", "F32"))
        add_matrix(writer, name, rng, rows, cols, type, scale / np.sqrt(cols))
    for name in [f"blk.{i}.{kind}_norm.weight" for i in range(layers) for kind in ("attn", "ffn")]:
        writer.add_tensor(name, (1 + 0.1 * rng.standard_normal(hidden)).astype(np.float32))
    writer.add_tensor("output_norm.weight", (1 + 0.1 * rng.standard_normal(hidden)).astype(np.float32))
    write(writer)
    return path


def _matrices(hidden: int, layers: int, queries: int, keys: int, ffn: int, vocab: int) -> list[tuple]:
    """(name, rows, cols, deviation x sqrt(cols)) of every matrix."""
    found = [("token_embd.weight", vocab, hidden, np.sqrt(hidden)), ("output.weight", vocab, hidden, 3.0)]
    for layer in range(layers):
        found += [
            (f"blk.{layer}.attn_q.weight", queries, hidden, 1.5),
            (f"blk.{layer}.attn_k.weight", keys, hidden, 1.5),
            (f"blk.{layer}.attn_v.weight", keys, hidden, 1.0),
            (f"blk.{layer}.attn_output.weight", hidden, queries, 1.0),
            (f"blk.{layer}.ffn_gate.weight", ffn, hidden, 1.0),
            (f"blk.{layer}.ffn_up.weight", ffn, hidden, 1.0),
            (f"blk.{layer}.ffn_down.weight", hidden, ffn, 1.0),
        ]
    return found


def add_key(writer: gguf.GGUFWriter, key: str, value: bool | int | float | str) -> None:
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    add[type(value)](key, value)


def add_matrix(
    writer: gguf.GGUFWriter,
    name: str,
    rng: np.random.Generator,
    rows: int,
    cols: int,
    type: str,
    deviation: float,
) -> None:
    """A random matrix of the given standard deviation in a GGUF type."""
    kind = gguf.GGMLQuantizationType[type]
    if type in K_QUANTS:
        data = random_blocks(rng, type, rows, cols, deviation)
    else:
        dense = rng.standard_normal((rows, cols)).astype(np.float32) * np.float32(deviation)
        data = gguf.quants.quantize(dense, kind)
    writer.add_tensor(name, data, raw_dtype=None if type in ("F32", "F16") else kind)


def write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def spm_vocabulary(vocab: int) -> tuple[list[str], list[float], list[int]]:
    """Pieces, scores and token types (1 normal, 2 unknown, 3 control, 6 byte) of an SPM-like vocabulary:
    <unk> <s> </s>, the 256 bytes, then a space, letters, digits, points, and pieces of two and more."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = "etaoinshrdlcumwfgypbvkjxqz"
    words = ["▁t", "he", "▁the", "in", "an", "▁a", "er", "on", "▁and", "is", "▁is", "Th", "▁The", "▁once"]
    pairs = [a + b for a in letters for b in letters]
    normal = ["▁", *letters, *letters.upper(), *"0123456789", *".,!?'\"-:;()", "é", "日", *words, *pairs]
    normal += [f"▁{pair}{letter}" for pair in pairs for letter in letters]
    pieces = [*special, *dict.fromkeys(normal)]
    if not len(special) <= vocab <= len(pieces):
        raise ValueError(f"vocab: {vocab} is not from {len(special)} to {len(pieces)}")
    normal = pieces[len(special) : vocab]
    scores = [0.0] * len(special) + [-float(i) for i in range(len(normal))]
    return pieces[:vocab], scores, [2, 3, 3] + [6] * 256 + [1] * len(normal)


def add_spm_vocabulary(writer: gguf.GGUFWriter, vocab: int) -> None:
    pieces, scores, kinds = spm_vocabulary(vocab)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)


def random_blocks(rng: np.random.Generator, type: str, rows: int, cols: int, deviation: float) -> np.ndarray:
    """uint8 [rows, bytes a row] of a K-quant: random codes and sub-scales, one super-scale for all, zero mean
    and about `deviation`. Layouts: ggml-common.h. Where a type has minima, each sub-minimum equals its
    sub-scale and dmin is d times the codes' mean."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type]]
    if cols % block:
        raise ValueError(f"{type} needs columns in multiples of {block}, not {cols}")
    raw = rng.integers(0, 256, (rows, cols // block, size), dtype=np.uint8)

    def half(at: int, value: float) -> None:
        raw[..., at : at + 2] = np.frombuffer(np.float16(value).tobytes(), np.uint8)

    if type == "Q2_K":
        scales = rng.integers(8, 16, (*raw.shape[:2], 16), dtype=np.uint8)
        raw[..., :16] = scales | scales << 4
        d = deviation / (11.5 * 1.12)
        half(80, d), half(82, 1.5 * d)
    elif type == "Q3_K":
        half(108, deviation / (18.5 * 2.3))  # 6-bit scales around 0
    elif type in ("Q4_K", "Q5_K"):
        raw[..., 8:12] = raw[..., 4:8]  # the minima are the scales: so are their high bits,
        raw[..., 12:16] = (raw[..., 12:16] & 15) * 17  # and their low nibbles
        mean, spread = (7.5, 4.61) if type == "Q4_K" else (15.5, 9.23)
        d = deviation / (36.4 * spread)
        half(0, d), half(2, mean * d)
    else:
        half(208, deviation / (74 * 18.5))  # signed 8-bit scales around 0
    return raw.reshape(rows, -1)
