"""Guesses from the text itself and from a draft model: what they are, and how likely they seem right."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from runtime.config import EngineConfig
from runtime.engine.speculation import (
    FEWEST_RIGHT,
    FIRST_REST,
    FIRST_RIGHT,
    FIRST_WRONG,
    GRAM,
    LONGEST_REST,
    TOKEN_DECAY,
    Guesser,
    Lookup,
    Pace,
)
from tests.engine.harness import Harness, request

texts = st.lists(st.integers(0, 3), max_size=60)


def place_of(text: list[int]) -> int | None:
    """Where the token after `text` is guessed to stand: after the last earlier place of its last tokens."""
    for stop in range(len(text) - 1, GRAM - 1, -1):
        if text[stop - GRAM : stop] == text[-GRAM:]:
            return stop
    return None


@given(texts, texts)
def test_a_lookup_follows_the_text(prompt, reply):
    """Against a plain search: it stays on a place as long as that foresees the text, then takes the last."""
    lookup, text, at, foreseen = Lookup(prompt), list(prompt), None, 0
    rights, wrongs = FIRST_RIGHT, FIRST_WRONG
    for token in reply:
        right = at is not None and text[at] == token
        if foreseen >= FEWEST_RIGHT:
            rights, wrongs = TOKEN_DECAY * rights + right, TOKEN_DECAY * wrongs + (not right)
        text.append(token)
        at, foreseen = (at + 1, foreseen + 1) if right else (place_of(text), 0)
        lookup.push(token)
        assert lookup.foreseen == foreseen
        assert lookup.chance == (rights / (rights + wrongs) if foreseen >= FEWEST_RIGHT else 0.0)
        guess = lookup.guess(5)
        assert len(guess) == (0 if at is None else 5)
        longer = list(text)
        for offset, token in enumerate(guess):
            assert token == longer[at + offset]
            longer.append(token)


def test_a_long_prompt_is_indexed_little_by_little():
    prompt = list(range(10_000))
    lookup = Lookup(prompt)
    lookup.push(5)
    assert len(lookup._index) < 1000
    for token in range(6, 40):
        lookup.push(token)
    assert lookup.guess(3) == (40, 41, 42)


def test_what_was_foreseen_is_watched_without_a_guess_being_tried():
    lookup = Lookup([1, 2, 3, 4] * 3)
    chances = []
    for token in [1, 2, 3, 4] * 10:
        lookup.push(token)
        chances.append(lookup.chance)
    assert chances[0] == 0.0 and 0.9 < chances[-1] < 1.0
    for number in range(40):  # twice as it was, then otherwise
        for token in (1, 2, 3, 4, 1, 50 + number):
            lookup.push(token)
            if lookup.chance:
                last = lookup.chance
    assert last < 0.75


def test_a_pace_keeps_to_what_pays():
    free, dear = Pace(8, 0.0), Pace(8, 1.0)
    assert dear.length == 0, "a draft as slow as the model gains nothing"
    for _ in range(20):
        free.settle(free.length, free.length)
    assert free.length == 8
    half = Pace(8, 0.2)
    for _ in range(30):
        half.settle(half.length, half.length // 2)
    assert half.length < 4


def test_a_pace_that_fails_rests_ever_longer():
    pace, tried, rests, resting = Pace(8, 0.1), 0, [], 0
    for _ in range(5000):
        if pace.length:
            tried += 1
            rests.append(resting)
            resting = 0
            pace.settle(pace.length, 0)
        else:
            resting += 1
        pace.push()
    assert tried < 25
    assert FIRST_REST - 1 in rests and max(rests) == LONGEST_REST - 1


@given(st.integers(0, 8), st.integers(0, 8))
def test_never_more_than_asked(most, room):
    guesser = Guesser([1, 2, 3, 4] * 5, most, 0.0)
    for token in [1, 2, 3, 4] * 3:
        guesser.push(token)
    drafts, guesses = guesser.propose(room)
    assert len(drafts) + guesses <= min(most, room)
    assert not (drafts and guesses)


def test_the_likelier_source_guesses():
    guesser = Guesser([1, 2, 3, 4] * 5, 4, 0.0)
    assert guesser.steady and not guesser.chance and guesser.propose(3) == ((), 3)
    for _ in range(3):
        guesser.settle(0, guesser.steady, 0)
        guesser.push(9)
    for token in [1, 2, 3, 4] * 3:
        guesser.push(token)
    assert not guesser.steady and guesser.chance > 0.5 and guesser.propose(3) == ((1, 2, 3), 0)


def test_a_repeating_reply_takes_fewer_steps():
    """Seed 1 repeats what stood four tokens before, but for an eighth of the tokens."""
    steps = {}
    for most in (0, 8):
        config = EngineConfig(block_size=4, total_blocks=100, max_model_len=400, draft_tokens=most)
        harness = Harness(config)
        harness.add(request("r", tuple(range(4)), max_tokens=300, seed=1))
        harness.finish()
        steps[most] = harness.executor.steps
        finished = harness.streams["r"].finished
        assert 0 <= finished.accepted_tokens <= finished.drafted_tokens
        assert bool(finished.accepted_tokens) == bool(most)
    assert steps[8] < 0.7 * steps[0]
