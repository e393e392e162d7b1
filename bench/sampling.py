"""Times the sampler alone: `python bench/sampling.py [--rows 16] [--vocab 49152] [--threads 1]`.

Prints one JSON line a distribution: medians in milliseconds for a call over all rows. "peaked" logits look
like a language model's in mid-sentence (a handful of tokens hold most of the mass), "flat" ones are the
worst case of no preference at all.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch

from runtime.sampling.sampler import SamplerState, sample
from runtime.types import SamplingParams

CASES = {
    "greedy": SamplingParams(temperature=0.0),
    "temperature": SamplingParams(temperature=0.8, seed=1),
    "top_p": SamplingParams(temperature=0.8, top_p=0.95, seed=1),
    "top_k": SamplingParams(temperature=0.8, top_k=40, seed=1),
    "min_p": SamplingParams(temperature=0.8, min_p=0.05, seed=1),
    "penalties": SamplingParams(
        temperature=0.8, repetition_penalty=1.1, presence_penalty=0.5, frequency_penalty=0.5, seed=1
    ),
    "greedy_logprobs": SamplingParams(temperature=0.0, logprobs=5),
}


def _logits(kind: str, rows: int, vocab: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(rows, vocab, generator=generator)
    if kind == "flat":
        return logits * 0.1
    logits *= 2.5
    tall = torch.rand(rows, 40, generator=generator) * 8.0 + 10.0
    return logits.scatter_(1, torch.randint(vocab, (rows, 40), generator=generator), tall)


def median_ms(logits: torch.Tensor, params: SamplingParams, context: int, repeats: int) -> float:
    """Median milliseconds of one `sample` call; each sequence holds `context` tokens, half of them reply."""
    rows, vocab = logits.shape
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(vocab, (rows, context), generator=generator).tolist()
    half = context // 2
    states = [SamplerState(params, text[:half], text[half:], (2,), vocab) for text in tokens]
    times = []
    for step in range(repeats + 3):
        start = time.perf_counter()
        sample(logits, states, [context + step] * rows)
        times.append(time.perf_counter() - start)
    return round(statistics.median(times[3:]) * 1e3, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for kind in ("peaked", "flat"):
        logits = _logits(kind, options.rows, options.vocab)
        medians = {
            name: median_ms(logits, params, options.context, options.repeats)
            for name, params in CASES.items()
        }
        shape = {"rows": options.rows, "vocab": options.vocab, "threads": options.threads}
        print(json.dumps({"logits": kind, **shape, "ms": medians}))


if __name__ == "__main__":
    main()
