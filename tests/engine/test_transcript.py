"""What a transcript passes on, and what it will not take. Replies that are carried: server/test_replicas."""

from __future__ import annotations

import pytest

from runtime.engine.check import IntegrityError
from runtime.engine.transcript import Transcript
from runtime.types import (
    Branch,
    Finished,
    FinishReason,
    Request,
    SamplingParams,
    ScoreOutput,
    TokenOutput,
    TokenScore,
)


def transcript(*replies, scores=False, **params) -> Transcript:
    branches = tuple(Branch(choice, reply) for choice, reply in enumerate(replies or [()]))
    params = SamplingParams(**{"max_tokens": 5, "seed": 1, **params})
    return Transcript(Request("r", (1, 2, 3), params, (9,), branches=branches, scores=scores), 100)


def end(choice=0, reason=FinishReason.LENGTH, last=True) -> Finished:
    return Finished("r", reason, 3, 0, 5, choice=choice, last=last)


def test_the_rest_is_asked_for_with_what_has_come():
    made = transcript((4,), ())
    for choice, index, token in [(0, 1, 5), (1, 0, 6), (1, 1, 7)]:
        output = TokenOutput("r", index, token, choice=choice)
        assert made.take(output) is output
    made.take(end(1, last=False))
    rest = made.rest(2.5)
    assert (rest.branches, rest.deadline, made.progress) == ((Branch(0, (4, 5)),), 2.5, 3)
    assert made.take(end(0, last=True)).last and made.ended


def test_who_ends_last_is_decided_over_all_engines():
    made = transcript((), ())
    assert not made.take(end(0, last=True)).last
    assert made.take(end(1, last=True)).last


def test_a_loss_is_not_passed_on():
    made = transcript()
    assert made.take(Finished("r", FinishReason.ERROR, 0, 0, 0, detail="a rank")) is None
    assert made.failure == "a rank" and not made.ended


@pytest.mark.parametrize(
    "outputs",
    [
        [TokenOutput("r", 1, 5)],
        [TokenOutput("r", 0, 5), TokenOutput("r", 0, 5)],
        [TokenOutput("r", 0, 5, choice=3)],
        [end(), end()],
        [end(), TokenOutput("r", 0, 5)],
    ],
)
def test_what_cannot_be_is_a_defect(outputs):
    made = transcript()
    with pytest.raises(IntegrityError):
        for output in outputs:
            made.take(output)


def test_scores_are_passed_on_once_and_without_gaps():
    a, b = TokenScore(-1.0), TokenScore(-2.0)
    made = transcript(scores=True)
    with pytest.raises(IntegrityError, match="missing"):
        made.take(ScoreOutput("r", 2, (b,)))
    assert made.take(ScoreOutput("r", 1, (a,))) == ScoreOutput("r", 1, (a,))
    assert made.take(ScoreOutput("r", 1, (a,))) is None and made.settle() == []
    assert made.take(ScoreOutput("r", 1, (a, b))) == ScoreOutput("r", 2, (b,))
    [finished] = made.settle()
    assert (finished.reason, finished.prompt_tokens, finished.completion_tokens) == (
        FinishReason.LENGTH,
        3,
        0,
    )


@pytest.mark.parametrize(
    ("reply", "params", "reason", "stop"),
    [
        ((4, 9), {}, FinishReason.STOP, 9),
        ((9,), {"min_tokens": 1}, None, None),
        ((4, 9), {"min_tokens": 1}, FinishReason.STOP, 9),
        ((4,) * 5, {}, FinishReason.LENGTH, None),
        ((4,) * 4 + (9,), {}, FinishReason.STOP, 9),
        ((4,) * 97, {"max_tokens": None}, FinishReason.LENGTH, None),
        ((4,) * 96, {"max_tokens": None}, None, None),
        ((4,), {}, None, None),
        ((), {}, None, None),
    ],
)
def test_a_reply_that_needs_nobody_ends_as_an_engine_would_end_it(reply, params, reason, stop):
    made = transcript(reply, **params)
    found = made.settle()
    assert [(each.reason, each.stop_token, each.completion_tokens) for each in found] == (
        [(reason, stop, len(reply))] if reason else []
    )


def test_a_reply_that_was_told_to_stop_is_cut_there():
    made = transcript((4, 5, 6))
    made.stop(0, 2)
    made.stop(7, 1)  # that one has ended
    [finished] = made.settle()
    assert (finished.reason, finished.completion_tokens, made.ended) == (FinishReason.STOP, 2, True)
