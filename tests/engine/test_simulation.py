"""Many seeded runs in tight memory, where sequences are preempted, prefixes shared and blocks evicted.

Hypothesis explores shapes; this one stays where it hurts. A failure names its seed: `simulate(seed)`."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from runtime.config import EngineConfig
from runtime.engine.scheduler import Scheduler
from runtime.errors import InvalidArgument
from runtime.types import FinishReason, Load
from tests.engine.executor import OVERFLOW, VOCABULARY
from tests.engine.harness import Harness, request


def random_prompt(rng: random.Random, length: int) -> tuple[int, ...]:
    """Often the beginning of another one, at times a repetition that looks alike at every offset."""
    if rng.random() < 0.2:
        return (rng.randrange(2),) * length
    stream = random.Random(rng.randrange(2))
    shared = rng.randint(0, length)
    tokens = [stream.randrange(VOCABULARY) for _ in range(shared)]
    return tuple(tokens + [rng.randrange(VOCABULARY) for _ in range(length - shared)])


def simulate(seed: int, overflows: float = 0.0) -> Load:
    """`overflows`: how many of the prompts hold a token whose numbers are none."""
    rng = random.Random(seed)
    odd = random.Random(seed)
    block_size = rng.choice([1, 2, 2, 3, 4])
    blocks = rng.randint(3, 14)
    capacity = block_size * blocks
    config = EngineConfig(
        block_size=block_size,
        total_blocks=blocks,
        max_num_seqs=rng.randint(2, 6),
        max_step_tokens=rng.choice([3, 6, 12, 64]),
        max_chunk=rng.choice([None, None, 2, 7]),
        max_model_len=capacity + rng.randint(0, 3),
        draft_tokens=rng.choice([0, 1, 3, 8]),
        draft_cost=rng.choice([None, None, 0.0, 0.1, 0.5]),
        microbatches=rng.choice([1, 1, 1, 2, 3]),
    )
    harness = Harness(config, rng.choice([1, 2, 2, 2, 3]))
    calm = rng.random() < 0.5  # no aborts, no deadlines
    for _ in range(rng.randint(40, 120)):
        event = rng.random()
        if event < 0.25:
            length = rng.randint(1, max(1, capacity // rng.choice([1, 2, 3])))
            name = f"r{len(harness.streams)}"
            prompt = list(random_prompt(rng, length))
            if odd.random() < overflows:
                prompt[-1 - odd.randrange(min(length, 3))] = OVERFLOW
            try:
                harness.add(
                    request(
                        name,
                        tuple(prompt),
                        max_tokens=rng.randint(1, max(1, capacity + 1 - length)),
                        stop_ids=(rng.randrange(VOCABULARY),) if rng.random() < 0.5 else (),
                        seed=rng.randrange(3),
                        min_tokens=rng.randint(0, 2),
                        priority=rng.choice([0, 0, 0, 1]),
                        cache_salt=rng.choice(["", "", "", "x"]),
                        deadline=harness.now + rng.random() * 30 if not calm and rng.random() < 0.2 else None,
                    )
                )
            except InvalidArgument:
                assert length >= config.max_model_len
        elif event < 0.35 and harness.streams and not calm:
            name = rng.choice([*harness.streams][-6:])
            stream = harness.streams[name]
            if rng.random() < 0.5:
                harness.abort(name)
            elif not stream.finished:
                harness.abort(name, FinishReason.STOP, rng.randint(0, len(stream.tokens)))
        elif event < 0.7:
            harness.plan()
        elif event < 0.98:
            harness.deliver()
        else:
            harness.tick(rng.random() * 3)
    harness.finish()
    ends = Counter(stream.finished.reason for stream in harness.streams.values())
    assert not calm or set(ends) <= {FinishReason.STOP, FinishReason.LENGTH, FinishReason.FAILED}
    for stream in harness.streams.values():
        if stream.finished.reason is FinishReason.FAILED or calm:
            bad = OVERFLOW in stream.request.prompt
            assert (stream.finished.reason is FinishReason.FAILED) == bad, stream
    return harness.engine.load()


@pytest.mark.parametrize("start", range(0, 160, 80))
def test_replies_survive_tight_memory(start: int) -> None:
    preemptions = hits = drafted = accepted = 0
    for seed in range(start, start + 80):
        try:
            load = simulate(seed)
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise
        preemptions += load.preemptions
        hits += load.prefix_hit_tokens
        drafted += load.drafted_tokens
        accepted += load.accepted_tokens
    # The runs must be worth something.
    assert preemptions > 200
    assert hits > 200
    assert 200 < accepted < drafted - 200


def test_only_those_fail_that_have_no_numbers_of_their_own(monkeypatch) -> None:
    """In tight memory, with choices of who goes first. (That neighbours are spoiled is rare here: see
    test_engine.)"""
    restarts = []
    plain = Scheduler.restart

    def restart(scheduler, sequence) -> None:
        restarts.append(OVERFLOW in sequence.request.prompt)
        plain(scheduler, sequence)

    monkeypatch.setattr(Scheduler, "restart", restart)
    for seed in range(5000, 5040):
        try:
            simulate(seed, overflows=0.3)
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise
    assert restarts.count(True) > 10


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 3000, 250))
def test_replies_survive_tight_memory_at_length(first: int) -> None:
    """In parts, which tests that run beside each other can share out."""
    for seed in range(first, first + 250):
        try:
            simulate(seed)
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise
