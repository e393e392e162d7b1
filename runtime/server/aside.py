"""Work of single calls, on threads of its own: so much of it, and none in the way of replies."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from runtime.errors import QueueFull

# Two, so that one text of megabytes does not hold up all others; more would take turns at one chat template's
# process with the prompts of replies.
_THREADS = 2

Given = ParamSpec("Given")
Result = TypeVar("Result")


class Aside:
    """Runs functions on a few threads. `waiting`: how many run or wait to."""

    def __init__(self, most: int):
        """`most`: functions that may run or wait at once."""
        self.waiting = 0
        self._most = most
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(_THREADS, "aside")

    async def run(
        self, function: Callable[Given, Result], *args: Given.args, **options: Given.kwargs
    ) -> Result:
        """What the function returns or raises. Raises QueueFull where too many wait already."""
        with self._lock:
            if self.waiting >= self._most:
                raise QueueFull(1.0, f"{self.waiting} texts are being encoded or decoded")
            self.waiting += 1
        future = self._threads.submit(function, *args, **options)
        future.add_done_callback(self._ended)  # one whose caller has left may run on
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Begin nothing more. What runs comes to its end."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _ended(self, future: Future) -> None:
        with self._lock:
            self.waiting -= 1
