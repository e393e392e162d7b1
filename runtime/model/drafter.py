"""Guesses the next tokens of sequences with a draft model: a smaller one with the same vocabulary.

It runs on the ranks of the model that it guesses for, cut into units as that one is, and keeps its keys and
values by the same block tables; so what the engine shares, evicts or preempts is so for both. Guesses are
sampled with the same parameters and noise as the tokens they stand for, which makes them right as often as
the two models agree. Nothing that is sent depends on them.

What the draft model has seen of a block (seen.py) falls behind while no one asks it; it catches up when it
is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from runtime.model.batch import BatchMaker, Run
from runtime.model.communicator import Communicator
from runtime.model.forward import Forward, new_cache
from runtime.model.seen import Seen
from runtime.model.shard import Shard
from runtime.sampling.sampler import SamplerState, sample


@dataclass(frozen=True, slots=True)
class Ask:
    """Guesses wanted for a sequence."""

    tokens: list[int]  # all that are known
    blocks: list[int]  # its block table, with room for the guesses
    count: int
    sampler: SamplerState | None  # rank 0 only; not advanced


class Drafter:
    """One rank of a group. Calls must be made in the same order on every rank."""

    def __init__(
        self,
        shard: Shard,
        comm: Communicator,
        *,
        total_blocks: int,
        block_size: int,
        max_positions: int,
    ):
        """shard: of the draft model; the rest as of the model's own runner."""
        self._forward = Forward(shard, new_cache(shard, total_blocks, block_size), comm, max_positions)
        self._batches = BatchMaker(shard.spec, shard.dtype, block_size, total_blocks)
        self._seen = Seen(total_blocks, block_size)

    @property
    def cache_bytes(self) -> int:
        return self._forward.cache.nbytes

    def written(self, blocks: Sequence[int], start: int, stop: int) -> None:
        """The positions start .. stop - 1 of a sequence get other contents."""
        self._seen.written(blocks, start, stop)

    def follow(self, runs: Sequence[Run]) -> None:
        """See tokens of prompts as the model computes them, of those sequences that were seen so far."""
        if fresh := self._seen.next_to(runs):
            self._run(fresh)

    def guess(self, asks: Sequence[Ask]) -> list[list[int]]:
        """As many tokens for each of `asks` as it wants, at least one."""
        for ask in asks:
            for piece in self._seen.missing(ask.tokens, ask.blocks)[:-1]:
                self._run([piece])
        runs = [self._seen.missing(ask.tokens, ask.blocks)[-1] for ask in asks]
        samplers = [ask.sampler.copy() if ask.sampler is not None else None for ask in asks]
        found: list[list[int]] = [[] for _ in asks]
        wanting = list(range(len(asks)))
        while wanting:
            positions = [len(asks[i].tokens) + len(found[i]) for i in wanting]
            logits = self._run(runs)
            tokens = self._sample(logits, [samplers[i] for i in wanting], positions)
            for i, token in zip(wanting, tokens, strict=True):
                found[i].append(token)
            wanting = [i for i in wanting if len(found[i]) < asks[i].count]
            runs = [
                Run([found[i][-1]], len(asks[i].tokens) + len(found[i]) - 1, asks[i].blocks, 1)
                for i in wanting
            ]
        return found

    def _run(self, runs: Sequence[Run]) -> torch.Tensor | None:
        """fp32 logits [samples, V] at rank 0."""
        hidden = self._forward.hidden(self._batches.make(runs))
        self._seen.run(runs)
        return self._forward.logits(hidden) if hidden.shape[0] else None

    def _sample(
        self, logits: torch.Tensor | None, samplers: list[SamplerState | None], positions: list[int]
    ) -> list[int]:
        comm = self._forward.comm
        if logits is None:
            return comm.broadcast(None, 8 * len(positions)).view(torch.int64).tolist()
        # Where there is no number to choose by, token 0 is as good a guess as any.
        tokens = [max(choice.token, 0) for choice in sample(logits, samplers, positions)]
        for sampler, token in zip(samplers, tokens, strict=True):
            sampler.append(token)
        if comm.size > 1:
            told = torch.tensor(tokens, dtype=torch.int64)
            comm.broadcast(told.view(torch.uint8), told.nbytes)
        return tokens
