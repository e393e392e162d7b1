"""Ranks without tensors that trust nothing: what they sample depends on all they find in the KV blocks.

Each position of a block stores a hash of the token history up to it, computed from what is stored at the
position before. A sampled token is a hash of all stored positions, as attention reads them all. So a wrong
block, a lost, doubled or changed token, or a schedule that shows through changes the reply.
"""

from __future__ import annotations

import hashlib
from collections import deque
from dataclasses import dataclass, field

from runtime.config import EngineConfig
from runtime.types import (
    FinishReason,
    Request,
    SampledToken,
    SequenceStart,
    StepPlan,
    StepResult,
    TokenScore,
)

VOCABULARY = 29
OVERFLOW = VOCABULARY  # a token of prompts alone, whose numbers are none, nor are any that follow from them
_NAN = b"NaN"


def store(before: bytes, position: int, token: int) -> bytes:
    """The KV of a position, given that of the one before."""
    return hashlib.sha256(before + b"%d:%d" % (position, token)).digest()[:8]


def sample(kv: list[bytes], text: list[int], seed: int, choice: int) -> int:
    """The token after the positions whose KV and tokens are given. Odd seeds mostly repeat what stood some
    tokens before, so that guesses are often right, never always."""
    digest = hashlib.sha256(b"%d.%d" % (seed, choice) + b"".join(kv)).digest()
    period = 3 + seed % 5
    if seed % 2 and len(text) >= period and digest[1] % 8:
        return text[-period]
    return digest[0] % VOCABULARY


def score(kv: list[bytes], target: int) -> TokenScore:
    """What is thought of the token after the positions whose KV is given."""
    return TokenScore(-float(hashlib.sha256(b"%d" % target + b"".join(kv)).digest()[0]))


def reference_scores(request: Request) -> list[TokenScore]:
    """The scores of a prompt's tokens but the first, computed alone and in order."""
    kv: list[bytes] = []
    for position, token in enumerate(request.prompt):
        kv.append(store(kv[-1] if kv else b"", position, token))
    return [score(kv[:position], token) for position, token in enumerate(request.prompt)][1:]


def reference(request: Request, context: int, choice: int = 0) -> tuple[list[int], FinishReason]:
    """The whole reply of a choice and why it ends, computed alone and in order."""
    kv: list[bytes] = []
    for position, token in enumerate(request.prompt):
        kv.append(store(kv[-1] if kv else b"", position, token))
    reply: list[int] = []
    while True:
        token = sample(kv, [*request.prompt, *reply], request.params.seed, choice)
        reply.append(token)
        if token in request.stop_ids and len(reply) > request.params.min_tokens:
            return reply, FinishReason.STOP
        if len(reply) == request.params.max_tokens or len(request.prompt) + len(reply) == context:
            return reply, FinishReason.LENGTH
        kv.append(store(kv[-1], len(kv), token))


@dataclass
class Slot:
    start: SequenceStart
    tokens: list[int]
    table: list[int] = field(default_factory=list)
    computed: int = 0


class Executor:
    """Runs plans in order as they come; results are taken later, one at a time, oldest first."""

    def __init__(self, config: EngineConfig):
        self.config = config
        self.slots: dict[int, Slot] = {}
        self.blocks = [[b""] * config.block_size for _ in range(config.total_blocks)]
        self.results: deque[StepResult] = deque()
        self.named: deque[dict[int, Slot]] = deque()  # plan in flight -> block -> a sequence that uses it
        self.steps = 0

    def run(self, plan: StepPlan) -> None:
        self.steps += 1
        assert plan.step == self.steps
        for slot in plan.ends:
            del self.slots[slot]
        for start in plan.starts:
            assert 0 <= start.slot < self.config.max_num_seqs and start.slot not in self.slots
            self.slots[start.slot] = Slot(start, list(start.tokens))
        assert {start.slot for start in plan.starts} <= {chunk.slot for chunk in plan.chunks}
        assert len({chunk.slot for chunk in plan.chunks}) == len(plan.chunks)
        rows = sum(chunk.length + len(chunk.drafts) + chunk.guesses for chunk in plan.chunks)
        assert rows <= self.config.max_step_tokens
        assert plan.chunks or plan.ends
        # All rows of a step may read before, while or after the others write: what a chunk reads is what
        # stood there before the step, or what it writes itself; and no other chunk may write it.
        before = [list(block) for block in self.blocks]
        written: dict[tuple[int, int], int] = {}
        named: dict[int, Slot] = {}
        sampled, scores = [], []
        for chunk in plan.chunks:
            sampled += (
                SampledToken(chunk.slot, token) for token in self._chunk(chunk, before, written, named)
            )
            if chunk.scores:
                scores.append(self._scores(chunk))
        self.named.append(named)
        self.results.append(StepResult(plan.step, tuple(sampled), tuple(scores)))

    def _scores(self, chunk) -> tuple[TokenScore, ...]:
        slot, size = self.slots[chunk.slot], self.config.block_size
        end = chunk.start + chunk.length
        kv = [self.blocks[slot.table[p // size]][p % size] for p in range(end)]
        return tuple(score(kv[: p + 1], slot.tokens[p + 1]) for p in range(chunk.start, end))

    def _guesses(self, slot: Slot, chunk) -> list[int]:
        """Those of the plan, or of a draft model that is right by turns."""
        assert not (chunk.drafts and chunk.guesses)
        guesses = list(chunk.drafts)
        for _ in range(chunk.guesses):
            text = [*slot.tokens, *guesses]
            digest = hashlib.sha256(b",".join(b"%d" % token for token in text)).digest()
            period = 3 + slot.start.params.seed % 5
            copies = digest[0] % 5 and len(text) >= period
            guesses.append(text[-period] if copies else digest[1] % VOCABULARY)
        return guesses

    def _chunk(self, chunk, before, written, named) -> list[int]:
        """The tokens that are sampled after a chunk."""
        size = self.config.block_size
        slot = self.slots[chunk.slot]
        slot.table.extend(chunk.new_blocks)
        if slot.computed == 0 and chunk.start:  # cached blocks: whole ones, and never all of the prompt
            assert chunk.start % size == 0 and self.config.prefix_cache
        else:
            assert chunk.start == slot.computed
        end = chunk.start + chunk.length
        assert chunk.length > 0 and end <= len(slot.tokens)
        assert chunk.length <= (self.config.max_chunk or chunk.length)
        assert chunk.samples == (end == len(slot.tokens) and not chunk.scores)
        guesses = self._guesses(slot, chunk)
        assert not guesses or (chunk.samples and chunk.length == 1)
        assert len(guesses) <= self.config.draft_tokens
        context, params = self.config.max_model_len, slot.start.params
        assert end + len(guesses) < min(
            context, slot.start.prompt_length + (params.max_tokens or context)
        ) or (not guesses), "a guess at what is never sampled"
        rows = slot.tokens[chunk.start : end] + guesses
        assert chunk.start + len(rows) <= len(slot.table) * size
        named.update((block, slot) for block in slot.table)
        kv = [before[slot.table[p // size]][p % size] for p in range(chunk.start)]
        for position, token in enumerate(rows, start=chunk.start):
            block = slot.table[position // size]
            assert (block, position % size) not in written, "two chunks write one position"
            for plan in self.named:
                assert plan.get(block, slot) is slot, "a block of a plan in flight was given away"
            # As on a GPU, a NaN reaches the positions before it that are computed with it.
            spoiled = OVERFLOW in rows or _NAN in kv
            kv.append(_NAN if spoiled else store(kv[-1] if kv else b"", position, token))
            self.blocks[block][position % size] = kv[-1]
            written[block, position % size] = chunk.slot
        slot.computed = end
        if not chunk.samples:
            return []
        if _NAN in kv:
            slot.tokens.append(0)
            return [-1]
        found: list[int] = []
        for right in range(len(guesses) + 1):
            token = sample(kv[: end + right], slot.tokens, params.seed, slot.start.choice)
            slot.tokens.append(token)
            found.append(token)
            if guesses[right : right + 1] != [token]:
                break
        slot.computed += len(found) - 1
        return found

    def take_result(self) -> StepResult:
        self.named.popleft()
        return self.results.popleft()
