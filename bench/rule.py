"""What the rule costs on a CPU: the engine as it is against itself without padding and ordering.

    python bench/rule.py MODEL.gguf --rounds 7 > rule.json        SmolLM2-135M: a minute a round
    python bench/rule.py MODEL.gguf --threads 1 --cpu-time        where others use the machine too
    python bench/rule.py MODEL.gguf --quick                       seconds: shows that it works, no figures

Engines of one model stand side by side in this process: the one as it is ("ruled"), one for each item of
bench/free_order.py with that item alone switched off, one with all of them off ("all"), and one that only
keeps K cut by unit, should the shorter products be the faster ones. They take turns, workload by workload,
in an order that rotates from round to round. Each does the same pieces of work in every round (a few steps,
a prompt), and of each piece the least time of any round counts: machines that are shared are slowed down for
moments, by turns, and never sped up. An item's cost is 1 - ruled / free of the rates that this gives; its
range is what it would be without one round or another. What they compute is compared first: free engines
round differently, and must agree otherwise. With --cpu-time, seconds are those this process computes. JSON on
standard output, a table on standard error.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.free_order import ITEMS, RULE, switched_off
from bench.local import Clock, Trace, ask, decode_times, least, local_engine, stretches
from bench.report import about, show
from kernels.linear import Bf16Weight, Fp32Weight
from runtime.local import LocalEngine
from runtime.types import Request, SampledToken, SamplingParams, TokenOutput, TokenScore

RULED, ALL, CUT = "ruled", "all", "all but units"
PREFILLS = 3  # prompts of one turn
STRETCH = 8  # steps that are one piece of work
TOP = 20  # likeliest tokens whose logprobs are compared
BOUND = 1.0  # what one may differ by, natural log; the bf16 sums of another order are off by a tenth of it


@dataclass(frozen=True)
class Sizes:
    streams: int = 16
    context: int = 64
    decode: int = 64
    prefill: int = 512

    @property
    def positions(self) -> int:
        """KV for the largest workload, with room for whole blocks."""
        return (self.streams + 1) * (self.context + self.decode + 128) + 2 * self.prefill


QUICK = Sizes(streams=3, context=20, decode=6, prefill=40)


@dataclass(frozen=True)
class Workload:
    """`run` gives the seconds of each piece; `tokens` is how many a piece has."""

    tokens: int
    run: Callable[[LocalEngine, random.Random], list[float]]

    def rate(self, rounds: Sequence[Sequence[float]]) -> float:
        """Tokens a second, of each piece's least time."""
        best = least(rounds)
        return self.tokens * len(best) / sum(best)


def workloads(sizes: Sizes, clock: Clock) -> dict[str, Workload]:
    length = min(STRETCH, sizes.decode // 3)

    def decode(streams: int, temperature: float) -> Workload:
        def run(engine: LocalEngine, source: random.Random) -> list[float]:
            params = _params(temperature, sizes.decode + 1)
            requests = _requests(engine, source, [sizes.context] * streams, params)
            return stretches(decode_times(ask(engine, requests, clock)), length)

        return Workload(length * streams, run)

    def prefill(engine: LocalEngine, source: random.Random) -> list[float]:
        prompts = _requests(engine, source, [sizes.prefill] * PREFILLS, _params(0.0, 1))
        return [ask(engine, [p], clock)[0].first_s for p in prompts]

    many = f"{sizes.streams} streams"
    return {
        "1 stream": decode(1, 0.0),
        many: decode(sizes.streams, 0.0),
        f"prefill of {sizes.prefill}": Workload(sizes.prefill, prefill),
        "1 stream, sampled": decode(1, 0.8),
        f"{many}, sampled": decode(sizes.streams, 0.8),
    }


def contestants(path: str, sizes: Sizes, threads: int | None, stack: ExitStack) -> dict[str, LocalEngine]:
    """An engine for each choice of what is off; items that this model does not meet have none."""

    def build(name: str) -> LocalEngine:
        with switched_off(without(name)):
            opened = local_engine(
                path,
                context=max(sizes.context + sizes.decode + 2, sizes.prefill + 2),
                positions=sizes.positions,
                threads=threads,
                prefix_cache=False,
                draft_tokens=0,
            )
            return stack.enter_context(opened)

    ruled = build(RULED)
    return {RULED: ruled, ALL: build(ALL), CUT: build(CUT)} | {
        name: build(name) for name in ITEMS if _meets(ruled, name)
    }


def without(name: str) -> tuple[str, ...]:
    """The items that are off for a contestant of this name."""
    groups = {RULED: (), ALL: RULE, CUT: tuple(item for item in RULE if item != "units")}
    return groups.get(name, (name,))


def agreement(engines: Mapping[str, LocalEngine], sizes: Sizes) -> dict[str, dict[str, float]]:
    """How far each engine's logprobs are from the ruled one's, over the tokens of three prompts and over
    replies to them, side by side, that go on alike because a bias says how. Raises SystemExit past BOUND."""
    seen = {}
    for name, engine in engines.items():
        source = random.Random(1)
        lengths = [sizes.context // 4, sizes.context // 2 + 1, sizes.context]
        with switched_off(without(name)):
            params = _params(0.0, 2, logprobs=TOP)
            scored = ask(engine, _requests(engine, source, lengths, params, scores=True))
            token = source.randrange(engine.model.spec.vocab)
            params = _params(0.0, sizes.decode // 4 + 2, logprobs=TOP, logit_bias=((token, 1e6),))
            replies = ask(engine, _requests(engine, source, lengths, params))
        seen[name] = _logprobs(scored, replies)
    differences = {}
    for name, values in seen.items():
        apart = [abs(value - seen[RULED][key]) for key, value in values.items() if key in seen[RULED]]
        if name != RULED:
            differences[name] = {"max": max(apart), "mean": statistics.mean(apart), "compared": len(apart)}
            if not max(apart) <= BOUND:
                raise SystemExit(
                    f"without {name}, a logprob is off by {max(apart):.3f}: not the same function"
                )
    return differences


def measure(
    engines: Mapping[str, LocalEngine], sizes: Sizes, rounds: int, clock: Clock
) -> dict[str, dict[str, list[list[float]]]]:
    """Seconds of each piece of work by workload and contestant, an entry a round; one round more warms up."""
    names = list(engines)
    seconds: dict[str, dict[str, list[list[float]]]] = {}
    for number in range(rounds + 1):
        for name_of, workload in workloads(sizes, clock).items():
            for name in names[number % len(names) :] + names[: number % len(names)]:
                with switched_off(without(name)):
                    pieces = workload.run(engines[name], random.Random(number))
                if number:
                    seconds.setdefault(name_of, {}).setdefault(name, []).append(pieces)
        print(f"round {number} of {rounds}", file=sys.stderr)
    return seconds


def summary(workload: Workload, seconds: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, dict]:
    """Of one workload: rates, and what each item costs as a share of what is had without it."""
    rounds = range(len(seconds[RULED]))
    left_out = [[r for r in rounds if r != out] or list(rounds) for out in rounds]

    def cost(name: str, some: Sequence[int]) -> float:
        ruled, free = (workload.rate([seconds[which][r] for r in some]) for which in (RULED, name))
        return round(1 - ruled / free, 4)

    return {
        name: {
            "tokens_per_s": round(workload.rate(pieces), 2),
            "cost": cost(name, rounds),
            "cost_range": [bound(cost(name, some) for some in left_out) for bound in (min, max)],
        }
        for name, pieces in seconds.items()
    }


def _requests(
    engine: LocalEngine, source: random.Random, lengths: Sequence[int], params: SamplingParams, **more: bool
) -> list[Request]:
    """One of random tokens for each length."""
    vocab = engine.model.spec.vocab
    return [
        Request(f"r{i}", tuple(source.randrange(vocab) for _ in range(length)), params, **more)
        for i, length in enumerate(lengths)
    ]


def _params(temperature: float, max_tokens: int, **more) -> SamplingParams:
    return SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=0, **more)


def _logprobs(scored: Sequence[Trace], replies: Sequence[Trace]) -> dict[tuple, float]:
    """Every logprob that is known, by where it stands and its token; None for the token that came."""
    rows: list[tuple[tuple, TokenOutput | TokenScore | SampledToken]] = []
    for kind, traces in enumerate((scored, replies)):
        for i, trace in enumerate(traces):
            rows += (((kind, i, at), row) for at, row in enumerate(trace.tokens if kind else trace.scores))
    found: dict[tuple, float] = {}
    for where, row in rows:
        found[*where, None] = row.logprob
        found |= {(*where, entry.token): entry.logprob for entry in row.top}
    return found


def _meets(engine: LocalEngine, item: str) -> bool:
    """Whether an item makes a difference for the model of this engine, here."""
    shard = engine.loop._ranks._runners[0].forward.shard
    if item == "units":
        return len(shard.units) > 1
    if item == "activation":
        return engine.model.dtype == "fp32"
    if item == "head":
        return all(head.weight is None for head in shard.heads)
    return item != "dense" or any(isinstance(w, Bf16Weight | Fp32Weight) for w in _weights(shard))


def _weights(shard) -> Iterator[object]:
    yield from (head.weight for head in shard.heads)
    for layer in shard.layers:
        yield from (*layer.qkv.parts, *layer.attention_output)
        for ffn in layer.ffn:
            yield from (*ffn.gate_up.parts, *ffn.down)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a GGUF file or a folder")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--streams", type=int, default=Sizes.streams)
    parser.add_argument("--threads", type=int, help="of a rank; all cores without")
    parser.add_argument("--cpu-time", action="store_true", help="count this process's CPU seconds")
    parser.add_argument(
        "--quick", action="store_true", help="small sizes and one round, to see that it works"
    )
    args = parser.parse_args()
    clock = time.process_time if args.cpu_time else time.perf_counter
    sizes = QUICK if args.quick else Sizes(streams=args.streams)
    with ExitStack() as stack:
        engines = contestants(args.model, sizes, args.threads, stack)
        numerics = engines[RULED].client._info.numerics
        differences = agreement(engines, sizes)
        seconds = measure(engines, sizes, 1 if args.quick else args.rounds, clock)
    found = {name: summary(of, seconds[name]) for name, of in workloads(sizes, clock).items()}
    result = about() | {
        "model": Path(args.model).name,
        "numerics": numerics,
        "sizes": asdict(sizes),
        "clock": clock.__name__,
        "threads": torch.get_num_threads(),
        "items": {name: ITEMS[name].about for name in engines if name in ITEMS},
        "logprobs_apart": differences,
        "workloads": found,
        "seconds": {
            name: {who: [[round(s, 5) for s in pieces] for pieces in rounds] for who, rounds in of.items()}
            for name, of in seconds.items()
        },
    }
    rows = [["ruled, tok/s", *(f"{found[w][RULED]['tokens_per_s']:.1f}" for w in found)]]
    for name in engines:
        if name != RULED:
            label = f"without {name}" + (" (not the rule's)" if name in ITEMS and ITEMS[name].kept else "")
            rows.append([label, *(f"costs {100 * found[w][name]['cost']:.1f}%" for w in found)])
    show(result, ["", *found], rows)


if __name__ == "__main__":
    main()
