"""Stages cover the layers in order, and no other cut has a smaller largest stage."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import InvalidArgument
from runtime.model.stages import cut_layers, model_bytes, stage_layers
from tests.model.driver import opened

sizes = st.lists(st.integers(0, 50), min_size=1, max_size=9)


def weights(cut, layers, before, after):
    own = [sum(layers[start:stop]) for start, stop in cut]
    own[0] += before
    own[-1] += after
    return own


@given(sizes, st.integers(0, 120), st.integers(0, 120), st.data())
def test_no_cut_has_a_smaller_largest_run(layers, before, after, data):
    count = data.draw(st.integers(1, len(layers)))
    cut = cut_layers(layers, before, after, count)
    assert len(cut) == count and all(start < stop for start, stop in cut)
    assert cut[0][0] == 0 and cut[-1][1] == len(layers)
    assert all(a[1] == b[0] for a, b in pairwise(cut))
    found = []
    for inner in combinations(range(1, len(layers)), count - 1):
        edges = (0, *inner, len(layers))
        other = weights(list(pairwise(edges)), layers, before, after)
        found.append((max(other), sum(n * n for n in other), edges))
    mine = weights(cut, layers, before, after)
    assert (max(mine), sum(n * n for n in mine), (0, *(stop for _, stop in cut))) == min(found)


def test_the_embedding_and_the_head_take_layers_off_their_stages():
    assert cut_layers([10] * 8, 0, 0, 3) == ((0, 2), (2, 5), (5, 8))
    assert cut_layers([10] * 8, 20, 30, 3) == ((0, 2), (2, 6), (6, 8))
    assert cut_layers([10] * 80, 30, 30, 4) == ((0, 18), (18, 39), (39, 61), (61, 80))


def test_fewer_layers_than_runs_are_refused():
    with pytest.raises(ValueError, match="3 layers do not make 4 runs"):
        cut_layers([1, 1, 1], 0, 0, 4)


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_table_weighs_on_both_ends(tiny, tied):
    model = opened(tiny(types="Q8_0", layers=4, tied=tied, vocab=2048))
    each, before, after = model_bytes(model)
    tensors = model.checkpoint.tensors
    assert len(each) == 4 and before == after == tensors["token_embd.weight"].nbytes
    assert sum(each) == sum(info.nbytes for name, info in tensors.items() if name.startswith("blk."))


def test_a_cut_does_not_depend_on_the_device(tiny):
    model = opened(tiny(layers=5, vocab=2048))
    for pp in range(1, 6):
        assert stage_layers(model, pp) == stage_layers(replace(model, device="cuda"), pp)


@pytest.mark.parametrize("pp", [0, 3, -1])
def test_more_stages_than_layers_are_refused(tiny, pp):
    with pytest.raises(
        InvalidArgument, match=f"^pp: {pp} is not possible: this model has 2 layers, so 1 to 2$"
    ):
        stage_layers(opened(tiny(layers=2)), pp)
