"""Attention over paged KV: right, and a position's bits depend on that position's own sequence alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.attention import (
    block_run,
    chunk_calls,
    padded_blocks,
    paged_attention,
    tile_buffers,
    tile_sizes,
)
from tests.bits import same_bits, torch_threads
from tests.kernels.paged import DEFINING, Paged, Run, Shape

BF16, FP32 = torch.bfloat16, torch.float32
EDGES = (0, 1, 63, 64, 255, 256, 511, 512, 513, 1023, 1024, 1499)
TOLERANCE = {BF16: 2**-6, FP32: 2**-20}  # of values near 1: bf16 probabilities and results; fp32 sums

SHAPES = [
    Shape(BF16, kv_heads=3, group=3, dim=64),
    Shape(BF16, kv_heads=2, group=1, dim=8),
    Shape(BF16, kv_heads=1, group=8, dim=128, window=100),
    Shape(BF16, kv_heads=2, group=32, dim=16),
    Shape(FP32, kv_heads=4, group=2, dim=8),
    Shape(FP32, kv_heads=1, group=7, dim=128),
    Shape(FP32, kv_heads=2, group=4, dim=64, window=600),
    Shape(FP32, kv_heads=1, group=17, dim=16),
]
ids = [
    f"{str(s.dtype)[6:]}-h{s.kv_heads}-g{s.group}-d{s.dim}" + (f"-w{s.window}" if s.window else "")
    for s in SHAPES
]


@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_it_is_softmax_attention(shape):
    paged = Paged(shape, [1500])
    for position in EDGES:
        want = paged.plain(Run(0, position, 1))[0]
        assert (paged.alone(0, position).double() - want).abs().max() < TOLERANCE[shape.dtype] * 2, position
    run = Run(0, 480, 90)
    assert (paged.attend([run])[0].double() - paged.plain(run)).abs().max() < TOLERANCE[shape.dtype] * 2


@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_a_position_has_the_same_bits_in_any_chunk(shape):
    """Alone by decode, alone as a chunk, and inside chunks of many starts and lengths, on 1, 2, 4 threads,
    in this machine's cheapest tiles and in the defining ones."""
    paged = Paged(shape, [1500])
    want = {position: paged.alone(0, position) for position in EDGES}
    cuts = [[(0, 1500)], [(0, 7), (7, 57), (64, 449), (513, 512), (1025, 475)], [(250, 263), (1000, 500)]]
    for threads, runs in zip((1, 2, 4), cuts, strict=True):
        with torch_threads(threads):
            for start, length in runs:
                for tiles in (None, DEFINING):
                    got = paged.attend([Run(0, start, length)], tiles=tiles)[0]
                    for position in EDGES:
                        if start <= position < start + length:
                            where = (position, start, length, tiles)
                            assert same_bits(got[position - start], want[position]), where
            for position in EDGES:
                assert same_bits(paged.attend([Run(0, position, 1)], decode=False)[0][0], want[position])


@pytest.mark.parametrize("shape", SHAPES, ids=ids)
@pytest.mark.parametrize("last", [63, 700])
def test_not_even_the_rounding_knows_the_call(shape, last):
    """Values that cancel, so that the result is how the sum was made: by decode or in a chunk, alone or
    beside longer sequences, read in place or gathered, in the defining tile or the cheapest."""
    plain = replace(shape, window=None)
    paged = Paged(plain, [last + 1, 800], cancel=last + 1)
    want = paged.alone(0, last)
    assert want.abs().max() < 0.1
    here = Run(0, last, 1)
    for threads in (1, 2):
        with torch_threads(threads):
            for got in (
                paged.attend([here])[0][0],
                paged.attend([here], decode=False)[0][0],
                paged.attend([Run(1, 770, 1), here])[1][0],
                paged.attend([Run(0, 0, last + 1)])[0][last],
                paged.attend([Run(1, 3, 30), Run(0, max(0, last - 40), min(41, last + 1))])[1][-1],
                Paged(plain, [last + 1, 800], cancel=last + 1, layout=None).attend([here])[0][0],
            ):
                assert same_bits(got, want)


@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_a_position_has_the_same_bits_in_any_batch(shape):
    """Beside sequences of other lengths, in any slot, over any padding, with any blocks and leftovers."""
    lengths = [1500, 3, 70, 513, 200]
    alone = Paged(shape, lengths)
    want = [alone.alone(i, n - 1) for i, n in enumerate(lengths)]
    for threads in (1, 2, 4):
        batch = Paged(shape, lengths, layout=threads, garbage=7.5)
        order = torch.randperm(5, generator=torch.Generator().manual_seed(threads)).tolist()
        runs = [Run(i, lengths[i] - 1, 1) for i in order]
        runs.insert(2, Run(0, 100, 41))  # a prompt's chunk in the same step
        with torch_threads(threads):
            got = batch.attend(runs)
        del runs[2], got[2]
        for run, rows in zip(runs, got, strict=True):
            assert same_bits(rows[0], want[run.sequence]), (run, threads)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s.kv_heads > 1], ids=str)
def test_heads_do_not_know_each_other(shape):
    """A rank that holds some KV heads computes them to the same bits."""
    paged = Paged(shape, [600, 40])
    runs = [Run(0, 599, 1), Run(1, 39, 1), Run(0, 400, 150)]
    whole = paged.attend(runs)
    for start, stop in [(0, 1), (shape.kv_heads - 1, shape.kv_heads), (0, shape.kv_heads - 1)]:
        part = paged.heads(start, stop).attend(runs)
        for one, other in zip(whole, part, strict=True):
            assert same_bits(one[:, start:stop], other)


@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_blocks_side_by_side_are_read_in_place_with_the_same_bits(shape):
    """What follows a sequence's own blocks is another's, and masked."""
    lengths = [70, 1500, 513, 600]
    scattered, lined_up = Paged(shape, lengths), Paged(shape, lengths, layout=None, garbage=50.0)
    for sequence, position in [(0, 0), (0, 69), (1, 511), (1, 512), (1, 900), (2, 512)]:
        assert same_bits(lined_up.alone(sequence, position), scattered.alone(sequence, position))


def test_a_run_of_blocks():
    assert block_run([4], 3) == slice(4, 7) and block_run([4, 5, 6], 3) == slice(4, 7)
    assert block_run([4, 6], 4) is None and block_run([5, 4], 4) is None


@st.composite
def scenes(draw):
    shape = Shape(
        dtype=draw(st.sampled_from([BF16, FP32])),
        kv_heads=draw(st.integers(1, 4)),
        group=draw(st.integers(1, 32)),
        dim=draw(st.sampled_from([8, 16, 24, 32, 48, 64, 80, 96, 128])),
        block_size=draw(st.sampled_from([1, 8, 16, 32, 64])),
        window=draw(st.none() | st.integers(1, 700)),
    )
    lengths = draw(st.lists(st.integers(1, 700), min_size=1, max_size=4))
    runs = []
    for i, n in enumerate(lengths):
        start = draw(st.integers(0, n - 1))
        runs.append(Run(i, start, draw(st.integers(1, n - start))))
    return (
        shape,
        lengths,
        draw(st.permutations(runs)),
        draw(st.integers(0, 1000)),
        draw(st.sampled_from([1, 2])),
    )


@settings(max_examples=25, deadline=None)
@given(scenes())
def test_any_step_gives_any_position_its_bits(scene):
    shape, lengths, runs, layout, threads = scene
    paged = Paged(shape, lengths, layout=layout, garbage=-3.0)
    with torch_threads(threads):
        got = paged.attend(runs)
    for run, rows in zip(runs, got, strict=True):
        want = paged.plain(run)
        assert (rows.double() - want).abs().max() < TOLERANCE[shape.dtype] * 4
        for offset in {0, run.length // 2, run.length - 1}:
            assert same_bits(rows[offset], paged.alone(run.sequence, run.start + offset)), (run, offset)


def test_work_too_long_for_one_mask_is_cut(monkeypatch):
    shape = Shape(FP32, kv_heads=1, group=2, dim=8)
    paged = Paged(shape, [900])
    whole = paged.attend([Run(0, 0, 900)])[0]
    monkeypatch.setattr("kernels.attention._MASK_LIMIT", 16 * 512 * 3)
    calls = chunk_calls(0, 0, 900, paged.tables[0], group=2, tile=16, block_size=64, window=None, dtype=FP32)
    assert max(call.mask.numel() for call in calls) <= 16 * 1024 * 3
    assert same_bits(paged.attend([Run(0, 0, 900)])[0], whole)


def test_rows_that_no_call_names_stay():
    paged = Paged(Shape(), [20])
    calls = chunk_calls(3, 10, 5, paged.tables[0], group=4, tile=16, block_size=64, window=None, dtype=BF16)
    q = torch.cat([paged.q[0][:3], paged.q[0][10:15], paged.q[0][:2]])
    out = torch.full((10, 2 * 4 * 16), 9.0, dtype=BF16)
    paged_attention(q, paged.cache, calls, tile_buffers(calls, q.shape, BF16), 0.25, out)
    assert (out[:3] == 9).all() and (out[8:] == 9).all()
    assert same_bits(out[3:8].view(5, 2, 4, 16), paged.attend([Run(0, 10, 5)])[0])


def test_tiles_that_change_bits_are_not_taken(monkeypatch):
    """On a machine whose products depend on the number of rows, every tile has the defining size."""
    import kernels.attention

    plain = kernels.attention._attend
    monkeypatch.setattr(
        kernels.attention, "_attend", lambda q, k, v, mask: plain(q, k, v, mask) * (1 + q.shape[2] % 16)
    )
    assert tile_sizes(3, 64, BF16) == DEFINING
    assert tile_sizes(3, 64, FP32) == DEFINING


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="seen on processors with AMX")
def test_the_comparison_sees_what_random_values_hide():
    """A lone row is summed in another order, which bf16 results show in one element of thousands."""
    from kernels.attention import _gives_bits_of_16

    assert _gives_bits_of_16(16, 64) and _gives_bits_of_16(2, 64)
    assert not _gives_bits_of_16(1, 64)


def test_one_chunk_call_list_covers_each_row_once():
    for group, start, length in [(1, 0, 1000), (3, 250, 20), (16, 511, 3), (32, 60, 10)]:
        table = torch.arange(-(-(start + length) // 64))
        tile = tile_sizes(group, 64, BF16).run
        spec = {"block_size": 64, "window": None, "dtype": BF16}
        calls = chunk_calls(5, start, length, table, group=group, tile=tile, **spec)
        rows = torch.cat([call.query[: call.keep] for call in calls]).tolist()
        assert rows == list(range(5, 5 + length))
        assert all(call.query.numel() == call.mask.shape[0] * call.tokens for call in calls)
        assert all(call.tokens == tile // min(group, 16) for call in calls)


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("size", [1, 2, 16, 64, 128, 512, 1024])
def test_padding_covers_every_position(dtype, size):
    for positions in (1, 63, 64, 65, 500, 512, 513, 1500):
        blocks = padded_blocks(positions, size, dtype)
        pad = 64 if dtype == BF16 else 512
        assert blocks * size >= positions and (blocks * size) % pad == 0


@pytest.mark.parametrize(
    "cache",
    [
        torch.zeros(2, 64, 2, 2, 8, dtype=BF16),
        torch.zeros(2, 64, 2, 3, 16, dtype=BF16),
        torch.zeros(2, 64, 1, 2, 16, dtype=BF16),
        torch.zeros(2, 64, 2, 2, 16, dtype=FP32),
    ],
    ids=["dim", "heads", "no values", "type"],
)
def test_a_cache_of_another_model_is_refused(cache):
    q = torch.zeros(1, 2, 4, 16, dtype=BF16)
    with pytest.raises(ValueError, match="does not fit cache"):
        paged_attention(q, cache, [], [], 1.0, torch.zeros(1, 128, dtype=BF16))
