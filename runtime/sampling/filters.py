"""Which tokens may be sampled: top-k, then top-p, then min-p.

The order of tokens is: larger logit first, lower id first among equals. With z = (logit - peak) / T:
- top_k keeps the first k tokens of that order (0, or more than there are: all).
- top_p keeps the shortest prefix whose exp(z) sum to at least top_p times the sum over what top_k kept; at
  least one token (1: all).
- min_p keeps tokens with z >= log(min_p), that is, at least min_p times as likely as the likeliest (0: all).
So each keeps a prefix, and a prefix is known by its length: values are sorted, never ids. Sums are float64.
Nothing here depends on another row. Knows nothing of noise.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from runtime.types import SamplingParams

Row = NDArray[np.float32]  # [vocab]; -inf for a token that may not be sampled; no NaN, no +inf
Ids = NDArray[np.int64]

_FIRST_LOOK = 8.0  # tokens this close to the peak are sorted before all are; no effect on what is kept
_CHUNK = 8192  # values summed at once: stays in the cache, and fixes the order of additions
_LEAST_TEMPERATURE = 1e-30  # lower ones act like it: fp32 logits that differ are then worlds apart


def survivors(row: Row, peak: float, params: SamplingParams) -> Ids | None:
    """Ids that pass the filters, ascending; None where no filter is on.

    `peak` is the row's largest value, finite; the temperature is above 0.
    """
    kept = None
    if 0 < params.top_k < len(row):
        kept = _first(row, params.top_k)
    if params.top_p < 1.0:
        if kept is None:
            kept = _nucleus(row, peak, params, total_mass(row, peak, params.temperature))
        else:
            values = row[kept]
            mass = np.exp(scaled(np.sort(values)[::-1], peak, params.temperature))
            kept = kept[_nucleus(values, peak, params, np.cumsum(mass)[-1])]
    if params.min_p > 0.0:
        kept = _likely(row, peak, params) if kept is None else kept[_likely(row[kept], peak, params)]
    return kept


def ranked(row: Row, n: int) -> Ids:
    """Ids of the n largest, or of all if they are fewer: largest first, equal ones by ascending id."""
    ids = _first(row, n)
    return ids[np.argsort(-row[ids], kind="stable")]


def scaled(logits: Row, peak: float, temperature: float) -> NDArray[np.float64]:
    """z = (logit - peak) / temperature, elementwise in float64. `peak` is the row's largest, so z <= 0."""
    z = logits.astype(np.float64)
    z -= peak
    if temperature != 1.0:
        z *= 1.0 / max(temperature, _LEAST_TEMPERATURE)
    return z


def total_mass(row: Row, peak: float, temperature: float) -> float:
    """The sum of exp(z) over the vocabulary, in float64: chunks of fixed size, added in order."""
    total = 0.0
    for start in range(0, len(row), _CHUNK):
        z = scaled(row[start : start + _CHUNK], peak, temperature)
        total += float(np.exp(z, out=z).sum())
    return total


def fp32_floor(value: NDArray[np.float64] | float, peak: float) -> NDArray[np.float32]:
    """An fp32 bound safely below `value`, a logit computed in float64 from `peak`: comparing with it keeps
    all that the exact comparison would, and little more."""
    limit = float(np.finfo(np.float32).max)
    return np.clip(value - 1e-5 * (1.0 + abs(value) + abs(peak)), -limit, limit).astype(np.float32)


def _first(row: Row, n: int) -> Ids:
    """Ids of the first n tokens of the order, ascending."""
    if n <= 0:
        return np.empty(0, np.int64)
    if n >= len(row):
        return np.arange(len(row))
    # A partition leaves open which of several equal values it takes; its n-th value is certain.
    last = np.partition(row, len(row) - n)[len(row) - n]
    ids = np.flatnonzero(row >= last)
    if len(ids) > n:
        equal = np.flatnonzero(row[ids] == last)
        ids = np.delete(ids, equal[n - len(ids) :])
    return ids


def _nucleus(row: Row, peak: float, params: SamplingParams, total: float) -> Ids:
    """Ids that top_p keeps of `row`, whose exp(z) sum to `total`; ascending."""
    target = params.top_p * total
    near = np.flatnonzero(row >= fp32_floor(peak - _FIRST_LOOK * params.temperature, peak))
    while True:
        values = row[near]
        mass = np.cumsum(np.exp(scaled(np.sort(values)[::-1], peak, params.temperature)))
        if mass[-1] >= target or len(near) == len(row):
            # Rounding may leave even the whole below the target: then all are kept.
            return near[_first(values, int(np.searchsorted(mass, target, side="left")) + 1)]
        near = np.arange(len(row))


def _likely(row: Row, peak: float, params: SamplingParams) -> Ids:
    """Ids that min_p keeps, ascending."""
    least = math.log(params.min_p)
    near = np.flatnonzero(row >= fp32_floor(peak + params.temperature * least, peak))
    return near[scaled(row[near], peak, params.temperature) >= least]
