"""Guesses the next tokens of sequences with a draft model on a GPU, as `runtime.model.drafter` does on a CPU.

The guesses stay on the device until the last of them: each step starts from the one before it, and the host
waits once, for all. Single tokens run in captured steps, as the model's own do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from runtime.model.batch import Run
from runtime.model.gpu.batch import LENGTHS, Unseen
from runtime.model.gpu.sampler import DeviceSampler
from runtime.model.gpu.steps import Steps
from runtime.model.seen import Seen

_FEW = LENGTHS[1]  # rows of a sequence that cost a step little more than one


@dataclass(frozen=True, slots=True)
class GpuAsk:
    """Guesses wanted for a sequence."""

    tokens: list[int]  # all that are known, and all that there are: none is in flight
    blocks: list[int]  # its block table, with room for the guesses
    count: int
    slot: int  # its sampler's; not advanced


class GpuDrafter:
    """One rank of a group. Calls must be made in the same order on every rank."""

    def __init__(self, steps: Steps, sampler: DeviceSampler, *, total_blocks: int, block_size: int):
        """steps: of the draft model, in as many blocks as the model's own; sampler: the model's, which has
        the sequences' state at rank 0."""
        self.steps = steps
        self._comm = steps.forward.comm
        self._sampler = sampler
        self._seen = Seen(total_blocks, block_size)

    @property
    def cache_bytes(self) -> int:
        return self.steps.cache_bytes

    def written(self, blocks: Sequence[int], start: int, stop: int) -> None:
        """The positions start .. stop - 1 of a sequence get other contents."""
        self._seen.written(blocks, start, stop)

    def follow(self, runs: Sequence[Run]) -> None:
        """See tokens of prompts as the model computes them, of those sequences that were seen so far."""
        if fresh := self._seen.next_to(runs):
            self._run(fresh)

    def guess(self, asks: Sequence[GpuAsk]) -> list[list[int]]:
        """As many tokens for each of `asks` as it wants, at least one. Waits for the device."""
        for ask in asks:
            for piece in self._seen.missing(ask.tokens, ask.blocks)[:-1]:
                self._run([piece])
        # Whoever wants the most comes first: those that go on are always the first ones then.
        order = sorted(range(len(asks)), key=lambda i: -asks[i].count)
        sorted_asks = [asks[i] for i in order]
        found = torch.zeros((len(asks), sorted_asks[0].count), dtype=torch.int32, device=self.steps.device)
        logits = self._catch_up(sorted_asks)
        for ahead in range(found.shape[1]):
            going = [ask for ask in sorted_asks if ask.count > ahead]
            if ahead:
                runs = [Run([0], len(ask.tokens) + ahead - 1, ask.blocks, 1) for ask in going]
                last = found[: len(going), ahead - 1]
                logits = self._run(runs, Unseen(list(range(len(going))), last))
            found[: len(going), ahead] = self._choose(logits, going, ahead)
        told = found.tolist()  # the one copy to the host
        guesses: list[list[int]] = [[] for _ in asks]
        for i, ask, tokens in zip(order, sorted_asks, told, strict=True):
            guesses[i] = tokens[: ask.count]
        return guesses

    def _catch_up(self, asks: Sequence[GpuAsk]) -> torch.Tensor | None:
        """Run what is missing of the asks' tokens; fp32 logits [asks, V] after them, at rank 0."""
        runs = [self._seen.missing(ask.tokens, ask.blocks)[-1] for ask in asks]
        lengths = [len(run.tokens) for run in runs]
        if max(lengths) > _FEW:
            return self._run(runs)
        # Captured steps give every row's logits; one or two rows each are what mostly comes.
        logits = self._run([replace(run, samples=len(run.tokens)) for run in runs])
        if logits is None or max(lengths) == 1:
            return logits
        rows = torch.tensor([stop - 1 for stop in accumulate(lengths)])
        return logits.index_select(0, rows.to(self.steps.device, non_blocking=True))

    def _run(self, runs: Sequence[Run], unseen: Unseen | None = None) -> torch.Tensor | None:
        logits = self.steps.logits(runs, unseen)
        self._seen.run(runs)
        return logits

    def _choose(self, logits: torch.Tensor | None, asks: Sequence[GpuAsk], ahead: int) -> torch.Tensor:
        """The guesses int32 [asks] by these logits, on every rank's device."""
        mine = torch.zeros(len(asks), dtype=torch.int32, device=self.steps.device)
        if logits is not None:
            positions = [len(ask.tokens) + ahead for ask in asks]
            mine = self._sampler.choose(logits, [ask.slot for ask in asks], positions)
            # Logits without a number to choose by give -1, which is no token. Any other is a guess.
            mine = mine.clamp(min=0)
        if self._comm.size == 1:
            return mine
        sent = self._comm.all_gather(mine.view(torch.uint8), [mine.nbytes] * self._comm.size)
        return sent[0].view(torch.int32)
