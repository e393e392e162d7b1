"""The tiny models that other tests stand on are what they say."""

import gguf
import numpy as np
import pytest
import torch

from runtime.weights.checkpoint import open_checkpoint
from runtime.weights.loader import Slice, load
from runtime.weights.planar import Planar
from tests.weights.tiny import K_QUANTS, spm_vocabulary, write_tiny_llama
from tests.weights.tiny_hf import write_tiny_hf

TYPES = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", *K_QUANTS]


def weights_of(path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(path)
    wanted = [Slice(name, (0, info.rows), (0, info.cols)) for name, info in checkpoint.tensors.items()]
    return {
        part.name: weights.dequantize() if isinstance(weights, Planar) else weights
        for part, weights in load(checkpoint, wanted)
    }


@pytest.mark.parametrize("type", TYPES)
def test_weights_are_centred_and_scaled(tmp_path, type):
    path = write_tiny_llama(tmp_path / "m.gguf", types=type, hidden=256, ffn=512, layers=1)
    tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
    for name, scale in (("blk.0.ffn_up.weight", 1.0), ("blk.0.attn_q.weight", 1.5), ("output.weight", 3.0)):
        assert tensors[name].tensor_type.name == type
        weights = gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type) * 16 / scale
        assert 0.9 < weights.std() < 1.1 and abs(weights.mean()) < 0.03


def test_the_seed_decides_every_bit(tmp_path):
    first, again, other = (
        write_tiny_llama(tmp_path / f"{i}.gguf", seed=seed, types="Q4_K", hidden=256, ffn=256).read_bytes()
        for i, seed in enumerate((1, 1, 2))
    )
    assert first == again != other


def test_options_reach_the_file(tmp_path):
    path = write_tiny_llama(
        tmp_path / "m.gguf",
        types={"attn_v": "Q8_0", "*": "F16"},
        heads=6,
        kv_heads=3,
        head_dim=16,
        hidden=96,
        tied=True,
        metadata={"llama.attention.sliding_window": 8, "llama.vocab_size": None},
    )
    model = open_checkpoint(path)
    assert "output.weight" not in model.tensors and "llama.vocab_size" not in model.metadata
    assert model.metadata["llama.attention.sliding_window"] == 8
    assert model.tensors["blk.1.attn_v.weight"].type == "Q8_0"
    assert model.tensors["blk.1.attn_k.weight"].type == "F16"
    assert model.tensors["blk.1.attn_k.weight"].shape == (48, 96)
    assert model.tensors["blk.1.attn_output.weight"].shape == (96, 96)


@pytest.mark.parametrize("vocab", [259, 384, 1000])
def test_the_vocabulary_has_no_piece_twice(vocab):
    pieces, scores, kinds = spm_vocabulary(vocab)
    assert len(pieces) == len(set(pieces)) == len(scores) == len(kinds) == vocab
    assert pieces[:4] == ["<unk>", "<s>", "</s>", "<0x00>"] and kinds[:4] == [2, 3, 3, 6]
    with pytest.raises(ValueError, match="vocab"):
        spm_vocabulary(258)


def test_the_folder_holds_the_files_weights(tmp_path):
    path = write_tiny_llama(tmp_path / "m.gguf", types="Q8_0", heads=4, kv_heads=2, hidden=64)
    plain = weights_of(path)
    for shards in (1, 3):
        folder = write_tiny_hf(tmp_path / f"hf{shards}", path, shards=shards)
        found = weights_of(folder)
        assert set(found) == set(plain)
        for name, weights in plain.items():
            if ".attn_q." in name or ".attn_k." in name:  # pairs (2i, 2i + 1) become (i, i + 8)
                order = np.concatenate([np.r_[0:16:2, 1:16:2] + 16 * h for h in range(len(weights) // 16)])
                weights = weights[order]
            assert torch.equal(found[name], weights)
