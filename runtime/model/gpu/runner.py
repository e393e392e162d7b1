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
from runtime.model.gpu.shard import DTYPE, GpuShard
from runtime.model.runner import Watch
from runtime.sampling.sampler import SamplerState, sample
from runtime.sampling.score import score
from runtime.types import Chunk, SampledToken, SequenceStart, StepPlan, StepResult, TokenScore

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # sequences of a captured step


@dataclass(slots=True)
class _Sequence:
    tokens: list[int]
    sampler: SamplerState | None  # rank 0 only
    blocks: list[int] = field(default_factory=list)


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
        self._sequences: dict[int, _Sequence] = {}
        self.watch: Watch | None = None

    @property
    def cache_bytes(self) -> int:
        return self.forward.cache.nbytes

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Run one plan. Rank 0 returns what was sampled; the others return the tokens alone."""
        for slot in plan.ends:
            del self._sequences[slot]
        for start in plan.starts:
            self._sequences[start.slot] = self._begin(start)
        for chunk in plan.chunks:
            self._sequences[chunk.slot].blocks.extend(chunk.new_blocks)
        if not plan.chunks:
            return StepResult(plan.step, ())
        chosen = [chunk for chunk in plan.chunks if chunk.samples]
        logits = self._logits(plan.chunks)
        scores = ()
        if any(chunk.scores for chunk in plan.chunks) and logits is not None:
            logits, scored = logits[: len(chosen)], logits[len(chosen) :]
            scores = self._scores([chunk for chunk in plan.chunks if chunk.scores], scored)
        if not chosen:
            return StepResult(plan.step, (), scores)
        sampled = self._sample(chosen, logits)
        for choice in sampled:
            sequence = self._sequences[choice.slot]
            sequence.tokens.append(choice.token)
            if sequence.sampler is not None:
                sequence.sampler.append(choice.token)
        return StepResult(plan.step, sampled, scores)

    def _begin(self, start: SequenceStart) -> _Sequence:
        sampler = None
        if self.comm.rank == 0:
            prompt, reply = start.tokens[: start.prompt_length], start.tokens[start.prompt_length :]
            vocab = self.forward.shard.spec.vocab
            sampler = SamplerState(start.params, prompt, reply, start.stop_ids, vocab, start.choice)
        return _Sequence(list(start.tokens), sampler)

    def _sample(self, chunks: list[Chunk], logits: torch.Tensor | None) -> tuple[SampledToken, ...]:
        if logits is not None:
            states = [self._sequences[chunk.slot].sampler for chunk in chunks]
            choices = sample(logits, states, [chunk.start + chunk.length for chunk in chunks])
            if self.comm.size > 1:
                ids = torch.tensor([choice.token for choice in choices], dtype=torch.int64)
                self.comm.broadcast(ids.view(torch.uint8), ids.nbytes)
            return tuple(
                SampledToken(chunk.slot, choice.token, choice.logprob, choice.top)
                for chunk, choice in zip(chunks, choices, strict=True)
            )
        ids = self.comm.broadcast(None, 8 * len(chunks)).view(torch.int64).tolist()
        return tuple(SampledToken(chunk.slot, token) for chunk, token in zip(chunks, ids, strict=True))

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
            found.append(score(rows, targets, sequence.sampler.params.logprobs or 0))
            first += chunk.length
        return tuple(found)

    def _logits(self, chunks: tuple[Chunk, ...]) -> torch.Tensor | None:
        """fp32 [wanted, V] at rank 0: rows of samples in the order of the plan's chunks, then scored ones."""
        decode = all(chunk.length == 1 and chunk.samples for chunk in chunks)
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
        with torch.cuda.graph(graph):
            logits = self.forward.logits(batch)
        return _Captured(graph, batch, logits)

    def _batch(self, chunks: tuple[Chunk, ...], count: int, width: int | None) -> GpuBatch:
        """Flatten a plan's chunks to rows, for `count` sequences (padding last), block tables of `width`."""
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        sampled: list[int] = []
        scored: list[int] = []
        starts = [0]
        contexts: list[int] = []
        tables: list[list[int]] = []
        for chunk in chunks:
            sequence = self._sequences[chunk.slot]
            stop = chunk.start + chunk.length
            known = sequence.tokens[chunk.start : stop]
            if len(known) != chunk.length:
                raise ValueError(f"slot {chunk.slot}: tokens up to {stop} are not known to this rank")
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

        return GpuBatch(
            device(tokens + [0] * padding),
            device(positions + [0] * padding),
            device(slots + [-1] * padding),
            device([table + [0] * (width - len(table)) for table in tables]),
            device(starts),
            device(contexts + [0] * padding),
            device(sampled + scored),
            longest,
        )
