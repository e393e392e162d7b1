"""What a gateway asks of an engine, wherever that engine runs.

Knows nothing of gRPC, text or sockets: the engine in this process and the one at the other end of a TCP
connection look the same from here.
"""

from collections.abc import AsyncGenerator
from typing import Protocol

from runtime.types import EngineInfo, Load, Output, Request


class EngineClient(Protocol):
    """An engine to send requests to. All methods may raise `Unavailable`."""

    async def info(self) -> EngineInfo:
        """What the engine serves. Constant while the engine lives."""
        ...

    def generate(self, request: Request) -> AsyncGenerator[Output, None]:
        """Yield each reply's TokenOutputs in order of their index, then its Finished; end after the
        Finished that is the request's `last`. A request with `scores` yields ScoreOutputs instead, in order.

        `request.deadline` is the number of seconds that remain; the client turns it into the engine's
        clock. Closing the generator, or cancelling the task that waits in it, aborts the request in the
        engine. A reader that is slow must not hold up other requests.

        Raises, at the first step: QueueFull, InvalidArgument.
        """
        ...

    async def stop_at(self, request_id: str, keep: int, choice: int = 0) -> None:
        """End a running reply after its first `keep` tokens, because they complete a stop string.

        The engine ends it with reason STOP and counts `keep` tokens, whatever it has sampled since. A
        Finished still arrives in `generate`. A reply that has already ended is left as it is.
        """
        ...

    async def load(self) -> Load:
        """How busy the engine is now."""
        ...
