"""How many KV blocks a rank takes: what was asked, what fits, and one line where neither works."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from runtime import capacity
from runtime.capacity import kv_blocks
from runtime.config import EngineConfig, ModelConfig, ParallelConfig
from runtime.errors import InvalidArgument, NotEnough
from runtime.model.communicator import Alone
from runtime.model.header import OpenModel, open_model
from runtime.model.load import load_shard
from runtime.model.runner import Runner
from runtime.model.stages import stage_layers

GIB = 1 << 30


@pytest.fixture
def model(tiny) -> OpenModel:
    """fp32, 2 layers, 4 KV heads of 16: 1,024 bytes a position."""
    return open_model(ModelConfig(str(tiny(heads=4, kv_heads=4, head_dim=16, context=4096))))


@pytest.fixture
def free(monkeypatch):
    """Sets the bytes of memory that seem to be free."""

    def set_free(size: int) -> None:
        monkeypatch.setattr(capacity, "available", lambda: size)

    set_free(64 * GIB)
    return set_free


def blocks(model, *, kv_memory=None, tp=1, max_model_len=None, **engine) -> EngineConfig:
    return kv_blocks(model, EngineConfig(**engine), ParallelConfig(tp=tp, kv_memory=kv_memory), max_model_len)


def test_bytes_of_a_position(model):
    assert model.kv_bytes_per_position == 2 * 2 * 4 * 16 * 4


def test_what_is_asked_for_is_taken_to_the_block(model, free):
    for asked, want in [(65_536, 1), (131_071, 1), (131_072, 2), (1 << 20, 16)]:
        got = blocks(model, kv_memory=asked)
        assert got.total_blocks == want
        assert got.max_model_len == min(4096, want * 64)


@pytest.mark.parametrize(("tp", "largest"), [(1, 4), (2, 2), (3, 2), (4, 1)])
def test_the_largest_run_of_units_decides(model, free, tp, largest):
    assert blocks(model, kv_memory=1 << 20, tp=tp, block_size=16).total_blocks == (1 << 20) // (
        16 * 1024 * largest // 4
    )


def test_what_is_counted_is_what_a_rank_takes(model, free):
    for tp in (1, 2, 3, 4):
        config = blocks(model, kv_memory=300_000, tp=tp, block_size=16)
        sizes = []
        for rank in range(tp):
            shard, _ = load_shard(model, rank, tp)
            comm = Alone() if tp == 1 else SimpleNamespace(rank=rank, size=tp)
            runner = Runner(shard, comm, total_blocks=config.total_blocks, block_size=16, max_positions=16)
            sizes.append(runner.cache_bytes)
        assert 300_000 - 16 * 1024 < max(sizes) <= 300_000


def test_the_largest_stage_decides(tiny, free):
    deep = open_model(ModelConfig(str(tiny(types="Q8_0", layers=5, vocab=2048, context=4096))))
    for pp in (1, 2, 3, 5):
        config = kv_blocks(
            deep,
            EngineConfig(block_size=16, max_num_seqs=1000),
            ParallelConfig(pp=pp, kv_memory=1 << 20),
            None,
        )
        most = max(stop - start for start, stop in stage_layers(deep, pp))
        position = deep.kv_bytes_per_position // 5 * most
        assert config.total_blocks == (1 << 20) // (16 * position)
        assert config.microbatches == pp


def test_weights_that_are_still_to_come_are_counted(model, free):
    weights = sum(info.nbytes for info in model.checkpoint.tensors.values())
    one = 4096 * 1024  # bytes of a context

    def settle(**engine) -> EngineConfig:
        return kv_blocks(model, EngineConfig(**engine), ParallelConfig(tp=2), None, unloaded=True)

    free(weights + one)
    assert settle().max_model_len == 4096
    free(weights + one - 1)
    with pytest.raises(NotEnough, match=r"the weights at least 0\.0 GiB, and"):
        settle()
    assert kv_blocks(model, EngineConfig(), ParallelConfig(tp=2), None).max_model_len == 4096
    free(weights + 8 * one)
    assert settle(max_num_seqs=1000).total_blocks == 2 * 4096 // 64  # a quarter of what the weights leave
    free(weights // 2)
    with pytest.raises(NotEnough, match="the weights at least"):
        settle()


def test_unasked_it_takes_a_share_yet_room_for_one_context(model, free):
    roomy = blocks(model, max_num_seqs=10_000)
    assert roomy.total_blocks * 64 * 1024 <= capacity.DEFAULT_CAP
    assert roomy.total_blocks * 64 * 1024 > capacity.DEFAULT_CAP * 0.99
    free(64 << 20)
    tight = blocks(model, max_num_seqs=10_000)
    assert tight.total_blocks * 64 * 1024 <= 16 << 20
    free(8 << 20)  # a quarter of it would not hold 4,096 positions
    one = blocks(model, max_num_seqs=10_000)
    assert (one.total_blocks, one.max_model_len) == (64, 4096)


def test_ranks_of_a_host_share_what_is_free(model, free):
    free(400 << 20)
    config = blocks(model, tp=4, max_num_seqs=10_000)
    assert config.total_blocks * 64 * 1024 / 4 * 4 <= 100 << 20


def test_no_more_than_can_ever_be_used(model, free):
    assert blocks(model, max_num_seqs=2, max_model_len=100).total_blocks == 2 * 2
    assert blocks(model, kv_memory=GIB, max_num_seqs=3, max_model_len=64).total_blocks == 3


def test_a_number_of_blocks_may_be_set(model, free):
    assert blocks(model, total_blocks=7).total_blocks == 7
    assert blocks(model, total_blocks=7).max_model_len == 448


def test_the_rest_of_the_settings_stay(model, free):
    config = blocks(model, max_step_tokens=99, max_chunk=5, prefix_cache=False)
    assert (config.max_step_tokens, config.max_chunk, config.prefix_cache) == (99, 5, False)


@pytest.mark.parametrize("length", [0, -1, 4097, 1 << 40])
def test_a_context_that_the_model_has_not(model, free, length):
    with pytest.raises(InvalidArgument, match=f"^max-model-len: {length} is not within 1 to 4096"):
        blocks(model, max_model_len=length)


@pytest.mark.parametrize("size", [0, -64, 3, 48, 192, 320, 576])
def test_a_block_size_that_attention_cannot_pad(model, free, size):
    with pytest.raises(InvalidArgument, match=f"^block-size: {size} "):
        blocks(model, block_size=size)


@pytest.mark.parametrize("asked", [0, 1, 65_535, -5])
def test_memory_for_not_one_block(model, free, asked):
    with pytest.raises(NotEnough, match="--kv-memory: one block of 64 positions takes 65,536 bytes"):
        blocks(model, kv_memory=asked)


@pytest.mark.parametrize(
    "asked", [{}, {"kv_memory": 3 << 20, "max_num_seqs": 64}, {"total_blocks": 64}], ids=str
)
def test_more_than_is_free_says_what_to_do(model, free, asked):
    free(2 << 20)
    with pytest.raises(NotEnough, match="--max-model-len or --kv-memory") as caught:
        blocks(model, **asked)
    assert "\n" not in str(caught.value)


def test_the_cache_starts_as_zeros(model, free):
    shard, _ = load_shard(model, 0, 1)
    runner = Runner(shard, Alone(), total_blocks=2, block_size=16, max_positions=16)
    assert not torch.any(runner.forward.cache)
