"""The noise itself: Philox's published answers, the two-level draw, and that pruning never shows."""

import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime.sampling.filters import scaled
from runtime.sampling.noise import contenders, draw_blocks, winners
from runtime.sampling.philox import philox4x32
from tests.sampling import reference

# Counter, key, answer: Random123's kat_vectors, philox4x32 with 10 rounds.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def _hex(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def test_philox_gives_the_published_answers():
    counters = np.array([_hex(c) for c, _, _ in KNOWN_ANSWERS], np.uint64).T
    keys = np.array([_hex(k) for _, k, _ in KNOWN_ANSWERS], np.uint64).T
    answers = np.array([_hex(a) for _, _, a in KNOWN_ANSWERS], np.uint64).T
    np.testing.assert_array_equal(philox4x32(counters, keys), answers)
    for counter, key, answer in KNOWN_ANSWERS:  # the reference stands on the same vectors
        assert reference.philox(_hex(counter), _hex(key)) == _hex(answer)


def every_noise(seed: int, position: int, vocab: int, choice: int = 0) -> np.ndarray:
    """Gumbel noise of the whole vocabulary, from the first level's draws and a fresh one for each token."""
    first = draw_blocks([seed], [position], [0], vocab, [choice])
    tokens = np.arange(vocab)
    counter = np.zeros((4, vocab), np.uint64)
    counter[0], counter[1], counter[2] = tokens, position, choice
    words = philox4x32(counter, np.array([[seed & 0xFFFFFFFF], [seed >> 32]], np.uint64))
    fresh = -np.log((((words[0] << 20) | (words[1] >> 12)) + 0.5) / 2**52)
    block = tokens // 256
    return -np.log(first.least[0][block] + np.where(first.holder[0][block] == tokens, 0.0, fresh))


@pytest.mark.parametrize(("seed", "position"), [(0, 0), (1, 7), (2**64 - 1, 2**32 - 1), (2**40 + 3, 12345)])
def test_noise_is_the_reference_s(seed, position):
    expected = [reference.gumbel(seed, position, token) for token in range(600)]
    np.testing.assert_allclose(every_noise(seed, position, 600), expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("choice", [1, 7, 2**32 - 1])
def test_choices_have_noise_of_their_own(choice):
    expected = [reference.gumbel(3, 8, token, choice) for token in range(600)]
    np.testing.assert_allclose(every_noise(3, 8, 600, choice), expected, rtol=1e-13, atol=1e-15)
    first, other = np.exp(-every_noise(3, 8, 600)), np.exp(-every_noise(3, 8, 600, choice))
    assert abs(np.corrcoef(first, other)[0, 1]) < 5 / math.sqrt(600)


def test_a_pilot_s_noise_is_its_token_s():
    draws = draw_blocks([4] * 600, [9] * 600, range(600), 600)
    np.testing.assert_array_equal(draws.pilot_noise, every_noise(4, 9, 600))


def test_a_token_s_noise_does_not_depend_on_the_vocabulary():
    np.testing.assert_array_equal(every_noise(3, 4, 700)[:600], every_noise(3, 4, 600))


def test_a_block_s_bound_is_its_holder_s_noise_and_above_all_others():
    draws = draw_blocks(range(20), range(20), [0] * 20, 512)
    for i in range(20):
        noise = every_noise(i, i, 512).reshape(2, 256)
        np.testing.assert_array_equal(noise.argmax(axis=1) + np.array([0, 256]), draws.holder[i])
        np.testing.assert_array_equal(noise.max(axis=1), draws.bound[i])


def test_noise_is_gumbel_and_independent_within_a_block():
    """exp(-g) must be Exp(1): mean, variance, tail, no correlation between neighbours, holders uniform."""
    e = np.exp(-np.stack([every_noise(77, position, 256) for position in range(800)]))
    n = e.size
    assert abs(e.mean() - 1) < 5 / math.sqrt(n)
    assert abs(e.var() - 1) < 5 * math.sqrt(8 / n)
    for edge in (0.001, 0.1, 1.0, 3.0):
        p = math.exp(-edge)
        assert abs((e > edge).mean() - p) < 5 * math.sqrt(p * (1 - p) / n)
    for lag in (1, 2, 128):
        product = (e[:, :-lag] - 1) * (e[:, lag:] - 1)
        assert abs(product.mean()) < 5 / math.sqrt(product.size)
    across = (e[:-1] - 1) * (e[1:] - 1)  # from one position to the next
    assert abs(across.mean()) < 5 / math.sqrt(across.size)
    # The least of 256 has mean 1/256, and who holds it is uniform over ids.
    assert abs(e.min(axis=1).mean() * 256 - 1) < 5 / math.sqrt(800)
    assert abs(e.argmin(axis=1).mean() - 127.5) < 5 * 73.9 / math.sqrt(800)


def winner(row: np.ndarray, temperature: float, seed: int, position: int, kept=None, pilot=0):
    """The winner, and how many tokens were drawn to find it."""
    allowed = row if kept is None else row[kept]
    peak = float(allowed.max())
    draws = draw_blocks([seed], [position], [pilot], len(row))
    able = contenders(draws, 0, row, peak, temperature, kept)
    return winners(draws, [able], [scaled(row[able], peak, temperature)])[0], len(able)


def naive(row: np.ndarray, temperature: float, seed: int, position: int, kept=None) -> int:
    kept = np.arange(len(row)) if kept is None else kept
    z = scaled(row[kept], float(row[kept].max()), temperature)
    return int(kept[np.argmax(z + every_noise(seed, position, len(row))[kept])])


@given(
    vocab=st.sampled_from([1, 255, 256, 257, 4000]),
    spread=st.sampled_from([0.0, 1e-6, 0.3, 2.0, 20.0]),
    temperature=st.floats(0.05, 5.0),
    seed=st.integers(0, 2**64 - 1),
    position=st.integers(0, 2**32 - 1),
    share=st.sampled_from([None, 0.001, 0.3, 1.0]),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_pruning_finds_the_winner_of_the_whole_vocabulary(vocab, spread, temperature, seed, position, share):
    rng = np.random.default_rng(seed)
    row = (rng.standard_normal(vocab) * spread).astype(np.float32)
    row[rng.random(vocab) < 0.1] = -np.inf
    row[rng.integers(vocab)] = 0.5
    kept = None
    if share is not None:
        kept = np.flatnonzero((rng.random(vocab) < share) & (row > -np.inf))
        kept = kept if len(kept) else np.array([int(row.argmax())])
    pilot = int(rng.integers(vocab))  # any pilot will do, a filtered one too
    found, _ = winner(row, temperature, seed, position, kept, pilot)
    assert found == naive(row, temperature, seed, position, kept)


@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0])
def test_a_full_vocabulary_is_pruned_to_little_and_exactly(spread):
    rng = np.random.default_rng(11)
    drawn = []
    for position in range(6):
        row = (rng.standard_normal(49152) * spread).astype(np.float32)
        found, contenders_drawn = winner(row, 0.8, 5, position, pilot=int(row.argmax()))
        assert found == naive(row, 0.8, 5, position)
        drawn.append(contenders_drawn)
    assert np.mean(drawn) < 49152 / 20


def test_equal_values_go_to_the_lowest_id():
    draws = draw_blocks([1], [1], [0], 512)
    ids = np.arange(5, 512)
    cancelled = -every_noise(1, 1, 512)[5:]  # z + g is exactly 0 for every token
    assert winners(draws, [ids], [cancelled]) == [5]


@pytest.mark.parametrize("operation", [np.log, np.exp])
def test_numpy_s_elementwise_functions_do_not_see_the_array_s_length(operation):
    """What the independence of rows stands on: no other bits in a vector's tail, at an offset or reversed."""
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.random(3000), rng.random(1000) * 1e-12, np.exp2(rng.uniform(-55, 3, 3000))])
    values = values if operation is np.log else -values * 30
    whole = operation(values)
    alone = np.array([operation(values[i : i + 1].copy())[0] for i in range(len(values))])
    np.testing.assert_array_equal(whole, alone)
    for length in range(1, 40):
        for offset in range(0, 16):
            part = values[offset : offset + length]
            np.testing.assert_array_equal(operation(part), whole[offset : offset + length])
            np.testing.assert_array_equal(operation(part.copy()), whole[offset : offset + length])
    np.testing.assert_array_equal(operation(values[::-1].copy())[::-1], whole)
    np.testing.assert_array_equal(operation(values.reshape(7, 1000)[:, ::-1])[:, ::-1].ravel(), whole)
