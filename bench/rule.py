"""What the rule costs on a CPU: the engine as it is against itself without padding and ordering.

    python bench/rule.py MODEL.gguf --rounds 7 > rule.json        SmolLM2-135M: some minutes a round
    python bench/rule.py MODEL.gguf --threads 1 --cpu-time        where others use the machine too
    python bench/rule.py MODEL.gguf --quick                       seconds: shows that it works, no figures

Engines of one model stand side by side in this process: the one as it is ("ruled"), one for each item of
bench/free_order.py with that item alone switched off, one with all of them off ("all"), and one that only
keeps K cut by unit, should the shorter products be the faster ones. Each stands against the ruled one,
workload by workload: the two take turns of a few steps, or of a prompt, within moments of each other (see
bench/turns.py). What an item costs is the median over turns of 1 - ruled's rate / the free one's, its range
the middle half of them. What they compute is compared first: free engines round differently, and must agree
otherwise. With --cpu-time, seconds are those this process computes. JSON on standard output, a table on
standard error.
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
from bench.local import Clock, Trace, ask, local_engine
from bench.report import about, show
from bench.turns import Turns
from kernels.attention import native_takes
from kernels.linear import Bf16Weight, Fp32Weight
from runtime.local import LocalEngine
from runtime.types import Request, SampledToken, SamplingParams, TokenOutput, TokenScore

RULED, ALL, CUT = "ruled", "all", "all but units"
PREFILLS = 6  # prompts a round
STRETCH = 8  # steps of a turn
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


# Seconds of the ruled engine and of the other for the same work, an entry a turn.
Pairs = list[tuple[float, float]]


@dataclass(frozen=True)
class Workload:
    """`run(engines, name, round)` lets the ruled engine and the named one take turns of `tokens` tokens."""

    tokens: int
    run: Callable[[Mapping[str, LocalEngine], str, int], Pairs]


def workloads(sizes: Sizes, clock: Clock) -> dict[str, Workload]:
    stretch = min(STRETCH, sizes.decode // 3)

    def by_turns(name: str, number: int, turn: Callable[[str], float]) -> tuple[float, float]:
        seconds = {}
        for who in (RULED, name) if number % 2 else (name, RULED):
            with switched_off(without(who)):
                seconds[who] = turn(who)
        return seconds[RULED], seconds[name]

    def decode(streams: int, temperature: float) -> Workload:
        def run(engines: Mapping[str, LocalEngine], name: str, number: int) -> Pairs:
            params = _params(temperature, sizes.decode + 4)
            source = random.Random(number)
            requests = _requests(engines[RULED], source, [sizes.context] * streams, params)
            sides = {who: Turns(engines[who], requests, clock) for who in (RULED, name)}
            # The first turn has the prompts in it: by its end every stream has a token.
            by_turns(name, 0, lambda who: sides[who].until(3 * streams))
            pairs = [
                by_turns(name, turn, lambda who: sides[who].until(sides[who].tokens + stretch * streams))
                for turn in range(sizes.decode // stretch)
            ]
            by_turns(name, 0, lambda who: len(sides[who].finish()))
            return pairs

        return Workload(stretch * streams, run)

    def prefill(engines: Mapping[str, LocalEngine], name: str, number: int) -> Pairs:
        source = random.Random(number)
        prompts = _requests(engines[RULED], source, [sizes.prefill] * PREFILLS, _params(0.0, 1))
        return [
            by_turns(name, turn, lambda who, p=prompt: ask(engines[who], [p], clock)[0].first_s)
            for turn, prompt in enumerate(prompts)
        ]

    many = f"{sizes.streams} streams"
    return {
        "1 stream": decode(1, 0.0),
        many: decode(sizes.streams, 0.0),
        f"prefill of {sizes.prefill}": Workload(sizes.prefill, prefill),
        "1 stream, sampled": decode(1, 0.8),
        f"{many}, sampled": decode(sizes.streams, 0.8),
    }


def contestants(
    path: str, sizes: Sizes, threads: int | None, stack: ExitStack, only: Sequence[str] = ()
) -> dict[str, LocalEngine]:
    """An engine for each choice of what is off, or those named in `only`; items that this model does not meet
    have none."""

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
    met = [ALL, CUT, *(name for name in ITEMS if _meets(ruled, name))]
    return {RULED: ruled} | {name: build(name) for name in met if name in only or not only}


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
) -> dict[str, dict[str, Pairs]]:
    """The turns of each contestant and the ruled engine, by workload; one round more warms up."""
    pairs: dict[str, dict[str, Pairs]] = {}
    for number in range(rounds + 1):
        for what, workload in workloads(sizes, clock).items():
            for name in (name for name in engines if name != RULED):
                found = workload.run(engines, name, number)
                if number:
                    pairs.setdefault(what, {}).setdefault(name, []).extend(found)
        print(f"round {number} of {rounds}", file=sys.stderr)
    return pairs


def summary(workload: Workload, pairs: Mapping[str, Pairs]) -> dict[str, dict]:
    """Of one workload: the rate of the quickest turn, and what each item costs as a share of what is had
    without it."""
    least = min(ruled for of in pairs.values() for ruled, _ in of)
    found = {RULED: {"best_tokens_per_s": round(workload.tokens / least, 2), "cost": 0.0}}
    for name, of in pairs.items():
        costs = [1 - free / ruled for ruled, free in of]
        quarters = statistics.quantiles(costs, n=4) if len(costs) > 1 else costs * 3
        found[name] = {
            "best_tokens_per_s": round(workload.tokens / min(free for _, free in of), 2),
            "cost": round(statistics.median(costs), 4),
            "cost_range": [round(quarters[0], 4), round(quarters[2], 4)],
            "turns": len(of),
        }
    return found


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
    if item in ("single tokens", "runs"):
        return not native_takes(engine.model.spec.head_dim, shard.dtype)
    if item == "activation":
        return engine.model.dtype == "fp32"
    if item == "head":
        return all(head.weight is None for head in shard.heads)
    return item != "dense" or any(isinstance(w, Bf16Weight | Fp32Weight) for w in _weights(shard))


def _weights(shard) -> Iterator[object]:
    yield from (head.weight for head in shard.heads)
    for layer in shard.layers:
        yield from (*layer.qkv.parts, *layer.attention_output)
        if layer.ffn is not None:
            yield from (*layer.ffn.gate_up.parts, *layer.ffn.down)


def _costs(of: Mapping) -> str:
    low, high = of["cost_range"]
    return f"costs {100 * of['cost']:.1f}% ({100 * low:.0f} to {100 * high:.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a GGUF file or a folder")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--streams", type=int, default=Sizes.streams)
    parser.add_argument("--only", nargs="*", default=[], choices=[ALL, CUT, *ITEMS], help="contestants")
    parser.add_argument("--threads", type=int, help="of a rank; all cores without")
    parser.add_argument("--cpu-time", action="store_true", help="count this process's CPU seconds")
    parser.add_argument(
        "--quick", action="store_true", help="small sizes and one round, to see that it works"
    )
    args = parser.parse_args()
    clock = time.process_time if args.cpu_time else time.perf_counter
    sizes = QUICK if args.quick else Sizes(streams=args.streams)
    with ExitStack() as stack:
        engines = contestants(args.model, sizes, args.threads, stack, args.only)
        numerics = engines[RULED].client._info.numerics
        differences = agreement(engines, sizes)
        pairs = measure(engines, sizes, 1 if args.quick else args.rounds, clock)
    found = {name: summary(of, pairs[name]) for name, of in workloads(sizes, clock).items()}
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
            name: {who: [[round(s, 5) for s in pair] for pair in turns] for who, turns in of.items()}
            for name, of in pairs.items()
        },
    }
    rows = [["ruled at best, tok/s", *(f"{found[w][RULED]['best_tokens_per_s']:.1f}" for w in found)]]
    for name in engines:
        if name != RULED:
            label = f"without {name}" + (" (not the rule's)" if name in ITEMS and ITEMS[name].kept else "")
            rows.append([label, *(_costs(found[w][name]) for w in found)])
    show(result, ["", *found], rows)


if __name__ == "__main__":
    main()
