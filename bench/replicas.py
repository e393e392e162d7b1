"""Two replicas against one, behind the same routing: what they answer together, and what each pays for it.

    python bench/replicas.py MODEL.gguf --rounds 7 > replicas.json
    python bench/replicas.py MODEL.gguf --quick                       seconds: shows that it works, no figures

All replicas are up all the time, as Ray actors with threads of their own; the client of "one" is given the
first alone. One and all take turns, in an order that changes from round to round, and every replica gets as
many streams as the one has. Where each has cores to itself, all together should answer as many times more;
where they share them, a token should cost no more: CPU seconds are counted of the ranks, of
the engines, and of this process, which routes and reads. JSON on standard output, a table on standard error.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack, aclosing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil

from bench.report import about, show
from runtime.cluster.launch import Cluster
from runtime.cluster.session import lasting_ray
from runtime.config import EngineConfig, ModelConfig, ParallelConfig, ServeConfig
from runtime.server.replicas import Replicas
from runtime.types import Request, SamplingParams, TokenOutput


@dataclass(frozen=True)
class Sizes:
    streams: int = 16  # a replica
    prompt: int = 64
    reply: int = 128


QUICK = Sizes(streams=2, prompt=8, reply=8)


@dataclass(frozen=True)
class Run:
    """Of one round: tokens a second, and CPU milliseconds a token of each part."""

    tokens_per_s: float
    ranks_ms: float
    engines_ms: float
    gateway_ms: float

    @property
    def cost_ms(self) -> float:
        return self.ranks_ms + self.engines_ms + self.gateway_ms


@contextmanager
def clusters(path: str, count: int, tp: int, threads: int, sizes: Sizes) -> Iterator[list[Cluster]]:
    config = ServeConfig(
        ModelConfig(path, max_model_len=sizes.prompt + sizes.reply + 1),
        EngineConfig(max_num_seqs=sizes.streams, prefix_cache=False, draft_tokens=0),
        ParallelConfig(tp=tp, device="cpu", threads=threads, replicas=count),
    )
    with lasting_ray(), ExitStack() as stack:
        yield [stack.enter_context(Cluster(config, leaves_ray=True)) for _ in range(count)]


def engine_pids() -> list[int]:
    """Of this Ray's engine actors, which name themselves."""
    below = psutil.Process().children(recursive=True)
    return [each.pid for each in below if "EngineActor" in " ".join(each.cmdline()[:1])]


def cpu_seconds(pids: list[int]) -> float:
    times = [psutil.Process(pid).cpu_times() for pid in pids]
    return sum(each.user + each.system for each in times)


async def answer(client: Replicas, requests: list[Request]) -> int:
    """All at once; how many tokens came."""

    async def one(request: Request) -> int:
        async with aclosing(client.generate(request)) as outputs:
            return sum([isinstance(output, TokenOutput) async for output in outputs])

    return sum(await asyncio.gather(*(one(request) for request in requests)))


async def measure(made: list[Cluster], sizes: Sizes, rounds: int) -> dict[str, list[Run]]:
    """By number of replicas; one round more warms up."""
    ranks = [pid for each in made for pid in each.rank_pids]
    engines = engine_pids()
    runs: dict[str, list[Run]] = {"1": [], str(len(made)): []}
    async with AsyncExitStack() as stack:
        channels = []
        for each in made:
            channels.append(await each.connect())
            stack.push_async_callback(channels[-1].close)
        clients = {}
        for count in (1, len(made)):
            clients[count] = Replicas([each.info for each in made[:count]], returning=False)
            for index in range(count):
                clients[count].put(index, channels[index], made[index].info)
        for number in range(rounds + 1):
            for count in sorted(clients, reverse=bool(number % 2)):
                source = random.Random(number)
                requests = [
                    make(source, f"{number}.{count}.{i}", made[0].info.vocab_size, sizes)
                    for i in range(sizes.streams * count)
                ]
                before = [cpu_seconds(pids) for pids in (ranks, engines, [os.getpid()])]
                began = time.perf_counter()
                tokens = await answer(clients[count], requests)
                seconds = time.perf_counter() - began
                after = [cpu_seconds(pids) for pids in (ranks, engines, [os.getpid()])]
                if tokens != len(requests) * sizes.reply:
                    raise SystemExit(f"{tokens} tokens came of {len(requests)} replies of {sizes.reply}")
                costs = [1000 * (b - a) / tokens for a, b in zip(before, after, strict=True)]
                if number:
                    runs[str(count)].append(Run(tokens / seconds, *costs))
            print(f"round {number} of {rounds}", file=sys.stderr)
    return runs


def make(source: random.Random, name: str, vocab: int, sizes: Sizes) -> Request:
    prompt = tuple(source.randrange(vocab) for _ in range(sizes.prompt))
    return Request(name, prompt, SamplingParams(max_tokens=sizes.reply, temperature=0.0, seed=0))


def summary(runs: dict[str, list[Run]]) -> dict:
    """Medians, and those of the ratios all to one of the same round."""
    one, many = runs.values()
    medians = {
        count: {
            name: round(statistics.median(getattr(run, name) for run in each), 3)
            for name in Run.__dataclass_fields__
        }
        for count, each in runs.items()
    }
    pairs = list(zip(one, many, strict=True))
    gains = [b.tokens_per_s / a.tokens_per_s for a, b in pairs]
    costs = [b.cost_ms / a.cost_ms for a, b in pairs if a.cost_ms]  # the clock ticks every 10 ms
    return {
        "replicas": medians,
        "throughput_ratio": round(statistics.median(gains), 3),
        "cpu_per_token_ratio": round(statistics.median(costs), 3) if costs else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--threads", type=int, help="a rank; default: the cores divided among all ranks")
    parser.add_argument("--streams", type=int, default=Sizes.streams, help="a replica")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    if arguments.replicas < 2 or arguments.rounds < 1:
        parser.error("takes two replicas and one round at least")
    sizes = QUICK if arguments.quick else replace(Sizes(), streams=arguments.streams)
    rounds = 1 if arguments.quick else arguments.rounds
    threads = arguments.threads or max(1, (os.cpu_count() or 1) // (arguments.tp * arguments.replicas))
    with clusters(arguments.model, arguments.replicas, arguments.tp, threads, sizes) as made:
        runs = asyncio.run(measure(made, sizes, rounds))
        numerics = made[0].info.numerics
    found = summary(runs)
    result = about(("torch", "ray")) | {
        "model": Path(arguments.model).name,
        "numerics": numerics,
        "tp": arguments.tp,
        "threads": threads,
        "sizes": asdict(sizes),
        **found,
        "rounds": {count: [asdict(run) for run in each] for count, each in runs.items()},
    }
    columns = ["replicas", "tokens/s", "ranks, CPU ms a token", "engines", "gateway"]
    show(result, columns, [[count, *each.values()] for count, each in found["replicas"].items()])
    print(
        f"{found['throughput_ratio']}x the tokens, {found['cpu_per_token_ratio']}x the CPU time a token",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
