"""What one tenant computed shows to no other, not even by what it saves; the reply is the same either way."""

from __future__ import annotations

import asyncio

from runtime.server.pipeline import Completion, Pipeline
from runtime.types import SamplingParams
from tests.rule.engines import check_idle, engine
from tests.server.scripted import PieceTokenizer

BLOCK = 16
PROMPT = tuple(range(3, 53))  # three full blocks and a bit


def test_prefixes_are_shared_within_a_salt_alone(tiny):
    path = tiny(context=128)

    async def go(made):
        info = await made.client.info()
        pipeline = Pipeline(PieceTokenizer([b"x"] * 126), None, made.client, info)
        names = iter(range(100))

        async def ask(salt: str, score: bool = False) -> tuple[tuple[int, ...], int]:
            params = SamplingParams(temperature=0.0, max_tokens=4)
            completion = Completion(str(next(names)), token_ids=PROMPT, params=params, cache_salt=salt)
            if score:
                coming = pipeline.scores(await pipeline.prepare_score(completion))
            else:
                coming = pipeline.run(completion)
            pieces = [piece async for piece in coming]
            return tuple(t for p in pieces for t in p.token_ids), pieces[-1].final.cached_tokens

        first, cached = await ask("a")
        assert cached == 0
        assert await ask("a") == (first, 3 * BLOCK)
        assert await ask("b") == (first, 0)
        assert await ask("") == (first, 0)
        assert await ask("a") == (first, 3 * BLOCK)
        assert await ask("c", score=True) == (PROMPT, 0)
        assert await ask("c") == (first, 3 * BLOCK)
        assert await ask("d") == (first, 0)
        load = await made.client.load()
        assert load.prefix_hit_tokens == 9 * BLOCK
        assert load.prefix_query_tokens == 7 * len(PROMPT)

    with engine(path, block_size=BLOCK) as made:
        asyncio.run(go(made))
        check_idle(made)
