"""The suite is worth what it catches: planted faults show as bits that differ."""

from __future__ import annotations

import pytest
import torch

from kernels.linear import pack_fp32
from tests.bits import random, same_bits
from tests.conformance.compare import Tally
from tests.conformance.faults import FAULTS, plant_seed_by_step, split_by_rows
from tests.conformance.models import CONTEXT, TINY, Model
from tests.conformance.search import search
from tests.conformance.ways import run_way, ways

NAMED = (
    *("in batches of 8", "2 ranks", "2 stages", "chunks of 16", "prefix cache, cold and warm"),
    "2 ranks, guesses that are doubtful",
)


@pytest.fixture
def fresh(tiny) -> Model:
    """Read anew: what it remembers of plain replies was not made under another fault."""
    torch.set_num_threads(1)
    return Model(tiny(context=CONTEXT, **TINY["fp32-u5"]))


def named_ways(model: Model) -> Tally:
    tally = Tally()
    for way in ways(model):
        if way.name in NAMED:
            tally.take(run_way(model, way, 1))
    assert tally.seen["ways"] == len(NAMED)
    return tally


def test_without_a_fault_nothing_differs(fresh):
    assert named_ways(fresh).bits == 0
    assert search(fresh, 10, 1).bits == 0


def test_the_planted_matmul_depends_on_the_batch():
    """Else it would be no fault: close to the right product, and its first row not the same alone."""
    weight, x = pack_fp32(random(1, 40, 160)), random(2, 9, 160)
    whole = split_by_rows(x, weight)
    torch.testing.assert_close(whole, x @ random(1, 40, 160).t(), rtol=1e-4, atol=1e-4)
    assert not same_bits(split_by_rows(x[:1], weight), whole[:1])


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_shows(fresh, monkeypatch, fault):
    """Both to the named ways and to random scenarios."""
    FAULTS[fault](monkeypatch)
    tally = named_ways(fresh)
    assert tally.bits and tally.differences, tally.line()
    # It ends with the first that differs, on average the twenty-second where guesses are believed. Which one
    # that is does not follow from the seed alone: hypothesis also draws constants of the modules it finds.
    scenarios = search(fresh, 500, 1, shrink=False)
    assert scenarios.bits and scenarios.differences, scenarios.line()


def test_what_is_found_is_shrunk(fresh, monkeypatch):
    """A seed keyed by the step needs a request that starts or goes on at another step than it would alone.
    Hypothesis gets that far from three of four beginnings (see above for why a seed does not fix which), so
    there are several; each that counts was larger before."""
    plant_seed_by_step(monkeypatch)
    sizes = []
    for seed in range(1, 13):
        first = search(fresh, 60, seed, shrink=False).differences[0]
        if first.count("Arrival(") <= 2:
            continue
        shown = search(fresh, 60, seed).differences[0]
        plans = sum(line.startswith("plan ") for line in shown.splitlines())
        sizes.append((first.count("Arrival("), shown.count("Arrival("), plans))
        if 1 <= sizes[-1][1] <= 2 and plans <= 40:
            return
    pytest.fail(f"arrivals before and after, and plans: {sizes}")
