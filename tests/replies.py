"""Asks an engine for replies and keeps all that came back, to the last bit."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from runtime.types import (
    Branch,
    Finished,
    FinishReason,
    Request,
    SamplingParams,
    TokenLogprob,
    TokenOutput,
)


@dataclass(frozen=True)
class Reply:
    """Everything of a reply that must be a pure function of the request."""

    tokens: tuple[int, ...]
    logprobs: tuple[float | None, ...]
    tops: tuple[tuple[TokenLogprob, ...], ...]
    reason: FinishReason
    stop_token: int | None


async def ask(client, request: Request) -> tuple[Reply, Finished]:
    """All that an `EngineClient` sends of the one reply that is asked for."""
    (found,) = await ask_choices(client, request)
    return found


async def ask_choices(client, request: Request) -> list[tuple[Reply, Finished]]:
    """All that an `EngineClient` sends of each branch's reply, in the branches' order."""
    tokens: dict[int, list[TokenOutput]] = {branch.choice: [] for branch in request.branches}
    ends: dict[int, Finished] = {}
    async for output in client.generate(request):
        assert output.choice not in ends, "something came after the last output"
        if isinstance(output, Finished):
            ends[output.choice] = output
            assert output.last == (len(ends) == len(tokens))
        else:
            tokens[output.choice].append(output)
    return [_reply(branch, tokens[branch.choice], ends[branch.choice]) for branch in request.branches]


def _reply(branch: Branch, tokens: list[TokenOutput], end: Finished) -> tuple[Reply, Finished]:
    known = len(branch.reply)
    assert [t.index for t in tokens] == list(range(known, known + len(tokens)))
    assert end.completion_tokens == known + len(tokens)
    reply = Reply(
        tuple(t.token for t in tokens),
        tuple(t.logprob for t in tokens),
        tuple(t.top for t in tokens),
        end.reason,
        end.stop_token,
    )
    return reply, end


async def ask_all(client, requests: Iterable[Request], limit: float = 240.0) -> list[Reply]:
    """Replies to requests that are asked together."""
    async with asyncio.timeout(limit):
        found = await asyncio.gather(*(ask(client, request) for request in requests))
    return [reply for reply, _ in found]


async def ask_in_turn(client, requests: Iterable[Request], limit: float = 240.0) -> list[Reply]:
    """Replies to requests that are asked one after another, each alone."""
    async with asyncio.timeout(limit):
        return [(await ask(client, request))[0] for request in requests]


def greedy(
    name: str, prompt: Sequence[int], max_tokens: int, stop_ids: Sequence[int] = (), **more
) -> Request:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, seed=0, **more)
    return Request(name, tuple(prompt), params, tuple(stop_ids))
