"""Executes step plans on one rank: keeps the state of sequences, runs the model, samples.

Every rank holds every sequence's tokens and block table; rank 0 samples and tells the others. A plan may
name tokens that its maker does not know yet: they were sampled here, by an earlier plan. Tokens that a plan
guesses run along as further rows; what was computed for wrong guesses is written over by what really follows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from kernels.attention import (
    AttentionCall,
    block_run,
    chunk_calls,
    decode_call,
    padded_blocks,
    tile_sizes,
)
from runtime.model.communicator import Communicator
from runtime.model.forward import Batch, Forward
from runtime.model.shard import Shard
from runtime.sampling.sampler import SamplerState, sample_ahead
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
    ):
        spec = shard.spec
        held = shard.units[shard.run[0] : shard.run[1]]
        kv_heads = held[-1].kv_heads[1] - held[0].kv_heads[0]
        # Zeros, not garbage: masked positions are multiplied by exact zeros, which a NaN would survive.
        cache = torch.zeros(
            len(shard.layers), total_blocks, block_size, 2, kv_heads, spec.head_dim, dtype=shard.dtype
        )
        self.forward = Forward(shard, cache, comm, max_positions)
        self.comm = comm
        self.block_size = block_size
        self._group = spec.heads // spec.kv_heads
        self._window = spec.sliding_window
        self._tiles = tile_sizes(self._group, spec.head_dim, shard.dtype)
        self._sequences: dict[int, _Sequence] = {}
        self.watch: Watch | None = None

    @property
    def cache_bytes(self) -> int:
        return self.forward.cache.nbytes

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Run one plan. Rank 0 returns what was sampled; the others return the tokens alone."""
        self._apply(plan)
        if not plan.chunks:
            return StepResult(plan.step, ())
        return self._conclude(plan, self.forward.hidden(self._batch(plan.chunks)))

    def _conclude(self, plan: StepPlan, hidden: torch.Tensor) -> StepResult:
        """Sample and score, given the hidden states of the plan's batch."""
        chunks = plan.chunks
        chosen = [chunk for chunk in chunks if chunk.samples]
        rows = sum(1 + len(chunk.drafts) for chunk in chosen)
        scores = self._scores([chunk for chunk in chunks if chunk.scores], hidden[rows:])
        sampled = self._sample(chosen, self.forward.logits(hidden[:rows])) if chosen else ()
        self._take(sampled)
        return StepResult(plan.step, sampled, scores)

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
            found.append(tuple(scores))
            first += chunk.length
        return tuple(found) if self.comm.rank == 0 else ()

    def _batch(self, chunks: tuple[Chunk, ...]) -> Batch:
        """Flatten a plan's chunks to rows, single tokens first into shared attention calls. The rows whose
        logits are wanted are those of samples, then those that are scored."""
        tokens: list[int] = []
        positions: list[int] = []
        blocks: list[int] = []
        sampled: list[int] = []
        scored: list[int] = []
        calls: list[AttentionCall] = []
        lone: list[tuple[int, int, list[int]]] = []  # (row, position, block table)
        spec = {
            "block_size": self.block_size,
            "window": self._window,
            "dtype": self.forward.shard.dtype,
        }
        for chunk in chunks:
            sequence = self._sequences[chunk.slot]
            first, known = len(tokens), chunk.start + chunk.length
            tokens += sequence.tokens[chunk.start : known]
            if len(tokens) - first != chunk.length:
                raise ValueError(f"slot {chunk.slot}: tokens up to {known} are not known to this rank")
            tokens += chunk.drafts
            stop = known + len(chunk.drafts)
            positions += range(chunk.start, stop)
            blocks += [sequence.blocks[p // self.block_size] for p in range(chunk.start, stop)]
            if chunk.samples:
                sampled += range(first + chunk.length - 1, len(tokens))
            if chunk.scores:
                scored += range(first, len(tokens))
            rows = stop - chunk.start
            if rows == 1:
                lone.append((first, chunk.start, sequence.blocks))
            else:
                table = torch.tensor(sequence.blocks[: -(-stop // self.block_size)])
                calls += chunk_calls(
                    first, chunk.start, rows, table, group=self._group, tile=self._tiles.run, **spec
                )
        calls += self._decode_calls(lone, len(tokens), spec)
        at = torch.tensor(positions)
        cache_rows = torch.tensor(blocks) * self.block_size + at % self.block_size
        wanted = torch.tensor(sampled + scored, dtype=torch.int64)
        return Batch(torch.tensor(tokens), at, cache_rows, calls, wanted)

    def _decode_calls(
        self, lone: list[tuple[int, int, list[int]]], all_rows: int, spec: dict
    ) -> list[AttentionCall]:
        """Group single tokens of similar KV length, so that padding at most doubles the work."""
        dtype = self.forward.shard.dtype
        buckets: dict[int, list[tuple[int, int, list[int]]]] = {}
        for entry in lone:
            needed = padded_blocks(entry[1] + 1, self.block_size, dtype)
            buckets.setdefault(needed.bit_length(), []).append(entry)
        calls = []
        for entries in buckets.values():
            longest = max(entry[1] for entry in entries) + 1
            count = padded_blocks(longest, self.block_size, dtype)
            rows = None if len(entries) == all_rows else [entry[0] for entry in entries]
            at = torch.tensor([entry[1] for entry in entries])
            blocks = self._one_run(entries, count) if len(entries) == 1 else None
            if blocks is None:
                table = np.zeros((len(entries), count), np.int64)
                for i, (_, position, owned) in enumerate(entries):
                    used = position // self.block_size + 1
                    table[i, :used] = owned[:used]
                blocks = torch.from_numpy(table)
            calls.append(decode_call(rows, at, blocks, tile=self._tiles.single, **spec))
        return calls

    def _one_run(self, entries: list[tuple[int, int, list[int]]], count: int) -> slice | None:
        """The neighbouring blocks of a lone sequence, if it has such: they are read in place."""
        _, position, owned = entries[0]
        run = block_run(owned[: position // self.block_size + 1], count)
        return run if run is not None and run.stop <= self.forward.cache.shape[1] else None
