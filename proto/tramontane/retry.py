"""When a call that failed is made again. Makes no calls.

A reply is a pure function, so a server that is asked for the rest of one gives exactly the rest. Waits double
from one failure to the next, with jitter so that the clients of a server that went down do not come back all
at once; as soon as something arrives, counting starts anew.
"""

from __future__ import annotations

import random
import time

from tramontane.errors import Error, InvalidRequest, Overloaded, Unavailable

RESUMES = 8  # calls made again without anything arriving: with the waits below, about 15 seconds
BEFORE_ANY = 4  # the same where nothing has arrived at all, perhaps because no server is there: 1.5 seconds
FIRST_WAIT = 0.1  # seconds
LARGEST_WAIT = 5.0


class Retry:
    """The failures of one reply."""

    def __init__(self, most: int, timeout: float | None):
        """`most`: as RESUMES. `timeout`: seconds from now until all must be over."""
        self.resumed = 0  # failures that were got over
        self._most = most
        self._tries = 0  # since something arrived
        self._begun = False
        self._first: Error | None = None  # the failure that is being got over
        self._ends = None if timeout is None else time.monotonic() + timeout

    def arrived(self) -> None:
        """Something came that brings the reply further."""
        self.resumed += self._first is not None
        self._tries, self._first, self._begun = 0, None, True

    def remaining(self) -> float | None:
        """Seconds that are left of the timeout."""
        return None if self._ends is None else max(0.0, self._ends - time.monotonic())

    def wait(self, failure: Error) -> float:
        """Seconds to wait before the next call. Raises what the user is to see if there is none: the failure
        itself, or the first one where a later one only says that nothing goes on."""
        again = isinstance(failure, Unavailable)
        pushback = 0.0
        if self._first is not None:
            if isinstance(failure, InvalidRequest):
                words = f"{self._first.message}; the reply cannot go on here: {failure.message}"
                raise Unavailable(words, self._first.code)
            if isinstance(failure, Overloaded) and failure.retry_after is not None:
                again, pushback = True, failure.retry_after
        if not again or self._tries >= (self._most if self._begun else min(self._most, BEFORE_ANY)):
            raise failure
        wait = min(LARGEST_WAIT, FIRST_WAIT * 2**self._tries) * random.uniform(0.5, 1.0)
        wait = max(wait, pushback)
        left = self.remaining()
        if left is not None and wait >= left:
            raise failure
        self._tries += 1
        self._first = self._first or failure
        return wait
