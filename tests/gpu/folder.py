"""Writes tiny random Llama models as safetensors folders, which need no other library to be read."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file


def write_folder(
    folder: Path,
    *,
    hidden: int,
    layers: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    ffn: int,
    vocab: int,
    seed: int = 1,
) -> Path:
    """Weights near 1 / sqrt(fan-in), fp16, to be served with `quantize="int4"` or as they are."""
    draw = torch.Generator().manual_seed(seed)

    def matrix(rows: int, cols: int) -> torch.Tensor:
        return (torch.randn(rows, cols, generator=draw) * cols**-0.5).half()

    tensors = {"model.embed_tokens.weight": matrix(vocab, hidden) * hidden**0.5}
    tensors |= {"lm_head.weight": 2 * matrix(vocab, hidden), "model.norm.weight": torch.ones(hidden).half()}
    for i in range(layers):
        name = f"model.layers.{i}.{{}}.weight".format
        tensors |= {
            name("input_layernorm"): torch.ones(hidden).half(),
            name("self_attn.q_proj"): matrix(heads * head_dim, hidden),
            name("self_attn.k_proj"): matrix(kv_heads * head_dim, hidden),
            name("self_attn.v_proj"): matrix(kv_heads * head_dim, hidden),
            name("self_attn.o_proj"): matrix(hidden, heads * head_dim),
            name("post_attention_layernorm"): torch.ones(hidden).half(),
            name("mlp.gate_proj"): matrix(ffn, hidden),
            name("mlp.up_proj"): matrix(ffn, hidden),
            name("mlp.down_proj"): matrix(hidden, ffn),
        }
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": head_dim, "vocab_size": vocab,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder
