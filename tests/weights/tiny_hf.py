"""Writes the Hugging Face folder of a tiny GGUF model: the same function, from safetensors."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from runtime.weights.checkpoint import open_checkpoint
from runtime.weights.loader import Slice, load

STEMS = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip


def write_tiny_hf(folder: Path, model: Path, *, dtype: torch.dtype | None = None, shards: int = 1) -> Path:
    """Turns `model`, a GGUF that `write_tiny_llama` wrote, into config.json and safetensors in `folder`.

    Quantised weights are dequantised; all are cast to `dtype` if it is given. q and k rows are brought from
    GGUF's interleaved order to the rotate-half one. Tokenizer files are not written."""
    checkpoint = open_checkpoint(model)
    keys = checkpoint.metadata
    head_dim = keys["llama.attention.key_length"]
    tensors: dict[str, torch.Tensor] = {}
    wanted = [Slice(name, (0, info.rows), (0, info.cols)) for name, info in checkpoint.tensors.items()]
    for part, weights in load(checkpoint, wanted):
        dense = weights if isinstance(weights, torch.Tensor) else weights.dequantize()
        *layer, stem, kind = part.name.split(".")
        if stem in ("attn_q", "attn_k"):
            dense = dense.view(-1, head_dim // 2, 2, dense.shape[1]).transpose(1, 2).reshape(dense.shape)
        prefix = f"model.layers.{layer[1]}." if layer else ""
        tensors[f"{prefix}{STEMS[stem]}.{kind}"] = dense.to(dtype or dense.dtype).contiguous()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": keys["llama.embedding_length"],
        "intermediate_size": keys["llama.feed_forward_length"],
        "num_hidden_layers": keys["llama.block_count"],
        "num_attention_heads": keys["llama.attention.head_count"],
        "num_key_value_heads": keys["llama.attention.head_count_kv"],
        "head_dim": head_dim,
        "vocab_size": keys["llama.vocab_size"],
        "max_position_embeddings": keys["llama.context_length"],
        "rms_norm_eps": keys["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": keys["llama.rope.freq_base"],
        "hidden_act": "silu",
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "bos_token_id": keys["tokenizer.ggml.bos_token_id"],
        "eos_token_id": keys["tokenizer.ggml.eos_token_id"],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names, weight_map = sorted(tensors), {}
    for index in range(shards):
        shard = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[index::shards]}
        save_file(part, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder
