"""Text with stop strings, through the gateway's pipeline: the same pieces whatever the engine behind it."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from runtime.server.pipeline import Completion, Pipeline, Resume
from runtime.server.reply import Piece
from tests.conformance.compare import Tally
from tests.conformance.models import Model

PLAIN = {"max_num_seqs": 1, "prefix_cache": False, "max_step_tokens": 4096}
SETTINGS = (
    {"block_size": 16},
    {"block_size": 4, "total_blocks": 160, "max_chunk": 7},
    {"tp": 2, "block_size": 8},
    {"tp": 3, "prefix_cache": False},
)


def completions(model: Model) -> list[Completion]:
    """The list's requests by text where it matters: each with a stop string that its own text holds, one
    that only begins in it, and one that never comes."""
    made = []
    for request in model.requests:
        tokens = model.plain.reply(request).tokens
        text = model.tokenizer.decode(list(tokens))
        middle = len(text) // 2
        stops = tuple(s for s in (text[middle : middle + 2], text[-1:] + "\u0001", "\u0002\u0003") if s)
        params = replace(request.params, stop=stops, stop_token_ids=request.stop_ids)
        made.append(Completion(request.request_id, token_ids=request.prompt, params=params))
    return made


def run_gateway(model: Model) -> Tally:
    """Together, in small rooms, on several ranks, and resumed after every number of tokens, held against
    one request at a time."""
    asked, tally = completions(model), Tally()
    with model.serving(**PLAIN) as serving:
        want = asyncio.run(_all(model, serving.client, asked, together=False))
    matched = sum(pieces[-1].final.matched_stop is not None for pieces in want)
    tally.note("stop strings found", matched)
    for settings in SETTINGS:
        if settings.get("tp", 1) > model.units:
            continue
        with model.serving(**settings) as serving:
            found = asyncio.run(_all(model, serving.client, asked))
            for completion, got, plain in zip(asked, found, want, strict=True):
                tally.compare(f"gateway, {settings}, {completion.request_id}", _items(got), _items(plain))
            if settings is SETTINGS[0]:
                _resumed(model, serving.client, asked, want, tally)
    tally.note("gateways", 1)
    return tally


def _resumed(model: Model, client, asked: list[Completion], want: list[list[Piece]], tally: Tally) -> None:
    parts, befores = [], []
    for completion, plain in zip(asked, want, strict=True):
        begun, tokens = plain[0].begun, [token for piece in plain for token in piece.token_ids]
        for known in range(1, len(tokens) + 1):
            resume = Resume((tokens[:known],), begun.numerics, begun.seed, begun.prompt_digest)
            name = f"{completion.request_id}+{known}"
            parts.append(replace(completion, request_id=name, resume=resume))
            befores.append((known, plain))
    found = asyncio.run(_all(model, client, parts))
    for part, got, (known, plain) in zip(parts, found, befores, strict=True):
        sent = [piece for piece in plain if piece.final is None][:known]
        tally.compare(f"gateway, resumed, {part.request_id}", _items([*sent, *got]), _items(plain))


async def _all(model: Model, client, asked: list[Completion], *, together: bool = True) -> list[list[Piece]]:
    pipeline = Pipeline(model.tokenizer, None, client, await client.info())

    async def one(completion: Completion) -> list[Piece]:
        return [piece async for piece in pipeline.run(completion)]

    async with asyncio.timeout(600):
        if together:
            return await asyncio.gather(*(one(completion) for completion in asked))
        return [await one(completion) for completion in asked]


def _items(pieces: list[Piece]) -> list[bytes]:
    """Tokens with their logprobs, the text, and how it ended: `repr` of a float has all its bits."""
    final = replace(pieces[-1].final, cached_tokens=0)
    logprobs = [entry for piece in pieces for entry in piece.logprobs]
    tokens = [token for piece in pieces for token in piece.token_ids]
    text = "".join(piece.text for piece in pieces)
    return [repr(part).encode() for part in (*tokens, *logprobs)] + [text.encode(), repr(final).encode()]
