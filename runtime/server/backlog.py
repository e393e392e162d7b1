"""The pieces of one stream that its reader has not taken yet.

The engine does not wait for a reader of replies: one that is slow gets its pieces merged, and one that falls
too far behind loses its stream, so that memory is bounded and others are not held up. Whoever can leave
pieces elsewhere waits until nothing waits here.
"""

import asyncio
import contextlib
from collections import OrderedDict, deque

from runtime.server.held import TOKEN, Held, merge, weight
from runtime.server.reply import Piece
from runtime.server.statuses import SlowReader

_LARGEST_WRITE = 16384  # weight of one written piece: about 200 KB, well below any message limit
_MERGED_AT_ONCE = 512  # what waits is kept in pieces of this weight: a piece a token would take 5x the memory
# Seconds that a reader has, since it had everything last, to make room before it counts as too slow: what
# came all at once, after the event loop was held up, says nothing of the reader.
_GRACE = 0.5
_TURN = 0.05  # seconds of it that one wait takes at most: a loop that stands still gives nobody a turn
_STALLED = 30.0  # seconds in which a reader that is waited for takes one piece: what it keeps, others lack


class Backlog:
    """A queue of one producer and one consumer in one event loop. Pieces of a choice stay in order; which
    choice comes next is whose turn it is. Pieces weigh what they take in memory (held.py)."""

    def __init__(self, limit: int):
        """`limit`: most tokens that may wait. Their alternatives weigh an eighth of a token each."""
        self._limit = limit * TOKEN
        self._weight = 0
        self._tokens = 0
        self._pieces: OrderedDict[int, deque[Piece | Held]] = OrderedDict()  # by choice; none is empty
        self._closed = False
        self._error: BaseException | None = None
        self._changed = asyncio.Event()
        self._taken = asyncio.Event()
        self._grace = _GRACE

    def put(self, piece: Piece) -> None:
        """Add a piece, unless it is closed. Raises SlowReader if too much waits already."""
        if self._closed:
            return
        if not self._fits(piece):
            raise SlowReader(f"the reader is {self._tokens} tokens behind; read the stream faster")
        self._weight += weight(piece)
        self._tokens += len(piece.token_ids)
        pieces = self._pieces.setdefault(piece.choice, deque())
        if not pieces:
            pieces.append(piece)  # a reader that keeps up takes it before another comes
        else:
            if isinstance(pieces[-1], Piece):
                pieces.append(Held(pieces.pop()))
            if pieces[-1].weight < _MERGED_AT_ONCE:
                pieces[-1].add(piece)
            else:
                pieces.append(Held(piece))
        self._changed.set()

    async def emptied(self) -> None:
        """Return when nothing waits here, or no more is taken. Raises SlowReader if that takes too long."""
        try:
            async with asyncio.timeout(_STALLED):
                while self._pieces and not self._closed:
                    self._taken.clear()
                    await self._taken.wait()
        except TimeoutError:
            raise SlowReader(f"the reader has not taken what came {_STALLED:g} s ago") from None

    async def room(self, piece: Piece) -> None:
        """Return when there is room for a piece, or the reader has had its time to make some."""
        loop = asyncio.get_running_loop()
        while self._grace > 0 and not self._closed and not self._fits(piece):
            turn = min(_TURN, self._grace)
            started = loop.time()
            self._taken.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._taken.wait(), turn)
            self._grace -= min(turn, loop.time() - started)

    def close(self, error: BaseException | None = None) -> None:
        """No more pieces will come. The consumer first gets what waits, then `error` if there is one. Only
        the first time counts."""
        if self._closed:
            return
        self._closed = True
        self._error = error
        self._changed.set()
        self._taken.set()

    async def take(self) -> Piece | None:
        """All that waits of one choice, merged, up to the size of a write; None at the end. Raises close's
        error."""
        while not self._pieces:
            if self._closed:
                if self._error is not None:
                    raise self._error
                return None
            self._changed.clear()
            await self._changed.wait()
        choice, pieces = self._pieces.popitem(last=False)
        taken = [_whole(pieces.popleft())]
        size = weight(taken[0])
        while pieces and size + _weight(pieces[0]) <= _LARGEST_WRITE:
            size += _weight(pieces[0])
            taken.append(_whole(pieces.popleft()))
        if pieces:
            self._pieces[choice] = pieces
        piece = taken[0] if len(taken) == 1 else merge(taken)
        self._weight -= size
        self._tokens -= len(piece.token_ids)
        self._taken.set()
        if not self._pieces:
            self._grace = _GRACE
        return piece

    def _fits(self, piece: Piece) -> bool:
        return not self._pieces or self._weight + weight(piece) <= self._limit


def _weight(piece: Piece | Held) -> int:
    return piece.weight if isinstance(piece, Held) else weight(piece)


def _whole(piece: Piece | Held) -> Piece:
    return piece.piece() if isinstance(piece, Held) else piece
