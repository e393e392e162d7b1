"""`tramontane batch`: a file of requests to a file of results, one line each, through interruptions.

A request whose line stands in OUT is done; the same command goes on with the rest. Requests run many at once
and results are written as they come, in no order. What is wrong with one request stands in its line and stops
no other; where the engine or all servers are gone, the batch stops, and what it left open has no line.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tramontane
from runtime.commands.batch_answers import (
    Answer,
    Answerers,
    as_ours,
    by_client,
    by_pipeline,
    failure_of,
    retry_after,
)
from runtime.commands.batch_files import Requests, Results
from runtime.commands.batch_lines import failure_line, form_of, parse, reply_line
from runtime.commands.engines import open_front, preview, start_engine
from runtime.commands.failures import Terminated
from runtime.commands.output import watched, write_json, write_line
from runtime.commands.remote import Credentials, check_target
from runtime.config import ServeConfig
from runtime.errors import InvalidArgument, TramontaneError, Unavailable
from tramontane.retry import RESUMES
from tramontane.types import Reply

SHARED_RESUMES = 3  # see tramontane.retry; under a second
REBUILDS = 3  # of one of several replicas; where there is but one, what is left is for the next run
DRAIN_SECONDS = 30.0  # what running requests have to finish in after a signal


@dataclass(frozen=True, slots=True)
class Work:
    """What is to be done."""

    requests: Path
    results: Path
    concurrency: int  # requests at once
    max_tokens: int | None  # of requests that name none


@dataclass(slots=True)
class Done:
    """What this run has done."""

    replies: int = 0
    failures: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0


def batch_model(
    config: ServeConfig, work: Work, *, local: bool, ray_address: str | None, as_json: bool
) -> None:
    """Through an engine of its own. Raises TramontaneError, also where requests failed."""

    @contextmanager
    def engine() -> Iterator[Answerers]:
        front = open_front(config.model, chat=True, device=config.parallel.device)
        preview(front, config)
        rebuilds = REBUILDS if config.parallel.replicas > 1 else 0
        with start_engine(config, local=local, ray_address=ray_address, rebuilds=rebuilds) as running:

            @asynccontextmanager
            async def answerers() -> AsyncIterator[Sequence[Answer]]:
                async with running.connect() as client:
                    yield [by_pipeline(front.pipeline(client, running.info))]

            yield answerers

    _batch(work, engine, as_json)


def batch_targets(targets: Sequence[str], credentials: Credentials, work: Work, *, as_json: bool) -> None:
    """Through running servers, with the same credentials for all. Raises as batch_model does."""
    for target in targets:
        check_target(target)
    files = credentials.read()

    @asynccontextmanager
    async def answerers() -> AsyncIterator[Sequence[Answer]]:
        async with contextlib.AsyncExitStack() as stack:
            # Where another server can take over, one that is gone is not waited for as long.
            resumes = RESUMES if len(targets) == 1 else SHARED_RESUMES
            clients = [
                await stack.enter_async_context(tramontane.AsyncClient(each, resumes=resumes, **files))
                for each in targets
            ]
            yield [by_client(client) for client in clients]

    _batch(work, lambda: contextlib.nullcontext(answerers), as_json)


def _batch(
    work: Work, start: Callable[[], contextlib.AbstractContextManager[Answerers]], as_json: bool
) -> None:
    for name, value in (("concurrency", work.concurrency), ("max-tokens", work.max_tokens)):
        if value is not None and value < 1:
            raise InvalidArgument(name, f"must be at least 1, not {value}")
    with contextlib.closing(Requests(work.requests)) as requests:
        if work.results.exists() and os.path.samefile(work.requests, work.results):
            raise InvalidArgument("out", "is the file of requests")
        wanted = requests.check()
        with contextlib.closing(Results(work.results)) as results:
            before = wanted & results.done.keys()
            done, ended = Done(), None
            if len(before) < len(wanted):
                lines = requests.without(set(results.done))
                with start() as answerers:
                    done, ended = asyncio.run(
                        _run(work, lines, results, answerers, len(wanted) - len(before))
                    )
            finished = [results.done[name] for name in wanted if name in results.done]
    _report(len(wanted), len(before), finished, done, as_json)
    if ended is not None:
        raise ended
    if any(finished):
        raise TramontaneError(
            f"{sum(finished)} of {len(wanted)} requests failed; their lines in {work.results} say why"
        )


# ---- running ----------------------------------------------------------------------------------------------


async def _run(
    work: Work, lines: Iterator[dict], results: Results, answerers: Answerers, left: int
) -> tuple[Done, BaseException | None]:
    """Answer all lines; what ended it early, if something did."""
    started = time.perf_counter()
    with _signals() as signals, _bar(left) as advance:
        async with answerers() as answers:
            run = _Run(work, lines, results, advance)
            ended = await run.all(answers, signals)
    run.done.seconds = time.perf_counter() - started
    return run.done, ended


class _Run:
    """One run of a batch."""

    def __init__(self, work: Work, lines: Iterator[dict], results: Results, advance: Callable[[], None]):
        self.done = Done()
        self._work = work
        self._lines = lines
        self._again: deque[dict] = deque()  # taken by a worker whose server then went away
        self._results = results
        self._advance = advance
        self._stopping = False
        self._waiting: list[dict] = []  # results to be written
        self._writing = asyncio.Lock()
        self._writes: set[asyncio.Task] = set()

    async def all(self, answers: Sequence[Answer], signals: asyncio.Queue[int]) -> BaseException | None:
        """Until nothing is left, a signal has come, or nobody answers any more. What the last two were."""
        try:
            return as_ours(await self._all(list(answers), signals))
        finally:
            await asyncio.gather(*self._writes, return_exceptions=True)

    async def _all(self, alive: Sequence[Answer], signals: asyncio.Queue[int]) -> BaseException | None:
        ended: BaseException | None = None
        while alive and ended is None and not self._stopping:
            gone: dict[int, BaseException] = {}
            workers = [
                asyncio.create_task(self._work_with(number, alive, gone))
                for number in range(max(self._work.concurrency, len(alive)))
            ]
            ended = await self._finish(workers, signals)
            if ended is None and not gone:
                break  # every line has been answered
            alive = [answer for number, answer in enumerate(alive) if number not in gone]
            if ended is None and not alive:
                (ended, *_) = gone.values()
        return ended

    async def _finish(self, workers: list[asyncio.Task], signals: asyncio.Queue[int]) -> BaseException | None:
        everyone = asyncio.gather(*workers)
        signal_ = asyncio.create_task(signals.get())
        ended: BaseException | None = None
        try:
            await asyncio.wait([everyone, signal_], return_when=asyncio.FIRST_COMPLETED)
            if signal_.done():
                ended = KeyboardInterrupt() if signal_.result() == signal.SIGINT else Terminated()
                self._stopping = True
                signal_ = asyncio.create_task(signals.get())
                await asyncio.wait(
                    [everyone, signal_], timeout=DRAIN_SECONDS, return_when=asyncio.FIRST_COMPLETED
                )
            if everyone.done():
                everyone.result()  # a defect, or a disk that is full, ends it all
        finally:
            signal_.cancel()
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            with contextlib.suppress(BaseException):
                await everyone
        return ended

    async def _work_with(self, number: int, alive: Sequence[Answer], gone: dict[int, BaseException]) -> None:
        mine = number % len(alive)
        while not self._stopping and mine not in gone:
            value = self._again.popleft() if self._again else next(self._lines, None)
            if value is None:
                return
            try:
                line, reply = await self._answer(value, alive[mine])
            except (Unavailable, tramontane.Unavailable, tramontane.Unauthenticated) as error:
                self._again.append(value)
                gone[mine] = error
                return
            await self._write(line)
            if reply is None:
                self.done.failures += 1
            else:
                self.done.replies += 1
                self.done.prompt_tokens += reply.usage.prompt_tokens
                self.done.completion_tokens += reply.usage.completion_tokens

    async def _answer(self, value: dict[str, Any], answer: Answer) -> tuple[dict[str, Any], Reply | None]:
        """The line to write, and the reply in it if it is one."""
        while True:
            try:
                ask = parse(value)
                if self._work.max_tokens is not None:
                    ask.options.setdefault("max_tokens", self._work.max_tokens)
                reply = await answer(ask)
                return reply_line(ask, reply, int(time.time())), reply
            except (TramontaneError, tramontane.Error) as error:
                wait = retry_after(error)
                if wait is None:
                    return failure_line(value["custom_id"], form_of(value), failure_of(error)), None
            await asyncio.sleep(wait)

    async def _write(self, line: dict[str, Any]) -> None:
        """Return once the line is durable. Lines that wait for the disk are written together."""
        self._waiting.append(line)
        write = asyncio.create_task(self._write_waiting())
        self._writes.add(write)
        write.add_done_callback(self._writes.discard)
        await asyncio.shield(write)  # what a cancelled worker has answered is still written

    async def _write_waiting(self) -> None:
        async with self._writing:
            lines, self._waiting = self._waiting, []
            if lines:
                await asyncio.to_thread(self._results.append, lines)
            for _ in lines:
                self._advance()


@contextmanager
def _signals() -> Iterator[asyncio.Queue[int]]:
    """SIGINT and SIGTERM as they come, while the block runs."""
    loop = asyncio.get_running_loop()
    heard: asyncio.Queue[int] = asyncio.Queue()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        loop.add_signal_handler(number, heard.put_nowait, number)
    try:
        yield heard
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)


@contextmanager
def _bar(total: int) -> Iterator[Callable[[], None]]:
    """A bar over requests; the function given counts one."""
    if not watched():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    with Progress(
        BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=Console(stderr=True), transient=True
    ) as bars:
        task = bars.add_task("", total=total)
        yield lambda: bars.advance(task)


def _report(total: int, before: int, finished: list[bool], done: Done, as_json: bool) -> None:
    value = {
        "requests": total,
        "done": len(finished),
        "failed": sum(finished),
        "before": before,
        "replies": done.replies,
        "failures": done.failures,
        "prompt_tokens": done.prompt_tokens,
        "completion_tokens": done.completion_tokens,
        "seconds": round(done.seconds, 3),
    }
    if as_json:
        write_json(value)
        return
    rate = done.completion_tokens / done.seconds if done.seconds else 0.0
    write_line(
        f"{len(finished)} of {total} requests done, {sum(finished)} of them failed; {before} done before. "
        f"This run: {done.replies} replies of {done.completion_tokens} tokens in {done.seconds:.1f} s, "
        f"{rate:.0f} tokens/s"
    )
