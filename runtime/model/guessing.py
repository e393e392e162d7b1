"""Puts a draft model's guesses into the chunks of a plan, on a CPU and on a GPU alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from runtime.model.batch import Run
from runtime.types import Chunk

AskT = TypeVar("AskT")


class Known(Protocol):
    """What a rank knows of a sequence."""

    tokens: list  # of int, None for a newest one that only the device has seen
    blocks: list[int]


class Drafting(Protocol[AskT]):
    """One rank of a draft model. Calls must be made in the same order on every rank."""

    def written(self, blocks: Sequence[int], start: int, stop: int) -> None:
        """The positions start .. stop - 1 of a sequence get other contents."""

    def follow(self, runs: Sequence[Run]) -> None:
        """See tokens of prompts as the model computes them, of those sequences that were seen so far."""

    def guess(self, asks: Sequence[AskT]) -> list[list[int]]:
        """As many tokens for each of `asks` as it wants, at least one."""


def with_guesses(
    chunks: Sequence[Chunk],
    sequences: Sequence[Known],
    drafter: Drafting[AskT],
    ask: Callable[[Chunk], AskT],
) -> list[Chunk]:
    """The chunks, of these sequences, with the guesses that the draft model is asked for in `drafts`."""
    both = list(zip(chunks, sequences, strict=True))
    for chunk, sequence in both:
        stop = chunk.start + chunk.length + len(chunk.drafts) + chunk.guesses
        drafter.written(sequence.blocks, chunk.start, stop)
    prompts = [
        Run(sequence.tokens[chunk.start : chunk.start + chunk.length], chunk.start, sequence.blocks, 0)
        for chunk, sequence in both
        if chunk.length > 1 and not chunk.scores
    ]
    drafter.follow([run for run in prompts if run.tokens[-1] is not None])
    asking = [i for i, chunk in enumerate(chunks) if chunk.guesses]
    if not asking:
        return list(chunks)
    found = dict(zip(asking, drafter.guess([ask(chunks[i]) for i in asking]), strict=True))
    return [
        chunk._replace(drafts=tuple(found[i]), guesses=0) if i in found else chunk
        for i, chunk in enumerate(chunks)
    ]
