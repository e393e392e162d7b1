"""Attention on AMX: a row depends on itself and on what it sees alone, bit for bit, and is right."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.attention import Tiles, lay_out, native_takes, paged_attention
from kernels.native import machine
from tests.bits import same_bits, torch_threads
from tests.kernels.paged import Paged, Run, Shape

pytestmark = pytest.mark.skipif(not machine.supported(), reason="no AMX, or no compiler for it")
BF16 = torch.bfloat16
SHAPES = [
    Shape(kv_heads=3, group=3, dim=64),  # SmolLM2
    Shape(kv_heads=1, group=8, dim=128, block_size=16),  # a rank of a 70B
    Shape(kv_heads=2, group=1, dim=32, window=50),
    Shape(kv_heads=2, group=20, dim=64, block_size=32),  # more heads than lanes
    Shape(kv_heads=1, group=16, dim=96, block_size=128, window=200),
    Shape(kv_heads=1, group=2, dim=256),
    Shape(kv_heads=2, group=5, dim=64, block_size=8, window=130),
    Shape(kv_heads=1, group=4, dim=32, block_size=1),
]
BUSY = [Run(0, 0, 300), Run(1, 36, 1), Run(2, 5, 20), Run(3, 0, 1), Run(4, 131, 1), Run(5, 100, 77)]
LENGTHS = [300, 40, 30, 3, 150, 177]


def attend(paged: Paged, runs: list[Run], out: torch.Tensor | None = None) -> list[torch.Tensor]:
    """One step over `runs`: [length, KV heads, group, D] of each."""
    q = torch.cat([paged.q[run.sequence][run.start : run.start + run.length] for run in runs])
    # As a model has it: k and v of the row stand behind its queries.
    wide = torch.full((q.shape[0], q[0].numel() + 64), float("nan"), dtype=BF16)
    wide[:, : q[0].numel()] = q.view(q.shape[0], -1)
    laid, at = [], 0
    for run in runs:
        laid.append((at, run.start, run.length, paged.tables[run.sequence].tolist()))
        at += run.length
    shape = paged.shape
    tiles = lay_out(laid, block_size=shape.block_size, group=shape.group, window=shape.window)
    out = torch.full((at, q[0].numel()), float("nan"), dtype=BF16) if out is None else out
    view = wide[:, : q[0].numel()].view(q.shape)
    assert paged_attention(view, paged.cache, tiles, [], shape.scale, out) is out
    return list(out[:at].view(q.shape).split([run.length for run in runs]))


def name(shape: Shape) -> str:
    return f"{shape.kv_heads}x{shape.group}x{shape.dim} by {shape.block_size}, window {shape.window}"


@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_it_is_right(shape):
    """Within the rounding of weights and of the result to bf16, of weights that add up to 1."""
    paged = Paged(shape, LENGTHS)
    for run, rows in zip(BUSY, attend(paged, BUSY), strict=True):
        size = paged.v[run.sequence].abs().max().item()
        assert (rows.double() - paged.plain(run)).abs().max() <= size * 2**-7


def test_it_is_as_good_as_torchs():
    paged = Paged(SHAPES[0], [700])
    run = Run(0, 0, 700)
    want = paged.plain(run)
    ours, theirs = attend(paged, [run])[0], paged.attend([run])[0]
    ours, theirs = ((rows.double() - want).norm() for rows in (ours, theirs))
    assert ours <= 1.15 * theirs


@pytest.mark.parametrize("cancel", [0, 300])
@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_a_row_does_not_know_its_batch(shape, cancel):
    """Alone, among others, in any chunk, on any number of threads; even if all that is left is rounding."""
    paged = Paged(shape, LENGTHS, cancel=0 if shape.window else cancel)
    with torch_threads(1):
        whole = [attend(paged, [Run(i, 0, n)])[0] for i, n in enumerate(LENGTHS)]
    for threads in (1, 2, 5):
        with torch_threads(threads):
            for run, rows in zip(BUSY, attend(paged, BUSY), strict=True):
                assert same_bits(rows, whole[run.sequence][run.start : run.start + run.length]), run
    alone = [Run(0, at, 1) for at in (0, 1, 15, 16, 31, 127, 128, 129, 255, 299)]
    for run, rows in zip(alone, attend(paged, alone), strict=True):
        assert same_bits(rows, whole[0][run.start : run.start + 1]), run


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_cuts_of_any_texts(data):
    shape = replace(
        SHAPES[0],
        kv_heads=data.draw(st.integers(1, 2), "KV heads"),
        group=data.draw(st.integers(1, 17), "group"),
        dim=data.draw(st.sampled_from([32, 64]), "dim"),
        block_size=data.draw(st.sampled_from([4, 16, 64, 512]), "block size"),
        window=data.draw(st.none() | st.integers(1, 300), "window"),
    )
    lengths = data.draw(st.lists(st.integers(1, 280), min_size=1, max_size=4), "lengths")
    paged = Paged(shape, lengths)
    whole = [attend(paged, [Run(i, 0, n)])[0] for i, n in enumerate(lengths)]
    runs = []
    for sequence, length in enumerate(lengths):
        cuts = data.draw(st.lists(st.integers(0, length), max_size=4), "cuts")
        edges = sorted({0, length, *cuts})
        runs += [Run(sequence, a, b - a) for a, b in pairwise(edges)]
    runs = data.draw(st.permutations(runs), "order")
    for run, rows in zip(runs, attend(paged, list(runs)), strict=True):
        assert same_bits(rows, whole[run.sequence][run.start : run.start + run.length]), run


def test_the_block_size_does_not_matter():
    sizes = (1, 8, 16, 64, 512)
    found = [attend(Paged(replace(SHAPES[0], block_size=size), [300, 40]), BUSY[:2]) for size in sizes]
    for others in found[1:]:
        assert all(same_bits(a, b) for a, b in zip(others, found[0], strict=True))


@pytest.mark.parametrize("shape", [s for s in SHAPES if s.kv_heads > 1], ids=name)
def test_heads_do_not_know_each_other(shape):
    """A rank that holds some KV heads computes them to the same bits."""
    paged = Paged(shape, LENGTHS)
    whole = attend(paged, BUSY)
    for start in range(shape.kv_heads):
        for one, other in zip(whole, attend(paged.heads(start, start + 1), BUSY), strict=True):
            assert same_bits(one[:, start : start + 1], other)


@pytest.mark.parametrize("garbage", [1.0, -3e38])
def test_what_earlier_owners_left_is_not_seen(garbage):
    shape = SHAPES[0]
    clean, used = (Paged(shape, LENGTHS, garbage=value) for value in (0.0, garbage))
    assert all(same_bits(a, b) for a, b in zip(attend(clean, BUSY), attend(used, BUSY), strict=True))


@pytest.mark.parametrize("loud", [float("inf"), float("nan"), 1e30])
def test_a_loud_lane_is_not_heard(loud):
    paged = Paged(SHAPES[0], [40])
    quiet = attend(paged, [Run(0, 0, 40)])[0].clone()
    paged.q[0][::2] = loud
    assert same_bits(attend(paged, [Run(0, 0, 40)])[0][1::2], quiet[1::2])


def test_sharp_and_flat_rows():
    """Scores far apart leave the largest one's value alone; scores that are all zero, the mean."""
    paged = Paged(Shape(kv_heads=1, group=1, dim=32), [200])
    paged.q[0].zero_()
    flat = attend(paged, [Run(0, 199, 1)])[0].double()
    assert (flat.view(-1) - paged.v[0].double().mean(0).view(-1)).abs().max() <= 2**-8
    paged.q[0][199] = 1000 * paged.k[0][57].view(1, 1, 32)
    assert same_bits(attend(paged, [Run(0, 199, 1)])[0].view(-1), paged.v[0][57].view(-1))
    assert same_bits(attend(paged, [Run(0, 0, 1)])[0].view(-1), paged.v[0][0].view(-1))


def test_rows_that_no_run_names_stay():
    paged = Paged(SHAPES[0], LENGTHS)
    out = torch.full((24, 3 * 3 * 64), 9.0, dtype=BF16)
    attend(paged, [Run(2, 5, 20)], out)
    assert (out[20:] == 9).all() and not (out[:20] == 9).all(dim=1).any()


def test_what_is_served():
    assert native_takes(64, BF16) and native_takes(256, BF16)
    assert not native_takes(64, torch.float32) and not native_takes(48, BF16) and not native_takes(288, BF16)


def test_what_would_be_read_past_its_end_is_refused():
    with pytest.raises(ValueError, match="1 blocks of 16 do not hold 17 positions"):
        lay_out([(0, 15, 2, [1])], block_size=16, group=1, window=None)
    with pytest.raises(ValueError, match="blocks of 24 positions"):
        lay_out([(0, 0, 1, [1])], block_size=24, group=1, window=None)


def test_a_layout_is_small():
    """One entry a tile and a group of positions, whatever the layers and heads."""
    tiles = lay_out([(0, 1000, 1, list(range(16)))], block_size=64, group=3, window=None)
    assert isinstance(tiles, Tiles) and tiles.items.tolist() == [[0, 1, 0, 0, 1001]]
    assert tiles.tiles.tolist() == [[0, 3]] and len(tiles.rows) == 64
    windowed = lay_out([(7, 1000, 1, list(range(16)))], block_size=64, group=3, window=100)
    assert windowed.items.tolist() == [[0, 1, 0, 896, 1001]] and windowed.tiles.tolist() == [[7, 3]]
