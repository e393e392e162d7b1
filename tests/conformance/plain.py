"""The reference: one request at a time, its prompt in one step, then a step a token, on one rank.

It hands plans to a runner itself. No scheduler, no loop, no cache, no block that was used before: what it
says is the model's and the sampler's, and where it stops is written out here once more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from runtime.model.communicator import Alone
from runtime.model.runners import StepRunner, make_runner
from runtime.types import (
    Chunk,
    FinishReason,
    Request,
    SampledToken,
    SequenceStart,
    StepPlan,
    TokenScore,
)
from tests.replies import Reply

BLOCK = 64


class Plain:
    """Plain replies of one model, each computed when it is first asked for."""

    def __init__(self, shard, context: int):
        """shard: all of a model. context: most tokens of prompt and reply."""
        self._shard = shard
        self._context = context
        self._replies: dict[tuple[Request, int], Reply] = {}
        self._scores: dict[Request, tuple[TokenScore, ...]] = {}

    def reply(self, request: Request, choice: int = 0) -> Reply:
        """The whole reply; `request.branches` do not matter, nor its name."""
        request = replace(request, request_id="", branches=(), scores=False, cache_salt="", priority=0)
        if (request, choice) not in self._replies:
            self._replies[request, choice] = self._ask(request, choice)
        return self._replies[request, choice]

    def scores(self, request: Request) -> tuple[TokenScore, ...]:
        """What is thought of every token of the prompt but the first."""
        request = replace(request, request_id="", branches=(), scores=True, cache_salt="", priority=0)
        if request not in self._scores:
            tokens = request.prompt[:-1]
            start = SequenceStart(0, request.prompt, len(request.prompt), request.params, (), 0)
            chunk = Chunk(0, 0, len(tokens), _blocks(0, len(tokens)), False, True)
            result = self._runner().execute(StepPlan(1, (), (start,), (chunk,)))
            self._scores[request] = result.scores[0]
        return self._scores[request]

    def _ask(self, request: Request, choice: int) -> Reply:
        params, prompt = request.params, request.prompt
        most = min(params.max_tokens, self._context - len(prompt))
        kept: list[SampledToken] = []
        for sampled in self._tokens(request, choice):
            kept.append(sampled)
            if sampled.token in request.stop_ids and len(kept) > params.min_tokens:
                return _reply(kept, FinishReason.STOP, sampled.token)
            if len(kept) == most:
                return _reply(kept, FinishReason.LENGTH, None)
        raise AssertionError("a reply that never ends")

    def _tokens(self, request: Request, choice: int) -> Iterator[SampledToken]:
        runner, length = self._runner(), len(request.prompt)
        start = SequenceStart(0, request.prompt, length, request.params, request.stop_ids, choice)
        at, step, starts = 0, 1, (start,)
        while True:
            chunk = Chunk(0, at, length - at, _blocks(at, length), True)
            yield runner.execute(StepPlan(step, (), starts, (chunk,))).tokens[0]
            at, length, step, starts = length, length + 1, step + 1, ()

    def _runner(self) -> StepRunner:
        blocks = -(-self._context // BLOCK)
        return make_runner(
            self._shard, Alone(), total_blocks=blocks, block_size=BLOCK, max_positions=self._context
        )


def _blocks(start: int, stop: int) -> tuple[int, ...]:
    """The blocks that positions start .. stop - 1 need and those before did not."""
    return tuple(range(-(-start // BLOCK), -(-stop // BLOCK)))


def _reply(kept: list[SampledToken], reason: FinishReason, stop_token: int | None) -> Reply:
    return Reply(
        tuple(t.token for t in kept),
        tuple(t.logprob for t in kept),
        tuple(t.top for t in kept),
        reason,
        stop_token,
    )
