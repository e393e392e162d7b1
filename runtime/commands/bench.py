"""`tramontane bench`: latency and throughput of a running server, or of an engine started for it.

Replies have a fixed length (end-of-sequence tokens are ignored) and prompts of random tokens that share no
prefix, so that no cache helps. Times are taken where tokens arrive: behind gRPC with `--target`.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Any

from runtime.commands.engines import open_front, preview, start_engine
from runtime.commands.output import watched, write_json
from runtime.commands.remote import Credentials, check_target, one_line
from runtime.config import ServeConfig
from runtime.errors import InvalidArgument, Unavailable
from runtime.server.pipeline import Completion, Pipeline
from runtime.types import FinishReason, SamplingParams
from tramontane import AsyncClient

Ask = Callable[[list[int], int], AsyncIterator[int]]
"""Prompt tokens and a number of reply tokens in; yields how many tokens have come, each time some come."""


@dataclass(frozen=True, slots=True)
class Workload:
    streams: int  # at once, in the second part
    prompt_tokens: int
    max_tokens: int
    repeat: int


@dataclass(slots=True)
class Trace:
    """One reply: when it was asked, and when its tokens came (seconds, one entry a token)."""

    asked: float
    arrivals: list[float] = field(default_factory=list)

    @property
    def first(self) -> float:
        return self.arrivals[0] - self.asked

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in zip(self.arrivals, self.arrivals[1:], strict=False)]


def bench_target(target: str, credentials: Credentials, work: Workload, *, as_json: bool) -> None:
    """Measure a running server. Raises TramontaneError."""
    check_target(target)
    files = credentials.read()
    with one_line(target):
        result = asyncio.run(_bench_target(target, files, work))
    _report({"target": target} | result, as_json)


def bench_model(
    config: ServeConfig, work: Workload, *, local: bool, ray_address: str | None, as_json: bool
) -> None:
    """Measure an engine of its own. Raises TramontaneError."""
    front = open_front(config.model, chat=False, device=config.parallel.device)
    _check(work, preview(front, config).context_length)
    with start_engine(config, local=local, ray_address=ray_address) as engine:

        async def run() -> dict:
            async with engine.connect() as client:
                ask = _ask_pipeline(front.pipeline(client, engine.info))
                return await _bench(ask, work, engine.info)

        result = asyncio.run(run())
    _report({"engine": "local" if local else "ray"} | result, as_json)


async def _bench_target(target: str, files: dict[str, Any], work: Workload) -> dict:
    async with AsyncClient(target, resumes=0, **files) as client:  # a break is not to be measured
        model = await client.model(timeout=10)

        async def ask(prompt: list[int], count: int) -> AsyncIterator[int]:
            options = {"temperature": 0.0, "max_tokens": count, "ignore_eos": True}
            async with client.stream_generate(prompt, **options) as stream:
                async for chunk in stream:
                    yield len(chunk.token_ids)

        return await _bench(ask, work, model)


def _ask_pipeline(pipeline: Pipeline) -> Ask:
    numbers = iter(range(1 << 62))

    async def ask(prompt: list[int], count: int) -> AsyncIterator[int]:
        params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, seed=0)
        completion = Completion(f"bench-{next(numbers)}", token_ids=prompt, params=params)
        async with aclosing(pipeline.run(completion)) as reply:
            async for piece in reply:
                if piece.final and piece.final.finish_reason in (FinishReason.ERROR, FinishReason.FAILED):
                    raise Unavailable(piece.final.detail or "the engine failed")
                yield len(piece.token_ids)

    return ask


async def _bench(ask: Ask, work: Workload, model) -> dict:
    """`model` knows context_length, vocab_size, tp and numerics: an EngineInfo or a client's Model."""
    _check(work, model.context_length)
    source = random.Random(0)

    def prompt() -> list[int]:
        return [source.randrange(model.vocab_size) for _ in range(work.prompt_tokens)]

    rounds = [("warming up", 1)] + [("one stream", 1)] * work.repeat
    rounds += [(f"{work.streams} streams", work.streams)] * (work.repeat if work.streams > 1 else 0)
    measured: dict[str, list[list[Trace]]] = {}
    with _bar(len(rounds)) as advance:
        for name, streams in rounds:
            advance(name)
            traces = [_trace(ask, prompt(), work.max_tokens) for _ in range(streams)]
            measured.setdefault(name, []).append(await asyncio.gather(*traces))
    del measured["warming up"]
    return {
        "model": getattr(model, "model", None) or model.name,
        "tp": model.tp,
        "numerics": model.numerics,
        "prompt_tokens": work.prompt_tokens,
        "max_tokens": work.max_tokens,
        "repeat": work.repeat,
        "runs": [_summary(runs, work.prompt_tokens) for runs in measured.values()],
    }


async def _trace(ask: Ask, prompt: list[int], count: int) -> Trace:
    trace = Trace(time.perf_counter())
    async for tokens in ask(prompt, count):
        trace.arrivals += [time.perf_counter()] * tokens
    return trace


def _summary(runs: list[list[Trace]], prompt_tokens: int) -> dict:
    """Medians over the runs of one number of streams. Rates are tokens a second of all streams together:
    `reply` from the first question to the last token, `decode` while all of them decode."""
    middle = statistics.median
    summary = {
        "streams": len(runs[0]),
        "time_to_first_token_s": middle(trace.first for run in runs for trace in run),
        "inter_token_s": middle(gap for run in runs for trace in run for gap in trace.gaps),
        "decode_tokens_per_s": middle(_decode_rate(run) for run in runs),
        "reply_tokens_per_s": middle(_reply_rate(run) for run in runs),
    }
    if len(runs[0]) == 1:
        summary["prefill_tokens_per_s"] = middle(prompt_tokens / run[0].first for run in runs)
    return summary


def _decode_rate(run: list[Trace]) -> float:
    """From when the last stream has its first token until the first stream ends."""
    start = max(trace.arrivals[0] for trace in run)
    end = min(trace.arrivals[-1] for trace in run)
    tokens = sum(1 for trace in run for at in trace.arrivals if start < at <= end)
    return tokens / (end - start) if end > start else 0.0


def _reply_rate(run: list[Trace]) -> float:
    start = min(trace.asked for trace in run)
    end = max(trace.arrivals[-1] for trace in run)
    return sum(len(trace.arrivals) for trace in run) / (end - start)


def _check(work: Workload, context: int) -> None:
    for name, value, low in (
        ("streams", work.streams, 1),
        ("prompt-tokens", work.prompt_tokens, 1),
        ("max-tokens", work.max_tokens, 2),
        ("repeat", work.repeat, 1),
    ):
        if value < low:
            raise InvalidArgument(name, f"must be at least {low}, not {value}")
    if work.prompt_tokens + work.max_tokens > context:
        raise InvalidArgument(
            "prompt-tokens", f"with max-tokens they make more than the context of {context} tokens"
        )


@contextmanager
def _bar(total: int) -> Iterator[Callable[[str], None]]:
    """A bar over rounds; the function given names the next one."""
    if not watched():
        yield lambda name: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("", total=total)
        yield lambda name: bars.update(task, description=name, advance=1)


def _report(value: dict, as_json: bool) -> None:
    if as_json:
        write_json(value)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("", box=None)
    for run in value["runs"]:
        table.add_column(f"{run['streams']} stream{'s' if run['streams'] > 1 else ''}", justify="right")
    rows = (
        ("time to first token", "time_to_first_token_s", lambda x: f"{1000 * x:.1f} ms"),
        ("between tokens", "inter_token_s", lambda x: f"{1000 * x:.1f} ms"),
        ("decode, all streams", "decode_tokens_per_s", lambda x: f"{x:.1f} tok/s"),
        ("reply, all streams", "reply_tokens_per_s", lambda x: f"{x:.1f} tok/s"),
        ("prefill", "prefill_tokens_per_s", lambda x: f"{x:.0f} tok/s"),
    )
    for name, key, show in rows:
        table.add_row(name, *(show(run[key]) if key in run else "" for run in value["runs"]))
    console = Console(highlight=False)
    console.print(
        f"{value['model']}, tp {value['tp']}: prompts of {value['prompt_tokens']} tokens, replies of "
        f"{value['max_tokens']}, medians of {value['repeat']}",
        markup=False,
    )
    console.print(table)
