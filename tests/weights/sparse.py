"""Model files of any size that take no room: a real header, and a hole where the weights would be."""

from __future__ import annotations

from pathlib import Path

from runtime.weights.formats import TensorType
from tests.weights.writer import Entry, gguf_bytes

ALIGNMENT = 32


def write_sparse_70b(path: Path, *, layers: int = 80, context: int = 32764) -> Path:
    """miqu-1-70b's shape and its mix in Q4_K_M: half of attn_v and of ffn_down in Q6_K, the other half of
    attn_v in Q5_K, the head in Q6_K, all else in Q4_K. (Which half does not matter here.)"""
    hidden, kv, ffn, vocab = 8192, 1024, 28672, 32000
    matrices = [("token_embd", vocab, hidden, "Q4_K"), ("output", vocab, hidden, "Q6_K")]
    vectors = ["output_norm"]
    for i in range(layers):
        fine = i < layers // 2
        matrices += [
            (f"blk.{i}.attn_q", hidden, hidden, "Q4_K"),
            (f"blk.{i}.attn_k", kv, hidden, "Q4_K"),
            (f"blk.{i}.attn_v", kv, hidden, "Q6_K" if fine else "Q5_K"),
            (f"blk.{i}.attn_output", hidden, hidden, "Q4_K"),
            (f"blk.{i}.ffn_gate", ffn, hidden, "Q4_K"),
            (f"blk.{i}.ffn_up", ffn, hidden, "Q4_K"),
            (f"blk.{i}.ffn_down", hidden, ffn, "Q6_K" if fine else "Q4_K"),
        ]
        vectors += [f"blk.{i}.attn_norm", f"blk.{i}.ffn_norm"]
    entries, at = [], 0
    for name, rows, cols, kind in [*matrices, *((name, 1, hidden, "F32") for name in vectors)]:
        type = TensorType(kind)
        ne = (cols, rows) if rows > 1 else (cols,)
        entries.append(Entry(f"{name}.weight", ne, type.id, offset=at))
        at += -(-rows * (cols // type.block) * type.block_bytes // ALIGNMENT) * ALIGNMENT
    keys = [
        ("general.architecture", "str", "llama"),
        ("general.name", "str", "a hole of 70B"),
        ("llama.vocab_size", "u32", vocab),
        ("llama.context_length", "u32", context),
        ("llama.embedding_length", "u32", hidden),
        ("llama.block_count", "u32", layers),
        ("llama.feed_forward_length", "u32", ffn),
        ("llama.attention.head_count", "u32", 64),
        ("llama.attention.head_count_kv", "u32", 8),
        ("llama.attention.layer_norm_rms_epsilon", "f32", 1e-5),
        ("llama.rope.dimension_count", "u32", 128),
        ("llama.rope.freq_base", "f32", 1e6),
    ]
    header = gguf_bytes(keys, entries)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(
            len(header) + at
        )  # gguf_bytes pads by up to 1 MiB for offsets that small; more hole then
    return path
