"""Executes step plans on one rank's GPU: keeps the state of sequences, runs the model, samples.

The counterpart of `runtime.model.runner`, with the same calls. Steps of single tokens alone (decode) run in
shapes of a few sizes, each captured in a CUDA graph when it first comes up and replayed from then on; padding
rows write nothing and no other row can see them. Steps with prompts run as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch

from runtime.model.communicator import Communicator
from runtime.model.gpu.forward import GpuBatch, GpuForward
from runtime.model.gpu.sampler import CLOSED, DeviceSampler
from runtime.model.gpu.shard import DTYPE, GpuShard
from runtime.model.runner import Watch
from runtime.sampling.score import score
from runtime.types import Chunk, SampledToken, SequenceStart, StepPlan, StepResult, TokenScore

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # sequences of a captured step, and its rows
GUESSED = (1, 16, 64)  # rows of one sequence in a captured step, guesses included


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


@dataclass(frozen=True, slots=True)
class _Shape:
    """What a captured step has room for."""

    sequences: int
    blocks: int  # of one sequence
    rows: int
    longest: int  # rows of one sequence


@dataclass(slots=True)
class _Captured:
    """A graph with the tensors it reads and the one it writes."""

    graph: torch.cuda.CUDAGraph
    batch: GpuBatch
    logits: torch.Tensor | None


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
        graphs: bool | None = None,
    ):
        """`graphs`: capture decode steps; None: on a GPU of a group of one, since what ranks exchange through
        the host cannot be captured."""
        spec = shard.spec
        held = shard.units[shard.run[0] : shard.run[1]]
        kv_heads = held[-1].kv_heads[1] - held[0].kv_heads[0]
        shape = (spec.layers, total_blocks, 2, kv_heads, block_size, spec.head_dim)
        cache = torch.zeros(shape, dtype=DTYPE, device=shard.device)
        self.forward = GpuForward(shard, cache, comm, max_positions)
        self.comm = comm
        self.block_size = block_size
        self._most_blocks = -(-max_positions // block_size)
        self._graphs = graphs if graphs is not None else shard.device.type == "cuda" and comm.size == 1
        self._captured: dict[_Shape, _Captured] = {}
        self._sampler = DeviceSampler(spec.vocab, shard.device)
        self._sequences: dict[int, _Sequence] = {}
        self.watch: Watch | None = None

    @property
    def cache_bytes(self) -> int:
        return self.forward.cache.nbytes

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one plan. Rank 0 returns what was sampled; the others return the tokens alone."""
        return self.collect(self.launch(plan))

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Launched:
        """Start a plan's work and return without waiting for it. In a group of one, the next plan may be
        launched before this one is collected: tokens that the host has not seen are taken from the device."""
        for slot in plan.ends:
            del self._sequences[slot]
        for start in plan.starts:
            self._sequences[start.slot] = self._begin(start)
        for chunk in plan.chunks:
            self._sequences[chunk.slot].blocks.extend(chunk.new_blocks)
        chosen = [chunk for chunk in plan.chunks if chunk.samples]
        scored = [chunk for chunk in plan.chunks if chunk.scores]
        sequences = [self._sequences[chunk.slot] for chunk in chosen]
        logits = self._logits(plan.chunks) if plan.chunks else None
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
            if self.forward.shard.device.type == "cuda":
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
            if min(tokens) < 0:
                raise ValueError(f"slot {chunk.slot}: its logits hold NaN or infinity, or allow no token")
            # Plans go on from the one token of a plan that was not collected, never from guesses.
            known = chunk.start + chunk.length
            sequence.tokens[known : known + 1] = tokens
            if row not in launched.logits:
                found += [SampledToken(chunk.slot, token) for token in tokens]
                continue
            scores = score(launched.logits[row][: len(tokens)], tokens, sequence.logprobs)
            found += [
                SampledToken(chunk.slot, token, scored.logprob, scored.top)
                for token, scored in zip(tokens, scores, strict=True)
            ]
        return StepResult(launched.step, tuple(found), launched.scores)

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

    def _logits(self, chunks: tuple[Chunk, ...]) -> torch.Tensor | None:
        """fp32 [wanted, V] at rank 0: rows of samples in the order of the plan's chunks, then scored ones."""
        decode = all(chunk.length == 1 and chunk.samples and not chunk.scores for chunk in chunks)
        shape = self._shape(chunks) if self._graphs and decode else None
        batch = self._batch(chunks, shape)
        if shape is None:
            return self.forward.logits(batch)
        captured = self._captured.get(shape)
        if captured is None:
            captured = self._captured[shape] = self._capture(batch)
        for name in ("tokens", "positions", "slots", "block_table", "query_start", "context_len"):
            getattr(captured.batch, name).copy_(getattr(batch, name))
        captured.graph.replay()
        rows = len(chunks) + sum(len(chunk.drafts) for chunk in chunks)
        return None if captured.logits is None else captured.logits[:rows]

    def _shape(self, chunks: tuple[Chunk, ...]) -> _Shape | None:
        """The captured step that has room for single tokens and guesses after them; None if none has."""
        longest = 1 + max(len(chunk.drafts) for chunk in chunks)
        rows = len(chunks) + sum(len(chunk.drafts) for chunk in chunks)
        if longest > GUESSED[-1] or _bucket(GUESSED, longest) * len(chunks) > BUCKETS[-1]:
            return None
        blocks = max(len(self._sequences[chunk.slot].blocks) for chunk in chunks)
        return _Shape(
            _bucket(BUCKETS, len(chunks)),
            min(1 << (blocks - 1).bit_length(), self._most_blocks),
            _bucket(BUCKETS, rows),
            _bucket(GUESSED, longest),
        )

    def _capture(self, batch: GpuBatch) -> _Captured:
        side = torch.cuda.Stream(self.forward.shard.device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles what is not compiled yet
            self.forward.logits(batch)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Another thread may be waiting for the last plan's tokens, which is no part of the capture.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            logits = self.forward.logits(batch)
        return _Captured(graph, batch, logits)

    def _batch(self, chunks: tuple[Chunk, ...], shape: _Shape | None) -> GpuBatch:
        """Flatten a plan's chunks to rows, guesses after what is known; padded to `shape` if one is given."""
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        sampled: list[int] = []
        scored: list[int] = []
        unseen: list[tuple[int, int]] = []  # rows whose token only the device knows, and their slots
        starts = [0]
        contexts: list[int] = []
        tables: list[list[int]] = []
        for chunk in chunks:
            sequence = self._sequences[chunk.slot]
            stop = chunk.start + chunk.length
            known = sequence.tokens[chunk.start : stop]
            first = len(tokens)
            if len(known) != chunk.length or (None in known and self.comm.size > 1):
                raise ValueError(f"slot {chunk.slot}: tokens up to {stop} are not known to this rank")
            if known[-1] is None:  # no more than the newest can be unknown
                unseen.append((first + chunk.length - 1, chunk.slot))
                known[-1] = 0
            tokens += [*known, *chunk.drafts]
            stop += len(chunk.drafts)
            positions += range(chunk.start, stop)
            slots += [
                sequence.blocks[p // self.block_size] * self.block_size + p % self.block_size
                for p in range(chunk.start, stop)
            ]
            if chunk.samples:
                sampled += range(first + chunk.length - 1, len(tokens))
            if chunk.scores:
                scored += range(first, len(tokens))
            starts.append(len(tokens))
            contexts.append(stop)
            tables.append(sequence.blocks[: -(-stop // self.block_size)])
        if shape is None:
            longest = max(b - a for a, b in pairwise(starts))
            shape = _Shape(len(chunks), max(map(len, tables)), len(tokens), longest)
        # Programs share the work of few rows of few sequences; more rows have enough programs of their own,
        # and would want a large workspace.
        few = shape.longest <= GUESSED[-1] and shape.sequences * shape.longest <= BUCKETS[-1]
        padding, unused = shape.sequences - len(chunks), shape.rows - len(tokens)
        sampled += range(len(tokens), shape.rows)
        starts += [len(tokens)] * padding
        tables += [[]] * padding
        width = shape.blocks

        def device(values: list) -> torch.Tensor:
            made = torch.tensor(values, dtype=torch.int32)
            return made.to(self.forward.shard.device, non_blocking=True)

        ids = device(tokens + [0] * unused)
        if unseen:
            rows, of = (device(list(part)).long() for part in zip(*unseen, strict=True))
            ids.index_copy_(0, rows, self._sampler.last.index_select(0, of))
        return GpuBatch(
            ids,
            device(positions + [0] * unused),
            device(slots + [-1] * unused),
            device([table + [0] * (width - len(table)) for table in tables]),
            device(starts),
            device(contexts + [0] * padding),
            device(sampled + scored),
            shape.longest,
            shape.longest if few else 1,
        )


def _bucket(sizes: Sequence[int], least: int) -> int:
    return next(size for size in sizes if size >= least)


def _to_host(values: torch.Tensor) -> torch.Tensor:
    """A copy in host memory; from a GPU it is under way when this returns."""
    if not values.is_cuda:
        return values.clone()
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return host.copy_(values, non_blocking=True)
