"""Plays requests through a GPU runner with a draft model, without an engine: some sequences ask for guesses,
others run a plan ahead meanwhile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from runtime.model.gpu.runner import GpuRunner
from runtime.types import Chunk, SampledToken, SamplingParams, SequenceStart, StepPlan
from tests.gpu.play import BLOCK, Reply

Asked = tuple[Sequence[int], SamplingParams]  # prompt and how to go on


@dataclass
class Played:
    replies: list[Reply]
    tried: int = 0
    right: int = 0


@dataclass
class _Sequence:
    prompt: Sequence[int]
    params: SamplingParams
    guesses: list[int] | None  # how many to ask for, by turns; None: it never waits for its last token
    done: list[SampledToken] = field(default_factory=list)
    at: int = 0  # positions planned
    flying: int = 0  # plans that sample for it and were not collected


def play(
    run: GpuRunner,
    asked: Sequence[Asked],
    length: int,
    *,
    guessing: Mapping[int, Sequence[int]] | None = None,
    ahead: int = 0,
) -> Played:
    """A reply of `length` tokens to each prompt, which comes in chunks of up to 9. `guessing` says of some
    how many guesses they ask for in each step after the first, none once that ends; they wait for their last
    token. The others have up to `ahead` plans more in flight than one."""
    most = -(-(max(len(prompt) for prompt, _ in asked) + length) // BLOCK)
    turns = {slot: list(counts) for slot, counts in (guessing or {}).items()}
    sequences = [_Sequence(prompt, params, turns.get(slot)) for slot, (prompt, params) in enumerate(asked)]
    found = Played([])
    pending: list = []
    step = 0

    def plan() -> StepPlan | None:
        chunks, starts = [], []
        for slot, sequence in enumerate(sequences):
            prompt, known = sequence.prompt, len(sequence.done)
            if known + sequence.flying == length or (sequence.guesses is not None and sequence.flying):
                continue
            blocks = ()
            if sequence.at == 0:
                starts.append(SequenceStart(slot, tuple(prompt), len(prompt), sequence.params, ()))
                blocks = tuple(range(slot * most, (slot + 1) * most))
            count = min(9, max(1, len(prompt) - sequence.at))
            samples = sequence.at + count >= len(prompt)
            wanted = min(sequence.guesses.pop(0), length - known - 1) if known and sequence.guesses else 0
            chunks.append(Chunk(slot, sequence.at, count, blocks, samples, guesses=wanted))
            sequence.at += count
            sequence.flying += samples
        return StepPlan(step, (), tuple(starts), tuple(chunks)) if chunks else None

    def take(asking: StepPlan, launched) -> None:
        tokens = run.collect(launched).tokens
        for chunk in asking.chunks:
            mine = [token for token in tokens if token.slot == chunk.slot]
            sequence = sequences[chunk.slot]
            assert len(mine) <= 1 + chunk.guesses and bool(mine) == chunk.samples
            sequence.done += mine
            sequence.flying -= chunk.samples
            sequence.at += max(0, len(mine) - 1)
            found.tried += chunk.guesses
            found.right += len(mine) - chunk.samples

    while (following := plan()) or pending:
        if following:
            pending.append((following, run.launch(following)))
            step += 1
        if not following or len(pending) > ahead:
            take(*pending.pop(0))
    found.replies = [tuple((t.token, t.logprob, t.top) for t in sequence.done) for sequence in sequences]
    return found
