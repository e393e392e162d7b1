"""How far two models are apart on the same tokens: numbers of rows of logits, and a curve of them as SVG.

Everything is computed in float64 from fp32 logits over the whole vocabulary; natural logarithms. Knows no
model and no file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Divergence:
    """One entry a token, all [n]."""

    kl: NDArray[np.float64]  # KL(A || B) of the two distributions the token was drawn from, nats, >= 0
    agree: NDArray[np.bool_]  # both think the same token most likely; ties go to the lowest id
    logprob_a: NDArray[np.float64]  # of the token that stands there
    logprob_b: NDArray[np.float64]

    def part(self, start: int, stop: int) -> Divergence:
        """Tokens start .. stop - 1."""
        return Divergence(
            self.kl[start:stop],
            self.agree[start:stop],
            self.logprob_a[start:stop],
            self.logprob_b[start:stop],
        )

    def summary(self) -> dict:
        return {
            "tokens": len(self.kl),
            "top1_agreement": float(self.agree.mean()),
            "kl_mean": float(self.kl.mean()),
            "kl_median": float(np.median(self.kl)),
            "kl_p99": float(np.quantile(self.kl, 0.99)),
            "kl_max": float(self.kl.max()),
            "perplexity_a": float(np.exp(-self.logprob_a.mean())),
            "perplexity_b": float(np.exp(-self.logprob_b.mean())),
        }


def divergence(a: NDArray[np.float32], b: NDArray[np.float32], tokens: Sequence[int]) -> Divergence:
    """Of rows [n, vocab] of A and of B, each followed by tokens[i]. Logits are finite or -inf."""
    log_a, log_b = _log_softmax(a), _log_softmax(b)
    rows = np.arange(len(tokens))
    p = np.exp(log_a)
    # What A excludes adds nothing, whatever B thinks of it.
    terms = np.where(p > 0.0, p * (np.where(p > 0.0, log_a, 0.0) - log_b), 0.0)
    return Divergence(
        np.maximum(terms.sum(axis=1), 0.0),  # rounding can leave it a hair below
        a.argmax(axis=1) == b.argmax(axis=1),
        log_a[rows, tokens],
        log_b[rows, tokens],
    )


def joined(parts: Sequence[Divergence]) -> Divergence:
    names = ("kl", "agree", "logprob_a", "logprob_b")
    return Divergence(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """How many tokens two replies share before they part; None where they are the same."""
    shared = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return None if len(a) == len(b) == shared else shared


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


# ---- the curve ------------------------------------------------------------------------------------------

_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 640, 400, 70, 50, 20, 50
_LEAST = 1e-9  # nats; what is smaller is drawn here


def kl_curve(kl: NDArray[np.float64], title: str) -> str:
    """An SVG: the share of tokens (x) whose KL is at most y, y on a log scale."""
    values = np.sort(np.clip(kl, _LEAST, None))
    low = int(np.floor(np.log10(values[0])))
    high = max(low + 1, int(np.ceil(np.log10(values[-1]))))
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def x(share: float) -> float:
        return _LEFT + share * (right - _LEFT)

    def y(value: float) -> float:
        return bottom - (np.log10(value) - low) / (high - low) * (bottom - _TOP)

    # As many points as the eye can tell apart, the largest value among them.
    places = np.unique(np.linspace(0, len(values) - 1, min(len(values), 500)).round().astype(int))
    points = " ".join(f"{x((i + 1) / len(values)):.1f},{y(values[i]):.1f}" for i in places)
    lines = []
    for power in range(low, high + 1):
        at = f"{y(10.0**power):.1f}"
        lines.append(f'<line x1="{_LEFT}" y1="{at}" x2="{right}" y2="{at}" stroke="#ddd"/>')
        lines.append(f'<text x="{_LEFT - 8}" y="{at}" text-anchor="end" dy="4">1e{power}</text>')
    for percent in range(0, 101, 20):
        at = f"{x(percent / 100):.1f}"
        lines.append(f'<line x1="{at}" y1="{_TOP}" x2="{at}" y2="{bottom}" stroke="#ddd"/>')
        lines.append(f'<text x="{at}" y="{bottom + 18}" text-anchor="middle">{percent}%</text>')
    escaped = title.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
            'font-family="sans-serif" font-size="12">',
            f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
            f'<text x="{_LEFT}" y="24" font-size="14">{escaped}</text>',
            *lines,
            f'<polyline points="{points}" fill="none" stroke="#0b62a4" stroke-width="2"/>',
            f'<text x="{(x(0) + x(1)) / 2}" y="{_HEIGHT - 10}" text-anchor="middle">share of tokens</text>',
            f'<text transform="translate(16 {(_TOP + bottom) / 2}) rotate(-90)" text-anchor="middle">'
            "KL(A || B) of a token at most, nats</text>",
            "</svg>\n",
        ]
    )
