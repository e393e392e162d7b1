"""Sampled frequencies follow the distribution that the parameters describe (chi-square, fixed seeds)."""

import math

import numpy as np
import pytest
import torch

from runtime.sampling.sampler import SamplerState, sample
from runtime.types import SamplingParams
from tests.sampling import reference

DRAWS = 12_000


def frequencies(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    state = SamplerState(params, (), (), (), len(logits))
    counts = np.zeros(len(logits))
    for start in range(0, DRAWS, 1000):
        rows = torch.tensor(logits).expand(1000, -1)
        for choice in sample(rows, [state] * 1000, range(start, start + 1000)):
            counts[choice.token] += 1
    return counts


def expected(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    p = np.zeros(len(logits))
    for token in reference.survivors(logits.tolist(), params):
        p[token] = math.exp((logits[token] - logits.max()) / params.temperature)
    return p / p.sum()


def fits(counts: np.ndarray, p: np.ndarray) -> bool:
    """Chi-square at about one in a million, the limit by Wilson and Hilferty's cube approximation. Tokens
    with fewer than 10 expected draws are pooled."""
    if counts[p == 0].any():
        return False
    rare = p * DRAWS < 10
    pooled_counts = np.append(counts[~rare], counts[rare].sum())
    pooled = np.append(p[~rare], p[rare].sum()) * DRAWS
    some = pooled > 0
    statistic = ((pooled_counts - pooled)[some] ** 2 / pooled[some]).sum()
    freedom = some.sum() - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 4.75 * math.sqrt(2 / (9 * freedom))) ** 3
    return bool(statistic < limit)


def logits_over(vocab: int, likely: int) -> np.ndarray:
    """A few likely tokens, some in one block and some in others, over a bulk that matters only together."""
    rng = np.random.default_rng(vocab)
    logits = rng.standard_normal(vocab).astype(np.float32)
    ids = np.concatenate([np.arange(likely // 2), rng.choice(vocab, likely // 2, replace=False)])
    logits[ids] = np.linspace(3.0, 6.0, len(ids))
    return logits


CASES = [
    (8, SamplingParams(seed=1)),
    (700, SamplingParams(seed=2)),
    (700, SamplingParams(seed=3, temperature=0.6)),
    (700, SamplingParams(seed=4, temperature=1.7, top_k=50)),
    (700, SamplingParams(seed=5, top_p=0.8)),
    (700, SamplingParams(seed=6, min_p=0.1)),
    (700, SamplingParams(seed=7, top_k=60, top_p=0.9, min_p=0.06, temperature=1.2)),
]


@pytest.mark.parametrize(("vocab", "params"), CASES, ids=[str(i) for i in range(len(CASES))])
def test_frequencies_follow_the_probabilities(vocab, params):
    logits = logits_over(vocab, 8 if vocab == 8 else 24)
    counts = frequencies(logits, params)
    p = expected(logits, params)
    assert fits(counts, p)
    # The test can fail: a temperature 15% off, or a token one filter step away, would show.
    hotter = np.where(p > 0, p ** (1 / 1.15), 0)
    assert not fits(counts, hotter / hotter.sum())
    without = np.where(p == p.max(), 0, p)
    assert not fits(counts, without / without.sum())


def test_uniform_logits_are_sampled_uniformly():
    counts = frequencies(np.zeros(300, np.float32), SamplingParams(seed=8))
    assert fits(counts, np.full(300, 1 / 300))
    tilted = np.linspace(0.7, 1.3, 300)
    assert not fits(counts, tilted / tilted.sum())


def test_one_position_under_many_seeds_is_the_same_distribution():
    """Seeds of users are small numbers in a row; they must be as good as positions in a row."""
    logits = logits_over(300, 12)
    counts = np.zeros(300)
    for start in range(0, DRAWS, 1000):
        states = [
            SamplerState(SamplingParams(seed=seed), (), (), (), 300) for seed in range(start, start + 1000)
        ]
        for choice in sample(torch.tensor(logits).expand(1000, -1), states, [17] * 1000):
            counts[choice.token] += 1
    assert fits(counts, expected(logits, SamplingParams()))
