"""`tramontane generate`: one reply from a model that is loaded for it."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from dataclasses import dataclass, replace

from runtime.commands.engines import Engine, Front, open_front, preview, start_engine
from runtime.commands.output import note, write_json, write_line, write_text
from runtime.config import ServeConfig
from runtime.errors import Unavailable
from runtime.server.pipeline import Completion, Pipeline
from runtime.server.reply import Final, Piece
from runtime.types import FinishReason, SamplingParams

MAX_TOKENS = 256  # where none are asked for: a model without a chat template may never end by itself


@dataclass(frozen=True, slots=True)
class Ask:
    """What is asked: text to continue or, with `chat`, a user's message to answer."""

    prompt: str
    chat: bool
    params: SamplingParams


def generate(config: ServeConfig, ask: Ask, *, local: bool, ray_address: str | None, as_json: bool) -> None:
    """Print the reply: its text as it grows, or all that is known of it as JSON. Raises TramontaneError."""
    front = open_front(config.model, chat=ask.chat, device=config.parallel.device)
    likely = front.pipeline(None, preview(front, config))
    asyncio.run(likely.prepare(_completion(ask, likely)))  # a bad parameter is found before weights are read
    with start_engine(config, local=local, ray_address=ray_address) as engine:
        asyncio.run(_generate(front, engine, ask, as_json))


def _completion(ask: Ask, pipeline: Pipeline) -> Completion:
    if ask.chat:
        completion = Completion(
            "generate", messages=[{"role": "user", "content": ask.prompt}], params=ask.params
        )
    else:
        completion = Completion("generate", text=ask.prompt, params=ask.params)
    if ask.params.max_tokens is not None:
        return completion
    room = pipeline.info.context_length - len(pipeline.encode(completion))
    # Where there is no room at all, the pipeline says so.
    return replace(completion, params=replace(ask.params, max_tokens=max(1, min(MAX_TOKENS, room))))


async def _generate(front: Front, engine: Engine, ask: Ask, as_json: bool) -> None:
    pieces: list[Piece] = []
    started, first = time.perf_counter(), None
    async with engine.connect() as client:
        pipeline = front.pipeline(client, engine.info)
        async with aclosing(pipeline.run(_completion(ask, pipeline))) as reply:
            async for piece in reply:
                first = first or time.perf_counter()
                pieces.append(piece)
                if not as_json:
                    write_text(piece.text)
    ended = time.perf_counter()
    if not as_json:
        write_line("")
    final = pieces[-1].final
    if final.finish_reason in (FinishReason.ERROR, FinishReason.FAILED):
        raise Unavailable(final.detail or "the engine failed")
    if as_json:
        write_json(reply_json(pieces, final, engine.info.model))
    else:
        rate = (final.completion_tokens - 1) / (ended - first) if ended > first else 0.0
        note(
            f"{final.finish_reason.value} after {final.completion_tokens} tokens, seed {final.seed}, "
            f"first token {1000 * (first - started):.0f} ms, then {rate:.1f} tokens/s"
        )


def reply_json(pieces: list[Piece], final: Final, model: str) -> dict:
    """A whole reply. Logprobs are natural and raw: before temperature, penalties and filters."""
    value = {
        "text": "".join(piece.text for piece in pieces),
        "token_ids": [token for piece in pieces for token in piece.token_ids],
        "finish_reason": final.finish_reason.value,
        "stop_string": final.matched_stop,
        "stop_token_id": final.stop_token,
        "seed": final.seed,
        "usage": {
            "prompt_tokens": final.prompt_tokens,
            "cached_tokens": final.cached_tokens,
            "completion_tokens": final.completion_tokens,
            "drafted_tokens": final.drafted_tokens,
            "accepted_tokens": final.accepted_tokens,
        },
        "model": model,
        "numerics": final.numerics,
    }
    entries = [entry for piece in pieces for entry in piece.logprobs]
    if entries:
        value["logprobs"] = [
            {
                "logprob": entry.logprob,
                "top": [{"token_id": each.token, "logprob": each.logprob} for each in entry.top],
            }
            for entry in entries
        ]
    return value
