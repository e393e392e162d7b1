"""What the prefix cache saves: time to the first token of a prompt, cold and warm.

    python bench/prefix.py MODEL.gguf > prefix.json               SmolLM2-135M: half a minute
    python bench/prefix.py MODEL.gguf --quick                     seconds: shows that it works, no figures

Each round has a salt of its own, so that its first request finds nothing: "cold". Then the same prompt again
("warm"), and the prompt with other tokens at its end ("other ending"): a question about a text that was
asked about before. Blocks are cached whole, and the last token is always computed, so that a warm request
computes 1 to block_size tokens: how many is shown. Medians over rounds, of the ratio to the cold request of
the same round too. JSON on standard output, a table on standard error.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.local import ask, local_engine
from bench.report import about, show
from runtime.local import LocalEngine
from runtime.types import Request, SamplingParams

WAYS = ("cold", "warm", "other ending")


def measure(engine: LocalEngine, length: int, ending: int, rounds: int) -> dict[str, dict]:
    """Seconds to the first token by way, an entry a round, and prompt tokens computed. One round more warms
    up. Raises SystemExit where the cache did not do what a way is named for."""
    source = random.Random(length)
    vocab = engine.model.spec.vocab
    found: dict[str, dict] = {way: {"seconds": [], "computed": 0} for way in WAYS}
    for number in range(rounds + 1):
        prompt = [source.randrange(vocab) for _ in range(length)]
        other = prompt[: length - ending] + [source.randrange(vocab) for _ in range(ending)]
        for way, tokens in zip(WAYS, (prompt, prompt, other), strict=True):
            params = SamplingParams(temperature=0.0, max_tokens=1, seed=0)
            request = Request(way, tuple(tokens), params, cache_salt=f"round {length} {number}")
            (trace,) = ask(engine, [request])
            found[way]["computed"] = computed = length - trace.finished.cached_tokens
            if (computed == length) != (way == "cold"):
                raise SystemExit(f"{way}: {computed} of {length} tokens were computed")
            if number:
                found[way]["seconds"].append(trace.first_s)
    return found


def summary(found: dict[str, dict]) -> dict[str, dict]:
    cold = found["cold"]["seconds"]
    return {
        way: {
            "first_token_s": round(statistics.median(of["seconds"]), 5),
            "of_cold": round(statistics.median(a / b for a, b in zip(of["seconds"], cold, strict=True)), 4),
            "computed_tokens": of["computed"],
        }
        for way, of in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a GGUF file or a folder")
    parser.add_argument("--prompt-tokens", type=int, nargs="*", default=[1000, 1024, 4000])
    parser.add_argument("--ending", type=int, default=20, help="tokens that the other ending replaces")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, help="of a rank; all cores without")
    parser.add_argument("--quick", action="store_true", help="one short prompt and one round")
    args = parser.parse_args()
    lengths = [200] if args.quick else args.prompt_tokens
    rounds = 1 if args.quick else args.rounds
    most = max(lengths)
    with local_engine(
        args.model, context=most + 1, positions=4 * most + 512, threads=args.threads, draft_tokens=0
    ) as engine:
        raw = {length: measure(engine, length, args.ending, rounds) for length in lengths}
        numerics = engine.client._info.numerics
        block = engine.config.block_size
    found = {str(length): summary(of) for length, of in raw.items()}
    result = about() | {
        "model": Path(args.model).name,
        "numerics": numerics,
        "block_size": block,
        "prompts": found,
        "rounds": {str(length): of for length, of in raw.items()},
    }
    rows = [
        [length, way, f"{1e3 * of['first_token_s']:.1f}", f"{of['of_cold']:.3f}", of["computed_tokens"]]
        for length, ways in found.items()
        for way, of in ways.items()
    ]
    show(result, ["prompt", "", "first token, ms", "of cold", "tokens computed"], rows)


if __name__ == "__main__":
    main()
