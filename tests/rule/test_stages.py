"""Stages change no bit: cut anywhere, with ranks in each or not, whatever else goes on."""

from __future__ import annotations

import asyncio

import pytest

from runtime.model.forward import Forward
from runtime.types import FinishReason
from tests.replies import ask, ask_all, greedy
from tests.rule.engines import assert_same, check_idle, engine, plain_replies
from tests.rule.test_rule import CONTEXT, MODELS, UNITS, Case

# Five layers, whose cuts among two to four stages are uneven; an embedding and a head of any weight beside.
SHAPES = {
    "fp32-u3": {**MODELS["fp32-u3"], "layers": 5},
    "mixed-u8": {**MODELS["mixed-u8"], "layers": 5, "tied": True},
    "window-u4": {**MODELS["window-u4"], "layers": 3, "vocab": 1500},
}
SETTINGS = {
    "fp32-u3": [
        {"pp": 2, "company": 6, "max_num_seqs": 24},
        {"pp": 3, "tp": 2, "max_chunk": 13},
        {"pp": 5, "in_turn": True},
        {"pp": 4, "block_size": 8, "total_blocks": 36, "max_num_seqs": 24, "company": 8},
    ],
    "mixed-u8": [
        {"pp": 2, "tp": 3, "company": 4, "block_size": 16, "total_blocks": 24, "max_chunk": 13},
        {"pp": 3, "rounds": 2, "block_size": 16, "draft_tokens": 0},
    ],
    "window-u4": [{"pp": 2, "max_step_tokens": 13, "prefix_cache": False}, {"pp": 3, "microbatches": 5}],
}


@pytest.fixture(scope="module", params=SHAPES)
def case(request, tiny) -> Case:
    shape = SHAPES[request.param]
    made = Case(tiny(context=CONTEXT, **shape), shape.get("vocab", 384), CONTEXT, longest=20)
    made.name, made.units = request.param, UNITS[request.param]
    return made


def test_the_replies_are_those_of_one_rank(case):
    """Greedy and seeded, penalties, filters, logprobs; prompts in chunks, preempted, cached, alone."""
    for setting in SETTINGS[case.name]:
        loads = case.compare(**setting)
        assert bool(loads[0].preemptions) == ("total_blocks" in setting)


def test_guesses_that_were_right_reach_every_stage(tiny):
    """Several tokens come of a step, more or fewer: each stage goes on from what stood."""
    path = tiny(context=CONTEXT, layers=3, types="Q8_0", hidden=128, heads=4)
    asked = [greedy(f"r{i}", (5, 6, 7, 8 + i) * 8, 60, logprobs=1) for i in range(4)]
    want = plain_replies(path, asked)
    for setting in ({"pp": 3}, {"pp": 2, "tp": 2, "block_size": 8, "total_blocks": 40}):
        with engine(path, **setting) as made:
            assert_same(asyncio.run(ask_all(made.client, asked)), want)
            load = asyncio.run(made.client.load())
            check_idle(made)
        assert 0 < load.accepted_tokens < load.drafted_tokens


@pytest.mark.alone
@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_stage_that_fails_ends_every_stream(tiny, monkeypatch, failing):
    """Whichever it is: the others, which wait for it, are not left waiting."""
    layers, calls = Forward.layers, []

    def fails(self, x, batch):
        if self.shard.stage == stages[failing]:
            calls.append(batch)
            if len(calls) > 5:
                raise RuntimeError("a defect")
        return layers(self, x, batch)

    stages = ((0, 1), (1, 2), (2, 3))
    monkeypatch.setattr(Forward, "layers", fails)
    with engine(tiny(context=CONTEXT, layers=3), pp=3, tp=2) as made:
        threads = [made.loop._thread, *made.loop._ranks._threads]

        async def streams():
            return await asyncio.gather(*(ask(made.client, greedy(f"r{i}", (1, i), 50)) for i in range(3)))

        for _, end in asyncio.run(streams()):
            assert end.reason is FinishReason.ERROR and end.detail
    # Where one waits for what never comes, close() leaves it behind after its ten seconds: it lives on.
    for thread in threads:
        thread.join(30)
    assert len(threads) == 7 and not any(thread.is_alive() for thread in threads)
