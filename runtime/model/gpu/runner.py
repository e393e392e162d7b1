"""Executes step plans on one rank's GPU: keeps the state of sequences, runs the model, samples.

The counterpart of `runtime.model.runner`, with the same calls, and with one that starts a plan before the
last one's tokens are known. What a step runs is `steps`' business, which also captures it in graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch

from runtime.model.batch import Run
from runtime.model.communicator import Communicator
from runtime.model.gpu.batch import Unseen
from runtime.model.gpu.drafter import GpuAsk, GpuDrafter
from runtime.model.gpu.sampler import CLOSED, DeviceSampler
from runtime.model.gpu.shard import GpuShard
from runtime.model.gpu.steps import Steps
from runtime.model.guessing import with_guesses
from runtime.model.runner import Watch
from runtime.sampling.sampler import NO_TOKEN
from runtime.sampling.score import score
from runtime.types import Chunk, SampledToken, SequenceStart, StepPlan, StepResult, TokenScore


@dataclass(slots=True)
class _Sequence:
    tokens: list[int | None]  # None: sampled, and not seen by the host yet
    logprobs: int | None
    blocks: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Launched:
    """A plan whose work is under way."""

    step: int
    chunks: list[Chunk]  # those that sample
    sequences: list[_Sequence]  # theirs; a slot may belong to another by the time they are collected
    tokens: torch.Tensor | None  # [chunks, 1 + guesses] at rank 0; these are host tensors, filled once `done`
    logits: dict[int, torch.Tensor]  # of chunks whose logprobs are wanted: scored as given tokens are
    scores: tuple[tuple[TokenScore, ...], ...]
    done: torch.cuda.Event | None


class GpuRunner:
    """One rank of a group. Calls must be made in the same order on every rank."""

    def __init__(
        self,
        shard: GpuShard,
        comm: Communicator,
        *,
        total_blocks: int,
        block_size: int,
        max_positions: int,
        draft: GpuShard | None = None,
        graphs: bool | None = None,
    ):
        """draft: this rank's share of a draft model; `graphs`: as for `Steps`."""
        room = {"total_blocks": total_blocks, "block_size": block_size}
        settings = {**room, "max_positions": max_positions, "graphs": graphs}
        self.steps = Steps(shard, comm, **settings)
        self.forward = self.steps.forward
        self.comm = comm
        self.block_size = block_size
        self._sampler = DeviceSampler(shard.spec.vocab, shard.device)
        self._drafter = None
        if draft is not None:
            self._drafter = GpuDrafter(Steps(draft, comm, **settings), self._sampler, **room)
        self._sequences: dict[int, _Sequence] = {}
        self.watch: Watch | None = None

    @property
    def cache_bytes(self) -> int:
        return self.steps.cache_bytes + (self._drafter.cache_bytes if self._drafter else 0)

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one plan. Rank 0 returns what was sampled; the others return the tokens alone."""
        return self.collect(self.launch(plan))

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Launched:
        """Start a plan's work and return without waiting for it. In a group of one, the next plan may be
        launched before this one is collected: tokens that the host has not seen are taken from the device."""
        self._apply(plan)
        chunks = list(plan.chunks) if self._drafter is None else self._guess(plan.chunks)
        chosen = [chunk for chunk in chunks if chunk.samples]
        scored = [chunk for chunk in chunks if chunk.scores]
        sequences = [self._sequences[chunk.slot] for chunk in chosen]
        logits = self._logits(chunks) if chunks else None
        scores = ()
        first = list(accumulate((1 + len(chunk.drafts) for chunk in chosen), initial=0))
        if scored and logits is not None:
            scores = self._scores(scored, logits[first[-1] :])
            logits = logits[: first[-1]]
        tokens = done = None
        kept: dict[int, torch.Tensor] = {}
        if chosen and self.comm.rank == 0:
            for row, sequence in enumerate(sequences):
                if sequence.logprobs is not None:
                    kept[row] = _to_host(logits[first[row] : first[row + 1]])
            slots, positions = [c.slot for c in chosen], [c.start + c.length for c in chosen]
            # Copied here, not when they are collected: a later copy would queue behind the next plan.
            drafts = [chunk.drafts for chunk in chosen]
            tokens = _to_host(self._sampler.sample_ahead(logits.contiguous(), slots, positions, drafts))
            if self.steps.device.type == "cuda":
                done = torch.cuda.Event()
                done.record()
        for sequence in sequences:
            sequence.tokens.append(None)
        return Launched(plan.step, chosen, sequences, tokens, kept, scores, done)

    @torch.inference_mode()
    def collect(self, launched: Launched) -> StepResult:
        """Wait for a plan's tokens. Plans are collected in the order they were launched."""
        chunks = launched.chunks
        if not chunks:
            return StepResult(launched.step, (), launched.scores)
        if launched.done is not None:
            launched.done.synchronize()
        width = 1 + max(len(chunk.drafts) for chunk in chunks)
        if launched.tokens is not None:
            ids = launched.tokens.long().view(-1)
            if self.comm.size > 1:
                self.comm.broadcast(ids.view(torch.uint8), ids.nbytes)
        else:
            ids = self.comm.broadcast(None, 8 * width * len(chunks)).view(torch.int64)
        found = []
        for row, (chunk, sequence, ahead) in enumerate(
            zip(chunks, launched.sequences, ids.view(-1, width).tolist(), strict=True)
        ):
            tokens = [token for token in ahead if token != CLOSED]
            # Plans go on from the one token of a plan that was not collected, never from guesses. One that
            # goes on from NO_TOKEN is nobody's.
            known = chunk.start + chunk.length
            sequence.tokens[known : known + 1] = [max(token, 0) for token in tokens]
            if row not in launched.logits:
                found += [SampledToken(chunk.slot, token) for token in tokens]
                continue
            sound = [token for token in tokens if token != NO_TOKEN]
            scores = score(launched.logits[row][: len(sound)], sound, sequence.logprobs)
            found += [
                SampledToken(chunk.slot, token, scored.logprob, scored.top)
                for token, scored in zip(sound, scores, strict=True)
            ]
            found += [SampledToken(chunk.slot, NO_TOKEN)] * (len(tokens) - len(sound))
        return StepResult(launched.step, tuple(found), launched.scores)

    def _apply(self, plan: StepPlan) -> None:
        """What a plan says of slots and blocks, before anything is computed."""
        for slot in plan.ends:
            del self._sequences[slot]
        for start in plan.starts:
            self._sequences[start.slot] = self._begin(start)
        for chunk in plan.chunks:
            self._sequences[chunk.slot].blocks.extend(chunk.new_blocks)

    def _begin(self, start: SequenceStart) -> _Sequence:
        if self.comm.rank == 0:
            self._sampler.start(start)
        return _Sequence(list(start.tokens), start.params.logprobs)

    def _scores(self, chunks: list[Chunk], logits: torch.Tensor) -> tuple[tuple[TokenScore, ...], ...]:
        """The scores of the tokens after each row of `chunks`, whose logits are given."""
        found: list[tuple[TokenScore, ...]] = []
        first = 0
        for chunk in chunks:
            sequence = self._sequences[chunk.slot]
            targets = sequence.tokens[chunk.start + 1 : chunk.start + chunk.length + 1]
            rows = logits[first : first + chunk.length]
            if self.watch is not None:
                self.watch(rows, targets)
            found.append(score(rows, targets, sequence.logprobs or 0))
            first += chunk.length
        return tuple(found)

    def _guess(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """The chunks with the guesses that the draft model is asked for, which the host waits for."""
        sequences = [self._sequences[chunk.slot] for chunk in chunks]

        def ask(chunk: Chunk) -> GpuAsk:
            sequence = self._sequences[chunk.slot]
            if sequence.tokens[-1] is None:
                raise ValueError(f"slot {chunk.slot}: guesses are wanted while a token is in flight")
            return GpuAsk(sequence.tokens, sequence.blocks, chunk.guesses, chunk.slot)

        return with_guesses(chunks, sequences, self._drafter, ask)

    def _logits(self, chunks: Sequence[Chunk]) -> torch.Tensor | None:
        """fp32 [wanted, V] at rank 0: rows of samples in the order of the plan's chunks, then scored ones."""
        return self.steps.logits(*self._runs(chunks))

    def _runs(self, chunks: Sequence[Chunk]) -> tuple[list[Run], Unseen | None]:
        """What a plan's chunks run, and the tokens of it that only the device knows."""
        runs: list[Run] = []
        rows: list[int] = []  # those whose token only the device knows
        slots: list[int] = []  # theirs
        count = 0
        for chunk in chunks:
            sequence = self._sequences[chunk.slot]
            stop = chunk.start + chunk.length
            known = sequence.tokens[chunk.start : stop]
            if len(known) != chunk.length or (None in known and self.comm.size > 1):
                raise ValueError(f"slot {chunk.slot}: tokens up to {stop} are not known to this rank")
            if known[-1] is None:  # no more than the newest can be unknown
                rows.append(count + chunk.length - 1)
                slots.append(chunk.slot)
                known[-1] = 0
            samples = 1 + len(chunk.drafts) if chunk.samples else 0
            runs.append(Run([*known, *chunk.drafts], chunk.start, sequence.blocks, samples, chunk.scores))
            count += len(runs[-1].tokens)
        unseen = None
        if rows:
            of = torch.tensor(slots).to(self.steps.device, non_blocking=True)
            unseen = Unseen(rows, self._sampler.last.index_select(0, of))
        return runs, unseen


def _to_host(values: torch.Tensor) -> torch.Tensor:
    """A copy in host memory; from a GPU it is under way when this returns."""
    if not values.is_cuda:
        return values.clone()
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return host.copy_(values, non_blocking=True)
