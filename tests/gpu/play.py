"""Plays requests through a GPU runner without an engine: greedy replies with logprobs, in any company."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from runtime.config import ModelConfig
from runtime.model.communicator import Alone, Communicator, Threads
from runtime.model.gpu.runner import GpuRunner
from runtime.model.gpu.shard import DTYPE, FP8, GpuShard, build_gpu_shard
from runtime.model.gpu.steps import Steps
from runtime.model.header import OpenModel, open_model
from runtime.model.layout import shard_slices
from runtime.model.units import Span, rank_units
from runtime.types import Chunk, SampledToken, SamplingParams, SequenceStart, StepPlan, StepResult
from runtime.weights.loader import load
from tests.gpu.device import DEVICE, ON_GPU

T = TypeVar("T")
BLOCK = 16
Reply = tuple[tuple[int, float, tuple], ...]


def opened(path: Path, kv_dtype: str = "auto") -> OpenModel:
    """Folders of dense weights are quantised on load."""
    quantize = "int4" if path.is_dir() else None
    return open_model(ModelConfig(str(path), quantize=quantize, kv_dtype=kv_dtype), "cuda")


def shard_of(model: OpenModel, comm: Communicator, layers: Span | None = None) -> GpuShard:
    """What a rank of the group holds of a model, or of some of its layers."""
    run = rank_units(len(model.units), comm.size)[comm.rank]
    slices = shard_slices(model.spec, model.units, run, layers)
    loader = load(model.checkpoint, slices, threads=1, quantize=model.quantize)
    kv_dtype = FP8 if model.kv_dtype == "fp8" else DTYPE
    return build_gpu_shard(
        model.spec, model.units, run, loader, device=DEVICE, layers=layers, kv_dtype=kv_dtype
    )


def runner(
    model: OpenModel,
    positions: int,
    sequences: int,
    comm: Communicator | None = None,
    *,
    draft: OpenModel | None = None,
    **settings,
) -> GpuRunner:
    comm = comm or Alone()
    most = -(-positions // BLOCK)
    return GpuRunner(
        shard_of(model, comm),
        comm,
        total_blocks=most * sequences,
        block_size=BLOCK,
        max_positions=most * BLOCK,
        draft=shard_of(draft, comm) if draft else None,
        **settings,
    )


class Replayed:
    """What a CUDA graph does, step by step: it computes from the tensors it was captured with. All that was
    in the memory that graphs and steps share is gone by then."""

    def __init__(self, steps: Steps, work: Callable[[], None]):
        self._steps, self._work = steps, work
        work()

    def replay(self) -> None:
        self._steps.forward.workspace.fill_(float("nan"))
        self._steps._logits.fill_(float("nan"))
        self._work()


class Simulated:
    """Graphs where there is no GPU. room_for: how many, until memory is short."""

    def __init__(self, steps: Steps, room_for: int = 1000):
        self._steps, self.room_for = steps, room_for
        self.recorded: list[Replayed] = []

    def room(self) -> bool:
        return len(self.recorded) < self.room_for

    def record(self, work: Callable[[], None]) -> Replayed:
        self.recorded.append(Replayed(self._steps, work))
        return self.recorded[-1]


def simulate_graphs(monkeypatch, steps: Steps) -> None:
    """Where there is no GPU, steps in captured shapes, as if graphs ran them."""
    if not ON_GPU:
        steps.graphs = True
        monkeypatch.setattr(steps, "recorder", Simulated(steps))


def replies(
    run: GpuRunner,
    prompts: Sequence[Sequence[int]],
    length: int,
    *,
    chunk: int | None = None,
    params: SamplingParams | None = None,
    ahead: int = 0,
) -> list[Reply]:
    """A reply of `length` tokens to each prompt, all at once; prompts in chunks of `chunk` tokens. `ahead`:
    plans launched before the first of them is collected."""
    params = params or SamplingParams(temperature=0.0, logprobs=2)
    most = -(-max(len(prompt) + length for prompt in prompts) // BLOCK)
    done: list[list[SampledToken]] = [[] for _ in prompts]
    at = [0] * len(prompts)
    planned = [0] * len(prompts)
    pending: list = []
    step = 0

    def take(result: StepResult) -> None:
        for token in result.tokens:
            done[token.slot].append(token)

    while any(count < length for count in planned):
        chunks, starts = [], []
        for slot, prompt in enumerate(prompts):
            if planned[slot] == length:
                continue
            if at[slot] == 0:
                starts.append(SequenceStart(slot, tuple(prompt), len(prompt), params, ()))
            left = max(1, len(prompt) - at[slot])
            count = min(left, chunk or left)
            blocks = tuple(range(slot * most, (slot + 1) * most)) if at[slot] == 0 else ()
            chunks.append(Chunk(slot, at[slot], count, blocks, at[slot] + count >= len(prompt)))
            planned[slot] += chunks[-1].samples
            at[slot] += count
        plan = StepPlan(step, (), tuple(starts), tuple(chunks))
        if ahead:
            pending.append(run.launch(plan))
            if len(pending) > ahead:
                take(run.collect(pending.pop(0)))
        else:
            take(run.execute(plan))
        step += 1
    for launched in pending:
        take(run.collect(launched))
    return [tuple((t.token, t.logprob, tuple(t.top)) for t in reply) for reply in done]


def replies_of_ranks(model: OpenModel, tp: int, prompts: Sequence[Sequence[int]], length: int) -> list[Reply]:
    """The same by `tp` ranks that are threads of this process, on one device."""
    return by_ranks(tp, lambda comm: replies(runner(model, 64, len(prompts), comm), prompts, length))[0]


def by_ranks(tp: int, work: Callable[[Communicator], T]) -> list[T]:
    """What `work` returns on each of `tp` ranks that are threads of this process."""
    comms = Threads.group(tp)
    found: dict[int, T] = {}
    failed: list[BaseException] = []

    def run(comm: Threads) -> None:
        try:
            found[comm.rank] = work(comm)
        except BaseException as error:  # told to the caller below
            failed.append(error)
            comm.close()

    threads = [threading.Thread(target=run, args=(comm,)) for comm in comms]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
    if failed:
        raise failed[0]
    return [found[rank] for rank in range(tp)]


def guessed_replies(
    run: GpuRunner, prompts: Sequence[Sequence[int]], want: Sequence[Reply], params: SamplingParams
) -> list[Reply]:
    """As `replies`, each step with guesses at what follows, of which the second or the third is wrong, by
    turns; `want` are the replies."""
    length = len(want[0])
    most = -(-(max(map(len, prompts)) + length) // BLOCK)
    done: list[list[SampledToken]] = [[] for _ in prompts]
    step = 0
    while any(len(tokens) < length for tokens in done):
        chunks, starts = [], []
        for slot, prompt in enumerate(prompts):
            known = len(done[slot])
            if known == length:
                continue
            if known == 0:
                starts.append(SequenceStart(slot, tuple(prompt), len(prompt), params, ()))
                blocks = tuple(range(slot * most, (slot + 1) * most))
                chunks.append(Chunk(slot, 0, len(prompt), blocks, True))
                continue
            guesses = [token for token, _, _ in want[slot][known : length - 1]]
            wrong = 1 + (slot + step) % 2
            if len(guesses) > wrong:
                guesses[wrong] ^= 1
            start = len(prompt) + known - 1
            chunks.append(Chunk(slot, start, 1, (), True, drafts=tuple(guesses)))
        result = run.execute(StepPlan(step, (), tuple(starts), tuple(chunks)))
        for token in result.tokens:
            done[token.slot].append(token)
        for chunk in chunks:
            assert chunk.slot in {token.slot for token in result.tokens}
        step += 1
    assert step < length, "no guess was right"
    return [tuple((t.token, t.logprob, t.top) for t in tokens) for tokens in done]
