"""What guessing tokens ahead gains: the engine with speculation against itself without.

    python bench/speculation.py MODEL.gguf > speculation.json     SmolLM2-135M-Instruct: some minutes a round
    python bench/speculation.py MODEL.gguf --threads 1 --cpu-time     where others use the machine too
    python bench/speculation.py MODEL.gguf --quick                seconds: shows that it works, no figures

Three engines of one chat model stand side by side in this process and take turns, stretches of a reply within
moments of each other (see bench/turns.py), in an order that changes: one with guesses, two without, so that
what the bench finds between two that are alike is seen too. Two engines of one model differ by some percent
for as long as they live, by where their weights lie, so each takes another's part in the next round. Replies
must be the same, tokens and logprobs, bit for bit; the first round compares logprobs and is not timed. Every
round does the same work: of each stretch the median round counts. Tokens count from when as many have come as
there are streams. A gain is on / off, its range that of the rounds. "Copied" are tokens of a reply that stand
in runs of eight that the prompt has too. JSON on standard output, a table on standard error.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.local import Clock, local_engine
from bench.prompts import COPY_HEAVY, OTHERS
from bench.report import about, show
from bench.turns import Turns
from runtime.commands.engines import open_front
from runtime.config import EngineConfig, ModelConfig
from runtime.local import LocalEngine
from runtime.tokenizer.chat import render_chat
from runtime.types import Request, SamplingParams

TEMPERATURES = (0.0, 0.7)
SIDES = ("on", "off", "again")  # with guesses, without, and without once more
RUN = 8  # tokens that must agree to count as copied


@dataclass(slots=True)
class Case:
    """Requests that are sent at once, and what came of them: by round and stretch, each side's seconds."""

    name: str
    requests: list[Request]
    rounds: list[list[tuple[float, ...]]] = field(default_factory=list)
    reply_tokens: int = 0
    copied: int = 0
    drafted: int = 0
    accepted: int = 0

    def seconds(self, some: Sequence[int]) -> tuple[float, ...]:
        """Of each side: the sum over stretches of the median of these rounds."""
        stretches = range(len(self.rounds[0]))
        return tuple(
            sum(statistics.median(self.rounds[r][at][side] for r in some) for at in stretches)
            for side in range(len(SIDES))
        )

    def report(self) -> dict:
        rounds = range(len(self.rounds))
        gains = [off / on for on, off, _ in (self.seconds([number]) for number in rounds)]
        on, off, again = self.seconds(rounds)
        turns = [off / on for pieces in self.rounds for on, off, _ in pieces[:-1] or pieces]
        tokens = self.reply_tokens - len(self.requests)
        return {
            "on_tokens_per_s": round(tokens / on, 2),
            "off_tokens_per_s": round(tokens / off, 2),
            "gain": round(off / on, 3),
            "gain_range": [round(min(gains), 3), round(max(gains), 3)],
            "gain_of_median_turn": round(statistics.median(turns), 3),
            "gain_of_none": round(again / off, 3),
            "reply_tokens": self.reply_tokens,
            "copied_tokens": self.copied,
            "drafted_tokens": self.drafted,
            "accepted_tokens": self.accepted,
        }


def encode(path: str, prompts: dict[str, str]) -> tuple[dict[str, tuple[int, ...]], tuple[int, ...]]:
    """Prompt tokens by name, as a chat where the model has a template, and the tokens that end a reply."""
    front = open_front(ModelConfig(path), chat=True)
    try:
        tokens = {}
        for name, text in prompts.items():
            if front.template is None:
                tokens[name] = tuple(front.tokenizer.encode(text))
            else:
                messages = [{"role": "user", "content": text}]
                tokens[name] = tuple(render_chat(front.tokenizer, front.template, messages))
    finally:
        if front.template is not None:
            front.template.close()
    return tokens, tuple(front.tokenizer.eos_ids)


def cases(
    prompts: dict[str, tuple[int, ...]], stop: tuple[int, ...], streams: int, max_tokens: int
) -> Iterator[Case]:
    """Each prompt alone, greedy and sampled; then `streams` at once, of all prompts by turns, with seeds."""

    def request(name: str, number: int, temperature: float) -> Request:
        params = SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=number)
        return Request(f"{name} {number}", prompts[name], params, stop)

    copies, others = ([name for name in prompts if (name in COPY_HEAVY) == copy] for copy in (True, False))
    for name, temperature in itertools.product(prompts, TEMPERATURES):
        yield Case(f"{name}, {_how(temperature)}", [request(name, 3, temperature)])
    for kind, names in (("copies", copies), ("others", others)):
        for temperature in TEMPERATURES if streams else ():
            turns = itertools.islice(itertools.cycle(names), streams)
            requests = [request(name, number, temperature) for number, name in enumerate(turns)]
            yield Case(f"{streams} streams, {kind}, {_how(temperature)}", requests)


def guess(engine: LocalEngine, most: int) -> None:
    """From the next request on, so many guesses a step at most."""
    inner = engine.loop._engine
    for part in (inner, inner._scheduler):
        part.config = replace(part.config, draft_tokens=most)


def play(case: Case, engines: Sequence[LocalEngine], draft_tokens: int, number: int, clock: Clock) -> None:
    """One round of a case; number 0 compares logprobs and is not timed. Raises SystemExit where the replies
    are not the same."""
    requests = case.requests
    if number == 0:
        requests = [replace(r, params=replace(r.params, logprobs=1)) for r in requests]
    playing = {}
    for at, side in enumerate(SIDES):
        engine = engines[(at + number) % len(engines)]
        guess(engine, draft_tokens if side == "on" else 0)
        playing[side] = Turns(engine, requests, clock)
    orders = itertools.cycle(itertools.permutations(SIDES))
    stretches = []
    whole = case.reply_tokens if number else 0
    # In tokens of a stream: more than the most that come of one step, so that every turn has a step in it.
    stretch = draft_tokens + 2
    for turn, target in enumerate(range(len(requests), whole, stretch * len(requests))):
        seconds = {side: playing[side].until(target) for side in next(orders)}
        if turn:  # the first has the prompts in it
            stretches.append(tuple(max(seconds[side], 1e-9) for side in SIDES))
    traces, last = {}, {}
    for side in next(orders):
        last[side] = playing[side].until(whole)
        traces[side] = playing[side].finish()
    if number:
        case.rounds.append([*stretches, tuple(last[side] for side in SIDES)])
    for found in zip(*(traces[side] for side in SIDES), strict=True):
        mine, *plain = ([_bits(t) for t in trace.tokens] for trace in found)
        if any(mine != other for other in plain):
            raise SystemExit(f"{case.name}: speculation changed the reply to {found[0].finished.request_id}")
    if number:
        return
    with_ = traces["on"]
    ended = [trace.finished for trace in with_]
    case.reply_tokens = sum(len(trace.tokens) for trace in with_)
    case.copied = sum(copied(r.prompt, t.ids) for r, t in zip(requests, with_, strict=True))
    case.drafted = sum(end.drafted_tokens for end in ended)
    case.accepted = sum(end.accepted_tokens for end in ended)


def copied(prompt: Sequence[int], reply: Sequence[int]) -> int:
    """Tokens of the reply that stand in a run of RUN tokens that the prompt has too."""
    runs = {tuple(prompt[at : at + RUN]) for at in range(len(prompt) - RUN + 1)}
    found: set[int] = set()
    for at in range(len(reply) - RUN + 1):
        if tuple(reply[at : at + RUN]) in runs:
            found.update(range(at, at + RUN))
    return len(found)


def _bits(output) -> tuple:
    return output.index, output.token, output.logprob, output.top


def _how(temperature: float) -> str:
    return f"temperature {temperature}" if temperature else "greedy"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a chat model: a GGUF file or a folder")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--streams", type=int, default=16, help="at once, in the last cases; 0: none")
    parser.add_argument("--max-tokens", type=int, default=320)
    parser.add_argument("--draft-tokens", type=int, default=EngineConfig().draft_tokens)
    parser.add_argument("--threads", type=int, help="of a rank; all cores without")
    parser.add_argument("--cpu-time", action="store_true", help="count this process's CPU seconds")
    parser.add_argument("--only", nargs="*", default=[], help="prompts whose names hold one of these")
    parser.add_argument("--quick", action="store_true", help="short replies, one round, two prompts")
    args = parser.parse_args()
    clock = time.process_time if args.cpu_time else time.perf_counter
    if args.quick:
        args.rounds, args.streams, args.max_tokens = 1, 2, 12
    texts = {
        n: text
        for n, text in (COPY_HEAVY | OTHERS).items()
        if not args.only or any(part in n for part in args.only)
    }
    if args.quick:
        texts = {name: texts[name] for name in ("list, repeated", "story")}
    prompts, stop = encode(args.model, texts)
    longest = max(map(len, prompts.values())) + args.max_tokens
    played = [c for c in cases(prompts, stop, args.streams, args.max_tokens) if c.requests]
    with ExitStack() as stack:
        engines = [
            stack.enter_context(
                local_engine(
                    args.model,
                    context=longest,
                    positions=(args.streams + 1) * (longest + 128),
                    threads=args.threads,
                    prefix_cache=False,
                )
            )
            for _ in SIDES
        ]
        for number in range(args.rounds + 1):
            for case in played:
                play(case, engines, args.draft_tokens, number, clock)
                rates = "the same bits"
                if number:
                    on_s, off_s, _ = case.seconds([number - 1])
                    rates = f"{off_s:.2f} s off, {on_s:.2f} s on"
                print(f"round {number} of {args.rounds}, {case.name}: {rates}", file=sys.stderr)
        numerics = engines[0].client._info.numerics
    found = {case.name: case.report() for case in played}
    result = about() | {
        "model": Path(args.model).name,
        "numerics": numerics,
        "clock": clock.__name__,
        "threads": torch.get_num_threads(),
        "draft_tokens": args.draft_tokens,
        "max_tokens": args.max_tokens,
        "replies_equal": True,
        "cases": found,
        "seconds": {
            case.name: [[[round(s, 5) for s in pair] for pair in rounds] for rounds in case.rounds]
            for case in played
        },
    }
    rows = [
        [
            name,
            f"{of['off_tokens_per_s']:.1f}",
            f"{of['on_tokens_per_s']:.1f}",
            f"{of['gain']:.2f}x ({of['gain_range'][0]:.2f} to {of['gain_range'][1]:.2f})",
            f"{of['gain_of_median_turn']:.2f}x",
            f"{of['gain_of_none']:.2f}x",
            f"{of['accepted_tokens']} of {of['drafted_tokens']}",
            f"{of['copied_tokens']} of {of['reply_tokens']}",
        ]
        for name, of in found.items()
    ]
    headings = ["", "off, tok/s", "on, tok/s", "gain", "of the median turn", "of nothing"]
    show(result, [*headings, "guesses right", "copied"], rows)


if __name__ == "__main__":
    main()
