"""Pieces of a reply as they are kept while they wait: many as one, their logprobs as plain numbers.

A logprob's object takes some 100 bytes, its numbers 12. Knows nothing of readers and limits.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

from runtime.server.reply import Piece, TokenLogprobs
from runtime.types import TokenLogprob

# What a token with its text and logprob takes, in units of memory of about 16 bytes; an alternative takes 1.
TOKEN = 8


class Held:
    """Consecutive pieces of one choice. `weight` is in units of memory."""

    __slots__ = ("_alternatives", "_counts", "_logprobs", "_own", "_piece", "weight")

    def __init__(self, piece: Piece):
        self.weight = 0
        self._own: array | None = None  # of each token; NaN for none
        self._counts: array  # of each token's alternatives
        self._alternatives: array  # tokens
        self._logprobs: array  # of these
        self._piece = replace(piece, logprobs=())
        self._keep(piece)

    def add(self, piece: Piece) -> None:
        """Put another piece after those that are here."""
        self._piece = merge([self._piece, replace(piece, logprobs=())])
        self._keep(piece)

    def piece(self) -> Piece:
        """All of them as one."""
        if self._own is None:
            return self._piece
        top = map(TokenLogprob, self._alternatives, self._logprobs)
        logprobs = tuple(
            TokenLogprobs(None if math.isnan(own) else own, tuple(next(top) for _ in range(count)))
            for own, count in zip(self._own, self._counts, strict=True)
        )
        return replace(self._piece, logprobs=logprobs)

    def _keep(self, piece: Piece) -> None:
        self.weight += weight(piece)
        if not piece.logprobs:
            return
        if self._own is None:
            self._own, self._counts = array("d"), array("I")
            self._alternatives, self._logprobs = array("I"), array("d")
        for entry in piece.logprobs:
            self._own.append(math.nan if entry.logprob is None else entry.logprob)
            self._counts.append(len(entry.top))
            self._alternatives.extend([each.token for each in entry.top])
            self._logprobs.extend([each.logprob for each in entry.top])


def weight(piece: Piece) -> int:
    """What a piece takes while it waits, in units of memory."""
    return TOKEN * len(piece.token_ids) + sum(len(entry.top) for entry in piece.logprobs)


def merge(pieces: Sequence[Piece]) -> Piece:
    """Consecutive pieces of one choice as one. Only the first may have a `begun`, the last a `final`."""
    return Piece(
        text="".join(piece.text for piece in pieces),
        token_ids=tuple(chain.from_iterable(piece.token_ids for piece in pieces)),
        logprobs=tuple(chain.from_iterable(piece.logprobs for piece in pieces)),
        final=pieces[-1].final,
        choice=pieces[0].choice,
        begun=pieces[0].begun,
    )
