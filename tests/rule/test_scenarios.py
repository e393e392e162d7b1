"""Random engines under random traffic: whatever a request meets, its reply stays what it is."""

from __future__ import annotations

import asyncio
import threading
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime.loop import EngineLoop
from runtime.types import Finished, FinishReason
from tests.replies import Reply, ask
from tests.rule.engines import HANGS, assert_same, check_idle, engine, plain_replies
from tests.rule.requests import named, requests

CONTEXT = 192
SHAPES = {
    "fp32": {"types": "F32", "heads": 8, "kv_heads": 4, "head_dim": 8, "hidden": 64, "ffn": 172},
    "quants": {
        "types": {"*": "Q4_K", "attn_v": "Q6_K", "attn_output": "Q8_0", "ffn_up": "Q4_0", "ffn_down": "Q2_K"},
        "heads": 10,
        "kv_heads": 5,
        "head_dim": 32,
        "hidden": 256,
        "ffn": 768,
        "layers": 1,
    },
    "int4": {
        "types": "Q4_0",
        "heads": 6,
        "kv_heads": 6,
        "head_dim": 32,
        "hidden": 192,
        "ffn": 352,
        "layers": 1,
    },
}
UNITS = {"fp32": 4, "quants": 5, "int4": 6}
REQUESTS = requests(384, CONTEXT, longest=20)


@pytest.fixture(scope="module")
def models(tiny) -> dict[str, Path]:
    return {name: tiny(context=CONTEXT, **shape) for name, shape in SHAPES.items()}


@cache
def plain(path: Path) -> list[Reply]:
    return plain_replies(path, REQUESTS)


@st.composite
def scenarios(draw):
    name = draw(st.sampled_from(sorted(SHAPES)))
    block = draw(st.sampled_from([4, 8, 16, 32, 64]))
    least = -(-CONTEXT // block)
    setting = {
        "tp": draw(st.integers(1, UNITS[name])),
        "threads": draw(st.sampled_from([1, 2])),
        "block_size": block,
        "total_blocks": draw(st.integers(least, 3 * least)),
        "max_chunk": draw(st.none() | st.integers(1, 100)),
        "max_step_tokens": draw(st.sampled_from([16, 60, 512])),
        "max_num_seqs": draw(st.integers(1, 16)),
        "prefix_cache": draw(st.booleans()),
    }
    asked = draw(st.lists(st.integers(0, len(REQUESTS) - 1), min_size=2, max_size=9))
    # For each: milliseconds before it comes, and the tokens after which its caller leaves (0: stays).
    arrivals = [(draw(st.integers(0, 15)), draw(st.sampled_from([0, 0, 0, 1, 5]))) for _ in asked]
    return name, setting, asked, arrivals


@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(scenarios())
def test_any_engine_under_any_traffic(models, scenario):
    name, setting, asked, arrivals = scenario
    path = models[name]
    want = plain(path)

    async def one(made, n: int) -> Reply | None:
        """The reply, or None once its caller has left."""
        wait, leaves = arrivals[n]
        await asyncio.sleep(wait / 1000)
        [request] = named([REQUESTS[asked[n]]], f".{n}")
        if not leaves:
            return (await ask(made.client, request))[0]
        seen = []
        stream = made.client.generate(request)
        async for output in stream:
            if isinstance(output, Finished):
                break
            seen.append(output)
            if len(seen) == leaves:
                break
        await stream.aclose()
        assert tuple(t.token for t in seen) == want[asked[n]].tokens[: len(seen)]
        return None

    async def serve(made) -> list[Reply | None]:
        async with asyncio.timeout(HANGS):
            return await asyncio.gather(*(one(made, n) for n in range(len(asked))))

    with engine(path, **setting) as made:
        replies = asyncio.run(serve(made))
        check_idle(made)
    pairs = [(reply, want[i]) for reply, i in zip(replies, asked, strict=True) if reply is not None]
    assert_same([one for one, _ in pairs], [other for _, other in pairs])


def test_a_stop_by_the_gateway_keeps_what_came_before(models, monkeypatch):
    """A stop string found late: the reply ends with STOP, and the tokens before it are the reply's own."""
    want = plain(models["int4"])
    step_finished, sampled, told = EngineLoop._step_finished, [], threading.Event()

    def waits(loop, result) -> None:
        """With the fourth token out, for the stop: or the reply could end before its reader is awake."""
        step_finished(loop, result)
        sampled.extend(result.tokens)
        if len(sampled) >= 4:
            told.wait(HANGS)

    monkeypatch.setattr(EngineLoop, "_step_finished", waits)

    async def serve(made) -> None:
        [request] = named([REQUESTS[0]], ".stop")
        seen = []
        async for output in made.client.generate(request):
            if isinstance(output, Finished):
                assert (output.reason, output.completion_tokens) == (FinishReason.STOP, 3)
                break
            seen.append(output.token)
            if len(seen) == 4:
                await made.client.stop_at(request.request_id, 3)
                told.set()
        assert tuple(seen) == want[0].tokens[: len(seen)]

    with engine(models["int4"]) as made:
        asyncio.run(serve(made))
        check_idle(made)
