"""A trained model by GPU kernels: stories260K, whole and in each of its quantised forms."""

from __future__ import annotations

import pytest

from runtime.config import ModelConfig
from runtime.model.communicator import Alone
from runtime.model.header import open_model
from runtime.model.load import load_shard
from runtime.model.runner import Runner
from tests.gpu.device import ON_GPU
from tests.gpu.play import opened, replies, runner
from tests.support import fixture_path, smollm2_path

FILES = (".f32", *(f"-pad256.{kind}" for kind in ("Q2_K", "Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")))
LENGTH = 100 if ON_GPU else 6


@pytest.mark.parametrize("file", FILES if ON_GPU else (".f32",))
def test_the_story_goes_as_on_a_cpu(file: str) -> None:
    """Greedy, from BOS alone; fp16 may part from fp32 at a near tie: a few tokens and logprobs are held."""
    path = fixture_path(f"stories260K/stories260K{file}.gguf")
    shard, _ = load_shard(open_model(ModelConfig(str(path), dtype="fp32")), 0, 1)
    cpu = Runner(shard, Alone(), total_blocks=1, block_size=16, max_positions=16)
    (mine,), (theirs,) = (replies(run, [(1,)], 6) for run in (runner(opened(path), 16, 1), cpu))
    assert [token for token, _, _ in mine] == [token for token, _, _ in theirs]
    assert [p for _, p, _ in mine] == pytest.approx([p for _, p, _ in theirs], abs=0.02)


@pytest.mark.skipif(not ON_GPU, reason="too slow interpreted")
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("count", [2, 8, 17, 64])
def test_any_batch_tells_the_same_story(file: str, count: int) -> None:
    path = fixture_path(f"stories260K/stories260K{file}.gguf")
    model = opened(path)
    alone = replies(runner(model, LENGTH + 8, 1), [(1, 403)], LENGTH)[0]
    prompts = [(1, 403), *((1, 400 + i, 300 + i, 2 + i)[: 2 + i % 3] for i in range(count - 1))]
    together = replies(runner(model, LENGTH + 8, count), prompts, LENGTH)
    assert together[0] == alone
    assert replies(runner(model, LENGTH + 8, count, graphs=False), prompts, LENGTH, chunk=3) == together


@pytest.mark.skipif(not ON_GPU, reason="too slow interpreted")
def test_smollm2_is_the_same_in_company() -> None:
    model = opened(smollm2_path())
    prompts = [tuple(range(10 + i, 40 + 3 * i)) for i in range(16)]
    together = replies(runner(model, 160, 16), prompts, 32)
    for prompt, reply in list(zip(prompts, together, strict=True))[::5]:
        assert replies(runner(model, 160, 1), [prompt], 32)[0] == reply
