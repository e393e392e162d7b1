"""The requests whose replies must not change by a bit, whatever happens around them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from runtime.types import Request, SamplingParams

PARAMS = [
    SamplingParams(temperature=0.0, logprobs=3),
    SamplingParams(temperature=0.0, repetition_penalty=1.3, logprobs=0),
    SamplingParams(temperature=0.7, seed=11, logprobs=2),
    SamplingParams(temperature=1.0, seed=12),
    SamplingParams(temperature=1.5, seed=13, top_k=7, logprobs=1),
    SamplingParams(temperature=0.9, seed=14, top_p=0.6, logprobs=0),
    SamplingParams(temperature=1.2, seed=15, min_p=0.05, logprobs=0),
    SamplingParams(temperature=3.0, seed=16, top_k=50, top_p=0.9, min_p=0.01, logprobs=5),
    SamplingParams(temperature=0.8, seed=17, presence_penalty=0.8, frequency_penalty=0.4, logprobs=0),
    SamplingParams(temperature=1.0, seed=2**64 - 1, repetition_penalty=0.8, logprobs=0),
    SamplingParams(temperature=0.0, logit_bias=((5, 4.0), (9, -50.0)), logprobs=1),
    SamplingParams(temperature=1.0, seed=18, min_tokens=6, logprobs=0),
]  # every one seeded: a seed is part of the request when it reaches the engine


def requests(vocab: int, context: int, *, count: int = 12, longest: int = 28) -> list[Request]:
    """Short and long prompts, some of which share a beginning; some with stop tokens that do come up."""
    rng = np.random.default_rng(vocab)
    shared = rng.integers(3, vocab, context).tolist()
    made = []
    for i in range(count):
        room = context - longest - 1
        length = [1, 5, 16, 17, 64, 65, room][i % 7]
        length = min(length, room)
        if i % 3 == 0:
            prompt = shared[: length - length // 4] + rng.integers(3, vocab, length // 4).tolist()
        else:
            prompt = rng.integers(3, vocab, length).tolist()
        params = PARAMS[i % len(PARAMS)]
        seed = params.seed if params.seed is not None else i
        params = replace(params, seed=seed, max_tokens=longest - i % 5)
        stops = tuple(rng.choice(vocab, vocab // 16, replace=False).tolist()) if i % 4 in (1, 3) else ()
        made.append(Request(f"r{i}", tuple(prompt), params, stops))
    return made


def others(vocab: int, context: int, count: int) -> list[Request]:
    """Company: whatever else an engine may be busy with."""
    rng = np.random.default_rng(7)
    return [
        Request(
            f"other{i}",
            tuple(rng.integers(3, vocab, int(rng.integers(1, context // 2))).tolist()),
            SamplingParams(
                temperature=1.0, seed=i, max_tokens=int(rng.integers(1, 40)), logprobs=i % 2 or None
            ),
        )
        for i in range(count)
    ]


def named(requests: list[Request], suffix: str) -> list[Request]:
    return [replace(request, request_id=request.request_id + suffix) for request in requests]
