"""The list of requests through a gateway over two engines that are lost, to it, again and again."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

from runtime.errors import Unavailable
from runtime.server.replicas import Replicas
from runtime.types import Finished
from tests.conformance.compare import Tally
from tests.conformance.models import Model
from tests.conformance.ways import SMALL, Way, serve_way
from tests.rule.engines import check_idle

LOSSES = 2  # a request: after one more without anything new, the gateway gives it up


class Losing:
    """An engine that leaves some requests after a few outputs, and is there again at once."""

    def __init__(self, client, source: random.Random, lost: dict[str, int]):
        self._client = client
        self._source = source
        self._lost = lost  # how often, by request; shared by all engines
        self.stop_at, self.load = client.stop_at, client.load
        self.back = lambda: None

    async def generate(self, request):
        outputs_left = -1
        if self._lost.setdefault(request.request_id, 0) < LOSSES and self._source.random() < 0.7:
            outputs_left = self._source.randrange(7)
        async with aclosing(self._client.generate(request)) as outputs:
            while outputs_left:
                output = await anext(outputs)
                outputs_left -= 1
                yield output
                if isinstance(output, Finished) and output.last:
                    return
        self._lost[request.request_id] += 1
        asyncio.get_running_loop().call_soon(self.back)
        raise Unavailable("lost")


def run_replicas(model: Model, seed: int) -> Tally:
    """One engine of one rank, one of all ranks in small chunks."""
    tally = Tally()
    settings = {"max_num_seqs": 16, "block_size": SMALL}
    with model.serving(**settings) as one, model.serving(**settings, tp=model.units, max_chunk=13) as other:
        for ask in ("together", "resumed", "choices", "scores"):

            @asynccontextmanager
            async def connect(ask: str = ask) -> AsyncIterator[Replicas]:
                infos = [await each.client.info() for each in (one, other)]
                client = Replicas(infos, returning=True)
                source, lost = random.Random(f"{seed} {ask}"), {}
                for index, (each, info) in enumerate(zip((one, other), infos, strict=True)):
                    losing = Losing(each.client, source, lost)
                    losing.back = lambda i=index, engine=losing, info=info: client.put(i, engine, info)
                    losing.back()
                yield client
                tally.note("replies carried to another engine", client.moved)

            way = Way(f"two engines that are lost again and again, {ask}", ask=ask)
            tally.take(serve_way(model, way, seed, connect))
        check_idle(one)
        check_idle(other)
    return tally
