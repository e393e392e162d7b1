"""Local engines of any setting, and the plain run that all are compared with."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from runtime.config import EngineConfig, ModelConfig, ParallelConfig
from runtime.local import LocalEngine
from runtime.loop import EngineLoop
from runtime.types import Request
from tests.replies import Reply, ask_in_turn

HANGS = 120.0  # seconds: whoever has not answered by then never will, on any machine


@contextmanager
def engine(
    path: Path,
    *,
    tp: int = 1,
    pp: int = 1,
    threads: int = 1,
    dtype: str = "auto",
    max_model_len: int | None = None,
    **settings,
) -> Iterator[LocalEngine]:
    made = LocalEngine(
        ModelConfig(str(path), dtype=dtype, max_model_len=max_model_len),
        EngineConfig(**settings),
        ParallelConfig(tp=tp, pp=pp, threads=threads),
    )
    try:
        yield made
    finally:
        made.close()


def plain_replies(path: Path, requests: list[Request], dtype: str = "auto") -> list[Reply]:
    """One rank, one thread, one request at a time, whole prompts, nothing cached."""
    settings = {"max_num_seqs": 1, "prefix_cache": False, "max_step_tokens": 4096}
    with engine(path, dtype=dtype, **settings) as alone:
        return asyncio.run(ask_in_turn(alone.client, requests))


def check_idle(made: LocalEngine) -> None:
    """Raises what the engine's integrity check finds wrong."""
    import queue

    answers: queue.SimpleQueue = queue.SimpleQueue()
    made.loop.check(answers.put)
    if error := answers.get(timeout=HANGS):
        raise error


@asynccontextmanager
async def held(made: LocalEngine) -> AsyncIterator[None]:
    """The engine does nothing meanwhile, and finds all that it was asked when it goes on. Without, who comes
    first may be done before the next one comes, wherever the caller's thread has to wait for a processor."""
    go_on, stands = threading.Event(), asyncio.Event()
    here = asyncio.get_running_loop()

    def stand(_: Exception | None) -> None:
        here.call_soon_threadsafe(stands.set)
        go_on.wait(HANGS)

    made.loop.check(stand)
    try:
        async with asyncio.timeout(HANGS):
            await stands.wait()
        yield
    finally:
        go_on.set()


async def at_once(made: LocalEngine, work: Coroutine, requests: int):
    """What `work` returns, which asks for so many requests: they come before the first of them has a plan."""
    async with held(made):
        task = asyncio.ensure_future(work)
        while made.loop._events.qsize() < requests and not task.done():
            await asyncio.sleep(0)
    return await task


def lose_ranks(monkeypatch: pytest.MonkeyPatch, *lives: int, of: EngineLoop | None = None) -> None:
    """Engines lose their ranks once these have answered so many steps, in the order of their first answers,
    or one engine alone. Counted where steps come in: an engine may be far ahead of whoever reads."""
    plain, ahead, left = EngineLoop._step_finished, list(lives), {}

    def step_finished(loop: EngineLoop, result) -> None:
        plain(loop, result)
        if of not in (None, loop):
            return
        if loop not in left:
            left[loop] = ahead.pop(0) if ahead else 0
        left[loop] -= 1
        if not left[loop]:
            loop._ranks_lost("killed")

    monkeypatch.setattr(EngineLoop, "_step_finished", step_finished)


def assert_same(got: list[Reply], want: list[Reply]) -> None:
    """Equal to the last bit of every logprob; says which request differs, and where first."""
    assert len(got) == len(want)
    for i, (one, other) in enumerate(zip(got, want, strict=True)):
        if one != other:
            at = next(
                (n for n, (a, b) in enumerate(zip(one.tokens, other.tokens, strict=False)) if a != b), None
            )
            raise AssertionError(f"request {i} differs, tokens first at {at}:\n{one}\n{other}")
