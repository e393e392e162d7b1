"""Chooses the next token of each row of logits.

A row's choice is a pure function of its logits, its state and its position: rows share numpy calls, never
numbers. The steps are: bias, penalties and min_tokens (state.py), temperature, filters (filters.py),
Gumbel-max with noise keyed by position and token (noise.py). Logprobs come from the untouched logits.
All of it runs in numpy on the host, on one thread. Knows nothing of models, plans or slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.sampling.filters import Ids, Row, scaled, survivors
from runtime.sampling.noise import contenders, draw_blocks, winners
from runtime.sampling.score import score_token
from runtime.sampling.state import SamplerState
from runtime.types import TokenLogprob

__all__ = ["NO_TOKEN", "Choice", "SamplerState", "sample", "sample_ahead"]

NO_TOKEN = -1  # in place of one: its row holds NaN or +inf, or allows none


@dataclass(frozen=True, slots=True)
class Choice:
    """A sampled token. `logprob` and `top` (most likely first, ties by lower id) are natural logs of the
    model's own distribution, before bias, penalties and temperature; None and empty where not asked for."""

    token: int
    logprob: float | None = None
    top: tuple[TokenLogprob, ...] = ()


def sample(logits: torch.Tensor, states: Sequence[SamplerState], positions: Sequence[int]) -> list[Choice]:
    """One Choice for each row of `logits` [rows, vocab] fp32 on any device; `logits` is not modified.

    positions[i] is the absolute position of the token to be sampled, below 2**32. The states are not
    advanced: call `append`. A row whose logits hold NaN or +inf, or allow no token at all, gives NO_TOKEN;
    the others are what they would be without it. Raises ValueError where shapes or types do not fit.
    """
    rows = _checked(logits, states, positions)
    tops = rows.argmax(axis=1)  # the lowest id among equals; a NaN's, if there is one
    peaks = rows[np.arange(len(rows)), tops]
    sound = np.isfinite(peaks)
    if not sound.all():
        which = np.flatnonzero(sound).tolist()
        found = [Choice(NO_TOKEN)] * len(rows)
        some = sample(logits[which], [states[i] for i in which], [positions[i] for i in which])
        for i, choice in zip(which, some, strict=True):
            found[i] = choice
        return found

    tokens = _chosen(rows, tops.tolist(), states, positions)
    return [
        _choice(rows[i], float(peaks[i]), token, state.params.logprobs)
        for i, (token, state) in enumerate(zip(tokens, states, strict=True))
    ]


def sample_ahead(
    logits: torch.Tensor,
    states: Sequence[SamplerState],
    positions: Sequence[int],
    drafts: Sequence[Sequence[int]],
) -> list[list[Choice]]:
    """The choices of sequences whose next tokens are guessed: what `sample` and `append` would choose one
    after the other, for as long as the guesses hold.

    `logits` [rows, vocab] has 1 + len(drafts[i]) rows for sequence i, row j of which saw its first j guesses;
    positions[i] is that of the first token to be sampled. Sequence i gets one Choice, and one more for each
    guess that was right before the first wrong one. NO_TOKEN is a sequence's last. The states take what was
    chosen. Raises as `sample`.
    """
    first = list(accumulate((1 + len(guesses) for guesses in drafts), initial=0))
    if first[-1] != len(logits):
        raise ValueError(f"{len(logits)} rows for {len(drafts)} sequences that need {first[-1]}")
    found: list[list[Choice]] = [[] for _ in drafts]
    open_ = range(len(drafts))
    ahead = 0
    while open_:
        every = len(open_) == len(logits)
        rows = logits if every else logits[[first[i] + ahead for i in open_]]
        choices = sample(rows, [states[i] for i in open_], [positions[i] + ahead for i in open_])
        for i, choice in zip(open_, choices, strict=True):
            found[i].append(choice)
            if choice.token != NO_TOKEN:
                states[i].append(choice.token)
        open_ = [i for i in open_ if ahead < len(drafts[i]) and found[i][ahead].token == drafts[i][ahead]]
        ahead += 1
    return found


def _chosen(
    rows: NDArray[np.float32], tops: list[int], states: Sequence[SamplerState], positions: Sequence[int]
) -> list[int]:
    """The token of each row, or NO_TOKEN; `tops` are the lowest ids of the rows' largest logits, which are
    finite."""
    tokens = list(tops)
    none = []  # rows that allow no token
    sampled = [i for i, state in enumerate(states) if state.params.temperature > 0.0]
    if sampled:
        seeds = [states[i].params.seed for i in sampled]
        places = [positions[i] for i in sampled]
        choices = [states[i].choice for i in sampled]
        draws = draw_blocks(seeds, places, [tops[i] for i in sampled], rows.shape[1], choices)
    able: list[Ids] = []
    z: list[NDArray[np.float64]] = []
    # Row by row, so that a row's work stays in the cache; only what may win is kept of it.
    for i, state in enumerate(states):
        raw, params = rows[i], state.params
        row = state.adjusted(raw)
        if row is not raw:
            tokens[i] = int(row.argmax())
            if row[tokens[i]] == -np.inf:
                none.append(i)
                row = raw  # whatever is drawn of it
                tokens[i] = tops[i]
        if params.temperature > 0.0:
            peak = float(row[tokens[i]])
            kept = survivors(row, peak, params)
            able.append(contenders(draws, len(able), row, peak, params.temperature, kept))
            z.append(scaled(row[able[-1]], peak, params.temperature))
    if sampled:
        for i, token in zip(sampled, winners(draws, able, z), strict=True):
            tokens[i] = token
    for i in none:
        tokens[i] = NO_TOKEN
    return tokens


def _checked(
    logits: torch.Tensor, states: Sequence[SamplerState], positions: Sequence[int]
) -> NDArray[np.float32]:
    if logits.dtype != torch.float32 or logits.dim() != 2:
        raise ValueError(f"logits must be [rows, vocab] fp32, not {list(logits.shape)} {logits.dtype}")
    if not len(logits) == len(states) == len(positions):
        raise ValueError(f"{len(logits)} rows, {len(states)} states and {len(positions)} positions")
    for i, state in enumerate(states):
        if state.vocab_size != logits.shape[1]:
            raise ValueError(f"row {i}: a state for {state.vocab_size} tokens, logits for {logits.shape[1]}")
        if not 0 <= positions[i] < 2**32:
            raise ValueError(f"row {i}: position {positions[i]} is out of range")
    return np.ascontiguousarray(logits.detach().cpu().numpy())


def _choice(row: Row, peak: float, token: int, logprobs: int | None) -> Choice:
    if logprobs is None or token == NO_TOKEN:
        return Choice(token)
    found = score_token(row, peak, token, logprobs)
    return Choice(token, found.logprob, found.top)
