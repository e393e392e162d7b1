"""Which token is sampled: against the plain reference, and as laws that need no reference."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from runtime.sampling.sampler import NO_TOKEN, Choice, SamplerState, sample, sample_ahead
from runtime.sampling.score import score
from runtime.types import SamplingParams
from tests.sampling import reference

VOCABS = (1, 2, 7, 255, 256, 257, 600)


@st.composite
def params_for(draw: st.DrawFn, vocab: int) -> SamplingParams:
    off = st.just
    number = st.floats
    bias = st.dictionaries(st.integers(0, vocab - 1), number(-20, 20), max_size=4)
    return SamplingParams(
        min_tokens=draw(st.integers(0, 4)),
        temperature=draw(st.one_of(off(0.0), off(1.0), number(0.05, 3.0))),
        top_k=draw(st.one_of(off(0), st.integers(1, 8), st.integers(1, 700))),
        top_p=draw(st.one_of(off(1.0), number(0.01, 1.0))),
        min_p=draw(st.one_of(off(0.0), number(1e-6, 1.0))),
        repetition_penalty=draw(st.one_of(off(1.0), number(0.5, 2.0))),
        presence_penalty=draw(st.one_of(off(0.0), number(-2.0, 2.0))),
        frequency_penalty=draw(st.one_of(off(0.0), number(-2.0, 2.0))),
        logit_bias=tuple(draw(bias).items()),
        seed=draw(st.integers(0, 2**64 - 1)),
    )


def logits_of(kind: str, vocab: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if kind == "normal":
        row = rng.standard_normal(vocab) * 3
    elif kind == "equal":
        row = np.full(vocab, rng.integers(-3, 4))
    elif kind == "few values":  # ties everywhere
        row = rng.integers(-2, 3, vocab)
    elif kind == "signed zeros":
        row = np.where(rng.random(vocab) < 0.5, -0.0, 0.0)
    elif kind == "excluded":  # a model may exclude tokens
        row = np.where(rng.random(vocab) < 0.5, -np.inf, rng.standard_normal(vocab) * 3)
        row[rng.integers(vocab)] = 1.0
    else:  # peaked
        row = rng.standard_normal(vocab) * 2
        row[rng.integers(vocab, size=3)] += 12
    return row.astype(np.float32)


KINDS = ("normal", "equal", "few values", "signed zeros", "excluded", "peaked")


@st.composite
def case(draw: st.DrawFn):
    vocab = draw(st.sampled_from(VOCABS))
    token = st.integers(0, vocab - 1)
    params = draw(params_for(vocab))
    prompt, reply = draw(st.lists(token, max_size=30)), draw(st.lists(token, max_size=6))
    stops = draw(st.lists(token, max_size=2)) if vocab > 2 else []
    logits = logits_of(draw(st.sampled_from(KINDS)), vocab, draw(st.integers(0, 2**32 - 1)))
    return logits, params, prompt, reply, stops, draw(st.integers(0, 2**32 - 1))


@given(case(), st.sampled_from([0, 0, 1, 2**32 - 1]))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_token_is_the_reference_s(example, choice):
    logits, params, prompt, reply, stops, position = example
    allowed = reference.adjusted(logits.tolist(), params, prompt, reply, stops)
    assume(max(allowed) > -math.inf)
    try:
        expected = reference.token(logits.tolist(), params, prompt, reply, stops, position, choice)
    except reference.NearTie:
        assume(False)
    state = SamplerState(params, prompt, reply, stops, len(logits), choice)
    assert sample(torch.tensor(logits)[None], [state], [position]) == [Choice(expected)]


@given(case())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_state_grown_by_append_is_the_state_built_whole(example):
    logits, params, prompt, reply, stops, _ = example
    whole = SamplerState(params, prompt, reply, stops, len(logits))
    for start in (0, len(reply) // 2):
        grown = SamplerState(params, prompt, reply[:start], stops, len(logits))
        for token in reply[start:]:
            grown.append(token)
        np.testing.assert_array_equal(grown.adjusted(logits), whole.adjusted(logits))
        expected = reference.adjusted(logits.tolist(), params, prompt, reply, stops)
        np.testing.assert_array_equal(grown.adjusted(logits), np.array(expected, np.float32))


def choose(logits, position=0, prompt=(), reply=(), stops=(), **params) -> Choice:
    state = SamplerState(SamplingParams(**params), prompt, reply, stops, len(logits))
    return sample(torch.tensor(np.array([logits], np.float32)), [state], [position])[0]


def reachable(logits, **params) -> set[int]:
    """Tokens sampled over many positions: with a few likely survivors, all of them show."""
    state = SamplerState(SamplingParams(seed=5, **params), (), (), (), len(logits))
    rows = torch.tensor([logits], dtype=torch.float32).expand(400, -1)
    return {choice.token for choice in sample(rows, [state] * 400, range(400))}


def test_greedy_takes_the_lowest_id_among_equals():
    assert choose([0.0, 3.0, 1.0, 3.0], temperature=0.0).token == 1
    assert choose([-0.0, 0.0], temperature=0.0).token == 0


def test_filters_keep_the_lower_ids_among_equals_at_the_boundary():
    assert reachable([0.0, 1.0, 1.0, 1.0], top_k=2) == {1, 2}
    assert reachable([0.0, 0.0, 0.0, 0.0], top_p=0.5) == {0, 1}
    assert reachable([0.0] * 10, top_p=0.51) == {0, 1, 2, 3, 4, 5}
    assert reachable([0.0, 1.0, 1.0], min_p=1.0) == {1, 2}


def test_filters_apply_in_order_top_k_then_top_p_of_the_rest_then_min_p():
    p = [math.log(x) for x in (0.4, 0.3, 0.2, 0.1)]
    assert reachable(p, top_p=0.65) == {0, 1}
    assert reachable(p, top_k=2, top_p=0.65) == {0, 1}
    assert reachable(p, top_k=3, top_p=0.75) == {0, 1}  # .4 + .3 is .778 of .9
    assert reachable(p, top_p=0.75) == {0, 1, 2}
    assert reachable(p, min_p=0.45) == {0, 1, 2}
    assert reachable(p, top_k=3, min_p=0.7) == {0, 1}
    assert reachable(p, top_p=1e-9) == {0}


def test_filters_see_the_tempered_distribution():
    p = [math.log(x) for x in (0.5, 0.3, 0.2)]
    assert reachable(p, top_p=0.6, temperature=1.0) == {0, 1}
    assert reachable(p, top_p=0.6, temperature=0.5) == {0}  # .25 of .38
    assert reachable(p, min_p=0.5, temperature=1.0) == {0, 1}
    assert reachable(p, min_p=0.5, temperature=0.5) == {0}


def test_a_survivor_keeps_its_noise_whatever_the_filters_dropped():
    """Dropping tokens that did not win must not change who wins."""
    logits = logits_of("normal", 600, 3).tolist()
    for position in range(40):
        winner = choose(logits, position, seed=9).token
        rank = sorted(range(600), key=lambda t: (-logits[t], t)).index(winner)
        assert choose(logits, position, seed=9, top_k=rank + 1).token == winner
        assert choose(logits, position, seed=9, top_k=max(rank, 1)).token != winner or rank == 0


def test_seed_and_position_decide():
    logits = [0.0] * 300
    tokens = [choose(logits, position, seed=1).token for position in range(50)]
    assert tokens == [choose(logits, position, seed=1).token for position in range(50)]
    assert len(set(tokens)) > 30
    for other in (2, 1 + 2**32, 1 + 2**63):  # both halves of the seed count
        assert tokens != [choose(logits, position, seed=other).token for position in range(50)]


def test_penalties_by_hand():
    state = SamplerState(
        SamplingParams(
            temperature=0.0,
            repetition_penalty=2.0,
            presence_penalty=0.5,
            frequency_penalty=0.25,
            logit_bias=((4, 1.5), (0, -3.0)),
        ),
        prompt=[0, 1, 1],
        reply=[2, 2],
        stop_ids=[],
        vocab_size=6,
    )
    state.append(3)
    row = np.array([1.0, 4.0, 4.0, -4.0, 1.0, 7.0], np.float32)
    expected = [(1 - 3) * 2, 4 / 2, 4 / 2 - 0.5 - 2 * 0.25, -4 * 2 - 0.5 - 0.25, 2.5, 7.0]
    np.testing.assert_array_equal(state.adjusted(row), np.array(expected, np.float32))
    np.testing.assert_array_equal(row, np.array([1.0, 4.0, 4.0, -4.0, 1.0, 7.0], np.float32))


def test_bias_lifts_a_token_from_the_bottom_and_keeps_it_from_the_top():
    logits = logits_of("peaked", 600, 1)
    low, high = int(logits.argmin()), int(logits.argmax())
    for sampled in ({"temperature": 0.0}, {"seed": 1, "top_k": 1}, {"seed": 1, "top_p": 0.1}, {"seed": 1}):
        assert choose(logits, logit_bias=((low, 1000.0),), **sampled).token == low
        assert choose(logits, logit_bias=((high, -1000.0),), **sampled).token != high


def test_min_tokens_bans_stop_ids_until_the_reply_is_long_enough():
    logits = [5.0, 1.0, 9.0]
    for params in ({"temperature": 0.0}, {"temperature": 0.01, "seed": 3}):
        state = SamplerState(SamplingParams(min_tokens=2, **params), [1], [], [2, 0], 3)
        row = torch.tensor([logits])
        chosen = []
        for position in range(1, 5):
            chosen.append(sample(row, [state], [position])[0].token)
            state.append(chosen[-1])
        assert chosen == [1, 1, 2, 2]


def test_min_tokens_outweighs_bias():
    assert choose([0.0, 1.0], stops=[0], min_tokens=1, logit_bias=((0, 1000.0),), temperature=0.0).token == 1


def test_a_tiny_temperature_is_greedy_but_for_exact_ties():
    logits = [1.0, 2.0, 2.0, 1.9999999]
    for temperature in (5e-324, 1e-300, 1e-30, 1e-9):
        assert reachable(logits, temperature=temperature) == {1, 2}
        assert reachable(logits, temperature=temperature, top_p=0.9, min_p=0.5) == {1, 2}


@pytest.mark.filterwarnings("error")
def test_extreme_logits_make_no_noise():
    big = 3.4e38
    for params in (
        {"seed": 1},
        {"seed": 1, "temperature": 5e-324, "top_p": 0.9},
        {"seed": 1, "temperature": 100.0, "top_p": 0.9},
        {"temperature": 0.0, "logprobs": 2},
        {"seed": 1, "min_p": 0.1, "frequency_penalty": 2.0, "repetition_penalty": 0.01},
    ):
        assert choose([-big, big, -math.inf], reply=[1], **params).token == 1
    assert choose([-big, -big, -math.inf], reply=[0, 1], repetition_penalty=100.0, temperature=0.0).token == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 5, 300, 599])
@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"seed": 3, "top_p": 0.5, "logprobs": 1}])
def test_bad_logits_give_no_token_and_leave_the_others(bad, at, params):
    logits = torch.randn(3, 600, generator=torch.Generator().manual_seed(at))
    state = SamplerState(SamplingParams(**params), (), (), (), 600)
    first, _, last = sample(logits, [state] * 3, [7, 8, 9])
    logits[1, at] = bad
    assert sample(logits, [state] * 3, [7, 8, 9]) == [first, Choice(NO_TOKEN), last]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_nan_beside_infinity_and_rows_of_nothing_give_no_token(temperature):
    params = SamplingParams(temperature=temperature, seed=1)
    state = SamplerState(params, (), (), (), 3)
    for row in ([math.inf, math.nan, 0], [math.nan, math.inf, 0], [-math.inf] * 3):
        assert sample(torch.tensor([row]), [state], [0]) == [Choice(NO_TOKEN)]
    banned = SamplerState(dataclasses.replace(params, min_tokens=1, logprobs=1), (), (), (0, 1, 2), 3)
    rows = torch.tensor([[0.0, 0, 0], [1, 2, 3], [3, 2, 1]])
    alone = sample(rows[1:], [state] * 2, [4, 5])
    assert sample(rows, [banned, state, state], [3, 4, 5]) == [Choice(NO_TOKEN), *alone]


def test_a_sequence_of_guesses_ends_at_no_token():
    state = SamplerState(SamplingParams(temperature=0.0, presence_penalty=0.1), (), (), (), 3)
    logits = torch.tensor([[0, 9, 0], [math.nan, 0, 0], [0, 0, 9.0]])
    assert sample_ahead(logits, [state], [4], [[1, 2]]) == [[Choice(1), Choice(NO_TOKEN)]]


def test_scores_of_bad_rows_are_nan():
    found = score(torch.tensor([[0.0, 1], [math.nan, 0], [1, math.inf], [-math.inf, -math.inf]]), [0] * 4, 1)
    assert math.isfinite(found[0].logprob) and len(found[0].top) == 1
    assert all(math.isnan(entry.logprob) and entry.top == () for entry in found[1:])


def test_misuse_is_refused():
    params = SamplingParams(seed=1)
    state = SamplerState(params, (), (), (), 4)
    with pytest.raises(ValueError, match="fp32"):
        sample(torch.zeros(1, 4, dtype=torch.bfloat16), [state], [0])
    with pytest.raises(ValueError, match="fp32"):
        sample(torch.zeros(4), [state], [0])
    with pytest.raises(ValueError, match="1 rows, 2 states and 1 positions"):
        sample(torch.zeros(1, 4), [state, state], [0])
    with pytest.raises(ValueError, match="a state for 4 tokens, logits for 5"):
        sample(torch.zeros(1, 5), [state], [0])
    for position in (-1, 2**32):
        with pytest.raises(ValueError, match="position"):
            sample(torch.zeros(1, 4), [state], [position])
    with pytest.raises(ValueError, match="seed"):
        SamplerState(dataclasses.replace(params, seed=None), (), (), (), 4)
    for field, text in (("prompt", ([4], [], [])), ("reply", ([], [-1], [])), ("stop_ids", ([], [], [9]))):
        with pytest.raises(ValueError, match=field):
            SamplerState(params, *text, 4)
    assert sample(torch.zeros(0, 4), [], []) == []


def test_logits_are_left_alone():
    logits = torch.randn(2, 600)
    before = logits.clone()
    params = SamplingParams(
        seed=1, top_p=0.5, min_tokens=3, repetition_penalty=1.5, logit_bias=((3, 9.0),), logprobs=3
    )
    state = SamplerState(params, [1, 2], [3], [4], 600)
    sample(logits, [state] * 2, [0, 1])
    assert torch.equal(logits, before)
