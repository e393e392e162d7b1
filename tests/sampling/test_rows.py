"""A row's choice, logprobs included, is the same bits whatever runs beside it."""

import os

import numpy as np
import pytest
import torch

from runtime.sampling.sampler import SamplerState, sample
from runtime.types import SamplingParams

MIX = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.0, logprobs=5, repetition_penalty=1.3),
    SamplingParams(seed=1, logprobs=0),
    SamplingParams(seed=2, temperature=0.7, top_p=0.9),
    SamplingParams(seed=3, temperature=1.5, top_k=40, logprobs=20),
    SamplingParams(seed=4, min_p=0.02, presence_penalty=1.0, logprobs=3),
    SamplingParams(seed=5, top_p=0.999, temperature=2.0, frequency_penalty=0.7),
    SamplingParams(seed=6, min_tokens=50, logit_bias=((9, 4.0), (11, -4.0)), top_p=0.5, logprobs=1),
    SamplingParams(seed=7, top_k=300, top_p=0.7, min_p=0.001, temperature=0.9),
]


def batch(rows: int, vocab: int):
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(rows, vocab, generator=generator) * 3
    texts = torch.randint(vocab, (rows, 60), generator=generator).tolist()
    states = [
        SamplerState(MIX[i % len(MIX)], texts[i][:40], texts[i][40:], (2, 5), vocab) for i in range(rows)
    ]
    return logits, states, [100 + 7 * i for i in range(rows)]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("vocab", [32000, 32003, 49152])
def test_alone_in_a_batch_permuted_and_threaded(vocab, threads):
    rows = 18
    logits, states, positions = batch(rows, vocab)
    together = sample(logits, states, positions)
    assert len({choice.token for choice in together}) > rows // 2
    for i in range(rows):
        assert sample(logits[i : i + 1], [states[i]], [positions[i]]) == [together[i]]
        # the same numbers at another address
        shifted = torch.empty(vocab + 3)[3:].copy_(logits[i])[None]
        assert sample(shifted, [states[i]], [positions[i]]) == [together[i]]
    for size in (2, 5, 16):
        parts = [slice(start, start + size) for start in range(0, rows, size)]
        assert [c for p in parts for c in sample(logits[p], states[p], positions[p])] == together
    order = np.random.default_rng(1).permutation(rows).tolist()
    permuted = sample(logits[order], [states[i] for i in order], [positions[i] for i in order])
    assert permuted == [together[i] for i in order]
    for count in (1, 2):
        threads(min(count, os.cpu_count() or 1))
        assert sample(logits, states, positions) == together


def test_layout_does_not_matter():
    logits, states, positions = batch(9, 4096)
    together = sample(logits, states, positions)
    assert sample(logits.t().contiguous().t(), states, positions) == together
    assert sample(logits.clone().requires_grad_(), states, positions) == together


def test_the_same_state_may_serve_several_rows():
    """Speculation checks several positions of one sequence at once."""
    logits, states, _ = batch(9, 4096)
    state = states[3]
    together = sample(logits, [state] * 9, range(9))
    assert together == [sample(logits[i : i + 1], [state], [i])[0] for i in range(9)]
