"""A draft model on a GPU: guesses come from it, and nothing that is sent depends on them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from runtime.model.gpu.sampler import DeviceSampler
from runtime.types import SamplingParams, SequenceStart
from tests.gpu.device import DEVICE
from tests.gpu.drafting import Played, play
from tests.gpu.folder import write_folder
from tests.gpu.play import by_ranks, opened, runner, simulate_graphs

SHAPE = {"hidden": 64, "layers": 1, "heads": 2, "kv_heads": 2, "head_dim": 64, "ffn": 64, "vocab": 260}
LENGTH = 6
ASKED = (
    (tuple(range(3, 16)), SamplingParams(temperature=0.0, logprobs=2)),
    ((5, 9, 33, 7, 1), SamplingParams(temperature=0.8, seed=3, logprobs=0)),
    ((2, 60, 11), SamplingParams(temperature=0.9, top_p=0.9, top_k=50, seed=5, logprobs=1)),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("model"), **SHAPE)


@pytest.fixture(scope="module")
def plain(model) -> Played:
    """Without a draft model."""
    return play(runner(opened(model), 64, 3), ASKED, LENGTH)


def test_a_model_that_drafts_for_itself_is_always_right(model, plain, monkeypatch) -> None:
    """Cold and after having fallen behind, in captured steps, while another sequence is a plan ahead: were a
    position of the draft model's KV stale, or its noise another, some guess would be wrong."""
    made = runner(opened(model), 64, 3, draft=opened(model))
    simulate_graphs(monkeypatch, made.steps)
    simulate_graphs(monkeypatch, made._drafter.steps)
    found = play(made, ASKED, LENGTH, guessing=(0, 1), ahead=1)
    assert found.replies == plain.replies
    assert found.right == found.tried >= 6
    assert made.cache_bytes == 2 * made.steps.cache_bytes


def test_ranks_get_the_same_guesses(model, plain) -> None:
    """Without graphs; one sequence guesses, alone."""

    def work(comm) -> Played:
        made = runner(opened(model), 64, 1, comm, draft=opened(model))
        return play(made, ASKED[1:2], LENGTH, guessing=(0,))

    first, second = by_ranks(2, work)
    assert first.replies == plain.replies[1:2]
    assert first.right == first.tried == second.tried == second.right >= 3


def test_another_model_changes_nothing(model, plain, tmp_path) -> None:
    draft = opened(write_folder(tmp_path, **SHAPE, seed=2))
    found = play(runner(opened(model), 64, 3, draft=draft), ASKED, LENGTH, guessing=(0, 1, 2))
    assert found.replies == plain.replies
    assert found.right < found.tried


def test_a_choice_that_is_not_remembered() -> None:
    """`choose` gives what `sample` is about to, and leaves no trace: counts, least length, newest token."""
    sampler = DeviceSampler(300, torch.device(DEVICE))
    params = (
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.9, seed=7, frequency_penalty=0.5, min_tokens=3, max_tokens=9),
    )
    for slot, one in enumerate(params):
        sampler.start(SequenceStart(slot, (4, 5, 6), 3, one, (8, 9)))
    logits = torch.randn(2, 300, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    logits[1, 8] = 100.0
    before = sampler.last.clone()
    for position in (3, 4, 5, 6):
        kept = logits.clone()
        first, again = (sampler.choose(logits, [0, 1], [position] * 2).tolist() for _ in range(2))
        assert torch.equal(logits, kept) and torch.equal(sampler.last, before)
        assert first == again == sampler.sample(logits, [0, 1], [position] * 2).tolist()
        assert (first[1] == 8) == (position == 6), "barred until the reply has its least length"
        before = sampler.last.clone()
