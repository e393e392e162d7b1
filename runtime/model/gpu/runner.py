"""Executes step plans on one rank's GPU: keeps the state of sequences, runs the model, samples.

The counterpart of `runtime.model.runner`, with the same calls. Steps of single tokens alone (decode) run in
shapes of a few sizes, each captured in a CUDA graph when it first comes up and replayed from then on; padding
rows write nothing and no other row can see them. Steps with prompts run as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from runtime.model.communicator import Communicator
from runtime.model.gpu.forward import GpuBatch, GpuForward
from runtime.model.gpu.sampler import DeviceSampler
from runtime.model.gpu.shard import DTYPE, GpuShard
from runtime.model.runner import Watch
from runtime.sampling.score import score
from runtime.types import Chunk, SampledToken, SequenceStart, StepPlan, StepResult, TokenScore

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # sequences of a captured step


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
    tokens: torch.Tensor | None  # at rank 0; these two are host tensors, filled once `done`
    logits: dict[int, torch.Tensor]  # of rows whose logprobs are wanted: scored as given tokens are
    scores: tuple[tuple[TokenScore, ...], ...]
    done: torch.cuda.Event | None


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
        self._captured: dict[tuple[int, int], _Captured] = {}
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
        if scored and logits is not None:
            scores = self._scores(scored, logits[len(chosen) :])
            logits = logits[: len(chosen)]
        tokens = done = None
        kept: dict[int, torch.Tensor] = {}
        if chosen and self.comm.rank == 0:
            for row, sequence in enumerate(sequences):
                if sequence.logprobs is not None:
                    kept[row] = _to_host(logits[row])
            slots, positions = [c.slot for c in chosen], [c.start + c.length for c in chosen]
            # Copied here, not when they are collected: a later copy would queue behind the next plan.
            tokens = _to_host(self._sampler.sample(logits.contiguous(), slots, positions))
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
        if launched.tokens is not None:
            ids = launched.tokens.long()
            if self.comm.size > 1:
                self.comm.broadcast(ids.view(torch.uint8), ids.nbytes)
        else:
            ids = self.comm.broadcast(None, 8 * len(chunks)).view(torch.int64)
        found = []
        for row, (chunk, sequence, token) in enumerate(
            zip(chunks, launched.sequences, ids.tolist(), strict=True)
        ):
            if token < 0:
                raise ValueError(f"slot {chunk.slot}: its logits hold NaN or infinity, or allow no token")
            sequence.tokens[chunk.start + chunk.length] = token
            if row not in launched.logits:
                found.append(SampledToken(chunk.slot, token))
                continue
            (scored,) = score(launched.logits[row][None], [token], sequence.logprobs)
            found.append(SampledToken(chunk.slot, token, scored.logprob, scored.top))
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
        if not (self._graphs and decode and len(chunks) <= BUCKETS[-1]):
            return self.forward.logits(self._batch(chunks, len(chunks), None))
        count = next(size for size in BUCKETS if size >= len(chunks))
        blocks = max(len(self._sequences[chunk.slot].blocks) for chunk in chunks)
        width = min(1 << (blocks - 1).bit_length(), self._most_blocks)
        batch = self._batch(chunks, count, width)
        captured = self._captured.get((count, width))
        if captured is None:
            captured = self._captured[count, width] = self._capture(batch)
        for name in ("tokens", "positions", "slots", "block_table", "query_start", "context_len"):
            getattr(captured.batch, name).copy_(getattr(batch, name))
        captured.graph.replay()
        return None if captured.logits is None else captured.logits[: len(chunks)]

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

    def _batch(self, chunks: tuple[Chunk, ...], count: int, width: int | None) -> GpuBatch:
        """Flatten a plan's chunks to rows, for `count` sequences (padding last), block tables of `width`."""
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
            if len(known) != chunk.length or (None in known and self.comm.size > 1):
                raise ValueError(f"slot {chunk.slot}: tokens up to {stop} are not known to this rank")
            if known[-1] is None:  # no more than the newest can be unknown
                unseen.append((len(tokens) + chunk.length - 1, chunk.slot))
                known[-1] = 0
            tokens += known
            positions += range(chunk.start, stop)
            slots += [
                sequence.blocks[p // self.block_size] * self.block_size + p % self.block_size
                for p in range(chunk.start, stop)
            ]
            if chunk.samples:
                sampled.append(len(tokens) - 1)
            if chunk.scores:
                scored += range(len(tokens) - chunk.length, len(tokens))
            starts.append(len(tokens))
            contexts.append(stop)
            tables.append(sequence.blocks[: -(-stop // self.block_size)])
        padding = count - len(chunks)
        width = width or max(len(table) for table in tables)
        sampled += range(len(tokens), len(tokens) + padding) if padding else ()
        starts += [len(tokens)] * padding
        tables += [[]] * padding
        longest = max(chunk.length for chunk in chunks)

        def device(values: list) -> torch.Tensor:
            made = torch.tensor(values, dtype=torch.int32)
            return made.to(self.forward.shard.device, non_blocking=True)

        ids = device(tokens + [0] * padding)
        if unseen:
            rows, of = (device(list(part)).long() for part in zip(*unseen, strict=True))
            ids.index_copy_(0, rows, self._sampler.last.index_select(0, of))
        return GpuBatch(
            ids,
            device(positions + [0] * padding),
            device(slots + [-1] * padding),
            device([table + [0] * (width - len(table)) for table in tables]),
            device(starts),
            device(contexts + [0] * padding),
            device(sampled + scored),
            longest,
        )


def _to_host(values: torch.Tensor) -> torch.Tensor:
    """A copy in host memory; from a GPU it is under way when this returns."""
    if not values.is_cuda:
        return values.clone()
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return host.copy_(values, non_blocking=True)
