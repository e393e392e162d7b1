"""Keeps replicas of a model at work: connects them, notices that one is lost, builds it again.

What runs on a lost one goes on at another, or waits for it to be back (runtime/server/replicas.py). Knows
neither what an engine is made of nor who serves it.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

from runtime.commands.output import log_line
from runtime.errors import TramontaneError, Unavailable
from runtime.server.engine_client import EngineClient
from runtime.server.replicas import Replicas, joint
from runtime.types import EngineInfo

STEADY_SECONDS = 600.0  # a replica that served for so long starts its count of rebuilds anew
FIRST_WAIT = 1.0  # seconds before the second try; doubles from one to the next
LARGEST_WAIT = 30.0
BEAT_SECONDS = 1.0  # between questions to an engine whether it is there
SILENCE_SECONDS = 10.0  # that it may take to answer: a network that is cut says nothing by itself
STOP_SECONDS = 20.0  # for a replica that is being built to be abandoned

Say = Callable[[str], None]
"""Told what a build does; may raise to have it abandoned."""


class Built(Protocol):
    """One engine that has loaded its weights and passed a forward step."""

    info: EngineInfo

    def connect(self) -> AbstractAsyncContextManager[EngineClient]: ...

    async def lost(self, client: EngineClient) -> str: ...

    def close(self) -> None: ...


class _Abandoned(Exception):
    """Nobody wants the engine any more."""


class Supervised:
    """Replicas as one engine, see engines.Engine. Close it when done."""

    def __init__(
        self,
        build: Callable[[Say], Built],
        replicas: int,
        *,
        rebuilds: int,
        say: Say = lambda text: None,
        log: Say = log_line,
        together: bool = False,
        first_wait: float = FIRST_WAIT,
        silence: float = SILENCE_SECONDS,
    ):
        """Builds the first replica, then the others one by one, or all `together`. `build` raises
        TramontaneError; when a replica is lost, it is called again in a thread, at most `rebuilds` times in a
        row. `log` hears of losses and rebuilds. `silence`: seconds that an engine may take to answer."""
        self._build = build
        self._rebuilds = rebuilds
        self._log = log
        self._first_wait = first_wait
        self._silence = silence
        self._stopping = False
        self._threads: list[threading.Thread] = []
        self._tries = [0] * replicas  # rebuilds since it was steady
        self._engines: list[Built | None] = [None] * replicas
        try:
            self._build_first(say, together)
            self.info = joint([engine.info for engine in self._engines])
        except BaseException:
            self.close()
            raise

    def _build_first(self, say: Say, together: bool) -> None:
        """The first one alone, so that what is wrong with all is said once, and by this thread."""
        count = len(self._engines)
        problems: list[BaseException] = []

        def build(index: int) -> None:
            def told(text: str) -> None:
                if self._stopping or problems:
                    raise _Abandoned
                say(f"replica {index}: {text}" if count > 1 else text)

            try:
                self._engines[index] = self._build(told)
            except BaseException as error:
                problems.append(error)

        for index in range(count):
            if index and together:
                self._threads.append(threading.Thread(target=build, args=(index,), daemon=True))
                self._threads[-1].start()
            else:
                build(index)
            if problems:
                break
        for thread in self._threads:
            thread.join()
        if problems:
            raise problems[0]

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Replicas]:
        """A client of all replicas, and care for them while it is open. One at a time."""
        here = asyncio.get_running_loop()
        infos = [self.info if engine is None else engine.info for engine in self._engines]
        replicas = Replicas(infos, returning=self._rebuilds > 0)
        self._gone: asyncio.Future[str] = here.create_future()
        self._left = len(infos)
        settled = [asyncio.Event() for _ in infos]
        keepers = [here.create_task(self._keep(replicas, i, each)) for i, each in enumerate(settled)]
        for keeper, each in zip(keepers, settled, strict=True):
            keeper.add_done_callback(self._report_defect)
            keeper.add_done_callback(lambda _, each=each: each.set())
        try:
            for each in settled:
                await each.wait()
            yield replicas
        finally:
            for keeper in keepers:
                keeper.cancel()
            await asyncio.wait(keepers)
            for index in range(len(infos)):
                replicas.give_up(index)

    async def lost(self, client: EngineClient) -> str:
        """Return why, when the last replica is lost and none is to come back."""
        return await asyncio.shield(self._gone)

    def close(self) -> None:
        """Stop all that runs; a replica that is being built is abandoned."""
        self._stopping = True
        for thread in self._threads:
            thread.join(STOP_SECONDS)
        for engine in self._engines:
            if engine is not None:
                engine.close()
        self._engines = [None] * len(self._engines)

    # ---- a replica's life ----------------------------------------------------------------------

    async def _keep(self, replicas: Replicas, index: int, settled: asyncio.Event) -> None:
        """One replica: serve, be lost, be built, and again, until it is given up."""
        why = "it was given up before"
        while (engine := self._engines[index]) is not None:
            since = time.monotonic()
            try:
                why = await self._serve(replicas, index, engine, settled)
            except TramontaneError as error:  # it does not answer, or is not like the others
                why = str(error)
            settled.set()
            lost_at = time.monotonic()
            if lost_at - since >= STEADY_SECONDS:
                self._tries[index] = 0
            self._log(f"replica {index} is lost: {why}")
            self._engines[index] = None
            await self._in_thread(engine.close)
            await self._rebuild(index, lost_at)
        settled.set()
        replicas.give_up(index)
        self._left -= 1
        if not self._left and not self._gone.done():
            self._gone.set_result(why)

    async def _serve(self, replicas: Replicas, index: int, engine: Built, settled: asyncio.Event) -> str:
        """Have a replica take requests until it is lost; why it is."""
        async with engine.connect() as client:
            replicas.put(index, client, engine.info)
            settled.set()
            # Whichever is first: the ranks' end, a request that found nobody, or silence.
            watches = [
                asyncio.create_task(engine.lost(client)),
                asyncio.create_task(replicas.fallen(index)),
                asyncio.create_task(self._silent(client)),
            ]
            try:
                done, _ = await asyncio.wait(watches, return_when=asyncio.FIRST_COMPLETED)
                why = done.pop().result()
                replicas.lose(index, why)
                return why
            finally:
                for watch in watches:
                    watch.cancel()
                await asyncio.wait(watches)
                replicas.lose(index, "the server stops", client)

    async def _silent(self, client: EngineClient) -> str:
        """Return, with why, when an engine no longer answers."""
        while True:
            await asyncio.sleep(min(BEAT_SECONDS, self._silence))
            try:
                async with asyncio.timeout(self._silence):
                    await client.load()
            except TimeoutError:
                return f"its engine has not answered for {self._silence:g} s"
            except Unavailable as error:
                return str(error)

    async def _rebuild(self, index: int, lost_at: float) -> None:
        """Build a replica until it stands or is given up."""
        wait = 0.0
        while self._tries[index] < self._rebuilds:
            self._tries[index] += 1
            await asyncio.sleep(wait)
            wait = min(max(2 * wait, self._first_wait), LARGEST_WAIT)
            self._log(f"rebuilding replica {index} (try {self._tries[index]} of {self._rebuilds})")
            try:
                await self._in_thread(lambda: self._build_again(index))
            except TramontaneError as error:
                self._log(f"replica {index} was not rebuilt: {error}")
            except Exception as error:  # whatever it is, others may go on serving
                self._log(f"replica {index} was not rebuilt: {type(error).__name__}: {error}")
            else:
                ranks = "; ".join(self._engines[index].info.rank_nodes)
                self._log(
                    f"replica {index} serves again {time.monotonic() - lost_at:.1f} s after it was lost"
                    + (f" ({ranks})" if ranks else "")
                )
                return

    def _build_again(self, index: int) -> None:
        def say(text: str) -> None:
            if self._stopping:
                raise _Abandoned

        engine = self._build(say)
        # `close` waits for this thread, and then closes what it finds in its place.
        self._engines[index] = engine

    async def _in_thread(self, work: Callable[[], None]) -> None:
        """Where a pool's thread would keep the process from ending, one that hangs here does not."""
        here = asyncio.get_running_loop()
        done: asyncio.Future[None] = here.create_future()

        def settle(error: BaseException | None) -> None:
            if not done.done():
                done.set_result(None) if error is None else done.set_exception(error)

        def run() -> None:
            error = None
            try:
                work()
            except BaseException as caught:
                error = caught
            with contextlib.suppress(RuntimeError):  # nobody waits any more: the loop has closed
                here.call_soon_threadsafe(settle, error)

        thread = threading.Thread(target=run, name="replica", daemon=True)
        self._threads = [each for each in self._threads if each.is_alive()] + [thread]
        thread.start()
        await done

    def _report_defect(self, keeper: asyncio.Task) -> None:
        if not keeper.cancelled() and (error := keeper.exception()) and not self._gone.done():
            self._gone.set_exception(error)
