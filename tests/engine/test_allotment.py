"""Who guesses in a step: what brings the most tokens for its cost, against trying everything there is."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.config import EngineConfig
from runtime.engine.allotment import LEAST_GAIN, WAIT_COST, allot, step_cost
from runtime.types import Chunk
from tests.engine.harness import Harness, request

chances = st.floats(0.0, 1.0) | st.floats(0.8, 1.0)
candidates = st.lists(st.tuples(chances, st.integers(0, 6)), min_size=1, max_size=3)


def rate(counts, chances, rows: int) -> float:
    """Tokens for the cost that these guesses bring."""
    tokens = rows + sum(a**j for count, a in zip(counts, chances, strict=True) for j in range(1, count + 1))
    return tokens / (WAIT_COST + step_cost(rows, sum(counts)))


@settings(max_examples=300, deadline=None)
@given(candidates, st.integers(0, 40), st.integers(1, 24))
def test_nothing_is_better(candidates, others, spare):
    chances, most = zip(*candidates, strict=True)
    rows = others + len(candidates)
    found = allot(chances, most, rows, spare)
    assert sum(found) <= spare
    assert all(0 <= count <= limit for count, limit in zip(found, most, strict=True))
    plain = LEAST_GAIN * rows / step_cost(rows)
    if any(found):
        assert rate(found, chances, rows) > plain * (1 - 1e-9)
    tries = product(*(range(limit + 1) for limit in most))
    best = max((rate(c, chances, rows) for c in tries if 0 < sum(c) <= spare), default=0.0)
    assert best <= plain * (1 + 1e-9) or rate(found, chances, rows) == pytest.approx(best)


@pytest.mark.parametrize(
    ("candidates", "rows", "guesses"),
    [
        ((0.95,), 1, [8]),
        ((0.5,), 1, [4]),
        ((0.1,), 1, [0]),
        ((0.8,), 6, [7]),
        ((0.8,), 16, [0]),  # it would not pay for the tile it begins
        ((0.95,) * 4, 16, [8] * 4),
        ((0.5,) * 16, 16, [0] * 16),
        ((0.95, 0.2), 4, [8, 0]),
    ],
)
def test_the_more_rows_there_are_the_likelier_a_guess_must_be(candidates, rows, guesses):
    assert allot(candidates, [8] * len(candidates), rows, 64 - rows) == guesses


def drive(harness: Harness, steps: int) -> list[tuple[int, tuple[Chunk, ...]]]:
    """Plans in flight, when the next was made, and its chunks."""
    engine, executor, seen = harness.engine, harness.executor, []
    for _ in range(steps):
        while (plan := engine.plan(0.0)) is not None:
            seen.append((len(executor.results), plan.chunks))
            executor.run(plan)
        if not harness.deliver():
            break
    return seen


def test_all_go_on_together_where_guesses_pay():
    """Seed 1 repeats what stood four tokens before, but for an eighth of the tokens."""
    harness = Harness(EngineConfig(block_size=4, total_blocks=2000, max_model_len=400))
    for n in range(4):
        harness.add(request(f"r{n}", (n, *range(4)), max_tokens=300, seed=1))
    plans = drive(harness, 50)
    guessing = [(ahead, chunks) for ahead, chunks in plans if any(chunk.drafts for chunk in chunks)]
    assert len(guessing) > 10
    assert all(ahead == 0 and len(chunks) == 4 for ahead, chunks in guessing)
    harness.finish()


def test_nobody_waits_for_a_lone_guess_beside_many():
    harness = Harness(EngineConfig(block_size=4, total_blocks=2000, max_model_len=400))
    for n in range(16):
        harness.add(request(f"r{n}", (n, *range(4)), max_tokens=100, seed=0 if n else 1))
    plans = drive(harness, 60)
    assert not any(chunk.drafts for _, chunks in plans for chunk in chunks)
    assert all(ahead == 1 and len(chunks) == 16 for ahead, chunks in plans[1:])
    harness.finish()
