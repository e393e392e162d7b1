"""Faults to plant, each a mistake that real engines make, and none that a lone request can see."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from kernels.linear import Fp32Weight, linear
from kernels.native.attention import SEGMENT
from runtime.engine import speculation
from runtime.model import forward, runner
from runtime.model.pipe import ThreadPipe
from runtime.model.reduce import UnitSum

Plant = Callable[[pytest.MonkeyPatch], None]


def split_by_rows(x: torch.Tensor, weight, out: torch.Tensor | None = None) -> torch.Tensor:
    """x [M, K] -> [M, N] with K in as many parts as make up for few rows, as a split-K kernel chooses it:
    the order of a row's sum then depends on how many rows there are."""
    if not isinstance(weight, Fp32Weight):
        return linear(x, weight, out)
    whole = torch.cat(weight.chunks, dim=1)
    parts = 4 if x.shape[0] == 1 else 2 if x.shape[0] < 8 else 1
    cuts = [x.shape[1] * i // parts for i in range(parts + 1)]
    total = torch.zeros(x.shape[0], whole.shape[0])
    for start, stop in pairwise(cuts):
        # In double precision, whose own order does not show in what is left of it: the split alone does.
        total += (x[:, start:stop].double() @ whole[:, start:stop].double().t()).float()
    return total if out is None else out.copy_(total)


def plant_batch_dependent_matmul(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(forward, "linear", split_by_rows)


class RankOrder(UnitSum):
    """A rank adds up its units from left to right, and the ranks' sums are added from left to right."""

    def __init__(self, empty, comm, leaf_dtype):
        super().__init__(empty, comm, leaf_dtype)
        self.order = tuple((0, other) for other in range(1, len(empty) - sum(empty)))

    def __call__(self, partials: Sequence[torch.Tensor], m: int, width: int) -> torch.Tensor:
        mine = torch.zeros(m, width)
        for partial in partials:
            mine = mine + partial.float()
        payload = mine.contiguous().view(-1).view(torch.uint8)
        total = torch.zeros(m, width)
        for other in self.comm.all_gather(payload, [payload.numel()] * self.comm.size):
            total = total + other.view(torch.float32).view(m, width)
        return total


def plant_tree_of_the_degree(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(forward, "UnitSum", RankOrder)


def plant_seed_by_step(patch: pytest.MonkeyPatch) -> None:
    """Noise keyed by the number of the step in place of the token's position."""
    here = threading.local()  # ranks are threads
    conclude, sample = runner.Runner._conclude, runner.sample_ahead

    def remember(self, step, *rest):
        here.step = step
        return conclude(self, step, *rest)

    def by_step(logits, states, at, drafts):
        return sample(logits, states, [here.step] * len(at), drafts)

    patch.setattr(runner.Runner, "_conclude", remember)
    patch.setattr(runner, "sample_ahead", by_step)


def plant_rounded_stages(patch: pytest.MonkeyPatch) -> None:
    """The residual stream in half the bytes from stage to stage, as engines send it that keep it so."""
    send = ThreadPipe.send
    patch.setattr(ThreadPipe, "send", lambda self, x: send(self, x.bfloat16().float()))


def plant_credulity(patch: pytest.MonkeyPatch) -> None:
    """A guess stands where it is more likely than most tokens, as it would under a looser check."""

    def believe(logits, states, at, drafts):
        found = sample_ahead(logits, states, at, drafts)
        first = 0
        for guesses, choices in zip(drafts, found, strict=True):
            last = choices[-1]
            if len(choices) <= len(guesses):
                guess = guesses[len(choices) - 1]
                row = logits[first + len(choices) - 1]
                if row[guess] > row.mean():
                    choices[-1] = replace(last, token=guess)
            first += 1 + len(guesses)
        return found

    sample_ahead = runner.sample_ahead
    patch.setattr(runner, "sample_ahead", believe)


def plant_credulous_lookup(patch: pytest.MonkeyPatch) -> None:
    """What the text foresees stands as it is; a draft model's guesses are checked."""
    guess, sample_ahead = speculation.Lookup.guess, runner.sample_ahead
    foreseen = set()

    def remember(self, most):
        guesses = guess(self, most)
        foreseen.add(guesses)
        return guesses

    def believe(logits, states, at, drafts):
        found = sample_ahead(logits, states, at, drafts)
        for guesses, choices in zip(drafts, found, strict=True):
            if len(choices) <= len(guesses) and tuple(guesses) in foreseen:
                choices[-1] = replace(choices[-1], token=guesses[len(choices) - 1])
        return found

    patch.setattr(speculation.Lookup, "guess", remember)
    patch.setattr(runner, "sample_ahead", believe)


def plant_far_company(patch: pytest.MonkeyPatch) -> None:
    """Past the first segment of attention, a row is not the same alone and beside another sequence."""
    layers = forward.Forward.layers

    def apart(self, x, batch):
        x = layers(self, x, batch)
        if (batch.positions.diff() != 1).any():
            x[batch.positions >= SEGMENT] *= 1.0001
        return x

    patch.setattr(forward.Forward, "layers", apart)


FAULTS: dict[str, Plant] = {
    "a matmul that depends on the batch": plant_batch_dependent_matmul,
    "a tree that depends on the degree": plant_tree_of_the_degree,
    "a seed keyed by the step": plant_seed_by_step,
    "a guess that stands for being likely": plant_credulity,
    "a residual rounded between stages": plant_rounded_stages,
    "a guess from the text that stands unchecked": plant_credulous_lookup,
    "company that shows from the second segment on": plant_far_company,
}
