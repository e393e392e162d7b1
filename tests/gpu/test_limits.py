"""What GPUs do not take is refused at start-up, by header and settings, and just so by the kernels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.gpu.step import flagship
from kernels.gpu.attention import paged_attention
from kernels.gpu.norm import WIDEST as WIDEST_NORM
from kernels.gpu.sampling import MOST_TOKENS as MOST_SAMPLED
from runtime.capacity import kv_blocks
from runtime.config import EngineConfig, ModelConfig, ParallelConfig
from runtime.errors import BadModelFile, InvalidArgument, UnsupportedModel
from runtime.local import LocalEngine
from runtime.model.gpu import shard
from runtime.model.gpu.limits import MOST_TOKENS, WIDEST, check_block_size, check_spec
from runtime.model.header import open_model
from runtime.model.load import load_shard
from tests.gpu.device import DEVICE
from tests.gpu.folder import write_folder

SHAPE = {"hidden": 64, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 32, "ffn": 64, "vocab": 100}


def taken(check, *arguments) -> bool:
    try:
        check(*arguments)
    except (InvalidArgument, UnsupportedModel):
        return False
    return True


def attention_takes(heads: int, kv_heads: int, head_dim: int, block_size: int) -> bool:
    """Whether the kernel's own checks let no rows of no sequence pass."""
    half = {"dtype": torch.float16, "device": DEVICE}
    whole = {"dtype": torch.int32, "device": DEVICE}
    q = torch.empty(0, heads, head_dim, **half)
    try:
        paged_attention(
            q, torch.empty(0, 2, kv_heads, block_size, head_dim, **half), torch.empty(0, 1, **whole),
            torch.zeros(1, **whole), torch.empty(0, **whole), torch.empty_like(q),
            torch.empty(0, device=DEVICE), scale=1.0, longest=0,
        )  # fmt: skip
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("head_dim", [4, 8, 20, 64, 100, 128, 192, 252, 256, 264])
def test_head_dimensions(head_dim: int) -> None:
    assert taken(check_spec, "m", replace(flagship(1), head_dim=head_dim)) == attention_takes(
        8, 2, head_dim, 16
    )


@pytest.mark.parametrize("heads, kv_heads", [(64, 1), (65, 1), (128, 2), (130, 2), (64, 64)])
def test_heads_that_share_a_kv_head(heads: int, kv_heads: int) -> None:
    spec = replace(flagship(1), heads=heads, kv_heads=kv_heads)
    assert taken(check_spec, "m", spec) == attention_takes(heads, kv_heads, 64, 16)


@pytest.mark.parametrize("block_size", [1, 8, 16, 24, 32, 64, 96, 128, 256, 512])
def test_block_sizes(block_size: int) -> None:
    assert taken(check_block_size, block_size) == attention_takes(4, 2, 64, block_size)


def test_widths() -> None:
    assert (WIDEST, MOST_TOKENS) == (WIDEST_NORM, MOST_SAMPLED)
    for field, most in (("hidden", WIDEST), ("vocab", MOST_TOKENS)):
        check_spec("m", replace(flagship(1), **{field: most}))
        with pytest.raises(UnsupportedModel, match=f"^m: {field} is {most + 1:,}; .* at most {most:,}"):
            check_spec("m", replace(flagship(1), **{field: most + 1}))


def test_a_header_is_refused_for_gpus_alone(tmp_path) -> None:
    config = ModelConfig(str(write_folder(tmp_path, **{**SHAPE, "head_dim": 100})))
    assert open_model(config).spec.head_dim == 100
    with pytest.raises(UnsupportedModel, match=r"head_dim is 100; .* multiple of 8 up to 256: --device cpu"):
        open_model(config, "cuda")


def test_a_block_size_is_refused_before_weights_are_read(tmp_path, monkeypatch) -> None:
    config = ModelConfig(str(write_folder(tmp_path, **SHAPE)))
    opened = open_model(config, "cuda")
    with pytest.raises(InvalidArgument, match=r"^block-size: 512 is none of 16, 32, 64, 128"):
        kv_blocks(opened, EngineConfig(block_size=512), ParallelConfig(), None)

    def never(*arguments, **settings):
        raise AssertionError("weights were read")

    monkeypatch.setattr("runtime.local.resolve_device", lambda device: "cuda")
    monkeypatch.setattr("runtime.local.load_shard", never)
    with pytest.raises(InvalidArgument, match=r"^block-size: 8 "):
        LocalEngine(config, EngineConfig(block_size=8), ParallelConfig(device="cuda"))


@pytest.mark.parametrize("value", [1e30, float("nan")])
@pytest.mark.parametrize(
    "tensor, named", [("mlp.down_proj", "ffn_down"), ("self_attn.q_proj", "attn_q.weight, attn_k or attn_v")]
)
def test_weights_beyond_fp16_are_a_bad_file(
    tmp_path, monkeypatch, tensor: str, named: str, value: float
) -> None:
    folder = write_folder(tmp_path, **SHAPE)
    file = folder / "model.safetensors"
    tensors = {name: t.bfloat16() for name, t in load_file(file).items()}
    tensors[f"model.layers.0.{tensor}.weight"][3, 5] = value
    save_file(tensors, file)
    built = shard.build_gpu_shard
    monkeypatch.setattr(shard, "build_gpu_shard", lambda *a, **k: built(*a, **{**k, "device": DEVICE}))
    opened = open_model(ModelConfig(str(folder)), "cuda")
    with pytest.raises(BadModelFile, match=rf"blk\.0\.{named}.*: .* of row 3 does not fit fp16$") as caught:
        load_shard(opened, 0, 1)
    assert caught.value.file == opened.checkpoint.path
