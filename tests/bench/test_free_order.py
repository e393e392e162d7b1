"""The bench-only patch that switches the rule off: it computes the same function, and goes away again."""

from __future__ import annotations

import pytest
import torch

from bench import free_attention
from bench.free_order import ITEMS, RULE, switched_off
from bench.local import ask, local_engine
from kernels import attention
from runtime.types import Request, SamplingParams
from tests.weights.tiny import write_tiny_llama


def standing(names) -> list[object]:
    """What stands now at every place that these items patch."""
    return [getattr(owner, attribute) for name in names for owner, attribute, _ in ITEMS[name].patches()]


@pytest.mark.parametrize("name", ITEMS)
def test_an_item_is_there_and_goes_again(name):
    before = standing([name])
    with pytest.raises(ZeroDivisionError), switched_off([name]):
        assert all(now is not then for now, then in zip(standing([name]), before, strict=True))
        raise ZeroDivisionError
    assert all(now is then for now, then in zip(standing([name]), before, strict=True))


def test_items_that_share_a_place_go_again():
    before = standing(RULE)
    with switched_off(RULE), switched_off(["head"]):
        pass
    assert all(now is then for now, then in zip(standing(RULE), before, strict=True))


def test_an_unknown_item_changes_nothing():
    before = standing(RULE)
    with pytest.raises(KeyError, match="speed"), switched_off([*RULE, "speed"]):
        pass
    assert all(now is then for now, then in zip(standing(RULE), before, strict=True))


def test_the_engine_is_what_it_was(tmp_path):
    """A free engine beside it, built and run, leaves no bit of the ruled one's replies changed."""
    path = str(
        write_tiny_llama(tmp_path / "tiny.gguf", types="Q8_0", hidden=96, heads=6, kv_heads=3, ffn=192)
    )
    params = SamplingParams(temperature=0.9, max_tokens=8, seed=5, logprobs=3)
    requests = [Request(str(n), tuple(range(3, 12 + n)), params) for n in range(3)]
    size = {"context": 64, "positions": 1024}

    def replies(engine) -> list:
        return [[(t.token, t.logprob, t.top) for t in trace.tokens] for trace in ask(engine, requests)]

    with local_engine(path, **size) as ruled:
        before = replies(ruled)
        with switched_off(RULE), local_engine(path, **size) as free:
            theirs = replies(free)
        assert replies(ruled) == before
    assert theirs != before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("heads", [(3, 3), (2, 1), (1, 20)], ids=lambda heads: f"{heads[0]}x{heads[1]}")
def test_attention_is_the_same_but_for_rounding(dtype, window, heads):
    """Lone tokens of several lengths and two runs, one from the middle of its text, in one batch."""
    kv_heads, group = heads
    dim, block_size, draw = 32, 16, torch.Generator().manual_seed(3)
    cache = torch.randn(64, block_size, 2, kv_heads, dim, generator=draw).to(dtype)
    positions = [0, 37, 90]
    runs = [(0, 33), (40, 21)]  # (first position, tokens)
    q = torch.randn(len(positions) + sum(n for _, n in runs), kv_heads, group, dim, generator=draw).to(dtype)
    tables = torch.randperm(64, generator=draw)[:50].view(5, 10)
    spec = {"block_size": block_size, "window": window, "dtype": dtype}

    def attend(how, blocks_of) -> torch.Tensor:
        count = blocks_of(max(positions) + 1, block_size, dtype)
        table = torch.zeros(3, count, dtype=torch.int64)
        table[:, :10] = tables[:3, :count]
        for row, position in enumerate(positions):
            table[row, position // block_size + 1 :] = 0
        calls = [how.decode_call(list(range(3)), torch.tensor(positions), table, tile=16, **spec)]
        first = len(positions)
        for (start, length), blocks in zip(runs, tables[3:], strict=True):
            used = blocks[: -(-(start + length) // block_size)]
            calls += how.chunk_calls(first, start, length, used, group=group, tile=16, **spec)
            first += length
        out = torch.full((len(q), kv_heads * group * dim), torch.nan, dtype=dtype)
        buffers = how.tile_buffers(calls, q.shape, dtype)
        return how.paged_attention(q, cache, calls, buffers, dim**-0.5, out)

    ruled = attend(attention, attention.padded_blocks)
    free = attend(free_attention, free_attention.blocks_of)
    torch.testing.assert_close(free, ruled, rtol=0, atol=2e-6 if dtype == torch.float32 else 2e-2)
