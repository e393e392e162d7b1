"""Bias and penalties on the device against the host's sampler, bit for bit, while a reply grows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from kernels.gpu.penalties import Penalties, adjust, remember
from runtime.sampling.state import SamplerState
from runtime.types import SamplingParams
from tests.gpu.device import DEVICE

V = 200
ENTRIES = 64


def params(**fields) -> SamplingParams:
    return replace(SamplingParams(), temperature=0.0, **fields)


CASES = [
    params(),
    params(logit_bias=((3, 5.5), (7, -1000.0), (199, 0.1))),
    params(repetition_penalty=1.3),
    params(repetition_penalty=0.7, presence_penalty=1.1, frequency_penalty=-0.3),
    params(presence_penalty=-1.5, min_tokens=3),
    params(frequency_penalty=0.37, logit_bias=((11, 1000.0), (12, -2.0)), min_tokens=1),
    params(min_tokens=2),
]
PROMPTS = [[1, 2, 3], [3, 3], [5, 6, 7, 5], [11, 12, 0, 199], [8], [11], [9, 10]]
STOPS = [0, 12, 17]


def table(cases: list[SamplingParams], prompts: list[list[int]]) -> Penalties:
    made = Penalties.empty(len(cases), ENTRIES, 4, "cpu")
    for i, (case, prompt) in enumerate(zip(cases, prompts, strict=True)):
        bias = dict(case.logit_bias)
        text = set(prompt) if case.repetition_penalty != 1.0 else set()
        for j, token in enumerate([*bias, *sorted(text - set(bias))]):
            made.ids[i, j] = token
            made.bias[i, j] = bias.get(token, 0.0)
            made.in_text[i, j] = token in text
        made.repetition[i] = case.repetition_penalty
        made.presence[i] = case.presence_penalty
        made.frequency[i] = case.frequency_penalty
        made.stop_ids[i, : len(STOPS)] = torch.tensor(STOPS)
        made.missing[i] = case.min_tokens
    return Penalties(*(getattr(made, name).to(DEVICE) for name in Penalties.__slots__))


def rows(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(len(CASES), V, generator=generator) * 8
    values[:, 5] = float("-inf")
    values[:, 6] = 3.4e38
    values[:, 11] = -3.4e38
    return values


def same_bits(got: torch.Tensor, want: np.ndarray) -> None:
    np.testing.assert_array_equal(got.cpu().numpy(), want)


def test_as_the_host_while_replies_grow() -> None:
    made = table(CASES, PROMPTS)
    states = [SamplerState(c, p, [], STOPS, V) for c, p in zip(CASES, PROMPTS, strict=True)]
    index = torch.arange(len(CASES), device=DEVICE)
    generator = torch.Generator().manual_seed(9)
    for turn in range(5):
        raw = rows(turn)
        logits = raw.clone().to(DEVICE)
        adjust(logits, made, index)
        want = np.stack([s.adjusted(row) for s, row in zip(states, raw.numpy(), strict=True)])
        same_bits(logits, want)
        tokens = torch.randint(0, 14, (len(CASES),), generator=generator)  # often what is there already
        remember(tokens.to(DEVICE), made, index)
        for state, token in zip(states, tokens.tolist(), strict=True):
            state.append(token)


def test_any_order_of_rows_and_rows_without_a_state() -> None:
    made = table(CASES, PROMPTS)
    raw = rows(1)
    whole = raw.clone().to(DEVICE)
    adjust(whole, made, torch.arange(len(CASES), device=DEVICE))
    index = torch.tensor([4, -1, 1, len(CASES)], dtype=torch.int32, device=DEVICE)
    logits = raw[[4, 0, 1, 2]].to(DEVICE)
    adjust(logits, made, index)
    assert torch.equal(logits[[0, 2]], whole[[4, 1]]) and torch.equal(logits[[1, 3]].cpu(), raw[[0, 2]])


def test_a_token_of_minus_one_changes_nothing() -> None:
    made = table(CASES, PROMPTS)
    before = [getattr(made, name).clone() for name in Penalties.__slots__]
    remember(torch.full((len(CASES),), -1, device=DEVICE), made, torch.arange(len(CASES), device=DEVICE))
    remember(torch.tensor([1, 1], device=DEVICE), made, torch.tensor([-1, len(CASES)], device=DEVICE))
    assert all(torch.equal(getattr(made, n), b) for n, b in zip(Penalties.__slots__, before, strict=True))


def test_many_entries() -> None:
    """More than one turn of the loops."""
    entries, vocabulary = 1500, 1600
    made = Penalties.empty(1, entries, 0, DEVICE)
    made.ids[0, :1400] = torch.arange(1400, dtype=torch.int32)
    made.bias[0, :1400] = torch.arange(1400).double()
    made.presence[0] = 1.0
    state = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    for token in (1399, 1500, 1399, 5):
        remember(torch.tensor([token], device=DEVICE), made, state)
    logits = torch.zeros(1, vocabulary, device=DEVICE)
    adjust(logits, made, state)
    want = torch.zeros(vocabulary)
    want[:1400] = torch.arange(1400).float()
    want[1399] -= 1
    want[5] -= 1
    want[1500] = -1
    assert torch.equal(logits[0].cpu(), want)
    assert made.ids[0, 1400] == 1500 and made.counts[0, 1399] == 2 and (made.ids[0, 1401:] == -1).all()


def test_refusals() -> None:
    made = table(CASES, PROMPTS)
    index = torch.arange(len(CASES), device=DEVICE)
    logits = rows(0).to(DEVICE)
    refused = [
        ("logits is torch.float16", lambda: adjust(logits.half(), made, index)),
        ("states is", lambda: adjust(logits, made, index[1:])),
        ("bias is torch.float32", lambda: adjust(logits, replace(made, bias=made.bias.float()), index)),
        ("counts is", lambda: adjust(logits, replace(made, counts=made.counts[1:]), index)),
        ("presence is", lambda: remember(index, replace(made, presence=made.presence[1:]), index)),
        ("tokens is torch.float32", lambda: remember(index.float(), made, index)),
    ]
    for message, call in refused:
        with pytest.raises(ValueError, match=message):
            call()
