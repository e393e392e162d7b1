"""What sampling remembers of a sequence: which tokens it holds, for penalties, and how long its reply is.

A sparse table with a row for each token that bias or penalties touch, grown as tokens arrive, so that a
step costs what was touched and not the vocabulary. Knows nothing of temperature, filters or noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import numpy as np
from numpy.typing import NDArray

from runtime.types import SamplingParams

_FP32_MAX = float(np.finfo(np.float32).max)


class SamplerState:
    """The sampler's memory of one running sequence.

    Adjusted logit of a token, in float64 from the fp32 logit, rounded once to fp32:
        l + bias, then l / repetition if l > 0 else l * repetition (tokens of prompt or reply), then
        l - presence (tokens of the reply) - frequency * occurrences in the reply.
    While the reply is shorter than min_tokens the `stop_ids` are -inf.
    Raises ValueError for a token outside the vocabulary, and for a missing seed where one is needed.
    """

    __slots__ = (
        "_bias", "_count", "_ids", "_in_text", "_reply_length", "_size", "_slots", "_stop_ids", "choice",
        "params", "vocab_size",
    )  # fmt: skip

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        reply: Sequence[int],
        stop_ids: Sequence[int],
        vocab_size: int,
        choice: int = 0,
    ):
        """`choice`: which of a request's replies this is; it keys the noise and nothing else."""
        if params.temperature > 0.0 and params.seed is None:
            raise ValueError("sampling at a temperature above 0 needs a seed")
        self.params = params
        self.choice = choice
        self.vocab_size = vocab_size
        self._stop_ids = _tokens("stop_ids", stop_ids, vocab_size)
        self._reply_length = len(reply)
        self._slots: dict[int, int] = {}  # token -> row of the table
        self._size = 0
        self._ids = np.empty(16, np.int64)
        self._bias = np.zeros(16)
        self._in_text = np.zeros(16, bool)  # in prompt or reply
        self._count = np.zeros(16)  # occurrences in the reply
        biased = _tokens("logit_bias", [token for token, _ in params.logit_bias], vocab_size)
        for token, (_, bias) in zip(biased.tolist(), params.logit_bias, strict=True):
            slot = self._slot(token)  # first: it may replace the arrays
            self._bias[slot] += bias
        before = _tokens("prompt", prompt, vocab_size)
        after = _tokens("reply", reply, vocab_size)
        if params.repetition_penalty != 1.0:
            for token in np.unique(before).tolist():
                slot = self._slot(token)
                self._in_text[slot] = True
        if self._penalises:
            for token, count in zip(*(a.tolist() for a in np.unique(after, return_counts=True)), strict=True):
                self._count_token(token, count)

    def copy(self) -> SamplerState:
        """One that goes on from here by itself."""
        other = copy(self)
        other._slots = dict(self._slots)
        for name in ("_ids", "_bias", "_in_text", "_count"):
            setattr(other, name, getattr(self, name).copy())
        return other

    def append(self, token: int) -> None:
        """Takes the token that was sampled last into the reply."""
        self._reply_length += 1
        if self._penalises:
            self._count_token(token, 1)

    def adjusted(self, row: NDArray[np.float32]) -> NDArray[np.float32]:
        """`row` [vocab] after bias, penalties and the ban of early stops: a copy, or `row` itself where
        nothing applies. `row` holds no NaN and no +inf, nor does the result."""
        early = self._reply_length < self.params.min_tokens and len(self._stop_ids) > 0
        if not early and self._size == 0:
            return row
        row = row.copy()
        if self._size:
            ids = self._ids[: self._size]
            row[ids] = self._touched(row[ids].astype(np.float64))
        if early:
            row[self._stop_ids] = -np.inf
        return row

    def _touched(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        params, size = self.params, self._size
        values += self._bias[:size]
        if params.repetition_penalty != 1.0:
            repetition = params.repetition_penalty
            penalised = np.where(values > 0.0, values / repetition, values * repetition)
            values = np.where(self._in_text[:size], penalised, values)
        count = self._count[:size]
        values -= params.presence_penalty * (count > 0.0)
        values -= params.frequency_penalty * count
        # -inf stays what it is: a token that the model excludes.
        return np.clip(values, -_FP32_MAX, _FP32_MAX, out=values, where=values > -np.inf)

    @property
    def _penalises(self) -> bool:
        p = self.params
        return p.repetition_penalty != 1.0 or p.presence_penalty != 0.0 or p.frequency_penalty != 0.0

    def _count_token(self, token: int, times: int) -> None:
        slot = self._slot(token)
        self._in_text[slot] = True
        self._count[slot] += times

    def _slot(self, token: int) -> int:
        """The token's row in the table, made if it has none."""
        slot = self._slots.get(token)
        if slot is not None:
            return slot
        slot = self._slots[token] = self._size
        if slot == len(self._ids):
            self._ids, self._bias, self._in_text, self._count = (
                np.concatenate([a, np.zeros_like(a)])
                for a in (self._ids, self._bias, self._in_text, self._count)
            )
        self._ids[slot] = token
        self._size += 1
        return slot


def _tokens(what: str, tokens: Sequence[int], vocab_size: int) -> NDArray[np.int64]:
    ids = np.array(tokens, np.int64)
    if len(ids) and (ids.min() < 0 or ids.max() >= vocab_size):
        wrong = next(token for token in tokens if not 0 <= token < vocab_size)
        raise ValueError(f"{what}: token {wrong} is outside the vocabulary of {vocab_size}")
    return ids
