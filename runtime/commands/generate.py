"""`tramontane generate`: a reply, or several to one prompt, from a model that is loaded for it."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from runtime.commands.engines import Engine, Front, open_front, preview, start_engine
from runtime.commands.output import note, write_json, write_line, write_text
from runtime.config import ServeConfig
from runtime.errors import Unavailable
from runtime.server.pipeline import Completion, Pipeline
from runtime.server.reply import Piece
from runtime.types import FinishReason, SamplingParams

MAX_TOKENS = 256  # where none are asked for: a model without a chat template may never end by itself


@dataclass(frozen=True, slots=True)
class Ask:
    """What is asked: text to continue or, with `chat`, a user's message to answer; `n` times."""

    prompt: str
    chat: bool
    params: SamplingParams
    n: int = 1


def generate(config: ServeConfig, ask: Ask, *, local: bool, ray_address: str | None, as_json: bool) -> None:
    """Print the reply: its text as it grows, or all that is known of it as JSON. Of several, the texts come
    one after another. Raises TramontaneError."""
    front = open_front(config.model, chat=ask.chat, device=config.parallel.device)
    likely = front.pipeline(None, preview(front, config))
    asyncio.run(likely.prepare(_completion(ask, likely)))  # a bad parameter is found before weights are read
    with start_engine(config, local=local, ray_address=ray_address) as engine:
        asyncio.run(_generate(front, engine, ask, as_json))


def _completion(ask: Ask, pipeline: Pipeline) -> Completion:
    completion = Completion("generate", text=ask.prompt, params=ask.params, n=ask.n)
    if ask.chat:
        messages = [{"role": "user", "content": ask.prompt}]
        completion = replace(completion, text=None, messages=messages)
    if ask.params.max_tokens is not None:
        return completion
    room = pipeline.info.context_length - len(pipeline.encode(completion))
    # Where there is no room at all, the pipeline says so.
    return replace(completion, params=replace(ask.params, max_tokens=max(1, min(MAX_TOKENS, room))))


async def _generate(front: Front, engine: Engine, ask: Ask, as_json: bool) -> None:
    choices: list[list[Piece]] = [[] for _ in range(ask.n)]
    screen = None if as_json else _Screen(ask.n)
    started, first = time.perf_counter(), None
    async with engine.connect() as client:
        pipeline = front.pipeline(client, engine.info)
        async with aclosing(pipeline.run(_completion(ask, pipeline))) as reply:
            async for piece in reply:
                first = first or time.perf_counter()
                choices[piece.choice].append(piece)
                if screen is not None:
                    screen.add(piece)
    ended = time.perf_counter()
    finals = [pieces[-1].final for pieces in choices]
    for final in finals:
        if final.finish_reason in (FinishReason.ERROR, FinishReason.FAILED):
            raise Unavailable(final.detail or "the engine failed")
    if as_json:
        write_json(reply_json(choices, engine.info.model))
    else:
        tokens = sum(final.completion_tokens for final in finals)
        rate = (tokens - 1) / (ended - first) if ended > first else 0.0
        what = f"{finals[0].finish_reason.value} after {tokens} tokens"
        if ask.n > 1:
            what = f"{ask.n} choices, {tokens} tokens in all"
        note(
            f"{what}, seed {finals[0].seed}, "
            f"first token {1000 * (first - started):.0f} ms, then {rate:.1f} tokens/s"
        )


class _Screen:
    """Writes the text of each choice as it grows, the first one's first; the others' waits until those before
    have ended. Where there are several, each has a heading."""

    def __init__(self, n: int):
        self._waiting: list[deque[Piece]] = [deque() for _ in range(n)]
        self._at = 0  # the choice that is written
        self._headed = 0  # choices that have their heading

    def add(self, piece: Piece) -> None:
        self._waiting[piece.choice].append(piece)
        while self._at < len(self._waiting) and self._waiting[self._at]:
            self._write(self._waiting[self._at].popleft())

    def _write(self, piece: Piece) -> None:
        if len(self._waiting) > 1 and self._headed == self._at:
            self._headed += 1
            write_line(f"choice {self._headed}:")
        write_text(piece.text)
        if piece.final is not None:
            self._at += 1
            write_line("")


def reply_json(choices: Sequence[Sequence[Piece]], model: str) -> dict:
    """A whole reply; where there are several, `choices`, and usage counts the prompt once and the tokens of
    all. Logprobs are natural and raw: before temperature, penalties and filters."""
    finals = [pieces[-1].final for pieces in choices]
    shared = {
        "seed": finals[0].seed,
        "usage": {
            "prompt_tokens": finals[0].prompt_tokens,
            "cached_tokens": finals[0].cached_tokens,
            "completion_tokens": sum(final.completion_tokens for final in finals),
            "drafted_tokens": sum(final.drafted_tokens for final in finals),
            "accepted_tokens": sum(final.accepted_tokens for final in finals),
        },
        "model": model,
        "numerics": finals[0].numerics,
    }
    if len(choices) == 1:
        return _choice_json(choices[0]) | shared | _logprobs_json(choices[0])
    return {"choices": [_choice_json(pieces) | _logprobs_json(pieces) for pieces in choices]} | shared


def _choice_json(pieces: Sequence[Piece]) -> dict:
    final = pieces[-1].final
    return {
        "text": "".join(piece.text for piece in pieces),
        "token_ids": [token for piece in pieces for token in piece.token_ids],
        "finish_reason": final.finish_reason.value,
        "stop_string": final.matched_stop,
        "stop_token_id": final.stop_token,
    }


def _logprobs_json(pieces: Sequence[Piece]) -> dict:
    """An entry a token; nothing at all where they were not asked for."""
    entries = [entry for piece in pieces for entry in piece.logprobs]
    if not entries:
        return {}
    return {
        "logprobs": [
            {
                "logprob": entry.logprob,
                "top": [{"token_id": each.token, "logprob": each.logprob} for each in entry.top],
            }
            for entry in entries
        ]
    }
