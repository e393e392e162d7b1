"""Sampling as it is meant, one token at a time in plain Python: slow, and easy to see right.

It shares no code with runtime.sampling; it draws noise for every token and sorts everything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from runtime.types import SamplingParams

MASK = 0xFFFFFFFF


def philox(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    c, k = list(counter), list(key)
    for _ in range(10):
        p, q = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(q >> 32) ^ c[1] ^ k[0], q & MASK, (p >> 32) ^ c[3] ^ k[1], p & MASK]
        k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
    return c


def exponential(words: Sequence[int]) -> float:
    bits = (words[0] << 20) | (words[1] >> 12)
    return -math.log((bits + 0.5) / 2**52)


def gumbel(seed: int, position: int, token: int, choice: int = 0) -> float:
    """Noise of a token: the block's least exponential for the one that holds it, more for the others."""
    key = (seed & MASK, seed >> 32)
    block = philox((token // 256, position, choice, 1), key)
    e = exponential(block) / 256
    if token % 256 != block[2] >> 24:
        e += exponential(philox((token, position, choice, 0), key))
    return -math.log(e)


def adjusted(
    logits: Sequence[float],
    params: SamplingParams,
    prompt: Sequence[int],
    reply: Sequence[int],
    stop_ids: Sequence[int],
) -> list[float]:
    bias = dict(params.logit_bias)
    out = []
    for token, logit in enumerate(logits):
        value = float(logit) + bias.get(token, 0.0)
        if token in prompt or token in reply:
            if value > 0:
                value /= params.repetition_penalty
            else:
                value *= params.repetition_penalty
        count = list(reply).count(token)
        if count > 0:
            value -= params.presence_penalty
            value -= params.frequency_penalty * count
        if token in stop_ids and len(reply) < params.min_tokens:
            value = -math.inf
        out.append(float(np.float32(value)))
    return out


class NearTie(Exception):
    """Rounding decides here, so that a comparison of two correct programs proves nothing."""


def survivors(logits: Sequence[float], params: SamplingParams) -> list[int]:
    """Ids that pass the filters, most likely first."""
    peak = max(logits)
    z = [(logit - peak) / params.temperature for logit in logits]
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if params.top_k > 0:
        order = order[: params.top_k]
    if params.top_p < 1.0:
        total = math.fsum(math.exp(z[token]) for token in order)
        mass = [math.exp(z[token]) for token in order]
        n = 1
        while n < len(order) and math.fsum(mass[:n]) < params.top_p * total:
            n += 1
        for m in (n - 1, n):
            if m and abs(math.fsum(mass[:m]) / total - params.top_p) < 1e-12:
                raise NearTie
        order = order[:n]
    if params.min_p > 0.0:
        least = math.log(params.min_p)
        if any(z[token] != 0.0 and abs(z[token] - least) < 1e-12 for token in order):
            raise NearTie
        order = [token for token in order if z[token] >= least]
    return [token for token in order if logits[token] > -math.inf]


def token(
    logits: Sequence[float],
    params: SamplingParams,
    prompt: Sequence[int],
    reply: Sequence[int],
    stop_ids: Sequence[int],
    position: int,
    choice: int = 0,
) -> int:
    logits = adjusted(logits, params, prompt, reply, stop_ids)
    peak = max(logits)
    if params.temperature == 0.0:
        return logits.index(peak)
    best, chosen = -math.inf, -1
    for candidate in sorted(survivors(logits, params)):
        value = (logits[candidate] - peak) / params.temperature
        value += gumbel(params.seed, position, candidate, choice)
        if value > best:
            best, chosen = value, candidate
    return chosen


def logprobs(logits: Sequence[float]) -> list[float]:
    peak = max(logits)
    total = peak + math.log(math.fsum(math.exp(logit - peak) for logit in logits))
    return [logit - total for logit in logits]
