"""Makes a Hugging Face folder (bf16 safetensors) of a Llama GGUF file, for engines that want one.

Weights are dequantised by the `gguf` package and rounded once to bf16, so a peer that reads the folder runs
the same function up to that rounding. Knows no engine and nothing of this project; needs gguf, numpy, torch,
safetensors and tokenizers. A tokenizer is written for byte-level BPE vocabularies of SmolLM's kind and left
out for others: the benchmarks give token ids.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import save_file

# GGUF's names (gguf.constants, architecture "llama") to those of transformers' LlamaForCausalLM.
OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Token types of the GGUF specification.
CONTROL, USER_DEFINED = 3, 4


def metadata(reader: GGUFReader) -> dict[str, object]:
    """The file's keys and values as plain Python. Raises ValueError where it is no plain Llama model."""
    meta = {key: field.contents() for key, field in reader.fields.items()}
    if meta.get("general.architecture") != "llama":
        raise ValueError(f"general.architecture is {meta.get('general.architecture')!r}, not 'llama'")
    scaling = [key for key in meta if key.startswith("llama.rope.scaling.")]
    if scaling or meta.get("llama.expert_count"):
        raise ValueError(f"not carried over: {', '.join(scaling) or 'experts'}")
    return meta


def hf_name(name: str) -> str:
    """The transformers name of a GGUF tensor. Raises ValueError for one it has no place for."""
    if name in OUTSIDE:
        return OUTSIDE[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in IN_LAYER and parts[3] == "weight":
        return f"model.layers.{parts[1]}.{IN_LAYER[parts[2]]}.weight"
    raise ValueError(f"tensor {name!r} has no place in LlamaForCausalLM")


def half_split(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a q or k projection (heads x head_dim, hidden) in the order that transformers' RoPE wants.

    GGUF keeps the two rows that turn together next to each other (2i, 2i + 1); transformers keeps them half a
    head apart (i, i + head_dim / 2).
    """
    pairs = rows.reshape(heads, -1, 2, rows.shape[1])
    return pairs.transpose(0, 2, 1, 3).reshape(rows.shape)


def weights(reader: GGUFReader, heads: int, kv_heads: int) -> dict[str, torch.Tensor]:
    """Every tensor of the file under its transformers name, in bf16 (rounded to nearest, ties to even)."""
    out: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        if tensor.name.endswith("attn_q.weight"):
            values = half_split(values, heads)
        elif tensor.name.endswith("attn_k.weight"):
            values = half_split(values, kv_heads)
        out[hf_name(tensor.name)] = torch.from_numpy(np.array(values)).to(torch.bfloat16)
    return out


def config(meta: dict[str, object], vocab: int, tied: bool) -> dict[str, object]:
    """config.json of a LlamaForCausalLM."""
    hidden = meta["llama.embedding_length"]
    heads = meta["llama.attention.head_count"]
    theta = meta.get("llama.rope.freq_base", 10000.0)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": meta.get("llama.attention.head_count_kv", heads),
        "head_dim": meta.get("llama.attention.key_length", hidden // heads),
        "vocab_size": vocab,
        "max_position_embeddings": meta["llama.context_length"],
        "rms_norm_eps": float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": meta.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": meta.get("tokenizer.ggml.padding_token_id"),
        "dtype": "bfloat16",
    }


def write_tokenizer(meta: dict[str, object], folder: Path) -> bool:
    """tokenizer.json and tokenizer_config.json where the vocabulary is byte-level BPE of SmolLM's kind.

    Returns whether they were written. SmolLM cuts digits one by one, then splits as GPT-2 does.
    """
    if meta.get("tokenizer.ggml.model") != "gpt2" or meta.get("tokenizer.ggml.pre") != "smollm":
        return False
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(t, normalized=False, special=True)
            for t, kind in zip(tokens, types, strict=True)
            if kind == CONTROL
        ]
    )
    tokenizer.add_tokens(
        [
            AddedToken(t, normalized=False)
            for t, kind in zip(tokens, types, strict=True)
            if kind == USER_DEFINED
        ]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": meta["llama.context_length"],
        "bos_token": tokens[meta["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[meta["tokenizer.ggml.eos_token_id"]],
    }
    if "tokenizer.chat_template" in meta:
        settings["chat_template"] = meta["tokenizer.chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a Hugging Face folder (bf16) of a Llama GGUF file.")
    parser.add_argument("model", type=Path, help="a GGUF file, not split")
    parser.add_argument("folder", type=Path, help="made if it is not there")
    args = parser.parse_args()
    if not args.model.is_file():
        sys.exit(f"no such file: {args.model}")
    reader = GGUFReader(args.model)
    try:
        meta = metadata(reader)
        heads = meta["llama.attention.head_count"]
        tensors = weights(reader, heads, meta.get("llama.attention.head_count_kv", heads))
    except ValueError as error:
        sys.exit(f"{args.model.name}: {error}")
    tied = "lm_head.weight" not in tensors
    args.folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, args.folder / "model.safetensors", metadata={"format": "pt"})
    vocab = tensors["model.embed_tokens.weight"].shape[0]
    text = json.dumps(config(meta, vocab, tied), indent=1)
    (args.folder / "config.json").write_text(text + "\n")
    named = write_tokenizer(meta, args.folder)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    tokenizer = "with" if named else "without"
    print(f"{args.folder}: {len(tensors)} tensors, {size / 1e6:.1f} MB, {tokenizer} a tokenizer")


if __name__ == "__main__":
    main()
