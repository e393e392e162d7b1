"""Which tokens of a row may be sampled: top-k, then top-p, exactly, as one threshold a row.

Tokens are ordered by logit, larger first, equal ones by lower id; each filter keeps a prefix of that order. A
prefix is known by an edge: logits above it stay, of those equal to it the ids below a limit. Logits become
integers of the same order (`order`), and the edge is found by bisection: a pass over the row counts what lies
above a middle, and adds up its exp(z), until one token is left between the bounds or the bounds touch. Any
row needs at most 52 passes, a usual one about a dozen, and no candidate list can fall short.

exp(z) is fp32, its sums fp32 in each lane and then float64; the order of additions depends on the size of the
vocabulary alone, and the sums grow with the prefix, which bisection needs. One program a row.
"""

from __future__ import annotations

import triton
import triton.language as tl

CHUNK = 8192  # logits of one turn; with WARPS, fixes the order of sums: part of `numerics`
WARPS = 16
LEAST_TEMPERATURE = 1e-30  # lower ones act like it

_CHUNK = tl.constexpr(CHUNK)
_LEAST_TEMPERATURE = tl.constexpr(LEAST_TEMPERATURE)
_EVERYTHING = tl.constexpr(-(2**31))  # below the order of every number, -inf included
_BY_VALUE = tl.constexpr(20)  # passes that halve the range of values, before those that halve their order
_FAR = tl.constexpr(40.0)  # where to look first below the peak; no effect on what is found


@triton.jit
def order(x):
    """int32 with the order of fp32 x; both zeros are one."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def value(key):
    """The fp32 whose order is `key`, int64."""
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def inverse_temperature(temperature):
    """float64; `temperature` is one too."""
    return 1.0 / tl.maximum(temperature, tl.full((), _LEAST_TEMPERATURE, tl.float64))


@triton.jit
def _above(row_ptr, least, peak, scale, V: tl.constexpr, MASS: tl.constexpr):
    """Tokens of order `least` and up: how many (int32), their exp((x - peak) * scale) added up (float64)."""
    lane = tl.arange(0, _CHUNK)
    count = tl.zeros((_CHUNK,), tl.int32)
    mass = tl.zeros((_CHUNK,), tl.float32)
    for start in range(0, V, _CHUNK):
        at = start + lane
        x = tl.load(row_ptr + at, mask=at < V, other=float("-inf"))
        inside = (order(x) >= least) & (at < V)
        count += inside.to(tl.int32)
        if MASS:
            mass += tl.where(inside, tl.exp((x - peak) * scale), 0.0)
    total = tl.sum(count, axis=0)
    if MASS:
        return total, tl.sum(mass.to(tl.float64), axis=0)
    else:
        return total, tl.full((), 0.0, tl.float64)


@triton.jit
def _middle(low, high, peak, spread, turn):
    """An order strictly between two that do not touch."""
    deep = tl.maximum(value(low), peak - spread)
    by_value = order(0.5 * deep + 0.5 * value(high)).to(tl.int64)
    by_value = tl.minimum(tl.maximum(by_value, low + 1), high - 1)
    return tl.where(turn < _BY_VALUE, by_value, (low + high) >> 1)


@triton.jit
def _limit(row_ptr, edge, ties, V: tl.constexpr):
    """The first `ties` ids whose logit has the order `edge` are those below this one."""
    lane = tl.arange(0, _CHUNK)
    seen = tl.full((), 0, tl.int32)
    limit = tl.full((), V, tl.int32)
    for start in range(0, V, _CHUNK):
        at = start + lane
        x = tl.load(row_ptr + at, mask=at < V, other=float("nan"))
        equal = ((order(x) == edge) & (at < V)).to(tl.int32)
        rank = seen + tl.cumsum(equal, axis=0)
        limit = tl.minimum(limit, tl.min(tl.where((equal > 0) & (rank == ties), at + 1, V), axis=0))
        seen += tl.sum(equal, axis=0)
    return limit


@triton.jit
def threshold(row_ptr, peak, temperature, top_k, top_p, V: tl.constexpr):
    """(edge, limit) of a row of V logits whose largest, `peak`, is finite: a token stays if its order is
    above `edge`, or equal to it and its id below `limit`. temperature and top_p: float64; top_k: int32."""
    scale = inverse_temperature(temperature).to(tl.float32)
    over = order(peak).to(tl.int64) + 1  # nothing is above
    edge = tl.full((), _EVERYTHING, tl.int64)
    ties = tl.full((), 0, tl.int32)
    held = tl.full((), V, tl.int32)

    if (top_k > 0) & (top_k < V):
        low, high = edge, over
        turn = tl.full((), 0, tl.int32)
        fewer = tl.full((), 0, tl.int32)  # tokens at `high` and above, fewer than top_k; `held` at `low`
        while (high - low > 1) & (held != top_k):
            middle = _middle(low, high, peak, _FAR, turn)
            count, _ = _above(row_ptr, middle, peak, scale, V, False)
            enough = count >= top_k
            low = tl.where(enough, middle, low)
            held = tl.where(enough, count, held)
            high = tl.where(enough, high, middle)
            fewer = tl.where(enough, fewer, count)
            turn += 1
        # Either `low` cuts exactly, or what has the order of `low` fits only in part.
        whole = held == top_k
        edge = tl.where(whole, low - 1, low)
        ties = tl.where(whole, 0, top_k - fewer).to(tl.int32)
        held = tl.minimum(held, top_k.to(tl.int32))

    if top_p < 1.0:
        one = tl.exp((value(edge) - peak) * scale).to(tl.float64)
        _, total = _above(row_ptr, edge + 1, peak, scale, V, True)
        total = tl.where(ties > 0, total + ties * one, total)
        target = top_p * total
        low, high = edge, over
        turn = tl.full((), 0, tl.int32)
        fewer = tl.full((), 0, tl.int32)
        below = tl.full((), 0.0, tl.float64)  # the mass at `high` and above, less than the target
        while (high - low > 1) & (held - fewer > 1):
            middle = _middle(low, high, peak, _FAR * temperature.to(tl.float32), turn)
            count, mass = _above(row_ptr, middle, peak, scale, V, True)
            enough = mass >= target
            low = tl.where(enough, middle, low)
            held = tl.where(enough, count, held)
            high = tl.where(enough, high, middle)
            fewer = tl.where(enough, fewer, count)
            below = tl.where(enough, below, mass)
            turn += 1
        if held - fewer > 1:  # equal logits: as many as the target wants
            one = tl.exp((value(low) - peak) * scale).to(tl.float64)
            wanted = tl.ceil((target - below) / one)
            most = (held - fewer).to(tl.float64)
            ties = tl.minimum(tl.maximum(wanted, 1.0), most).to(tl.int32)
            edge = low
        else:
            ties = tl.where(low == edge, ties, 0)
            edge = tl.where(low == edge, edge, low - 1)

    limit = tl.full((), 0, tl.int32)
    if ties > 0:
        limit = _limit(row_ptr, edge, ties, V)
    return edge, limit
