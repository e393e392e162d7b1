"""What a row of logits says of a token: its log probability, and those of the most likely ones.

One row, float64 sums over chunks of fixed size (filters.total_mass): the same bits for a token that was
sampled and for one that was given. Knows nothing of models, plans or slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from runtime.sampling.filters import Row, ranked, total_mass
from runtime.types import TokenLogprob, TokenScore


def score_token(row: Row, peak: float, token: int, count: int) -> TokenScore:
    """`row` [vocab] fp32 with its largest value; natural logs of `token` and of the `count` most likely
    tokens, ties by lower id."""
    total = peak + float(np.log(total_mass(row, peak, 1.0)))
    top = tuple(TokenLogprob(other, float(row[other]) - total) for other in ranked(row, count).tolist())
    return TokenScore(float(row[token]) - total, top)


def score(logits: torch.Tensor, tokens: Sequence[int], count: int) -> tuple[TokenScore, ...]:
    """The score of tokens[i] after logits [rows, vocab] fp32, any device: NaN and nothing else where a row
    holds NaN or +inf, or allows no token at all."""
    rows = np.ascontiguousarray(logits.detach().cpu().numpy())
    found = []
    for row, token in zip(rows, tokens, strict=True):
        peak = float(row.max())
        sound = np.isfinite(peak)
        found.append(score_token(row, peak, token, count) if sound else TokenScore(float("nan")))
    return tuple(found)
