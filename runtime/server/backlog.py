"""The pieces of one stream that its reader has not taken yet.

The engine's side never waits: a reader that is slow gets its pieces merged, and one that falls too far
behind loses its stream, so that memory is bounded and others are not held up.
"""

import asyncio
from collections import OrderedDict, deque
from itertools import chain

from runtime.server.reply import Piece
from runtime.server.statuses import SlowReader

_LARGEST_WRITE = 8192  # weight of one written piece: about 200 KB, well below any message limit
_MERGED_AT_ONCE = 64  # what waits is kept in pieces of this weight: a piece a token would take 5x the memory


class Backlog:
    """A queue of one producer and one consumer in one event loop. Pieces of a choice stay in order; which
    choice comes next is whose turn it is.

    A piece weighs as many units as it has tokens and alternatives; a unit is about 100 bytes here.
    """

    def __init__(self, limit: int):
        """`limit`: most units that may wait."""
        self._limit = limit
        self._weight = 0
        self._pieces: OrderedDict[int, deque[Piece]] = OrderedDict()  # by choice; none is empty
        self._closed = False
        self._error: BaseException | None = None
        self._changed = asyncio.Event()

    def put(self, piece: Piece) -> None:
        """Add a piece. Raises SlowReader if too much waits."""
        self._weight += _weight(piece)
        if self._weight > self._limit:
            raise SlowReader(f"the reader is {self._weight} tokens behind; read the stream faster")
        pieces = self._pieces.setdefault(piece.choice, deque())
        if pieces and _weight(pieces[-1]) < _MERGED_AT_ONCE:
            piece = merge([pieces.pop(), piece])
        pieces.append(piece)
        self._changed.set()

    def close(self, error: BaseException | None = None) -> None:
        """No more pieces will come. The consumer first gets what waits, then `error` if there is one."""
        self._closed = True
        self._error = error
        self._changed.set()

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
        taken = [pieces.popleft()]
        weight = _weight(taken[0])
        while pieces and weight + _weight(pieces[0]) <= _LARGEST_WRITE:
            weight += _weight(pieces[0])
            taken.append(pieces.popleft())
        if pieces:
            self._pieces[choice] = pieces
        self._weight -= weight
        return taken[0] if len(taken) == 1 else merge(taken)


def merge(pieces: list[Piece]) -> Piece:
    """Consecutive pieces of one choice as one. Only the first may have a `begun`, the last a `final`."""
    return Piece(
        text="".join(piece.text for piece in pieces),
        token_ids=tuple(chain.from_iterable(piece.token_ids for piece in pieces)),
        logprobs=tuple(chain.from_iterable(piece.logprobs for piece in pieces)),
        final=pieces[-1].final,
        choice=pieces[0].choice,
        begun=pieces[0].begun,
    )


def _weight(piece: Piece) -> int:
    return len(piece.token_ids) + sum(len(entry.top) for entry in piece.logprobs)
