"""Logprobs are the model's own: untouched by what steers the sampling."""

import dataclasses
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime.sampling.sampler import SamplerState, sample
from runtime.types import SamplingParams
from tests.sampling import reference


def choose(logits, params, prompt=(), reply=()):
    state = SamplerState(params, prompt, reply, (), len(logits))
    return sample(torch.tensor(logits, dtype=torch.float32)[None], [state], [3])[0]


@given(
    st.lists(st.floats(-80, 80, width=32), min_size=1, max_size=60),
    st.integers(0, 100),
    st.floats(0.0, 3.0),
)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_values_and_order(logits, n, temperature):
    choice = choose(logits, SamplingParams(temperature=temperature, seed=1, logprobs=n))
    expected = reference.logprobs(logits)
    assert choice.logprob == pytest.approx(expected[choice.token], rel=1e-12, abs=1e-12)
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))[:n]
    assert [entry.token for entry in choice.top] == order
    for entry in choice.top:
        assert entry.logprob == pytest.approx(expected[entry.token], rel=1e-12, abs=1e-12)


def test_none_unless_asked_and_none_beside_it_for_zero():
    assert (choose([1.0, 2.0], SamplingParams(seed=1)).logprob) is None
    choice = choose([1.0, 2.0], SamplingParams(seed=1, logprobs=0))
    assert choice.logprob is not None and choice.top == ()


def test_steering_changes_no_logprob():
    torch.manual_seed(2)
    logits = torch.randn(5000).tolist()
    plain = SamplingParams(temperature=0.0, logprobs=7)
    steered = dataclasses.replace(
        plain,
        temperature=0.3,
        seed=1,
        top_k=5,
        top_p=0.5,
        repetition_penalty=1.9,
        presence_penalty=2.0,
        frequency_penalty=1.0,
        logit_bias=((17, 100.0),),
        min_tokens=9,
    )
    first = choose(logits, plain)
    second = choose(logits, steered, prompt=range(100), reply=range(50, 300))
    assert second.token == 17
    assert second.top == first.top
    assert second.logprob == pytest.approx(reference.logprobs(logits)[17], rel=1e-12)
    chosen = dataclasses.replace(plain, logit_bias=((first.top[3].token, 100.0),))
    assert choose(logits, chosen).logprob == first.top[3].logprob  # the same bits either way


def test_a_whole_vocabulary_sums_to_one():
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(49152, generator=generator) * 3).tolist()
    exact = reference.logprobs(logits)
    choice = choose(logits, SamplingParams(temperature=0.0, logprobs=100))
    assert math.fsum(math.exp(value) for value in exact) == pytest.approx(1.0, abs=1e-9)
    for entry in choice.top:
        assert entry.logprob == pytest.approx(exact[entry.token], rel=1e-12)


def test_excluded_tokens_have_no_probability():
    choice = choose([0.0, -math.inf, 0.0], SamplingParams(temperature=0.0, logprobs=3))
    assert [(e.token, e.logprob) for e in choice.top] == [
        (0, -math.log(2)),
        (2, -math.log(2)),
        (1, -math.inf),
    ]
