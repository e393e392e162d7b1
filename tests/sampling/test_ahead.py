"""Sampling after guesses: what would be sampled one token after the other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.sampling.sampler import SamplerState, sample, sample_ahead
from runtime.types import SamplingParams

VOCAB = 23
PARAMS = (
    SamplingParams(temperature=0.0, logprobs=2),
    SamplingParams(temperature=0.9, seed=5),
    SamplingParams(temperature=1.2, seed=6, top_k=5, repetition_penalty=1.4, frequency_penalty=0.7),
    SamplingParams(temperature=0.0, presence_penalty=1.5, min_tokens=3),
)


def state(params: SamplingParams, choice: int) -> SamplerState:
    return SamplerState(params, (1, 2, 3), (4,), (7, 8), VOCAB, choice)


@given(st.data(), st.lists(st.tuples(st.sampled_from(PARAMS), st.integers(0, 4)), min_size=1, max_size=4))
def test_as_one_after_the_other(data, sequences):
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    rows = [
        torch.from_numpy(rng.normal(size=(1 + count, VOCAB)).astype(np.float32)) * 3 for _, count in sequences
    ]
    positions = [4 + 10 * i for i in range(len(sequences))]
    wants, drafts, ends = [], [], []
    for i, (params, count) in enumerate(sequences):
        alone, want = state(params, i), []
        wrong = data.draw(st.integers(0, count))  # which guess is, `count` if none
        for ahead in range(1 + wrong):
            (choice,) = sample(rows[i][ahead : ahead + 1], [alone], [positions[i] + ahead])
            alone.append(choice.token)
            want.append(choice)
        guesses = [choice.token for choice in want[:count]] + [0] * max(0, count - len(want))
        if wrong < count:
            guesses[wrong] = (want[wrong].token + 1) % VOCAB
        wants.append(want)
        drafts.append(tuple(guesses))
        ends.append(alone)
    states = [state(params, i) for i, (params, _) in enumerate(sequences)]
    assert sample_ahead(torch.cat(rows), states, positions, drafts) == wants
    # What comes next shows that the states took the same tokens.
    after = torch.from_numpy(rng.normal(size=(len(sequences), VOCAB)).astype(np.float32))
    at = [position + 9 for position in positions]
    assert sample(after, states, at) == sample(after, ends, at)


def test_rows_must_fit():
    with pytest.raises(ValueError, match="3 rows for 1 sequences that need 2"):
        sample_ahead(torch.zeros(3, VOCAB), [state(PARAMS[0], 0)], [4], [(1,)])


def test_a_copy_goes_on_by_itself():
    one = state(PARAMS[2], 0)
    other = one.copy()
    other.append(5)
    row = np.zeros(VOCAB, np.float32)
    assert one.adjusted(row)[5] == 0 and other.adjusted(row)[5] < 0
    one.append(5)
    assert (one.adjusted(row) == other.adjusted(row)).all()
