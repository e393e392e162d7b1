"""Decides which replica gets a request: the one where it has the least to wait for.

That is the work a replica has left, less what it saves by still holding the request's beginning. Pure: events
in, decisions out, the same ones for the same events. Knows neither what a replica is nor why one is lost.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from runtime.engine.prefix import next_key, root_key

KEYED_BLOCKS = 64  # blocks of a prompt that are named; what follows does not tell conversations apart better
MOST_SAVED = (
    2048  # tokens that a known beginning counts at most: the bound on how uneven affinity may make work
)
EXPECTED_REPLY = 256  # tokens that a reply counts, unless it may have fewer: nobody knows its length
REMEMBERED = 1 << 15  # beginnings, a block each


@dataclass(frozen=True, slots=True)
class Asked:
    """What routing must know of a request. Work is counted in tokens to compute."""

    keys: tuple[bytes, ...]  # names of its first blocks, see `prefix_keys`
    prompt: int  # tokens to prefill, those of replies that go on included
    replies: int  # tokens that its replies are expected to have in all


@dataclass(slots=True)
class Placed:
    """A request at a replica, for the events that follow."""

    replica: int
    prompt: int  # tokens still to prefill, as far as is known
    replies: int
    life: int  # which of the replica's lives it belongs to


def prefix_keys(prompt: Sequence[int], salt: str, block_size: int) -> tuple[bytes, ...]:
    """The names of a prompt's first full blocks, as the engines' prefix caches name them: equal for two
    requests as far as one may use the other's."""
    key, keys = root_key(salt), []
    # At least one token is always computed, so the block that ends a prompt is never found.
    for end in range(block_size, min(len(prompt), KEYED_BLOCKS * block_size + 1), block_size):
        key = next_key(key, prompt[end - block_size : end])
        keys.append(key)
    return tuple(keys)


class Router:
    """The work of each replica and the beginnings it was given. Replicas are numbers from 0."""

    def __init__(self, replicas: int, block_size: int, *, remembered: int = REMEMBERED):
        """`block_size`: tokens behind one key. `remembered`: most keys that are kept, the last used ones."""
        self._block_size = block_size
        self._remembered = remembered
        self._alive = [True] * replicas
        self._work = [0] * replicas
        self._lives = [0] * replicas
        self._turns = [0] * replicas  # when each was last given something
        self._turn = 0
        self._holders: OrderedDict[bytes, int] = OrderedDict()  # key -> replicas, a bit each; oldest first

    def place(self, asked: Asked, without: Collection[int] = ()) -> Placed | None:
        """Give a request to a replica that lives and is not in `without`; None if there is none.

        Its work is at most MOST_SAVED tokens above the least of any that could have been chosen."""
        able = [i for i, alive in enumerate(self._alive) if alive and i not in without]
        if not able:
            return None
        saved = self._saved(asked)
        # Among equals the one that was left alone the longest.
        chosen = min(able, key=lambda i: (self.work(i) - saved.get(i, 0), self._turns[i], i))
        self._turn += 1
        self._turns[chosen] = self._turn
        self._remember(asked.keys, chosen)
        prompt = max(0, asked.prompt - saved.get(chosen, 0))
        self._work[chosen] += prompt + asked.replies
        return Placed(chosen, prompt, asked.replies, self._lives[chosen])

    def began(self, placed: Placed) -> None:
        """Its first token or score has come: the prompt is computed."""
        self._done(placed, placed.prompt)
        placed.prompt = 0

    def ended(self, placed: Placed) -> None:
        """Nothing of it runs at its replica any more. Harmless if it ended before."""
        self._done(placed, placed.prompt + placed.replies)
        placed.prompt = placed.replies = 0

    def _done(self, placed: Placed, work: int) -> None:
        if placed.life == self._lives[placed.replica]:
            self._work[placed.replica] -= work

    def lost(self, replica: int) -> None:
        """It gets nothing until it is found again, and what it held is gone."""
        self._alive[replica] = False
        self._work[replica] = 0
        self._lives[replica] += 1
        for key, holders in list(self._holders.items()):
            if left := holders & ~(1 << replica):
                self._holders[key] = left
            else:
                del self._holders[key]

    def found(self, replica: int) -> None:
        self._alive[replica] = True

    def alive(self, replica: int) -> bool:
        return self._alive[replica]

    def work(self, replica: int) -> int:
        """Tokens that a replica is expected to compute yet."""
        return self._work[replica]

    def _saved(self, asked: Asked) -> dict[int, int]:
        """Tokens that each replica need not compute, as far as is remembered."""
        saved: dict[int, int] = {}
        for count, key in enumerate(asked.keys, 1):
            holders = self._holders.get(key, 0)
            if not holders:
                break
            for replica in range(len(self._alive)):
                if holders >> replica & 1:
                    saved[replica] = min(count * self._block_size, MOST_SAVED)
        return saved

    def _remember(self, keys: Sequence[bytes], replica: int) -> None:
        # The first blocks last: what many share must not be forgotten before what hangs on it.
        for key in reversed(keys):
            self._holders[key] = self._holders.get(key, 0) | 1 << replica
            self._holders.move_to_end(key)
        while len(self._holders) > self._remembered:
            self._holders.popitem(last=False)
