"""Several engines of one model as one `EngineClient`: routing, and failover that nobody sees.

When an engine is lost, what ran there goes on at another one, asked with the tokens that have come: same
bits, same indices, counted once. Whoever watches the engines says which are there; how they are built is not
known here.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, fields, replace

from runtime.engine.routing import EXPECTED_REPLY, Asked, Placed, Router, prefix_keys
from runtime.engine.transcript import Transcript
from runtime.errors import InvalidArgument, QueueFull, Unavailable
from runtime.server.engine_client import EngineClient
from runtime.types import EngineInfo, Finished, FinishReason, Load, Output, Request

PATIENCE = 60.0  # seconds that a stream waits for a replica where none is left and one may come back
MOST_MOVES = 16  # losses that one request outlives
MOST_STALLED = 3  # losses in a row that brought it nothing: a request may be what kills its ranks
LOAD_SECONDS = 0.5  # that one of several replicas has to say how busy it is
FULL_WAIT = 1.0  # most seconds between looks at queues that are full

_COUNTERS = (
    "steps",
    "prefix_hit_tokens",
    "prefix_query_tokens",
    "preemptions",
    "drafted_tokens",
    "accepted_tokens",
)
_NO_LOAD = Load(0, 0, 0, 0, 0, 0, 0, 0, 0, 0)


@dataclass(slots=True)
class _Seat:
    """A replica's place, whether or not one sits there."""

    client: EngineClient | None
    fallen: asyncio.Event  # nobody sits there
    returning: bool = True  # where nobody does, somebody may yet
    reason: str = "it has not started"
    seen: Load = _NO_LOAD


@dataclass(slots=True)
class _Run:
    """A request under way."""

    transcript: Transcript
    asked: Asked
    ends_at: float | None
    give_up_at: float  # when it has waited long enough for a replica
    full: dict[int, QueueFull] = field(default_factory=dict)  # replicas that refused it just now
    client: EngineClient | None = None
    moves: int = 0
    stalled: int = 0


class Replicas:
    """An `EngineClient` over engines that may come and go. Belongs to one asyncio loop."""

    def __init__(self, infos: Sequence[EngineInfo], *, returning: bool, patience: float = PATIENCE):
        """All seats are empty. `infos`: of each replica. `returning`: a lost one is waited for, for up to
        `patience` seconds, until `give_up`. Raises Unavailable if they do not compute alike."""
        self._info = joint(infos)
        self._patience = patience
        self._returning = returning
        self._router = Router(len(infos), self._info.block_size)
        self._seats = [_Seat(None, asyncio.Event()) for _ in infos]
        for index, seat in enumerate(self._seats):
            seat.fallen.set()
            self._router.lost(index)
        self._running: dict[str, _Run] = {}
        self._changed = asyncio.Event()  # replaced whenever it is set
        self._past = _NO_LOAD  # what engines that are gone had counted
        self.moved = 0  # requests that went on elsewhere, so often

    # ---- who is there --------------------------------------------------------------------------

    def put(self, index: int, client: EngineClient, info: EngineInfo) -> None:
        """Give a replica requests. Raises Unavailable if it does not compute as the others do."""
        for name in ("model", "numerics", "vocab_size"):
            mine, theirs = getattr(info, name), getattr(self._info, name)
            if mine != theirs:
                raise Unavailable(f"replica {index} has {name} {mine!r}, the others {theirs!r}")
        if info.context_length < self._info.context_length:
            raise Unavailable(
                f"replica {index} has room for {info.context_length} tokens, the others for "
                f"{self._info.context_length}"
            )
        seat = self._seats[index]
        seat.client, seat.seen = client, _NO_LOAD
        seat.fallen.clear()
        self._router.found(index)
        self._change()

    def lose(self, index: int, reason: str, client: EngineClient | None = None) -> None:
        """Nothing more goes to a replica; what runs there ends by itself. `client`: only if that is it."""
        seat = self._seats[index]
        if seat.client is None or (client is not None and seat.client is not client):
            return
        self._past = _sum([self._past, _counters(seat.seen)])
        seat.client, seat.reason, seat.returning = None, reason, self._returning
        seat.fallen.set()
        self._router.lost(index)
        self._change()

    def give_up(self, index: int) -> None:
        """Nobody waits for a lost replica any more."""
        self._seats[index].returning = False
        self._change()

    async def fallen(self, index: int) -> str:
        """Return, with why, when a replica is lost."""
        await self._seats[index].fallen.wait()
        return self._seats[index].reason

    async def until(self, *, there: bool) -> None:
        """Return when some replica is there, or none is."""
        while there != any(seat.client for seat in self._seats):
            await self._changed.wait()

    @property
    def places(self) -> int:
        """How many replicas there are when none is lost."""
        return len(self._seats)

    @property
    def there(self) -> int:
        """How many replicas there are now."""
        return sum(seat.client is not None for seat in self._seats)

    def _change(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    # ---- an engine to those who ask ------------------------------------------------------------

    async def info(self) -> EngineInfo:
        return self._info

    async def load(self) -> Load:
        """Of all that are there; counters go on over losses. Raises Unavailable if none is.

        Of one that takes its time, what it said last, so that it does not hide the others."""
        there = [(index, seat, seat.client) for index, seat in enumerate(self._seats) if seat.client]
        loads = await asyncio.gather(*(self._load_of(*each) for each in there))
        answered = [load for load in loads if load is not None]
        if not answered:
            raise Unavailable(self._why())
        return _sum([*answered, self._past])

    async def _load_of(self, index: int, seat: _Seat, client: EngineClient) -> Load | None:
        """None if it is lost."""
        try:
            async with asyncio.timeout(LOAD_SECONDS if len(self._seats) > 1 else None):
                seen = await client.load()
        except TimeoutError:
            return seat.seen if seat.client is client else None
        except Unavailable as error:
            self.lose(index, str(error), client)
            return None
        if seat.client is not client:  # what it had counted is in the past already
            return None
        seat.seen = seen
        return seen

    async def stop_at(self, request_id: str, keep: int, choice: int = 0) -> None:
        if run := self._running.get(request_id):
            run.transcript.stop(choice, keep)
            if run.client is not None:
                with contextlib.suppress(Unavailable):  # then it is known from the transcript
                    await run.client.stop_at(request_id, keep, choice)

    async def generate(self, request: Request) -> AsyncGenerator[Output, None]:
        if request.request_id in self._running:
            raise InvalidArgument("request_id", f"{request.request_id!r} is running already")
        transcript = Transcript(request, self._info.context_length)
        ends_at = None if request.deadline is None else _now() + request.deadline
        run = _Run(transcript, self._asked(request), ends_at, give_up_at=_now() + self._patience)
        self._running[request.request_id] = run
        try:
            while not transcript.ended:
                placed = self._router.place(run.asked, run.full)
                if placed is None:
                    for end in await self._wait(run):
                        yield end
                    continue
                client = self._seats[placed.replica].client
                before, why = transcript.progress, ""
                try:
                    async with aclosing(self._attempt(run, client, placed)) as outputs:
                        async for output in outputs:
                            yield output
                except QueueFull as error:
                    run.full[placed.replica] = error
                    continue
                except Unavailable as error:
                    why = str(error)
                while ends := transcript.settle():  # whoever reads them may say that another has to stop
                    for end in ends:
                        yield end
                if not transcript.ended:
                    for end in self._lost(run, placed.replica, client, why, transcript.progress > before):
                        yield end
        finally:
            del self._running[request.request_id]

    async def _attempt(self, run: _Run, client: EngineClient, placed: Placed) -> AsyncGenerator[Output, None]:
        """What one replica has to say that is new."""
        left = None if run.ends_at is None else run.ends_at - _now()
        run.client = client
        try:
            async with aclosing(client.generate(run.transcript.rest(left))) as outputs:
                async for output in outputs:
                    self._router.began(placed)
                    if (new := run.transcript.take(output)) is not None:
                        yield new
        finally:
            run.client = None
            self._router.ended(placed)

    def _lost(
        self, run: _Run, replica: int, client: EngineClient, why: str, progress: bool
    ) -> list[Finished]:
        """A request has lost its replica. How its replies end, where that was too often."""
        why = why or run.transcript.failure or "it ended a reply without saying how"
        self.lose(replica, why, client)
        self.moved += 1
        run.moves += 1
        run.stalled = 0 if progress else run.stalled + 1
        run.give_up_at = _now() + self._patience
        run.asked = self._asked(run.transcript.rest(None))
        if run.moves > MOST_MOVES or run.stalled >= MOST_STALLED:
            return run.transcript.give_up(FinishReason.ERROR, why)
        return []

    async def _wait(self, run: _Run) -> list[Finished]:
        """Until some replica may take a request that none takes now. How its replies end, where none will.

        One that has been nowhere is refused instead: raises QueueFull, Unavailable."""
        now, why = _now(), None
        if run.full and not run.moves:
            raise min(run.full.values(), key=lambda error: error.retry_after)
        if run.ends_at is not None and now >= run.ends_at:
            return run.transcript.give_up(FinishReason.DEADLINE)
        if not run.full and not any(seat.returning for seat in self._seats):
            why = self._why()
        elif now >= run.give_up_at:
            why = f"{self._why()}; no replica took the request within {self._patience:g} s"
        if why is not None:
            if not run.moves:
                raise Unavailable(why)
            return run.transcript.give_up(FinishReason.ERROR, why)
        until = min([run.give_up_at] + ([] if run.ends_at is None else [run.ends_at]))
        for error in run.full.values():
            until = min(until, now + min(error.retry_after, FULL_WAIT))
        run.full.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), max(0.0, until - now))
        return []

    def _why(self) -> str:
        """Of the replica that was lost last, as far as is known."""
        return next((seat.reason for seat in self._seats if seat.client is None), "all replicas are busy")

    def _asked(self, request: Request) -> Asked:
        """For routing, replies count as long as they may get, up to what is usual."""
        replies = 0
        received = sum(len(branch.reply) for branch in request.branches)
        if not request.scores:
            most = request.params.max_tokens or EXPECTED_REPLY
            replies = sum(
                min(max(1, most - len(branch.reply)), EXPECTED_REPLY) for branch in request.branches
            )
        # What is scored is computed whole, whatever a cache holds.
        keys = (
            () if request.scores else prefix_keys(request.prompt, request.cache_salt, self._info.block_size)
        )
        return Asked(keys, len(request.prompt) + received, replies)


def joint(infos: Sequence[EngineInfo]) -> EngineInfo:
    """Several engines as one. Raises Unavailable if they do not compute alike."""
    for index, info in enumerate(infos):
        if info.numerics != infos[0].numerics:
            raise Unavailable(
                f"the replicas do not compute alike (replica 0: {infos[0].numerics}, replica {index}: "
                f"{info.numerics}): use hosts of one kind and version, and the same model files, tokenizer "
                "included"
            )
    if len(infos) == 1:
        return infos[0]
    return replace(
        infos[0],
        context_length=min(info.context_length for info in infos),
        total_blocks=sum(info.total_blocks for info in infos),
        max_num_seqs=sum(info.max_num_seqs for info in infos),
        rank_nodes=tuple(
            f"replica {index}, {line}" for index, info in enumerate(infos) for line in info.rank_nodes
        ),
    )


def _sum(loads: Sequence[Load]) -> Load:
    return Load(*(sum(getattr(load, each.name) for load in loads) for each in fields(Load)))


def _counters(load: Load) -> Load:
    return replace(_NO_LOAD, **{name: getattr(load, name) for name in _COUNTERS})


def _now() -> float:
    return asyncio.get_running_loop().time()
