"""Executes step plans on one rank: keeps the state of sequences, runs the model, samples.

Every rank holds every sequence's tokens and block table; rank 0 samples and tells the others. A plan may
name tokens that its maker does not know yet: they were sampled here, by an earlier plan. Tokens that a plan
guesses run along as further rows; what was computed for wrong guesses is written over by what really follows.

Attention on a CPU multiplies what a row does not see by zero, and a NaN of a block's earlier owner would
survive that: a sequence whose logits hold no number to choose by ends the group, and its cache with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from runtime.model.batch import BatchMaker, Run
from runtime.model.communicator import Communicator
from runtime.model.drafter import Ask, Drafter
from runtime.model.forward import Batch, Forward, new_cache
from runtime.model.guessing import with_guesses
from runtime.model.shard import Shard
from runtime.sampling.sampler import NO_TOKEN, SamplerState, sample_ahead
from runtime.sampling.score import score
from runtime.types import Chunk, SampledToken, SequenceStart, StepPlan, StepResult, TokenScore

SCORED_AT_ONCE = 64  # rows of logits held at once where a prompt is scored

Watch = Callable[[torch.Tensor, Sequence[int]], None]
"""Sees, at rank 0, the logits [rows, V] of a prompt that is scored, and the token that follows each row."""


@dataclass(slots=True)
class _Sequence:
    tokens: list[int]
    sampler: SamplerState | None  # rank 0 only
    wants_logprobs: bool
    blocks: list[int] = field(default_factory=list)


class Runner:
    """One rank of a group. Calls must be made in the same order on every rank."""

    def __init__(
        self,
        shard: Shard,
        comm: Communicator,
        *,
        total_blocks: int,
        block_size: int,
        max_positions: int,
        draft: Shard | None = None,
    ):
        """draft: this rank's share of a draft model."""
        self.forward = Forward(shard, new_cache(shard, total_blocks, block_size), comm, max_positions)
        self.comm = comm
        self.block_size = block_size
        self._batches = BatchMaker(shard.spec, shard.dtype, block_size, total_blocks)
        self._drafter = None
        if draft is not None:
            self._drafter = Drafter(
                draft,
                comm,
                total_blocks=total_blocks,
                block_size=block_size,
                max_positions=max_positions,
            )
        self._sequences: dict[int, _Sequence] = {}
        self.watch: Watch | None = None

    @property
    def cache_bytes(self) -> int:
        return self.forward.cache.nbytes + (self._drafter.cache_bytes if self._drafter else 0)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Run one plan. Rank 0 returns what was sampled; the others return the tokens alone."""
        self._apply(plan)
        if not plan.chunks:
            return StepResult(plan.step, ())
        chunks = plan.chunks if self._drafter is None else self._guess(plan.chunks)
        return self._conclude(plan.step, chunks, self.forward.hidden(self._batch(chunks)))

    def _conclude(self, step: int, chunks: Sequence[Chunk], hidden: torch.Tensor) -> StepResult:
        """Sample and score, given the hidden states of the chunks' batch."""
        chosen = [chunk for chunk in chunks if chunk.samples]
        rows = sum(1 + len(chunk.drafts) for chunk in chosen)
        scores = self._scores([chunk for chunk in chunks if chunk.scores], hidden[rows:])
        sampled = self._sample(chosen, self.forward.logits(hidden[:rows])) if chosen else ()
        self._take(sampled)
        return StepResult(step, sampled, scores)

    def _guess(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """The chunks with the guesses that the draft model is asked for."""
        sequences = [self._sequences[chunk.slot] for chunk in chunks]

        def ask(chunk: Chunk) -> Ask:
            sequence = self._sequences[chunk.slot]
            return Ask(sequence.tokens, sequence.blocks, chunk.guesses, sequence.sampler)

        return with_guesses(chunks, sequences, self._drafter, ask)

    def _apply(self, plan: StepPlan) -> None:
        """What a plan says of slots and blocks, before anything is computed."""
        for slot in plan.ends:
            del self._sequences[slot]
        for start in plan.starts:
            self._sequences[start.slot] = self._begin(start)
        for chunk in plan.chunks:
            self._sequences[chunk.slot].blocks.extend(chunk.new_blocks)

    def _begin(self, start: SequenceStart) -> _Sequence:
        sampler = None
        if self.comm.rank == 0:
            prompt, reply = start.tokens[: start.prompt_length], start.tokens[start.prompt_length :]
            vocab = self.forward.shard.spec.vocab
            sampler = SamplerState(start.params, prompt, reply, start.stop_ids, vocab, start.choice)
        return _Sequence(list(start.tokens), sampler, start.params.logprobs is not None)

    def _take(self, sampled: tuple[SampledToken, ...]) -> None:
        """What was sampled is known from now on."""
        for choice in sampled:
            self._sequences[choice.slot].tokens.append(choice.token)

    def _sample(self, chunks: list[Chunk], logits: torch.Tensor | None) -> tuple[SampledToken, ...]:
        """The tokens that follow `chunks`, whose rows' logits rank 0 has; the samplers take them."""
        most = [1 + len(chunk.drafts) for chunk in chunks]
        if logits is None:
            ids = self.comm.broadcast(None, 8 * sum(most)).view(torch.int64).tolist()
            owners = (chunk.slot for chunk, count in zip(chunks, most, strict=True) for _ in range(count))
            return tuple(
                SampledToken(slot, token) for slot, token in zip(owners, ids, strict=True) if token >= 0
            )
        states = [self._sequences[chunk.slot].sampler for chunk in chunks]
        positions = [chunk.start + chunk.length for chunk in chunks]
        found = sample_ahead(logits, states, positions, [chunk.drafts for chunk in chunks])
        for chunk, choices in zip(chunks, found, strict=True):
            _check(chunk, choices[-1].token != NO_TOKEN)
        if self.comm.size > 1:
            ids = [
                [choice.token for choice in choices] + [-1] * (count - len(choices))
                for choices, count in zip(found, most, strict=True)
            ]
            told = torch.tensor([token for row in ids for token in row], dtype=torch.int64)
            self.comm.broadcast(told.view(torch.uint8), told.nbytes)
        return tuple(
            SampledToken(chunk.slot, choice.token, choice.logprob, choice.top)
            for chunk, choices in zip(chunks, found, strict=True)
            for choice in choices
        )

    def _scores(self, chunks: list[Chunk], hidden: torch.Tensor) -> tuple[tuple[TokenScore, ...], ...]:
        """At rank 0, the scores of the tokens after each row of `chunks`, whose hidden states are given."""
        found: list[tuple[TokenScore, ...]] = []
        first = 0
        for chunk in chunks:
            sequence = self._sequences[chunk.slot]
            targets = sequence.tokens[chunk.start + 1 : chunk.start + chunk.length + 1]
            scores: list[TokenScore] = []
            for at in range(0, chunk.length, SCORED_AT_ONCE):
                part = targets[at : at + SCORED_AT_ONCE]
                logits = self.forward.logits(hidden[first + at : first + at + len(part)])
                if logits is not None:
                    if self.watch is not None:
                        self.watch(logits, part)
                    scores += score(logits, part, sequence.sampler.params.logprobs or 0)
                    _check(chunk, not any(math.isnan(entry.logprob) for entry in scores[-len(part) :]))
            found.append(tuple(scores))
            first += chunk.length
        return tuple(found) if self.comm.rank == 0 else ()

    def _batch(self, chunks: Sequence[Chunk]) -> Batch:
        """A plan's chunks as rows, guesses after what is known. The rows whose logits are wanted are those of
        samples, then those that are scored."""
        runs = []
        for chunk in chunks:
            sequence = self._sequences[chunk.slot]
            known = sequence.tokens[chunk.start : chunk.start + chunk.length]
            if len(known) != chunk.length:
                stop = chunk.start + chunk.length
                raise ValueError(f"slot {chunk.slot}: tokens up to {stop} are not known to this rank")
            samples = 1 + len(chunk.drafts) if chunk.samples else 0
            runs.append(Run([*known, *chunk.drafts], chunk.start, sequence.blocks, samples, chunk.scores))
        return self._batches.make(runs)


def _check(chunk: Chunk, sound: bool) -> None:
    if not sound:
        raise ValueError(f"slot {chunk.slot}: its logits hold NaN or infinity, or allow no token")
