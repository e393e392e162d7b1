"""Choices on the device against the host's sampler: thresholds, tokens, logprobs; rows that stand alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from kernels.gpu.sampling import Settings, Workspace, sample
from runtime.sampling.filters import survivors, total_mass
from runtime.sampling.sampler import sample as host_sample
from runtime.sampling.state import SamplerState
from runtime.types import SamplingParams
from tests.gpu.device import DEVICE, ON_GPU

V = 512
ROWS = 400 if ON_GPU else 14  # the interpreter is slow
Params = list[SamplingParams]


def settings_of(params: Params, positions: list[int], choices: bool = False) -> Settings:
    def column(values, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=DEVICE)

    seeds = np.array([p.seed or 0 for p in params], np.uint64).view(np.int64)
    return Settings(
        temperature=column([p.temperature for p in params], torch.float64),
        top_k=column([p.top_k for p in params], torch.int32),
        top_p=column([p.top_p for p in params], torch.float64),
        min_p=column([p.min_p for p in params], torch.float64),
        seed=column(seeds.tolist(), torch.int64),
        position=column(positions, torch.int64),
        choice=column([i % 3 for i in range(len(params))] if choices else [0] * len(params), torch.int32),
    )


def on_device(
    logits: torch.Tensor, params: Params, positions: list[int], raw=None, dtype=torch.int64, choices=False
):
    rows = len(logits)
    tokens = torch.full((rows,), -7, dtype=dtype, device=DEVICE)
    logprobs = torch.full((rows,), 7.0, device=DEVICE)
    work = Workspace.make(rows, logits.shape[1], DEVICE)
    raw = None if raw is None else raw.to(DEVICE)
    held = logits.to(DEVICE)
    sample(held, settings_of(params, positions, choices), work, tokens, logprobs, raw)
    assert torch.equal(held.cpu(), logits) or logits.isnan().any()
    return tokens.cpu(), logprobs.cpu(), work


def on_host(logits: torch.Tensor, params: Params, positions: list[int], choices: bool = False):
    states = [
        SamplerState(replace(p, logprobs=0), [], [], [], logits.shape[1], i % 3 if choices else 0)
        for i, p in enumerate(params)
    ]
    chosen = host_sample(logits, states, positions)
    return [c.token for c in chosen], [c.logprob for c in chosen]


def drawn_logits(rows: int, vocabulary: int, seed: int) -> torch.Tensor:
    """Peaked, flat and tied rows."""
    generator = torch.Generator().manual_seed(seed)
    logits = (
        torch.randn(rows, vocabulary, generator=generator)
        * torch.tensor([1.0, 4.0, 0.01]).repeat(rows)[:rows, None]
    )
    logits[3::4] = (logits[3::4] * 4).round() / 4
    return logits


def drawn_params(rows: int, seed: int) -> Params:
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(rows):
        made.append(
            SamplingParams(
                temperature=float(rng.choice([0.3, 0.8, 1.0, 1.7])),
                top_k=int(rng.choice([0, 0, 1, 5, 40, 400, V, 10**6])),
                top_p=float(rng.choice([1.0, 1.0, 0.1, 0.5, 0.95, 0.9999])),
                min_p=float(rng.choice([0.0, 0.0, 0.05, 1.0])),
                seed=int(rng.integers(0, 2**64, dtype=np.uint64)),
            )
        )
    return made


def ordered(values: np.ndarray) -> np.ndarray:
    bits = (values + np.float32(0.0)).view(np.int32).astype(np.int64)
    return np.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def kept_by(work: Workspace, logits: torch.Tensor) -> list[set[int]]:
    found = []
    for row, edge, limit in zip(logits.numpy(), work.edges.tolist(), work.limits.tolist(), strict=True):
        key, ids = ordered(row), np.arange(len(row))
        found.append(set(np.flatnonzero((key > edge) | ((key == edge) & (ids < limit))).tolist()))
    return found


@pytest.mark.parametrize("seed", range(2))
def test_thresholds(seed: int) -> None:
    """Top-k exactly; top-p up to tokens at which the mass is within rounding of its bound."""
    rows = ROWS
    logits, params = drawn_logits(rows, V, seed), [replace(p, min_p=0.0) for p in drawn_params(rows, seed)]
    logits[5, ::3] = float("-inf")
    logits[6] = 1.25  # nothing but a tie
    logits[7, :300] = 0.0
    logits[7, 100:200] = -0.0
    _, _, work = on_device(logits, params, [0] * rows)
    for i, (row, p, kept) in enumerate(zip(logits.numpy(), params, kept_by(work, logits), strict=True)):
        peak = float(row.max())
        want = survivors(row, peak, p)
        want = set(range(V)) if want is None else set(want.tolist())
        if kept != want:
            assert p.top_p < 1.0, (i, p)
            inside = survivors(row, peak, replace(p, top_p=1.0))
            inside = np.arange(V) if inside is None else inside
            total = total_mass(row[inside], peak, p.temperature)
            smaller = min(kept, want, key=len)
            assert smaller < max(kept, want, key=len), (i, p)
            mass = total_mass(row[sorted(smaller)], peak, p.temperature)
            edge = np.exp((row[sorted(kept ^ want)] - peak) / p.temperature).sum()
            near = min(abs(mass - p.top_p * total), abs(mass + edge - p.top_p * total))
            assert near < 3e-6 * total, (i, p, near / total)


def test_top_k_cuts_ties_by_id() -> None:
    logits = torch.zeros(3, V)
    logits[:, 100] = 1.0
    params = [SamplingParams(temperature=1.0, top_k=k, seed=0) for k in (1, 2, 300)]
    _, _, work = on_device(logits, params, [0] * 3)
    assert kept_by(work, logits) == [{100}, {0, 100}, set(range(300))]


def test_a_first_middle_that_is_a_token() -> None:
    """The bisection's bounds are then orders of tokens, and the one at the bound belongs to the prefix."""
    over = np.nextafter(np.float32(10), np.float32(11))
    logits = torch.full((2, V), float("-inf"))
    logits[:, 7], logits[:, 300] = 10.0, -500.0
    logits[0, 9] = float(np.float32(-30 / 2) + over / np.float32(2))
    logits[1, 9] = float(np.float32(-790 / 2) + over / np.float32(2))
    params = [
        SamplingParams(temperature=1.0, top_k=2, seed=0),
        SamplingParams(temperature=20.0, top_p=1 - 1e-9, seed=0),
    ]
    _, _, work = on_device(logits, params, [0] * 2)
    assert kept_by(work, logits) == [{7, 9}, {7, 9}]


def test_top_p_cuts_ties_by_id() -> None:
    logits = torch.zeros(2, V)
    params = [
        SamplingParams(temperature=1.0, top_p=0.25, seed=0),
        SamplingParams(temperature=1.0, top_p=1e-300, seed=0),
    ]
    _, _, work = on_device(logits, params, [0] * 2)
    assert kept_by(work, logits) == [set(range(128)), {0}]


@pytest.mark.parametrize("seed", range(2))
def test_tokens_as_on_the_host(seed: int) -> None:
    rows = ROWS
    logits, params = drawn_logits(rows, V, seed + 10), drawn_params(rows, seed + 10)
    params[0] = SamplingParams(temperature=0.0)
    params[1] = SamplingParams(temperature=1e-44, seed=4)
    positions = np.random.default_rng(seed).integers(0, 2**32, rows).tolist()
    tokens, logprobs, _ = on_device(logits, params, positions, choices=True)
    want, want_logprobs = on_host(logits, params, positions, choices=True)
    assert tokens.tolist() == want
    np.testing.assert_allclose(logprobs.numpy(), want_logprobs, rtol=1e-6, atol=1e-6)


def test_several_tiles() -> None:
    """A vocabulary of more than one tile, whose last is not full; the largest logits stand in any of them."""
    vocabulary = 2500
    logits = drawn_logits(6, vocabulary, 3)
    logits[0, 2499] = logits[0, 1100] = 9.0  # the lower id of a tie across tiles
    params = [SamplingParams(temperature=t, seed=8 + i) for i, t in enumerate((0.0, 1.0, 1.0, 2.0, 5.0, 1.0))]
    params[5] = replace(params[5], top_p=0.9)
    positions = [0, 1, 2, 3, 4, 5]
    tokens, logprobs, _ = on_device(logits, params, positions, dtype=torch.int32)
    want, want_logprobs = on_host(logits, params, positions)
    assert tokens.tolist() == want and want[0] == 1100
    assert max(want) > 1024
    np.testing.assert_allclose(logprobs.numpy(), want_logprobs, rtol=1e-6, atol=1e-6)


def test_logprobs_are_of_the_raw_logits() -> None:
    raw = drawn_logits(3, V, 1)
    raw[1, 40:] = float("-inf")
    adjusted = raw.clone()
    adjusted[:, 17] += 50.0
    params = [SamplingParams(temperature=0.0)] * 3
    tokens, logprobs, _ = on_device(adjusted, params, [0] * 3, raw=raw)
    assert tokens.tolist() == [17] * 3
    want = torch.log_softmax(raw.double(), dim=-1)[:, 17]
    torch.testing.assert_close(logprobs.double(), want, rtol=1e-6, atol=1e-6)


def test_rows_that_cannot_be_sampled() -> None:
    logits = drawn_logits(6, V, 2)
    logits[0, 77] = float("nan")
    logits[1, 3] = float("inf")
    logits[2] = float("-inf")
    logits[3, 77] = float("nan")
    logits[4] = float("-inf")
    logits[4, 500] = -3e38  # one token is allowed, and taken
    params = [SamplingParams(temperature=t, top_p=0.9, seed=1) for t in (1.0, 1.0, 1.0, 0.0, 1.0, 1.0)]
    tokens, logprobs, _ = on_device(logits, params, [0] * 6)
    assert tokens[:5].tolist() == [-1, -1, -1, -1, 500]
    assert logprobs[:4].isnan().all() and logprobs[4] == 0.0 and tokens[5] >= 0


def test_a_row_stands_alone() -> None:
    rows = 5
    logits, params = drawn_logits(rows, V, 21), drawn_params(rows, 21)
    positions = list(range(100, 100 + rows))
    tokens, logprobs, _ = on_device(logits, params, positions)
    for i in (0, 4):
        token, logprob, _ = on_device(logits[i : i + 1], params[i : i + 1], positions[i : i + 1])
        assert token[0] == tokens[i] and torch.equal(logprob[0], logprobs[i])


def test_a_workspace_for_more_rows_and_no_logprobs() -> None:
    logits, params = drawn_logits(2, V, 5), drawn_params(2, 5)
    tokens = torch.full((2,), -7, device=DEVICE)
    work = Workspace.make(5, V, DEVICE)
    sample(logits.to(DEVICE), settings_of(params, [3, 4]), work, tokens)
    assert tokens.tolist() == on_host(logits, params, [3, 4])[0]


def test_refusals() -> None:
    logits, settings = torch.zeros(2, V, device=DEVICE), settings_of(drawn_params(2, 0), [0, 0])
    work, tokens = Workspace.make(2, V, DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    refused = [
        ("logits is torch.float16", (logits.half(), settings, work, tokens)),
        ("logits of 0 tokens", (logits[:, :0].contiguous(), settings, work, tokens)),
        ("tokens is", (logits, settings, work, tokens[1:])),
        (
            "temperature is torch.float32",
            (logits, replace(settings, temperature=settings.temperature.float()), work, tokens),
        ),
        ("seed is", (logits, replace(settings, seed=settings.seed[1:]), work, tokens)),
        ("workspace is for 1 rows", (logits, settings, Workspace.make(1, V, DEVICE), tokens)),
        ("workspace is", (logits, settings, Workspace.make(2, 3000, DEVICE), tokens)),
        (
            "logits does not start",
            (torch.zeros(2 * V + 1, device=DEVICE)[1:].view(2, V), settings, work, tokens),
        ),
        ("raw is", (logits, settings, work, tokens, None, logits[1:])),
        ("logprobs is", (logits, settings, work, tokens, tokens)),
    ]
    for message, arguments in refused:
        with pytest.raises(ValueError, match=message):
            sample(*arguments)
